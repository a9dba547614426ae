//! Several programs in one machine: `processes` and `containers` of a configuration.

use super::{Fields, disk, read};
use crate::failure::Failure;
use dunlin_model::containers::{
    Container, ContainerMount, Dependency, Healthcheck, MAX_HEALTHCHECKS, MAX_PROGRAMS, MachineField, Probe, ProbeTls, Program,
    check_containers, default_container,
};
use dunlin_model::disk::TempDir;
use dunlin_model::{ImageRef, Mount, volume};
use std::collections::BTreeMap;

const MAX_ITEMS: usize = 64;
const MAX_CHECK_S: u32 = 3600;
const MAX_THRESHOLD: u32 = 100;
/// Of a check that does not say, in seconds.
const CHECK_INTERVAL_S: u32 = 10;
const CHECK_TIMEOUT_S: u32 = 2;
const CHECK_GRACE_S: u32 = 1;
const SUCCESS_THRESHOLD: u32 = 1;
const FAILURE_THRESHOLD: u32 = 3;

/// All of it but its image, which is still a reference.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct AskedContainer {
    pub image: String,
    container: Container,
}

impl AskedContainer {
    pub fn with(self, image: ImageRef) -> Container {
        Container { image, ..self.container }
    }

    pub(super) fn mounts(&self) -> &[ContainerMount] {
        &self.container.mounts
    }
}

pub(super) fn processes(fields: &mut Fields) -> Result<Vec<Program>, Failure> {
    let mut processes = vec![];
    for mut given in fields.objects("processes", MAX_PROGRAMS)? {
        let mut program = program(&mut given)?;
        program.only_named_secrets = given.take("ignore_app_secrets")?.unwrap_or(false);
        given.finish()?;
        processes.push(program);
    }
    Ok(processes)
}

pub(super) fn containers(
    fields: &mut Fields,
    image: Option<&str>,
    mounts: &[Mount],
    temp_dirs: &[TempDir],
) -> Result<Vec<AskedContainer>, Failure> {
    let mounted = mounts.iter().map(|mount| mount.name.as_str()).chain(temp_dirs.iter().map(|dir| dir.name.as_str()));
    let mounted: Vec<&str> = mounted.collect();
    let mut containers = vec![];
    for mut given in fields.objects("containers", MAX_PROGRAMS)? {
        let image = given.text("image")?.or(image.map(str::to_owned)).ok_or_else(|| given.wrong("image", "it is missing"))?;
        let mut program = program(&mut given)?;
        // Those that it names are all that it has.
        program.only_named_secrets = !program.secrets.is_empty();
        let (stop_signal, stop_timeout_ms) = match given.object("stop")? {
            Some(mut stop) => {
                let found = read::stop_of(&mut stop)?;
                stop.finish()?;
                found
            }
            None => (None, None),
        };
        let container = Container {
            name: given.text("name")?.unwrap_or_default(),
            image: ImageRef { repository: String::new(), digest: String::new(), tag: None },
            program,
            files: read::files(&mut given)?,
            mounts: mounts_of(&mut given, &mounted)?,
            depends_on: depends_on(&mut given)?,
            healthchecks: healthchecks(&mut given)?,
            restart: read::restart(&mut given)?,
            stop_signal,
            stop_timeout_ms,
        };
        given.finish()?;
        containers.push(AskedContainer { image, container });
    }
    let all: Vec<Container> = containers.iter().map(|asked| asked.container.clone()).collect();
    check_containers(&all).map_err(|why| Failure::invalid(fields.path(&why)))?;
    Ok(containers)
}

/// What does not go together with several programs.
pub(super) fn check_together(
    fields: &Fields,
    [processes, containers]: [(bool, &str); 2],
    others: &[(bool, &str)],
) -> Result<(), Failure> {
    if processes.0 && containers.0 {
        return Err(fields.wrong("processes", "the machine has containers, each with a program of its own"));
    }
    for (is_given, name) in others.iter().filter(|(is_given, _)| *is_given) {
        if containers.0 {
            return Err(fields.wrong(name, "the machine has containers; say it of those that are meant"));
        }
        if processes.0 && *name == "init" && *is_given {
            return Err(fields.wrong(name, "the machine has processes, each with a command of its own"));
        }
    }
    Ok(())
}

/// That of the container which is meant where none is named.
pub(super) fn default_image(containers: &[AskedContainer]) -> Option<String> {
    let nth = default_container(containers.iter().map(|asked| asked.container.name.as_str()));
    containers.get(nth).map(|asked| asked.image.clone())
}

fn program(given: &mut Fields) -> Result<Program, Failure> {
    let (entrypoint, command) = read::command(given)?;
    let mut program = Program {
        entrypoint,
        command,
        user: given.text("user")?.unwrap_or_default(),
        env: read::env(given)?,
        ..Program::default()
    };
    for mut from in given.objects("env_from", MAX_ITEMS)? {
        let variable = variable(&mut from)?.ok_or_else(|| from.wrong("env_var", "it is missing"))?;
        let field = from.take::<MachineField>("field_ref")?.ok_or_else(|| from.wrong("field_ref", "it is missing"))?;
        from.finish()?;
        program.env_from.insert(variable, field);
    }
    for mut secret in given.objects("secrets", MAX_ITEMS)? {
        let variable = variable(&mut secret)?;
        let name = secret.text("name")?;
        let Some(name) = name.or(variable.clone()) else { return Err(secret.wrong("name", "it is missing")) };
        secret.finish()?;
        program.secrets.insert(variable.unwrap_or_else(|| name.clone()), name);
    }
    Ok(program)
}

