//! From a machine's configuration in Fly's JSON to what a host is asked to run.

use super::programs::{self, AskedContainer};
use super::{Fields, disk};
use crate::failure::Failure;
use dunlin_model::config::{is_path, words};
use dunlin_model::config::units::{CPUS, GuestSize, MAX_SWAP_MB, MEMORY_MB};
use dunlin_model::disk::{MachineRootfs, Persist, TempDir};
use dunlin_model::files::{MAX_FILES, check_files};
use dunlin_model::machine::{MAX_SCRIPT_CHECKS, is_script, is_server_name};
use dunlin_model::{
    AppName, AutoStop, Check, CheckKind, Concurrency, ConcurrencyKind, CpuKind, Guest, ImageRef, MachineFile, MachineId, MachineSpec, MachineVersion,
    Mount, OrgName,
    Program, RestartPolicy, RestartWhen, Schedule, Service, StopConfig,
};
use serde_json::Value;
use std::collections::BTreeMap;

/// Of a configuration: it is kept with the last ones of the machine in one row.
const MAX_CONFIG_BYTES: usize = 24 * 1024;
const MAX_ITEMS: usize = 64;
const MAX_KEY_BYTES: usize = 128;
const MAX_VALUE_BYTES: usize = 4096;
const MAX_STOP_MS: u64 = 300_000;
const MAX_CHECK_MS: u64 = 3_600_000;
const SHORTEST_CHECK_MS: u64 = 100;
/// As in Fly's files.
const CHECK_INTERVAL_MS: u64 = 15_000;
const CHECK_TIMEOUT_MS: u64 = 2_000;
const CHECK_GRACE_MS: u64 = 1_000;
/// Whether the app listens is asked for often: it costs nothing, and until it does no request is sent to it.
const LISTENS_INTERVAL_MS: u64 = 1_000;
/// Machines that one stands in for.
const MAX_WATCHED: usize = 16;
const SIGNALS: &[&str] = &["SIGHUP", "SIGINT", "SIGQUIT", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGTERM"];
const METHODS: &[&str] = &["GET", "HEAD", "POST", "PUT", "OPTIONS"];

const LATER: &[(&str, &str)] = &[
    ("cache_drive", "there are no cache drives"),
    ("dns", "names in machines are not configurable"),
    ("metrics", "metrics of machines are not collected"),
    ("spot", "machines have no prices"),
    ("statics", "files are not served beside the machine"),
];

/// A configuration that was understood, all but its image, which is still a reference.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    pub image: String,
    pub process_group: String,
    entrypoint: Option<Vec<String>>,
    command: Option<Vec<String>>,
    env: BTreeMap<String, String>,
    pub guest: Guest,
    swap_mb: u32,
    files: Vec<MachineFile>,
    services: Vec<Service>,
    checks: Vec<Check>,
    restart: RestartPolicy,
    stop: StopConfig,
    metadata: BTreeMap<String, String>,
    /// The volume's name is not known yet.
    pub mounts: Vec<Mount>,
    auto_destroy: bool,
    schedule: Option<Schedule>,
    pub standbys: Vec<MachineId>,
    processes: Vec<Program>,
    containers: Vec<AskedContainer>,
    rootfs: MachineRootfs,
    temp_dirs: Vec<TempDir>,
}

/// What the configuration does not say.
pub(crate) struct Named<'a> {
    pub org: &'a OrgName,
    pub app: &'a AppName,
    pub release: u32,
    pub secrets_version: u64,
}

impl Asked {
    /// Of its containers, in their order.
    pub fn container_images(&self) -> impl Iterator<Item = &str> {
        self.containers.iter().map(|container| container.image.as_str())
    }

