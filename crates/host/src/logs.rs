//! Logs of machines, read from the files that their supervisors write, so that they survive restarts
//! of the agent.

use crate::{Shared, now_ms};
use dunlin_api::shares::{Full, Share};
use dunlin_api::tail::{Tail, Taken, bytes_of};
use dunlin_api::{LogLine, LogQuery, LogStream, Refusal};
use dunlin_model::{AppName, MachineId};
use dunlin_runtime::logs::{LogPosition, LogWatch, read_logs};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Lines that wait for the reader of a stream; a line has up to 16 KiB.
const QUEUE: usize = 64;
/// Records read from one machine at a time.
const BATCH: usize = 64;
/// Lines kept before following, whatever is asked for.
const MAX_TAIL: usize = 50_000;
/// And what they take up.
const MAX_TAIL_BYTES: usize = 16 << 20;
/// What lines of all streams take up until their readers have taken them; an app gets half.
pub const TAILS_BYTES: usize = 128 << 20;
/// Each takes a blocking thread, and machines need some, too. An app gets half of them.
pub const MAX_STREAMS: usize = 128;
/// How often a follower looks for new machines, and whether it is still listened to. Lines wake it at once.
const LOOK: Duration = Duration::from_secs(1);

pub fn stream(shared: Arc<Shared>, query: LogQuery) -> Result<LogStream, Refusal> {
    let turn = shared.followers.take(query.app.as_ref(), 1).map_err(|full| {
        Refusal::Busy(match (full, &query.app) {
            (Full::One, Some(app)) => format!("{} log streams of app {app} are open on this host, and an app may have no more", shared.followers.most_of_one()),
            _ => format!("{MAX_STREAMS} log streams are open on this host, and it takes no more"),
        })
    })?;
    let held = shared.tails.take(query.app.as_ref(), 0).map_err(|_| Refusal::Busy("there is no memory for lines of logs now".into()))?;
    let watch = match query.follow.then(LogWatch::new).transpose() {
        Ok(watch) => watch,
        Err(error) => return Err(Refusal::Failed(format!("logs cannot be followed on this host now: {error}"))),
    };
    let (sender, lines) = mpsc::channel(QUEUE);
    tokio::task::spawn_blocking(move || {
        send(&shared, &query, watch.as_ref(), &sender, held);
        drop(turn);
    });
    Ok(LogStream::new(lines))
}

/// A watch says that the lines to come are wanted, too.
fn send(shared: &Shared, query: &LogQuery, watch: Option<&LogWatch>, sender: &mpsc::Sender<LogLine>, mut held: Share) {
    let mut positions = BTreeMap::new();
    let mut lines = read_tail(shared, query, &mut positions, &mut held);
    loop {
        let idle = lines.is_empty();
        for line in lines {
            let bytes = bytes_of(&line);
            if sender.blocking_send(line).is_err() {
                return;
            }
            held.shrink(bytes);
        }
        held.shrink(held.amount());
        let Some(watch) = watch.filter(|_| !sender.is_closed()) else { return };
        if idle && let Err(error) = watch.wait(LOOK) {
            tracing::warn!(%error, "a log is not followed any more");
            return;
        }
        // Before they are read: what is printed afterwards wakes the next wait.
        for (id, _) in machines(shared, query) {
            let _ = watch.add(&shared.machine_dir(id.as_str())); // not started yet, or destroyed: looked at again
        }
        lines = read_next(shared, query, &mut positions, &mut held);
    }
}

type Positions = BTreeMap<MachineId, LogPosition>;

/// The newest lines of all machines together. Of each machine as many are kept as are wanted in all: any of
/// them may have printed last.
fn read_tail(shared: &Shared, query: &LogQuery, positions: &mut Positions, held: &mut Share) -> Vec<LogLine> {
    let wanted = query.tail.unwrap_or(MAX_TAIL).min(MAX_TAIL);
    let (machines, began_ms) = (machines(shared, query), now_ms());
    let mut all: Option<Taken> = None;
    for (id, app) in &machines {
        let Ok(room) = shared.tails.take(query.app.as_ref(), 0) else { break }; // nothing of it is never too much
        let mut newest = Tail::new(room, wanted, MAX_TAIL_BYTES);
        while let Some(read) = read_batch(shared, query, id, app, positions) {
            let caught_up = read.last().is_some_and(|line| line.at_ms > began_ms);
            read.into_iter().for_each(|line| newest.push(line));
            if caught_up {
                break; // it may print as quickly as it is read
            }
        }
        match &mut all {
            Some(all) => all.merge(newest.taken(), wanted, MAX_TAIL_BYTES),
            None => all = Some(newest.taken()),
        }
    }
    let Some((all, (id, app))) = all.zip(machines.first()) else { return vec![] };
    let (lines, room) = all.told(wanted, app, id);
    held.absorb(room);
    lines
}

/// What came after the positions, in the order of time, a batch of each machine for which there is memory; the others are
/// read next time.
fn read_next(shared: &Shared, query: &LogQuery, positions: &mut Positions, held: &mut Share) -> Vec<LogLine> {
    let mut lines = Vec::new();
    for (id, app) in machines(shared, query) {
        let read: Vec<LogLine> = read_batch(shared, query, &id, &app, positions).into_iter().flatten().collect();
        let has_room = held.grow(read.iter().map(bytes_of).sum()).is_ok();
        lines.extend(read);
        if !has_room {
            break;
        }
    }
    lines.sort_by_key(|line| line.at_ms);
    lines
}

/// Lines of the next batch that were asked for; `None`: nothing more is there now.
fn read_batch(
    shared: &Shared,
    query: &LogQuery,
    id: &MachineId,
    app: &AppName,
    positions: &mut Positions,
) -> Option<Vec<LogLine>> {
    let position = positions.entry(id.clone()).or_default();
    // An error: the machine is being destroyed.
    let (records, next) = read_logs(&shared.machine_dir(id.as_str()), *position, BATCH).ok()?;
    *position = next;
    if records.is_empty() {
        return None;
    }
    let since = query.since_ms.unwrap_or(0);
    let wanted = records.into_iter().filter(|record| record.t >= since).map(|record| LogLine {
        at_ms: record.t,
        app: app.clone(),
        machine: id.clone(),
        stream: record.stream,
        program: record.program,
        line: record.line,
    });
    Some(wanted.collect())
}

fn machines(shared: &Shared, query: &LogQuery) -> Vec<(MachineId, AppName)> {
    let snapshot = shared.view.current();
    let wanted = snapshot.machines.values().filter(|fact| {
        fact.host == shared.config.id
            && query.machine.as_ref().is_none_or(|id| *id == fact.id)
            && query.app.as_ref().is_none_or(|app| *app == fact.app)
    });
    wanted.map(|fact| (fact.id.clone(), fact.app.clone())).collect()
}
