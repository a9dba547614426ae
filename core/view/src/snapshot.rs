//! The fold of facts into what a reader sees.

use crate::{ConfigState, Freshness, HostFact, MachineFact, Report};
use dunlin_model::{AppName, Generation, HostId, MachineId};
use imbl::OrdMap;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// One immutable view: config facts of one revision, and the newest fact of each machine and host. A copy shares what it does
/// not change.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    pub config: Arc<ConfigState>,
    /// When the config facts were received; `None` = never in this process (from disk, or nothing yet).
    pub config_received_at_ms: Option<u64>,
    /// In this process somebody has said so who is not only this disk's memory: the writer of desired state, by a sign of
    /// life, has nothing newer.
    pub config_confirmed: bool,
    pub machines: OrdMap<MachineId, Arc<MachineFact>>,
    pub hosts: OrdMap<HostId, Arc<HostFact>>,
    /// Of the other hosts; this process's own is always fresh.
    pub heard: Arc<BTreeMap<HostId, Freshness>>,
    /// Hosts that have told which machines they have. Of others it is not known: those of other regions tell who asks.
    pub told: Arc<BTreeSet<HostId>>,
    /// What each region has, by its reporters.
    pub reports: Arc<BTreeMap<HostId, Report>>,
}

/// What one host says at once.
#[derive(Debug, Clone)]
pub struct HostFacts {
    pub host: HostId,
    pub said: Option<HostFact>,
    /// Each names `host` as its host.
    pub machines: Vec<MachineFact>,
    /// It has them no more.
    pub gone: Vec<MachineId>,
    /// It has no others than `machines`, and so has told all. That orders nobody to do anything.
    pub whole: bool,
}

/// Why facts were not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("config facts of generation {offered} are older than the {held} that this view holds")]
    OlderConfig { offered: Generation, held: Generation },
    #[error("a fact of machine {machine} with sequence {offered} is not newer than {held}")]
    OlderFact { machine: MachineId, offered: u64, held: u64 },
    #[error("host {host} may not speak for machine {machine}: it is assigned to {owner}")]
    NotOwner { host: HostId, machine: MachineId, owner: HostId },
}

impl Snapshot {
    /// The view with newer config facts.
    pub fn with_config(&self, config: Arc<ConfigState>, now_ms: u64) -> Result<Self, Refused> {
        if config.generation < self.config.generation {
            return Err(Refused::OlderConfig { offered: config.generation, held: self.config.generation });
        }
        let mut next = Self { config, config_received_at_ms: Some(now_ms), ..self.clone() };
        let removed = next.config.removed_hosts.clone();
        if removed != self.config.removed_hosts {
            next.forget_hosts(|host| removed.contains(host));
        }
        Ok(next)
    }

    /// The view with a newer fact of one machine.
    pub fn with_machine(&self, fact: Arc<MachineFact>) -> Result<Self, Refused> {
        self.check(&fact)?;
        let mut next = self.clone();
        next.machines.insert(fact.id.clone(), fact);
        Ok(next)
    }

    /// The view with what several hosts say, on one copy; and how many of their facts were not taken.
    pub fn with_facts(&self, facts: Vec<HostFacts>) -> (Self, usize) {
        let (mut next, mut refused) = (self.clone(), 0);
        for HostFacts { host, said, machines, gone, whole } in facts {
            if whole {
                // Its log begins anew, perhaps from an older disk or none, where sequences are lower: what it said before is no
                // measure of what it says now.
                remove_if(&mut next.machines, |_, fact| fact.host == host);
                if !next.told.contains(&host) {
                    Arc::make_mut(&mut next.told).insert(host.clone());
                }
            }
            for id in gone {
                if next.machines.get(&id).is_some_and(|fact| fact.host == host) {
                    next.machines.remove(&id);
                }
            }
            if let Some(said) = said {
                next.hosts.insert(host, Arc::new(said));
            }
            for fact in machines {
                match next.check(&fact) {
                    Ok(()) => drop(next.machines.insert(fact.id.clone(), Arc::new(fact))),
                    Err(_) => refused += 1,
                }
            }
        }
        (next, refused)
    }

    fn check(&self, fact: &MachineFact) -> Result<(), Refused> {
        if let Some(held) = self.machines.get(&fact.id)
            && held.host == fact.host
            && fact.sequence <= held.sequence
        {
            return Err(Refused::OlderFact { machine: fact.id.clone(), offered: fact.sequence, held: held.sequence });
        }
        // What others say of it counts for nothing, whatever placement they claim: a machine stays where it was made.
        match self.config.machines.get(&fact.id).map(|assignment| &assignment.host) {
            Some(owner) if *owner != fact.host => Err(Refused::NotOwner {
                host: fact.host.clone(),
                machine: fact.id.clone(),
                owner: owner.clone(),
            }),
            _ => Ok(()),
        }
    }

    /// The view without a machine that its host has destroyed.
    pub fn without_machine(&self, id: &MachineId) -> Self {
        let mut next = self.clone();
        next.machines.remove(id);
        next
    }