    pub fn spec(self, version: MachineVersion, (image, of_containers): (ImageRef, Vec<ImageRef>), named: &Named<'_>) -> MachineSpec {
        let containers = self.containers.into_iter().zip(of_containers).map(|(asked, image)| asked.with(image)).collect();
        MachineSpec {
            version,
            org: named.org.clone(),
            app: named.app.clone(),
            process_group: self.process_group,
            release: named.release,
            image,
            entrypoint: self.entrypoint,
            command: self.command,
            env: self.env,
            guest: self.guest,
            swap_mb: self.swap_mb,
            files: self.files,
            services: self.services,
            checks: self.checks,
            restart: self.restart,
            stop: self.stop,
            secrets_version: named.secrets_version,
            metadata: self.metadata,
            mounts: self.mounts,
            auto_destroy: self.auto_destroy,
            schedule: self.schedule,
            standbys: self.standbys,
            processes: self.processes,
            containers,
            rootfs: self.rootfs,
            temp_dirs: self.temp_dirs,
            rests: false,
        }
    }
}

/// `config` of a body.
pub(crate) fn read(config: Value) -> Result<Asked, Failure> {
    if config.to_string().len() > MAX_CONFIG_BYTES {
        return Err(Failure::invalid(format!("config is longer than {} KiB", MAX_CONFIG_BYTES / 1024)));
    }
    let mut fields = Fields::of("config", config)?;
    let image = fields.text("image")?;
    for (name, why) in LATER {
        fields.not_honoured(name, why)?;
    }
    let metadata = match fields.object("metadata")? {
        Some(entries) => metadata(texts_of(entries, "config.metadata")?)?,
        None => BTreeMap::new(),
    };
    let process_group = process_group(&metadata)?;
    let Init { entrypoint, command, swap_mb } = init(&mut fields)?;
    let files = files(&mut fields)?;
    let env = env(&mut fields)?;
    let (guest, persist) = guest(&mut fields)?;
    let rootfs = disk::rootfs(&mut fields, persist)?;
    let (services, mut checks) = services(&mut fields)?;
    checks.extend(named_checks(&mut fields)?);
    let restart = restart(&mut fields)?;
    let schedule = schedule(&mut fields, &restart)?;
    let stop = stop(&mut fields)?;
    let (mounts, temp_dirs) = disk::mounts(&mut fields, &guest)?;
    let auto_destroy = fields.take("auto_destroy")?.unwrap_or(false);
    let standbys = standbys(&mut fields, [(!services.is_empty(), "services"), (schedule.is_some(), "schedule"), (auto_destroy, "auto_destroy")])?;
    let processes = programs::processes(&mut fields)?;
    let containers = programs::containers(&mut fields, image.as_deref(), &mounts, &temp_dirs)?;
    disk::check_placed(&temp_dirs, &containers)?;
    programs::check_together(&fields, [(!processes.is_empty(), "processes"), (!containers.is_empty(), "containers")], &[
        (entrypoint.is_some() || command.is_some(), "init"),
        (!files.is_empty(), "files"),
    ])?;
    let image = programs::default_image(&containers).or(image).ok_or_else(|| {
        Failure::invalid("config.image is missing").hint("for example registry.<domain>/<app>:<tag>, or nginx:1.27")
    })?;
    fields.finish()?;
    Ok(Asked {
        image,
        process_group,
        entrypoint,
        command,
        env,
        guest,
        swap_mb,
        files,
        services,
        checks,
        restart,
        stop,
        metadata,
        mounts,
        auto_destroy,
        schedule,
        standbys,
        processes,
        containers,
        rootfs,
        temp_dirs,
    })
}

/// Metadata that may be kept with a machine.
pub(crate) fn metadata(metadata: BTreeMap<String, String>) -> Result<BTreeMap<String, String>, Failure> {
    if metadata.len() > MAX_ITEMS {
        return Err(Failure::invalid(format!("a machine has at most {MAX_ITEMS} keys of metadata")));
    }
    for (key, value) in &metadata {
        let is_plain = !key.is_empty() && key.bytes().all(|b| b.is_ascii_graphic() && b != b'/');
        if !is_plain || key.len() > MAX_KEY_BYTES {
            return Err(Failure::invalid(format!("{key:?} is not a key of metadata"))
                .hint(format!("use 1 to {MAX_KEY_BYTES} visible characters without a slash")));
        }
        if value.len() > MAX_VALUE_BYTES {
            return Err(Failure::invalid(format!("the metadata {key} is longer than {MAX_VALUE_BYTES} bytes")));
        }
    }
    Ok(metadata)
}

