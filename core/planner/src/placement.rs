//! Where a new machine goes: first fit, hosts of the primary region first, then in the order of their ids.

use crate::{Desired, Observed};
use dunlin_model::desired::HostRow;
use dunlin_model::{Guest, HostId};
use std::collections::BTreeMap;

/// No host has room, with what each one lacks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no host has room for a machine with {memory_mb} MB: {}", .why.join("; "))]
pub struct NoCapacity {
    pub memory_mb: u32,
    pub why: Vec<String>,
}

/// Free memory of each host while a plan is made.
#[derive(Debug, Clone)]
pub struct Capacity<'a> {
    hosts: Vec<&'a HostRow>,
    free_mb: BTreeMap<HostId, u64>,
    refused: BTreeMap<HostId, String>,
}

impl<'a> Capacity<'a> {
    pub fn new(desired: &'a Desired, observed: &Observed) -> Self {
        let mut hosts: Vec<_> = desired.hosts.iter().collect();
        let elsewhere = |host: &HostRow| desired.primary_region.as_ref().is_some_and(|region| *region != host.region);
        hosts.sort_by_key(|host| (elsewhere(host), host.id.clone()));
        let free_mb = hosts.iter().map(|host| {
            let (memory_mb, reserved_mb) = match observed.hosts.get(&host.id) {
                Some(fact) => (fact.memory_mb, u64::from(fact.memory_reserved_mb)),
                None => (host.memory_mb, observed.assigned_memory_mb.get(&host.id).copied().unwrap_or(0)),
            };
            (host.id.clone(), u64::from(memory_mb).saturating_sub(reserved_mb))
        });
        Self { free_mb: free_mb.collect(), refused: observed.refused.clone(), hosts }
    }

    /// The first host with enough free memory that did not refuse lately; its memory counts as taken from now on.
    /// With `only`, no other host comes into question.
    pub fn place(&mut self, guest: &Guest, only: Option<&HostId>) -> Result<&'a HostRow, NoCapacity> {
        let wanted_mb = u64::from(guest.memory_mb);
        let is_asked = |host: &&&'a HostRow| only.is_none_or(|only| *only == host.id) && !self.refused.contains_key(&host.id);
        for host in self.hosts.iter().filter(is_asked) {
            let Some(free_mb) = self.free_mb.get_mut(&host.id) else { continue };
            if *free_mb >= wanted_mb {
                *free_mb -= wanted_mb;
                return Ok(host);
            }
        }
        let asked = self.hosts.iter().filter(|host| only.is_none_or(|only| *only == host.id));
        let mut why: Vec<String> = asked.map(|host| self.lacks(&host.id)).collect();
        if why.is_empty() {
            why.push("no host has joined".into());
        }
        Err(NoCapacity { memory_mb: guest.memory_mb, why })
    }

    /// The machine stays on its host and becomes another size; what it gains counts as taken from now on, what it frees
    /// only once it is stopped. `held_mb` is what it has at present: nothing, if it does not run.
    pub fn resize(&mut self, host: &HostId, held_mb: u32, guest: &Guest) -> Result<(), NoCapacity> {
        let wanted_mb = u64::from(guest.memory_mb.saturating_sub(held_mb));
        match self.free_mb.get_mut(host) {
            Some(free_mb) if *free_mb >= wanted_mb => *free_mb -= wanted_mb,
            Some(_) => return Err(NoCapacity { memory_mb: guest.memory_mb, why: vec![self.lacks(host)] }),
            None => {} // its host is gone, and with it the machine: that is not for its size to say
        }
        Ok(())
    }

    fn lacks(&self, host: &HostId) -> String {
        match self.refused.get(host) {
            Some(why) => format!("host {host}: {why}"),
            None => format!("host {host} has {} MB free", self.free_mb.get(host).copied().unwrap_or(0)),
        }
    }
}
