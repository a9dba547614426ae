//! What an operator sees of the cluster, as one host knows it.

use crate::authority::CONFIG_LOG;
use dunlin_gossip::Counters;
use dunlin_model::{HostId, Region};
use dunlin_view::Freshness;
use serde::Serialize;
use std::fmt::{Display, Write};
use std::net::SocketAddr;

/// Origins whose age and lag are metrics of their own: a thousand hosts have some two thousand, twice that is spared nobody's scrape.
const MAX_ORIGINS: usize = 4_096;

/// One host of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MemberStatus {
    pub id: HostId,
    /// Of one that is no member now, as its log's certificate has it.
    pub region: Option<Region>,
    pub address: Option<SocketAddr>,
    /// Membership's word: it answers.
    pub alive: bool,
    pub freshness: Freshness,
    /// Since it was last heard, in this process.
    pub age_ms: Option<u64>,
    pub rtt_us: Option<u64>,
}

/// Why a log is held here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LogScope {
    /// Everybody holds it.
    Global,
    /// Detail of this host's region.
    Region,
    /// Detail of another region, because it is used here.
    Subscribed,
}

impl LogScope {
    const ALL: [Self; 3] = [Self::Global, Self::Region, Self::Subscribed];

    fn label(self) -> &'static str {
        match self {
            Self::Global => "global",
            Self::Region => "region",
            Self::Subscribed => "subscribed",
        }
    }
}

/// One writer's log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LogStatus {
    pub name: String,
    pub scope: LogScope,
    /// That it was certified for.
    pub region: Option<Region>,
    pub epoch: u32,
    pub seq: u64,
    /// Since it was last heard, in this process.
    pub age_ms: Option<u64>,
    /// How far a head that its writer signed is ahead of what is here, and for how long.
    pub lag: u64,
    pub behind_ms: u64,
    pub rows: usize,
    pub bytes: usize,
    /// Two heads of it contradict each other: its key is in two hands. Remove that host, and let it join anew.
    pub quarantined: bool,
}

/// Whether others have the same of a scope: of those that were compared with in the last minute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ComparedStatus {
    pub scope: LogScope,
    pub equal: usize,
    /// News are on their way, or one of the two stays behind.
    pub differ: usize,
    /// Since any other was last found to have the same, or since this process began.
    pub age_ms: u64,
}

/// Why this process says nothing in the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Silenced {
    /// An older process with the same identity answers, at another address.
    DuplicateIdentity,
    /// This host was certified anew, elsewhere.
    Superseded { epoch: u32 },
}

impl Display for Silenced {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::DuplicateIdentity => f.write_str(
                "another running process has this host's identity (a copied disk?): end one of them; \
                 if both are to stay, delete the folder cluster/ of one and let it join under a name of its own",
            ),
            Self::Superseded { epoch } => write!(
                f,
                "this host has joined anew elsewhere (epoch {epoch}): end this process, or delete its folder cluster/ and let it join again",
            ),
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ClusterStatus {
    /// Whether this process publishes: it asks others first, for five seconds at most.
    pub speaks: bool,
    pub silenced: Option<Silenced>,
    /// Control has said that this host was removed for good.
    pub removed: bool,
    /// Most other hosts are not heard: this one is alone with what it knew.
    pub cut_off: bool,
    /// Until the other hosts refuse this one. Control renews it each month.
    pub certificate_days_left: u64,
    pub members: usize,
    pub logs: Vec<LogStatus>,
    /// Of scopes that another host holds, too.
    pub compared: Vec<ComparedStatus>,
    pub gossip: GossipCounts,
    pub transport: TransportCounts,
}

/// Since the start of this process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct GossipCounts {
    pub malformed: u64,
    pub unknown_kinds: u64,
    pub bad_certificates: u64,
    pub bad_signatures: u64,
    pub bad_rows: u64,
    pub too_big: u64,
    pub unread_rows: u64,
    pub dropped_pushes: u64,
    pub dropped_held: u64,
    pub dropped_stages: u64,
    /// Facts that could not be read, and entries of desired state.
    pub unreadable_facts: u64,
    /// Facts in which a host speaks of another.
    pub foreign_facts: u64,
    /// Facts that were older than the view's.
    pub old_facts: u64,
}

