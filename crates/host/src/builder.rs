//! Builder machines: a profile that no tenant can ask for, one build at a time an organization, with
//! the organization's cache volume.

use crate::agent::chain;
use crate::{Shared, now_ms};
use bytes::Bytes;
use dunlin_api::{BuilderRequest, BuilderRun, ExecOutput, Refusal};
use dunlin_model::OrgName;
use dunlin_runtime::cgroup::{Cgroups, Limits};
use dunlin_runtime::logs::{LogPosition, read_logs};
use dunlin_runtime::net::NetSpec;
use dunlin_runtime::net::firewall::MachineRule;
use dunlin_runtime::volume::{LoopVolume, MountedVolume, VolumeError};
use dunlin_runtime::{
    ContainerRules, Bind, Client, LogLimits, GuestFile, ProcessSpec, Profile, Rootfs, SupervisorSpec, WIRE_VERSION,
};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};

const QUEUE: usize = 256;
/// Sparse: costs what is used.
const CACHE_BYTES: u64 = 20 << 30;
/// For a cache that is empty: what a small build writes.
const LEAST_ROOM_BYTES: u64 = 256 << 20;
const MEMORY_BYTES: u64 = 4 << 30;
const MAX_PIDS: u32 = 4096;
const FOLLOW_PAUSE: Duration = Duration::from_millis(20);
/// A reader that takes nothing is looked after this often.
const FULL_PAUSE: Duration = Duration::from_millis(20);
const END_WITHIN: Duration = Duration::from_secs(10);
/// Uid ranges of builders, above those of machines; fixed for an organization, because its cache is
/// owned by it.
const FIRST_UID: u32 = 400_000_000;
/// Their numbers where all machines share a range: above those of machines.
const FIRST_OWNER: u32 = 32_768;

type Turn = Arc<tokio::sync::Mutex<()>>;

/// One lock an organization, and a number.
#[derive(Default)]
pub struct Slots(Mutex<BTreeMap<OrgName, (u32, Turn)>>);

impl Slots {
    fn of(&self, org: &OrgName, data_dir: &Path) -> (u32, Turn) {
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        slots.entry(org.clone()).or_insert_with(|| (number(org, data_dir), Arc::default())).clone()
    }
}

/// The organization's builder number: kept beside its cache.
fn number(org: &OrgName, data_dir: &Path) -> u32 {
    let dir = data_dir.join("builder");
    let mine = fs::read_to_string(dir.join(format!("{org}.number"))).ok().and_then(|text| text.trim().parse().ok());
    mine.unwrap_or_else(|| {
        let taken = fs::read_dir(&dir)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                name.ends_with(".number").then(|| fs::read_to_string(entry.path()).ok()?.trim().parse::<u32>().ok())?
            })
            .max();
        let number = taken.map_or(0, |taken| taken + 1);
        let _ = fs::create_dir_all(&dir); // the cache beside it says clearly if this cannot be
        let _ = fs::write(dir.join(format!("{org}.number")), number.to_string());
        number
    })
}

pub async fn run(shared: Arc<Shared>, request: BuilderRequest) -> Result<BuilderRun, Refusal> {
    let (number, lock) = shared.builders.of(&request.org, &shared.config.data_dir);
    let turn = lock.lock_owned().await;
    let (sender, output) = mpsc::channel(QUEUE);
    let (told, started) = oneshot::channel();
    // From here on the machine has an owner, whether or not the caller still waits: one who went away has
    // dropped the other end of the output, and that ends it.
    tokio::task::spawn_blocking(move || {
        match start(&shared, &request, number) {
            Ok(build) => {
                let _ = told.send(Ok(())); // as above
                let last = follow(&shared, &request, build, &sender);
                drop(turn);
                if let Some(last) = last {
                    send(&sender, last, Instant::now() + END_WITHIN); // or nobody listens any more
                }
            }
            Err(refusal) => {
                drop(turn);
                let _ = told.send(Err(refusal)); // as above
            }
        }
    });
    started.await.map_err(|_| Refusal::Failed("the builder machine was not started; see the server's log".into()))??;
    Ok(BuilderRun { output })
}

struct Build {
    id: String,
    dir: PathBuf,
    cache: Option<Cache>,
    rule: MachineRule,
}

