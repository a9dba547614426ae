//! The rules of [`parse`](super::parse), for a config that did not come from a file: what a client sends is a client's
//! word only.

use super::parse::{MAX_RETRIES, reserved_prefix};
use super::problem::MAX_REPORTED;
use super::procfile::valid_group;
use super::section::value::MAX_TEXT;
use super::service::{
    CHECK_NAME_RULE, MAX_LIMIT, MAX_MIN_RUNNING, METHODS, SHORTEST_CHECK_MS, is_check_name, is_header_name,
    is_header_value, is_path,
};
use super::units::{CPUS, MAX_DURATION_MS, MAX_SWAP_MB, MEMORY_MB};
use super::{AppConfig, GuestSize, HttpService, KILL_SIGNALS, MAX_ENTRIES, MAX_KILL_TIMEOUT_MS, ServiceCheck, words};
use crate::machine::{CheckKind, MAX_SCRIPT_CHECKS, is_script, is_server_name};
use crate::volume::{
    AutoExtend,
    SIZE_MAX_GB, SIZE_MIN_GB, SNAPSHOT_RETENTION, VOLUME_NAME_RULE, is_volume_name, mount_path,
};

/// A config that no release may have. Its text has all that is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .mistakes.join("; "))]
pub struct InvalidConfig {
    /// Never empty; each names its key.
    pub mistakes: Vec<String>,
}

impl AppConfig {
    /// Whether a release may have it. All that [`parse`](super::parse) reads without a stopping problem is valid.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        let mut findings = Findings { config: self, mistakes: vec![] };
        findings.app();
        findings.processes();
        findings.services();
        findings.checks();
        findings.sizes();
        findings.mounts();
        let of_files = super::file::invalid(self);
        of_files.into_iter().for_each(|mistake| findings.need(false, || mistake));
        for (nth, entry) in self.files.iter().take(MAX_ENTRIES).enumerate() {
            findings.groups(&format!("files[{nth}].processes"), &entry.processes);
        }
        if findings.mistakes.is_empty() { Ok(()) } else { Err(InvalidConfig { mistakes: findings.mistakes }) }
    }
}

struct Findings<'c> {
    config: &'c AppConfig,
    mistakes: Vec<String>,
}