impl GossipCounts {
    pub(crate) fn take(&mut self, counters: Counters) {
        *self = Self {
            malformed: counters.malformed,
            unknown_kinds: counters.unknown_kinds,
            bad_certificates: counters.bad_certificates,
            bad_signatures: counters.bad_signatures,
            bad_rows: counters.bad_rows,
            too_big: counters.too_big,
            unread_rows: counters.unread_rows,
            dropped_pushes: counters.dropped_pushes,
            dropped_held: counters.dropped_held,
            dropped_stages: counters.dropped_stages,
            ..*self
        };
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct TransportCounts {
    pub links: u64,
    pub dials: u64,
    pub dials_failed: u64,
    pub accepted: u64,
    pub refused: u64,
    pub joiners: u64,
    pub dropped_out: u64,
    pub dropped_in: u64,
}

/// In Prometheus' text format.
pub(crate) fn render(status: &ClusterStatus, out: &mut String) {
    let mut one = |name: &str, kind: &str, help: &str, value: u64| {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "# HELP dunlin_cluster_{name} {help}\n# TYPE dunlin_cluster_{name} {kind}\ndunlin_cluster_{name} {value}");
    };
    one("members", "gauge", "Other hosts that answer.", status.members as u64);
    one("speaks", "gauge", "Whether this host publishes.", u64::from(status.speaks));
    one("silenced", "gauge", "Whether another process has this host's identity.", u64::from(status.silenced.is_some()));
    one("certificate_days_left", "gauge", "Until the other hosts refuse this one's certificate.", status.certificate_days_left);
    one("links", "gauge", "Connections to other hosts.", status.transport.links);
    render_logs(&status.logs, out);
    render_origins(&status.logs, out);
    render_compared(&status.compared, out);
    let (gossip, transport) = (&status.gossip, &status.transport);
    let refused = [
        ("malformed", gossip.malformed),
        ("unknown_kind", gossip.unknown_kinds),
        ("bad_certificate", gossip.bad_certificates),
        ("bad_signature", gossip.bad_signatures),
        ("bad_rows", gossip.bad_rows),
        ("too_big", gossip.too_big),
        ("unread_row", gossip.unread_rows),
        ("unreadable_fact", gossip.unreadable_facts),
        ("foreign_fact", gossip.foreign_facts),
        ("old_fact", gossip.old_facts),
    ];
    many(out, ("refused_total", "counter"), "What others said that was not taken.", "why", &refused);
    let dropped = [
        ("pushes", gossip.dropped_pushes),
        ("held", gossip.dropped_held),
        ("stages", gossip.dropped_stages),
        ("sent", transport.dropped_out),
        ("received", transport.dropped_in),
    ];
    many(out, ("dropped_total", "counter"), "What a full queue or a lost connection has dropped.", "what", &dropped);
    let connections = [
        ("dialed", transport.dials),
        ("dial_failed", transport.dials_failed),
        ("accepted", transport.accepted),
        ("refused", transport.refused),
        ("joiner", transport.joiners),
    ];
    many(out, ("connections_total", "counter"), "Connections, by how they came about.", "how", &connections);
}

/// Of each scope apart: what is of all hosts, of the region, and of other regions because it is used here.
fn render_logs(logs: &[LogStatus], out: &mut String) {
    type Measure = fn(&[&LogStatus]) -> u64;
    let measures: [(&str, &str, Measure); 7] = [
        ("logs", "Writers whose logs are held.", |logs| logs.len() as u64),
        ("rows", "Rows of all logs.", |logs| logs.iter().map(|log| log.rows as u64).sum()),
        ("log_bytes", "Memory of all logs.", |logs| logs.iter().map(|log| log.bytes as u64).sum()),
        ("quarantined", "Logs whose key is in two hands.", |logs| logs.iter().filter(|log| log.quarantined).count() as u64),
        ("lagging", "Logs that are known to be behind.", |logs| logs.iter().filter(|log| log.lag > 0).count() as u64),
        ("oldest_age_ms", "Since the log that was heard longest ago was heard.", |logs| logs.iter().filter_map(|log| log.age_ms).max().unwrap_or(0)),
        ("unheard", "Logs from disk or from others of which nothing live was heard.", |logs| logs.iter().filter(|log| log.age_ms.is_none()).count() as u64),
    ];
    for (name, help, measure) in measures {
        let of_scope = |scope| measure(&logs.iter().filter(|log| log.scope == scope).collect::<Vec<_>>());
        let values = LogScope::ALL.map(|scope| (scope.label(), of_scope(scope)));
        many(out, (name, "gauge"), help, "scope", &values);
    }
}

/// Each log by its name. Desired state is never left out, then the own region's come first: nobody far away looks after those.
fn render_origins(logs: &[LogStatus], out: &mut String) {
    let mut told: Vec<&LogStatus> = logs.iter().collect();
    let rank = |scope| match scope {
        LogScope::Region => 0,
        LogScope::Global => 1,
        LogScope::Subscribed => 2,
    };
    told.sort_by_key(|log| (log.name != CONFIG_LOG, rank(log.scope))); // and otherwise as they are, so that it is the same ones each time
    let left_out = told.len().saturating_sub(MAX_ORIGINS);
    told.truncate(MAX_ORIGINS);
    let label = |log: &&LogStatus| escaped(&log.name);
    let ages = told.iter().filter_map(|log| Some((label(log), seconds(log.age_ms?))));
    let lags = told.iter().map(|log| (label(log), log.lag));
    labelled(out, ("origin_age_seconds", "gauge"), "Since a log was heard; those of which nothing live was heard have none.", "origin", ages);
    labelled(out, ("origin_lag", "gauge"), "By how many sequences a head that its writer signed is ahead of what is held.", "origin", lags);
    let _ = writeln!( // a string takes all
        out,
        "# HELP dunlin_cluster_origins_left_out Logs without metrics of their own, beyond {MAX_ORIGINS}.\n\
         # TYPE dunlin_cluster_origins_left_out gauge\ndunlin_cluster_origins_left_out {left_out}"
    );
}

fn render_compared(compared: &[ComparedStatus], out: &mut String) {
    let of = |value: fn(&ComparedStatus) -> usize| compared.iter().map(move |of| (of.scope.label(), value(of)));
    labelled(out, ("peers_equal", "gauge"), "Others, of those compared with in the last minute, that had the same.", "scope", of(|of| of.equal));
    let help = "Others, of those compared with in the last minute, that had something else: news are on their way, or one stays behind.";
    labelled(out, ("peers_differ", "gauge"), help, "scope", of(|of| of.differ));
    let ages = compared.iter().map(|of| (of.scope.label(), seconds(of.age_ms)));
    labelled(out, ("equal_age_seconds", "gauge"), "Since any other was last found to have the same, or since the start.", "scope", ages);
}

fn seconds(ms: u64) -> String {
    format!("{}.{:03}", ms / 1000, ms % 1000)
}

/// As Prometheus wants what stands in quotes.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn labelled<L: Display, V: Display>(out: &mut String, (name, kind): (&str, &str), help: &str, label: &str, values: impl Iterator<Item = (L, V)>) {
    let _ = writeln!(out, "# HELP dunlin_cluster_{name} {help}\n# TYPE dunlin_cluster_{name} {kind}"); // a string takes all
    for (of, value) in values {
        let _ = writeln!(out, "dunlin_cluster_{name}{{{label}=\"{of}\"}} {value}"); // likewise
    }
}

