//! Facts as rows of a host's two logs; JSON values, the app as topic.
//!
//! ```text
//! host/<id>      everybody's       `host`, and of a reporter `app/<app>`: what its region has of the app
//! machines/<id>  the region's      `m/<machine>`
//! ```

use dunlin_gossip::{Change, Key, MAX_VALUE_BYTES, Row, Topic};
use dunlin_model::{AppName, HostId, MachineId, Region};
use dunlin_view::{CheckState, HostFact, HostFacts, MachineFact, ReportNews, Snapshot, Summary};
use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Of the values, as heads of logs tell it.
pub(crate) const SCHEMA: u32 = 1;
const HOST_KEY: &str = "host";
const MACHINE_PREFIX: &str = "m/";
const APP_PREFIX: &str = "app/";
/// One fact a machine, and one summary an app, in this time, unless what readers decide by has changed.
const PAUSE: Duration = Duration::from_secs(1);
/// To how many bytes the texts of a fact are cut, one after the other, until it fits a row.
const CUTS: [usize; 4] = [512, 128, 32, 0];

/// What of this host's facts is published.
pub(crate) struct Published {
    host: HostId,
    said: Option<(Arc<HostFact>, Instant)>,
    machines: BTreeMap<MachineId, (Arc<MachineFact>, Instant)>,
    /// All facts as they were at the last look: what has not changed since is not looked at again.
    looked_at: OrdMap<MachineId, Arc<MachineFact>>,
    /// Machines of which something is held back.
    waiting: BTreeSet<MachineId>,
}

/// The difference between the view and what is published.
#[derive(Default)]
pub(crate) struct Difference {
    /// The host has spoken for the first time: the log of its machines begins, be there one or not.
    pub begins: bool,
    pub host: Vec<Change>,
    pub machines: Vec<Change>,
    /// When to look again, because something was held back.
    pub again: Option<Instant>,
}

impl Published {
    pub fn nothing(host: HostId) -> Self {
        Self { host, said: None, machines: BTreeMap::new(), looked_at: OrdMap::new(), waiting: BTreeSet::new() }
    }

    /// Whether the host has told who it is.
    pub fn has_begun(&self) -> bool {
        self.said.is_some()
    }

    /// The first time it is all that the host says, and waits until the host has said all: it speaks of itself last.
    pub fn difference(&mut self, view: &Snapshot, now: Instant) -> Difference {
        let mut difference = Difference::default();
        let Some(said) = view.hosts.get(&self.host) else { return difference };
        difference.begins = self.said.is_none();
        let held = self.said.as_ref().filter(|(held, at)| !Arc::ptr_eq(held, said) && *at + PAUSE > now).map(|(_, at)| *at + PAUSE);
        if held.is_none() && !self.said.as_ref().is_some_and(|(held, _)| Arc::ptr_eq(held, said)) {
            difference.host.push(change(HOST_KEY.into(), "", Some(json(said.as_ref()))));
            self.said = Some((said.clone(), now));
        }
        difference.hold(held);
        for id in self.changed(view) {
            let fact = view.machines.get(&id).filter(|fact| fact.host == self.host);
            match (self.machines.get(&id), fact) {
                (None, None) => {}
                (Some(_), None) => {
                    self.machines.remove(&id);
                    difference.machines.push(change(format!("{MACHINE_PREFIX}{id}"), "", None));
                }
                (Some((held, _)), Some(fact)) if Arc::ptr_eq(held, fact) => {}
                (Some((held, at)), Some(fact)) if *at + PAUSE > now && !decides(held, fact) => {
                    difference.hold(Some(*at + PAUSE));
                    self.waiting.insert(id);
                }
                (_, Some(fact)) => {
                    difference.machines.push(change(format!("{MACHINE_PREFIX}{id}"), fact.app.as_str(), Some(machine_value(fact))));
                    self.machines.insert(id, (fact.clone(), now));
                }
            }
        }
        difference
    }

