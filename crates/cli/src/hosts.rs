//! `host` and `cluster`: tokens to join with, what hosts there are, cordon, drain, removal, and how the cluster does.

use crate::args::{ClusterCommand, HostCommand};
use crate::logs::{now_ms, parse_time};
use crate::{CliError, Exit, Session, ui, upgrade};
use dunlin_api::fleet::{CreateHostToken, HostDetail, HostMachine, HostRemoved, HostShown, HostState, HostToken};
use dunlin_model::HostId;
use serde_json::{Value, json};
use std::io::Write as _;
use std::path::{Path, PathBuf};

pub async fn host(session: &Session, command: HostCommand) -> Result<Exit, CliError> {
    match command {
        HostCommand::Token { ttl } => token(session, &ttl).await,
        HostCommand::List => {
            let hosts: Vec<HostShown> = session.client.get("/v1/hosts").await?;
            if session.json {
                ui::print_json(&hosts);
            } else {
                let rows: Vec<_> = hosts.iter().map(|host| row(host, now_ms())).collect();
                ui::print_table(&["ID", "STATE", "REGION", "ZONE", "MACHINES", "MEMORY MB", "ADDRESS", "VERSION", "HEARD"], &rows);
            }
            Ok(Exit::Ok)
        }
        HostCommand::Status { id } => {
            let detail: HostDetail = session.client.get(&format!("/v1/hosts/{id}")).await?;
            show(session, &detail)
        }
        HostCommand::Cordon { id } => wish(session, &id, "cordon").await,
        HostCommand::Uncordon { id } => wish(session, &id, "uncordon").await,
        HostCommand::Drain { id } => {
            let exit = wish(session, &id, "drain").await?;
            if !session.json {
                eprintln!("it goes on by itself: `dunlin host status {id}` shows what is left, `dunlin host uncordon {id}` ends it");
            }
            Ok(exit)
        }
        HostCommand::Debug { id, output } => debug(session, &id, output).await,
        HostCommand::Remove { id, force, yes } => remove(session, &id, force, yes).await,
    }
}

async fn token(session: &Session, ttl: &str) -> Result<Exit, CliError> {
    let ttl_s = parse_time(ttl)?.div_ceil(1000);
    let made: HostToken = session.client.post("/v1/hosts/tokens", &CreateHostToken { ttl_s: Some(ttl_s) }).await?;
    if session.json {
        ui::print_json(&made);
        return Ok(Exit::Ok);
    }
    ui::print_line(&made.token);
    eprintln!(
        "it lets one host join within {ttl}; on that host, as root:\n  \
         DUNLIN_JOIN_TOKEN=... dunlin host join {}", made.join_address
    );
    Ok(Exit::Ok)
}

async fn wish(session: &Session, id: &HostId, what: &str) -> Result<Exit, CliError> {
    let detail: HostDetail = session.client.post(&format!("/v1/hosts/{id}/{what}"), &json!({})).await?;
    show(session, &detail)
}

async fn remove(session: &Session, id: &HostId, force: bool, yes: bool) -> Result<Exit, CliError> {
    let what = if force { ", destroy its machines and give its volumes up" } else { "" };
    if !yes && !ui::confirm(&format!("Remove {id} for good{what}? Its id is never used again."))? {
        return Err(CliError::failed("nothing was removed"));
    }
    let removed: HostRemoved = session.client.delete(&format!("/v1/hosts/{id}?force={force}")).await?;
    if session.json {
        ui::print_json(&removed);
        return Ok(Exit::Ok);
    }
    ui::print_line(&format!("removed {id}"));
    if removed.machines > 0 || removed.volumes > 0 {
        eprintln!("{} machines destroyed, {} volumes given up; their files are on that host's disk and nowhere else", removed.machines, removed.volumes);
    }
    if removed.not_heard_of > 0 {
        eprintln!(
            "{} of the machines it was not heard to have ended: if it is on, they may run until it reaches control, itself or through another \
             host, and hears that it was removed; be sure that it is off before what only one may do is done elsewhere",
            removed.not_heard_of
        );
    }
    Ok(Exit::Ok)
}

