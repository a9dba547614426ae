//! Stopped machines that stand ready: all of them is made but the program's start, so that a request waits for the
//! program only. The most recently stopped have the places.
//!
//! One is used only if its supervisor was given exactly what a new one would be, secrets and all; otherwise it is
//! ended and another takes its place. Nothing of this is journalled: an agent that finds one after a restart ends it.

use crate::act::{clean_up, rule};
use crate::agent::{Agent, Input, chain};
use crate::{Shared, cpus, layers, spec};
use dunlin_machine::Record;
use dunlin_model::disk::Persist;
use dunlin_model::{MachineId, MachineState};
use dunlin_registry::Digest;
use dunlin_runtime::{Client, RuntimeError, SupervisorSpec};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// A machine that is started again right after its end, or destroyed, is not made twice.
const REST: Duration = Duration::from_millis(250);

/// The supervisors that wait, by what they were given.
#[derive(Default)]
pub struct Ready(Mutex<BTreeMap<MachineId, Digest>>);

impl Ready {
    pub fn take(&self, id: &MachineId) -> Option<Digest> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(id)
    }

    pub fn has(&self, id: &MachineId) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains_key(id)
    }

    fn put(&self, id: MachineId, made_of: Digest) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(id, made_of);
    }

    fn ids(&self) -> BTreeSet<MachineId> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }
}

impl Agent {
    /// A machine has stopped or was started, or what it would start as has changed.
    pub(crate) fn look_at_ready(&mut self) {
        if self.shared.config.ready_machines == 0 || std::mem::replace(&mut self.looks_at_ready, true) {
            return;
        }
        let inputs = self.inputs.clone();
        tokio::spawn(async move {
            tokio::time::sleep(REST).await;
            let _ = inputs.send(Input::Ready).await; // the agent ended
        });
    }

    /// Gives the places to those that stopped last.
    pub(crate) fn fill_ready(&mut self) {
        self.looks_at_ready = false;
        let may = self.slots.iter().filter(|(_, slot)| may_stand_ready(slot.machine.record()));
        let ended_at = |record: &Record| record.exit.as_ref().map_or(0, |exit| exit.at_ms);
        let mut stopped: Vec<(u64, MachineId)> =
            may.map(|(id, slot)| (ended_at(slot.machine.record()), id.clone())).collect();
        stopped.sort();
        let places = self.shared.config.ready_machines;
        let wanted: BTreeSet<MachineId> = stopped.into_iter().rev().take(places).map(|(_, id)| id).collect();
        for id in self.shared.ready.ids().difference(&wanted) {
            let Some(slot) = self.slots.get_mut(id) else { continue };
            if slot.machine.record().state.is_asleep() {
                let (shared, id) = (self.shared.clone(), id.clone());
                slot.acts.push_blocking(move || end(&shared, &id));
            }
        }
        for id in wanted {
            let Some(slot) = self.slots.get_mut(&id) else { continue };
            slot.acts.push(make(self.shared.clone(), slot.machine.record().clone()));
        }
    }
}

/// A volume is attached to what runs, and so is a root file system that outlives an attempt.
fn may_stand_ready(record: &Record) -> bool {
    let is_whole = record.state == MachineState::Stopped && record.is_current() && !record.is_over();
    let spec = record.spec();
    let passes = spec.mounts.is_empty() && spec.rootfs.persist == Persist::Never;
    is_whole && record.wakes() && !record.cordoned && passes
}

/// Of what the next start would be; made anew if that is no longer what it was made of.
async fn make(shared: Arc<Shared>, record: Record) {
    let id = record.assignment.id.clone();
    let mut wanted = match spec::supervisor_spec(&shared, &record, record.attempt + 1).await {
        Ok(spec) => spec,
        Err(why) => return tracing::debug!(machine = %id, why, "it cannot stand ready"),
    };
    let made = tokio::task::spawn_blocking(move || {
        let made_of = digest(&wanted);
        wanted.start = false;
        let waits = || supervisor(&shared, &id).and_then(|client| client.status()).is_ok();
        match shared.ready.take(&id) {
            Some(before) if before == made_of && waits() => return shared.ready.put(id, made_of),
            Some(_) => {
                clean_up(&shared, &id);
            }
            None => {}
        }
        let pinned = shared.firewall.add(&rule(&record)).map_err(RuntimeError::from);
        let prepared = pinned.and_then(|()| layers::make_ready(&shared, &id, record.spec()).map_err(RuntimeError::Machine));
        match prepared.and_then(|()| dunlin_runtime::spawn(&shared.exe, &wanted)) {
            Ok(()) => shared.ready.put(id, made_of),
            Err(error) => {
                tracing::debug!(machine = %id, error = %chain(&error), "it cannot stand ready");
                clean_up(&shared, &id);
            }
        }
    });
    let _ = made.await; // a panic in it was reported by itself
}

fn end(shared: &Shared, id: &MachineId) {
    if shared.ready.take(id).is_some() {
        clean_up(shared, id);
    }
}

/// Starts the program of the one that stands ready, if there is one and it is made of this; else nothing of it is left.
pub fn start(shared: &Shared, record: &Record, spec: &SupervisorSpec) -> bool {
    let id = &record.assignment.id;
    let Some(made_of) = shared.ready.take(id) else { return false };
    let is_this = made_of == digest(spec) && spec.kill_at.is_none();
    let started = is_this
        && supervisor(shared, id).is_ok_and(|client| {
            cpus::place(shared, id, record.spec());
            client.start().is_ok()
        });
    if !started {
        clean_up(shared, id);
    }
    started
}

fn supervisor(shared: &Shared, id: &MachineId) -> Result<Client, RuntimeError> {
    Client::connect(&shared.machine_dir(id.as_str()))
}

/// Whether it starts at once is no part of what it is.
fn digest(spec: &SupervisorSpec) -> Digest {
    Digest::of(&spec.to_json())
}
