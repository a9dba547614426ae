//! Hosts that are dead: nothing goes there, what may run twice comes back elsewhere, the rest stays.

use super::fleet::{Fleet, group, guest};
use super::{any_group, host, hosts, mount, on, three_hosts};
use dunlin_model::MachineId;
use dunlin_planner::{GroupTarget, Mark, Next, Plan, Progress, Purpose, StepKind, advance, is_replaceable};
use proptest::prelude::*;
use std::collections::BTreeSet;

fn names(made: &Plan) -> Vec<&'static str> {
    made.steps.iter().map(|step| step.kind.name()).collect()
}

/// A fleet with `count` machines of 512 MB, each on a host of its own as far as there are hosts.
fn deployed(count: u32) -> Fleet {
    let mut fleet = three_hosts();
    fleet.groups = [("web".to_owned(), group("web", count, guest(512, 0)))].into();
    fleet.deploy().unwrap();
    fleet
}

#[test]
fn what_a_dead_host_ran_is_made_elsewhere_before_it_is_given_up() {
    let mut fleet = deployed(3);
    fleet.dead = [host("f1")].into();
    let made = fleet.plan(Purpose::Repair).unwrap();
    assert_eq!(names(&made), ["reserve", "assign", "start", "gate", "destroy"], "nobody waits for a stop");
    assert!(made.steps.last().unwrap().why.contains("host f1 is lost"));
    fleet.obey(&made);
    assert_eq!(on(&fleet, "web"), [0, 2, 1], "spread as well as can be");
    assert_eq!(fleet.plan(Purpose::Repair).unwrap().steps, []);
    fleet.dead.clear();
    assert_eq!(fleet.plan(Purpose::Repair).unwrap().steps, [], "one that returns gets nothing back at once");
}

#[test]
fn as_many_as_there_is_room_for_come_back() {
    let mut fleet = three_hosts();
    fleet.groups = [("web".to_owned(), group("web", 12, guest(900, 0)))].into();
    assert!(fleet.deploy().is_ok());
    assert_eq!(on(&fleet, "web"), [4, 4, 4]);
    fleet.dead = [host("m1")].into();
    let refused = fleet.plan(Purpose::Repair).unwrap_err();
    assert!(refused.to_string().contains("host m1: it is down"), "{refused}");
    for host in &mut fleet.hosts {
        host.memory_mb += 1_000;
    }
    let made = fleet.plan(Purpose::Repair).unwrap();
    fleet.obey(&made);
    assert_eq!(on(&fleet, "web"), [5, 5, 2]);
    assert!(fleet.plan(Purpose::Repair).is_err(), "and then no more");
}

#[test]
fn a_deploy_is_not_held_up_by_what_may_not_run_twice() {
    type Change = fn(&mut GroupTarget);
    let exclusive: [(&str, Change); 3] = [
        ("a volume", |group| group.mount = Some(mount(1))),
        ("no service", |group| group.spec.services.clear()),
        ("it destroys itself", |group| group.spec.auto_destroy = true),
    ];
    for (what, make) in exclusive {
        let mut fleet = deployed(3);
        let mut target = group("web", 3, guest(512, 0));
        make(&mut target);
        fleet.rows.clear();
        fleet.groups = [("web".to_owned(), target)].into();
        fleet.deploy().unwrap();
        fleet.dead = [host("f2")].into();
        assert_eq!(fleet.plan(Purpose::Repair).unwrap().steps, [], "{what}: it stays");
        fleet.groups.get_mut("web").unwrap().spec.env.insert("NEW".into(), "1".into());
        let made = fleet.plan(Purpose::Deploy).unwrap();
        let lost = fleet.rows.values().find(|row| row.host == host("f2")).unwrap().clone();
        let steps: Vec<_> = made.steps.iter().filter(|step| step.machine == lost.id).map(|step| step.kind.name()).collect();
        assert_eq!(steps, ["update"], "{what}: its host brings it there when it returns");
        assert_eq!(names(&made).iter().filter(|name| **name == "gate").count(), 2, "{what}");
        fleet.groups.get_mut("web").unwrap().count = 2;
        let made = fleet.plan(Purpose::Deploy).unwrap();
        let gone: Vec<_> = made.steps.iter().filter(|step| step.kind.name() == "destroy").map(|step| &step.machine).collect();
        assert_eq!(gone, [&lost.id], "{what}: one that does not serve is missed the least");
        assert!(!names(&made).contains(&"stop"), "{what}");
    }
}

