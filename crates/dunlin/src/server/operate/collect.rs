//! What this host tells a person who looks for a fault: texts, none of which has a machine's environment, a secret or a key.
//! Control packs them, and hides what looks like a secret all the same.

use super::{Operated, record_path};
use crate::{log, program};
use dunlin_runtime::features::check_all;
use serde_json::json;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::process::Command;

const TOOL_WITHIN: Duration = Duration::from_secs(5);
const MAX_TOOL_BYTES: u64 = 128 << 10;
const MAX_FILE_BYTES: u64 = 64 << 10;

/// (name, text).
type Texts = Vec<(String, String)>;

pub async fn collect(operated: &Arc<Operated>) -> Texts {
    let mut texts = Texts::new();
    let mut add = |name: &str, text: String| texts.push((name.to_owned(), text));
    let data = operated.settings.data_dir.clone();
    add("host/about.json", pretty(&json!({
        "host": operated.settings.host_id, "version": crate::VERSION, "commit": crate::COMMIT, "at_ms": super::super::now_ms(),
        "process": std::process::id(), "life": operated.life, "started_on_trial": operated.is_on_trial, "trial": operated.trial(),
        "upgrade_outcome": program::outcome_of(&data), "user": rustix::process::geteuid().as_raw(),
    })));
    add("host/settings.txt", operated.settings.summary());
    let (all, trouble) = log::last();
    add("host/log.txt", format!(
        "# The last lines of this server's process. Those of the keeper, and of processes before, are where its standard error goes: \
         journalctl -u dunlin\n{all}"
    ));
    add("host/errors.txt", format!("# The last lines at WARN and ERROR of this server's process.\n{trouble}"));
    let mut metrics = String::new();
    (operated.metrics)(&mut metrics);
    add("host/metrics.txt", metrics);
    for (name, text) in of_view(operated) {
        add(name, text);
    }
    if let Some(fleet) = &operated.fleet {
        let status = json!({ "host": fleet.cluster.host(), "cluster": fleet.cluster.status(), "members": fleet.cluster.members() });
        add("host/cluster-status.json", pretty(&status));
    }
    let found = tokio::task::spawn_blocking(move || of_computer(&data)).await;
    texts.extend(found.unwrap_or_else(|_| vec![("host/doctor.txt".into(), "it could not be run\n".into())]));
    texts.extend(of_tools().await);
    texts
}

/// What it knows of its machines, its volumes, and of the others.
fn of_view(operated: &Operated) -> Vec<(&'static str, String)> {
    let view = operated.view.current();
    let own = &operated.settings.host_id;
    let machines: Vec<_> = view.machines.values().filter(|fact| fact.host == *own).map(|fact| &**fact).collect();
    let volumes = view.config.volumes.values().filter(|volume| volume.host == *own);
    let volumes: Vec<_> = volumes.map(|volume| json!({ "id": volume.id, "app": volume.app, "name": volume.name, "size_gb": volume.size_gb })).collect();
    let assigned = view.config.machines.values().filter(|machine| machine.host == *own);
    let assigned: Vec<_> = assigned.map(|machine| json!({ "id": machine.id, "name": machine.name, "address": machine.address, "placement": machine.placement })).collect();
    let summary = json!({
        "config_generation": view.config.generation, "config_received_at_ms": view.config_received_at_ms,
        "apps": view.config.apps.len(), "machines": view.machines.len(), "assigned_machines": view.config.machines.len(),
        "volumes": view.config.volumes.len(), "tombstones": view.config.tombstones.len(), "certificates": view.config.certificates.len(),
        "hosts": view.hosts.values().map(|fact| &**fact).collect::<Vec<_>>(), "heard": *view.heard,
    });
    vec![
        ("host/view.json", pretty(&summary)),
        ("host/machines.json", pretty(&json!(machines))),
        ("host/assigned.json", pretty(&json!(assigned))),
        ("host/volumes.json", pretty(&json!(volumes))),
    ]
}