fn start(shared: &Shared, request: &BuilderRequest, number: u32) -> Result<Build, Refusal> {
    let io = |what: &str, e: std::io::Error| match e.kind() {
        std::io::ErrorKind::StorageFull => Refusal::DiskFull(format!("{what}: {e}")),
        _ => Refusal::Failed(format!("{what}: {e}")),
    };
    let base = shared.config.data_dir.join("builder");
    let id = id(number);
    let dir = machines(&shared.config.data_dir).join(&id);
    let ifname = ifname(&shared.config.instance, number);
    let prefix = shared.config.machine_prefix;
    let addr = prefix.nth_builder(number).ok_or_else(|| {
        Refusal::Failed(format!("this host's machine prefix has no address for builder {number}; give it a larger one"))
    })?;
    let ids = shared.config.abilities.ids;
    let uid_base = ids.base(FIRST_UID + number * dunlin_runtime::UID_RANGE);
    // What a build before a crash left.
    dunlin_runtime::cleanup(&dir, &id, &shared.cgroups, Some(&ifname)).map_err(|e| Refusal::Failed(chain(&e)))?;
    let _ = dunlin_runtime::remove_tree(&dir); // made anew below; what cannot go is said there
    let cache = Cache::open(shared, &base, request.org.as_str(), uid_base)?;
    let binary = binary(&base).map_err(|e| io("the builder's program cannot be copied", e))?;
    let rule = MachineRule { ifname: ifname.clone(), addr };
    shared.firewall.add(&rule).map_err(|e| Refusal::Failed(chain(&e)))?;
    let mut net = NetSpec::new(ifname, addr, shared.firewall.group());
    net.mtu = shared.mtu;
    let bind = |source: &Path, target: &str, readonly| Bind { source: source.to_owned(), target: target.into(), readonly };
    let spec = SupervisorSpec {
        v: WIRE_VERSION,
        machine_id: id.clone(),
        attempt: now_ms(),
        machine_dir: dir.clone(),
        rootfs: Rootfs::HostUsr,
        temp_dirs: vec![],
        profile: Profile::Builder,
        process: ProcessSpec {
            command: request.command.clone(),
            env: request.env.clone(),
            user: String::new(),
            working_dir: "/".into(),
        },
        beside: vec![],
        own: ContainerRules::default(),
        containers: vec![],
        stop_timeout_ms: 0,
        hostname: "builder".into(),
        uid_base,
        ids,
        owner: ids.owner(FIRST_OWNER + number),
        cgroups: shared.cgroups.clone(),
        limits: Limits { cpu_millis: shared.config.cpus * 1000, memory_bytes: MEMORY_BYTES, pids: MAX_PIDS, ..Limits::NONE },
        cpus: None,
        net: Some(net),
        resolv_conf: shared.firewall.resolv_conf(),
        address: None,
        binds: vec![
            bind(cache.at(), "/cache", false),
            bind(&request.context, "/context", true),
            bind(&request.registry_socket, "/run/registry.sock", false),
            bind(&binary, "/dunlin", true),
        ],
        files: request.files.iter().map(|(path, content)| GuestFile::in_memory(path.into(), content.clone())).collect(),
        volumes: vec![],
        log_limits: LogLimits { file_bytes: 64 << 20, files: 2, ..LogLimits::default() },
        start: true,
        kill_at: None,
    };
    let build = Build { id, dir, cache: Some(cache), rule };
    match dunlin_runtime::spawn(&shared.exe, &spec) {
        Ok(()) => Ok(build),
        Err(error) => {
            let why = chain(&error);
            end(shared, build);
            Err(Refusal::Failed(format!("the builder machine cannot be made: {why}")))
        }
    }
}

/// What builds of an organization keep for the next.
enum Cache {
    /// With a size of its own.
    Mounted(MountedVolume),
    /// Where nobody mounts file systems of files.
    Directory(PathBuf),
}

impl Cache {
    fn open(shared: &Shared, base: &Path, org: &str, uid_base: u32) -> Result<Self, Refusal> {
        if shared.config.abilities.sizes.is_ok() {
            return mount_cache(base, org, uid_base).map(Self::Mounted);
        }
        let io = |e: std::io::Error| Refusal::Failed(format!("the build cache: {e}"));
        let at = base.join(format!("{org}.cache"));
        fs::create_dir_all(&at).map_err(io)?;
        own_cache(&at, uid_base).map_err(io)?;
        Ok(Self::Directory(at))
    }

