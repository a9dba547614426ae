//! What the agent asks the runtime to do. Acts on one machine run one after the other, in the order in
//! which the machine decided them, beside the agent's thread; what they find comes back as inputs.

use crate::agent::{Input, chain};
use crate::kill::kill_point;
use crate::{Shared, convert, cpus, layers, now_ms, ready, spec, volumes};
use dunlin_machine::{Effect, Event, Record};
use dunlin_model::{ExitInfo, MachineId, MachineSpec};
use dunlin_runtime::cgroup::CgroupError;
use dunlin_runtime::net::firewall::MachineRule;
use dunlin_runtime::{Client, RuntimeError, Status, SupervisorSpec};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// A clean-up or removal that fails is tried again: something of the machine still lives.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(250);
/// A supervisor that has its lock listens soon, or ends soon.
const SUPERVISOR_PATIENCE: Duration = Duration::from_secs(10);
/// A program that is not frozen in this time is in the middle of something in the kernel.
const FREEZE_PATIENCE: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(10);
/// Requests that were let in before a stop are answered in this time, or they are long ones, which are the program's own
/// to end: a program that ends at its signal would cut the others off.
const DRAIN: Duration = Duration::from_secs(1);

type Inputs = mpsc::Sender<Input>;

/// The acts of one machine: each begins when the one before has ended.
#[derive(Default)]
pub struct Acts(Option<JoinHandle<()>>);

impl Acts {
    pub fn push(&mut self, act: impl Future<Output = ()> + Send + 'static) {
        let before = self.0.take();
        self.0 = Some(tokio::spawn(async move {
            if let Some(before) = before {
                let _ = before.await; // a panic in it was reported by itself
            }
            act.await;
        }));
    }

    pub fn push_blocking(&mut self, act: impl FnOnce() + Send + 'static) {
        self.push(async move {
            let _ = tokio::task::spawn_blocking(act).await; // as above
        });
    }
}

pub fn perform(shared: &Arc<Shared>, inputs: &Inputs, acts: &mut Acts, record: &Record, effect: Effect) {
    let shared = shared.clone();
    let inputs = inputs.clone();
    let id = record.assignment.id.clone();
    let point = |shared: &Shared, name| kill_point(shared.config.kill_at.as_deref(), name);
    match effect {
        Effect::Prepare(spec) => {
            point(&shared, "host.before-prepare");
            tokio::spawn(prepare(shared, inputs, rule(record), id, *spec));
        }
        Effect::WakeAt { ms } => {
            point(&shared, "host.before-wake-at");
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(ms.saturating_sub(now_ms()))).await;
                let _ = inputs.send(Input::Event(id, Event::Tick)).await; // the agent ended
            });
        }
        Effect::Spawn { attempt } => {
            point(&shared, "host.before-spawn");
            acts.push(spawn(shared, inputs, record.clone(), attempt));
        }
        Effect::Stop { signal, timeout_ms } => {
            point(&shared, "host.before-stop");
            // New requests are refused from here on; the signal follows, then the kill.
            shared.table.set(&id, record);
            acts.push(stop(shared, record.clone(), signal, timeout_ms));
        }
        Effect::Signal { signal } => {
            point(&shared, "host.before-signal");
            acts.push_blocking(move || {
                if let Err(error) = tell(&shared, &id, |client| client.signal(signal)) {
                    tracing::warn!(machine = %id, signal, error = %chain(&error), "the signal was not delivered");
                }
            });
        }
        Effect::Freeze { attempt } => {
            point(&shared, "host.before-freeze");
            acts.push_blocking(move || {
                let result = freeze(&shared, &id);
                point(&shared, "host.after-freeze");
                let _ = inputs.blocking_send(Input::Event(id, Event::Frozen { attempt, result })); // recovery asks the kernel
            });
        }
        Effect::Thaw { attempt } => {
            point(&shared, "host.before-thaw");
            acts.push_blocking(move || thaw(&shared, &id, attempt));
        }
        Effect::CleanUp { attempt } => {
            point(&shared, "host.before-clean-up");
            acts.push_blocking(move || {
                clean_up(&shared, &id);
                acknowledge(&shared, &id, attempt);
                point(&shared, "host.after-clean-up");
            });
        }
        Effect::Acknowledge { attempt } => acts.push_blocking(move || acknowledge(&shared, &id, attempt)),
        Effect::Destroy => {
            point(&shared, "host.before-destroy");
            let record = record.clone();
            acts.push_blocking(move || destroy(&shared, &inputs, &record));
        }
        Effect::Journal | Effect::Answer { .. } | Effect::Publish | Effect::Forget => {
            unreachable!("the agent does these itself")
        }
    }
}

