//! Reading a configuration file.

use super::problem::position;
use super::section::{Findings, GroupUse, Refused, Section, read_item, value};
use super::{
    AppConfig, Build, ConfigError, ConfigProblem, DEFAULT_GROUP, Deploy, GUEST_SIZES, GuestSize, HttpService,
    InvalidPrimaryRegion, KILL_SIGNALS, MAX_FILE_BYTES, MAX_KILL_TIMEOUT_MS, Mistake, MountConfig, Restart, Strategy, Vm, file, procfile,
    service, units, words,
};
use crate::machine::{CpuKind, RestartWhen};
use crate::volume::{
    AutoExtend, EXTEND_PERCENT,
    SIZE_MAX_GB, SIZE_MIN_GB, SNAPSHOT_RETENTION, VOLUME_NAME_RULE, is_volume_name, mount_path,
};
use std::collections::BTreeMap;
use std::str::FromStr;
use toml_edit::{Document, Value};

/// A file that can be used, and the keys in it that will have no effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parsed {
    pub config: AppConfig,
    /// In the order of the file. A caller that is about to deploy stops unless this is empty or the user said to ignore it.
    pub problems: Vec<ConfigProblem>,
}

/// Keys at the top of the file that Fly honours and we do not yet.
const LATER: &[(&str, &str)] = &[
    ("host_dedication_id", "hosts cannot be dedicated"),
    ("machine_config", "raw machine configurations are not merged"),
    ("container", "a machine runs one container"),
    ("statics", "static files are served by the app itself"),
    ("metrics", "metrics of apps are not collected"),
    ("machine_checks", "checks that run a machine are not available"),
    ("experimental", "none of the experimental keys has an effect"),
];
const LATER_BUILD: &[(&str, &str)] = &[
    ("builder", "buildpacks are not available; write a Dockerfile"),
    ("buildpacks", "buildpacks are not available; write a Dockerfile"),
    ("builtin", "built-in builders are not available; write a Dockerfile"),
    ("settings", "they belong to built-in builders, which are not available"),
    ("compression", "layers are compressed with gzip"),
    ("compression_level", "layers are compressed at the default level"),
    ("compose", "compose files are not read"),
];
const LATER_DEPLOY: &[(&str, &str)] = &[
    ("release_command", "commands before a release are not run; run it with `dunlin machine exec` after the deploy"),
    ("release_command_timeout", "commands before a release are not run"),
    ("release_command_vm", "commands before a release are not run"),
    ("seed_command", "commands before a release are not run"),
];
const LATER_VM: &[(&str, &str)] = &[
    ("gpus", "hosts offer no GPUs"),
    ("gpu_kind", "hosts offer no GPUs"),
    ("kernel_args", "machines share the host's kernel"),
    ("host_dedication_id", "hosts cannot be dedicated"),
    ("persist_rootfs", "a machine's root file system is new at every version"),
];
const LATER_MOUNTS: &[(&str, &str)] = &[
    ("type", "only volumes can be mounted"),
];
/// Most tries of a restart policy: more is `always`.
pub(super) const MAX_RETRIES: u32 = 1000;
/// Environment names that the platform sets itself.
const RESERVED_ENV: &[&str] = &["FLY_", "DUNLIN_"];

/// What this name begins with, if the platform keeps such names for what it sets itself.
pub fn reserved_prefix(name: &str) -> Option<&'static str> {
    RESERVED_ENV.iter().find(|prefix| name.starts_with(**prefix)).copied()
}

/// Reads `dunlin.toml` or `fly.toml`; `file_name` is for messages.
pub fn parse(text: &str, file_name: &str) -> Result<Parsed, ConfigError> {
    let fail = |mistakes: Vec<Mistake>| ConfigError { file: file_name.to_owned(), mistakes };
    if text.len() > MAX_FILE_BYTES {
        let message = format!("the file has {} bytes; a configuration has at most {MAX_FILE_BYTES}", text.len());
        return Err(fail(vec![Mistake { line: 1, column: 1, message }]));
    }
    let document = Document::parse(text).map_err(|error| {
        let (line, column) = position(text, error.span().map_or(0, |span| span.start));
        fail(vec![Mistake { line, column, message: format!("not valid TOML: {}", error.message().trim()) }])
    })?;
    let mut findings = Findings::new(text);
    let config = read_app(&mut findings, Section::new(document.as_table(), String::new(), None));
    check_groups(&mut findings, &config);
    check_edge_ports(&mut findings, &config, &document);
    check_mounts(&mut findings, &config, &document);
    if !findings.mistakes.is_empty() {
        findings.mistakes.sort_by_key(|mistake| (mistake.line, mistake.column));
        return Err(fail(findings.mistakes));
    }
    findings.problems.sort_by_key(ConfigProblem::line);
    Ok(Parsed { config, problems: findings.problems })
}