fn process_group(metadata: &BTreeMap<String, String>) -> Result<String, Failure> {
    let group = metadata.get("fly_process_group").map_or("app", String::as_str);
    let is_fine = (1..=63).contains(&group.len()) && group.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b));
    if is_fine {
        return Ok(group.to_owned());
    }
    Err(Failure::invalid(format!("config.metadata.fly_process_group cannot be used: {group:?} is not a name"))
        .hint("use 1 to 63 letters, digits, dashes and underscores"))
}

pub(super) fn texts_of(entries: Fields, path: &str) -> Result<BTreeMap<String, String>, Failure> {
    let text = |(name, value): (String, Value)| match value {
        Value::String(text) => Ok((name, text)),
        _ => Err(Failure::invalid(format!("{path}.{name} must be a text"))),
    };
    entries.entries().map(text).collect()
}

#[derive(Default)]
struct Init {
    entrypoint: Option<Vec<String>>,
    command: Option<Vec<String>>,
    swap_mb: u32,
}

/// ENTRYPOINT, CMD and swap.
fn init(fields: &mut Fields) -> Result<Init, Failure> {
    let Some(mut init) = fields.object("init")? else { return Ok(Init::default()) };
    let (entrypoint, command) = command(&mut init)?;
    init.not_honoured("tty", "a machine's program has no terminal")?;
    init.not_honoured("kernel_args", "machines have no kernel of their own")?;
    let swap_mb = init.number("swap_size_mb", 0..=MAX_SWAP_MB)?.unwrap_or(0);
    init.finish()?;
    Ok(Init { entrypoint, command, swap_mb })
}

type Words = Option<Vec<String>>;

/// ENTRYPOINT and CMD; `exec` stands for both.
pub(super) fn command(given: &mut Fields) -> Result<(Words, Words), Failure> {
    let (exec, entrypoint, command) = (given.texts("exec")?, given.texts("entrypoint")?, given.texts("cmd")?);
    match exec {
        Some(_) if entrypoint.is_some() || command.is_some() => {
            Err(given.wrong("exec", "it stands alone, without entrypoint and cmd"))
        }
        Some(exec) => Ok((Some(exec), Some(vec![]))),
        None => Ok((entrypoint, command)),
    }
}

pub(super) fn files(fields: &mut Fields) -> Result<Vec<MachineFile>, Failure> {
    let mut files = vec![];
    for mut given in fields.objects("files", MAX_FILES)? {
        given.not_honoured("image_config", "a file's content is raw_value or the value of secret_name")?;
        files.push(MachineFile {
            guest_path: given.text("guest_path")?.unwrap_or_default(),
            raw_value: given.text("raw_value")?,
            secret_name: given.text("secret_name")?,
            mode: given.take("mode")?,
        });
        given.finish()?;
    }
    check_files(&files).map_err(|why| Failure::invalid(fields.path(&why)))?;
    Ok(files)
}

pub(super) fn env(fields: &mut Fields) -> Result<BTreeMap<String, String>, Failure> {
    let Some(entries) = fields.object("env")? else { return Ok(BTreeMap::new()) };
    let path = fields.path("env");
    let env = texts_of(entries, &path)?;
    match env.iter().find(|(name, value)| !is_variable(name) || value.contains('\0')) {
        Some((name, _)) => Err(Failure::invalid(format!("{path}.{name} cannot be used"))
            .hint("a name has no `=` and does not begin with FLY_, and no text has a NUL character")),
        None => Ok(env),
    }
}

