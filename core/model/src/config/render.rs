//! Writing a configuration file that people read.

use super::{AppConfig, Build, Deploy, HttpService, ServiceCheck, Strategy, units};
use crate::machine::{CheckKind, ConcurrencyKind, CpuKind, RestartWhen};
use std::collections::BTreeMap;
use std::fmt::Write;
use toml_edit::{Key, Value};

/// The text of a `dunlin.toml`; [`super::parse`] reads the same config back from it.
pub fn render(config: &AppConfig) -> String {
    let mut out = Out(String::new());
    out.comment("How this app is built, run and reached. `dunlin config validate` checks this file.");
    out.comment("Keys are those of fly.toml; what is left out has Fly's default.");
    out.blank();
    if let Some(app) = &config.app {
        out.text("app", app.as_str());
    }
    if let Some(region) = &config.primary_region {
        out.text("primary_region", region.as_str());
    }
    if let Some(signal) = &config.kill_signal {
        out.text("kill_signal", signal);
    }
    if let Some(ms) = config.kill_timeout_ms {
        out.text("kill_timeout", &units::format_duration_ms(ms));
    }
    if let Some(mb) = config.swap_size_mb {
        out.raw("swap_size_mb", mb);
    }
    if let Some(command) = &config.console_command {
        out.text("console_command", command);
    }
    render_build(&mut out, &config.build);
    render_deploy(&mut out, &config.deploy);
    if !config.env.is_empty() {
        out.table("env", "Environment of every machine. Passwords and tokens belong into `dunlin secrets set`.");
        out.map(&config.env);
    }
    if !config.processes.is_empty() {
        out.table("processes", "One group of machines for each command; `app` takes the requests unless a service says otherwise.");
        out.map(&config.processes);
    }
    if let Some(service) = &config.http_service {
        out.table("http_service", "What the edge serves as HTTP and HTTPS.");
        out.raw_noted("internal_port", service.internal_port, "the port that the app listens on, on 0.0.0.0");
        out.raw_noted("force_https", service.force_https, "redirect plain HTTP to HTTPS");
        render_service(&mut out, "http_service", service);
        for check in &service.checks {
            render_check(&mut out, "[http_service.checks]", check);
        }
    }
    for service in &config.services {
        render_tcp_service(&mut out, service);
    }
    for (name, named) in &config.checks {
        out.blank();
        out.line(&format!("[checks.{}]", Key::new(name)));
        out.text("type", named.check.kind.as_str());
        match &named.check.kind {
            CheckKind::Script { command } => out.list("command", command),
            _ => out.raw("port", named.port),
        }
        out.list("processes", &named.processes);
        render_check_body(&mut out, &format!("checks.{}", Key::new(name)), &named.check);
    }
    for vm in &config.vm {
        out.table("[vm]", "The size of the machines.");
        out.optional("size", vm.size.as_deref());
        out.optional("memory", vm.memory_mb.map(units::format_size_mb).as_deref());
        if let Some(cpus) = vm.cpus {
            out.raw("cpus", cpus);
        }
        out.optional("cpu_kind", vm.cpu_kind.map(cpu_kind));
        out.list("processes", &vm.processes);
    }
    for restart in &config.restart {
        out.table("[restart]", "When a machine that has exited is started again.");
        let policy = match restart.policy {
            RestartWhen::No => "never",
            RestartWhen::Always => "always",
            RestartWhen::OnFailure => "on-failure",
        };
        out.text("policy", policy);
        if let Some(retries) = restart.retries {
            out.raw("retries", retries);
        }
        out.list("processes", &restart.processes);
    }
    for mount in &config.mounts {
        out.table("[mounts]", "A volume in each machine: files that outlive it.");
        out.text("source", &mount.source);
        out.text("destination", &mount.destination);
        if let Some(gb) = mount.initial_size_gb {
            out.text("initial_size", &format!("{gb}gb"));
        }
        if let Some(days) = mount.snapshot_retention {
            out.raw("snapshot_retention", days);
        }
        if let Some(daily) = mount.scheduled_snapshots {
            out.raw("scheduled_snapshots", daily);
        }
        if let Some(encrypted) = mount.encrypted {
            out.raw("encrypted", encrypted);
        }
        if let Some(extend) = mount.extend {
            out.raw("auto_extend_size_threshold", extend.percent);
            out.text("auto_extend_size_increment", &format!("{}gb", extend.add_gb));
            out.text("auto_extend_size_limit", &format!("{}gb", extend.limit_gb));
        }
        out.list("processes", &mount.processes);
    }
    for file in &config.files {
        out.table("[files]", "A file that machines find when they start.");
        out.text("guest_path", &file.guest_path);
        out.optional("local_path", file.local_path.as_deref());
        out.optional("raw_value", file.raw_value.as_deref());
        out.optional("secret_name", file.secret_name.as_deref());
        out.list("processes", &file.processes);
    }
    out.0
}

fn render_build(out: &mut Out, build: &Build) {
    if *build == Build::default() {
        return;
    }
    out.table("build", "");
    out.optional("dockerfile", build.dockerfile.as_deref());
    out.optional("image", build.image.as_deref());
    out.optional("ignorefile", build.ignorefile.as_deref());
    out.optional("build-target", build.build_target.as_deref());
    if !build.args.is_empty() {
        out.table("build.args", "");
        out.map(&build.args);
    }
}

