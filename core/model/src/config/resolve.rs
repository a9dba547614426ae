//! From a config to what the machines of one process group are asked to be.

use super::{AppConfig, DEFAULT_GROUP, GuestSize, HttpService, MountConfig, words};
use crate::machine::{Check, CheckKind, Guest, RestartPolicy, Service, StopConfig};

/// Times of the check that a service without checks of its own gets.
const IMPLICIT_INTERVAL_MS: u64 = 5_000;
const IMPLICIT_TIMEOUT_MS: u64 = 2_000;
const IMPLICIT_GRACE_MS: u64 = 10_000;

impl AppConfig {
    /// Names of the process groups, in order; never empty.
    pub fn process_groups(&self) -> Vec<&str> {
        if self.processes.is_empty() { vec![DEFAULT_GROUP] } else { self.processes.keys().map(String::as_str).collect() }
    }

    /// The group that services and checks without `processes` belong to: `app`, or else the first by name.
    pub fn default_group(&self) -> &str {
        let groups = self.process_groups();
        groups.iter().copied().find(|group| *group == DEFAULT_GROUP).unwrap_or(groups[0])
    }

    /// The words of the group's command; `None` = the image's own.
    pub fn command_for(&self, group: &str) -> Option<Vec<String>> {
        words::split(self.processes.get(group)?).ok()
    }

    /// The size of the group's machines: a `[[vm]]` that names the group goes before one for all.
    pub fn guest_for(&self, group: &str) -> Guest {
        let Some(vm) = most_specific(&self.vm, group, |vm| &vm.processes) else { return Guest::default() };
        let base = vm.size.as_deref().and_then(GuestSize::named).map(GuestSize::guest).unwrap_or_default();
        Guest {
            cpu_kind: vm.cpu_kind.unwrap_or(base.cpu_kind),
            cpus: vm.cpus.unwrap_or(base.cpus),
            memory_mb: vm.memory_mb.unwrap_or(base.memory_mb),
        }
    }

    /// When the group's machines are started again.
    pub fn restart_for(&self, group: &str) -> RestartPolicy {
        let default = RestartPolicy::default();
        match most_specific(&self.restart, group, |restart| &restart.processes) {
            Some(restart) => {
                RestartPolicy { policy: restart.policy, max_retries: restart.retries.unwrap_or(default.max_retries) }
            }
            None => default,
        }
    }

    /// The volume of the group's machines.
    pub fn mount_for(&self, group: &str) -> Option<&MountConfig> {
        self.mounts.iter().find(|mount| self.belongs(&mount.processes, group))
    }

    /// How the machines are stopped.
    pub fn stop(&self) -> StopConfig {
        StopConfig {
            signal: self.kill_signal.clone(),
            timeout_ms: self.kill_timeout_ms.unwrap_or(StopConfig::default().timeout_ms),
        }
    }

    /// Services that the edge serves from the group's machines.
    pub fn services_for(&self, group: &str) -> Vec<Service> {
        self.http_services_of(group)
            .map(|service| Service {
                internal_port: service.internal_port,
                force_https: service.force_https,
                autostart: service.auto_start_machines,
                autostop: service.auto_stop_machines,
                min_machines_running: service.min_machines_running,
                max_machines_running: service.max_machines_running,
                concurrency: service.concurrency.clone(),
            })
            .collect()
    }

    /// Checks of the group's machines. A service without checks gets a TCP check on its port, so that
    /// neither the edge nor a deploy takes a machine for healthy before its app listens.
    pub fn checks_for(&self, group: &str) -> Vec<Check> {
        let mut checks = Vec::new();
        for service in self.http_services_of(group) {
            let port = service.internal_port;
            for (i, check) in service.checks.iter().enumerate() {
                let kind = check.kind.as_str();
                checks.push(Check {
                    name: format!("servicecheck-{i:02}-{kind}-{port}"),
                    port,
                    kind: check.kind.clone(),
                    interval_ms: check.interval_ms,
                    timeout_ms: check.timeout_ms,
                    grace_period_ms: check.grace_period_ms,
                    gates_routing: true,
                });
            }
            if service.checks.is_empty() {
                checks.push(Check {
                    name: format!("servicecheck-listens-{port}"),
                    port,
                    kind: CheckKind::Tcp,
                    interval_ms: IMPLICIT_INTERVAL_MS,
                    timeout_ms: IMPLICIT_TIMEOUT_MS,
                    grace_period_ms: IMPLICIT_GRACE_MS,
                    gates_routing: true,
                });
            }
        }
        for (name, named) in &self.checks {
            if self.belongs(&named.processes, group) {
                checks.push(Check {
                    name: name.clone(),
                    port: named.port,
                    kind: named.check.kind.clone(),
                    interval_ms: named.check.interval_ms,
                    timeout_ms: named.check.timeout_ms,
                    grace_period_ms: named.check.grace_period_ms,
                    gates_routing: false,
                });
            }
        }
        checks
    }

    fn http_services_of<'a>(&'a self, group: &'a str) -> impl Iterator<Item = &'a HttpService> {
        let all = self.http_service.iter().chain(&self.services);
        all.filter(move |service| self.belongs(&service.processes, group))
    }

    pub(super) fn belongs(&self, processes: &[String], group: &str) -> bool {
        if processes.is_empty() { group == self.default_group() } else { processes.iter().any(|name| name == group) }
    }
}

/// The first entry that names the group, else the first that names none.
fn most_specific<'a, T>(all: &'a [T], group: &str, processes: impl Fn(&T) -> &Vec<String>) -> Option<&'a T> {
    let named = all.iter().find(|entry| processes(entry).iter().any(|name| name == group));
    named.or_else(|| all.iter().find(|entry| processes(entry).is_empty()))
}
