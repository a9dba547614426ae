//! One step of a plan, done so that doing it again is harmless: as control's executor does it.

use super::control::Pending;
use super::wires::{Said, Word};
use super::world::{CONTROL, World};
use dunlin_machine::{Deny, Order, Verb};
use dunlin_model::desired::{MachineRow, TombstoneReason};
use dunlin_model::volume::VolumeRow;
use dunlin_model::{AppName, Generation, MachineId, MachineState, MachineVersion, Source};
use dunlin_planner::{Mark, Plan, Progress, Step, StepKind};

const COMMAND_DEADLINE_MS: u64 = 15_000;
const CALL_MS: u64 = 3_000;
const REFUSED_MS: u64 = 10_000;

impl World {
    pub fn act(&mut self, name: &AppName, plan: &Plan, progress: &Progress, index: usize, step: &Step) -> bool {
        match &step.kind {
            StepKind::Reserve { host, guest } => {
                let (to, machine, memory_mb) = (self.at(host), step.machine.clone(), guest.memory_mb);
                self.call(name, plan, index, |call| (to, Word::Reserve { call, machine, memory_mb }))
            }
            StepKind::Assign { .. } => self.assign(name, plan, progress, index, step),
            StepKind::Update { group, version } => {
                let Some(row) = self.store.machines.get(&step.machine) else {
                    return self.replan(name, plan, progress, "a machine was destroyed meanwhile");
                };
                let Some(mut spec) = plan.spec(group, version) else { return self.failed(name, plan, progress, "no spec") };
                spec.mounts = plan.mounts(group, &row.spec.mounts);
                let row = MachineRow { spec, ..row.clone() };
                self.write(name, plan, progress, index, |world| world.put(row))
            }
            StepKind::Destroy { .. } => self.remove(name, plan, progress, index, &step.machine),
            StepKind::Start { version, .. } => self.order(name, plan, index, step, (Some(version), Verb::Start)),
            StepKind::Cordon { .. } => self.order(name, plan, index, step, (None, Verb::Cordon)),
            StepKind::Uncordon { .. } => self.order(name, plan, index, step, (None, Verb::Uncordon)),
            StepKind::Stop { timeout_ms, .. } => {
                let verb = Verb::Stop { signal: None, timeout_ms: Some(*timeout_ms) };
                self.order(name, plan, index, step, (None, verb))
            }
            StepKind::Gate { .. } => false,
        }
    }

    // ---- steps that are written to the store

    /// The change and the mark of its step are one transaction.
    fn write(&mut self, name: &AppName, plan: &Plan, progress: &Progress, index: usize, change: impl FnOnce(&mut Self)) -> bool {
        if !self.survives() {
            return false;
        }
        change(self);
        let next = progress.record(plan, &Mark::Passed { index, floor: None }, self.ctx.now_ms);
        self.app(name).plan = Some((plan.clone(), next));
        self.store.commit();
        self.survives()
    }

    fn put(&mut self, row: MachineRow) {
        let assignment = dunlin_view::MachineAssignment {
            id: row.id.clone(),
            name: row.name.clone(),
            host: row.host.clone(),
            region: row.region.clone(),
            address: row.address,
            placement: row.placement,
            created_at_ms: row.created_at_ms,
            spec: row.spec.clone(),
        };
        self.ctx.promises.made(&assignment);
        self.of_clone.made(&assignment);
        self.checks.apps.insert(row.id.clone(), row.spec.app.clone());
        self.checks.homes.insert(row.id.clone(), row.host.clone());
        self.ctx.tell(|| format!("{}: {} on {} is to be in {}", row.spec.app, row.id, row.host, row.spec.version));
        self.store.machines.insert(row.id.clone(), row);
    }

