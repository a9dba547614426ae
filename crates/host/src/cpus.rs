//! Which processors machines run on: one of performance cpus has whole ones of its own, all others share the rest.
//!
//! Who has which is asked of the kernel when the agent starts; control groups outlive it.

use crate::Shared;
use crate::agent::chain;
use dunlin_machine::Record;
use dunlin_model::{CpuKind, MachineId, MachineSpec};
use dunlin_runtime::SupervisorSpec;
use dunlin_runtime::cgroup::{CgroupError, CpuSet, Cgroups};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Control groups of machines and builders begin with it.
const MACHINE: &str = "m-";

#[derive(Default)]
pub struct Cpus(Mutex<BTreeMap<MachineId, CpuSet>>);

type Owned = BTreeMap<MachineId, CpuSet>;

impl Cpus {
    fn owned(&self) -> MutexGuard<'_, Owned> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// For an attempt that is about to begin. `None`: the host has no control groups for processors.
pub fn give(shared: &Shared, id: &MachineId, spec: &MachineSpec) -> Option<CpuSet> {
    let all = all(&shared.cgroups)?;
    Some(give_of(shared, &all, &mut shared.cpus.owned(), id, spec))
}

/// The same for one whose control group is there, before its program starts.
pub fn place(shared: &Shared, id: &MachineId, spec: &MachineSpec) {
    let Some(all) = all(&shared.cgroups) else { return };
    // Held until it has them: whoever gives or takes meanwhile finds it as it will be.
    let mut owned = shared.cpus.owned();
    let cpus = give_of(shared, &all, &mut owned, id, spec);
    set(&shared.cgroups, &SupervisorSpec::machine_cgroup(id.as_str()), &cpus);
}

fn give_of(shared: &Shared, all: &CpuSet, owned: &mut Owned, id: &MachineId, spec: &MachineSpec) -> CpuSet {
    let before = shared_set(all, owned);
    owned.remove(id);
    if spec.guest.cpu_kind == CpuKind::Performance {
        let own = choose(all, owned, spec.guest.cpus);
        owned.insert(id.clone(), own.clone());
        spread(shared, all, owned, &before);
        return own;
    }
    shared_set(all, owned)
}

/// Once its control group is there: meanwhile others may have got processors of their own, or given them back.
pub fn settle(shared: &Shared, id: &MachineId, given: Option<&CpuSet>) {
    let Some(all) = all(&shared.cgroups) else { return };
    let owned = shared.cpus.owned();
    let now = shared_set(&all, &owned);
    if !owned.contains_key(id) && given != Some(&now) {
        set(&shared.cgroups, &SupervisorSpec::machine_cgroup(id.as_str()), &now);
    }
}

/// Nothing of it lives.
pub fn take_back(shared: &Shared, id: &MachineId) {
    let mut owned = shared.cpus.owned();
    if !owned.contains_key(id) {
        return;
    }
    let Some(all) = all(&shared.cgroups) else { return };
    let before = shared_set(&all, &owned);
    owned.remove(id);
    spread(shared, &all, &owned, &before);
}

/// After a start of the agent, before any machine does: who has which, and the rest for all others. Meanwhile one may have
/// ended whose processors nobody gave back.
pub fn recover<'a>(shared: &Shared, machines: impl Iterator<Item = &'a Record>) {
    let Some(all) = all(&shared.cgroups) else { return };
    let mut owned = shared.cpus.owned();
    for record in machines.filter(|record| record.spec().guest.cpu_kind == CpuKind::Performance) {
        let id = &record.assignment.id;
        let cpus = shared.cgroups.open(&SupervisorSpec::machine_cgroup(id.as_str())).and_then(|cgroup| cgroup.cpus());
        match cpus {
            // One of a version that gave nobody processors of its own.
            Ok(Some(cpus)) if cpus.0.len() != record.spec().guest.cpus as usize => {}
            Ok(Some(cpus)) => drop(owned.insert(id.clone(), cpus)),
            Ok(None) | Err(CgroupError::NotFound(_)) => {}
            Err(error) => tracing::warn!(machine = %id, error = %chain(&error), "its processors cannot be asked for"),
        }
    }
    share(shared, &shared_set(&all, &owned), &owned);
}