fn read_app<'t>(f: &mut Findings<'t>, mut top: Section<'t>) -> AppConfig {
    let config = AppConfig {
        app: top.read(f, "app", "a name", parsed),
        primary_region: top.read(f, "primary_region", "regions, the preferred one first, like \"fra\" or \"fra,ams,eu\"", |value| {
            let text = value.as_str().ok_or(Refused::Type)?;
            text.parse().map_err(|error: InvalidPrimaryRegion| Refused::Because(error.why))
        }),
        kill_signal: top.read(f, "kill_signal", &format!("one of {}", KILL_SIGNALS.join(", ")), |value| {
            let name = value.as_str().filter(|name| KILL_SIGNALS.contains(name)).ok_or(Refused::Type)?;
            Ok(name.to_owned())
        }),
        kill_timeout_ms: top.read(f, "kill_timeout", "seconds or a duration like \"30s\", at most 300 seconds", |value| {
            let ms = value::duration_ms(1000)(value)?;
            if ms <= MAX_KILL_TIMEOUT_MS { Ok(ms) } else { Err(Refused::Type) }
        }),
        swap_size_mb: top.read(
            f,
            "swap_size_mb",
            &format!("a number of MB up to {}", units::MAX_SWAP_MB),
            value::number(0..=units::MAX_SWAP_MB),
        ),
        console_command: top.read(f, "console_command", "a command", |value| {
            let command = value::filled(value)?;
            words::split(&command).map_err(|error| Refused::Because(format!("not a command: {error}")))?;
            Ok(command)
        }),
        build: top.section(f, "build").map(|section| read_build(f, section)).unwrap_or_default(),
        deploy: top.section(f, "deploy").map(|section| read_deploy(f, section)).unwrap_or_default(),
        env: top.section(f, "env").map(|section| read_env(f, section)).unwrap_or_default(),
        processes: top.section(f, "processes").map(|section| read_processes(f, section)).unwrap_or_default(),
        http_service: top.section(f, "http_service").map(|section| service::read_http_service(f, section)),
        services: top.sections(f, "services").into_iter().filter_map(|s| service::read_tcp_service(f, s)).collect(),
        checks: top.section(f, "checks").map(|section| service::read_named_checks(f, section)).unwrap_or_default(),
        vm: top.sections(f, "vm").into_iter().map(|section| read_vm(f, section)).collect(),
        mounts: top.sections(f, "mounts").into_iter().filter_map(|section| read_mount(f, section)).collect(),
        restart: top.sections(f, "restart").into_iter().filter_map(|section| read_restart(f, section)).collect(),
        files: top.sections(f, "files").into_iter().filter_map(|section| file::read_file(f, section)).collect(),
    };
    top.finish(f, LATER);
    config
}

fn read_build<'t>(f: &mut Findings<'t>, mut section: Section<'t>) -> Build {
    let build = Build {
        dockerfile: section.read(f, "dockerfile", "a path", inner_path),
        image: section.read(f, "image", "an image reference", value::filled),
        ignorefile: section.read(f, "ignorefile", "a path", inner_path),
        build_target: section.read(f, "build-target", "the name of a stage", value::filled),
        args: section.section(f, "args").map(|args| read_args(f, args)).unwrap_or_default(),
    };
    section.finish(f, LATER_BUILD);
    build
}

