//! From what a host is asked to run to Fly's JSON, and what happened on it.

use super::rfc3339;
use dunlin_model::{Check, CheckKind, ExitInfo, MachineEvent, MachineSpec, MachineState, RestartWhen, Service};
use dunlin_model::config::units::format_duration_ms;
use serde_json::{Map, Value, json};

/// As a shell has it of what a signal ended.
const BY_SIGNAL: i32 = 128;
const KILLED: i32 = BY_SIGNAL + 9;
/// As a shell has it of what it could not run.
const NOT_RUN: i32 = 126;

/// The configuration of a machine that a release made: nobody wrote it in this form.
pub(crate) fn show(spec: &MachineSpec, domain: &str) -> Value {
    let mut init = Map::new();
    if let Some(entrypoint) = &spec.entrypoint {
        init.insert("entrypoint".into(), json!(entrypoint));
    }
    if let Some(command) = &spec.command {
        init.insert("cmd".into(), json!(command));
    }
    if spec.swap_mb != 0 {
        init.insert("swap_size_mb".into(), json!(spec.swap_mb));
    }
    let mut metadata = spec.metadata.clone();
    metadata.entry("fly_process_group".into()).or_insert_with(|| spec.process_group.clone());
    if spec.release != 0 {
        // By these, Fly's clients know a machine that a release made.
        metadata.entry("fly_platform_version".into()).or_insert_with(|| "v2".into());
        metadata.entry("fly_release_version".into()).or_insert_with(|| spec.release.to_string());
    }
    let policy = match spec.restart.policy {
        RestartWhen::No => "no",
        RestartWhen::Always => "always",
        RestartWhen::OnFailure => "on-failure",
    };
    let image = &spec.image;
    let tag = image.tag.as_ref().map(|tag| format!(":{tag}")).unwrap_or_default();
    let mut stop = json!({ "timeout": format_duration_ms(spec.stop.timeout_ms) });
    if let Some(signal) = &spec.stop.signal {
        stop["signal"] = json!(signal);
    }
    let (gating, informing): (Vec<_>, Vec<_>) = spec.checks.iter().partition(|check| check.gates_routing);
    let services = spec.services.iter().map(|given| service(given, &gating));
    let temporary = spec.temp_dirs.iter().map(|dir| {
        json!({ "name": dir.name, "temp_dir": { "storage_type": dir.storage, "size_mb": dir.size_mb } })
    });
    let placed = spec.temp_dirs.iter().filter(|dir| !dir.path.is_empty());
    let mounts = spec.mounts.iter().map(|mount| json!(mount));
    let mounts = mounts.chain(placed.map(|dir| json!({ "name": dir.name, "path": dir.path })));
    json!({
        "image": format!("registry.{domain}/{}{tag}@{}", image.repository, image.digest),
        "env": spec.env,
        "init": init,
        "guest": spec.guest,
        "files": spec.files,
        "services": services.collect::<Vec<_>>(),
        "checks": informing.iter().map(|given| (given.name.clone(), check(given))).collect::<Map<_, _>>(),
        "restart": { "policy": policy, "max_retries": spec.restart.max_retries },
        "stop_config": stop,
        "mounts": mounts.collect::<Vec<_>>(),
        "rootfs": spec.rootfs,
        "volumes": temporary.collect::<Vec<_>>(),
        "metadata": metadata,
        "auto_destroy": spec.auto_destroy,
        "schedule": spec.schedule,
        "standbys": spec.standbys,
    })
}

fn service(service: &Service, checks: &[&Check]) -> Value {
    let concurrency = &service.concurrency;
    let mut limits = json!({ "type": concurrency.kind, "soft_limit": concurrency.soft_limit });
    if let Some(hard_limit) = concurrency.hard_limit {
        limits["hard_limit"] = json!(hard_limit);
    }
    // One that only asks whether the app listens is the platform's own.
    let asked_for = checks.iter().filter(|check| !check.name.starts_with("servicecheck-listens-"));
    json!({
        "protocol": "tcp",
        "internal_port": service.internal_port,
        "ports": [
            { "port": 80, "handlers": ["http"], "force_https": service.force_https },
            { "port": 443, "handlers": ["tls", "http"] },
        ],
        "autostart": service.autostart,
        "autostop": service.autostop.as_str(),
        "min_machines_running": service.min_machines_running,
        "max_machines_running": service.max_machines_running,
        "concurrency": limits,
        "checks": asked_for.map(|given| check(given)).collect::<Vec<_>>(),
    })
}

fn check(check: &Check) -> Value {
    let mut shown = json!({
        "type": check.kind.as_str(),
        "interval": format_duration_ms(check.interval_ms),
        "timeout": format_duration_ms(check.timeout_ms),
        "grace_period": format_duration_ms(check.grace_period_ms),
    });
    if check.port != 0 {
        shown["port"] = json!(check.port);
    }
    match &check.kind {
        CheckKind::Tcp => {}
        CheckKind::Script { command } => shown["command"] = json!(command),
        CheckKind::Http { method, path, headers, https, tls_server_name, tls_skip_verify } => {
            if let Some(name) = tls_server_name {
                shown["tls_server_name"] = json!(name);
            }
            shown["method"] = json!(method);
            shown["path"] = json!(path);
            shown["protocol"] = json!(if *https { "https" } else { "http" });
            shown["tls_skip_verify"] = json!(tls_skip_verify);
            let headers = headers.iter().map(|(name, value)| json!({ "name": name, "values": [value] }));
            shown["headers"] = headers.collect();
        }
    }
    shown
}

/// What happened to a machine, the newest first.
pub(crate) fn events(events: &[MachineEvent]) -> Value {
    events.iter().map(event).collect()
}

fn event(event: &MachineEvent) -> Value {
    let mut shown = json!({
        "id": event.id.to_string(),
        "type": event.kind.as_str(),
        "status": event.status.as_str(),
        "source": event.source,
        "timestamp": event.at_ms,
    });
    if let Some(id) = &event.request_id {
        shown["request_id"] = json!(id);
    }
    if let Some(exit) = &event.exit {
        let code = exit_code(exit);
        shown["request"] = json!({
            "exit_event": {
                "exit_code": code,
                "guest_exit_code": code,
                "guest_signal": exit.signal,
                "signal": exit.signal,
                "oom_killed": exit.oom_killed,
                "requested_stop": exit.requested_stop,
                "restarting": matches!(event.status, MachineState::Starting | MachineState::Restarting),
                "exited_at": rfc3339(exit.at_ms),
                "error": exit.error,
            },
            "restart_count": event.restarts,
        });
    }
    shown
}

/// Always a number: Fly's clients read 0 where there is none, and take the machine for one that succeeded.
fn exit_code(exit: &ExitInfo) -> i32 {
    match (exit.exit_code, exit.signal) {
        (Some(code), _) => code,
        (None, Some(signal)) => BY_SIGNAL + signal,
        (None, None) if exit.oom_killed => KILLED,
        (None, None) => NOT_RUN,
    }
}