    fn at(&self) -> &Path {
        match self {
            Self::Mounted(volume) => volume.at(),
            Self::Directory(at) => at,
        }
    }

    fn close(self) -> Result<(), VolumeError> {
        match self {
            Self::Mounted(volume) => volume.unmount(),
            Self::Directory(_) => Ok(()),
        }
    }
}

fn own_cache(at: &Path, uid_base: u32) -> std::io::Result<()> {
    chown(at, Some(uid_base), Some(uid_base))?;
    fs::set_permissions(at, fs::Permissions::from_mode(0o755))
}

fn mount_cache(base: &Path, org: &str, uid_base: u32) -> Result<MountedVolume, Refusal> {
    let failed = |e: VolumeError| Refusal::Failed(format!("the build cache: {}", chain(&e)));
    let io = |e: std::io::Error| Refusal::Failed(format!("the build cache: {e}"));
    let (file, at) = (base.join(format!("{org}.ext4")), base.join(format!("{org}.mnt")));
    fs::create_dir_all(&at).map_err(io)?;
    let _ = dunlin_runtime::volume::unmount(&at); // left by a crash; usually not mounted
    let opened = if file.exists() { kept_cache(&file, &at).map_err(failed)? } else { None };
    let mounted = match opened {
        Some(mounted) => mounted,
        None => {
            let room = free_bytes(base).map_err(io)?;
            if room < LEAST_ROOM_BYTES {
                return Err(Refusal::Failed(format!(
                    "the disk of {} has {} MB left, and a build wants {} at least: free some space, then try again",
                    base.display(), room >> 20, LEAST_ROOM_BYTES >> 20
                )));
            }
            mount_when_free(&LoopVolume::create(&file, CACHE_BYTES).map_err(failed)?, &at).map_err(failed)?
        }
    };
    own_cache(&at, uid_base).map_err(io)?;
    Ok(mounted)
}

/// The cache of earlier builds. One whose disk has failed it, by being full for example, may lack anything of what it says it
/// has: then builds fail for a reason that no change of the source mends. It is only a cache: it is begun anew.
fn kept_cache(file: &Path, at: &Path) -> Result<Option<MountedVolume>, VolumeError> {
    let open = || {
        let volume = LoopVolume::open(file)?;
        if volume.has_errors()? {
            return Ok(None);
        }
        let mounted = mount_when_free(&volume, at)?;
        // What its journal knew is told by now.
        if volume.has_errors()? {
            mounted.unmount()?;
            return Ok(None);
        }
        Ok(Some(mounted))
    };
    let why = match open() {
        Ok(None) => "its file system has met errors".to_owned(),
        Err(error @ VolumeError::Io { .. }) => chain(&error),
        other => return other,
    };
    tracing::warn!(cache = %file.display(), why, "the build cache is not sound, and begun anew");
    fs::remove_file(file).map_err(|source| VolumeError::Io { op: "remove", path: file.to_owned(), source })?;
    Ok(None)
}

fn free_bytes(dir: &Path) -> std::io::Result<u64> {
    let stat = nix::sys::statvfs::statvfs(dir)?;
    Ok(stat.fragment_size() * stat.blocks_available())
}

/// A machine that is being started holds a copy of the host's mounts for a moment, and with it the cache
/// of the build before.
fn mount_when_free(volume: &LoopVolume, at: &Path) -> Result<MountedVolume, VolumeError> {
    let deadline = Instant::now() + END_WITHIN;
    loop {
        match volume.mount(at) {
            Err(VolumeError::InUse { .. }) if Instant::now() < deadline => std::thread::sleep(FOLLOW_PAUSE),
            mounted => return mounted,
        }
    }
}