async fn debug(session: &Session, id: &HostId, output: Option<PathBuf>) -> Result<Exit, CliError> {
    let path = output.unwrap_or_else(|| format!("dunlin-debug-{id}.tar.gz").into());
    let bytes = session.client.bytes(&format!("/v1/hosts/{id}/debug")).await?;
    let written = match path.to_str() {
        Some("-") => std::io::stdout().write_all(&bytes),
        _ => write_private(&path, &bytes),
    };
    written.map_err(|error| CliError::failed(format!("{} cannot be written: {error}", path.display())).hint("name another file with -o"))?;
    if path.to_str() == Some("-") {
        return Ok(Exit::Ok);
    }
    match session.json {
        true => ui::print_json(&json!({ "host": id, "file": path, "bytes": bytes.len() })),
        false => {
            ui::print_line(&path.display().to_string());
            eprintln!("what is not in it, missing.txt in it says; look through it before you give it to others: it names apps, machines and addresses");
        }
    }
    Ok(Exit::Ok)
}

/// For whoever asked, and nobody else on this computer.
fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)?.write_all(bytes)
}

pub async fn cluster(session: &Session, command: ClusterCommand) -> Result<Exit, CliError> {
    let verifies = matches!(command, ClusterCommand::Verify);
    let path = match command {
        ClusterCommand::Status => "/v1/cluster/status",
        ClusterCommand::Verify => "/v1/cluster/verify",
        ClusterCommand::Upgrade(args) => return upgrade::upgrade(session, args).await,
    };
    let answer: Value = session.client.get(path).await?;
    if session.json {
        ui::print_json(&answer);
    } else {
        lines("", &answer).iter().for_each(|line| ui::print_line(line));
    }
    match &answer["unsound"] {
        _ if !verifies => Ok(Exit::Ok),
        Value::Array(unsound) if unsound.is_empty() => Ok(Exit::Ok),
        Value::Array(unsound) => Err(CliError::failed(format!("{} logs are not what their writers signed", unsound.len()))
            .hint("they are fetched again by themselves: verify once more in a minute; if they stay, test this host's memory")),
        _ => Err(CliError::failed("the host could not check what it holds: its part in the cluster has ended")
            .hint("its log says why; restart its server, machines go on")),
    }
}

/// What the cluster says of itself grows with its versions: whatever it is, it can be read.
fn lines(indent: &str, value: &Value) -> Vec<String> {
    let deeper = format!("{indent}  ");
    match value {
        Value::Object(fields) => fields
            .iter()
            .flat_map(|(name, value)| match value {
                Value::Object(_) | Value::Array(_) => {
                    let below = lines(&deeper, value);
                    let first = if below.is_empty() { format!("{indent}{name}: none") } else { format!("{indent}{name}:") };
                    [vec![first], below].concat()
                }
                plain => vec![format!("{indent}{name}: {}", text(plain))],
            })
            .collect(),
        Value::Array(items) => items.iter().flat_map(|item| match item {
            Value::Object(_) => vec![format!("{indent}- {}", inline(item))],
            plain => vec![format!("{indent}- {}", text(plain))],
        }).collect(),
        plain => vec![format!("{indent}{}", text(plain))],
    }
}