/// A name that a machine's configuration may give a variable.
pub(super) fn is_variable(name: &str) -> bool {
    !name.is_empty() && !name.contains(['=', '\0']) && !name.starts_with("FLY_")
}

/// And what of it is said of the root file system.
fn guest(fields: &mut Fields) -> Result<(Guest, Option<Persist>), Failure> {
    let size = fields.text("size")?;
    let mut guest = match &size {
        None => Guest::default(),
        Some(name) => GuestSize::named(name).map(GuestSize::guest).ok_or_else(|| {
            let names: Vec<_> = dunlin_model::config::units::GUEST_SIZES.iter().map(|size| size.name).collect();
            fields.wrong("size", &format!("{name:?} is none of {}", names.join(", ")))
        })?,
    };
    let Some(mut given) = fields.object("guest")? else { return Ok((guest, None)) };
    for (name, why) in [
        ("gpu_kind", "hosts have no GPUs to give"),
        ("gpus", "hosts have no GPUs to give"),
        ("kernel_args", "machines have no kernel of their own"),
        ("host_dedication_id", "hosts are not dedicated"),
    ] {
        given.not_honoured(name, why)?;
    }
    let persist = disk::persist(&mut given, "persist_rootfs")?;
    if let Some(kind) = given.take::<CpuKind>("cpu_kind")? {
        guest.cpu_kind = kind;
    }
    guest.cpus = given.number("cpus", CPUS)?.unwrap_or(guest.cpus);
    guest.memory_mb = given.number("memory_mb", MEMORY_MB)?.unwrap_or(guest.memory_mb);
    given.finish()?;
    Ok((guest, persist))
}

fn services(fields: &mut Fields) -> Result<(Vec<Service>, Vec<Check>), Failure> {
    let no_autostart = fields.take::<bool>("disable_machine_autostart")?.unwrap_or(false);
    let (mut services, mut checks) = (vec![], vec![]);
    for mut given in fields.objects("services", 1)? {
        match given.text("protocol")?.as_deref() {
            None | Some("tcp") => {}
            Some(other) => return Err(given.wrong("protocol", &format!("the edge serves no {other}"))),
        }
        let port = port(&mut given, "internal_port")?.ok_or_else(|| given.wrong("internal_port", "it is missing"))?;
        given.not_honoured("force_instance_key", "requests are not bound to a machine by a key")?;
        given.not_honoured("force_instance_description", "requests are not bound to a machine by a key")?;
        let service = Service {
            internal_port: port,
            force_https: ports(&mut given)?,
            autostart: given.take("autostart")?.unwrap_or(true) && !no_autostart,
            autostop: autostop(&mut given)?,
            min_machines_running: given.number("min_machines_running", 0..=1000)?.unwrap_or(0),
            max_machines_running: given.number("max_machines_running", 1..=1000)?,
            concurrency: concurrency(&mut given)?,
        };
        for (n, mut check) in given.objects("checks", MAX_ITEMS)?.into_iter().enumerate() {
            let (to, kind, times) = check_of(&mut check, Some(port))?;
            check.finish()?;
            checks.push(to_check(format!("servicecheck-{n:02}-{}-{to}", kind.as_str()), to, kind, times, true));
        }
        if checks.is_empty() {
            let times = [LISTENS_INTERVAL_MS, CHECK_TIMEOUT_MS, 0];
            checks.push(to_check(format!("servicecheck-listens-{port}"), port, CheckKind::Tcp, times, true));
        }
        given.finish()?;
        services.push(service);
    }
    Ok((services, checks))
}