async fn prepare(shared: Arc<Shared>, inputs: Inputs, rule: MachineRule, id: MachineId, spec: MachineSpec) {
    let firewall = shared.clone();
    let pinned = tokio::task::spawn_blocking(move || firewall.firewall.add(&rule));
    let result = match spec::prepare_images(&shared, &spec).await {
        Ok(()) => disks_of(&shared, &spec).await,
        failed => failed,
    };
    let _ = pinned.await; // the start tries again, and tells if it fails
    if let Err(error) = &result {
        tracing::warn!(machine = %id, app = %spec.app, release = spec.release, %error, "it cannot be prepared");
    }
    let room = Ok(()); // the agent looks when it hears this
    let event = Event::Prepared { version: spec.version, result, room };
    let _ = inputs.send(Input::Event(id, event)).await; // the agent ended: recovery prepares again
}

/// A volume for which there is no room is known before the machine is told to start, and what is made once a size is there.
async fn disks_of(shared: &Arc<Shared>, spec: &MachineSpec) -> Result<(), String> {
    let view = shared.view.current();
    let rows: Vec<_> = spec.mounts.iter().filter_map(|mount| view.config.volumes.get(&mount.volume).cloned()).collect();
    let (shared, spec) = (shared.clone(), spec.clone());
    let ensured = tokio::task::spawn_blocking(move || {
        rows.iter().try_for_each(|row| volumes::ensure(&shared, row))?;
        layers::make_templates(&shared, &spec)
    });
    ensured.await.unwrap_or_else(|e| Err(e.to_string()))
}

async fn spawn(shared: Arc<Shared>, inputs: Inputs, record: Record, attempt: u64) {
    let id = record.assignment.id.clone();
    if !shared.ready.has(&id) {
        let cgroups = shared.cgroups.clone();
        tokio::task::spawn_blocking(move || cgroups.hasten_moves());
    }
    let result = match spec::supervisor_spec(&shared, &record, attempt).await {
        Ok(mut spec) => {
            spec.kill_at = shared.supervisor_kill_at.lock().unwrap_or_else(PoisonError::into_inner).take();
            let shared = shared.clone();
            let spawned = tokio::task::spawn_blocking(move || {
                shared.firewall.add(&rule(&record)).map_err(|e| chain(&e))?;
                if ready::start(&shared, &record, &spec) {
                    return Ok(());
                }
                spawn_alone(&shared, &record, &mut spec).map_err(|e| chain(&e))
            });
            spawned.await.unwrap_or_else(|e| Err(e.to_string()))
        }
        Err(why) => Err(why),
    };
    kill_point(shared.config.kill_at.as_deref(), "host.after-spawn");
    match &result {
        Ok(()) => watch_exit(&shared, &inputs, &id, attempt),
        Err(error) => tracing::warn!(machine = %id, attempt, %error, "it could not be started"),
    }
    let _ = inputs.send(Input::Event(id, Event::Spawned { attempt, result })).await; // recovery asks the supervisor
}

/// A supervisor that an agent started just before it was killed may take the lock only now: it goes,
/// because nobody would know of it.
fn spawn_alone(shared: &Shared, record: &Record, spec: &mut SupervisorSpec) -> Result<(), RuntimeError> {
    let (id, dir) = (&record.assignment.id, spec.machine_dir.clone());
    let held = || dunlin_runtime::lock_holder(&dir).ok().flatten().is_some();
    // The end of a stranger takes the machine's volumes from it.
    let mut with_volumes = || {
        layers::make_ready(shared, id, record.spec()).map_err(RuntimeError::Machine)?;
        let volumes = volumes::attach(shared, record).map_err(RuntimeError::Machine)?;
        spec::with_volumes(spec, record.spec(), volumes).map_err(RuntimeError::Machine)?;
        spec.cpus = cpus::give(shared, id, record.spec());
        dunlin_runtime::spawn(&shared.exe, spec)?;
        cpus::settle(shared, id, spec.cpus.as_ref());
        Ok(())
    };
    if held() {
        end_stranger(shared, id, &dir);
    }
    match with_volumes() {
        Err(error) if held() => {
            tracing::debug!(machine = %id, %error, "another supervisor came first");
            end_stranger(shared, id, &dir);
            with_volumes()
        }
        spawned => spawned,
    }
}

fn end_stranger(shared: &Shared, id: &MachineId, dir: &Path) {
    let deadline = Instant::now() + SUPERVISOR_PATIENCE;
    while dunlin_runtime::lock_holder(dir).ok().flatten().is_some() && Instant::now() < deadline {
        clean_up(shared, id);
        std::thread::sleep(LOOK);
    }
}

