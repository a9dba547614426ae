//! What the host does because time has passed: it starts machines whose schedule says so, and ends consoles that nobody
//! is attached to.

use crate::agent::Agent;
use crate::now_ms;
use dunlin_machine::{Event, Record, Verb};
use dunlin_model::machine::CONSOLE_GROUP;
use dunlin_model::{MachineId, MachineState, Source};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Somebody who made a console is on his way to it.
const FIRST_SESSION_WITHIN: Duration = Duration::from_secs(60);

/// Who is attached to which machine, as far as this agent knows: sessions end with it.
#[derive(Clone, Default)]
pub struct Attached(Arc<Mutex<BTreeMap<MachineId, Seen>>>);

#[derive(Default)]
struct Seen {
    sessions: usize,
    left: Option<Instant>,
}

/// One session, until it is dropped.
pub struct Session {
    attached: Attached,
    machine: MachineId,
}

impl Attached {
    pub fn begin(&self, machine: &MachineId) -> Session {
        self.with(|seen| seen.entry(machine.clone()).or_default().sessions += 1);
        Session { attached: self.clone(), machine: machine.clone() }
    }

    /// For how long there has been no session; `None`: there is one, or there was none yet.
    fn left_for(&self, machine: &MachineId) -> Option<Duration> {
        self.with(|seen| seen.get(machine).filter(|seen| seen.sessions == 0)?.left.map(|left| left.elapsed()))
    }

    fn had_one(&self, machine: &MachineId) -> bool {
        self.with(|seen| seen.contains_key(machine))
    }

    fn keep(&self, machines: impl Fn(&MachineId) -> bool) {
        self.with(|seen| seen.retain(|machine, seen| seen.sessions > 0 || machines(machine)));
    }

    fn with<T>(&self, act: impl FnOnce(&mut BTreeMap<MachineId, Seen>) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.attached.with(|seen| {
            if let Some(seen) = seen.get_mut(&self.machine) {
                seen.sessions -= 1;
                seen.left = Some(Instant::now());
            }
        });
    }
}

impl Agent {
    /// Looked at with every heartbeat, and not by an alarm: clocks are set, and hosts sleep.
    pub(crate) fn start_what_is_due(&mut self) {
        let now = now_ms();
        let is_due = |record: &Record| record.due_ms.is_some_and(|due| due <= now);
        let due = self.slots.iter().filter(|(_, slot)| is_due(slot.machine.record()));
        let due: Vec<MachineId> = due.map(|(id, _)| id.clone()).collect();
        for id in due {
            let starts = self.slots.get(&id).filter(|slot| slot.machine.starts_by_clock(now));
            let guest = starts.map(|slot| slot.machine.record().spec().guest.clone());
            if let Some(guest) = guest
                && self.room_to_start(&id).is_err()
                && self.make_room(&guest, &id)
            {
                continue; // those that sleep end; there is room when they have
            }
            self.dispatch(&id, Event::Due { room: Ok(()) }); // there is looked for room
        }
    }

    /// A console lives for the sessions in it. Whoever made it may be gone without a word.
    pub(crate) fn end_left_consoles(&mut self) {
        self.shared.attached.keep(|id| self.slots.contains_key(id));
        let left = self.slots.iter().filter(|(id, slot)| self.is_left_console(id, slot.machine.record()));
        let left: Vec<MachineId> = left.map(|(id, _)| id.clone()).collect();
        for id in left {
            tracing::info!(machine = %id, "nobody is attached to this console any more");
            self.order_by_host(&id, Verb::Stop { signal: None, timeout_ms: None }, Source::Host);
        }
    }

    fn is_left_console(&self, id: &MachineId, record: &Record) -> bool {
        let (spec, attached) = (record.spec(), &self.shared.attached);
        let is_console = spec.process_group == CONSOLE_GROUP && spec.auto_destroy;
        if !is_console || record.state != MachineState::Started || record.lease(now_ms()).is_some() {
            return false;
        }
        let patience = Duration::from_millis(self.shared.config.autostop_after_ms);
        if attached.had_one(id) {
            return attached.left_for(id).is_some_and(|left| left >= patience);
        }
        let ran = Duration::from_millis(now_ms().saturating_sub(record.started_at_ms));
        ran.min(self.began.elapsed()) >= patience.max(FIRST_SESSION_WITHIN)
    }
}