    /// Own machines whose facts differ from those of the last look, and those of which something was held back.
    fn changed(&mut self, view: &Snapshot) -> BTreeSet<MachineId> {
        let mut changed = std::mem::take(&mut self.waiting);
        let is_own = |fact: &MachineFact| fact.host == self.host;
        changed.extend(self.looked_at.diff(&view.machines).filter_map(|item| match item {
            DiffItem::Add(id, fact) | DiffItem::Remove(id, fact) => is_own(fact).then(|| id.clone()),
            DiffItem::Update { old: (id, old), new: (_, new) } => (is_own(old) || is_own(new)).then(|| id.clone()),
        }));
        self.looked_at = view.machines.clone();
        changed
    }
}

/// What this host says of its region, while it is one of its reporters.
#[derive(Default)]
pub(crate) struct Reported {
    apps: BTreeMap<AppName, (Summary, Instant)>,
}

impl Reported {
    /// What has changed, and when to look again.
    pub fn difference(&mut self, apps: BTreeMap<AppName, Summary>, now: Instant) -> (Vec<Change>, Option<Instant>) {
        let (mut changes, mut again): (Vec<Change>, Option<Instant>) = (vec![], None);
        let gone: Vec<AppName> = self.apps.keys().filter(|app| !apps.contains_key(*app)).cloned().collect();
        for app in gone {
            self.apps.remove(&app);
            changes.push(change(format!("{APP_PREFIX}{app}"), app.as_str(), None));
        }
        for (app, summary) in apps {
            match self.apps.get(&app) {
                Some((held, _)) if *held == summary => continue,
                Some((held, at)) if *at + PAUSE > now && !turns(held, &summary) => {
                    again = again.into_iter().chain([*at + PAUSE]).min();
                    continue;
                }
                _ => {}
            }
            changes.push(change(format!("{APP_PREFIX}{app}"), app.as_str(), Some(json(&summary))));
            self.apps.insert(app, (summary, now));
        }
        (changes, again)
    }
}

/// Whether edges would look elsewhere for it.
fn turns(old: &Summary, new: &Summary) -> bool {
    (old.ready == 0, old.wakeable == 0) != (new.ready == 0, new.wakeable == 0)
}

impl Difference {
    fn hold(&mut self, until: Option<Instant>) {
        self.again = self.again.into_iter().chain(until).min();
    }
}

/// Whether readers would do something else for it.
fn decides(old: &MachineFact, new: &MachineFact) -> bool {
    (old.state, old.is_healthy(), old.cordoned, old.over) != (new.state, new.is_healthy(), new.cordoned, new.over)
        || (&old.version, old.attempt, old.placement) != (&new.version, new.attempt, new.placement)
}

fn change(key: String, topic: &str, value: Option<Vec<u8>>) -> Change {
    let topic = Topic::new(topic).expect("an app's name is shorter than a topic may be");
    Change { key: Key::new(key).expect("ids are shorter than a key may be"), value: value.map(|value| (topic, value)), seq: None }
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("plain data")
}

/// What others need of a fact, in one row. Whether the machine is healthy stays as it is: of many checks those that fail are
/// told first.
fn machine_value(fact: &MachineFact) -> Vec<u8> {
    let value = json(fact);
    if value.len() <= MAX_VALUE_BYTES && fact.containers.is_empty() {
        return value;
    }
    let mut fact = fact.clone();
    fact.containers.clear();
    for most in CUTS {
        let value = json(&fact);
        if value.len() <= MAX_VALUE_BYTES {
            return value;
        }
        fact.checks.iter_mut().for_each(|check| cut(&mut check.output, most));
        fact.problem.iter_mut().for_each(|problem| cut(problem, most.max(64)));
        fact.exit.iter_mut().filter_map(|exit| exit.error.as_mut()).for_each(|error| cut(error, most.max(64)));
    }
    fact.checks.sort_by_key(|check| (check.status == CheckState::Passing, !check.gates_routing));
    loop {
        let value = json(&fact);
        if value.len() <= MAX_VALUE_BYTES {
            return value;
        }
        assert!(fact.checks.pop().is_some(), "the rest of a fact is bounded: ids, names, numbers");
    }
}

fn cut(text: &mut String, most: usize) {
    let end = text.floor_char_boundary(most.min(text.len()));
    text.truncate(end);
}

/// Rows that were not taken, and why.
#[derive(Default)]
pub(crate) struct Skipped {
    pub unreadable: u64,
    /// A host speaks of another, or of a machine under another's key.
    pub foreign: u64,
}