/// A copy of this binary for builders, so that an upgrade does not pull it away.
fn binary(base: &Path) -> std::io::Result<PathBuf> {
    let dir = base.join("bin");
    fs::create_dir_all(&dir)?;
    // Named by its inode and time: another binary is another copy.
    let meta = fs::metadata("/proc/self/exe")?;
    use std::os::unix::fs::MetadataExt;
    let path = dir.join(format!("dunlin-{}-{}", meta.ino(), meta.mtime()));
    if !path.exists() {
        for old in fs::read_dir(&dir)?.flatten() {
            let _ = fs::remove_file(old.path()); // in use by a build that ends soon: the mount keeps it
        }
        let temporary = dir.join("new");
        fs::copy("/proc/self/exe", &temporary)?;
        fs::set_permissions(&temporary, fs::Permissions::from_mode(0o755))?;
        fs::rename(&temporary, &path)?;
    }
    Ok(path)
}

/// Carries the builder's output; ends it when nobody listens or its time is over. Returns what is left to say.
fn follow(
    shared: &Shared,
    request: &BuilderRequest,
    build: Build,
    sender: &mpsc::Sender<ExecOutput>,
) -> Option<ExecOutput> {
    let deadline = Instant::now() + Duration::from_millis(request.timeout_ms);
    let mut position = LogPosition::default();
    let last = loop {
        let living = dunlin_runtime::lock_holder(&build.dir).ok().flatten().is_some();
        let carried = carry(&build.dir, &mut position, sender, deadline);
        if sender.is_closed() {
            break None;
        }
        if !living && carried {
            carry(&build.dir, &mut position, sender, deadline);
            break Some(how_it_ended(&build.dir));
        }
        if Instant::now() >= deadline {
            let minutes = request.timeout_ms / 60_000;
            break Some(ExecOutput::Failed(format!("the build was ended after {minutes} minutes")));
        }
        std::thread::sleep(FOLLOW_PAUSE);
    };
    end(shared, build);
    last
}

/// Until there is no more for now; false when nobody takes it.
fn carry(dir: &Path, position: &mut LogPosition, sender: &mpsc::Sender<ExecOutput>, deadline: Instant) -> bool {
    while let Ok((records, next)) = read_logs(dir, *position, 1024) {
        *position = next;
        if records.is_empty() {
            break;
        }
        for record in records.into_iter().filter(|record| record.stream != "system") {
            let mut line = record.line.into_bytes();
            line.push(b'\n');
            let bytes = Bytes::from(line);
            let output =
                if record.stream == "stdout" { ExecOutput::Stdout(bytes) } else { ExecOutput::Stderr(bytes) };
            if !send(sender, output, deadline) {
                return false;
            }
        }
    }
    true
}

/// False: nobody listens, or whoever does took nothing until the deadline.
fn send(to: &mpsc::Sender<ExecOutput>, mut output: ExecOutput, deadline: Instant) -> bool {
    loop {
        match to.try_send(output) {
            Ok(()) => return true,
            Err(TrySendError::Closed(_)) => return false,
            Err(TrySendError::Full(_)) if Instant::now() >= deadline => return false,
            Err(TrySendError::Full(full)) => output = full,
        }
        std::thread::sleep(FULL_PAUSE);
    }
}

