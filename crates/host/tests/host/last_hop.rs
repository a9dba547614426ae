//! Waking for requests.

use crate::setup::World;
use dunlin_api::{AdmitRefusal, AdmitRequest, CommandKind, LastHop};
use dunlin_model::MachineState;
use serde_json::json;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

pub fn in_ms(ms: u64) -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64 + ms
}

fn with_service(spec: &mut serde_json::Value) {
    spec["services"] = json!([{"internal_port": 8080}]);
}

pub fn a_request_that_gives_up_leaves_the_machine_to_be_woken_by_the_next() {
    let mut world = World::new();
    let id = world.created(1, "sleep 1000", with_service);
    // Clients that go away at every moment of a start.
    for us in (0..40).map(|n| n * n * 5) {
        let gone = Duration::from_micros(us);
        let _ = world.block_on(async { tokio::time::timeout(gone, world.host().wake(&id, in_ms(60_000))).await });
        world.block_on(world.host().wake(&id, in_ms(20_000))).unwrap();
        world.command(&id, CommandKind::Stop { signal: None, timeout_ms: None }).unwrap();
        world.wait_for(&id, MachineState::Stopped);
    }
}

pub fn a_thousand_requests_are_one_start_and_hear_of_its_end() {
    let mut world = World::new();
    let id = world.created(1, "exit 7", |spec| {
        with_service(spec);
        spec["checks"] = json!([{
            "name": "up", "port": 8080, "type": "tcp", "interval_ms": 100, "timeout_ms": 100, "grace_period_ms": 0,
            "gates_routing": true
        }]);
    });
    let began = Instant::now();
    let answers: Vec<_> = world.block_on(async {
        let wakes = (0..1000).map(|_| {
            let (host, id) = (world.host.clone().unwrap(), id.clone());
            tokio::spawn(async move { host.wake(&id, in_ms(50_000)).await })
        });
        let mut answers = Vec::new();
        for wake in wakes.collect::<Vec<_>>() {
            answers.push(wake.await.unwrap());
        }
        answers
    });
    assert!(began.elapsed() < Duration::from_secs(20), "they did not wait for their deadline");
    for answer in answers {
        let Err(AdmitRefusal::DidNotWake(why)) = answer else { panic!("{answer:?}") };
        assert!(why.contains("exit code 7"), "{why}");
    }
    assert_eq!(world.fact(&id).unwrap().attempt, 1);
}

pub fn a_request_does_not_wait_for_one_that_goes_on_crashing() {
    let mut world = World::new();
    let id = world.created(1, "exit 7", |spec| {
        with_service(spec);
        spec["restart"] = json!({ "policy": "always", "max_retries": 0 });
        spec["checks"] = json!([{
            "name": "up", "port": 8080, "type": "tcp", "interval_ms": 100, "timeout_ms": 100, "grace_period_ms": 0,
            "gates_routing": true
        }]);
    });
    // The second comes while it waits for its next try, or is in it.
    for _ in 0..2 {
        let began = Instant::now();
        let answer = world.block_on(world.host().wake(&id, in_ms(600_000)));
        let Err(AdmitRefusal::DidNotWake(why)) = answer else { panic!("{answer:?}") };
        assert!(why.starts_with("it ended with exit code 7 before it was healthy, ") && why.ends_with(" times"), "{why}");
        assert!(began.elapsed() < Duration::from_secs(300), "it waited for its deadline");
    }
    assert!(world.fact(&id).unwrap().attempt >= 3);
}

pub fn what_must_not_be_woken_is_not() {
    let mut world = World::new();
    let wake = |world: &World, id| world.block_on(world.host().wake(id, in_ms(50_000)));
    let never = world.created(1, "sleep 1000", |spec| spec["services"] = json!([{"internal_port": 80, "autostart": false}]));
    assert_eq!(wake(&world, &never), Err(AdmitRefusal::NotRunning));
    let id = world.created(2, "trap 'sleep 0.5; exit' TERM; echo up; while :; do sleep 0.05; done", with_service);
    world.command(&id, CommandKind::Cordon).unwrap();
    assert_eq!(wake(&world, &id), Err(AdmitRefusal::Cordoned));
    world.command(&id, CommandKind::Uncordon).unwrap();
    world.until("uncordoned", || world.fact(&id).filter(|fact| !fact.cordoned));
    assert_eq!(wake(&world, &id), Ok(()));
    // One that is stopping is woken as soon as it rests.
    world.until("it traps", || world.printed(&id).contains(&"up".to_owned()).then_some(()));
    world.command(&id, CommandKind::Stop { signal: Some("SIGTERM".into()), timeout_ms: None }).unwrap();
    world.wait_for(&id, MachineState::Stopping);
    assert_eq!(wake(&world, &id), Ok(()));
    assert_eq!(world.fact(&id).unwrap().attempt, 2);
}

pub fn a_request_is_answered_before_its_machine_is_told_to_stop() {
    let mut world = World::new();
    let id = world.started(1, "trap 'echo told; exit' TERM; echo up; while :; do sleep 0.01; done", with_service);
    let said = |world: &World, word: &str| world.printed(&id).iter().any(|line| line == word);
    world.until("it traps", || said(&world, "up").then_some(()));
    let fact = world.fact(&id).unwrap();
    let request = AdmitRequest { machine: id.clone(), version: fact.version, placement: fact.placement, internal_port: 80 };
    let stop = || world.command(&id, CommandKind::Stop { signal: Some("SIGTERM".into()), timeout_ms: Some(20_000) }).unwrap();
    let admission = world.host().admit(&request).unwrap();
    let began = Instant::now();
    stop();
    world.wait_for(&id, MachineState::Stopping);
    assert!(matches!(world.host().admit(&request), Err(AdmitRefusal::Draining)), "another one is let in");
    std::thread::sleep(Duration::from_millis(300));
    let told = said(&world, "told");
    // On a computer that is busy with other things its second may be over.
    assert!(!told || began.elapsed() > Duration::from_millis(900), "it was told although a request is in it");
    drop(admission);
    world.until("it is told", || said(&world, "told").then_some(()));
    world.wait_for(&id, MachineState::Stopped);
    // One that takes longer holds nothing up.
    world.command(&id, CommandKind::Start).unwrap();
    world.wait_for(&id, MachineState::Started);
    let _admission = world.host().admit(&request).unwrap();
    stop();
    world.wait_for(&id, MachineState::Stopped);
}
