//! Counters of the edge as Prometheus text.

use crate::routes::Routes;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

/// Upper bounds in microseconds.
const BUCKETS_US: [u64; 12] =
    [500, 1_000, 2_500, 5_000, 10_000, 25_000, 100_000, 250_000, 1_000_000, 2_500_000, 10_000_000, 60_000_000];

/// What one core counts. Only that core writes, so a plain store is enough, and no cache line is fought over.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct Counters {
    pub accepted: AtomicU64,
    pub refused: AtomicU64,
    pub handshake_failures: AtomicU64,
    pub requests: AtomicU64,
    pub retries: AtomicU64,
    pub wakes: AtomicU64,
    pub bytes_in: AtomicU64,
    pub bytes_out: AtomicU64,
    pub upstream_connects: AtomicU64,
    pub upstream_reused: AtomicU64,
    pub hop_sent: AtomicU64,
    pub hop_served: AtomicU64,
    pub hop_denied: AtomicU64,
    pub hop_rerouted: AtomicU64,
    pub stale: AtomicU64,
    pub request_seconds: Histogram,
    pub head_seconds: Histogram,
}

/// Counts one more. For counters of this core only.
pub(crate) fn count(counter: &AtomicU64) {
    add(counter, 1);
}

pub(crate) fn add(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(more), Relaxed);
}

#[derive(Default)]
pub(crate) struct Histogram {
    buckets: [AtomicU64; BUCKETS_US.len()],
    count: AtomicU64,
    sum_us: AtomicU64,
}

impl Histogram {
    pub fn observe(&self, took: Duration) {
        let us = took.as_micros().min(u128::from(u64::MAX)) as u64;
        if let Some(i) = BUCKETS_US.iter().position(|bound| us <= *bound) {
            count(&self.buckets[i]);
        }
        count(&self.count);
        add(&self.sum_us, us);
    }
}

/// What the edge counted since it started, over all cores.
pub struct ProxyMetrics {
    routes: Arc<Routes>,
    cores: Vec<Arc<Counters>>,
    // These are limits or levels of the whole edge.
    pub(crate) connections: AtomicUsize,
    /// At the places that are other edges' only.
    pub(crate) hop_connections: AtomicUsize,
    pub(crate) waiting: AtomicU32,
    pub(crate) tunnels: AtomicUsize,
    pub(crate) log_lines_lost: Arc<AtomicU64>,
}

impl ProxyMetrics {
    pub(crate) fn new(routes: Arc<Routes>, cores: usize) -> Self {
        Self {
            routes,
            cores: (0..cores).map(|_| Arc::default()).collect(),
            connections: AtomicUsize::default(),
            hop_connections: AtomicUsize::default(),
            waiting: AtomicU32::default(),
            tunnels: AtomicUsize::default(),
            log_lines_lost: Arc::default(),
        }
    }

    pub(crate) fn core(&self, n: usize) -> Arc<Counters> {
        self.cores[n].clone()
    }

    /// Open connections of clients and of other edges.
    pub fn open_connections(&self) -> usize {
        self.connections.load(Relaxed) + self.hop_connections.load(Relaxed)
    }

    /// All answers of the apps that it serves now, and those of them that failed: cut off, or 5xx.
    pub fn answers(&self) -> (u64, u64) {
        let table = self.routes.load();
        let mut seen = BTreeSet::new();
        let loads = table.routes().filter(|(_, route)| seen.insert(&route.app)).map(|(_, route)| &route.load.answers);
        loads.fold((0, 0), |(all, failed), answers| {
            let of = |class: usize| answers.get(class).map_or(0, |count| count.load(Relaxed));
            (all + answers.iter().map(|count| count.load(Relaxed)).sum::<u64>(), failed + of(0) + of(5))
        })
    }

    fn sum(&self, of: impl Fn(&Counters) -> &AtomicU64) -> u64 {
        self.cores.iter().map(|core| of(core).load(Relaxed)).sum()
    }

