//! Reading `[http_service]`, `[[services]]` and `[checks]`.

use super::parse::read_groups;
use super::section::{Findings, Refused, Section, value};
use super::{DEFAULT_PORT, HttpService, NamedCheck, ServiceCheck, words};
use crate::machine::{AutoStop, CheckKind, Concurrency, ConcurrencyKind, MAX_SCRIPT_CHECKS, is_script, is_server_name};
use std::collections::BTreeMap;
use toml_edit::Value;

const LATER_HTTP: &[(&str, &str)] = &[
    ("tls_options", "the edge offers TLS 1.2 and 1.3 with h2 and http/1.1"),
    ("http_options", "the edge passes responses on as they are, with its own timeouts"),
    ("machine_checks", "checks that run a machine are not available"),
    ("replay_cache", "replays are not available"),
];
const LATER_TCP: &[(&str, &str)] = &[("machine_checks", "checks that run a machine are not available")];
const LATER_PORT: &[(&str, &str)] = &[
    ("tls_options", "the edge offers TLS 1.2 and 1.3 with h2 and http/1.1"),
    ("http_options", "the edge passes responses on as they are, with its own timeouts"),
    ("proxy_proto_options", "the PROXY protocol is not spoken"),
];
const LATER_NAMED: &[(&str, &str)] = &[("kind", "all checks of this kind inform only")];
/// Shortest interval and timeout of a check: less would be load, not a check.
pub(super) const SHORTEST_CHECK_MS: u64 = 100;
/// Methods that a check may use.
pub(super) const METHODS: &[&str] = &["GET", "HEAD", "POST", "PUT", "OPTIONS"];
/// Longest path that a check asks for.
const MAX_PATH_BYTES: usize = 2048;
const PORT: &str = "a port from 1 to 65535";
pub(super) const CHECK_NAME_RULE: &str =
    "a check's name has 1 to 63 letters, digits, - and _, and does not begin like that of a service's check";
pub(super) const MAX_LIMIT: u32 = 1_000_000;
pub(super) const MAX_MIN_RUNNING: u32 = 1000;

#[derive(Clone, Copy)]
struct Times {
    interval_ms: u64,
    timeout_ms: u64,
    grace_period_ms: u64,
}

/// Fly's defaults for checks that do not name them.
const TIMES: Times = Times { interval_ms: 15_000, timeout_ms: 2_000, grace_period_ms: 1_000 };

pub(super) fn read_http_service<'t>(f: &mut Findings<'t>, mut section: Section<'t>) -> HttpService {
    let mut service = read_common(f, &mut section);
    if let Some(force) = section.read(f, "force_https", "true or false", value::truth) {
        service.force_https = force;
    }
    for check in section.sections(f, "checks") {
        service.checks.push(read_http_check(f, check));
    }
    section.finish(f, LATER_HTTP);
    service
}

/// `None` when it is not a service that the edge can serve; that has been reported then.
pub(super) fn read_tcp_service<'t>(f: &mut Findings<'t>, mut section: Section<'t>) -> Option<HttpService> {
    let protocol = section.read(f, "protocol", "\"tcp\" or \"udp\"", value::one_of(&[("tcp", true), ("udp", false)]));
    let mut service = read_common(f, &mut section);
    let mut ports = Vec::new();
    for port in section.sections(f, "ports") {
        ports.push(read_port(f, port));
    }
    for mut check in section.sections(f, "tcp_checks") {
        let times = read_times(f, &mut check);
        check.finish(f, &[]);
        service.checks.push(with_times(CheckKind::Tcp, times));
    }
    for check in section.sections(f, "http_checks") {
        service.checks.push(read_http_check(f, check));
    }
    let (key, span) = (section.key("ports"), section.span.clone());
    section.finish(f, LATER_TCP);
    if protocol == Some(false) {
        f.not_honoured(span, key.replace(".ports", ".protocol"), "the edge serves HTTP and HTTPS only, no udp");
        return None;
    }
    let http = ports.iter().any(|port| port.number == Some(80) && port.handlers == ["http"]);
    let https = ports.iter().any(|port| port.number == Some(443) && port.handlers == ["tls", "http"]);
    if !(http && https && ports.len() == 2) {
        let why = "the edge serves port 80 with handlers [\"http\"] and port 443 with handlers [\"tls\", \"http\"], always both";
        f.not_honoured(span, key, why);
        return None;
    }
    service.force_https = ports.iter().any(|port| port.number == Some(80) && port.force_https);
    Some(service)
}