fn variable(given: &mut Fields) -> Result<Option<String>, Failure> {
    match given.text("env_var")? {
        Some(name) if !read::is_variable(&name) => {
            Err(given.wrong("env_var", "a name has no `=` and does not begin with FLY_"))
        }
        name => Ok(name),
    }
}

fn mounts_of(given: &mut Fields, mounted: &[&str]) -> Result<Vec<ContainerMount>, Failure> {
    let mut found: Vec<ContainerMount> = vec![];
    for mut mount in given.objects("mounts", MAX_ITEMS)? {
        let name = mount.text("name")?.unwrap_or_default();
        if name.is_empty() || !mounted.contains(&name.as_str()) {
            let why = "no entry of config.mounts or config.volumes has this name; give it one with `name`";
            return Err(mount.wrong("name", why));
        }
        let path = mount.text("path")?.unwrap_or_default();
        volume::mount_path(&path).map_err(|why| mount.wrong("path", why))?;
        disk::check_beside(&mount, &path, found.iter().map(|other| other.path.as_str()))?;
        mount.finish()?;
        found.push(ContainerMount { name, path });
    }
    Ok(found)
}

fn depends_on(given: &mut Fields) -> Result<Vec<Dependency>, Failure> {
    let mut dependencies = vec![];
    for mut one in given.objects("depends_on", MAX_PROGRAMS)? {
        let name = one.text("name")?.unwrap_or_default();
        let condition = one.take("condition")?.unwrap_or(dunlin_model::Condition::Started);
        one.finish()?;
        dependencies.push(Dependency { name, condition });
    }
    Ok(dependencies)
}

/// Their times are seconds.
fn healthchecks(given: &mut Fields) -> Result<Vec<Healthcheck>, Failure> {
    let mut checks: Vec<Healthcheck> = vec![];
    for (nth, mut check) in given.objects("healthchecks", MAX_HEALTHCHECKS)?.into_iter().enumerate() {
        let name = check.text("name")?.unwrap_or_else(|| format!("check-{nth}"));
        let is_plain = name.len() <= 63 && name.bytes().all(|b| b.is_ascii_graphic());
        if !is_plain || checks.iter().any(|other| other.name == name) {
            return Err(check.wrong("name", "it is there twice, or is not 1 to 63 visible characters"));
        }
        let is_liveness = match check.text("kind")?.as_deref() {
            None | Some("readiness") => false,
            Some("liveness") => true,
            Some(_) => return Err(check.wrong("kind", "use readiness or liveness")),
        };
        let stop_unhealthy = match check.text("unhealthy")?.as_deref() {
            None => false,
            Some("stop") if is_liveness => true,
            Some("stop") => return Err(check.wrong("unhealthy", "only a check of kind liveness stops a container")),
            Some(_) => return Err(check.wrong("unhealthy", "use stop, or leave it out")),
        };
        let mut number = |name: &str, range, default| {
            Ok::<u32, Failure>(check.number(name, 0..=range)?.filter(|n| *n != 0).unwrap_or(default))
        };
        let interval_ms = u64::from(number("interval", MAX_CHECK_S, CHECK_INTERVAL_S)?) * 1000;
        let timeout_ms = u64::from(number("timeout", MAX_CHECK_S, CHECK_TIMEOUT_S)?) * 1000;
        let grace_period_ms = u64::from(number("grace_period", MAX_CHECK_S, CHECK_GRACE_S)?) * 1000;
        let success_threshold = number("success_threshold", MAX_THRESHOLD, SUCCESS_THRESHOLD)?;
        let failure_threshold = number("failure_threshold", MAX_THRESHOLD, FAILURE_THRESHOLD)?;
        let probe = probe(&mut check)?;
        check.finish()?;
        checks.push(Healthcheck {
            name,
            probe,
            interval_ms,
            timeout_ms,
            grace_period_ms,
            success_threshold,
            failure_threshold,
            stop_unhealthy,
        });
    }
    Ok(checks)
}

fn probe(check: &mut Fields) -> Result<Probe, Failure> {
    let (http, tcp, exec) = (check.object("http")?, check.object("tcp")?, check.object("exec")?);
    let port = |given: &mut Fields| read::port(given, "port")?.ok_or_else(|| given.wrong("port", "it is missing"));
    match (http, tcp, exec) {
        (Some(mut http), None, None) => {
            let port = port(&mut http)?;
            let (method, path) = (http.text("method")?, http.text("path")?);
            let (method, path) = read::request_line(&http, method, path)?;
            let is_https = match http.text("scheme")?.as_deref() {
                None | Some("http") => false,
                Some("https") => true,
                Some(_) => return Err(http.wrong("scheme", "use http or https")),
            };
            let tls = ProbeTls { server_name: read::server_name(&mut http)?, skip_verify: http.take("tls_skip_verify")?.unwrap_or(false) };
            let tls = is_https.then_some(tls);
            let headers: BTreeMap<String, String> = read::headers(&mut http)?;
            http.finish()?;
            Ok(Probe::Http { port, method, path, headers, tls })
        }
        (None, Some(mut tcp), None) => {
            let port = port(&mut tcp)?;
            tcp.finish()?;
            Ok(Probe::Tcp { port })
        }
        (None, None, Some(mut exec)) => {
            let command = exec.texts("command")?.ok_or_else(|| exec.wrong("command", "it is missing"))?;
            exec.finish()?;
            Ok(Probe::Exec { command })
        }
        _ => Err(check.wrong("http", "a check has one of http, tcp and exec")),
    }
}