fn inline(value: &Value) -> String {
    let fields = value.as_object().into_iter().flatten();
    fields.map(|(name, value)| format!("{name} {}", text(value))).collect::<Vec<_>>().join(", ")
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn show(session: &Session, detail: &HostDetail) -> Result<Exit, CliError> {
    if session.json {
        ui::print_json(detail);
        return Ok(Exit::Ok);
    }
    let host = &detail.host;
    let line = |name: &str, value: &str| ui::print_line(&format!("{name:10} {value}"));
    line("host", host.id.as_str());
    line("state", &state(detail));
    let zone = host.zone.as_ref().map_or(String::new(), |zone| format!(", zone {zone}"));
    line("region", &format!("{}{zone}", host.region));
    if !host.labels.is_empty() {
        let labels: Vec<_> = host.labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
        line("labels", &labels.join(" "));
    }
    line("address", &address(host));
    line("version", host.version.as_deref().unwrap_or("-"));
    line("room", &room(host));
    line("addresses", &host.machine_prefix);
    line("heard", &heard(host, now_ms()));
    if has_no_certificate(host, now_ms()) {
        line("trust", "its certificate has ended, so that the others refuse it: start its server, which has it renewed with the host's key, or see its log");
    }
    if !detail.machines.is_empty() {
        ui::print_line("");
        let rows: Vec<_> = detail.machines.iter().map(machine_row).collect();
        ui::print_table(&["MACHINE", "APP", "GROUP", "STATE", "STAYS BECAUSE"], &rows);
    }
    for volume in &detail.free_volumes {
        ui::print_line(&format!("volume {} ({} of {}) is on it, and no machine has it", volume.id, volume.name, volume.app));
    }
    Ok(Exit::Ok)
}

fn state(detail: &HostDetail) -> String {
    let name = state_name(detail.host.state);
    if !detail.host.draining {
        return name.to_owned();
    }
    let stay = detail.machines.iter().filter(|machine| machine.stays.is_some()).count();
    match (detail.moving, stay) {
        (0, 0) if detail.host.is_control => format!("{name}: nothing is left; control runs on it, so it stays"),
        (0, 0) => format!("{name}: nothing is left; `dunlin host remove {}` removes it", detail.host.id),
        (moving, stay) => format!("{name}: {moving} machines are to move, {stay} stay"),
    }
}

fn state_name(state: HostState) -> &'static str {
    match state {
        HostState::Unreachable => "unreachable",
        HostState::Draining => "draining",
        HostState::Cordoned => "cordoned",
        HostState::Up => "up",
    }
}

/// Why a host is not heard, where that is known.
fn state_in_list(host: &HostShown, now_ms: u64) -> String {
    let name = state_name(host.state);
    match has_no_certificate(host, now_ms) {
        true => format!("{name} (certificate ended)"),
        false => name.to_owned(),
    }
}

fn has_no_certificate(host: &HostShown, now_ms: u64) -> bool {
    host.state == HostState::Unreachable && host.certificate_ends_at_ms.is_some_and(|ends_at_ms| ends_at_ms <= now_ms)
}

fn row(host: &HostShown, now_ms: u64) -> Vec<String> {
    vec![
        if host.is_control { format!("{} (control)", host.id) } else { host.id.to_string() },
        state_in_list(host, now_ms),
        host.region.to_string(),
        host.zone.as_ref().map_or("-".into(), ToString::to_string),
        host.machines.to_string(),
        memory(host),
        address(host),
        host.version.clone().unwrap_or("-".into()),
        heard(host, now_ms),
    ]
}

/// Reserved, and all; of a host that said nothing of itself only the latter is known.
fn memory(host: &HostShown) -> String {
    host.memory_reserved_mb.map_or_else(|| host.memory_mb.to_string(), |reserved| format!("{reserved}/{}", host.memory_mb))
}

fn address(host: &HostShown) -> String {
    host.addr.map_or("-".into(), |addr| addr.to_string())
}

fn room(host: &HostShown) -> String {
    let disk = host.room.map_or(String::new(), |room| format!(", {} of {} GB of disk free", room.disk_free_gb, room.disk_gb));
    format!("{} MB of memory, {} cpus{disk}", memory(host), host.cpus)
}

fn heard(host: &HostShown, now_ms: u64) -> String {
    let Some(said_at_ms) = host.said_at_ms else { return "never".into() };
    let seconds = now_ms.saturating_sub(said_at_ms) / 1000;
    match seconds {
        0..120 => format!("{seconds}s ago"),
        120..7200 => format!("{}m ago", seconds / 60),
        _ => format!("{}h ago", seconds / 3600),
    }
}