fn render_deploy(out: &mut Out, deploy: &Deploy) {
    if *deploy == Deploy::default() {
        return;
    }
    out.table("deploy", "");
    let strategy = match deploy.strategy {
        Strategy::Rolling => "rolling",
        Strategy::Immediate => "immediate",
    };
    out.text("strategy", strategy);
    out.text("wait_timeout", &units::format_duration_ms(deploy.wait_timeout_ms));
}

/// All of a service but its port, `force_https` and checks; tables under `path` come last.
fn render_service(out: &mut Out, path: &str, service: &HttpService) {
    out.text("auto_stop_machines", service.auto_stop_machines.as_str());
    out.raw_noted("auto_start_machines", service.auto_start_machines, "a request starts a machine that is stopped");
    out.raw("min_machines_running", service.min_machines_running);
    if let Some(max) = service.max_machines_running {
        out.raw("max_machines_running", max);
    }
    out.list("processes", &service.processes);
    let limits = &service.concurrency;
    if *limits != Default::default() {
        out.blank();
        out.line(&format!("[{path}.concurrency]"));
        let kind = match limits.kind {
            ConcurrencyKind::Connections => "connections",
            ConcurrencyKind::Requests => "requests",
        };
        out.text("type", kind);
        out.raw("soft_limit", limits.soft_limit);
        if let Some(hard) = limits.hard_limit {
            out.raw("hard_limit", hard);
        }
    }
}

fn render_tcp_service(out: &mut Out, service: &HttpService) {
    out.table("[services]", "What the edge serves as HTTP and HTTPS.");
    out.text("protocol", "tcp");
    out.raw("internal_port", service.internal_port);
    render_service(out, "services", service);
    for (port, handlers) in [(80, "[\"http\"]"), (443, "[\"tls\", \"http\"]")] {
        out.blank();
        out.line("[[services.ports]]");
        out.raw("port", port);
        out.raw("handlers", handlers);
        if port == 80 && service.force_https {
            out.raw("force_https", true);
        }
    }
    for (is_tcp, header) in [(true, "[services.tcp_checks]"), (false, "[services.http_checks]")] {
        for check in service.checks.iter().filter(|check| matches!(check.kind, CheckKind::Tcp) == is_tcp) {
            render_check(out, header, check);
        }
    }
}

fn render_check(out: &mut Out, header: &str, check: &ServiceCheck) {
    out.blank();
    out.line(&format!("[{header}]"));
    render_check_body(out, header.trim_matches(['[', ']']), check);
}

fn render_check_body(out: &mut Out, path: &str, check: &ServiceCheck) {
    out.text("interval", &units::format_duration_ms(check.interval_ms));
    out.text("timeout", &units::format_duration_ms(check.timeout_ms));
    out.text("grace_period", &units::format_duration_ms(check.grace_period_ms));
    if let CheckKind::Http { method, path: url_path, headers, https, tls_server_name, tls_skip_verify } = &check.kind {
        out.text("method", method);
        out.text("path", url_path);
        if *https {
            out.text("protocol", "https");
        }
        out.optional("tls_server_name", tls_server_name.as_deref());
        if *tls_skip_verify {
            out.raw("tls_skip_verify", true);
        }
        if !headers.is_empty() {
            out.blank();
            out.line(&format!("[{path}.headers]"));
            out.map(headers);
        }
    }
}

fn cpu_kind(kind: CpuKind) -> &'static str {
    match kind {
        CpuKind::Shared => "shared",
        CpuKind::Performance => "performance",
    }
}

struct Out(String);

impl Out {
    fn line(&mut self, line: &str) {
        self.0.push_str(line);
        self.0.push('\n');
    }

    fn blank(&mut self) {
        self.0.push('\n');
    }

    fn comment(&mut self, text: &str) {
        self.line(&format!("# {text}"));
    }

    /// `[name]` with a comment above it.
    fn table(&mut self, name: &str, comment: &str) {
        self.blank();
        if !comment.is_empty() {
            self.comment(comment);
        }
        self.line(&format!("[{name}]"));
    }

    fn raw(&mut self, key: &str, value: impl std::fmt::Display) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.0, "{key} = {value}");
    }

    fn raw_noted(&mut self, key: &str, value: impl std::fmt::Display, note: &str) {
        let _ = writeln!(self.0, "{key} = {value} # {note}");
    }

    fn text(&mut self, key: &str, value: &str) {
        self.raw(key, Value::from(value));
    }

    fn optional(&mut self, key: &str, value: Option<&str>) {
        if let Some(value) = value {
            self.text(key, value);
        }
    }

    fn list(&mut self, key: &str, values: &[String]) {
        if !values.is_empty() {
            let values: Vec<String> = values.iter().map(|value| Value::from(value.as_str()).to_string()).collect();
            self.raw(key, format!("[{}]", values.join(", ")));
        }
    }

    fn map(&mut self, map: &BTreeMap<String, String>) {
        for (key, value) in map {
            self.text(&Key::new(key).to_string(), value);
        }
    }
}
