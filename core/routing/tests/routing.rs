//! Routing as a whole: examples first, then properties over generated apps.

use dunlin_model::{
    Concurrency, ConcurrencyKind, Generation, ImageRef, MachineId, MachineSpec, MachineState, MachineVersion,
    Region, Service,
};
use dunlin_routing::{Availability, Decision, Head, Loads, Table, Vantage, WaitReason};
use dunlin_view::{AppFact, CheckState, CheckStatus, ConfigState, MachineAssignment, MachineFact, Snapshot};
use proptest::prelude::*;
use std::sync::Arc;

const HOST: &str = "web.localhost";
const NOW: u64 = 1_800_000_000_000;

#[derive(Debug, Clone)]
struct M {
    state: MachineState,
    check: CheckState,
    cordoned: bool,
    autostart: bool,
    force_https: bool,
    soft: u32,
    hard: Option<u32>,
}

fn started() -> M {
    M {
        state: MachineState::Started,
        check: CheckState::Passing,
        cordoned: false,
        autostart: true,
        force_https: false,
        soft: 20,
        hard: None,
    }
}

fn id(n: u8) -> MachineId {
    MachineId::from_random([0, 0, 0, 0, 0, 0, n])
}

fn region() -> Region {
    "local".parse().unwrap()
}

fn here() -> Vantage {
    Vantage::of(region())
}

fn snapshot(machines: &[M]) -> Snapshot {
    let mut config = ConfigState::default();
    let app = AppFact { org: "personal".parse().unwrap(), hostnames: vec![HOST.into()], current_release: 1 };
    config.apps.insert("web".parse().unwrap(), app);
    let mut view = Snapshot::default();
    for (n, m) in machines.iter().enumerate() {
        let (id, version) = (id(n as u8), MachineVersion::new(1, [n as u8; 10]));
        let service = Service {
            internal_port: 8080,
            force_https: m.force_https,
            autostart: m.autostart,
            autostop: Default::default(),
            min_machines_running: 0,
            max_machines_running: None,
            concurrency: Concurrency { kind: ConcurrencyKind::Requests, soft_limit: m.soft, hard_limit: m.hard },
        };
        let image = ImageRef { repository: "web".into(), digest: format!("sha256:{}", "0".repeat(64)), tag: None };
        let spec = MachineSpec {
            release: 1,
            services: vec![service],
            ..MachineSpec::of(version.clone(), "personal".parse().unwrap(), "web".parse().unwrap(), image)
        };
        let address = std::net::Ipv4Addr::new(10, 201, 0, n as u8 + 1);
        config.machines.insert(
            id.clone(),
            MachineAssignment {
                id: id.clone(),
                name: format!("m{n}"),
                host: "h1".parse().unwrap(),
                region: region(),
                address,
                placement: Generation::default(),
                created_at_ms: 0,
                spec,
            },
        );
        let check = CheckStatus {
            name: "http".into(),
            status: m.check,
            gates_routing: true,
            output: String::new(),
            updated_at_ms: 0,
        };
        let fact = MachineFact {
            id,
            host: "h1".parse().unwrap(),
            app: "web".parse().unwrap(),
            sequence: 1,
            placement: Generation::default(),
            state: m.state,
            version,
            release: 1,
            process_group: "app".into(),
            attempt: 1,
            address,
            cordoned: m.cordoned,
            checks: vec![check],
            exit: None,
            restarts: 0,
            problem: None,
            over: false,
            due_ms: None,
            containers: vec![],
            updated_at_ms: 0,
        };
        view = view.with_machine(Arc::new(fact)).unwrap();
    }
    view.with_config(Arc::new(config), NOW).unwrap()
}

fn head(host: &str) -> Head<'_> {
    Head { host, is_tls: true, ..Head::default() }
}

fn route(table: &Table, tried: &[MachineId], random: u64) -> Decision {
    table.route(&head(HOST), tried, random, NOW)
}