fn machine_row(machine: &HostMachine) -> Vec<String> {
    vec![
        machine.id.to_string(),
        machine.app.to_string(),
        machine.process_group.clone(),
        machine.state.map_or("unknown", |state| state.as_str()).to_owned(),
        machine.stays.clone().unwrap_or("-".into()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown() -> HostShown {
        serde_json::from_value(json!({
            "id": "h2", "region": "fra", "zone": "a", "state": "up", "cordoned": false, "draining": false, "is_control": false,
            "joined_at_ms": 1, "machine_prefix": "10.208.0.0/20", "cpus": 4, "memory_mb": 8192, "machines": 3, "volumes": 0,
        }))
        .unwrap()
    }

    #[test]
    fn a_host_is_a_line_that_says_what_is_not_known() {
        assert_eq!(row(&shown(), 0), ["h2", "up", "fra", "a", "3", "8192", "-", "-", "never"]);
        let known = HostShown {
            is_control: true,
            state: HostState::Draining,
            memory_reserved_mb: Some(256),
            said_at_ms: Some(1_000),
            addr: Some("10.0.0.1:7373".parse().unwrap()),
            version: Some("0.1.0".into()),
            zone: None,
            ..shown()
        };
        assert_eq!(row(&known, 181_000), ["h2 (control)", "draining", "fra", "-", "3", "256/8192", "10.0.0.1:7373", "0.1.0", "3m ago"]);
        let away = |ends_at_ms| HostShown { state: HostState::Unreachable, certificate_ends_at_ms: Some(ends_at_ms), ..shown() };
        assert_eq!((row(&away(1_000), 1_000)[1].as_str(), row(&away(1_001), 1_000)[1].as_str()), ("unreachable (certificate ended)", "unreachable"));
        assert_eq!(row(&HostShown { state: HostState::Up, ..away(1) }, 1_000)[1], "up", "it was certified anew a moment ago");
        assert_eq!((heard(&known, 2_500), heard(&known, 7_201_000)), ("1s ago".into(), "2h ago".into()));
    }

    #[test]
    fn a_drain_says_how_far_it_is() {
        let machine = |stays: Option<&str>| HostMachine {
            id: dunlin_model::MachineId::from_random([1; 7]),
            app: "web".parse().unwrap(),
            process_group: "app".into(),
            state: None,
            volumes: vec![],
            stays: stays.map(str::to_owned),
        };
        let check = |machines: Vec<HostMachine>, expected: &str| {
            let moving = machines.iter().filter(|machine| machine.stays.is_none()).count() as u32;
            let host = HostShown { state: HostState::Draining, draining: true, ..shown() };
            assert_eq!(state(&HostDetail { host, machines, free_volumes: vec![], moving }), expected);
        };
        check(vec![machine(None), machine(Some("volume"))], "draining: 1 machines are to move, 1 stay");
        check(vec![], "draining: nothing is left; `dunlin host remove h2` removes it");
        let host = HostShown { is_control: true, state: HostState::Draining, draining: true, ..shown() };
        let detail = HostDetail { host, machines: vec![], free_volumes: vec![], moving: 0 };
        assert_eq!(state(&detail), "draining: nothing is left; control runs on it, so it stays");
        assert_eq!(machine_row(&machine(None))[3..], ["unknown", "-"]);
    }

    #[test]
    fn whatever_the_cluster_says_is_shown_in_lines() {
        let answer = json!({ "members": [{ "host": "h1", "age_ms": 12 }], "config": { "generation": "1.2" }, "behind": [], "ok": true });
        let expected = ["behind: none", "config:", "  generation: 1.2", "members:", "  - age_ms 12, host h1", "ok: true"];
        let mut found = lines("", &answer);
        found.sort_by_key(|line| expected.iter().position(|other| other == line));
        assert_eq!(found, expected);
    }
}