/// Whether HTTP is sent on to HTTPS. The edge serves 80 and 443 to every service, and no other port.
fn ports(service: &mut Fields) -> Result<bool, Failure> {
    let mut force_https = false;
    let given = service.objects("ports", 2)?;
    if given.is_empty() {
        return Err(service.wrong("ports", "the edge serves every service; ports 80 and 443 have to be in it"));
    }
    let mut is_http = false;
    for mut port in given {
        let number = port.take::<u16>("port")?;
        let handlers = port.texts("handlers")?.unwrap_or_default();
        let handlers: Vec<_> = handlers.iter().map(String::as_str).collect();
        match (number, &handlers[..]) {
            (Some(80), ["http"]) => is_http = true,
            (Some(443), ["tls", "http"] | ["http", "tls"]) => {}
            _ => {
                let why = "the edge serves port 80 with the handler http, and port 443 with tls and http";
                return Err(port.wrong("port", why));
            }
        }
        force_https |= port.take::<bool>("force_https")?.unwrap_or(false);
        for name in ["start_port", "end_port", "tls_options", "http_options", "proxy_proto_options"] {
            port.not_honoured(name, "the edge does not know it")?;
        }
        port.finish()?;
    }
    // Without port 80, nothing is to be had over HTTP but the way to HTTPS.
    Ok(force_https || !is_http)
}

fn autostop(service: &mut Fields) -> Result<AutoStop, Failure> {
    match service.raw("autostop") {
        None => Ok(AutoStop::Off),
        Some(Value::String(nothing)) if nothing.is_empty() => Ok(AutoStop::Off),
        Some(given) => serde_json::from_value(given)
            .map_err(|_| service.wrong("autostop", "use \"off\", \"stop\", \"suspend\", false or true")),
    }
}

fn concurrency(service: &mut Fields) -> Result<Concurrency, Failure> {
    const MOST: u32 = 1_000_000;
    let default = Concurrency::default();
    let Some(mut given) = service.object("concurrency")? else { return Ok(default) };
    let concurrency = Concurrency {
        kind: given.take::<ConcurrencyKind>("type")?.unwrap_or(default.kind),
        soft_limit: given.number("soft_limit", 0..=MOST)?.filter(|limit| *limit != 0).unwrap_or(default.soft_limit),
        hard_limit: given.number("hard_limit", 0..=MOST)?.filter(|limit| *limit != 0),
    };
    given.finish()?;
    Ok(concurrency)
}

fn named_checks(fields: &mut Fields) -> Result<Vec<Check>, Failure> {
    let Some(entries) = fields.object("checks")? else { return Ok(vec![]) };
    let entries: Vec<_> = entries.entries().collect();
    if entries.len() > MAX_ITEMS {
        return Err(fields.wrong("checks", &format!("a machine has at most {MAX_ITEMS}")));
    }
    let mut checks = Vec::new();
    for (name, value) in entries {
        let is_fine = (1..=63).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
        if !is_fine || name.starts_with("servicecheck-") {
            return Err(fields.wrong("checks", &format!("{name:?} is not a name for a check")));
        }
        let mut check = Fields::of(&format!("config.checks.{name}"), value)?;
        let (port, kind, times) = match script(&mut check)? {
            Some(command) => (0, CheckKind::Script { command }, times(&mut check)?),
            None => check_of(&mut check, None)?,
        };
        check.finish()?;
        checks.push(to_check(name, port, kind, times, false));
    }
    if checks.iter().filter(|check| matches!(check.kind, CheckKind::Script { .. })).count() > MAX_SCRIPT_CHECKS {
        return Err(fields.wrong("checks", &format!("at most {MAX_SCRIPT_CHECKS} of a machine are scripts")));
    }
    Ok(checks)
}

fn to_check(name: String, port: u16, kind: CheckKind, times: [u64; 3], gates_routing: bool) -> Check {
    let [interval_ms, timeout_ms, grace_period_ms] = times;
    Check { name, port, kind, interval_ms, timeout_ms, grace_period_ms, gates_routing }
}

/// Interval, timeout and grace period in milliseconds.
fn times(check: &mut Fields) -> Result<[u64; 3], Failure> {
    let at_least = |ms: Option<u64>, default| ms.unwrap_or(default).max(SHORTEST_CHECK_MS);
    Ok([
        at_least(check.duration_ms("interval", MAX_CHECK_MS)?, CHECK_INTERVAL_MS),
        at_least(check.duration_ms("timeout", MAX_CHECK_MS)?, CHECK_TIMEOUT_MS),
        check.duration_ms("grace_period", MAX_CHECK_MS)?.unwrap_or(CHECK_GRACE_MS),
    ])
}

