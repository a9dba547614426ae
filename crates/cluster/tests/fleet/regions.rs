//! Two levels: detail in the region, its summary everywhere, and detail elsewhere where it is used.

use crate::world::{Host, World, all_see_each_other, assignment, config, free_addr, id, machine, machine_id, now_ms, until};
use dunlin_cluster::{LogScope, Member};
use dunlin_model::{AppName, MachineState, Region, Service};
use dunlin_view::{Freshness, MachineFact, Summary};

fn web() -> AppName {
    "web".parse().unwrap()
}

fn ams() -> Region {
    "ams".parse().unwrap()
}

fn stopped(number: u32, host: &str, sequence: u64) -> MachineFact {
    MachineFact { state: MachineState::Stopped, ..machine(number, host, sequence) }
}

/// Control in Frankfurt, two hosts in Amsterdam, one in Sydney. Amsterdam has two machines of the app: one runs, one sleeps.
async fn fleet(world: &World) -> Vec<Host> {
    let hosts = world.fleet_in(&[("fra", "h1"), ("ams", "h2"), ("ams", "h3"), ("syd", "h4")]).await;
    all_see_each_other(&hosts).await;
    let (certificate, key) = world.authority.config_log(&"fra".parse().unwrap(), 1);
    hosts[0].cluster.publish_config_of(certificate, key);
    let mut desired = config(1);
    let service: Service = serde_json::from_value(serde_json::json!({"internal_port": 8080})).unwrap();
    for (number, host) in [(1, "h2"), (2, "h3")] {
        let mut machine = assignment(number, host);
        machine.region = ams();
        machine.spec.services = vec![service.clone()];
        desired.machines.insert(machine.id.clone(), machine);
    }
    hosts[0].view.publish_config(desired, now_ms()).unwrap();
    hosts[0].says(&[]);
    hosts[1].says(&[machine(1, "h2", 1)]);
    hosts[2].says(&[stopped(2, "h3", 1)]);
    hosts[3].says(&[]);
    until("the region knows itself", || hosts[1].sees(&machine_id(2)) == Some(1) && hosts[2].sees(&machine_id(1)) == Some(1)).await;
    hosts
}

