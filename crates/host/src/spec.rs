//! From a machine's record to what its supervisor runs: image, command, environment, limits, network.

use crate::agent::chain;
use crate::{Shared, convert, layers};
use dunlin_machine::Record;
use dunlin_model::files::check_files;
use dunlin_model::containers::{Container, ContainerMount, MachineField, Program};
use dunlin_model::{CpuKind, HostId, ImageRef, MachineFile, MachineSpec};
use dunlin_registry::{Digest, ImageRecord};
use dunlin_runtime::cgroup::Limits;
use dunlin_runtime::net::NetSpec;
use dunlin_runtime::{
    Bind, ContainerRules, ContainerSpec, GuestFile, LogLimits, ProcessSpec, Profile, Rootfs, SupervisorSpec, WIRE_VERSION,
};
use dunlin_view::SecretsFact;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// Processes and threads of one machine.
const MAX_PIDS: u32 = 4096;
/// A shared cpu may use this much of a core; a performance cpu all of it.
const SHARED_CPU_MILLIS: u32 = 1000;
/// Where cores are scarce, a shared cpu counts as a sixteenth of a performance cpu, as on Fly.
const SHARED_CPU_WEIGHT_MILLIS: u32 = 1000 / 16;
/// Where a machine finds the socket of the API, as on Fly.
const API_DIR: &str = "/.fly";
/// Of files that do not say.
const FILE_MODE: u32 = 0o644;
/// Secrets of a new version may still be on their way from control.
const SECRETS_WAIT: Duration = Duration::from_secs(10);

/// Unpacks all images that the machine runs.
pub async fn prepare_images(shared: &Shared, spec: &MachineSpec) -> Result<(), String> {
    for reference in spec.images() {
        image(shared, reference).await?;
    }
    Ok(())
}

/// The unpacked image; unpacks it if it is not.
pub async fn image(shared: &Shared, image: &ImageRef) -> Result<ImageRecord, String> {
    let digest: Digest = image.digest.parse().map_err(|_| format!("{:?} is not a digest", image.digest))?;
    shared.images.ensure(&digest).await.map_err(|e| format!("image {}@{digest}: {}", image.repository, chain(&e)))
}

/// Everything that the supervisor needs; secrets are in it, so it stays in memory.
pub async fn supervisor_spec(shared: &Shared, record: &Record, attempt: u64) -> Result<SupervisorSpec, String> {
    let spec = record.spec();
    let id = &record.assignment.id;
    let secrets = secrets(shared, spec).await?;
    let mut containers = Vec::new();
    for container in &spec.containers {
        let image = image(shared, &container.image).await?;
        containers.push(container_spec(shared, record, container, &image, &secrets)?);
    }
    let (own, rootfs, mut programs, files, temp_dirs) = if containers.is_empty() {
        let image = image(shared, &spec.image).await?;
        let programs = programs(spec);
        let programs = programs.iter().map(|program| process(shared, record, program, &spec.image, &image, &secrets));
        let stop_signal = convert::stop_signal(None, spec.stop.signal.as_deref(), image.config.stop_signal.as_deref());
        let own = ContainerRules { stop_signal: Some(stop_signal), ..ContainerRules::default() };
        let programs = programs.collect::<Result<Vec<_>, _>>()?;
        let rootfs = Rootfs::Layers { image: image.layers.clone(), writable: layers::of_root(shared, id, spec, None) };
        (own, rootfs, programs, files(&spec.files, &secrets)?, layers::temp_dirs(shared, spec, None))
    } else {
        let ContainerSpec { rules, rootfs, process, files, temp_dirs, .. } = containers.remove(0);
        (rules, rootfs, vec![process], files, temp_dirs)
    };
    let process = programs.remove(0);
    let mut net = NetSpec::new(id.interface_name(), record.assignment.address, shared.firewall.group());
    net.mtu = shared.mtu;
    Ok(SupervisorSpec {
        v: WIRE_VERSION,
        machine_id: id.to_string(),
        attempt,
        machine_dir: shared.machine_dir(id.as_str()),
        rootfs,
        profile: Profile::Tenant,
        process,
        beside: programs,
        own,
        containers,
        stop_timeout_ms: spec.stop.timeout_ms,
        hostname: id.to_string(),
        uid_base: shared.config.abilities.ids.base(record.uid_base),
        ids: shared.config.abilities.ids,
        owner: crate::machine_number(record.uid_base).and_then(|number| shared.config.abilities.ids.owner(number)),
        cgroups: shared.cgroups.clone(),
        limits: limits(spec),
        cpus: None,
        net: Some(net),
        resolv_conf: shared.firewall.resolv_conf(),
        address: Some(record.assignment.address),
        binds: vec![Bind { source: crate::machine_api_dir(&shared.config.data_dir), target: API_DIR.into(), readonly: true }],
        files,
        volumes: vec![],
        temp_dirs,
        log_limits: LogLimits::default(),
        start: true,
        kill_at: None,
    })
}

