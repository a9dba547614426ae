//! After the last trouble: what must come about by itself, and what a person has to do where something was lost for good.

use super::edge::Ended as Request;
use super::store::Class;
use super::world::{CONTROL, HOSTS, World};
use crate::supervisor::Behaviour;
use dunlin_machine::Verb;
use dunlin_model::{AppName, MachineId, MachineState};
use dunlin_planner::{Ended, Purpose};

/// Members find each other, older lives are probed, logs converge.
const CALM_MS: u64 = 15_000;
const CALM_WITH_A_CLONE_MS: u64 = 60_000;
/// Longer than machines rest between rebalancings.
const QUIET_MS: u64 = 20_000;
/// All plans, restarts and back-offs come to their end within this.
const PATIENCE_MS: u64 = 300_000;
/// A request that any machine could take is answered within this.
const ANSWER_MS: u64 = 12_000;

impl World {
    pub fn settle(&mut self) {
        self.ctx.tell(|| "--- the trouble is over".into());
        self.heal();
        (self.network.calm, self.ctx.calm) = (true, true);
        for at in 0..self.members.len() {
            self.members[at].agent.dies_after = None;
            self.members[at].skew_ms = self.ctx.rng.between(0, 2_000) as i64 - 1_000;
        }
        if let Some(control) = &mut self.control {
            (control.dies_after, control.half_until_ms) = (None, control.half_until_ms.min(1));
        }
        self.store.hosts.iter_mut().for_each(|host| (host.draining, host.cordoned) = (false, false));
        self.store.commit();
        self.pass(if self.members.len() > HOSTS { CALM_WITH_A_CLONE_MS } else { CALM_MS });
        self.one_of_two_lives();
        self.become_quiet();
        self.people_help();
        self.become_quiet();
        self.come_to_rest();
        for check in [Self::nothing_is_planned, Self::all_are_there, Self::views_agree, Self::edges_answer] {
            if self.broken().is_none() {
                check(self);
            }
        }
    }

    /// Of two processes with one identity one has ended with its machines. Then a person removes the copy.
    fn one_of_two_lives(&mut self) {
        if self.members.len() == HOSTS || self.broken().is_some() {
            return;
        }
        let clone = HOSTS;
        let host = self.members[clone].identity.host.clone();
        let of = self.at(&host);
        // A host that joined anew meanwhile, or was put back, is another.
        let is_same = self.members[of].identity.certificate == self.members[clone].identity.certificate;
        let origin = self.members[of].identity.origin;
        let knows = |at: usize| self.members[at].process.as_ref().is_some_and(|process| process.node.catalogue().fork(origin).is_some());
        let is_quarantined = (0..HOSTS).any(knows);
        let lives = |at: usize| !self.members[at].is_silenced && self.members[at].process.is_some();
        if is_same && !is_quarantined && lives(of) && lives(clone) {
            return self.checks.fail(|| format!("{host} lives twice, and nobody has found out"));
        }
        if !self.members[clone].is_silenced {
            self.ctx.tell(|| format!("a person ends the copy of {host}"));
            self.members[clone].is_silenced = true;
            self.kill(clone, true);
        }
        if is_quarantined {
            self.certify_again(of);
            self.kill(of, false);
        }
        if std::mem::take(&mut self.members[of].is_silenced) {
            self.ctx.tell(|| format!("a person starts {host} again"));
            self.start(of);
        }
        self.pass(CALM_MS);
    }

    /// Nobody plans anything for a while.
    fn become_quiet(&mut self) {
        let deadline_ms = self.ctx.now_ms + PATIENCE_MS;
        let mut quiet_since_ms = self.ctx.now_ms;
        let apps: Vec<AppName> = self.store.apps.keys().cloned().collect();
        while self.broken().is_none() && self.ctx.now_ms < quiet_since_ms + QUIET_MS {
            if self.ctx.now_ms > deadline_ms {
                return self.checks.fail(|| "control plans for ever".into());
            }
            self.pass(1_000);
            let is_busy = |app: &AppName| self.active(app).is_some() || self.purpose(app).is_some();
            if self.control.is_none() || self.restored.is_some() || apps.iter().any(is_busy) {
                quiet_since_ms = self.ctx.now_ms;
            }
        }
    }

    /// What crashed waits for its restart, the longer the more often it did.
    fn come_to_rest(&mut self) {
        let apps: Vec<AppName> = self.store.apps.keys().cloned().collect();
        let deadline_ms = self.ctx.now_ms + PATIENCE_MS;
        while self.broken().is_none() && apps.iter().any(|app| self.waits_for_restart(app)) {
            if self.ctx.now_ms > deadline_ms {
                return self.checks.fail(|| "a machine never comes up".into());
            }
            self.pass(1_000);
        }
    }

    fn waits_for_restart(&self, app: &AppName) -> bool {
        self.records(app).iter().any(|(_, state)| matches!(state, MachineState::Restarting | MachineState::Starting | MachineState::Updating))
    }

    /// What the agents say of an app's machines that have a row.
    fn records(&self, app: &AppName) -> Vec<(MachineId, MachineState)> {
        let rows = self.store.machines_of(app);
        let of = |row: &dunlin_model::desired::MachineRow| {
            let slots = self.members[self.at(&row.host)].agent.slots.as_ref()?;
            Some((row.id.clone(), slots.get(&row.id)?.machine.record().state))
        };
        rows.filter_map(of).collect()
    }