struct Port {
    number: Option<u16>,
    handlers: Vec<String>,
    force_https: bool,
}

fn read_port<'t>(f: &mut Findings<'t>, mut section: Section<'t>) -> Port {
    let handlers = section.read(f, "handlers", "a list of http, tls, pg_tls and proxy_proto", |value| {
        let handlers = value::texts(value)?;
        let known = |handler: &String| ["http", "tls", "pg_tls", "proxy_proto", "edge_http"].contains(&handler.as_str());
        if handlers.iter().all(known) { Ok(handlers) } else { Err(Refused::Type) }
    });
    let number = section.read(f, "port", "a port from 1 to 65535", value::port);
    let force_https = section.read(f, "force_https", "true or false", value::truth);
    let start = section.read(f, "start_port", "a port from 1 to 65535", value::port);
    let end = section.read(f, "end_port", "a port from 1 to 65535", value::port);
    if number.is_none() && start.is_none() && end.is_none() && f.mistakes.is_empty() {
        f.mistake(section.span.clone(), format!("{} is missing", section.key("port")));
    }
    section.finish(f, LATER_PORT);
    Port { number, handlers: handlers.unwrap_or_default(), force_https: force_https.unwrap_or(false) }
}

/// What `[http_service]` and `[[services]]` have in common.
fn read_common<'t>(f: &mut Findings<'t>, section: &mut Section<'t>) -> HttpService {
    let default = HttpService::default();
    let auto_stop = section.read(f, "auto_stop_machines", "\"off\", \"stop\" or \"suspend\"", |value| match value {
        Value::Boolean(truth) => Ok(if *truth.value() { AutoStop::Stop } else { AutoStop::Off }),
        Value::String(text) => match text.value().as_str() {
            "off" => Ok(AutoStop::Off),
            "stop" => Ok(AutoStop::Stop),
            "suspend" => Ok(AutoStop::Suspend),
            _ => Err(Refused::Type),
        },
        _ => Err(Refused::Type),
    });
    let min = format!("a number up to {MAX_MIN_RUNNING}");
    let min_machines_running = section.read(f, "min_machines_running", &min, value::number(0..=MAX_MIN_RUNNING));
    let max = format!("a number from 1 to {MAX_MIN_RUNNING}");
    let max_machines_running = section.read(f, "max_machines_running", &max, value::number(1..=MAX_MIN_RUNNING));
    if let (Some(min), Some(max)) = (min_machines_running, max_machines_running)
        && min > max
    {
        f.mistake(section.span_of("max_machines_running"), format!("{} is below min_machines_running", section.key("max_machines_running")));
    }
    HttpService {
        internal_port: section
            .read(f, "internal_port", "a port from 1 to 65535", value::port)
            .unwrap_or(DEFAULT_PORT),
        force_https: false,
        auto_stop_machines: auto_stop.unwrap_or(default.auto_stop_machines),
        auto_start_machines: section
            .read(f, "auto_start_machines", "true or false", value::truth)
            .unwrap_or(default.auto_start_machines),
        min_machines_running: min_machines_running.unwrap_or(default.min_machines_running),
        max_machines_running,
        processes: read_groups(f, section),
        concurrency: section.section(f, "concurrency").map(|limits| read_concurrency(f, limits)).unwrap_or_default(),
        checks: Vec::new(),
    }
}