fn read_deploy<'t>(f: &mut Findings<'t>, mut section: Section<'t>) -> Deploy {
    const STRATEGIES: &[(&str, Result<Strategy, &str>)] = &[
        ("rolling", Ok(Strategy::Rolling)),
        ("immediate", Ok(Strategy::Immediate)),
        ("canary", Err("canary")),
        ("bluegreen", Err("bluegreen")),
    ];
    let expected = "\"rolling\", \"immediate\", \"canary\" or \"bluegreen\"";
    let strategy = match section.read(f, "strategy", expected, value::one_of(STRATEGIES)) {
        Some(Err(_)) => {
            f.not_honoured(section.span_of("strategy"), section.key("strategy"), "use \"rolling\" or \"immediate\"");
            Strategy::Rolling
        }
        Some(Ok(strategy)) => strategy,
        None => Strategy::Rolling,
    };
    let at_once = section.read(f, "max_unavailable", "a number of machines, or a fraction of them", |value| {
        value.as_float().or_else(|| value.as_integer().map(|n| n as f64)).filter(|n| *n > 0.0).ok_or(Refused::Type)
    });
    if at_once.is_some_and(|at_once| at_once != 1.0) {
        let why = "a rolling deploy replaces one machine at a time, as with 1";
        f.not_honoured(section.span_of("max_unavailable"), section.key("max_unavailable"), why);
    }
    let timeout = section.read(f, "wait_timeout", "a duration like \"5m\"", |value| match value {
        Value::String(_) => value::duration_ms(1)(value).and_then(|ms| if ms > 0 { Ok(ms) } else { Err(Refused::Type) }),
        _ => Err(Refused::Type),
    });
    section.finish(f, LATER_DEPLOY);
    Deploy { strategy, wait_timeout_ms: timeout.unwrap_or(Deploy::default().wait_timeout_ms) }
}

fn read_env<'t>(f: &mut Findings<'t>, section: Section<'t>) -> BTreeMap<String, String> {
    let mut env = BTreeMap::new();
    for entry in section.entries(f) {
        if entry.name.is_empty() || entry.name.contains(['=', '\0']) {
            f.mistake(entry.key_span, format!("{:?} cannot be the name of an environment variable", entry.name));
        } else if let Some(prefix) = reserved_prefix(entry.name) {
            f.mistake(entry.key_span, format!("{}: names that begin with {prefix} are set by the platform", entry.key));
        } else if let Some(text) =
            read_item(f, entry.item, &entry.key, entry.key_span, "text", value::text_or_scalar)
        {
            env.insert(entry.name.to_owned(), text);
        }
    }
    env
}

fn read_args<'t>(f: &mut Findings<'t>, section: Section<'t>) -> BTreeMap<String, String> {
    let mut args = BTreeMap::new();
    for entry in section.entries(f) {
        if entry.name.is_empty() || entry.name.contains(['=', '\0']) {
            f.mistake(entry.key_span, format!("{:?} cannot be the name of a build argument", entry.name));
        } else if let Some(text) =
            read_item(f, entry.item, &entry.key, entry.key_span, "text", value::text_or_scalar)
        {
            args.insert(entry.name.to_owned(), text);
        }
    }
    args
}

fn read_processes<'t>(f: &mut Findings<'t>, section: Section<'t>) -> BTreeMap<String, String> {
    let mut processes = BTreeMap::new();
    for entry in section.entries(f) {
        if !procfile::valid_group(entry.name) {
            let rule = "a process group's name has 1 to 63 letters, digits, - and _";
            f.mistake(entry.key_span, format!("{}: {rule}", entry.key));
            continue;
        }
        // An empty command is Fly's way to say "the image's own".
        let command = read_item(f, entry.item, &entry.key, entry.key_span, "a command", |value| {
            let command = value::text(value)?;
            if !command.trim().is_empty() {
                words::split(&command).map_err(|error| Refused::Because(format!("not a command: {error}")))?;
            }
            Ok(command)
        });
        if let Some(command) = command {
            processes.insert(entry.name.to_owned(), command);
        }
    }
    processes
}