/// What a host says of itself, and of its region, which is the one that its log is certified for.
pub(crate) fn read_host(host: &HostId, region: Option<Region>, whole: bool, rows: &[Row], skipped: &mut Skipped) -> (Option<HostFact>, Option<ReportNews>) {
    let (mut said, mut apps) = (None, vec![]);
    for row in rows {
        let key = std::str::from_utf8(row.key()).unwrap_or_default();
        let app = key.strip_prefix(APP_PREFIX).map(str::parse::<AppName>);
        match (app, row.is_dead(), row.body()) {
            (Some(Ok(app)), true, _) => apps.push((app, None)),
            (Some(Ok(app)), false, Some(body)) => match serde_json::from_slice(body.value) {
                Ok(summary) => apps.push((app, Some(summary))),
                Err(_) => skipped.unreadable += 1,
            },
            (None, false, Some(body)) if key == HOST_KEY => match serde_json::from_slice::<HostFact>(body.value) {
                Ok(fact) if fact.id == *host => said = Some(fact),
                Ok(_) => skipped.foreign += 1,
                Err(_) => skipped.unreadable += 1,
            },
            (None, true, _) if key == HOST_KEY => {}
            // Another kind of row, of a later version.
            _ => skipped.unreadable += 1,
        }
    }
    let news = region.filter(|_| whole || !apps.is_empty());
    (said, news.map(|region| ReportNews { host: host.clone(), region, apps, whole }))
}

/// What a host says of its machines.
pub(crate) fn read_machines(host: &HostId, whole: bool, rows: &[Row], skipped: &mut Skipped) -> HostFacts {
    let mut facts = HostFacts { host: host.clone(), said: None, machines: vec![], gone: vec![], whole };
    let (mut apps, mut groups): (BTreeSet<AppName>, BTreeSet<Arc<str>>) = Default::default();
    for row in rows {
        let key = std::str::from_utf8(row.key()).unwrap_or_default();
        let machine = key.strip_prefix(MACHINE_PREFIX).map(str::parse::<MachineId>);
        match (machine, row.is_dead(), row.body()) {
            (Some(Ok(id)), true, _) => facts.gone.push(id),
            (Some(Ok(id)), false, Some(body)) => match serde_json::from_slice::<MachineFact>(body.value) {
                Ok(fact) if fact.id == id && fact.host == *host => {
                    // The same names in all facts are one text in memory.
                    let (app, process_group) = (shared(&mut apps, fact.app), shared(&mut groups, fact.process_group));
                    facts.machines.push(MachineFact { host: host.clone(), app, process_group, ..fact });
                }
                Ok(_) => skipped.foreign += 1,
                Err(_) => skipped.unreadable += 1,
            },
            // Another kind of row, of a later version.
            _ => skipped.unreadable += 1,
        }
    }
    facts
}

