//! Which machines the host puts to sleep for being idle, and which sleeping ones end for want of memory.

use crate::agent::{Agent, Reply};
use crate::now_ms;
use dunlin_machine::{Checked, Deny, Event, Order, Running, Verb, one_too_many};
use dunlin_model::{AutoStop, MachineId, MachineState, Source};
use dunlin_view::CheckState;
use std::collections::{BTreeMap, VecDeque};

/// Orders that wait until sleeping machines have made room; more are refused at once.
const MAX_PARKED: usize = 1024;
/// One that makes room is asleep: it gets less time to end than its configuration may say.
const MAKES_ROOM_WITHIN_MS: u64 = 2_000;
/// Of the host's own orders; it obeys itself at once.
const ORDER_TTL_MS: u64 = 10_000;

/// What was seen of a running machine's load.
pub struct Load {
    attempt: u64,
    since_ms: u64,
    in_flight: u32,
    /// The most at once up to each look.
    peaks: VecDeque<(u64, u32)>,
}

impl Load {
    pub fn begin(attempt: u64, now_ms: u64) -> Self {
        Self { attempt, since_ms: now_ms, in_flight: 0, peaks: VecDeque::new() }
    }

    fn look(&mut self, in_flight: u32, peak: u32, now_ms: u64, window_ms: u64) {
        self.in_flight = in_flight;
        self.peaks.push_back((now_ms, peak));
        while self.peaks.front().is_some_and(|(at, _)| at + window_ms < now_ms) {
            self.peaks.pop_front();
        }
    }

    fn peak(&self, now_ms: u64, window_ms: u64) -> Option<u32> {
        let peak = self.peaks.iter().map(|(_, peak)| *peak).max();
        peak.filter(|_| now_ms >= self.since_ms + window_ms)
    }
}

impl Agent {
    /// Looks at the load of all machines, and puts at most one of each group to sleep.
    pub(crate) fn put_to_sleep(&mut self) {
        let (now, window_ms) = (now_ms(), self.shared.config.autostop_after_ms);
        for (id, slot) in &mut self.slots {
            let record = slot.machine.record();
            if record.state != MachineState::Started {
                slot.load = None;
                continue;
            }
            slot.makes_room = false;
            let load = slot.load.get_or_insert_with(|| Load::begin(record.attempt, now));
            if load.attempt != record.attempt {
                *load = Load::begin(record.attempt, now);
            }
            let (in_flight, peak) = self.shared.table.load_of(id);
            load.look(in_flight, peak, now, window_ms);
        }
        let chosen: Vec<(MachineId, Verb)> = self.groups().values().filter_map(|group| self.idle_of(group, now)).collect();
        for (id, verb) in chosen {
            tracing::info!(machine = %id, verb = verb.name(), "it is idle");
            self.order_by_host(&id, verb, Source::Host);
        }
    }

    fn groups(&self) -> BTreeMap<(&str, &str), Vec<&MachineId>> {
        let mut groups: BTreeMap<(&str, &str), Vec<&MachineId>> = BTreeMap::new();
        for (id, slot) in &self.slots {
            let spec = slot.machine.record().spec();
            if spec.autostop() != AutoStop::Off {
                groups.entry((spec.app.as_str(), spec.process_group.as_str())).or_default().push(id);
            }
        }
        groups
    }

    fn idle_of(&self, group: &[&MachineId], now: u64) -> Option<(MachineId, Verb)> {
        let record = |id: &MachineId| self.slots[id].machine.record();
        // While a deploy exchanges them, the new ones have no load yet and the old ones are needed.
        let first = record(group.first()?).spec().release;
        if group.iter().any(|id| !record(id).is_current() || record(id).spec().release != first) {
            return None;
        }
        let running: Vec<Running<'_>> = group.iter().filter_map(|id| self.running(id, now)).collect();
        let min_running = group.iter().map(|id| record(id).spec().min_machines_running()).max().unwrap_or(0);
        let id = one_too_many(&running, min_running)?;
        let verb = match record(id).spec().autostop() {
            AutoStop::Suspend if self.shared.config.abilities.limits.is_ok() => Verb::Suspend,
            AutoStop::Suspend | AutoStop::Stop => Verb::Stop { signal: None, timeout_ms: None },
            AutoStop::Off => return None,
        };
        Some((id.clone(), verb))
    }

