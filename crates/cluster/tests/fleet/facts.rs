//! What hosts say, and desired state, in everybody's view.

use crate::world::{World, all_see_each_other, assignment, config, free_addr, id, machine, machine_id, now_ms, until};
use dunlin_cluster::View;
use dunlin_view::{CheckState, CheckStatus, Freshness};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_find_each_other_and_share_what_they_say() {
    let world = World::new();
    let hosts = world.fleet(&["h1", "h2", "h3"]).await;
    all_see_each_other(&hosts).await;
    let [h1, h2, h3] = hosts.as_slice() else { unreachable!() };
    h2.says(&[machine(1, "h2", 1), machine(2, "h2", 1)]);
    until("the others have h2's machines", || [h1, h3].iter().all(|host| host.sees(&machine_id(1)) == Some(1) && host.sees(&machine_id(2)) == Some(1))).await;
    let seen = h3.view.current();
    assert_eq!(seen.hosts[&id("h2")].cpus, 2);
    until("h2 is fresh", || h3.view.current().heard.get(&id("h2")) == Some(&Freshness::Fresh)).await;
    assert_eq!(h3.cluster.address(&id("h2")), Some(h2.cluster.advertised()));
    h2.view.publish_machine(machine(1, "h2", 2)).unwrap();
    h2.view.remove_machine(&machine_id(2));
    until("changes and removals arrive", || [h1, h3].iter().all(|host| host.sees(&machine_id(1)) == Some(2) && host.sees(&machine_id(2)).is_none())).await;
    assert_eq!(h1.cluster.verify().await, Some(vec![]));
    let names: Vec<String> = h3.cluster.members().into_iter().map(|member| member.id.to_string()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_said_before_the_host_has_said_all() {
    let world = World::new();
    let hosts = world.fleet(&["h1", "h2"]).await;
    all_see_each_other(&hosts).await;
    hosts[0].view.publish_machine(machine(1, "h1", 1)).unwrap();
    hosts[1].says(&[machine(2, "h2", 1)]);
    until("h2 is heard", || hosts[0].sees(&machine_id(2)).is_some()).await;
    assert!(hosts[0].cluster.status().logs.iter().all(|log| log.name != "host/h1"), "the first publication would be the whole truth");
    hosts[0].says(&[machine(3, "h1", 1)]);
    until("then all of it is", || hosts[1].sees(&machine_id(1)).is_some() && hosts[1].sees(&machine_id(3)).is_some()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fact_that_is_too_long_is_cut_and_keeps_its_health() {
    let world = World::new();
    let hosts = world.fleet(&["h1", "h2"]).await;
    let check = |number: usize, status| CheckStatus { name: format!("check-{number}"), status, gates_routing: true, output: "ä".repeat(500), updated_at_ms: 1 };
    let mut fact = machine(1, "h1", 1);
    fact.checks = (0..100).map(|number| check(number, if number == 77 { CheckState::Critical } else { CheckState::Passing })).collect();
    hosts[0].says(&[fact]);
    until("the fact is there", || hosts[1].sees(&machine_id(1)).is_some()).await;
    let seen = hosts[1].view.current().machines[&machine_id(1)].clone();
    assert!(!seen.is_healthy(), "the one check that fails is told");
    assert_eq!(seen.checks[0].name, "check-77");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn desired_state_reaches_all_and_outlives_a_restart() {
    let world = World::new();
    let (first, third) = (free_addr(), free_addr());
    let h1 = world.start(world.member("h1", &[]), first).await;
    let member = world.member("h3", &[("h1", first)]);
    let h3 = world.start(member.clone(), third).await;
    let (certificate, key) = world.authority.config_log(&"fra".parse().unwrap(), 1);
    h1.cluster.publish_config_of(certificate, key);
    let mut desired = config(1);
    desired.machines = (0..1_000).map(|number| (machine_id(number), assignment(number, "h3"))).collect();
    desired.secrets.insert("web".parse().unwrap(), vec![dunlin_view::SecretsFact { host: id("h3"), version: 1, sealed: "s".repeat(50_000) }]);
    h1.view.publish_config(desired.clone(), now_ms()).unwrap();
    until("h3 has desired state", || h3.view.current().config.generation.revision == 1).await;
    assert_eq!(*h3.view.current().config, desired, "whole, oversized entries included");
    desired.generation.revision = 2;
    desired.machines.remove(&machine_id(5));
    desired.tombstones.insert(machine_id(5), id("h3"));
    h1.view.publish_config(desired.clone(), now_ms()).unwrap();
    until("h3 has the next", || h3.view.current().config.generation.revision == 2).await;
    assert_eq!(*h3.view.current().config, desired);
    h3.cluster.shutdown().await;
    h1.cluster.shutdown().await;
    // Nobody is there, and the view is empty: all it knows is on its disk.
    let h3 = world.start(member, third).await;
    until("it is known from disk", || h3.view.current().config.generation.revision == 2).await;
    assert_eq!(*h3.view.current().config, desired);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_started_again_goes_on() {
    let world = World::new();
    let (first, second) = (free_addr(), free_addr());
    let h1 = world.start(world.member("h1", &[]), first).await;
    let member = world.member("h2", &[("h1", first)]);
    let h2 = world.start(member.clone(), second).await;
    h2.says(&[machine(1, "h2", 1), machine(2, "h2", 1)]);
    h1.says(&[machine(9, "h1", 1)]);
    until("both are heard", || h1.sees(&machine_id(2)).is_some() && h2.sees(&machine_id(9)).is_some()).await;
    h2.cluster.shutdown().await;
    until("it has left", || !h1.cluster.is_up(&id("h2"))).await;
    assert!(h1.sees(&machine_id(2)).is_some(), "its facts stay");
    let h2 = world.start(member, second).await;
    until("it knows h1 from disk or from h1", || h2.sees(&machine_id(9)).is_some()).await;
    h2.says(&[machine(1, "h2", 2)]);
    until("it is heard again", || h1.sees(&machine_id(1)) == Some(2)).await;
    until("what it has no more is gone", || h1.sees(&machine_id(2)).is_none()).await;
    until("it is a member again", || h1.cluster.is_up(&id("h2"))).await;
    assert!(h1.cluster.status().logs.iter().all(|log| !log.quarantined));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn control_that_is_started_again_goes_on_above_what_it_has_published() {
    let world = World::new();
    let (first, second) = (free_addr(), free_addr());
    let control = world.member("h1", &[]);
    let h1 = world.start(control.clone(), first).await;
    let h2 = world.start(world.member("h2", &[("h1", first)]), second).await;
    let publish = |host: &crate::world::Host| {
        let (certificate, key) = world.authority.config_log(&"fra".parse().unwrap(), 1);
        host.cluster.publish_config_of(certificate, key);
    };
    publish(&h1);
    h1.view.publish_config(config(1), now_ms()).unwrap();
    until("h2 has desired state", || h2.view.current().config.generation.revision == 1).await;
    h1.cluster.shutdown().await;
    // Its disk is older than what it has said: nothing of the cluster is left on it.
    std::fs::remove_file(world.dir.path().join("h1/flock.snapshot")).unwrap();
    let mut control = control;
    control.peers.push((id("h2"), second));
    let h1 = world.start(control, first).await;
    until("it speaks", || h1.cluster.status().speaks).await;
    publish(&h1);
    for revision in 2..6 {
        h1.view.publish_config(config(revision), now_ms()).unwrap();
    }
    until("h2 has what came then", || h2.view.current().config.generation.revision == 5).await;
    assert!(h2.cluster.status().logs.iter().all(|log| !log.quarantined), "{:?}", h2.cluster.status().logs);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_is_gone_grows_old_and_one_without_a_word_is_old() {
    let world = World::new();
    let hosts = world.fleet(&["h1", "h2", "h3"]).await;
    all_see_each_other(&hosts).await;
    let [h1, h2, _] = hosts.as_slice() else { unreachable!() };
    h2.says(&[machine(1, "h2", 1)]);
    until("h2 is fresh", || h1.view.current().heard.get(&id("h2")) == Some(&Freshness::Fresh)).await;
    until("h3 is a member without a log", || h1.view.current().heard.get(&id("h3")) == Some(&Freshness::Old)).await;
    let mut changes = h1.view.subscribe();
    h2.cluster.shutdown().await;
    until("h2 is aging", || h1.view.current().freshness(&id("h2")) == Freshness::Aging).await;
    changes.changed().await;
    assert_eq!(View::current(&h1.view).machines.len(), 1, "its facts stay");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_of_a_running_host_says_nothing() {
    let world = World::new();
    let (first, second) = (free_addr(), free_addr());
    let h1 = world.start(world.member("h1", &[]), first).await;
    let member = world.member("h2", &[("h1", first)]);
    let h2 = world.start(member.clone(), second).await;
    h2.says(&[machine(1, "h2", 1)]);
    until("h2 is heard", || h1.sees(&machine_id(1)).is_some()).await;
    let copy = world.start_in("copy", member, free_addr()).await;
    copy.says(&[machine(2, "h2", 1)]);
    until("the copy knows that it is one", || copy.cluster.is_silenced()).await;
    assert!(!h2.cluster.is_silenced());
    assert_eq!(copy.cluster.status().silenced, Some(dunlin_cluster::Silenced::DuplicateIdentity));
    h2.view.publish_machine(machine(1, "h2", 2)).unwrap();
    until("the host goes on", || h1.sees(&machine_id(1)) == Some(2)).await;
    assert!(h1.sees(&machine_id(2)).is_none());
}
