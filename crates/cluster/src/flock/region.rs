//! Two levels of what is observed: a region's hosts know all of it, the others know its summary, and more of what they use.
//!
//! ```text
//! machines/<host>, in the region --view--> reporters --> app/<app> in their host/<host>, everywhere
//!                 \--subscription--> edges that are asked for the app, control
//! ```

use super::{Driver, LOOK_EVERY};
use crate::authority::{HOST_LOG, MACHINES_LOG, log_name, machines_log_name, region_of};
use crate::facts::{self, Reported, SCHEMA};
use crate::status::LogScope;
use dunlin_gossip::{Input, Log, Name, OriginId, Row, Scope, Topic};
use dunlin_model::{AppName, HostId, Region};
use dunlin_view::{Freshness, HostFacts};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::time::Instant;

/// How lately hosts were heard.
const FRESH_MS: u64 = 6_000;
const AGING_MS: u64 = 30_000;
/// A region is summed up no more often.
const SUM_UP_EVERY: Duration = Duration::from_millis(100);

/// What this host says of its region, if it is a reporter.
pub(super) struct Reports {
    reported: Reported,
    is_reporter: bool,
    /// When the region is summed up again, because something has changed or was held back.
    pub due: Option<Instant>,
    summed_up: Instant,
}

impl Reports {
    pub fn new(now: Instant) -> Self {
        Self { reported: Reported::default(), is_reporter: false, due: None, summed_up: now }
    }

    /// Something of the region is news.
    pub fn touch(&mut self) {
        let next = self.summed_up + SUM_UP_EVERY;
        self.due = Some(self.due.map_or(next, |due| due.min(next)));
    }
}

impl Driver {
    pub(super) fn report(&mut self, now: Instant) {
        self.reports.summed_up = now;
        self.reports.due = None;
        // Who is a reporter no more takes back what it has said.
        let apps = if self.reports.is_reporter { self.view.current().summarize(&self.shared.member.region) } else { BTreeMap::new() };
        let (changes, again) = self.reports.reported.difference(apps, now);
        self.reports.due = again;
        if !changes.is_empty() {
            self.handle(Input::Publish { origin: self.own, schema: SCHEMA, changes, at: None });
        }
    }

    /// Looks who speaks for the region. Where there is no other, nobody does.
    pub(super) fn look_at_region(&mut self) {
        let is_reporter = || self.node.reporters(&self.node.me().region).contains(&self.own);
        self.reports.is_reporter = self.published.has_begun() && !self.far_regions().is_empty() && is_reporter();
        self.reports.touch();
        // Control plans for all hosts, so its own holds the detail of all regions.
        if self.config.writes.is_some() {
            self.far_regions().iter().for_each(|region| self.use_detail(region, ""));
        }
    }

    /// The publication was refused, and the log begins anew.
    pub(super) fn report_anew(&mut self) {
        self.reports = Reports { due: Some(Instant::now() + LOOK_EVERY), ..Reports::new(Instant::now()) };
    }

    pub(super) fn see_detail(&mut self, region: &Region, app: &AppName) {
        self.use_detail(region, app.as_str());
    }

    fn use_detail(&mut self, region: &Region, topic: &str) {
        let topic = Topic::new(topic).expect("an app's name is shorter than a topic may be");
        self.handle(Input::Use { region: region_of(region), topic });
    }

    /// Regions with hosts, but for this host's; of hosts that do not answer, too: what they said last is still what is known.
    fn far_regions(&self) -> BTreeSet<Region> {
        let own = &self.node.me().region;
        let known = self.node.catalogue().logs().map(|log| &log.certificate).filter(|certificate| certificate.region != *own);
        let there = known.filter(|certificate| host_of(&certificate.name).is_some_and(|host| !self.removed.contains(&host)));
        there.filter_map(|certificate| super::region(&certificate.region)).collect()
    }

    /// Nobody uses some detail of that region any more: which of its hosts are not held now?
    pub(super) fn dropped(&mut self, region: &dunlin_gossip::Region) {
        let held: BTreeSet<HostId> = self.node.catalogue().of_region(region).filter_map(|log| machines_of(&log.certificate.name)).collect();
        let is_there = |host: &&HostId| self.region_of_host(host).as_ref() == Some(region);
        let gone: Vec<HostId> = self.view.current().told.iter().filter(is_there).filter(|host| !held.contains(*host)).cloned().collect();
        tracing::debug!(?region, hosts = gone.len(), "detail that nobody used was dropped");
        self.news.dropped.extend(gone);
    }

    fn region_of_host(&self, host: &HostId) -> Option<dunlin_gossip::Region> {
        self.node.catalogue().certificate(OriginId::of(&log_name(host))).map(|certificate| certificate.region.clone())
    }

    /// How lately a host was heard: what it says of itself tells that it lives. Where its detail is held and has not been renewed
    /// for long although it lives, others are preferred.
    pub(super) fn freshness(&self, host: &HostId) -> Option<Freshness> {
        let age_ms = |name: Name| self.node.status(OriginId::of(&name)).map(|status| status.age_ms);
        let of_host = match age_ms(log_name(host))? {
            Some(age_ms) if age_ms < FRESH_MS => Freshness::Fresh,
            Some(age_ms) if age_ms < AGING_MS => Freshness::Aging,
            _ => Freshness::Old,
        };
        let is_late = age_ms(machines_log_name(host)).flatten().is_some_and(|age_ms| age_ms >= AGING_MS);
        Some(if is_late { of_host.max(Freshness::Aging) } else { of_host })
    }