    fn assign(&mut self, name: &AppName, plan: &Plan, progress: &Progress, index: usize, step: &Step) -> bool {
        let StepKind::Assign { name: called, host, region, address, group, version, volume } = &step.kind else { return false };
        let Some(mut spec) = plan.spec(group, version) else { return self.failed(name, plan, progress, "no spec") };
        let takes = self.store.hosts.iter().any(|row| row.id == *host && !row.cordoned);
        if !takes || self.store.addresses.contains(address) {
            return self.replan(name, plan, progress, "its host was cordoned, or its address taken, meanwhile");
        }
        let taken = volume.clone().zip(plan.mounts.get(group).cloned());
        if let Some((taken, mount)) = &taken {
            if !taken.is_new && !self.store.free_volumes(name).iter().any(|row| row.id == taken.volume) {
                return self.replan(name, plan, progress, "the volume was taken meanwhile");
            }
            spec.mounts = vec![mount.of(taken.volume.clone())];
        }
        let placement = Generation { revision: self.store.generation.revision + 1, ..self.store.generation };
        let row = MachineRow {
            id: step.machine.clone(),
            name: called.clone(),
            host: host.clone(),
            region: region.clone(),
            address: *address,
            placement,
            created_at_ms: self.ctx.now_ms,
            spec,
        };
        self.write(name, plan, progress, index, |world| {
            world.store.addresses.insert(row.address);
            if let Some((taken, mount)) = taken.filter(|(taken, _)| taken.is_new) {
                world.store.volumes.insert(taken.volume.clone(), volume_of(&row, taken.volume, &mount.name));
            }
            world.put(row);
        })
    }

    fn remove(&mut self, name: &AppName, plan: &Plan, progress: &Progress, index: usize, machine: &MachineId) -> bool {
        let Some(row) = self.store.machines.get(machine) else {
            return self.mark(name, plan, progress, &Mark::Passed { index, floor: None });
        };
        let is_dead = self.control.as_ref().is_some_and(|control| control.watch.is_dead(&row.host));
        let reason = if is_dead { TombstoneReason::HostLost } else { TombstoneReason::Plan };
        let left = self.store.machines_of(name).count() - 1;
        let wanted = self.store.apps[name].count();
        let machine = machine.clone();
        self.write(name, plan, progress, index, |world| {
            world.checks.plan_destroys(&machine, name, left, wanted);
            world.destroy(&machine, reason);
        })
    }

    pub fn destroy(&mut self, machine: &MachineId, reason: TombstoneReason) {
        self.ctx.tell(|| format!("{machine} gets a tombstone: {reason:?}"));
        if let Some(row) = self.store.machines.get(machine).filter(|_| reason == TombstoneReason::Person) {
            *self.checks.by_hand.entry(row.spec.app.clone()).or_default() += 1;
        }
        self.ctx.promises.tombstoned(machine);
        self.of_clone.tombstoned(machine);
        self.store.destroy(machine, reason, self.ctx.now_ms);
    }

    // ---- steps that hosts do

    fn order(&mut self, name: &AppName, plan: &Plan, index: usize, step: &Step, (expected, verb): (Option<&MachineVersion>, Verb)) -> bool {
        let now_ms = self.ctx.now_ms;
        let Some(row) = self.store.machines.get(&step.machine) else { return self.answer(name, Pending::done(plan, index, Said::NotKnown)) };
        let order = Order {
            id: step.kind.command().expect("it is one").clone(),
            deadline_ms: now_ms + COMMAND_DEADLINE_MS,
            generation: Some(row.placement),
            plan: Some(Generation { revision: plan.sequence, ..self.store.generation }),
            expected_version: expected.cloned(),
            nonce: None,
            source: Source::Plan,
            request_id: None,
            verb,
            room: Ok(()),
        };
        let (to, machine) = (self.at(&row.host), step.machine.clone());
        self.call(name, plan, index, |call| (to, Word::Order { call, machine, order: Box::new(order) }))
    }

    fn call(&mut self, name: &AppName, plan: &Plan, index: usize, word: impl FnOnce(u64) -> (usize, Word)) -> bool {
        if !self.survives() {
            return false;
        }
        self.made += 1;
        let (call, until_ms) = (self.made, self.ctx.now_ms + CALL_MS);
        let (to, word) = word(call);
        self.ctx.tell(|| format!("{name}: control asks h{to}: {}", plan.steps[index].kind.name()));
        let pending = Pending { call, sequence: plan.sequence, index, until_ms, said: None };
        if let Some(control) = &mut self.control {
            control.pending.insert(name.clone(), pending);
        }
        self.say(CONTROL, to, word);
        false
    }

    pub fn said(&mut self, call: u64, said: Said) {
        let Some(control) = &mut self.control else { return };
        if let Some(pending) = control.pending.values_mut().find(|pending| pending.call == call) {
            pending.said = Some(said);
            control.next_ms = self.ctx.now_ms;
        }
    }

