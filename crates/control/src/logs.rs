//! An app's logs: each host has those of its own machines. All of them are asked, and their lines come in the order of
//! their time. A host that cannot be asked is told of among the lines, so that nobody takes what is missing for silence.

use crate::failure::Failure;
use crate::now_ms;
use crate::owners::Owners;
use dunlin_api::shares::{Share, Shares};
use dunlin_api::tail::{Tail, Taken, bytes_of};
use dunlin_api::{LogLine, LogQuery, LogStream, Refusal};
use dunlin_model::{AppName, HostId, MachineId};
use futures_util::future::{join_all, select_all};
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};

const QUEUE: usize = 64;
/// For a host to begin.
const OPEN_WAIT: Duration = Duration::from_secs(3);
/// All that hosts have, but for what comes meanwhile, is read within this, or is told to be missing.
const BACKLOG_WAIT: Duration = Duration::from_secs(30);
/// A follower that has nothing more for this long has told what was there before.
const BACKLOG_PAUSE: Duration = Duration::from_millis(500);
/// So long a line waits for older ones of other hosts.
const HOLD: Duration = Duration::from_millis(100);
/// Of lines from before, of each host and of all together, until they are told; a host sends no more.
const BACKLOG_BYTES: usize = 16 << 20;
/// Of those of all that is asked here; an app gets half.
const BACKLOGS_BYTES: usize = 128 << 20;
/// How often a follower looks for hosts that have machines of the app since a moment ago.
const LOOK: Duration = Duration::from_secs(1);

static BACKLOGS: LazyLock<Arc<Shares>> = LazyLock::new(|| Shares::halves(BACKLOGS_BYTES));

/// The newest lines of all hosts together, `query.tail` of them, and then what comes.
pub(crate) async fn lines(owners: Owners, app: AppName, query: LogQuery) -> Result<mpsc::Receiver<LogLine>, Failure> {
    let asked = hosts_of(&owners, &app, query.machine.as_ref());
    let is_here = |host: &HostId| host == owners.here().host_id();
    if !owners.is_fleet() && asked.keys().all(is_here) {
        return Ok(owners.here().logs(query).await?.lines);
    }
    let (sender, lines) = mpsc::channel(QUEUE);
    let mut merged = Merged { app, query, sources: vec![], asked: BTreeMap::new() };
    let missing = merged.open(&owners, asked, merged.query.clone()).await;
    tokio::spawn(async move {
        tokio::select! {
            _ = merged.run(&owners, missing, &sender) => {} // nobody listens any more, or all was told
            () = sender.closed() => {}
            () = owners.stop().cancelled() => {}
        }
    });
    Ok(lines)
}

/// Hosts that have machines of the app, or had them and are at their end, each with one of these machines.
fn hosts_of(owners: &Owners, app: &AppName, machine: Option<&MachineId>) -> BTreeMap<HostId, MachineId> {
    let view = owners.view().current();
    let assigned = view.config.machines.values().filter(|row| row.spec.app == *app).map(|row| (&row.host, &row.id));
    let heard = view.machines_of(app).map(|fact| (&fact.host, &fact.id));
    let wanted = assigned.chain(heard).filter(|(_, id)| machine.is_none_or(|machine| machine == *id));
    wanted.map(|(host, id)| (host.clone(), id.clone())).collect()
}

/// Nobody listens any more.
struct Gone;

struct Merged {
    app: AppName,
    query: LogQuery,
    sources: Vec<Source>,
    /// Hosts that were asked, each with a machine of the app there.
    asked: BTreeMap<HostId, MachineId>,
}

struct Source {
    host: HostId,
    stream: LogStream,
    /// The oldest line that was not told.
    head: Option<LogLine>,
    /// It had nothing to say when it was last waited for.
    is_quiet: bool,
    has_ended: bool,
}

impl Merged {
    /// Asks hosts side by side; lines that tell of those that do not answer.
    async fn open(&mut self, owners: &Owners, asked: BTreeMap<HostId, MachineId>, query: LogQuery) -> Vec<LogLine> {
        let opened = join_all(asked.into_iter().map(async |(host, machine)| {
            let opened = match owners.reach(&host) {
                Ok(there) => timeout(OPEN_WAIT, there.logs(query.clone())).await.unwrap_or_else(|_| {
                    Err(Refusal::Unreachable { host: host.clone(), why: format!("no answer within {} s", OPEN_WAIT.as_secs()) })
                }),
                Err(refusal) => Err(refusal),
            };
            (host, machine, opened)
        }));
        let mut missing = Vec::new();
        for (host, machine, opened) in opened.await {
            match opened {
                Ok(stream) => {
                    self.sources.push(Source { host: host.clone(), stream, head: None, is_quiet: false, has_ended: false });
                }
                Err(refusal) => missing.push(told(&self.app, &machine, &refusal)),
            }
            self.asked.insert(host, machine);
        }
        missing
    }

    async fn run(&mut self, owners: &Owners, missing: Vec<LogLine>, to: &mpsc::Sender<LogLine>) -> Result<(), Gone> {
        let (lines, mut held) = self.backlog().await;
        for line in lines.into_iter().chain(missing) {
            let bytes = bytes_of(&line);
            send(to, line).await?;
            if let Some(held) = &mut held {
                held.shrink(bytes);
            }
        }
        drop(held);
        if !self.query.follow {
            return Ok(());
        }
        let mut look_at = Instant::now() + LOOK;
        loop {
            if Instant::now() >= look_at {
                for line in self.join_new(owners).await {
                    send(to, line).await?;
                }
                look_at = Instant::now() + LOOK;
            }
            self.fill(look_at).await;
            if let Some(line) = self.oldest() {
                send(to, line).await?;
            }
            for line in self.bury(owners) {
                send(to, line).await?;
            }
        }
    }