/// After a start of the agent: what the machine's supervisor says, if one lives. One that has its lock
/// but does not listen yet was being started when the agent was killed.
pub fn ask_supervisor(dir: &Path) -> Option<Status> {
    let deadline = Instant::now() + SUPERVISOR_PATIENCE;
    loop {
        match Client::connect(dir).and_then(|client| client.status()) {
            Ok(status) => return Some(status),
            Err(_) if dunlin_runtime::lock_holder(dir).ok().flatten().is_none() => return None,
            Err(error) if Instant::now() >= deadline => {
                tracing::warn!(dir = %dir.display(), error = %chain(&error), "a supervisor that does not answer is ended");
                return None;
            }
            Err(_) => std::thread::sleep(LOOK),
        }
    }
}

/// Whether a living machine's processes stand still. One that cannot be asked runs, and is frozen again if it should not.
pub fn is_frozen(shared: &Shared, id: &MachineId) -> bool {
    let asked = shared.cgroups.open(&SupervisorSpec::machine_cgroup(id.as_str())).and_then(|cgroup| cgroup.is_frozen());
    asked.unwrap_or_else(|error| {
        tracing::warn!(machine = %id, error = %chain(&error), "its freezer cannot be asked");
        false
    })
}

/// No supervisor holds its lock.
fn has_ended(shared: &Shared, id: &MachineId) -> bool {
    dunlin_runtime::lock_holder(&shared.machine_dir(id.as_str())).ok().flatten().is_none()
}

fn freeze(shared: &Shared, id: &MachineId) -> Result<(), String> {
    let cgroup = shared.cgroups.open(&SupervisorSpec::machine_cgroup(id.as_str()));
    let frozen = cgroup.and_then(|cgroup| cgroup.freeze(FREEZE_PATIENCE)).map_err(|error| chain(&error));
    if let Err(error) = &frozen
        && !has_ended(shared, id)
    {
        tracing::warn!(machine = %id, %error, "it could not be suspended and goes on");
    }
    frozen
}

fn thaw(shared: &Shared, id: &MachineId, attempt: u64) {
    match shared.cgroups.open(&SupervisorSpec::machine_cgroup(id.as_str())).and_then(|cgroup| cgroup.thaw()) {
        Ok(()) | Err(CgroupError::NotFound(_)) => {}
        Err(_) if has_ended(shared, id) => {} // that is told by its supervisor
        Err(error) => {
            tracing::error!(machine = %id, attempt, error = %chain(&error), "it cannot be resumed; ending it");
            clean_up(shared, id); // the exit that follows decides what is next
        }
    }
}

/// Tells the agent when the attempt's supervisor has ended, and how the machine did.
pub fn watch_exit(shared: &Arc<Shared>, inputs: &Inputs, id: &MachineId, attempt: u64) {
    let (shared, inputs, id) = (shared.clone(), inputs.clone(), id.clone());
    tokio::spawn(async move {
        let dir = shared.machine_dir(id.as_str());
        match dunlin_runtime::supervisor_pidfd(&dir) {
            Ok(Some(fd)) => match watch(fd) {
                Ok(fd) => drop(fd.readable().await),
                Err(error) => tracing::error!(machine = %id, %error, "its supervisor cannot be watched"),
            },
            Ok(None) => {} // ended already
            Err(error) => tracing::error!(machine = %id, error = %chain(&error), "its supervisor cannot be watched"),
        }
        let exit = match dunlin_runtime::read_exit(&dir, attempt) {
            Ok(Some(record)) => convert::exit_info(record),
            Ok(None) => without_record(attempt, "its supervisor was killed"),
            Err(error) => without_record(attempt, &format!("its exit record cannot be read: {error}")),
        };
        let _ = inputs.send(Input::Event(id, Event::Exited(exit))).await; // recovery reads the record again
    });
}

#[expect(deprecated, reason = "its successor is unsafe for the sake of types that do not own their descriptor; an OwnedFd does")]
fn watch(fd: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(fd)
}

fn without_record(attempt: u64, why: &str) -> ExitInfo {
    ExitInfo {
        attempt,
        exit_code: None,
        signal: None,
        oom_killed: false,
        requested_stop: false,
        at_ms: now_ms(),
        error: Some(why.to_owned()),
    }
}