fn many(out: &mut String, metric: (&str, &str), help: &str, label: &str, values: &[(&str, u64)]) {
    labelled(out, metric, help, label, values.iter().copied());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(name: &str, scope: LogScope, age_ms: Option<u64>, lag: u64) -> LogStatus {
        LogStatus { name: name.into(), scope, region: None, epoch: 1, seq: 1, age_ms, lag, behind_ms: 0, rows: 0, bytes: 0, quarantined: false }
    }

    fn rendered(logs: Vec<LogStatus>, compared: Vec<ComparedStatus>) -> String {
        let mut out = String::new();
        render(&ClusterStatus { logs, compared, ..ClusterStatus::default() }, &mut out);
        out
    }

    #[test]
    fn each_origin_has_its_age_and_its_lag() {
        let logs = vec![log("host/h1", LogScope::Global, Some(1_203), 0), log("machines/h1", LogScope::Region, None, 7), log("a\\b\"c", LogScope::Global, Some(9), 0)];
        let compared = vec![ComparedStatus { scope: LogScope::Global, equal: 3, differ: 1, age_ms: 60_010 }];
        let text = rendered(logs, compared);
        let lines: Vec<&str> = text.lines().collect();
        for line in [
            "# TYPE dunlin_cluster_origin_age_seconds gauge",
            "dunlin_cluster_origin_age_seconds{origin=\"host/h1\"} 1.203",
            "dunlin_cluster_origin_age_seconds{origin=\"a\\\\b\\\"c\"} 0.009",
            "dunlin_cluster_origin_lag{origin=\"host/h1\"} 0",
            "dunlin_cluster_origin_lag{origin=\"machines/h1\"} 7",
            "dunlin_cluster_origins_left_out 0",
            "dunlin_cluster_peers_equal{scope=\"global\"} 3",
            "dunlin_cluster_peers_differ{scope=\"global\"} 1",
            "dunlin_cluster_equal_age_seconds{scope=\"global\"} 60.010",
        ] {
            assert!(lines.contains(&line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("age_seconds{origin=\"machines/h1\"}"), "nobody heard it: {text}");
        // Every metric is introduced once, before its first value.
        let mut known = std::collections::BTreeSet::new();
        for line in lines {
            match line.strip_prefix("# TYPE ") {
                Some(of) => assert!(known.insert(of.split(' ').next().unwrap()), "{line} comes twice"),
                None if line.starts_with('#') => {}
                None => assert!(known.contains(line.split(['{', ' ']).next().unwrap()), "{line} has no type"),
            }
        }
    }

    #[test]
    fn origins_beyond_the_bound_are_counted_and_desired_state_is_none_of_them() {
        let mut logs: Vec<LogStatus> = (0..5_000).map(|n| log(&format!("host/h{n}"), LogScope::Global, Some(0), 0)).collect();
        logs.push(log("machines/far", LogScope::Subscribed, Some(0), 0));
        logs.push(log("machines/near", LogScope::Region, Some(0), 0));
        logs.push(log(CONFIG_LOG, LogScope::Global, Some(0), 0));
        let text = rendered(logs, vec![]);
        let count = |name: &str| text.lines().filter(|line| line.starts_with(&format!("dunlin_cluster_{name}{{"))).count();
        assert_eq!((count("origin_age_seconds"), count("origin_lag")), (MAX_ORIGINS, MAX_ORIGINS));
        let left_out = 5_003 - MAX_ORIGINS;
        assert!(text.contains(&format!("\ndunlin_cluster_origins_left_out {left_out}\n")), "{left_out}");
        for (name, is_there) in [("config/0", true), ("machines/near", true), ("host/h0", true), ("host/h4999", false), ("machines/far", false)] {
            assert_eq!(text.contains(&format!("origin_lag{{origin=\"{name}\"}}")), is_there, "{name}");
        }
    }
}