/// Gives the machine's volumes, in the order of its mounts, to the containers that name them.
pub fn with_volumes(to: &mut SupervisorSpec, spec: &MachineSpec, volumes: Vec<Bind>) -> Result<(), String> {
    let Some((first, further)) = spec.containers.split_first() else {
        to.volumes = volumes;
        return Ok(());
    };
    let of = |container: &Container| -> Result<Vec<Bind>, String> {
        let is_volume = |wanted: &&ContainerMount| !spec.temp_dirs.iter().any(|dir| dir.name == wanted.name);
        let mounts = container.mounts.iter().filter(is_volume).map(|wanted| {
            let named = spec.mounts.iter().zip(&volumes).find(|(mount, _)| mount.name == wanted.name);
            let (_, volume) = named.ok_or_else(|| {
                format!("container {}: the machine has no volume with the name {}", container.name, wanted.name)
            })?;
            Ok(Bind { target: wanted.path.clone().into(), ..volume.clone() })
        });
        mounts.collect()
    };
    to.volumes = of(first)?;
    for (container, to) in further.iter().zip(&mut to.containers) {
        to.volumes = of(container)?;
    }
    Ok(())
}

/// Those of its one root file system.
fn programs(spec: &MachineSpec) -> Vec<Program> {
    let own = Program { entrypoint: spec.entrypoint.clone(), command: spec.command.clone(), ..Program::default() };
    if spec.processes.is_empty() { vec![own] } else { spec.processes.clone() }
}

fn container_spec(
    shared: &Shared,
    record: &Record,
    container: &Container,
    image: &ImageRecord,
    secrets: &BTreeMap<String, String>,
) -> Result<ContainerSpec, String> {
    let (id, spec) = (&record.assignment.id, record.spec());
    let explain = |why: String| format!("container {}: {why}", container.name);
    let signal = container.stop_signal.as_deref().or(spec.stop.signal.as_deref());
    let image_signal = image.config.stop_signal.as_deref();
    Ok(ContainerSpec {
        rules: ContainerRules {
            name: container.name.clone(),
            depends_on: container.depends_on.clone(),
            healthchecks: container.healthchecks.clone(),
            restart: container.restart.clone(),
            // A person's word goes before all but the container's own.
            stop_signal: (container.stop_signal.is_some() || signal.is_none() && image_signal.is_some())
                .then(|| convert::stop_signal(None, signal, image_signal)),
            stop_timeout_ms: container.stop_timeout_ms,
        },
        rootfs: Rootfs::Layers {
            image: image.layers.clone(),
            writable: layers::of_root(shared, id, spec, Some(container)),
        },
        process: process(shared, record, &container.program, &container.image, image, secrets).map_err(explain)?,
        volumes: vec![],
        temp_dirs: layers::temp_dirs(shared, spec, Some(container)),
        files: files(&container.files, secrets).map_err(explain)?,
    })
}

