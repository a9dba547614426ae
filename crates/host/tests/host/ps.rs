//! The processes of a machine, also of one that makes up its command lines.

use crate::setup::World;
use dunlin_api::{HostApi, Process, Refusal};
use dunlin_model::MachineId;
use std::net::SocketAddr;

fn processes(world: &World, id: &MachineId) -> Result<Vec<Process>, Refusal> {
    world.block_on(world.host().processes(id))
}

/// A listener, a client that waits for datagrams, and a command line that would colour a terminal.
const PRINTS_NOTHING: &str = "cd /tmp; nc -l -p 9001 & \
    while :; do busybox tftp -g -l /tmp/x -r x 192.0.2.9; done 2>/dev/null & \
    sh -c \"$(busybox printf 'sleep 1000; : \\033[31mred\\n')\" & sleep 1000; true";

pub fn they_are_told_with_numbers_directories_and_sockets() {
    let mut world = World::new();
    let id = world.started(1, PRINTS_NOTHING, |_| {});
    let neighbour = world.started(2, "sleep 4242", |_| {});
    let socket = |process: &Process, proto: &str| {
        let socket = process.listen_sockets.iter().find(|socket| socket.proto.starts_with(proto));
        socket.map(|socket| socket.address.port())
    };
    let found = world.until("all are there", || {
        let found = processes(&world, &id).unwrap();
        let has = |part: &str| found.iter().any(|process| process.command.contains(part));
        let sockets = found.iter().any(|process| socket(process, "tcp") == Some(9001))
            && found.iter().any(|process| process.command.contains("tftp") && socket(process, "udp").is_some());
        (has("sleep 1000") && has("[31mred") && sockets).then_some(found)
    });
    assert_eq!((found[0].pid, found[0].command.as_str()), (1, "init"), "{found:?}");
    assert!(found.iter().all(|process| !process.command.contains("4242") && process.pid < 1000), "{found:?}");
    let listener = found.iter().find(|process| socket(process, "tcp") == Some(9001)).unwrap();
    assert!(listener.command.starts_with("nc -l"), "{listener:?}");
    assert_eq!(listener.directory, "/tmp");
    assert!(listener.rss > 0 && listener.pid > 1, "{listener:?}");
    assert!(listener.listen_sockets.iter().all(|socket| matches!(socket.address, SocketAddr::V4(_) | SocketAddr::V6(_))));
    let told = serde_json::to_value(&found).unwrap();
    assert!(!told.to_string().contains("\\u001b"), "{told}");
    assert_eq!(told[0].as_object().unwrap().len(), 8);
    let neighbours = processes(&world, &neighbour).unwrap();
    assert!(neighbours.iter().any(|process| process.command == "sleep 4242"), "{neighbours:?}");
}

pub fn a_machine_that_does_not_run_has_none() {
    let mut world = World::new();
    let id = world.ended(1, "true", |_| {});
    let refusal = processes(&world, &id).unwrap_err().to_string();
    assert!(refusal.contains("is not running") && refusal.contains("machine start"), "{refusal}");
    let unknown = MachineId::from_random([9; 7]);
    assert_eq!(processes(&world, &unknown).unwrap_err(), Refusal::NoSuchMachine(unknown));
}
