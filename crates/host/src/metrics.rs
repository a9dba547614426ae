//! Prometheus text of the host.

use crate::Host;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::Ordering;

impl Host {
    /// Appends this host's metrics.
    pub fn render_metrics(&self, out: &mut String) {
        let snapshot = self.shared.view.current();
        let id = &self.shared.config.id;
        let mut states: BTreeMap<&str, u64> = BTreeMap::new();
        let mut restarts = 0;
        for fact in snapshot.machines.values().filter(|fact| fact.host == *id) {
            *states.entry(fact.state.as_str()).or_default() += 1;
            restarts += u64::from(fact.restarts);
        }
        out.push_str("# HELP dunlin_host_machines Machines of this host by state.\n# TYPE dunlin_host_machines gauge\n");
        for (state, count) in states {
            let _ = writeln!(out, "dunlin_host_machines{{host=\"{id}\",state=\"{state}\"}} {count}");
        }
        let mut one = |name: &str, kind: &str, help: &str, value: u64| {
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name}{{host=\"{id}\"}} {value}");
        };
        one("dunlin_host_machine_restarts", "gauge", "Failed attempts since machines last ran well.", restarts);
        let writes = self.shared.journal_writes.load(Ordering::Relaxed);
        one("dunlin_host_journal_writes_total", "counter", "Durable writes of the journal.", writes);
        let us = self.shared.journal_us.load(Ordering::Relaxed);
        one("dunlin_host_journal_write_microseconds_total", "counter", "Time that they took, fsync included.", us);
        let waiting = self.shared.tombstones_waiting.load(Ordering::Relaxed) as u64;
        one("dunlin_host_tombstones_waiting", "gauge", "Machines that an operator has to let be destroyed.", waiting);
        if let Some(fact) = snapshot.hosts.get(id) {
            one("dunlin_host_memory_mb", "gauge", "Memory that machines may reserve.", fact.memory_mb.into());
            let reserved = fact.memory_reserved_mb.into();
            one("dunlin_host_memory_reserved_mb", "gauge", "Memory that machines have reserved.", reserved);
        }
    }
}