    /// Appends Prometheus text.
    pub fn render(&self, out: &mut String) {
        for (name, kind, help, value) in [
            ("connections", "gauge", "open connections of clients and of other edges", self.open_connections() as u64),
            ("connections_total", "counter", "accepted client connections", self.sum(|c| &c.accepted)),
            ("connections_refused_total", "counter", "connections above the limit", self.sum(|c| &c.refused)),
            ("tls_failures_total", "counter", "failed TLS handshakes", self.sum(|c| &c.handshake_failures)),
            ("requests_total", "counter", "requests taken", self.sum(|c| &c.requests)),
            ("retries_total", "counter", "requests sent again", self.sum(|c| &c.retries)),
            ("wakes_total", "counter", "requests that started a machine", self.sum(|c| &c.wakes)),
            ("waiting", "gauge", "requests that wait for a machine", u64::from(self.waiting.load(Relaxed))),
            ("tunnels", "gauge", "upgraded connections", self.tunnels.load(Relaxed) as u64),
            ("received_bytes_total", "counter", "request body bytes", self.sum(|c| &c.bytes_in)),
            ("sent_bytes_total", "counter", "answer body bytes", self.sum(|c| &c.bytes_out)),
            ("upstream_connects_total", "counter", "connections made to machines", self.sum(|c| &c.upstream_connects)),
            ("upstream_reused_total", "counter", "requests over kept connections", self.sum(|c| &c.upstream_reused)),
            ("hop_sent_total", "counter", "requests sent to machines by way of their hosts", self.sum(|c| &c.hop_sent)),
            ("hop_served_total", "counter", "requests taken from other edges", self.sum(|c| &c.hop_served)),
            ("hop_denied_total", "counter", "requests of other edges that this host answered itself", self.sum(|c| &c.hop_denied)),
            ("hop_rerouted_total", "counter", "requests of edges that know too little, for which this edge has chosen a machine", self.sum(|c| &c.hop_rerouted)),
            ("cut_off", "gauge", "whether this edge hears nothing of most other hosts", u64::from(self.routes.load().is_cut_off)),
            ("stale_total", "counter", "answers of machines on hosts that are not heard of", self.sum(|c| &c.stale)),
            ("log_lines_lost_total", "counter", "lines that the access log did not take", self.log_lines_lost.load(Relaxed)),
        ] {
            line(out, format_args!("# HELP dunlin_proxy_{name} {help}\n# TYPE dunlin_proxy_{name} {kind}"));
            line(out, format_args!("dunlin_proxy_{name} {value}"));
        }
        self.render_histogram(out, "dunlin_proxy_request_seconds", |core| &core.request_seconds);
        self.render_histogram(out, "dunlin_proxy_head_seconds", |core| &core.head_seconds);
        self.render_apps(out);
    }

    fn render_histogram(&self, out: &mut String, name: &str, of: fn(&Counters) -> &Histogram) {
        line(out, format_args!("# TYPE {name} histogram"));
        let mut below = 0;
        for (i, bound) in BUCKETS_US.iter().enumerate() {
            below += self.sum(|core| &of(core).buckets[i]);
            line(out, format_args!("{name}_bucket{{le=\"{}\"}} {below}", *bound as f64 / 1e6));
        }
        let count = self.sum(|core| &of(core).count);
        line(out, format_args!("{name}_bucket{{le=\"+Inf\"}} {count}"));
        line(out, format_args!("{name}_sum {}", self.sum(|core| &of(core).sum_us) as f64 / 1e6));
        line(out, format_args!("{name}_count {count}"));
    }

    fn render_apps(&self, out: &mut String) {
        line(out, format_args!("# HELP dunlin_proxy_answers_total answers by app and class of status"));
        line(out, format_args!("# TYPE dunlin_proxy_answers_total counter"));
        let table = self.routes.load();
        let mut seen = BTreeSet::new();
        for (_, route) in table.routes() {
            if !seen.insert(&route.app) {
                continue;
            }
            for (class, count) in route.load.answers.iter().enumerate() {
                let (app, count) = (&route.app, count.load(Relaxed));
                let class = if class == 0 { "cut".to_owned() } else { format!("{class}xx") };
                line(out, format_args!("dunlin_proxy_answers_total{{app=\"{app}\",status=\"{class}\"}} {count}"));
            }
        }
    }
}

fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = writeln!(out, "{text}");
}
