//! What is known everywhere of what runs in a region: some numbers for each app. All the rest is detail, which stays there.

use crate::{Freshness, MachineAssignment, MachineFact, Snapshot};
use dunlin_model::{AppName, HostId, MachineId, MachineState, Region};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What a region has of an app. Whoever wants to know on which hosts and in which versions subscribes to its detail; where
/// hosts are, and whether they answer, is known of all of them anyway.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Machines that can take a request now.
    pub ready: u32,
    /// Machines that a request would start.
    pub wakeable: u32,
    /// Machines that run or are about to, those that are ready among them.
    pub running: u32,
}

/// What one of a region's reporters says of all of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    pub region: Region,
    pub apps: BTreeMap<AppName, Summary>,
}

/// Of a reporter's log, what is new.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReportNews {
    pub host: HostId,
    /// That its log is certified for: it can speak for no other.
    pub region: Region,
    /// `None`: the region has nothing of the app any more, or the host speaks for it no more.
    pub apps: Vec<(AppName, Option<Summary>)>,
    /// It says nothing else.
    pub whole: bool,
}

impl Summary {
    fn add(&mut self, assignment: &MachineAssignment, fact: &MachineFact) {
        let autostarts = assignment.spec.services.first().is_some_and(|service| service.autostart);
        self.ready += u32::from(fact.is_healthy() && !fact.cordoned);
        self.wakeable += u32::from(fact.state.is_asleep() && !fact.cordoned && autostarts);
        self.running += u32::from(runs(fact) && !fact.cordoned);
    }

    fn most(self, other: Self) -> Self {
        Self { ready: self.ready.max(other.ready), wakeable: self.wakeable.max(other.wakeable), running: self.running.max(other.running) }
    }
}

/// Now or in a moment.
fn runs(fact: &MachineFact) -> bool {
    use MachineState::{Creating, Restarting, Started, Starting, Updating};
    matches!(fact.state, Creating | Restarting | Started | Starting | Updating)
}

impl Snapshot {
    /// What a reporter of the region says of it: of machines with their assigned hosts, of which something was heard lately.
    pub fn summarize(&self, region: &Region) -> BTreeMap<AppName, Summary> {
        let mut apps: BTreeMap<AppName, Summary> = BTreeMap::new();
        for fact in self.machines.values().filter(|fact| self.freshness(&fact.host) != Freshness::Old) {
            let assignment = self.config.machines.get(&fact.id).filter(|assignment| assignment.region == *region && assignment.host == fact.host);
            if let Some(assignment) = assignment.filter(|assignment| !self.config.tombstones.contains_key(&assignment.id)) {
                apps.entry(fact.app.clone()).or_default().add(assignment, fact);
            }
        }
        apps
    }

    /// What a region has of an app, by its reporters. Where they differ it is the most that any of them says: to look in vain
    /// costs less than not to look. `None`: none of them was heard lately, or none speaks of the app.
    pub fn summary(&self, region: &Region, app: &AppName) -> Option<Summary> {
        let there = self.reports.iter().filter(|(host, report)| report.region == *region && self.freshness(host) != Freshness::Old);
        there.filter_map(|(_, report)| report.apps.get(app).copied()).reduce(Summary::most)
    }

    /// The view with what reporters say.
    pub fn with_reports(&self, news: Vec<ReportNews>) -> Self {
        let mut next = self.clone();
        let reports = Arc::make_mut(&mut next.reports);
        for ReportNews { host, region, apps, whole } in news {
            let report = reports.entry(host).or_insert_with(|| Report { region: region.clone(), apps: BTreeMap::new() });
            if whole || report.region != region {
                *report = Report { region, apps: BTreeMap::new() };
            }
            for (app, summary) in apps {
                match summary {
                    Some(summary) => drop(report.apps.insert(app, summary)),
                    None => drop(report.apps.remove(&app)),
                }
            }
        }
        reports.retain(|_, report| !report.apps.is_empty());
        next
    }

    /// The view without the detail of these hosts: nobody here needs it. What they say of themselves stays.
    pub fn without_detail_of(&self, hosts: &BTreeSet<HostId>) -> Self {
        let mut next = self.clone();
        let theirs: Vec<MachineId> = self.machines.values().filter(|fact| hosts.contains(&fact.host)).map(|fact| fact.id.clone()).collect();
        for id in theirs {
            next.machines.remove(&id);
        }
        Arc::make_mut(&mut next.told).retain(|host| !hosts.contains(host));
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn news(host: &str, region: &str, ready: Option<u32>, whole: bool) -> ReportNews {
        let summary = ready.map(|ready| Summary { ready, wakeable: 1, running: ready });
        ReportNews { host: host.parse().unwrap(), region: region.parse().unwrap(), apps: vec![("web".parse().unwrap(), summary)], whole }
    }

    fn ready(view: &Snapshot, region: &str) -> Option<u32> {
        view.summary(&region.parse().unwrap(), &"web".parse().unwrap()).map(|summary| summary.ready)
    }

    #[test]
    fn the_most_that_a_living_reporter_says_counts() {
        let view = Snapshot::default().with_reports(vec![news("a", "ams", Some(1), true), news("b", "ams", Some(3), true), news("c", "syd", Some(9), true)]);
        assert_eq!((ready(&view, "ams"), ready(&view, "syd"), ready(&view, "fra")), (Some(3), Some(9), None));
        let heard = |host: &str, freshness| Snapshot { heard: Arc::new([(host.parse().unwrap(), freshness)].into()), ..view.clone() };
        assert_eq!(ready(&heard("b", Freshness::Aging), "ams"), Some(3));
        assert_eq!(ready(&heard("b", Freshness::Old), "ams"), Some(1));
        assert_eq!(ready(&heard("c", Freshness::Old), "syd"), None);
    }

    #[test]
    fn a_reporter_takes_back_what_it_has_said() {
        let view = Snapshot::default().with_reports(vec![news("a", "ams", Some(1), true)]);
        assert_eq!(ready(&view.with_reports(vec![news("a", "ams", None, false)]), "ams"), None);
        let silent = ReportNews { apps: vec![], ..news("a", "ams", None, true) };
        assert!(view.with_reports(vec![silent]).reports.is_empty());
        // Certified anew for another region, it speaks for that one only.
        let moved = view.with_reports(vec![news("a", "fra", Some(2), false)]);
        assert_eq!((ready(&moved, "ams"), ready(&moved, "fra")), (None, Some(2)));
    }
}