fn all(cgroups: &Cgroups) -> Option<CpuSet> {
    match cgroups.cpus() {
        Ok(cpus) => cpus.filter(|cpus| !cpus.0.is_empty()),
        Err(error) => {
            tracing::warn!(error = %chain(&error), "the host's processors cannot be asked for; machines run on all");
            None
        }
    }
}

/// Those that fewest have, from the last on: the first is shared for as long as can be.
fn choose(all: &CpuSet, owned: &Owned, wanted: u32) -> CpuSet {
    let mut cpus: Vec<u32> = all.0.iter().copied().collect();
    let owners = |cpu: &u32| owned.values().filter(|set| set.0.contains(cpu)).count();
    cpus.sort_by_key(|cpu| (owners(cpu), std::cmp::Reverse(*cpu)));
    CpuSet(cpus.into_iter().take(wanted.max(1) as usize).collect())
}

/// What is nobody's own. If nothing is, the first is everybody's.
fn shared_set(all: &CpuSet, owned: &Owned) -> CpuSet {
    let is_free = |cpu: &&u32| !owned.values().any(|set| set.0.contains(cpu));
    let free: CpuSet = CpuSet(all.0.iter().filter(is_free).copied().collect());
    if free.0.is_empty() { CpuSet(all.0.first().copied().into_iter().collect()) } else { free }
}

/// Tells all that share when there is more or less for them.
fn spread(shared: &Shared, all: &CpuSet, owned: &Owned, before: &CpuSet) {
    let now = shared_set(all, owned);
    if now != *before {
        share(shared, &now, owned);
    }
}

fn share(shared: &Shared, now: &CpuSet, owned: &Owned) {
    let own: Vec<String> = owned.keys().map(|id| SupervisorSpec::machine_cgroup(id.as_str())).collect();
    match shared.cgroups.list() {
        Ok(names) => {
            for name in names.iter().filter(|name| name.starts_with(MACHINE) && !own.contains(name)) {
                set(&shared.cgroups, name, now);
            }
        }
        Err(error) => tracing::warn!(error = %chain(&error), "machines cannot be told of their processors"),
    }
}

/// One that is gone needs none.
fn set(cgroups: &Cgroups, name: &str, cpus: &CpuSet) {
    let Err(error) = cgroups.open(name).and_then(|cgroup| cgroup.set_cpus(cpus)) else { return };
    if cgroups.open(name).is_ok() {
        tracing::warn!(cgroup = name, %cpus, error = %chain(&error), "its processors stay as they are");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> CpuSet {
        text.parse().unwrap()
    }

    fn owned(sets: &[&str]) -> Owned {
        sets.iter().enumerate().map(|(n, set)| (MachineId::from_random([n as u8; 7]), of(set))).collect()
    }

    #[test]
    fn own_processors_do_not_overlap_while_there_are_any() {
        let all = of("0-3");
        assert_eq!(choose(&all, &owned(&[]), 1), of("3"));
        assert_eq!(choose(&all, &owned(&["3"]), 2), of("1-2"));
        assert_eq!(shared_set(&all, &owned(&["3", "1-2"])), of("0"));
        assert_eq!(choose(&all, &owned(&["3", "1-2"]), 1), of("0"), "the last one goes, too");
        assert_eq!(shared_set(&all, &owned(&["3", "1-2", "0"])), of("0"), "and is shared then");
        assert_eq!(choose(&all, &owned(&["1-3"]), 2), of("0,3"), "more than there are: with whom it hurts least");
        assert_eq!(choose(&of("0-1"), &owned(&[]), 4), of("0-1"));
    }

    #[test]
    fn what_is_given_back_is_given_again() {
        let all = of("2-5");
        assert_eq!(choose(&all, &owned(&["5"]), 1), of("4"));
        assert_eq!(shared_set(&all, &owned(&[])), all);
        assert_eq!(choose(&all, &owned(&["4"]), 2), of("3,5"));
    }
}
