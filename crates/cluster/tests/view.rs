//! The view in memory: order, subscriptions, ages.

use dunlin_cluster::{Age, View};
use dunlin_model::{Generation, HostId, MachineId, MachineState, MachineVersion};
use dunlin_view::{ConfigState, HostFact, MachineFact, Refused};
use std::time::Duration;

fn config(incarnation: u64, revision: u64) -> ConfigState {
    ConfigState { generation: Generation { incarnation, revision }, ..ConfigState::default() }
}

fn host(id: &str, updated_at_ms: u64) -> HostFact {
    HostFact {
        id: id.parse().unwrap(),
        region: "local".parse().unwrap(),
        cpus: 2,
        memory_mb: 1024,
        memory_reserved_mb: 0,
        room: None,
        updated_at_ms,
    }
}

fn machine(number: u8, sequence: u64, updated_at_ms: u64) -> MachineFact {
    MachineFact {
        id: MachineId::from_random([number; 7]),
        host: "h1".parse().unwrap(),
        app: "web".parse().unwrap(),
        sequence,
        placement: Generation::default(),
        state: MachineState::Started,
        version: MachineVersion::new(1, [0; 10]),
        release: 1,
        process_group: "app".into(),
        attempt: 1,
        address: "10.201.0.1".parse().unwrap(),
        cordoned: false,
        checks: vec![],
        exit: None,
        restarts: 0,
        problem: None,
        over: false,
        unconfirmed: false,
        due_ms: None,
        containers: vec![],
        updated_at_ms,
    }
}

#[test]
fn older_facts_are_refused_and_change_nothing() {
    let view = View::memory();
    view.publish_config(config(2, 7), 10).unwrap();
    for (incarnation, revision) in [(2, 6), (1, 9_000)] {
        let refused = view.publish_config(config(incarnation, revision), 11).unwrap_err();
        assert!(matches!(refused, Refused::OlderConfig { .. }), "{refused}");
    }
    view.publish_config(config(3, 1), 12).unwrap();
    assert_eq!(view.current().config.generation, Generation { incarnation: 3, revision: 1 });
    view.publish_machine(machine(1, 5, 0)).unwrap();
    assert!(matches!(view.publish_machine(machine(1, 5, 0)).unwrap_err(), Refused::OlderFact { .. }));
    view.remove_machine(&MachineId::from_random([1; 7]));
    assert!(view.current().machines.is_empty());
}

#[tokio::test]
async fn a_subscription_rings_once_for_many_changes_and_only_for_later_ones() {
    let view = View::memory();
    view.publish_host(host("h1", 1));
    let mut changes = view.subscribe();
    for revision in 1..=50 {
        view.publish_config(config(1, revision), revision).unwrap();
    }
    let seen = tokio::time::timeout(Duration::from_secs(10), changes.changed()).await.unwrap();
    assert_eq!(seen.config.generation.revision, 50);
    let nothing = tokio::time::timeout(Duration::from_millis(20), changes.changed()).await;
    assert!(nothing.is_err(), "the fifty changes are one");
    // A removal of what is not there is no change, a refused fact neither.
    view.remove_machine(&MachineId::from_random([9; 7]));
    view.publish_config(config(1, 3), 99).unwrap_err();
    assert!(tokio::time::timeout(Duration::from_millis(20), changes.changed()).await.is_err());
    view.publish_host(host("h1", 2));
    let seen = tokio::time::timeout(Duration::from_secs(10), changes.changed()).await.unwrap();
    assert_eq!(seen.hosts.values().next().unwrap().updated_at_ms, 2);
}

#[test]
fn no_writer_loses_anothers_facts() {
    let view = View::memory();
    std::thread::scope(|scope| {
        for number in 0..8 {
            let view = view.clone();
            scope.spawn(move || {
                for sequence in 1..=100 {
                    view.publish_machine(machine(number, sequence, sequence)).unwrap();
                }
            });
        }
        scope.spawn(|| (1..=100).for_each(|revision| view.publish_config(config(1, revision), revision).unwrap()));
    });
    let current = view.current();
    assert_eq!(current.machines.len(), 8);
    assert!(current.machines.values().all(|fact| fact.sequence == 100));
    assert_eq!(current.config.generation.revision, 100);
}

#[test]
fn ages_are_told_for_each_writer() {
    let view = View::memory();
    assert_eq!(view.ages(1_000).config, Age::Never);
    view.publish_config(config(1, 1), 400).unwrap();
    view.publish_host(host("h2", 100));
    view.publish_host(host("h1", 100));
    view.publish_machine(machine(1, 1, 900)).unwrap();
    let ages = view.ages(1_000);
    assert_eq!(ages.config, Age::Received { ago_ms: 600 });
    let of = |id: &str| ages.hosts[&id.parse::<HostId>().unwrap()];
    assert_eq!((of("h1"), of("h2")), (100, 900), "a machine's fact is its host's word, too");
}