fn how_it_ended(dir: &Path) -> ExecOutput {
    let newest = fs::read_dir(dir.join("exit"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u64>().ok())
        .max();
    let record = newest.and_then(|attempt| dunlin_runtime::read_exit(dir, attempt).ok().flatten());
    match record {
        Some(record) if record.oom_killed => ExecOutput::Failed(format!(
            "the build ran out of memory ({} GiB)",
            MEMORY_BYTES >> 30
        )),
        Some(record) => match (record.exit_code, record.signal, record.error) {
            (Some(code), ..) => ExecOutput::Exited(code),
            (_, Some(signal), _) => ExecOutput::Exited(128 + signal),
            (_, _, error) => ExecOutput::Failed(error.unwrap_or_else(|| "the builder ended".into())),
        },
        None => ExecOutput::Failed("the builder was killed".into()),
    }
}

fn end(shared: &Shared, mut build: Build) {
    if let Ok(client) = Client::connect(&build.dir) {
        let _ = client.kill(); // the clean-up below ends it in any case
    }
    let deadline = Instant::now() + END_WITHIN;
    while dunlin_runtime::lock_holder(&build.dir).ok().flatten().is_some() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    let cleaned = dunlin_runtime::cleanup(&build.dir, &build.id, &shared.cgroups, Some(&build.rule.ifname));
    if let Err(error) = cleaned {
        tracing::warn!(builder = %build.id, error = %chain(&error), "not cleaned up; the next build tries again");
    }
    if let Err(error) = shared.firewall.remove(&build.rule) {
        tracing::warn!(builder = %build.id, error = %chain(&error), "its firewall rule stays");
    }
    if let Some(Err(error)) = build.cache.take().map(Cache::close) {
        tracing::warn!(builder = %build.id, error = %chain(&error), "its cache stays mounted");
    }
    let _ = dunlin_runtime::remove_tree(&build.dir); // the next build removes it
}

/// Builds that were cut off by a crash of the server: their clients are gone.
pub fn end_all(data_dir: &Path, instance: &str, cgroups: &Cgroups) {
    for entry in fs::read_dir(machines(data_dir)).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let number = name.to_str().and_then(|id| id.strip_prefix(ID_PREFIX)?.parse().ok());
        let Some(number) = number else { continue };
        if let Ok(client) = Client::connect(&entry.path()) {
            let _ = client.kill(); // the clean-up below ends it in any case
        }
        let ifname = ifname(instance, number);
        if let Err(error) = dunlin_runtime::cleanup(&entry.path(), &id(number), cgroups, Some(&ifname)) {
            tracing::warn!(builder = number, error = %chain(&error), "a builder of before could not be removed");
        }
        let _ = dunlin_runtime::remove_tree(&entry.path()); // the next build removes it
    }
    for entry in fs::read_dir(data_dir.join("builder")).into_iter().flatten().flatten() {
        if entry.path().extension().is_some_and(|ext| ext == "mnt") {
            let _ = dunlin_runtime::volume::unmount(&entry.path()); // usually not mounted
        }
    }
}

/// Their directories: apart from those of machines, whose ids are all hexadecimal digits.
fn machines(data_dir: &Path) -> PathBuf {
    data_dir.join("builder/machines")
}

const ID_PREFIX: &str = "builder-";

/// Also in the names of control groups, where machines have theirs too.
fn id(number: u32) -> String {
    format!("{ID_PREFIX}{number}")
}

/// Interfaces of all servers on a computer share one name space: the instance is in the name (FNV-1a).
fn ifname(instance: &str, number: u32) -> String {
    let hash = instance.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    format!("{}b{hash:08x}{number:02x}", dunlin_runtime::net::IFNAME_PREFIX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_whose_disk_has_failed_it_is_begun_anew() {
        use std::process::Command;
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().to_owned();
        // With mounts of its own, which end with it.
        let work = std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS | nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
            let private = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE;
            nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
            let layer = |mounted: &MountedVolume| mounted.at().join("layer");
            let mounted = mount_cache(&base, "personal", 1000).unwrap();
            fs::write(layer(&mounted), "of an earlier build").unwrap();
            mounted.unmount().unwrap();
            let mounted = mount_cache(&base, "personal", 1000).unwrap();
            assert!(layer(&mounted).exists(), "a sound one is kept");
            mounted.unmount().unwrap();

            let file = base.join("personal.ext4");
            let deadline = Instant::now() + END_WITHIN;
            while !Command::new("debugfs").args(["-w", "-R", "set_super_value state 2"]).arg(&file).status().unwrap().success() {
                assert!(Instant::now() < deadline, "the file is busy");
            }
            let mounted = mount_cache(&base, "personal", 1000).unwrap();
            assert!(!layer(&mounted).exists());
            mounted.unmount().unwrap();
            fs::write(&file, [7; 4096]).unwrap();
            let mounted = mount_cache(&base, "personal", 1000).unwrap();
            assert!(!layer(&mounted).exists());
            mounted.unmount().unwrap();
        });
        work.join().unwrap();
    }

    #[test]
    fn builders_of_two_servers_share_no_name_with_each_other_or_with_a_machine() {
        let name = ifname("dunlin", 63);
        assert!(name.len() <= 15 && name != ifname("dunlin_2", 63) && name != ifname("dunlin", 62), "{name}");
        let machine: dunlin_model::MachineId = "b0000000000000".parse().unwrap();
        assert_ne!(machine.interface_name().len(), name.len());
        assert!(id(0).parse::<dunlin_model::MachineId>().is_err());
    }
}