/// What a check of type `script` runs: words, or one text that is split into them as a shell would.
fn script(check: &mut Fields) -> Result<Option<Vec<String>>, Failure> {
    let command: Vec<String> = match check.raw("command") {
        None => vec![],
        Some(Value::String(text)) => words::split(&text)
            .map_err(|error| check.wrong("command", &format!("it cannot be split into words: {error}")))?,
        Some(words) => {
            serde_json::from_value(words).map_err(|_| check.wrong("command", "use a text, or a list of words"))?
        }
    };
    if !check.is("type", "script") {
        let is_plain = command.is_empty();
        return if is_plain { Ok(None) } else { Err(check.wrong("command", "only checks of type script run one")) };
    }
    check.raw("type");
    if check.text("kind")?.is_some_and(|kind| kind != "informational") {
        return Err(check.wrong("kind", "named checks inform"));
    }
    if !is_script(&command) {
        return Err(check.wrong("command", "name a program; a command has at most 64 words and 4 KiB"));
    }
    Ok(Some(command))
}

fn check_of(check: &mut Fields, default_port: Option<u16>) -> Result<(u16, CheckKind, [u64; 3]), Failure> {
    let port = port(check, "port")?.or(default_port).ok_or_else(|| check.wrong("port", "it is missing"))?;
    match check.text("kind")?.as_deref() {
        None => {}
        // A service's checks are asked before a request is sent, others never are.
        Some("readiness") if default_port.is_some() => {}
        Some("informational") if default_port.is_none() => {}
        Some(_) => return Err(check.wrong("kind", "checks of services gate requests, named checks inform")),
    }
    let times = times(check)?;
    let kind = check.text("type")?;
    let (method, path) = (check.text("method")?, check.text("path")?);
    let protocol = check.text("protocol")?;
    let tls_skip_verify = check.take::<bool>("tls_skip_verify")?.unwrap_or(false);
    let tls_server_name = server_name(check)?;
    let headers = headers(check)?;
    let kind = match kind.as_deref() {
        Some("tcp") => CheckKind::Tcp,
        Some("http") => {
            let https = match protocol.as_deref() {
                None | Some("http") => false,
                Some("https") => true,
                Some(_) => return Err(check.wrong("protocol", "use http or https")),
            };
            let (method, path) = request_line(check, method, path)?;
            CheckKind::Http { method, path, headers, https, tls_server_name, tls_skip_verify }
        }
        _ => return Err(check.wrong("type", "use tcp or http")),
    };
    Ok((port, kind, times))
}

/// Whom a certificate has to name.
pub(super) fn server_name(check: &mut Fields) -> Result<Option<String>, Failure> {
    let name = check.text("tls_server_name")?;
    if name.as_deref().is_some_and(|name| !is_server_name(name)) {
        return Err(check.wrong("tls_server_name", "that is no name of a server"));
    }
    Ok(name)
}

/// What a check over HTTP asks for: a method and a path.
pub(super) fn request_line(check: &Fields, method: Option<String>, path: Option<String>) -> Result<(String, String), Failure> {
    let method = method.map_or_else(|| "GET".to_owned(), |method| method.to_uppercase());
    if !METHODS.contains(&method.as_str()) {
        return Err(check.wrong("method", &format!("use one of {}", METHODS.join(", "))));
    }
    let path = path.unwrap_or_else(|| "/".to_owned());
    if !is_path(&path) {
        return Err(check.wrong("path", "it begins with / and has no blanks"));
    }
    Ok((method, path))
}

