//! Control's store is put back to a backup, and control adopts what the fleet was last told: a model of what it writes then.

use super::Bug;
use super::world::{CONTROL, HOSTS, World};
use dunlin_model::Generation;
use dunlin_model::desired::{MachineRow, TombstoneReason, TombstoneRow};
use dunlin_view::{ConfigState, Freshness, MachineAssignment};

/// Once a host is heard it tells the newest desired state that it has, in well under this.
const SETTLES_MS: u64 = 3_000;
/// Epochs of desired state, as far as this world has keys for them.
const MOST_EPOCHS: u32 = 7;

impl World {
    /// A person restores control from its backup, on its own host.
    pub fn restore(&mut self) {
        let may = !self.is_half && !self.members[CONTROL].is_silenced && self.config.certificate.epoch < MOST_EPOCHS;
        let Some(backup) = self.backup.clone().filter(|_| may) else { return };
        self.kill(CONTROL, false);
        self.ctx.tell(|| format!("control is restored from a backup of {}; it was at {}", backup.generation, self.store.generation));
        self.restored = Some(backup.generation);
        // Addresses rest for longer than a run lasts.
        let addresses = std::mem::take(&mut self.store.addresses);
        self.store = backup;
        self.store.addresses = addresses;
        self.certify_control_again();
        self.helps.extend(self.store.apps.keys().cloned());
    }

    /// Waits until another host is heard; then what the fleet knows becomes desired state again. Whether that is done.
    pub fn is_adopted(&mut self) -> bool {
        let (now_ms, backup) = (self.ctx.now_ms, self.restored.unwrap_or_default());
        let Some(view) = self.members[CONTROL].view().cloned() else { return false };
        let is_heard = self.members[1..HOSTS].iter().any(|member| view.heard.get(&member.identity.host) == Some(&Freshness::Fresh));
        let Some(control) = &mut self.control else { return false };
        if is_heard && control.heard_since_ms.is_none() {
            control.heard_since_ms = Some(now_ms);
        }
        if control.heard_since_ms.is_none_or(|since_ms| now_ms < since_ms + SETTLES_MS) || !self.survives() {
            return false;
        }
        let seen = view.config.clone();
        let incarnation = self.store.generation.incarnation.max(seen.generation.incarnation) + 1;
        self.store.generation = Generation { incarnation, revision: 1 };
        if seen.generation > backup && !self.is(Bug::AdoptNothing) {
            self.ctx.tell(|| format!("control adopts {}", seen.generation));
            self.adopt_apps(&seen);
            if !self.survives() {
                return false;
            }
            self.adopt_machines(&seen, &view);
        }
        if !self.survives() {
            return false;
        }
        self.restored = None;
        self.own_config();
        self.survives()
    }

    fn adopt_apps(&mut self, seen: &ConfigState) {
        for (name, fact) in &seen.apps {
            let app = self.app(name);
            (app.row.current_release, app.row.last_good_release) = (fact.current_release, fact.current_release);
            app.plan.take_if(|(_, progress)| progress.ended.is_none());
        }
        self.store.commit();
    }

    fn adopt_machines(&mut self, seen: &ConfigState, view: &dunlin_view::Snapshot) {
        let row = |fact: &MachineAssignment| {
            let MachineAssignment { id, name, host, region, address, placement, created_at_ms, spec } = fact.clone();
            MachineRow { id, name, host, region, address, placement, created_at_ms, spec }
        };
        for fact in seen.machines.values() {
            self.ctx.promises.adopted(fact);
            self.of_clone.adopted(fact);
        }
        let rows = seen.machines.iter().map(|(id, fact)| (id.clone(), row(fact))).collect();
        let known = std::mem::replace(&mut self.store.machines, rows);
        for (machine, host) in &seen.tombstones {
            let of_row = known.get(machine).map(|row| (row.spec.app.clone(), row.address));
            let of_fact = || view.machines.get(machine).map(|fact| (fact.app.clone(), fact.address));
            let Some((app, address)) = of_row.or_else(of_fact) else { continue };
            let reason = if seen.asked_for.contains(machine) { TombstoneReason::Person } else { TombstoneReason::Plan };
            let row = TombstoneRow { machine: machine.clone(), host: host.clone(), app, address, at_ms: self.ctx.now_ms, reason };
            self.store.tombstones.insert(machine.clone(), row);
        }
        self.store.volumes.extend(seen.volumes.iter().map(|(id, row)| (id.clone(), row.clone())));
        self.store.commit();
    }
}