fn scope(host: &Host, log: &str) -> Option<LogScope> {
    host.cluster.status().logs.iter().find(|held| held.name == log).map(|held| held.scope)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn detail_stays_in_its_region_and_elsewhere_is_a_summary() {
    let world = World::new();
    let hosts = fleet(&world).await;
    let [h1, h2, h3, h4] = hosts.as_slice() else { unreachable!() };
    until("control knows all", || h1.sees(&machine_id(1)) == Some(1) && h1.sees(&machine_id(2)) == Some(1)).await;
    let summary = |host: &Host| host.view.current().summary(&ams(), &web());
    until("the others know the sum", || summary(h4) == Some(Summary { ready: 1, wakeable: 1, running: 1 })).await;
    assert!(h4.view.current().machines.is_empty(), "and no more");
    until("all hosts are known everywhere", || hosts.iter().all(|host| host.view.current().hosts.len() == 4)).await;
    until("their logs are seen", || scope(h4, "host/h2").is_some() && scope(h1, "machines/h2").is_some() && scope(h3, "machines/h2").is_some()).await;
    assert_eq!(scope(h4, "host/h2"), Some(LogScope::Global));
    assert_eq!(scope(h4, "machines/h2"), None);
    assert_eq!(scope(h3, "machines/h2"), Some(LogScope::Region));
    assert_eq!(scope(h1, "machines/h2"), Some(LogScope::Subscribed));
    let told = |host: &Host| host.view.current().told.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    until("control knows of each host which machines it has", || told(h1) == "h1 h2 h3 h4").await;
    assert_eq!(told(h4), "h4");

    h2.view.publish_machine(stopped(1, "h2", 2)).unwrap();
    until("the sum turns", || summary(h4) == Some(Summary { ready: 0, wakeable: 2, running: 0 })).await;
    h2.view.remove_machine(&machine_id(1));
    until("what is gone is gone from it", || summary(h4) == Some(Summary { ready: 0, wakeable: 1, running: 0 })).await;
    until("and from control's view", || h1.sees(&machine_id(1)).is_none()).await;
    h3.view.remove_machine(&machine_id(2));
    until("nothing is left to say", || summary(h4).is_none()).await;
    for host in &hosts {
        assert_eq!(host.cluster.verify().await, Some(vec![]));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_uses_an_app_elsewhere_sees_its_machines() {
    let world = World::new();
    let hosts = fleet(&world).await;
    let [h1, h2, h3, h4] = hosts.as_slice() else { unreachable!() };
    assert!(h4.cluster.see_detail(&ams(), &web()));
    until("it sees them", || h4.sees(&machine_id(1)) == Some(1) && h4.sees(&machine_id(2)) == Some(1)).await;
    until("by subscription", || scope(h4, "machines/h2") == Some(LogScope::Subscribed)).await;
    h2.view.publish_machine(machine(1, "h2", 2)).unwrap();
    h3.view.publish_machine(machine(2, "h3", 2)).unwrap();
    until("and what becomes of them", || h4.sees(&machine_id(1)) == Some(2) && h4.sees(&machine_id(2)) == Some(2)).await;
    let age = |log: &str| h4.cluster.status().logs.iter().find(|held| held.name == log).and_then(|held| held.age_ms);
    until("they are heard like all others", || age("machines/h2").is_some() && age("machines/h3").is_some()).await;
    // The metrics tell each scope apart.
    let mut text = String::new();
    h4.cluster.render_metrics(&mut text);
    assert!(text.contains("dunlin_cluster_logs{scope=\"subscribed\"} 2"), "{text}");
    assert!(text.contains("dunlin_cluster_logs{scope=\"region\"} 1"), "{text}");
    // And each origin, and whether the others have the same.
    assert!(text.contains("dunlin_cluster_origin_lag{origin=\"machines/h2\"} 0\n"), "{text}");
    let metric = |host: &Host, line: &str| {
        let mut text = String::new();
        host.cluster.render_metrics(&mut text);
        text.lines().any(|found| found == line)
    };
    until("all others are found equal", || metric(h4, "dunlin_cluster_peers_equal{scope=\"global\"} 3") && metric(h4, "dunlin_cluster_peers_differ{scope=\"global\"} 0")).await;
    assert!(h4.cluster.status().compared.iter().all(|of| of.scope == LogScope::Global), "nobody else is in its region");
    // A host that is removed is gone with all that it said.
    let mut desired = dunlin_view::ConfigState::clone(&h1.view.current().config);
    desired.generation.revision += 1;
    desired.removed_hosts.insert(id("h3"));
    h1.view.publish_config(desired, now_ms()).unwrap();
    until("its machines are gone", || h4.sees(&machine_id(2)).is_none() && h1.sees(&machine_id(2)).is_none()).await;
    until("and its logs", || scope(h4, "machines/h3").is_none() && scope(h4, "host/h3").is_none()).await;
    assert_eq!(h4.sees(&machine_id(1)), Some(2));
    until("the other reporter counts without it", || h4.view.current().summary(&ams(), &web()) == Some(Summary { ready: 1, wakeable: 0, running: 1 })).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn control_that_starts_while_a_region_is_away_knows_what_that_said_last() {
    let world = World::new();
    let (at, anywhere) = (free_addr(), "127.0.0.1:0".parse().unwrap());
    let control = world.member_in("fra", "h1", &[]);
    let hosts = vec![world.start(control.clone(), at).await, world.start(world.member_in("ams", "h2", &[("h1", at)]), anywhere).await];
    all_see_each_other(&hosts).await;
    let (certificate, key) = world.authority.config_log(&"fra".parse().unwrap(), 1);
    hosts[0].cluster.publish_config_of(certificate, key);
    hosts[0].view.publish_config(config(1), now_ms()).unwrap();
    hosts[1].says(&[stopped(1, "h2", 1)]);
    until("control knows of it", || hosts[0].sees(&machine_id(1)) == Some(1)).await;
    hosts[1].cluster.shutdown().await;
    hosts[0].cluster.shutdown().await;
    drop(hosts);
    let known = async |member: Member| {
        let host = world.start(member, at).await;
        until("it has begun", || host.view.current().hosts.contains_key(&id("h2"))).await;
        let view = host.view.current();
        host.cluster.shutdown().await;
        (view.machines.get(&machine_id(1)).map(|fact| fact.state), view.told.contains(&id("h2")), view.freshness(&id("h2")))
    };
    assert_eq!(known(control.clone()).await, (Some(MachineState::Stopped), true, Freshness::Old));
    assert_eq!(known(control.clone()).await, (Some(MachineState::Stopped), true, Freshness::Old), "and the next time");
    // Who does not plan fetches it when it is asked.
    assert_eq!(known(Member { control: id("h9"), ..control }).await, (None, false, Freshness::Old));
}