    /// A release that failed, a worker that a person stopped, what a disk took with it: only people know what they want then.
    fn people_help(&mut self) {
        let apps: Vec<AppName> = self.store.apps.keys().cloned().collect();
        for name in apps {
            if self.broken().is_some() {
                return;
            }
            let app = &self.store.apps[&name];
            let failed = app.plan.as_ref().is_some_and(|(_, progress)| matches!(progress.ended, Some(Ended::Failed { .. })));
            if failed || !app.has_succeeded() || self.helps.contains(&name) {
                for (id, state) in self.records(&name) {
                    if state.is_asleep() || state == MachineState::Failed {
                        let at = self.at(&self.store.machines[&id].host.clone());
                        self.command(at, &id, Verb::Start);
                    }
                }
                self.deploy(&name, Behaviour::Serves);
            }
        }
    }

    /// A settled cluster plans nothing: neither for what is there nor for what should be.
    fn nothing_is_planned(&mut self) {
        let apps: Vec<AppName> = self.store.apps.keys().cloned().collect();
        for name in apps {
            if !self.store.apps[&name].has_succeeded() {
                let status = self.store.apps[&name].current().map(|current| current.status);
                return self.checks.fail(|| format!("{name} is settled, and its release {status:?}"));
            }
            for purpose in [Purpose::Repair, Purpose::Deploy, Purpose::Rebalance] {
                match self.planned(&name, purpose) {
                    Ok(plan) if plan.steps.is_empty() => {}
                    other => self.checks.fail(|| format!("{name} is settled, and for {purpose:?} there is {other:?}")),
                }
            }
        }
    }

    /// Every app has as many machines as it should, each of them lives, once, and nothing else does.
    fn all_are_there(&mut self) {
        let mut living: Vec<(usize, MachineId)> = self.living().into_iter().map(|one| (one.member, one.machine)).collect();
        let apps: Vec<AppName> = self.store.apps.keys().cloned().collect();
        for name in apps {
            let (rows, wanted) = (self.store.machines_of(&name).cloned().collect::<Vec<_>>(), self.store.apps[&name].count());
            if rows.len() != wanted as usize {
                return self.checks.fail(|| format!("{name} has {} machines, and should have {wanted}", rows.len()));
            }
            for row in rows {
                let at = self.at(&row.host);
                let before = living.len();
                living.retain(|(member, id)| (*member, id) != (at, &row.id));
                let seen = self.members[CONTROL].view().and_then(|view| view.machines.get(&row.id).cloned());
                let is_healthy = seen.as_ref().is_some_and(|fact| fact.is_healthy() && fact.version == row.spec.version);
                if before != living.len() + 1 || !is_healthy {
                    let seen = seen.map(|fact| (fact.state, fact.version.clone(), fact.problem.clone()));
                    let lives = before - living.len();
                    return self.checks.fail(|| format!("{name}: {} on {} lives {lives} times, and is seen as {seen:?}", row.id, row.host));
                }
            }
        }
        if let Some((member, id)) = living.first() {
            self.checks.fail(|| format!("{id} lives on h{member}, and nobody wants it"));
        }
    }

    /// All views are one: desired state as the store has it, and of each machine what its host says.
    fn views_agree(&mut self) {
        let wanted = self.store.projection();
        for at in 0..HOSTS {
            let Some(view) = self.members[at].view().cloned() else {
                return self.checks.fail(|| format!("h{at} does not come up"));
            };
            if *view.config != wanted {
                let (held, newest) = (view.config.generation, wanted.generation);
                return self.checks.fail(|| format!("h{at} has desired state {held}, which is at {newest}"));
            }
            for row in self.store.machines.values() {
                let slots = self.members[self.at(&row.host)].agent.slots.as_ref();
                let said = slots.and_then(|slots| slots.get(&row.id)).map(|slot| slot.machine.record());
                let said = said.map(|record| (record.sequence, record.state, record.attempt));
                let seen = view.machines.get(&row.id).map(|fact| (fact.sequence, fact.state, fact.attempt));
                if said != seen {
                    return self.checks.fail(|| format!("h{at} shows {} of {} as {seen:?}, and it is {said:?}", row.id, row.host));
                }
            }
        }
    }

    /// From every edge every app that serves answers.
    fn edges_answer(&mut self) {
        let apps: Vec<AppName> = self.store.apps.keys().filter(|app| Class::of(app).serves()).cloned().collect();
        let asked: Vec<u64> = (0..HOSTS).flat_map(|edge| apps.iter().map(move |app| (edge, app.clone()))).map(|(edge, app)| self.request(edge, &app)).collect();
        self.pass(ANSWER_MS);
        for id in asked {
            let ended = self.requests.get(&id).and_then(|request| request.ended);
            if ended != Some(Request::Answered) && self.broken().is_none() {
                let request = &self.requests[&id];
                let (edge, app) = (request.edge, request.app.clone());
                self.checks.fail(|| format!("h{edge} finds no machine of {app}: {ended:?}"));
            }
        }
    }
}