    fn running<'a>(&self, id: &'a MachineId, now: u64) -> Option<Running<'a>> {
        let slot = &self.slots[id];
        let record = slot.machine.record();
        let fails = slot.statuses.values().any(|check| check.gates_routing && check.status != CheckState::Passing);
        let load = slot.load.as_ref()?;
        if record.state != MachineState::Started || record.cordoned || fails {
            return None;
        }
        let soft = record.spec().services.iter().map(|service| service.concurrency.soft_limit).min()?;
        Some(Running {
            id,
            in_flight: load.in_flight,
            peak: load.peak(now, self.shared.config.autostop_after_ms),
            soft_limit: soft,
            may_sleep: record.lease(now).is_none(),
        })
    }

    /// A request that was let in just before its machine was suspended must not wait in it for the next one.
    pub(crate) fn wake_if_needed(&mut self, id: &MachineId) {
        let Some(slot) = self.slots.get(id) else { return };
        let record = slot.machine.record();
        let by_host = record.events.iter().rev().find(|event| event.kind == dunlin_model::EventKind::Suspend);
        let is_needed = self.shared.table.load_of(id).0 > 0 && by_host.is_some_and(|event| event.source == Source::Host);
        if record.state == MachineState::Suspended && is_needed {
            self.order_by_host(id, Verb::Start, Source::Host);
        }
    }

    /// How many of its group run already, if that is all that may.
    pub(crate) fn runs_enough(&self, id: &MachineId) -> Result<(), String> {
        let Some(spec) = self.slots.get(id).map(|slot| slot.machine.record().spec()) else { return Ok(()) };
        let Some(max) = spec.max_machines_running() else { return Ok(()) };
        let runs = self.slots.iter().filter(|(other, slot)| {
            let (record, theirs) = (slot.machine.record(), slot.machine.record().spec());
            *other != id && record.holds_resources() && !record.state.is_asleep()
                && theirs.app == spec.app && theirs.process_group == spec.process_group
        });
        let runs = runs.count();
        if runs < max as usize {
            return Ok(());
        }
        Err(format!("{runs} machines of process group {} run, and max_machines_running is {max}", spec.process_group))
    }

    /// Keeps an order for later if only memory is missing and machines that sleep can make room for it.
    pub(crate) fn park(&mut self, id: &MachineId, order: Order, reply: Reply) -> Option<(Order, Reply)> {
        let Some(slot) = self.slots.get(id).filter(|_| order.room.is_err()) else { return Some((order, reply)) };
        let lacks_room = matches!(slot.machine.check(&order, now_ms()), Checked::Denied(Deny::NoRoom { .. }));
        let guest = slot.machine.record().spec().guest.clone();
        let enough = order.verb != Verb::Wake || self.runs_enough(id).is_ok();
        if lacks_room && enough && self.parked.len() < MAX_PARKED && self.make_room(&guest, id) {
            self.parked.push((id.clone(), order, reply));
            return None;
        }
        Some((order, reply))
    }

    /// Some machine changed: what waits for room tries again.
    pub(crate) fn try_parked(&mut self) {
        for (id, order, reply) in std::mem::take(&mut self.parked) {
            self.on_command(id, order, reply);
        }
    }

    /// Ends the longest suspended machines until one of this size fits, if that is enough at all. `true`: it will.
    pub(crate) fn make_room(&mut self, guest: &dunlin_model::Guest, id: &MachineId) -> bool {
        let mut leave: Vec<MachineId> = vec![id.clone()];
        // Those that are on their way out already.
        let ends = self.slots.iter().filter(|(_, slot)| slot.machine.record().state == MachineState::Stopping && slot.makes_room);
        leave.extend(ends.map(|(id, _)| id.clone()));
        let mut sleeps = self.sleepers();
        sleeps.retain(|(_, other)| other != id);
        let mut ended = Vec::new();
        for (_, id) in sleeps {
            if self.fits_without(guest, &leave) {
                break;
            }
            leave.push(id.clone());
            ended.push(id);
        }
        if !self.fits_without(guest, &leave) {
            return false;
        }
        for id in ended {
            let Some(slot) = self.slots.get_mut(&id) else { continue };
            slot.makes_room = true;
            let timeout_ms = slot.machine.record().spec().stop.timeout_ms.min(MAKES_ROOM_WITHIN_MS);
            tracing::info!(machine = %id, "it slept longest and makes room");
            self.order_by_host(&id, Verb::Stop { signal: None, timeout_ms: Some(timeout_ms) }, Source::Host);
        }
        true
    }

    /// Suspended machines that give way, and since when they sleep; the longest first.
    pub(crate) fn sleepers(&self) -> Vec<(u64, MachineId)> {
        let now = now_ms();
        let sleeps = self.slots.iter().filter(|(_, slot)| {
            let record = slot.machine.record();
            record.state == MachineState::Suspended && record.lease(now).is_none()
        });
        let mut sleeps: Vec<_> = sleeps.map(|(id, slot)| (slot.machine.record().suspended_at_ms, id.clone())).collect();
        sleeps.sort();
        sleeps
    }

    pub(crate) fn order_by_host(&mut self, id: &MachineId, verb: Verb, source: Source) {
        self.own_orders += 1;
        let now = now_ms();
        let order = Order {
            id: format!("host.{id}.{now}.{}", self.own_orders).parse().expect("letters, digits and dots"),
            deadline_ms: now + ORDER_TTL_MS,
            generation: None,
            plan: None,
            expected_version: None,
            nonce: None,
            source,
            request_id: None,
            verb,
            room: Ok(()),
        };
        self.dispatch(id, Event::Ordered(order));
    }
}