fn shared<T: Clone + Ord>(texts: &mut BTreeSet<T>, text: T) -> T {
    match texts.get(&text) {
        Some(known) => known.clone(),
        None => {
            texts.insert(text.clone());
            text
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use dunlin_model::{Generation, MachineState, MachineVersion};

    pub fn fact(number: u8, host: &str) -> MachineFact {
        MachineFact {
            id: MachineId::from_random([number; 7]),
            host: host.parse().unwrap(),
            app: "web".parse().unwrap(),
            sequence: 1,
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
            over: false,
            unconfirmed: false,
            due_ms: None,
            containers: vec![],
            updated_at_ms: 0,
        }
    }

    fn host(id: &str, updated_at_ms: u64) -> HostFact {
        HostFact { id: id.parse().unwrap(), region: "fra".parse().unwrap(), cpus: 1, memory_mb: 1, memory_reserved_mb: 0, room: None, updated_at_ms }
    }

    fn row(key: &str, value: &[u8]) -> Row {
        Row::live(Key::new(key).unwrap(), 1, &Topic::new("web").unwrap(), value).unwrap()
    }

    #[test]
    fn a_host_speaks_for_itself_and_its_machines_only() {
        let (own, others) = (fact(1, "h1"), fact(2, "h2"));
        let key = |fact: &MachineFact| format!("m/{}", fact.id);
        let rows = [
            row(&key(&own), &json(&own)),
            row(&key(&others), &json(&others)),
            row("m/00000000000000", &json(&own)),
            row(&format!("m/{}", fact(3, "h1").id), b"no fact"),
            row("moon", b"later"),
            Row::tombstone(Key::new(key(&fact(4, "h1"))).unwrap(), 1),
        ];
        let (mut skipped, h1) = (Skipped::default(), "h1".parse().unwrap());
        let facts = read_machines(&h1, false, &rows, &mut skipped);
        assert_eq!(facts.machines, [own]);
        assert_eq!(facts.gone, [fact(4, "h1").id]);
        assert_eq!((skipped.foreign, skipped.unreadable), (2, 2));
        let summary = Summary { ready: 2, wakeable: 1, running: 3 };
        let rows = [
            row("host", &json(&host("h2", 1))),
            row("app/web", &json(&summary)),
            row("app/blog", b"no summary"),
            row("moon", b"later"),
            Row::tombstone(Key::new("app/shop").unwrap(), 1),
        ];
        let (mut skipped, fra): (_, Region) = (Skipped::default(), "fra".parse().unwrap());
        let (said, report) = read_host(&h1, Some(fra.clone()), false, &rows, &mut skipped);
        assert!(said.is_none(), "it spoke of another");
        let apps = vec![("web".parse().unwrap(), Some(summary)), ("shop".parse().unwrap(), None)];
        assert_eq!(report, Some(ReportNews { host: h1.clone(), region: fra, apps, whole: false }));
        assert_eq!((skipped.foreign, skipped.unreadable), (1, 2));
        assert_eq!(read_host(&h1, None, true, &[], &mut skipped), (None, None), "of no region nobody speaks");
    }

    fn said(view: &Snapshot, published: &mut Published, now: Instant) -> (usize, Option<Instant>) {
        let difference = published.difference(view, now);
        (difference.host.len() + difference.machines.len(), difference.again)
    }

    #[test]
    fn a_machine_has_one_fact_a_second_unless_it_does_something_else() {
        let start = Instant::now();
        let mut published = Published::nothing("h1".parse().unwrap());
        let mut view = Snapshot::default().with_machine(Arc::new(fact(1, "h1"))).unwrap().with_machine(Arc::new(fact(2, "h2"))).unwrap();
        assert_eq!(said(&view, &mut published, start), (0, None), "the host has not spoken of itself");
        view = view.with_host(Arc::new(host("h1", 1)));
        assert_eq!(said(&view, &mut published, start), (2, None), "itself and its machine, not that of another host");
        assert_eq!(said(&view, &mut published, start), (0, None));
        view = view.with_machine(Arc::new(MachineFact { sequence: 2, restarts: 1, ..fact(1, "h1") })).unwrap().with_host(Arc::new(host("h1", 2)));
        assert_eq!(said(&view, &mut published, start), (0, Some(start + PAUSE)), "held back");
        assert_eq!(said(&view, &mut published, start + PAUSE), (2, None));
        view = view.with_machine(Arc::new(MachineFact { sequence: 3, state: MachineState::Stopped, ..fact(1, "h1") })).unwrap();
        assert_eq!(said(&view, &mut published, start + PAUSE).0, 1, "at once");
        view = view.without_machine(&fact(1, "h1").id);
        assert_eq!(said(&view, &mut published, start + PAUSE).0, 1, "gone");
    }

    #[test]
    fn a_summary_that_turns_is_told_at_once_and_others_once_a_second() {
        let (start, mut reported) = (Instant::now(), Reported::default());
        let mut tell = |ready, wakeable, at| {
            let apps = [("web".parse().unwrap(), Summary { ready, wakeable, running: ready })].into();
            let (changes, again) = reported.difference(apps, at);
            (changes.len(), again)
        };
        assert_eq!(tell(1, 0, start), (1, None));
        assert_eq!(tell(2, 0, start), (0, Some(start + PAUSE)));
        assert_eq!(tell(0, 0, start), (1, None), "nobody is ready any more");
        assert_eq!(tell(0, 1, start), (1, None), "and one can be woken");
        assert_eq!(tell(0, 2, start + PAUSE), (1, None));
        assert_eq!(reported.difference(BTreeMap::new(), start).0.len(), 1, "gone");
    }
}