    /// What a log has said is news to the view.
    pub(super) fn read_log(&mut self, origin: OriginId, whole: bool, rows: &[Row]) {
        let Some(certificate) = self.node.catalogue().certificate(origin) else { return };
        let (name, region) = (certificate.name.clone(), super::region(&certificate.region));
        if let Some(host) = host_of(&name) {
            let (said, report) = facts::read_host(&host, region, whole, rows, &mut self.skipped);
            self.news.facts.extend(said.map(|said| HostFacts { host, said: Some(said), machines: vec![], gone: vec![], whole: false }));
            self.news.reports.extend(report);
        } else if let Some(host) = machines_of(&name) {
            // It may have been dropped a moment ago, and is here again.
            self.news.dropped.remove(&host);
            self.news.facts.push(facts::read_machines(&host, whole, rows, &mut self.skipped));
        }
        self.reports.touch();
    }
}

pub(super) fn scope_of(log: &Log, own: &dunlin_gossip::Region) -> LogScope {
    match log.certificate.scope {
        Scope::Global => LogScope::Global,
        Scope::Region if log.certificate.region == *own => LogScope::Region,
        Scope::Region => LogScope::Subscribed,
    }
}

/// The host that speaks of itself in this log.
pub(super) fn host_of(name: &Name) -> Option<HostId> {
    in_log(name, HOST_LOG)
}

/// The host that speaks of its machines in it.
pub(super) fn machines_of(name: &Name) -> Option<HostId> {
    in_log(name, MACHINES_LOG)
}

fn in_log(name: &Name, prefix: &str) -> Option<HostId> {
    std::str::from_utf8(name.as_bytes()).ok()?.strip_prefix(prefix)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use crate::{Authority, Cluster, ClusterConfig, Member, MemberKeys, View};
    use dunlin_gossip::IDLE_MS;
    use dunlin_model::{AppName, HostId, Region};
    use dunlin_view::{HostFact, MachineFact};
    use std::net::{SocketAddr, UdpSocket};
    use std::time::Duration;

    async fn start(dir: &std::path::Path, (host, region): (&str, &str), peers: Vec<(HostId, SocketAddr)>) -> (Cluster, View) {
        let authority = Authority::load_or_create(&dir.join("authority"), crate::member::now_ms()).unwrap();
        let (host, region): (HostId, Region) = (host.parse().unwrap(), region.parse().unwrap());
        let keys = MemberKeys::generate().unwrap();
        let issued = authority.issue(&host, &region, 1, &keys.public().unwrap(), crate::member::now_ms()).unwrap();
        let machine_prefix = dunlin_model::desired::Ipv4Prefix { network: "10.202.0.0".parse().unwrap(), length: 16 };
        let dir = dir.join(host.as_str());
        std::fs::create_dir_all(&dir).unwrap();
        let (domain, control, said) = ("localhost".into(), "h1".parse().unwrap(), Default::default());
        let member = Member { host, region, epoch: 1, domain, machine_prefix, control, peers, said, keys, issued };
        let (socket, view) = (UdpSocket::bind("127.0.0.1:0").unwrap(), View::memory());
        let advertise = socket.local_addr().unwrap();
        (Cluster::start(ClusterConfig { member, socket, advertise, dir }, view.clone()).await.unwrap(), view)
    }

    async fn until(what: &str, is_so: impl Fn() -> bool) {
        let wait = async {
            while !is_so() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), wait).await.unwrap_or_else(|_| panic!("{what}: still not so"));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn detail_that_nobody_uses_is_dropped_and_comes_again() {
        let dir = tempfile::tempdir().unwrap();
        let (h1, there) = start(dir.path(), ("h1", "ams"), vec![]).await;
        let (h2, here) = start(dir.path(), ("h2", "fra"), vec![("h1".parse().unwrap(), h1.advertised())]).await;
        let fact: MachineFact = crate::facts::tests::fact(1, "h1");
        there.publish_machine(fact.clone()).unwrap();
        let said = HostFact { id: "h1".parse().unwrap(), region: "ams".parse().unwrap(), cpus: 1, memory_mb: 1, memory_reserved_mb: 0, room: None, updated_at_ms: 0 };
        there.publish_host(said);
        let (ams, app): (Region, AppName) = ("ams".parse().unwrap(), fact.app.clone());
        until("h1 is known", || here.current().hosts.contains_key(h1.host())).await;
        let sees = || (here.current().machines.contains_key(&fact.id), here.current().told.contains(h1.host()));
        assert_eq!(sees(), (false, false));
        for time in ["the first", "the second"] {
            assert!(h2.see_detail(&ams, &app));
            until(&format!("its machines are, for {time} time"), || sees() == (true, true)).await;
            h2.pass(Duration::from_millis(IDLE_MS / 2)).await;
            assert!(h2.see_detail(&ams, &app), "used again");
            h2.pass(Duration::from_millis(IDLE_MS * 2 / 3)).await;
            assert_eq!(h2.verify().await, Some(vec![]), "the driver has come so far");
            assert_eq!(sees(), (true, true), "it was used within ten minutes");
            h2.pass(Duration::from_millis(IDLE_MS)).await;
            until("they are dropped", || sees() == (false, false)).await;
            assert!(here.current().hosts.contains_key(h1.host()), "what it says of itself stays");
        }
    }
}