impl Findings<'_> {
    fn need(&mut self, holds: bool, mistake: impl FnOnce() -> String) {
        if !holds && self.mistakes.len() < MAX_REPORTED {
            self.mistakes.push(mistake());
        }
    }

    fn few(&mut self, key: &str, count: usize) {
        self.need(count <= MAX_ENTRIES, || format!("{key} has more than {MAX_ENTRIES} entries"));
    }

    fn app(&mut self) {
        let config = self.config;
        if let Some(signal) = &config.kill_signal {
            self.need(KILL_SIGNALS.contains(&signal.as_str()), || {
                format!("kill_signal must be one of {}", KILL_SIGNALS.join(", "))
            });
        }
        self.need(config.kill_timeout_ms.unwrap_or(0) <= MAX_KILL_TIMEOUT_MS, || {
            format!("kill_timeout is more than {MAX_KILL_TIMEOUT_MS} ms")
        });
        self.need((1..=MAX_DURATION_MS).contains(&config.deploy.wait_timeout_ms), || {
            format!("deploy.wait_timeout must be between 1 and {MAX_DURATION_MS} ms")
        });
        self.need(config.swap_size_mb.unwrap_or(0) <= MAX_SWAP_MB, || {
            format!("swap_size_mb is more than {MAX_SWAP_MB}")
        });
        if let Some(command) = &config.console_command {
            self.need(is_text(command) && words::split(command).is_ok(), || "console_command is not a command".to_owned());
        }
        self.few("env", config.env.len());
        for (name, value) in &config.env {
            self.need(!name.is_empty() && !name.contains(['=', '\0']) && name.len() <= MAX_TEXT, || {
                format!("env: {:?} cannot be the name of an environment variable", short(name))
            });
            self.need(reserved_prefix(name).is_none(), || format!("env.{}: names of that kind are set by the platform", short(name)));
            self.need(is_text(value), || format!("env.{}: {TEXT_RULE}", short(name)));
        }
    }

    fn processes(&mut self) {
        self.few("processes", self.config.processes.len());
        for (group, command) in &self.config.processes {
            self.need(valid_group(group), || {
                format!("processes: {:?} cannot be the name of a process group", short(group))
            });
            self.need(is_text(command), || format!("processes.{}: {TEXT_RULE}", short(group)));
            // An empty command is the image's own.
            if !command.trim().is_empty()
                && let Err(error) = words::split(command)
            {
                self.need(false, || format!("processes.{}: not a command: {error}", short(group)));
            }
        }
    }

    fn groups(&mut self, key: &str, groups: &[String]) {
        self.few(key, groups.len());
        let known = self.config.process_groups();
        for group in groups {
            self.need(known.contains(&group.as_str()), || {
                format!("{key} names the process group {:?}, which does not exist", short(group))
            });
        }
    }

    fn services(&mut self) {
        let all: Vec<&HttpService> = self.config.http_service.iter().chain(&self.config.services).collect();
        self.need(all.len() <= 1, || "ports 80 and 443 can lead to one service only".into());
        for service in all.into_iter().take(1) {
            let limits = &service.concurrency;
            self.need(service.internal_port != 0, || "http_service.internal_port is 0".into());
            self.need(service.min_machines_running <= MAX_MIN_RUNNING, || {
                format!("http_service.min_machines_running is more than {MAX_MIN_RUNNING}")
            });
            let most = limits.hard_limit.unwrap_or(MAX_LIMIT);
            self.need((1..=MAX_LIMIT).contains(&most) && (1..=most).contains(&limits.soft_limit), || {
                format!("http_service.concurrency: limits are between 1 and {MAX_LIMIT}, soft_limit not above hard_limit")
            });
            self.groups("http_service.processes", &service.processes);
            self.few("http_service.checks", service.checks.len());
            for (nth, check) in service.checks.iter().take(MAX_ENTRIES).enumerate() {
                self.check(&format!("http_service.checks[{nth}]"), check);
            }
        }
    }

    fn checks(&mut self) {
        self.few("checks", self.config.checks.len());
        let scripts = self.config.checks.values().filter(|named| matches!(named.check.kind, CheckKind::Script { .. }));
        let scripts = scripts.count();
        self.need(scripts <= MAX_SCRIPT_CHECKS, || format!("checks: at most {MAX_SCRIPT_CHECKS} checks are scripts"));
        for (name, named) in self.config.checks.iter().take(MAX_ENTRIES) {
            self.need(is_check_name(name), || format!("checks: {:?}: {CHECK_NAME_RULE}", short(name)));
            let key = format!("checks.{}", short(name));
            let is_script = matches!(named.check.kind, CheckKind::Script { .. });
            self.need((named.port == 0) == is_script, || format!("{key}: all checks but scripts have a port"));
            self.groups(&format!("{key}.processes"), &named.processes);
            self.check(&key, &named.check);
        }
    }

    fn check(&mut self, key: &str, check: &ServiceCheck) {
        let times = SHORTEST_CHECK_MS..=MAX_DURATION_MS;
        let in_time = times.contains(&check.interval_ms) && times.contains(&check.timeout_ms);
        self.need(in_time && check.grace_period_ms <= MAX_DURATION_MS, || {
            format!("{key}: interval and timeout are between {SHORTEST_CHECK_MS} and {MAX_DURATION_MS} ms")
        });
        if let CheckKind::Script { command } = &check.kind {
            self.need(is_script(command), || format!("{key}.command is nothing that can be run"));
        }
        let CheckKind::Http { method, path, headers, tls_server_name, .. } = &check.kind else { return };
        self.need(METHODS.contains(&method.as_str()), || format!("{key}.method must be one of {}", METHODS.join(", ")));
        self.need(is_path(path), || format!("{key}.path must begin with / and be printable"));
        self.need(tls_server_name.as_deref().is_none_or(is_server_name), || {
            format!("{key}.tls_server_name is no name of a server")
        });
        self.few(&format!("{key}.headers"), headers.len());
        let is_fine = |(name, value): (&String, &String)| is_header_name(name) && is_header_value(value) && is_text(value);
        self.need(headers.iter().all(is_fine), || format!("{key}.headers has one that cannot be sent"));
    }

    fn mounts(&mut self) {
        let config = self.config;
        self.few("mounts", config.mounts.len());
        for (nth, mount) in config.mounts.iter().take(MAX_ENTRIES).enumerate() {
            self.need(is_volume_name(&mount.source), || format!("mounts[{nth}].source: {VOLUME_NAME_RULE}"));
            if let Err(why) = mount_path(&mount.destination) {
                self.need(false, || format!("mounts[{nth}].destination: {why}"));
            }
            self.need(mount.initial_size_gb.is_none_or(|gb| (SIZE_MIN_GB..=SIZE_MAX_GB).contains(&gb)), || {
                format!("mounts[{nth}].initial_size must be between {SIZE_MIN_GB} and {SIZE_MAX_GB} GB")
            });
            self.need(mount.snapshot_retention.is_none_or(|days| SNAPSHOT_RETENTION.contains(&days)), || {
                format!("mounts[{nth}].snapshot_retention must be between 1 and 60 days")
            });
            if let Some(extend) = mount.extend {
                let read = AutoExtend::read(Some(extend.percent), Some(extend.add_gb), Some(extend.limit_gb));
                self.need(read == Ok(Some(extend)), || {
                    format!("mounts[{nth}].extend must have a percentage from 50 to 99, and sizes from {SIZE_MIN_GB} to {SIZE_MAX_GB} GB")
                });
            }
            self.groups(&format!("mounts[{nth}].processes"), &mount.processes);
        }
        for group in config.process_groups() {
            let of_group = config.mounts.iter().take(MAX_ENTRIES).filter(|mount| config.belongs(&mount.processes, group));
            self.need(of_group.count() <= 1, || format!("mounts: the machines of {group} can have one volume each"));
        }
    }

    fn sizes(&mut self) {
        self.few("vm", self.config.vm.len());
        for (nth, vm) in self.config.vm.iter().take(MAX_ENTRIES).enumerate() {
            self.need(vm.size.as_deref().is_none_or(|size| GuestSize::named(size).is_some()), || {
                format!("vm[{nth}].size is not a known one")
            });
            self.need(vm.memory_mb.is_none_or(|mb| MEMORY_MB.contains(&mb)), || {
                format!("vm[{nth}].memory must be between {} and {} MB", MEMORY_MB.start(), MEMORY_MB.end())
            });
            self.need(vm.cpus.is_none_or(|cpus| CPUS.contains(&cpus)), || {
                format!("vm[{nth}].cpus must be between {} and {}", CPUS.start(), CPUS.end())
            });
            self.groups(&format!("vm[{nth}].processes"), &vm.processes);
        }
        self.few("restart", self.config.restart.len());
        for (nth, restart) in self.config.restart.iter().take(MAX_ENTRIES).enumerate() {
            self.need(restart.retries.is_none_or(|retries| retries <= MAX_RETRIES), || {
                format!("restart[{nth}].retries is more than {MAX_RETRIES}")
            });
            self.groups(&format!("restart[{nth}].processes"), &restart.processes);
        }
    }
}