fn read_concurrency<'t>(f: &mut Findings<'t>, mut section: Section<'t>) -> Concurrency {
    const KINDS: &[(&str, ConcurrencyKind)] =
        &[("connections", ConcurrencyKind::Connections), ("requests", ConcurrencyKind::Requests)];
    let default = Concurrency::default();
    let limit = format!("a number from 1 to {MAX_LIMIT}");
    let kind = section.read(f, "type", "\"connections\" or \"requests\"", value::one_of(KINDS));
    if kind == Some(ConcurrencyKind::Connections) {
        f.note(section.span_of("type"), section.key("type"), "limits count requests that are under way");
    }
    let kind = kind.unwrap_or(default.kind);
    let soft = section.read(f, "soft_limit", &limit, value::number(1..=MAX_LIMIT));
    let hard_limit = section.read(f, "hard_limit", &limit, value::number(1..=MAX_LIMIT));
    if let (Some(soft), Some(hard)) = (soft, hard_limit)
        && soft > hard
    {
        let message = format!("{} is {soft}, more than hard_limit, which is {hard}", section.key("soft_limit"));
        f.mistake(section.span_of("soft_limit"), message);
    }
    section.finish(f, &[]);
    let soft_limit = soft.unwrap_or(hard_limit.map_or(default.soft_limit, |hard| default.soft_limit.min(hard)));
    Concurrency { kind, soft_limit, hard_limit }
}

fn read_http_check<'t>(f: &mut Findings<'t>, mut section: Section<'t>) -> ServiceCheck {
    let times = read_times(f, &mut section);
    let kind = read_http_kind(f, &mut section);
    section.finish(f, &[]);
    with_times(kind, times)
}

fn read_http_kind<'t>(f: &mut Findings<'t>, section: &mut Section<'t>) -> CheckKind {
    let method = section.read(f, "method", &format!("one of {}", METHODS.join(", ")), |value| {
        let method = value.as_str().ok_or(Refused::Type)?.to_ascii_uppercase();
        if METHODS.contains(&method.as_str()) { Ok(method) } else { Err(Refused::Type) }
    });
    let path = section.read(f, "path", "a path that begins with /", |value| {
        let path = value::text(value)?;
        if is_path(&path) { Ok(path) } else { Err(Refused::Type) }
    });
    let https = section.read(f, "protocol", "\"http\" or \"https\"", value::one_of(&[("http", false), ("https", true)]));
    let tls_server_name = section.read(f, "tls_server_name", "the name of a server", |value| {
        let name = value::text(value)?;
        if is_server_name(&name) { Ok(name) } else { Err(Refused::Type) }
    });
    let tls_skip_verify = section.read(f, "tls_skip_verify", "true or false", value::truth);
    let mut headers = BTreeMap::new();
    if let Some(section) = section.section(f, "headers") {
        for entry in section.entries(f) {
            if !is_header_name(entry.name) {
                f.mistake(entry.key_span, format!("{:?} cannot be the name of a header", entry.name));
                continue;
            }
            let text = super::section::read_item(f, entry.item, &entry.key, entry.key_span, "one line of text", |value| {
                let text = value::text(value)?;
                if is_header_value(&text) { Ok(text) } else { Err(Refused::Type) }
            });
            headers.extend(text.map(|text| (entry.name.to_owned(), text)));
        }
    }
    CheckKind::Http {
        method: method.unwrap_or_else(|| "GET".into()),
        path: path.unwrap_or_else(|| "/".into()),
        headers,
        https: https == Some(true),
        tls_server_name,
        tls_skip_verify: tls_skip_verify.unwrap_or(false),
    }
}

/// One text, split into words as a shell would, or the words themselves.
fn read_script<'t>(f: &mut Findings<'t>, section: &mut Section<'t>) -> Option<CheckKind> {
    let command = section.read(f, "command", "a command, as one text or a list of its words", |value| {
        let command = match value.as_array() {
            Some(words) => words.iter().map(value::text).collect::<Result<Vec<String>, _>>()?,
            None => words::split(&value::text(value)?).map_err(|_| Refused::Type)?,
        };
        if is_script(&command) { Ok(command) } else { Err(Refused::Type) }
    });
    command.map(|command| CheckKind::Script { command })
}