/// `[{name, values: [one]}]`.
pub(super) fn headers(check: &mut Fields) -> Result<BTreeMap<String, String>, Failure> {
    let mut headers = BTreeMap::new();
    for mut header in check.objects("headers", MAX_ITEMS)? {
        let name = header.text("name")?.unwrap_or_default();
        let values = header.texts("values")?.unwrap_or_default();
        let [value] = &values[..] else { return Err(header.wrong("values", "a header of a check has one value")) };
        let is_name = http::HeaderName::try_from(name.as_str()).is_ok();
        if !is_name || http::HeaderValue::try_from(value.as_str()).is_err() {
            return Err(header.wrong("name", "that is not a header"));
        }
        headers.insert(name, value.clone());
        header.finish()?;
    }
    Ok(headers)
}

pub(super) fn port(fields: &mut Fields, name: &str) -> Result<Option<u16>, Failure> {
    let port = fields.number(name, 0..=65_535)?.filter(|port| *port != 0);
    Ok(port.and_then(|port| u16::try_from(port).ok()))
}

pub(super) fn restart(fields: &mut Fields) -> Result<RestartPolicy, Failure> {
    let default = RestartPolicy::default();
    let Some(mut given) = fields.object("restart")? else { return Ok(default) };
    let policy = match given.text("policy")?.as_deref() {
        None => default.policy,
        Some("no") => RestartWhen::No,
        Some("always") => RestartWhen::Always,
        Some("on-failure") => RestartWhen::OnFailure,
        Some(_) => return Err(given.wrong("policy", "use no, always or on-failure")),
    };
    let max_retries = given.number("max_retries", 0..=1000)?.filter(|n| *n != 0).unwrap_or(default.max_retries);
    given.not_honoured("gpu_bid_price", "hosts have no GPUs to give")?;
    given.finish()?;
    Ok(RestartPolicy { policy, max_retries })
}

/// What else starts or ends a machine does not go with resting until a host is lost.
fn standbys(fields: &mut Fields, others: [(bool, &str); 3]) -> Result<Vec<MachineId>, Failure> {
    let watched = fields.texts("standbys")?.unwrap_or_default();
    if watched.len() > MAX_WATCHED {
        return Err(fields.wrong("standbys", &format!("a machine stands in for at most {MAX_WATCHED} others")));
    }
    if let Some((_, other)) = others.iter().find(|(is_given, _)| *is_given && !watched.is_empty()) {
        return Err(fields.wrong("standbys", &format!("a standby rests until a host is lost, which does not go with config.{other}")));
    }
    let parse = |id: &String| id.parse().map_err(|_| fields.wrong("standbys", &format!("{id:?} is no machine's id")));
    watched.iter().map(parse).collect()
}

fn schedule(fields: &mut Fields, restart: &RestartPolicy) -> Result<Option<Schedule>, Failure> {
    let Some(text) = fields.text("schedule")? else { return Ok(None) };
    let schedule = text.parse::<Schedule>().map_err(|error| fields.wrong("schedule", &error.to_string()))?;
    if restart.policy == RestartWhen::Always {
        return Err(fields.wrong("restart.policy", "a machine with a schedule runs and stops; use no or on-failure"));
    }
    Ok(Some(schedule))
}

fn stop(fields: &mut Fields) -> Result<StopConfig, Failure> {
    let default = StopConfig::default();
    let Some(mut given) = fields.object("stop_config")? else { return Ok(default) };
    let (signal, timeout_ms) = stop_of(&mut given)?;
    given.finish()?;
    Ok(StopConfig { signal, timeout_ms: timeout_ms.unwrap_or(default.timeout_ms) })
}

pub(super) fn stop_of(given: &mut Fields) -> Result<(Option<String>, Option<u64>), Failure> {
    let signal = given.text("signal")?;
    if signal.as_deref().is_some_and(|signal| !SIGNALS.contains(&signal)) {
        return Err(given.wrong("signal", &format!("use one of {}", SIGNALS.join(", "))));
    }
    Ok((signal, given.duration_ms("timeout", MAX_STOP_MS)?.filter(|ms| *ms != 0)))
}
