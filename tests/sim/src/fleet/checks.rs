//! What must hold in a fleet. A checker knows the truth, because it sees every writer write, every program come up and every
//! probe come back; it judges what others are told of it. Above each stands the sentence that it enforces.
//!
//! Nothing in here asks the planner, the view or routing what is right.

use super::rows::json;
use super::store::Class;
use dunlin_gossip::{Log, OriginId};
use dunlin_model::hash::fnv1a;
use dunlin_model::{AppName, Generation, HostId, MachineId, MachineVersion};
use dunlin_view::{ConfigState, HostFact, MachineFact};
use std::collections::{BTreeMap, BTreeSet};

type State = (OriginId, u32, u64, [u8; 32]);

/// A host that is called dead was not reached for so long.
const UNREACHED_MS: u64 = 5_000;
/// From hearing of a tombstone to the end of the machine's last process.
const OBEYS_WITHIN_MS: u64 = 10_000;

/// One living program.
pub struct Lives {
    pub member: usize,
    pub machine: MachineId,
    pub attempt: u64,
    /// It came up from a disk that is a copy, or was put back, and its host has not heard what has been decided since.
    pub is_excused: bool,
}

#[derive(Default)]
pub struct Checks {
    pub broken: Option<String>,
    /// Every state of a log that was signed by whoever rightly holds the key.
    signed: BTreeSet<State>,
    /// Every fact that was published, by its host and what it is of.
    said: BTreeSet<(HostId, u64)>,
    configs: BTreeMap<Generation, ConfigState>,
    pub apps: BTreeMap<MachineId, AppName>,
    /// Where each machine was made, whatever became of it.
    pub homes: BTreeMap<MachineId, HostId>,
    /// Machines that people have destroyed since the app's plan was made.
    pub by_hand: BTreeMap<AppName, usize>,
    /// When a probe of a host last came back to this control.
    pub reached_ms: BTreeMap<HostId, u64>,
    /// Since when a living machine's host has known that it is destroyed.
    obeys_since_ms: BTreeMap<(usize, MachineId), u64>,
}

impl Checks {
    pub fn fail(&mut self, what: impl FnOnce() -> String) {
        if self.broken.is_none() {
            self.broken = Some(what());
        }
    }