fn process(
    shared: &Shared,
    record: &Record,
    program: &Program,
    reference: &ImageRef,
    image: &ImageRecord,
    secrets: &BTreeMap<String, String>,
) -> Result<ProcessSpec, String> {
    let user = if program.user.is_empty() { &image.config.user } else { &program.user };
    Ok(ProcessSpec {
        command: command(program, image)?,
        env: environment(shared, record, program, reference, image, secrets)?,
        user: user.clone(),
        working_dir: image.config.working_dir.clone(),
    })
}

fn command(program: &Program, image: &ImageRecord) -> Result<Vec<String>, String> {
    let entrypoint = program.entrypoint.as_ref().unwrap_or(&image.config.entrypoint);
    let arguments = match (&program.command, &program.entrypoint) {
        (Some(command), _) => command.clone(),
        // As docker has it: another ENTRYPOINT leaves the image's CMD out.
        (None, Some(_)) => vec![],
        (None, None) => image.config.cmd.clone(),
    };
    let command: Vec<String> = entrypoint.iter().cloned().chain(arguments).collect();
    if command.is_empty() {
        return Err("the image has neither ENTRYPOINT nor CMD; add one, or a command under [processes]".into());
    }
    Ok(command)
}

fn limits(spec: &MachineSpec) -> Limits {
    let (per_cpu, weight) = match spec.guest.cpu_kind {
        CpuKind::Shared => (SHARED_CPU_MILLIS, SHARED_CPU_WEIGHT_MILLIS),
        CpuKind::Performance => (1000, 1000),
    };
    let cpus = spec.guest.cpus.max(1);
    Limits {
        cpu_millis: per_cpu * cpus,
        cpu_weight_millis: weight * cpus,
        memory_bytes: u64::from(spec.guest.memory_mb) << 20,
        swap_bytes: u64::from(spec.swap_mb) << 20,
        pids: MAX_PIDS,
    }
}

/// What stands in the spec is no secret and the machine's own from then on; the content of secrets stays in memory.
fn files(files: &[MachineFile], secrets: &BTreeMap<String, String>) -> Result<Vec<GuestFile>, String> {
    check_files(files)?;
    let guest_file = |file: &MachineFile| {
        let path = PathBuf::from(&file.guest_path);
        let mode = file.mode.unwrap_or(FILE_MODE);
        let (content, on_disk) = match (&file.raw_value, &file.secret_name) {
            (Some(text), _) => (MachineFile::decode(text), true),
            (None, Some(name)) => {
                let value = secrets.get(name).ok_or_else(|| {
                    format!("file {}: the app has no secret {name}; set it with `dunlin secrets set`", file.guest_path)
                })?;
                let content = MachineFile::decode(value).ok_or_else(|| {
                    format!("file {}: the value of secret {name} is not base64, as that of a file must be", file.guest_path)
                })?;
                (Some(content), false)
            }
            (None, None) => (None, false),
        };
        let content = content.ok_or_else(|| format!("file {}: it has no content", file.guest_path))?;
        Ok(GuestFile { path, content, mode, on_disk })
    };
    files.iter().map(guest_file).collect()
}