async fn stop(shared: Arc<Shared>, record: Record, signal: Option<i32>, timeout_ms: u64) {
    let (spec, id) = (record.spec().clone(), record.assignment.id.clone());
    let image_signal = spec::image(&shared, &spec.image).await.ok().and_then(|image| image.config.stop_signal);
    let signal = convert::stop_signal(signal, spec.stop.signal.as_deref(), image_signal.as_deref());
    drained(&shared, &id, DRAIN.min(Duration::from_millis(timeout_ms))).await;
    let told = tokio::task::spawn_blocking(move || {
        match tell(&shared, &id, |client| client.stop(signal, Duration::from_millis(timeout_ms))) {
            Ok(()) => {}
            Err(error @ RuntimeError::Machine(_)) => {
                tracing::warn!(machine = %id, error = %chain(&error), "its supervisor refuses to stop");
            }
            Err(error) => {
                tracing::error!(machine = %id, error = %chain(&error), "its supervisor does not answer; ending both");
                clean_up(&shared, &id); // the exit that follows decides what is next
            }
        }
    });
    let _ = told.await; // a panic in it was reported by itself
}

/// Until no request is in it, of those that came by this host's edge.
async fn drained(shared: &Shared, id: &MachineId, within: Duration) {
    let deadline = Instant::now() + within;
    while shared.table.in_flight(id) > 0 && Instant::now() < deadline {
        tokio::time::sleep(LOOK).await;
    }
}

/// Says something to a supervisor. One that is gone needs no telling: its exit is under way. One that has its
/// lock lives, whatever its socket says: it is told again until it answers, or its time is over.
fn tell(
    shared: &Shared,
    id: &MachineId,
    say: impl Fn(&Client) -> Result<(), RuntimeError>,
) -> Result<(), RuntimeError> {
    let dir = shared.machine_dir(id.as_str());
    let deadline = Instant::now() + SUPERVISOR_PATIENCE;
    loop {
        let error = match Client::connect(&dir).and_then(|client| say(&client)) {
            Ok(()) => return Ok(()),
            Err(error @ RuntimeError::Machine(_)) => return Err(error),
            Err(error) => error,
        };
        if dunlin_runtime::lock_holder(&dir).ok().flatten().is_none() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(error);
        }
        std::thread::sleep(LOOK);
    }
}

/// What the firewall knows of a machine.
pub fn rule(record: &Record) -> MachineRule {
    MachineRule { ifname: record.assignment.id.interface_name(), addr: record.assignment.address }
}

/// The same after a start of the server. Versions before this one gave shorter names, and their machines may
/// still run under them.
pub fn rule_of_before(record: &Record, interfaces: &[String]) -> MachineRule {
    const SHORT: usize = 10;
    let MachineRule { ifname, addr } = rule(record);
    let short = interfaces.iter().find(|name| name.len() == SHORT && ifname.starts_with(name.as_str()));
    MachineRule { ifname: short.cloned().unwrap_or(ifname), addr }
}

/// Nothing of an attempt may live when the next one is spawned.
pub fn clean_up(shared: &Shared, id: &MachineId) -> bool {
    shared.ready.take(id);
    let dir = shared.machine_dir(id.as_str());
    let ifname = id.interface_name();
    for _ in 0..TRIES {
        let ended = dunlin_runtime::cleanup(&dir, id.as_str(), &shared.cgroups, Some(&ifname)).map_err(|e| chain(&e));
        match ended.and_then(|()| volumes::release(shared, id)) {
            Ok(()) => {
                cpus::take_back(shared, id);
                return true;
            }
            Err(error) => {
                tracing::warn!(machine = %id, error, "not cleaned up yet");
                std::thread::sleep(PAUSE);
            }
        }
    }
    tracing::error!(machine = %id, "processes of this machine do not die; see its control group");
    false
}

fn acknowledge(shared: &Shared, id: &MachineId, attempt: u64) {
    if let Err(error) = dunlin_runtime::remove_exits(&shared.machine_dir(id.as_str()), attempt) {
        tracing::warn!(machine = %id, attempt, %error, "its exit record stays");
    }
}

fn destroy(shared: &Shared, inputs: &Inputs, record: &Record) {
    let id = record.assignment.id.clone();
    let dir = shared.machine_dir(id.as_str());
    let mut last = "its processes do not die".to_owned();
    for _ in 0..TRIES {
        if clean_up(shared, &id) {
            let gone = shared.firewall.remove(&rule(record)).map_err(|e| chain(&e));
            match gone.and_then(|()| dunlin_runtime::remove_tree(&dir).map_err(|e| e.to_string())) {
                Ok(()) => {
                    kill_point(shared.config.kill_at.as_deref(), "host.after-destroy");
                    let _ = inputs.blocking_send(Input::Event(id, Event::Destroyed)); // the agent ended: done again
                    return;
                }
                Err(error) => last = error,
            }
        }
        std::thread::sleep(PAUSE);
    }
    tracing::error!(machine = %id, error = last, "it could not be removed; the next start of the server tries again");
}