/// What the computer says of itself; blocking.
fn of_computer(data: &Path) -> Texts {
    let mut texts = Texts::new();
    let checks = check_all(data);
    texts.push(("host/doctor.json".into(), serde_json::to_string_pretty(&checks).unwrap_or_default()));
    let mut kernel = String::new();
    for path in [
        "/proc/version", "/etc/os-release", "/proc/uptime", "/proc/loadavg", "/proc/meminfo", "/proc/pressure/cpu", "/proc/pressure/memory",
        "/proc/pressure/io", "/proc/self/cgroup", "/proc/self/limits", "/proc/self/status", "/sys/fs/cgroup/cgroup.controllers",
        "/proc/sys/net/ipv4/ip_forward", "/proc/net/sockstat",
    ] {
        let _ = writeln!(kernel, "== {path}\n{}", read(path));
    }
    texts.push(("host/computer.txt".into(), kernel));
    texts.push(("host/disk.txt".into(), disk(data)));
    let record = fs::read_to_string(record_path(data)).unwrap_or_else(|error| format!("none: {error}"));
    texts.push(("host/upgrade.txt".into(), record));
    texts
}

fn read(path: &str) -> String {
    use std::io::Read as _;
    let mut text = Vec::new();
    match fs::File::open(path).and_then(|file| file.take(MAX_FILE_BYTES).read_to_end(&mut text)) {
        Ok(_) => String::from_utf8_lossy(&text).into_owned(),
        Err(error) => format!("not there: {error}\n"),
    }
}

/// The disk of the data directory, and who fills it.
fn disk(data: &Path) -> String {
    let mut text = String::new();
    let _ = match rustix::fs::statvfs(data) {
        Ok(disk) => writeln!(
            text,
            "{}: {} of {} MiB free, {} of {} files free",
            data.display(),
            disk.f_bavail.saturating_mul(disk.f_frsize) >> 20,
            disk.f_blocks.saturating_mul(disk.f_frsize) >> 20,
            disk.f_favail,
            disk.f_files
        ),
        Err(error) => writeln!(text, "{}: not known: {error}", data.display()),
    };
    for entry in fs::read_dir(data).into_iter().flatten().flatten() {
        let len = entry.metadata().map_or(0, |found| found.len());
        let _ = writeln!(text, "{:>12} {}", len, entry.file_name().to_string_lossy());
    }
    text
}

/// What programs of the system say, where they are there. Keys are not among it: `wg show` hides them.
async fn of_tools() -> Texts {
    let mut texts = Texts::new();
    for (name, program, args) in [
        ("net-links", "ip", &["-s", "link"][..]),
        ("net-addresses", "ip", &["address"]),
        ("net-routes", "ip", &["route", "show", "table", "all"]),
        ("nft", "nft", &["list", "ruleset"]),
        ("wireguard", "wg", &["show"]),
        ("disk-usage", "df", &["-h"]),
        ("processes", "ps", &["-eo", "pid,ppid,stat,rss,etime,comm"]),
        ("kernel-log", "dmesg", &["--level=emerg,alert,crit,err,warn"]),
    ] {
        let line = format!("# {program} {}\n", args.join(" "));
        let said = tokio::time::timeout(TOOL_WITHIN, said(program, args)).await;
        let said = said.unwrap_or_else(|_| Err(format!("no answer within {} s", TOOL_WITHIN.as_secs())));
        texts.push((format!("host/{name}.txt"), line + &said.unwrap_or_else(|why| format!("not there: {why}\n"))));
    }
    texts
}

async fn said(program: &str, args: &[&str]) -> Result<String, String> {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| error.to_string())?;
    let mut text = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(MAX_TOOL_BYTES).read_to_end(&mut text).await.map_err(|error| error.to_string())?;
    }
    match child.wait().await {
        Ok(status) if status.success() || !text.is_empty() => Ok(String::from_utf8_lossy(&text).into_owned()),
        Ok(status) => Err(format!("it ended with {status}")),
        Err(error) => Err(error.to_string()),
    }
}

fn pretty(value: &serde_json::Value) -> String {
    serde_json::to_string_pretty(value).unwrap_or_default()
}
