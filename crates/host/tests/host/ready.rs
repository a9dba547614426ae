//! Stopped machines whose program only is to be started.

use crate::cpus::{cpus, performance};
use crate::setup::World;
use dunlin_api::{CommandKind, LastHop};
use dunlin_model::{MachineId, MachineState};
use dunlin_runtime::cgroup::Cgroups;
use dunlin_runtime::{Client, Phase};
use serde_json::{Value, json};

/// Says what it was given, and stays.
const SAYS: &str = "echo $WORD; exec sleep 1000";

fn world(places: usize) -> World {
    let mut world = World::without_host();
    world.ready_machines = places;
    world.start_host();
    world
}

fn says(word: &'static str) -> impl Fn(&mut Value) {
    move |spec| {
        spec["services"] = json!([{"internal_port": 80}]);
        spec["env"] = json!({"WORD": word});
    }
}

/// The first process of one that stands ready, as the host numbers it.
fn waiting(world: &World, id: &MachineId) -> Option<i32> {
    let dir = world.dir.path().join("machines").join(id.as_str());
    let status = Client::connect(&dir).ok()?.status().ok()?;
    (status.phase == Phase::Created).then_some(status.init_pid)
}

fn rested(world: &mut World, n: u8) -> MachineId {
    let id = world.started(n, SAYS, says("one"));
    world.until("it says it", || (!world.printed(&id).is_empty()).then_some(()));
    stop(world, &id);
    id
}

fn stop(world: &World, id: &MachineId) {
    world.command(id, CommandKind::Stop { signal: None, timeout_ms: None }).unwrap();
    world.wait_for(id, MachineState::Stopped);
}

fn wake(world: &World, id: &MachineId) -> i32 {
    world.block_on(world.host().wake(id, u64::MAX)).unwrap();
    world.wait_for(id, MachineState::Started);
    let dir = world.dir.path().join("machines").join(id.as_str());
    Client::connect(&dir).unwrap().status().unwrap().init_pid
}

fn said(world: &World, id: &MachineId, lines: &[&str]) {
    world.until("it says it again", || (world.printed(id).len() >= lines.len()).then_some(()));
    assert_eq!(world.printed(id), lines);
}

pub fn the_last_stopped_has_the_place_and_a_request_finds_it_made() {
    let mut world = world(1);
    let first = rested(&mut world, 1);
    world.until("it stands ready", || waiting(&world, &first));
    let second = rested(&mut world, 2);
    let made = world.until("it has the place now", || waiting(&world, &second));
    world.until("the first has left it", || waiting(&world, &first).is_none().then_some(()));
    assert_eq!(world.fact(&second).unwrap().state, MachineState::Stopped);
    assert_eq!(wake(&world, &second), made, "another was made");
    said(&world, &second, &["one", "one"]);
    assert_eq!(world.fact(&second).unwrap().attempt, 2);
    world.until("the first has it again", || waiting(&world, &first));
    // One that does not stand ready starts as well.
    wake(&world, &first);
    said(&world, &first, &["one", "one"]);
    for id in [first, second] {
        stop(&world, &id);
        world.destroy(&id);
        let dir = world.dir.path().join("machines").join(id.as_str());
        world.until("nothing of it is left", || (!dir.exists()).then_some(()));
    }
}

pub fn it_is_always_made_of_what_a_start_would_be() {
    let mut world = world(4);
    let id = rested(&mut world, 1);
    let made = world.until("it stands ready", || waiting(&world, &id));
    world.assign(1, SAYS, says("two"));
    world.until("it is made anew", || waiting(&world, &id).filter(|pid| *pid != made));
    wake(&world, &id);
    said(&world, &id, &["one", "two"]);
    stop(&world, &id);
    world.until("it stands ready", || waiting(&world, &id));
    world.assign(1, SAYS, says("three"));
    // Whatever of it is made when the request comes.
    world.until("it has the version", || {
        let wanted = &world.config.machines[&id].spec.version;
        (world.fact(&id)?.version == *wanted).then_some(())
    });
    wake(&world, &id);
    said(&world, &id, &["one", "two", "three"]);
}

pub fn ends_of_agents_and_supervisors_leave_one_at_most() {
    let mut world = world(4);
    let id = rested(&mut world, 1);
    let made = world.until("it stands ready", || waiting(&world, &id));
    world.stop_host();
    assert_eq!(waiting(&world, &id), Some(made));
    world.start_host();
    assert_eq!(world.fact(&id).unwrap().state, MachineState::Stopped);
    let again = world.until("it is made anew", || waiting(&world, &id).filter(|pid| *pid != made));
    let supervisor = dunlin_runtime::lock_holder(&world.dir.path().join("machines").join(id.as_str())).unwrap().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(supervisor), nix::sys::signal::Signal::SIGKILL).unwrap();
    assert_ne!(wake(&world, &id), again);
    said(&world, &id, &["one", "one"]);
    assert_eq!(world.fact(&id).unwrap().attempt, 2);
}

pub fn one_of_performance_cpus_gets_its_own_as_its_program_starts() {
    let mut world = world(1);
    let cgroups = Cgroups::detect(&world.instance()).unwrap();
    let Some(all) = cgroups.cpus().unwrap().filter(|all| all.0.len() >= 2) else { return };
    let id = world.started(1, SAYS, |spec| {
        says("one")(spec);
        performance(spec);
    });
    said(&world, &id, &["one"]);
    stop(&world, &id);
    let made = world.until("it stands ready", || waiting(&world, &id));
    assert_eq!(cpus(&cgroups, &id), all, "it has none of its own yet");
    assert_eq!(wake(&world, &id), made, "another was made");
    assert_eq!(cpus(&cgroups, &id).0.len(), 1);
}

pub fn one_whose_root_is_kept_has_no_place() {
    let mut world = world(2);
    let kept = world.started(1, "echo x >> /tmp/starts; cat /tmp/starts; exec sleep 1000", |spec| {
        spec["services"] = json!([{"internal_port": 80}]);
        spec["rootfs"] = json!({"persist": "restart"});
    });
    said(&world, &kept, &["x"]);
    stop(&world, &kept);
    let other = rested(&mut world, 2);
    world.until("the other stands ready", || waiting(&world, &other));
    assert_eq!(waiting(&world, &kept), None);
    wake(&world, &kept);
    said(&world, &kept, &["x", "x", "x"]);
}