    /// What hosts said that were removed for good goes with them.
    pub fn forget_hosts(&mut self, is_removed: impl Fn(&HostId) -> bool) {
        remove_if(&mut self.hosts, |host, _| is_removed(host));
        remove_if(&mut self.machines, |_, fact| is_removed(&fact.host));
        // Shared with other views as long as nothing of them goes.
        if self.told.iter().any(&is_removed) {
            Arc::make_mut(&mut self.told).retain(|host| !is_removed(host));
        }
        if self.reports.keys().any(&is_removed) {
            Arc::make_mut(&mut self.reports).retain(|host, _| !is_removed(host));
        }
    }

    /// The view with what this process's host says of itself; its machines it has told before.
    pub fn with_host(&self, fact: Arc<HostFact>) -> Self {
        let mut next = self.clone();
        if !next.told.contains(&fact.id) {
            Arc::make_mut(&mut next.told).insert(fact.id.clone());
        }
        next.hosts.insert(fact.id.clone(), fact);
        next
    }

    /// Whether a host that had the machine has it no more: it has told which it has, or was removed.
    pub fn is_rid_of(&self, host: &HostId, machine: &MachineId) -> bool {
        let has_told = self.told.contains(host) || self.config.removed_hosts.contains(host);
        has_told && !self.machines.contains_key(machine)
    }

    /// How far what a host says can be relied on. Of a host that nobody watches, which is this process's own, all is fresh.
    pub fn freshness(&self, host: &HostId) -> Freshness {
        self.heard.get(host).copied().unwrap_or(Freshness::Fresh)
    }

    /// Most other hosts are not heard, and it is more than one of them: rather nothing reaches this host than that they are all
    /// gone. What is known here is then as old as what was last heard.
    pub fn is_cut_off(&self) -> bool {
        let silent = self.heard.values().filter(|freshness| **freshness != Freshness::Fresh).count();
        silent > 1 && 2 * silent > self.heard.len()
    }

    /// Facts of an app's machines, in the order of their ids.
    pub fn machines_of<'a>(&'a self, app: &'a AppName) -> impl Iterator<Item = &'a Arc<MachineFact>> {
        self.machines.values().filter(move |fact| fact.app == *app)
    }
}