#[test]
fn a_plan_whose_host_dies_waits_for_nothing_of_it() {
    let mut fleet = deployed(3);
    fleet.groups.get_mut("web").unwrap().count = 2;
    fleet.groups.get_mut("web").unwrap().spec.env.insert("NEW".into(), "1".into());
    let made = fleet.plan(Purpose::Deploy).unwrap();
    for (index, step) in made.steps.iter().enumerate() {
        fleet.dead = fleet.rows.values().filter(|row| row.id == step.machine).map(|row| row.host.clone()).collect();
        let progress = Progress { next: index, ..Progress::new(&made, 0) };
        let next = advance(&made, &progress, &fleet.observed(), 1);
        let as_expected = match step.kind {
            StepKind::Start { .. } | StepKind::Gate { .. } => matches!(&next, Next::Replan { why } if why.contains("was lost with its host")),
            StepKind::Cordon { .. } | StepKind::Stop { .. } => matches!(next, Next::Mark(Mark::Passed { .. })),
            _ => matches!(next, Next::Act { .. }),
        };
        assert!(as_expected, "{}: {next:?}", step.kind.name());
    }
    let added = deployed(2);
    let mut fleet = Fleet { groups: [("web".to_owned(), group("web", 3, guest(512, 0)))].into(), ..added };
    let made = fleet.plan(Purpose::Deploy).unwrap();
    let StepKind::Reserve { host, .. } = &made.steps[0].kind else { panic!("{made:?}") };
    fleet.dead = [host.clone()].into();
    for next in [0, 1] {
        let progress = Progress { next, ..Progress::new(&made, 0) };
        assert!(matches!(advance(&made, &progress, &fleet.observed(), 1), Next::Replan { .. }));
    }
}

/// What must hold of a plan, whoever is dead.
fn keeps_the_rules(fleet: &Fleet, made: &Plan) -> Result<(), TestCaseError> {
    let is_lost = |id: &MachineId| fleet.rows.get(id).is_some_and(|row| fleet.dead.contains(&row.host));
    for step in &made.steps {
        match &step.kind {
            StepKind::Assign { host, .. } | StepKind::Reserve { host, .. } => prop_assert!(!fleet.dead.contains(host)),
            StepKind::Update { .. } | StepKind::Destroy { .. } => {}
            _ => prop_assert!(!is_lost(&step.machine), "{} is asked of a dead host", step.kind.name()),
        }
        if let (StepKind::Destroy { .. }, Some(row)) = (&step.kind, fleet.rows.get(&step.machine)) {
            let dead = 2 * fleet.dead.len() > fleet.hosts.len();
            prop_assert!(is_replaceable(&row.spec) || !is_lost(&row.id), "{} may not run twice", row.id);
            prop_assert!(!dead || !is_lost(&row.id), "most hosts are gone, and {} is moved", row.id);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Any fleet, any of its hosts dead: after some repairs there is nothing left to do, or no room.
    #[test]
    fn whatever_dies_is_healed_as_far_as_it_can_be(
        mut fleet in hosts(8),
        web in any_group("web", 9),
        db in any_group("db", 4),
        dead in proptest::collection::vec(any::<prop::sample::Index>(), 1..5),
    ) {
        fleet.groups = [("web".to_owned(), web), ("db".to_owned(), db)].into();
        prop_assume!(fleet.deploy().is_ok());
        fleet.dead = dead.iter().map(|index| fleet.hosts[index.index(fleet.hosts.len())].id.clone()).collect();
        let is_cut_off = 2 * fleet.dead.len() > fleet.hosts.len();
        let total = fleet.rows.len();
        let lost = |fleet: &Fleet| -> BTreeSet<MachineId> {
            let lost = fleet.rows.values().filter(|row| fleet.dead.contains(&row.host) && is_replaceable(&row.spec));
            lost.map(|row| row.id.clone()).collect()
        };
        let before = lost(&fleet);
        loop {
            let left = lost(&fleet);
            let Ok(made) = fleet.plan(Purpose::Repair) else { break };
            keeps_the_rules(&fleet, &made)?;
            if made.steps.is_empty() {
                prop_assert!(is_cut_off || left.is_empty(), "{left:?} are left");
                break;
            }
            fleet.obey(&made);
            prop_assert!(lost(&fleet).len() < left.len(), "each plan brings some back");
            prop_assert_eq!(fleet.rows.len(), total, "as many as there should be");
        }
        prop_assert!(!is_cut_off || lost(&fleet) == before, "who hears nobody moves nothing");
        // A deploy is made all the same, and keeps the same rules.
        for target in fleet.groups.values_mut() {
            target.spec.env.insert("NEW".into(), "1".into());
        }
        if let Ok(made) = fleet.plan(Purpose::Deploy) {
            keeps_the_rules(&fleet, &made)?;
            fleet.obey(&made);
        }
    }
}