    /// Whether there is one, or none will come any more.
    pub fn hear_answer(&mut self, name: &AppName) -> bool {
        let now_ms = self.ctx.now_ms;
        let Some(control) = &mut self.control else { return false };
        let is_over = control.pending.get(name).is_some_and(|pending| pending.said.is_some() || now_ms >= pending.until_ms);
        if !is_over {
            return false;
        }
        let Some(pending) = control.pending.remove(name) else { return false };
        self.answer(name, pending)
    }

    fn answer(&mut self, name: &AppName, pending: Pending) -> bool {
        if !self.survives() {
            return false;
        }
        let Some((plan, progress)) = self.active(name) else { return true };
        if (plan.sequence, progress.next) != (pending.sequence, pending.index) {
            return true; // somebody has taken the plan over
        }
        let step = &plan.steps[pending.index];
        let deadline_ms = progress.since_ms.saturating_add(plan.wait_timeout_ms);
        let outcome = outcome(&step.kind, pending.said);
        self.ctx.tell(|| format!("{name}: {} {}: {outcome:?}", step.kind.name(), step.machine));
        let index = pending.index;
        match outcome {
            Outcome::Passed { floor } => self.mark(name, &plan, &progress, &Mark::Passed { index, floor }),
            Outcome::Later if self.ctx.now_ms < deadline_ms => false,
            Outcome::Later => self.failed(name, &plan, &progress, "it could not be done in time"),
            Outcome::Wait => false,
            Outcome::Failed(why) => self.failed(name, &plan, &progress, &why),
            Outcome::NoRoom => {
                let StepKind::Reserve { host, .. } = &step.kind else { return false };
                let until_ms = self.ctx.now_ms + REFUSED_MS;
                if let Some(control) = &mut self.control {
                    control.refused.insert(host.clone(), until_ms);
                }
                self.replan(name, &plan, &progress, "a host has no room after all")
            }
        }
    }
}

impl Pending {
    fn done(plan: &Plan, index: usize, said: Said) -> Self {
        Self { call: 0, sequence: plan.sequence, index, until_ms: 0, said: Some(said) }
    }
}

/// What an answer means for the step.
#[derive(Debug)]
enum Outcome {
    Passed { floor: Option<u64> },
    /// It passes by itself: it is asked again.
    Later,
    /// The planner passes it when it is seen.
    Wait,
    Failed(String),
    NoRoom,
}

fn outcome(kind: &StepKind, said: Option<Said>) -> Outcome {
    let passes = |deny: &Deny| {
        matches!(deny, Deny::VersionMismatch { .. } | Deny::IllegalMove { .. } | Deny::OldGeneration { .. } | Deny::TooLate | Deny::Leased { .. })
    };
    match (kind, said) {
        (StepKind::Reserve { .. }, Some(Said::Reserved(Ok(())))) => Outcome::Passed { floor: None },
        (StepKind::Reserve { .. }, _) => Outcome::NoRoom,
        (StepKind::Start { .. }, Some(Said::Obeyed(Ok(asked)))) => Outcome::Passed { floor: Some(asked.sequence) },
        (StepKind::Start { .. }, Some(Said::Obeyed(Err(Deny::IllegalMove { state: MachineState::Starting | MachineState::Started })))) => {
            Outcome::Passed { floor: None }
        }
        (StepKind::Stop { .. }, Some(Said::Obeyed(Ok(_)))) => Outcome::Wait,
        (StepKind::Stop { .. }, Some(Said::NotKnown | Said::Obeyed(Err(Deny::IllegalMove { .. })))) => Outcome::Passed { floor: None },
        (StepKind::Cordon { .. }, _) | (StepKind::Uncordon { .. }, Some(Said::Obeyed(Ok(_)))) => Outcome::Passed { floor: None },
        (_, None | Some(Said::NotKnown)) => Outcome::Later,
        (_, Some(Said::Obeyed(Err(deny)))) if passes(&deny) => Outcome::Later,
        (_, said) => Outcome::Failed(format!("{said:?}")),
    }
}

fn volume_of(row: &MachineRow, id: dunlin_model::VolumeId, name: &str) -> VolumeRow {
    VolumeRow {
        id,
        name: name.to_owned(),
        org: row.spec.org.clone(),
        app: row.spec.app.clone(),
        host: row.host.clone(),
        region: row.region.clone(),
        size_gb: 1,
        created_at_ms: row.created_at_ms,
        snapshot_retention: 1,
        auto_backup: false,
        encrypted: false,
        source: None,
    }
}