#[track_caller]
fn rejected(decision: Decision) -> (u16, &'static str) {
    match decision {
        Decision::Reject(reject) => {
            assert!(!reject.reason.is_empty() && !reject.hint.is_empty());
            (reject.status, reject.code)
        }
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[test]
fn an_unknown_host_is_a_clear_404() {
    let table = Table::build(&snapshot(&[started()]), &Loads::default(), None, &here());
    let decision = table.route(&head("other.localhost"), &[], 0, NOW);
    assert_eq!(rejected(decision), (404, "PR01"));
}

#[test]
fn plain_http_is_redirected_only_where_it_is_wanted() {
    let plain = Head { host: HOST, ..Head::default() };
    let forced = Table::build(&snapshot(&[M { force_https: true, ..started() }]), &Loads::default(), None, &here());
    assert!(matches!(forced.route(&plain, &[], 0, NOW), Decision::Redirect { .. }));
    assert!(matches!(route(&forced, &[], 0), Decision::Forward { .. }));
    let free = Table::build(&snapshot(&[started()]), &Loads::default(), None, &here());
    assert!(matches!(free.route(&plain, &[], 0, NOW), Decision::Forward { .. }));
}

#[test]
fn requests_spread_and_the_counters_outlive_a_new_table() {
    let loads = Loads::default();
    let view = snapshot(&[started(), started()]);
    let first = Table::build(&view, &loads, None, &here());
    let mut held = Vec::new();
    for random in 0..4 {
        held.push(route(&first, &[], random));
    }
    assert_eq!(loads.machine(&id(0)).in_flight(), 2);
    assert_eq!(loads.machine(&id(1)).in_flight(), 2);
    let second = Table::build(&view, &loads, Some(&first), &here());
    assert_eq!(second.serial, first.serial + 1);
    drop(first);
    held.push(route(&second, &[id(0)], 0));
    assert_eq!(loads.machine(&id(1)).in_flight(), 3, "the first was tried");
    held.clear();
    assert_eq!(loads.machine(&id(1)).in_flight(), 0);
}

#[test]
fn a_sleeping_machine_is_woken_only_when_nobody_has_room() {
    let asleep = M { state: MachineState::Stopped, ..started() };
    let table = Table::build(&snapshot(&[asleep.clone(), M { hard: Some(1), soft: 1, ..started() }]), &Loads::default(), None, &here());
    let first = route(&table, &[], 0);
    assert!(matches!(&first, Decision::Forward { target, .. } if target.machine == id(1)));
    let second = route(&table, &[], 0);
    assert!(matches!(&second, Decision::Wake { target, .. } if target.machine == id(0)), "{second:?}");
    let manual = M { autostart: false, ..asleep };
    let table = Table::build(&snapshot(&[manual]), &Loads::default(), None, &here());
    assert_eq!(rejected(route(&table, &[], 0)), (503, "PR10"));
}

#[test]
fn whoever_finds_the_woken_machine_full_waits_for_it() {
    let asleep = M { state: MachineState::Stopped, soft: 1, hard: Some(1), ..started() };
    let table = Table::build(&snapshot(std::slice::from_ref(&asleep)), &Loads::default(), None, &here());
    let first = route(&table, &[], 0);
    assert!(matches!(first, Decision::Wake { .. }));
    let id = id(0);
    let forced = Head { force_instance: Some(id.as_str()), ..head(HOST) };
    for decision in [route(&table, &[], 0), table.route(&forced, &[], 0, NOW)] {
        assert!(matches!(decision, Decision::Wait { reason: WaitReason::Coming, .. }), "{decision:?}");
    }
    // A busy machine beside it becomes free sooner than the sleeping one is up.
    let busy = M { soft: 1, hard: Some(0), ..started() };
    let table = Table::build(&snapshot(&[busy, asleep]), &Loads::default(), None, &here());
    let _first = route(&table, &[], 0);
    assert!(matches!(route(&table, &[], 0), Decision::Wait { reason: WaitReason::AtLimit, .. }));
}

#[test]
fn above_the_soft_limit_a_sleeper_is_woken_beside() {
    let asleep = M { state: MachineState::Stopped, ..started() };
    let table = Table::build(&snapshot(&[asleep, M { soft: 1, ..started() }]), &Loads::default(), None, &here());
    let first = route(&table, &[], 0);
    assert!(matches!(first, Decision::Forward { also_wake: None, .. }));
    let second = route(&table, &[], 0);
    assert!(matches!(&second, Decision::Forward { also_wake: Some(other), .. } if other.machine == id(0)));
}

#[test]
fn a_single_machine_that_is_coming_is_waited_for() {
    for state in [MachineState::Starting, MachineState::Restarting, MachineState::Updating, MachineState::Creating] {
        let table = Table::build(&snapshot(&[M { state, ..started() }]), &Loads::default(), None, &here());
        let decision = route(&table, &[], 0);
        assert!(matches!(decision, Decision::Wait { reason: WaitReason::Coming, .. }), "{state:?}");
    }
}

/// A woken app takes its time until its first check passes; whoever asks meanwhile waits as for a start.
#[test]
fn an_app_that_boots_is_coming_and_one_that_fails_its_checks_is_unhealthy() {
    for (check, expected) in [(CheckState::Warning, WaitReason::Coming), (CheckState::Critical, WaitReason::Unhealthy)] {
        let table = Table::build(&snapshot(&[M { check, ..started() }]), &Loads::default(), None, &here());
        let id = id(0);
        let forced = Head { force_instance: Some(id.as_str()), ..head(HOST) };
        for decision in [route(&table, &[], 0), table.route(&forced, &[], 0, NOW)] {
            assert!(matches!(decision, Decision::Wait { reason, .. } if reason == expected), "{check:?}: {decision:?}");
        }
    }
    let asleep = M { state: MachineState::Stopped, ..started() };
    let table = Table::build(&snapshot(&[M { check: CheckState::Warning, ..started() }, asleep]), &Loads::default(), None, &here());
    let decision = route(&table, &[], 0);
    assert!(matches!(decision, Decision::Wait { reason: WaitReason::Coming, .. }), "one is booting: {decision:?}");
}

#[test]
fn a_machine_in_its_old_version_keeps_its_old_port() {
    let loads = Loads::default();
    let before = snapshot(&[started()]);
    let first = Table::build(&before, &loads, None, &here());
    let mut config = (*before.config).clone();
    let assignment = config.machines.get_mut(&id(0)).unwrap();
    assignment.spec.version = MachineVersion::new(2, [0; 10]);
    assignment.spec.services[0].internal_port = 9090;
    let between = Snapshot { config: Arc::new(config), ..before };
    let table = Table::build(&between, &loads, Some(&first), &here());
    let candidate = &table.find(HOST).unwrap().candidates[0];
    assert_eq!((candidate.service.internal_port, &candidate.version), (8080, &MachineVersion::new(1, [0; 10])));
}

#[test]
fn a_forced_machine_is_the_only_choice_and_a_preferred_one_the_first() {
    let table = Table::build(&snapshot(&[started(), M { check: CheckState::Critical, ..started() }]), &Loads::default(), None, &here());
    let (zero, one) = (id(0), id(1));
    let ask = |force: Option<&str>, prefer: Option<&str>| {
        let head = Head { force_instance: force, prefer_instance: prefer, ..head(HOST) };
        table.route(&head, &[], 0, NOW)
    };
    assert!(matches!(ask(Some(zero.as_str()), None), Decision::Forward { .. }));
    assert!(matches!(ask(Some(one.as_str()), None), Decision::Wait { .. }));
    assert_eq!(rejected(ask(Some("nonsense"), None)), (404, "PR05"));
    assert!(matches!(ask(None, Some(one.as_str())), Decision::Forward { preferred_unavailable: true, .. }));
    assert!(matches!(ask(None, Some(zero.as_str())), Decision::Forward { preferred_unavailable: false, .. }));
}

#[test]
fn a_machine_that_failed_is_asked_last_but_asked() {
    let loads = Loads::default();
    let table = Table::build(&snapshot(&[started(), started()]), &loads, None, &here());
    loads.machine(&id(0)).record_failure(NOW);
    for random in 0..32 {
        assert!(matches!(route(&table, &[], random), Decision::Forward { target, .. } if target.machine == id(1)));
    }
    assert!(matches!(route(&table, &[id(1)], 0), Decision::Forward { target, .. } if target.machine == id(0)));
}

fn any_machine() -> impl Strategy<Value = M> {
    let states = prop::sample::select(vec![
        MachineState::Creating,
        MachineState::Created,
        MachineState::Starting,
        MachineState::Started,
        MachineState::Started,
        MachineState::Started,
        MachineState::Stopping,
        MachineState::Stopped,
        MachineState::Suspended,
        MachineState::Restarting,
        MachineState::Updating,
        MachineState::Failed,
        MachineState::Destroying,
        MachineState::Destroyed,
    ]);
    let checks = prop::sample::select(vec![CheckState::Passing, CheckState::Warning, CheckState::Critical]);
    let flags = (checks, prop::bool::weighted(0.1), any::<bool>());
    (states, flags, 1..6u32, prop::option::of(0..4u32)).prop_map(|(state, (check, cordoned, autostart), soft, above)| M {
        state,
        check,
        cordoned,
        autostart,
        force_https: false,
        soft,
        hard: above.map(|above| soft + above),
    })
}

proptest! {
    /// However requests come and go: never above a hard limit, only to healthy machines, never to a tried
    /// one, and above a soft limit only when nobody healthy is below.
    #[test]
    fn limits_and_health_always_hold(
        machines in prop::collection::vec(any_machine(), 0..40),
        steps in prop::collection::vec((any::<u64>(), any::<bool>(), prop::option::of(0..40u8)), 1..120),
    ) {
        let loads = Loads::default();
        let table = Table::build(&snapshot(&machines), &loads, None, &here());
        let route_now = table.find(HOST).unwrap().clone();
        let mut held: Vec<Decision> = Vec::new();
        for (random, leave, tried) in steps {
            if leave && !held.is_empty() {
                held.swap_remove((random % held.len() as u64) as usize);
            }
            let tried: Vec<_> = tried.map(id).into_iter().collect();
            let free = |c: &dunlin_routing::Candidate, limit: Option<u32>| {
                c.availability == Availability::Ready
                    && !tried.contains(&c.machine)
                    && limit.is_none_or(|limit| c.load.in_flight() < limit)
            };
            let below_hard = route_now.candidates.iter().any(|c| free(c, c.service.concurrency.hard_limit));
            let below_soft = route_now.candidates.iter().any(|c| free(c, Some(c.service.concurrency.soft_limit)));
            let decision = route(&table, &tried, random);
            match &decision {
                Decision::Forward { target, .. } => {
                    prop_assert!(below_hard);
                    prop_assert_eq!(target.availability, Availability::Ready);
                    prop_assert!(!tried.contains(&target.machine));
                    if below_soft {
                        prop_assert!(target.load.in_flight() <= target.service.concurrency.soft_limit);
                    }
                }
                Decision::Wake { target, .. } => {
                    prop_assert!(!below_hard);
                    prop_assert_eq!(target.availability, Availability::Asleep);
                    prop_assert!(target.service.autostart && !tried.contains(&target.machine));
                }
                Decision::Wait { .. } | Decision::Reject(_) => prop_assert!(!below_hard),
                Decision::Redirect { .. } => prop_assert!(false, "nobody asked for HTTPS"),
            }
            held.push(decision);
            for c in &route_now.candidates {
                let (in_flight, hard) = (c.load.in_flight(), c.service.concurrency.hard_limit);
                prop_assert!(hard.is_none_or(|hard| in_flight <= hard));
            }
        }
        held.clear();
        prop_assert!(route_now.candidates.iter().all(|c| c.load.in_flight() == 0));
    }

    /// The same question has the same answer.
    #[test]
    fn routing_is_deterministic(machines in prop::collection::vec(any_machine(), 0..40), random: u64) {
        let chosen = || {
            let table = Table::build(&snapshot(&machines), &Loads::default(), None, &here());
            match route(&table, &[], random) {
                Decision::Forward { target, .. } | Decision::Wake { target, .. } => Some(target.machine.clone()),
                _ => None,
            }
        };
        prop_assert_eq!(chosen(), chosen());
    }
}
