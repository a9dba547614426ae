//! What happens because time has passed.

use crate::setup::{PATIENCE, World};
use dunlin_api::{CommandKind, ExecRequest, ExecSession, ExecStdin, HostApi, Refusal};
use dunlin_model::{EventKind, MachineId, MachineState, Source};
use serde_json::json;
use std::time::Duration;

/// Cron counts in minutes.
const A_MINUTE: Duration = Duration::from_secs(60);

/// Also where the agent is another one by then.
pub fn the_clock_starts_a_machine_at_its_minute() {
    let mut world = World::new();
    let id = world.created(1, "echo ran", |spec| spec["schedule"] = json!("* * * * *"));
    let never = world.created(2, "echo ran", |spec| spec["schedule"] = json!("0 0 1 1 *"));
    assert!(world.fact(&id).unwrap().due_ms.is_some());
    world.stop_host();
    world.start_host();
    world.within(A_MINUTE + PATIENCE, "it ran", || (!world.printed(&id).is_empty()).then_some(()));
    let fact = world.wait_for(&id, MachineState::Stopped);
    assert_eq!((fact.attempt, fact.exit.unwrap().exit_code), (1, Some(0)));
    let events = world.block_on(world.host().events(&id)).unwrap();
    let starts = events.iter().filter(|event| event.kind == EventKind::Start);
    assert_eq!(starts.map(|event| event.source).collect::<Vec<_>>(), [Source::Host]);
    assert_eq!(world.fact(&never).unwrap().attempt, 0);
}

fn attach(world: &World, id: &MachineId) -> ExecSession {
    let request = ExecRequest { stdin: ExecStdin::Open, ..ExecRequest::new(id.clone(), vec!["cat".into()], 3_600_000) };
    world.block_on(world.host().exec(request)).unwrap()
}

fn heartbeats(world: &World, count: usize) {
    for _ in 0..count {
        let now = || world.view.current().hosts.values().next().map(|host| host.updated_at_ms);
        let before = now();
        world.until("the host says that it lives", || (now() != before).then_some(()));
    }
}

pub fn a_console_ends_when_nobody_is_attached_any_more() {
    let mut world = World::new();
    let console = |auto_destroy: bool| {
        move |spec: &mut serde_json::Value| {
            (spec["process_group"], spec["auto_destroy"]) = (json!("fly_app_console"), json!(auto_destroy));
        }
    };
    let id = world.started(1, "sleep 1000", console(true));
    let stays = world.started(2, "sleep 1000", console(false));
    let (first, second) = (attach(&world, &id), attach(&world, &id));
    drop(attach(&world, &stays));
    drop(first);
    heartbeats(&world, 3);
    assert_eq!(world.fact(&id).unwrap().state, MachineState::Started, "somebody is attached");
    drop(second);
    let fact = world.until("it has ended", || world.fact(&id).filter(|fact| fact.over));
    assert_eq!(fact.state, MachineState::Stopped);
    assert!(matches!(world.command(&id, CommandKind::Start), Err(Refusal::Over { .. })));
    assert_eq!(world.fact(&stays).unwrap().state, MachineState::Started, "it would not be destroyed");
}