const TEXT_RULE: &str = "text must be without NUL and not longer than an environment takes";

fn is_text(text: &str) -> bool {
    !text.contains('\0') && text.len() <= MAX_TEXT
}

/// A client's text in a message.
fn short(text: &str) -> String {
    text.chars().take(60).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Concurrency;
    use std::collections::BTreeMap;

    fn check(change: impl FnOnce(&mut AppConfig), expected: &str) {
        let mut config = AppConfig::default_for("web".parse().unwrap(), 8080, 256);
        config.validate().unwrap();
        change(&mut config);
        let said = config.validate().expect_err(expected).to_string();
        assert!(said.contains(expected), "{said}");
    }

    #[test]
    fn what_no_file_can_hold_is_refused() {
        check(|c| c.processes = BTreeMap::from([("app".into(), "run 'it".into())]), "processes.app: not a command: a quote is not closed");
        check(|c| c.processes = BTreeMap::from([("a/b".into(), "run".into())]), "cannot be the name of a process group");
        check(|c| c.deploy.wait_timeout_ms = 0, "deploy.wait_timeout must be between 1");
        check(|c| c.kill_signal = Some("SIGFOO".into()), "kill_signal must be one of");
        check(|c| c.kill_timeout_ms = Some(600_000), "kill_timeout is more than");
        check(|c| c.env = BTreeMap::from([("FLY_X".into(), String::new())]), "set by the platform");
        check(|c| c.env = BTreeMap::from([("A=B".into(), String::new())]), "cannot be the name of an environment variable");
        check(|c| c.env = BTreeMap::from([("A".into(), "a\0b".into())]), "without NUL");
        check(|c| c.vm[0].memory_mb = Some(1), "vm[0].memory must be between 32");
        check(|c| c.vm[0].cpus = Some(0), "vm[0].cpus must be between 1");
        check(|c| c.vm[0].size = Some("huge".into()), "vm[0].size is not a known one");
        check(|c| c.services.push(HttpService::default()), "one service only");
        fn service(c: &mut AppConfig) -> &mut HttpService {
            c.http_service.as_mut().unwrap()
        }
        check(|c| service(c).internal_port = 0, "internal_port is 0");
        check(|c| service(c).processes = vec!["web".into()], "http_service.processes names the process group");
        let limits = Concurrency { soft_limit: 5, hard_limit: Some(2), ..Concurrency::default() };
        check(|c| service(c).concurrency = limits, "soft_limit not above hard_limit");
        let http = |path: &str, https| CheckKind::Http {
            method: "GET".into(),
            path: path.into(),
            headers: BTreeMap::new(),
            https,
            tls_server_name: Some("a b".into()),
            tls_skip_verify: false,
        };
        let times = |kind, interval_ms| ServiceCheck { kind, interval_ms, timeout_ms: 1000, grace_period_ms: 0 };
        check(|c| service(c).checks.push(times(http("/ x", false), 1000)), "http_service.checks[0].path must begin with /");
        check(|c| service(c).checks.push(times(http("/", true), 1000)), "tls_server_name is no name of a server");
        check(|c| service(c).checks.push(times(CheckKind::Script { command: vec![] }, 1000)), "command is nothing that can be run");
        check(|c| service(c).checks.push(times(CheckKind::Tcp, 0)), "interval and timeout are between 100");
        let named = super::super::NamedCheck { port: 1, check: times(CheckKind::Tcp, 1000), processes: vec![] };
        for name in ["", "a b", "servicecheck-listens-8080"] {
            check(|c| c.checks = BTreeMap::from([(name.into(), named.clone())]), "a check's name has 1 to 63");
        }
    }
}