    /// What there was before, in the order of time, and its room in memory.
    async fn backlog(&mut self) -> (Vec<LogLine>, Option<Share>) {
        let (app, asked, is_follower) = (&self.app, &self.asked, self.query.follow);
        // Nothing is to be put in order, and who follows sees each line at once.
        if is_follower && self.sources.len() == 1 {
            return (vec![], None);
        }
        let end = Instant::now() + BACKLOG_WAIT;
        let wanted = self.query.tail.unwrap_or(usize::MAX);
        let read = self.sources.iter_mut().map(async |source| {
            let machine = asked.get(&source.host)?;
            let mut lines = Tail::new(BACKLOGS.take(Some(app), 0).ok()?, wanted, BACKLOG_BYTES);
            loop {
                let pause = if is_follower { end.min(Instant::now() + BACKLOG_PAUSE) } else { end };
                match timeout_at(pause, source.stream.lines.recv()).await {
                    Ok(Some(line)) => lines.push(line),
                    Ok(None) => {
                        source.has_ended = true;
                        break;
                    }
                    Err(_) => {
                        source.is_quiet = true;
                        break;
                    }
                }
            }
            let late = || Refusal::Unreachable { host: source.host.clone(), why: "it has not sent all its lines in time".into() };
            let broken = source.stream.broken.get().cloned();
            let broken = broken.or_else(|| (!is_follower && !source.has_ended).then(late));
            if let Some(refusal) = broken {
                lines.push(told(app, machine, &refusal));
            }
            Some(lines.taken())
        });
        let mut all: Option<Taken> = None;
        for of_host in join_all(read).await.into_iter().flatten() {
            match &mut all {
                Some(all) => all.merge(of_host, wanted, BACKLOG_BYTES),
                None => all = Some(of_host),
            }
        }
        let told = all.zip(self.asked.values().next()).map(|(all, machine)| all.told(wanted, &self.app, machine));
        let (lines, held) = told.map_or_else(Default::default, |(lines, held)| (lines, Some(held)));
        self.sources.retain(|source| !source.has_ended);
        (lines, held)
    }

    /// Machines may have come to hosts that had none. What they printed since is told from its beginning.
    async fn join_new(&mut self, owners: &Owners) -> Vec<LogLine> {
        let mut new = hosts_of(owners, &self.app, self.query.machine.as_ref());
        new.retain(|host, _| !self.asked.contains_key(host));
        if new.is_empty() {
            return vec![];
        }
        let query = self.query.clone();
        self.open(owners, new, query).await
    }

    /// Waits until every host that has something to say has said it, but not longer than a moment, nor than `until` while
    /// nobody says anything.
    async fn fill(&mut self, until: Instant) {
        let has_one = self.sources.iter().any(|source| source.head.is_some());
        let hold = Instant::now() + HOLD;
        let end = if has_one { hold } else { until };
        let heads = self.sources.iter().filter(|source| source.head.is_some()).count();
        let waited_for = |source: &&mut Source| source.head.is_none() && !source.has_ended && (!has_one || !source.is_quiet);
        let waiting: Vec<_> = self.sources.iter_mut().filter(waited_for).map(|source| Box::pin(next(source))).collect();
        if waiting.is_empty() {
            if heads == 0 {
                tokio::time::sleep_until(until).await;
            }
            return;
        }
        if timeout_at(end, select_all(waiting)).await.is_err() {
            for source in self.sources.iter_mut().filter(|source| source.head.is_none()) {
                source.is_quiet = true;
            }
        }
    }

    /// The oldest of the lines that are there, once nobody is waited for who may have an older one.
    fn oldest(&mut self) -> Option<LogLine> {
        let is_awaited = |source: &Source| source.head.is_none() && !source.has_ended && !source.is_quiet;
        if self.sources.iter().any(is_awaited) {
            return None;
        }
        let at_ms = |source: &&mut Source| source.head.as_ref().map(|line| line.at_ms);
        let oldest = self.sources.iter_mut().filter(|source| source.head.is_some()).min_by_key(at_ms)?;
        oldest.head.take()
    }

    /// Tells of streams that ended while they were followed.
    fn bury(&mut self, owners: &Owners) -> Vec<LogLine> {
        let mut told_of = Vec::new();
        for source in self.sources.iter().filter(|source| source.has_ended && source.head.is_none()) {
            let Some(machine) = self.asked.get(&source.host) else { continue };
            let ended = || Refusal::Unreachable { host: source.host.clone(), why: "it does not send lines any more".into() };
            if !owners.stop().is_cancelled() {
                told_of.push(told(&self.app, machine, &source.stream.broken.get().cloned().unwrap_or_else(ended)));
            }
        }
        self.sources.retain(|source| !source.has_ended || source.head.is_some());
        told_of
    }
}

async fn next(source: &mut Source) {
    match source.stream.lines.recv().await {
        Some(line) => (source.head, source.is_quiet) = (Some(line), false),
        None => source.has_ended = true,
    }
}

async fn send(to: &mpsc::Sender<LogLine>, line: LogLine) -> Result<(), Gone> {
    to.send(line).await.map_err(|_| Gone)
}

/// Of a machine whose lines are missing.
fn told(app: &AppName, machine: &MachineId, refusal: &Refusal) -> LogLine {
    LogLine {
        at_ms: now_ms(),
        app: app.clone(),
        machine: machine.clone(),
        stream: "system".into(),
        program: String::new(),
        line: format!("lines of its machines are missing here: {refusal}"),
    }
}