/// What the request line of a check may ask for.
pub fn is_path(path: &str) -> bool {
    path.starts_with('/') && path.len() <= MAX_PATH_BYTES && path.bytes().all(|b| b.is_ascii_graphic())
}

pub(super) fn is_header_name(name: &str) -> bool {
    let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    !name.is_empty() && name.bytes().all(token)
}

pub(super) fn is_header_value(text: &str) -> bool {
    !text.chars().any(char::is_control)
}

/// A check's name is shown, stands in facts, and is not one that a service's check has.
pub(super) fn is_check_name(name: &str) -> bool {
    super::procfile::valid_group(name) && !name.starts_with("servicecheck-")
}

fn read_times<'t>(f: &mut Findings<'t>, section: &mut Section<'t>) -> Times {
    let long_enough = |value: &Value| {
        let ms = value::duration_ms(1)(value)?;
        if ms >= SHORTEST_CHECK_MS { Ok(ms) } else { Err(Refused::Type) }
    };
    let expected = "milliseconds or a duration like \"10s\", at least 100ms";
    Times {
        interval_ms: section.read(f, "interval", expected, long_enough).unwrap_or(TIMES.interval_ms),
        timeout_ms: section.read(f, "timeout", expected, long_enough).unwrap_or(TIMES.timeout_ms),
        grace_period_ms: section
            .read(f, "grace_period", "milliseconds or a duration like \"10s\"", value::duration_ms(1))
            .unwrap_or(TIMES.grace_period_ms),
    }
}

fn with_times(kind: CheckKind, times: Times) -> ServiceCheck {
    let Times { interval_ms, timeout_ms, grace_period_ms } = times;
    ServiceCheck { kind, interval_ms, timeout_ms, grace_period_ms }
}

pub(super) fn read_named_checks<'t>(f: &mut Findings<'t>, section: Section<'t>) -> BTreeMap<String, NamedCheck> {
    let (mut checks, mut scripts) = (BTreeMap::new(), 0);
    for entry in section.entries(f) {
        if !is_check_name(entry.name) {
            f.mistake(entry.key_span, format!("{}: {CHECK_NAME_RULE}", entry.key));
            continue;
        }
        let Some(table) = entry.item.as_table_like() else {
            f.mistake(entry.key_span, format!("{} must be a table, found {}", entry.key, super::section::describe(entry.item)));
            continue;
        };
        let mut check = Section::new(table, entry.key.clone(), entry.key_span.clone());
        let expected = "\"tcp\", \"http\" or \"script\"";
        let types = &[("tcp", "tcp"), ("http", "http"), ("script", "script")];
        let kind = check.read(f, "type", expected, value::one_of(types));
        let times = read_times(f, &mut check);
        let processes = read_groups(f, &mut check);
        let (port, what) = match kind {
            Some("script") => (Some(0), read_script(f, &mut check)),
            Some("http") => (check.read(f, "port", PORT, value::port), Some(read_http_kind(f, &mut check))),
            _ => (check.read(f, "port", PORT, value::port), Some(CheckKind::Tcp)),
        };
        for name in ["type", if kind == Some("script") { "command" } else { "port" }] {
            if table.get(name).is_none() {
                f.mistake(entry.key_span.clone(), format!("{}.{name} is missing", entry.key));
            }
        }
        check.finish(f, LATER_NAMED);
        scripts += usize::from(kind == Some("script"));
        if scripts > MAX_SCRIPT_CHECKS {
            f.mistake(entry.key_span, format!("{}: at most {MAX_SCRIPT_CHECKS} checks are scripts", entry.key));
            continue;
        }
        if let (Some(port), Some(what)) = (port, what) {
            checks.insert(entry.name.to_owned(), NamedCheck { port, check: with_times(what, times), processes });
        }
    }
    checks
}