/// Those that stay are not copied.
fn remove_if<K: Ord + Clone, V: Clone>(map: &mut OrdMap<K, V>, goes: impl Fn(&K, &V) -> bool) {
    let gone: Vec<K> = map.iter().filter(|(key, value)| goes(key, value)).map(|(key, _)| key.clone()).collect();
    for key in gone {
        map.remove(&key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MachineAssignment;
    use dunlin_model::{ImageRef, MachineSpec, MachineState, MachineVersion};

    fn fact(sequence: u64) -> Arc<MachineFact> {
        Arc::new(MachineFact {
            id: MachineId::from_random([1; 7]),
            host: "h1".parse().unwrap(),
            app: "web".parse().unwrap(),
            sequence,
            placement: Generation::default(),
            state: MachineState::Started,
            version: MachineVersion::new(1, [0; 10]),
            release: 1,
            process_group: "app".into(),
            attempt: 1,
            address: "10.201.0.1".parse().unwrap(),
            cordoned: false,
            checks: vec![],
            exit: None,
            restarts: 0,
            problem: None,
            containers: vec![],
            over: false,
            unconfirmed: false,
            due_ms: None,
            updated_at_ms: 0,
        })
    }

    #[test]
    fn the_newest_fact_wins_whatever_the_order() {
        let view = Snapshot::default().with_machine(fact(2)).unwrap();
        assert!(matches!(view.with_machine(fact(1)), Err(Refused::OlderFact { .. })));
        assert!(matches!(view.with_machine(fact(2)), Err(Refused::OlderFact { .. })));
        assert_eq!(view.with_machine(fact(3)).unwrap().machines.values().next().unwrap().sequence, 3);
    }

    #[test]
    fn nobody_speaks_for_anothers_machine() {
        let of = |host: &str, sequence: u64| {
            let placement = Generation { incarnation: u64::MAX, revision: u64::MAX };
            Arc::new(MachineFact { host: host.parse().unwrap(), placement, ..(*fact(sequence)).clone() })
        };
        let assigned = |host: &str| {
            let fact = fact(1);
            let image = ImageRef { repository: "web".into(), digest: format!("sha256:{}", "0".repeat(64)), tag: None };
            let assignment = MachineAssignment {
                id: fact.id.clone(),
                name: "web".into(),
                host: host.parse().unwrap(),
                region: "fra".parse().unwrap(),
                address: fact.address,
                placement: Generation::default(),
                created_at_ms: 0,
                spec: MachineSpec::of(fact.version.clone(), "personal".parse().unwrap(), "web".parse().unwrap(), image),
            };
            Arc::new(ConfigState { machines: [(fact.id.clone(), assignment)].into_iter().collect(), ..Default::default() })
        };
        let view = Snapshot::default().with_config(assigned("h1"), 0).unwrap().with_machine(fact(1)).unwrap();
        assert!(matches!(view.with_machine(of("h2", 9)), Err(Refused::NotOwner { .. })));
        assert!(view.with_machine(fact(2)).is_ok());
        // Not known yet whose it is: until it is known.
        let early = Snapshot::default().with_machine(of("h2", 9)).unwrap();
        let known = early.with_config(assigned("h1"), 0).unwrap();
        assert_eq!(known.with_machine(fact(1)).unwrap().machines.values().next().unwrap().host.as_str(), "h1");
    }

    #[test]
    fn what_a_removed_host_said_is_gone_with_it() {
        let view = Snapshot::default().with_machine(fact(1)).unwrap();
        let removed = |host: &str| Arc::new(ConfigState { removed_hosts: [host.parse().unwrap()].into_iter().collect(), ..Default::default() });
        assert_eq!(view.with_config(removed("h10"), 0).unwrap().machines.len(), 1);
        assert!(view.with_config(removed("h1"), 0).unwrap().machines.is_empty());
    }

    #[test]
    fn older_config_is_refused() {
        let at = |incarnation, revision| {
            let generation = Generation { incarnation, revision };
            Arc::new(ConfigState { generation, ..Default::default() })
        };
        let view = Snapshot::default().with_config(at(1, 5), 0).unwrap();
        assert!(view.with_config(at(1, 4), 0).is_err());
        assert!(view.with_config(at(2, 1), 0).is_ok(), "a later incarnation wins with any revision");
    }

    #[test]
    fn a_host_that_begins_anew_is_heard_whatever_it_said_before() {
        let says = |sequence, whole| {
            let machines = vec![MachineFact::clone(&fact(sequence))];
            vec![HostFacts { host: "h1".parse().unwrap(), said: None, machines, gone: vec![], whole }]
        };
        let shown = |view: &Snapshot| view.machines.values().next().unwrap().sequence;
        let (view, _) = Snapshot::default().with_facts(says(1 << 33, true));
        let (view, refused) = view.with_facts(says(3, false));
        assert_eq!((shown(&view), refused), (1 << 33, 1), "within a log what is older is old news");
        let (view, refused) = view.with_facts(says(3, true));
        assert_eq!((shown(&view), refused), (3, 0), "its disk was put back");
    }

    #[test]
    fn a_host_takes_away_only_what_is_its_own() {
        let of = |number: u8, host: &str, sequence| MachineFact { id: MachineId::from_random([number; 7]), host: host.parse().unwrap(), ..MachineFact::clone(&fact(sequence)) };
        let says = |host: &str, machines: Vec<MachineFact>, gone: Vec<u8>, whole| HostFacts {
            host: host.parse().unwrap(),
            said: None,
            machines,
            gone: gone.into_iter().map(|number| MachineId::from_random([number; 7])).collect(),
            whole,
        };
        let numbers = |view: &Snapshot| -> Vec<String> { view.machines.values().map(|fact| format!("{}@{}", &fact.id.as_str()[..2], fact.host)).collect() };
        let first = vec![says("h1", vec![of(1, "h1", 1), of(2, "h1", 1)], vec![], true), says("h2", vec![of(3, "h2", 1)], vec![], true)];
        let (view, refused) = Snapshot::default().with_facts(first);
        assert_eq!((numbers(&view), refused), (vec!["01@h1".into(), "02@h1".into(), "03@h2".into()], 0));
        let (view, refused) = view.with_facts(vec![says("h1", vec![of(1, "h1", 1)], vec![3], false), says("h2", vec![of(2, "h2", 1)], vec![], false)]);
        assert_eq!((numbers(&view), refused), (vec!["01@h1".into(), "02@h2".into(), "03@h2".into()], 1), "machine 2 has moved, 3 is not h1's to take away");
        let (view, _) = view.with_facts(vec![says("h1", vec![], vec![2], false), says("h2", vec![of(2, "h2", 2)], vec![], true)]);
        assert_eq!(numbers(&view), ["01@h1", "02@h2"], "the whole of h2 is without machine 3; what h1 gave away stays");
    }

    #[test]
    fn who_hears_of_few_is_cut_off() {
        let check = |fresh: usize, silent: usize, expected: bool| {
            let all = (0..fresh + silent).map(|n| (format!("h{n}").parse().unwrap(), if n < fresh { Freshness::Fresh } else { Freshness::Aging }));
            let view = Snapshot { heard: Arc::new(all.collect()), ..Snapshot::default() };
            assert_eq!(view.is_cut_off(), expected, "{silent} silent of {}", fresh + silent);
        };
        for (fresh, silent, expected) in [(0, 0, false), (0, 1, false), (1, 1, false), (0, 2, true), (1, 2, true), (2, 2, false), (2, 3, true), (5, 0, false)] {
            check(fresh, silent, expected);
        }
    }
}
