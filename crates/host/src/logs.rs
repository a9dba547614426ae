//! Logs of machines, read from the files that their supervisors write, so that they survive restarts
//! of the agent.

use crate::{Shared, now_ms};
use dunlin_api::{LogLine, LogQuery, LogStream, Refusal};
use dunlin_model::{AppName, MachineId};
use dunlin_runtime::logs::{LogPosition, LogWatch, read_logs};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

const QUEUE: usize = 1024;
/// Records read from one machine at a time; a record has up to 16 KiB.
const BATCH: usize = 512;
/// Lines kept before following, whatever is asked for.
const MAX_TAIL: usize = 50_000;
/// And their bytes, shared by the machines that are asked for.
const MAX_TAIL_BYTES: usize = 16 << 20;
/// Each takes a blocking thread, and machines need some, too.
pub const MAX_STREAMS: usize = 128;
/// How often a follower looks for new machines, and whether it is still listened to. Lines wake it at once.
const LOOK: Duration = Duration::from_secs(1);

pub fn stream(shared: Arc<Shared>, query: LogQuery) -> Result<LogStream, Refusal> {
    let Ok(turn) = shared.followers.clone().try_acquire_owned() else {
        return Err(Refusal::Failed(format!("{MAX_STREAMS} log streams are open on this host; close one, or try again")));
    };
    let watch = match query.follow.then(LogWatch::new).transpose() {
        Ok(watch) => watch,
        Err(error) => return Err(Refusal::Failed(format!("logs cannot be followed on this host now: {error}"))),
    };
    let (sender, lines) = mpsc::channel(QUEUE);
    tokio::task::spawn_blocking(move || {
        send(&shared, &query, watch.as_ref(), &sender);
        drop(turn);
    });
    Ok(LogStream::new(lines))
}

/// A watch says that the lines to come are wanted, too.
fn send(shared: &Shared, query: &LogQuery, watch: Option<&LogWatch>, sender: &mpsc::Sender<LogLine>) {
    let mut positions = BTreeMap::new();
    let mut lines = read_tail(shared, query, &mut positions);
    loop {
        let idle = lines.is_empty();
        for line in lines {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
        let Some(watch) = watch.filter(|_| !sender.is_closed()) else { return };
        if idle && let Err(error) = watch.wait(LOOK) {
            tracing::warn!(%error, "a log is not followed any more");
            return;
        }
        // Before they are read: what is printed afterwards wakes the next wait.
        for (id, _) in machines(shared, query) {
            let _ = watch.add(&shared.machine_dir(id.as_str())); // not started yet, or destroyed: looked at again
        }
        lines = read_next(shared, query, &mut positions);
    }
}

type Positions = BTreeMap<MachineId, LogPosition>;

/// The newest lines of all machines together. Of each machine as many are kept as are wanted in all: any of
/// them may have printed last.
fn read_tail(shared: &Shared, query: &LogQuery, positions: &mut Positions) -> Vec<LogLine> {
    let wanted = query.tail.unwrap_or(MAX_TAIL).min(MAX_TAIL);
    let (machines, began_ms) = (machines(shared, query), now_ms());
    let share = MAX_TAIL_BYTES / machines.len().max(1);
    let mut lines: Vec<LogLine> = Vec::new();
    for (id, app) in &machines {
        let mut newest = Newest { lines: VecDeque::new(), bytes: 0 };
        while let Some(read) = read_batch(shared, query, id, app, positions) {
            let caught_up = read.last().is_some_and(|line| line.at_ms > began_ms);
            read.into_iter().for_each(|line| newest.push(line, wanted, share));
            if caught_up {
                break; // it may print as quickly as it is read
            }
        }
        lines.extend(newest.lines);
    }
    lines.sort_by_key(|line| line.at_ms);
    lines.drain(..lines.len().saturating_sub(wanted));
    lines
}

/// What came after the positions, in the order of time, a batch of each machine.
fn read_next(shared: &Shared, query: &LogQuery, positions: &mut Positions) -> Vec<LogLine> {
    let mut lines = Vec::new();
    for (id, app) in machines(shared, query) {
        lines.extend(read_batch(shared, query, &id, &app, positions).into_iter().flatten());
    }
    lines.sort_by_key(|line| line.at_ms);
    lines
}

/// The last lines that were pushed, bounded.
struct Newest {
    lines: VecDeque<LogLine>,
    bytes: usize,
}

impl Newest {
    fn push(&mut self, line: LogLine, max_lines: usize, max_bytes: usize) {
        self.bytes += line.line.len();
        self.lines.push_back(line);
        while self.lines.len() > max_lines || self.bytes > max_bytes && self.lines.len() > 1 {
            self.bytes -= self.lines.pop_front().map_or(0, |line| line.line.len());
        }
    }
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