/// The image's, then the configuration's, then the program's own, then secrets; what the platform says of the machine is last,
/// because an app must be able to trust it.
fn environment(
    shared: &Shared,
    record: &Record,
    program: &Program,
    reference: &ImageRef,
    image: &ImageRecord,
    secrets: &BTreeMap<String, String>,
) -> Result<Vec<(String, String)>, String> {
    let spec = record.spec();
    let mut env: BTreeMap<String, String> = BTreeMap::new();
    for pair in &image.config.env {
        if let Some((name, value)) = pair.split_once('=') {
            env.insert(name.to_owned(), value.to_owned());
        }
    }
    if let Some(service) = spec.services.first() {
        env.insert("PORT".into(), service.internal_port.to_string());
    }
    env.extend(spec.env.clone());
    env.extend(program.env.clone());
    if !program.only_named_secrets {
        env.extend(secrets.clone());
    }
    for (variable, name) in &program.secrets {
        let value = secrets.get(name);
        let value = value.ok_or_else(|| format!("the app has no secret {name}; set it with `dunlin secrets set`"))?;
        env.insert(variable.clone(), value.clone());
    }
    let image_ref = format!("{}@{}", reference.repository, reference.digest);
    for (variable, field) in &program.env_from {
        let value = match field {
            MachineField::Id => record.assignment.id.to_string(),
            MachineField::Version => spec.version.to_string(),
            MachineField::AppName => spec.app.to_string(),
            MachineField::PrivateIp => record.assignment.address.to_string(),
            MachineField::Region => shared.config.region.to_string(),
            MachineField::Image => image_ref.clone(),
        };
        env.insert(variable.clone(), value);
    }
    let facts = [
        ("APP_NAME", spec.app.to_string()),
        ("MACHINE_ID", record.assignment.id.to_string()),
        ("ALLOC_ID", record.assignment.id.to_string()),
        ("REGION", shared.config.region.to_string()),
        ("IMAGE_REF", image_ref),
        ("MACHINE_VERSION", spec.version.to_string()),
        ("PRIVATE_IP", record.assignment.address.to_string()),
        ("PROCESS_GROUP", spec.process_group.clone()),
        ("VM_MEMORY_MB", spec.guest.memory_mb.to_string()),
    ];
    for (name, value) in facts {
        env.insert(format!("FLY_{name}"), value.clone());
        env.insert(format!("DUNLIN_{name}"), value);
    }
    env.entry("PRIMARY_REGION".into()).or_insert_with(|| shared.config.region.to_string());
    Ok(env.into_iter().collect())
}

/// Opens the secrets of exactly the version that the spec names: a machine that returns to an earlier release returns
/// to its secrets, and what waits for the next release reaches nobody before it.
async fn secrets(shared: &Shared, spec: &MachineSpec) -> Result<BTreeMap<String, String>, String> {
    if spec.secrets_version == 0 {
        return Ok(BTreeMap::new());
    }
    let mut changes = shared.view.subscribe();
    let mut snapshot = changes.current();
    let deadline = tokio::time::Instant::now() + SECRETS_WAIT;
    loop {
        let facts = snapshot.config.secrets.get(&spec.app).map_or(&[][..], Vec::as_slice);
        if let Some(fact) = sealed_secrets(facts, &shared.config.id, spec.secrets_version) {
            let context = format!("env/{}/{}", spec.app, fact.version);
            let json = shared.config.key.open(&context, &fact.sealed).map_err(|e| format!("its secrets: {e}"))?;
            return serde_json::from_slice(&json).map_err(|_| "its secrets are damaged".to_owned());
        }
        match tokio::time::timeout_at(deadline, changes.changed()).await {
            Ok(newer) => snapshot = newer,
            Err(_) => return Err(format!("version {} of its secrets has not reached this host", spec.secrets_version)),
        }
    }
}

fn sealed_secrets<'a>(facts: &'a [SecretsFact], host: &HostId, version: u64) -> Option<&'a SecretsFact> {
    facts.iter().find(|fact| fact.host == *host && fact.version == version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_has_the_secrets_of_its_version_and_no_others() {
        let fact = |host: &str, version| SecretsFact { host: host.parse().unwrap(), version, sealed: format!("{host}/{version}") };
        let facts = [fact("h1", 1), fact("h2", 2), fact("h1", 3)];
        let sealed = |version| sealed_secrets(&facts, &"h1".parse().unwrap(), version).map(|fact| fact.sealed.as_str());
        assert_eq!(sealed(1), Some("h1/1"), "an older version, after a return to an earlier release");
        assert_eq!(sealed(2), None, "neither another host's nor a newer one");
        assert_eq!(sealed(3), Some("h1/3"));
    }
}