fn read_vm<'t>(f: &mut Findings<'t>, mut section: Section<'t>) -> Vm {
    const KINDS: &[(&str, CpuKind)] = &[("shared", CpuKind::Shared), ("performance", CpuKind::Performance)];
    let sizes = GUEST_SIZES.iter().map(|size| size.name).collect::<Vec<_>>().join(", ");
    let (least, most) = (units::MEMORY_MB.start(), units::MEMORY_MB.end());
    let memory = format!("MB or a size like \"1gb\", from {least} MB to {most} MB");
    let vm = Vm {
        size: section.read(f, "size", &format!("one of {sizes}"), |value| {
            let name = value.as_str().ok_or(Refused::Type)?;
            GuestSize::named(name).map(|size| size.name.to_owned()).ok_or(Refused::Type)
        }),
        memory_mb: section.read(f, "memory", &memory, read_memory).or(section.read(f, "memory_mb", &memory, read_memory)),
        cpus: section.read(
            f,
            "cpus",
            &format!("a number from {} to {}", units::CPUS.start(), units::CPUS.end()),
            value::number(units::CPUS),
        ),
        cpu_kind: section.read(f, "cpu_kind", "\"shared\" or \"performance\"", value::one_of(KINDS)),
        processes: read_groups(f, &mut section),
    };
    section.finish(f, LATER_VM);
    vm
}

fn read_memory(value: &Value) -> Result<u32, Refused> {
    let mb = match value {
        Value::String(text) => units::parse_size_mb(text.value()),
        Value::Integer(mb) => u32::try_from(*mb.value()).ok(),
        _ => None,
    };
    mb.filter(|mb| units::MEMORY_MB.contains(mb)).ok_or(Refused::Type)
}

fn read_restart<'t>(f: &mut Findings<'t>, mut section: Section<'t>) -> Option<Restart> {
    const POLICIES: &[(&str, RestartWhen)] = &[
        ("always", RestartWhen::Always),
        ("never", RestartWhen::No),
        ("no", RestartWhen::No),
        ("on-failure", RestartWhen::OnFailure),
        ("on-fail", RestartWhen::OnFailure),
    ];
    let policy = section.read(f, "policy", "\"always\", \"never\" or \"on-failure\"", value::one_of(POLICIES));
    let expected = format!("a number up to {MAX_RETRIES}");
    let retries = section
        .read(f, "retries", &expected, value::number(0..=MAX_RETRIES))
        .or(section.read(f, "max_retries", &expected, value::number(0..=MAX_RETRIES)));
    let processes = read_groups(f, &mut section);
    if policy.is_none() && f.mistakes.is_empty() {
        f.mistake(section.span.clone(), format!("{} is missing", section.key("policy")));
    }
    section.finish(f, &[]);
    Some(Restart { policy: policy?, retries, processes })
}

fn read_mount<'t>(f: &mut Findings<'t>, mut section: Section<'t>) -> Option<MountConfig> {
    let (span, key) = (section.span.clone(), section.key(""));
    let source = section.read(f, "source", "a volume's name", |value| {
        let name = value.as_str().ok_or(Refused::Type)?;
        if is_volume_name(name) { Ok(name.to_owned()) } else { Err(Refused::Because(VOLUME_NAME_RULE.into())) }
    });
    let destination = section.read(f, "destination", "an absolute path", |value| {
        let path = value.as_str().ok_or(Refused::Type)?;
        mount_path(path).map(|()| path.to_owned()).map_err(|why| Refused::Because(why.into()))
    });
    let size = format!("a size like \"10gb\", or a number of GB, from {SIZE_MIN_GB} to {SIZE_MAX_GB}");
    let initial_size_gb = section.read(f, "initial_size", &size, read_gb);
    let snapshot_retention = section.read(f, "snapshot_retention", "days from 1 to 60", value::number(SNAPSHOT_RETENTION));
    let scheduled_snapshots = section.read(f, "scheduled_snapshots", "true or false", value::truth);
    let encrypted = section.read(f, "encrypted", "true or false", value::truth);
    let percents = format!("a percentage from {} to {}", EXTEND_PERCENT.start(), EXTEND_PERCENT.end());
    let percent = section.read(f, "auto_extend_size_threshold", &percents, value::number(EXTEND_PERCENT));
    let add_gb = section.read(f, "auto_extend_size_increment", &size, read_gb);
    let limit_gb = section.read(f, "auto_extend_size_limit", &size, read_gb);
    let extend = AutoExtend::read(percent, add_gb, limit_gb).unwrap_or_else(|_| {
        // Those that are there are right, each for itself.
        f.mistake(span.clone(), format!("{key}auto_extend_size_threshold, _increment and _limit are needed together"));
        None
    });
    let processes = read_groups(f, &mut section);
    section.finish(f, LATER_MOUNTS);
    if (source.is_none() || destination.is_none()) && f.mistakes.is_empty() {
        f.mistake(span, format!("{key}source and {key}destination are needed"));
    }
    let (source, destination) = (source?, destination?);
    Some(MountConfig { source, destination, initial_size_gb, snapshot_retention, scheduled_snapshots, encrypted, extend, processes })
}