    fn must(&mut self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.fail(what);
        }
    }

    // ---- nobody is ever shown what its writer has not published

    pub fn signs(&mut self, log: &Log) {
        self.signed.insert(state_of(log));
    }

    pub fn says(&mut self, fact: &MachineFact) {
        self.said.insert((fact.host.clone(), fnv1a(json(fact))));
    }

    pub fn says_of_itself(&mut self, fact: &HostFact) {
        self.said.insert((fact.id.clone(), fnv1a(json(fact))));
    }

    pub fn publishes(&mut self, config: &ConfigState) {
        self.configs.insert(config.generation, config.clone());
    }

    /// A log that a reader holds is one that its writer signed, whole.
    pub fn holds(&mut self, who: usize, log: &Log) {
        let is_signed = self.signed.contains(&state_of(log));
        self.must(is_signed, || format!("h{who} holds a state of {} at {:?} that nobody signed", log.certificate.name, log.head.at()));
    }

    /// A fact that a view shows was published by the host that has the machine, and by no other.
    pub fn shows(&mut self, who: usize, fact: &MachineFact) {
        let is_said = self.said.contains(&(fact.host.clone(), fnv1a(json(fact))));
        self.must(is_said, || format!("h{who} shows what {} never said of {}: {:?}", fact.host, fact.id, fact.state));
    }

    pub fn shows_host(&mut self, who: usize, fact: &HostFact) {
        let is_said = self.said.contains(&(fact.id.clone(), fnv1a(json(fact))));
        self.must(is_said, || format!("h{who} shows what {} never said of itself", fact.id));
    }

    /// Desired state that a view shows is a whole one that control published, and never an older one than before.
    pub fn shows_config(&mut self, who: usize, before: Generation, config: &ConfigState) {
        let (generation, is_published) = (config.generation, self.configs.get(&config.generation) == Some(config));
        self.must(is_published, || format!("h{who} shows desired state {generation} as control never published it"));
        self.must(generation >= before, || format!("h{who} goes back from desired state {before} to {generation}"));
    }

    // ---- what may run twice

    /// *Exclusive* (a volume, no service): of each there is one living program in the whole fleet, whatever is cut off or held
    /// for dead. It may live twice only where a disk was copied or put back, until that host has heard what was decided
    /// since: nobody can know it before. *Replaceable* (a service, no volume): its successor may live beside it.
    pub fn lives(&mut self, living: &[Lives]) {
        let mut exclusive: BTreeMap<&AppName, &Lives> = BTreeMap::new();
        let mut twice = None;
        for one in living.iter().filter(|one| !one.is_excused) {
            let Some(app) = self.apps.get(&one.machine).filter(|app| Class::of(app).is_exclusive()) else { continue };
            if let Some(other) = exclusive.insert(app, one) {
                let name = |one: &Lives| format!("attempt {} of {} on h{}", one.attempt, one.machine, one.member);
                twice = Some(format!("{app} may run once, and two live: {} and {}", name(other), name(one)));
            }
        }
        if let Some(twice) = twice {
            self.fail(|| twice);
        }
    }

    /// A machine that was replaced lives on only until its host hears of it, and then for seconds.
    pub fn obeys(&mut self, member: usize, now_ms: u64, doomed: &[MachineId]) {
        self.obeys_since_ms.retain(|(of, id), _| *of != member || doomed.contains(id));
        for id in doomed {
            let since_ms = *self.obeys_since_ms.entry((member, id.clone())).or_insert(now_ms);
            self.must(now_ms < since_ms + OBEYS_WITHIN_MS, || format!("h{member} knows that {id} is destroyed, and lets it live"));
        }
    }

    // ---- what control does

    /// A host is called dead only when control's own probe has not reached it for five seconds, others do not hear of it
    /// either, and control reaches at least half of the hosts.
    pub fn is_called_dead(&mut self, host: &HostId, now_ms: u64, is_heard: bool, (reached, all): (usize, usize)) {
        let last_ms = self.reached_ms.get(host).copied().unwrap_or_default();
        self.must(now_ms >= last_ms + UNREACHED_MS, || format!("{host} is called dead {} ms after it answered", now_ms - last_ms));
        self.must(!is_heard, || format!("{host} is called dead though gossip hears of it"));
        self.must(2 * reached >= all, || format!("{host} is called dead by who reaches {reached} of {all} hosts"));
    }

    /// A plan never ends an exclusive machine, and no group has fewer machines after it than it should; but for those that a
    /// person has destroyed since it was made.
    pub fn plan_destroys(&mut self, id: &MachineId, app: &AppName, left: usize, wanted: u32) {
        let by_hand = self.by_hand.get(app).copied().unwrap_or_default();
        self.must(!Class::of(app).is_exclusive(), || format!("a plan destroys {id} of {app}, of which there may be one"));
        self.must(left + by_hand >= wanted as usize, || format!("a plan destroys {id} before its successor is there: {left} of {wanted} are left"));
    }

    // ---- edges

    /// An edge sends a request to no machine that it knows to be destroyed, nor again to one that has refused it, as long as it
    /// has heard nothing new.
    pub fn is_routed(&mut self, edge: usize, machine: &MachineId, is_gone: bool, refused_before: bool) {
        self.must(!is_gone, || format!("h{edge} sends a request to {machine}, which it knows to be gone"));
        self.must(!refused_before, || format!("h{edge} sends a request again to {machine}, which has refused it"));
    }

    /// What answers is in the version that the edge meant: an answer never comes from an old release unnoticed.
    pub fn is_answered(&mut self, edge: usize, machine: &MachineId, meant: &MachineVersion, found: &MachineVersion) {
        self.must(meant == found, || format!("h{edge} meant {machine} in {meant}, and {found} answered"));
    }
}

fn state_of(log: &Log) -> State {
    let is = &log.head.is;
    (is.id, is.epoch, is.seq, is.digest)
}