fn read_gb(value: &Value) -> Result<u32, Refused> {
    let gb = match value {
        Value::Integer(gb) => u32::try_from(*gb.value()).ok(),
        Value::String(text) => match text.value().trim().parse() {
            Ok(gb) => Some(gb),
            Err(_) => units::parse_size_mb(text.value()).map(|mb| mb.div_ceil(1024)),
        },
        _ => None,
    };
    gb.filter(|gb| (SIZE_MIN_GB..=SIZE_MAX_GB).contains(gb)).ok_or(Refused::Type)
}

/// The machines of a group can have one volume each, as on Fly.
fn check_mounts(f: &mut Findings<'_>, config: &AppConfig, document: &Document<&str>) {
    for group in config.process_groups() {
        let names: Vec<_> =
            config.mounts.iter().filter(|mount| config.belongs(&mount.processes, group)).map(|m| m.source.as_str()).collect();
        if names.len() > 1 {
            let span = document.get("mounts").and_then(|item| item.span());
            f.mistake(span, format!("mounts: the machines of {group} can have one volume each, not {}", names.join(" and ")));
        }
    }
}

/// `processes` of a service, check, size or restart policy.
pub(super) fn read_groups<'t>(f: &mut Findings<'t>, section: &mut Section<'t>) -> Vec<String> {
    let groups = section.read(f, "processes", "a list of process groups", value::texts).unwrap_or_default();
    for group in &groups {
        let (span, key) = (section.span_of("processes"), section.key("processes"));
        f.group_uses.push(GroupUse { span, key, group: group.clone() });
    }
    groups
}

/// Every group that is named somewhere must be in `[processes]`.
fn check_groups(f: &mut Findings<'_>, config: &AppConfig) {
    let known = config.process_groups();
    for GroupUse { span, key, group } in std::mem::take(&mut f.group_uses) {
        if !known.contains(&group.as_str()) {
            let hint = if config.processes.is_empty() {
                format!("without [processes] there is only {DEFAULT_GROUP:?}")
            } else {
                format!("[processes] has {}", known.join(", "))
            };
            f.mistake(span, format!("{key} names the process group {group:?}, which does not exist: {hint}"));
        }
    }
}

/// The edge's ports 80 and 443 lead to one port of an app.
fn check_edge_ports(f: &mut Findings<'_>, config: &AppConfig, document: &Document<&str>) {
    let all: Vec<&HttpService> = config.http_service.iter().chain(&config.services).collect();
    if all.len() > 1 {
        let span = document.get("services").and_then(|item| match item.as_array_of_tables() {
            Some(tables) => tables.iter().last().and_then(|table| table.span()),
            None => item.span(),
        });
        let ports: Vec<String> = all.iter().map(|service| service.internal_port.to_string()).collect();
        let message = format!(
            "ports 80 and 443 can lead to one internal port only, these services name {}; keep one of them",
            ports.join(" and ")
        );
        f.mistake(span, message);
    }
}

/// A value that has its own parser with its own message.
fn parsed<T: FromStr>(value: &Value) -> Result<T, Refused>
where
    T::Err: std::fmt::Display,
{
    let text = value.as_str().ok_or(Refused::Type)?;
    text.parse().map_err(|error: T::Err| Refused::Because(error.to_string()))
}

/// A relative path that stays inside the app's directory.
pub(super) fn inner_path(value: &Value) -> Result<String, Refused> {
    let path = value::filled(value)?;
    if path.contains("://") {
        return Err(Refused::Because("it must be a path; a URL is not fetched".into()));
    }
    let inside = !path.starts_with('/') && path.split('/').all(|part| part != "..");
    if inside { Ok(path) } else { Err(Refused::Because("the path must stay inside the app's directory".into())) }
}
