//! Routing as a whole: examples first, then properties over generated apps.

use dunlin_model::{
    Concurrency, ConcurrencyKind, Generation, HostId, ImageRef, MachineId, MachineSpec, MachineState, MachineVersion,
    Region, Service,
};
use dunlin_routing::{Availability, Decision, Detail, Head, Loads, Table, Vantage, WaitReason};
use dunlin_view::{
    AppFact, CheckState, CheckStatus, ConfigState, Freshness, HostFact, MachineAssignment, MachineFact, ReportNews, Snapshot, Summary,
};
use proptest::prelude::*;
use std::collections::BTreeSet;
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
    host: &'static str,
    region: &'static str,
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
        host: "h1",
        region: "fra",
    }
}

fn id(n: u8) -> MachineId {
    MachineId::from_random([0, 0, 0, 0, 0, 0, n])
}

fn here() -> Vantage {
    Vantage::of("fra".parse().unwrap())
}

fn snapshot(machines: &[M]) -> Snapshot {
    let mut config = ConfigState::default();
    let app = AppFact { org: "personal".parse().unwrap(), hostnames: vec![HOST.into()], current_release: 1, created_at_ms: 0 };
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
                host: m.host.parse().unwrap(),
                region: m.region.parse().unwrap(),
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
            host: m.host.parse().unwrap(),
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
            unconfirmed: false,
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
    assert_eq!(rejected(table.route(&head("other.localhost"), &[], 0, NOW)), (404, "PR01"));
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
fn one_that_waits_for_its_placement_is_waited_for_by_that_name() {
    let view = snapshot(&[M { state: MachineState::Restarting, ..started() }]);
    let fact = MachineFact { unconfirmed: true, sequence: 2, ..MachineFact::clone(&view.machines[&id(0)]) };
    let view = view.with_machine(Arc::new(fact)).unwrap();
    assert_eq!(waits(&route(&Table::build(&view, &Loads::default(), None, &here()), &[], 0)), Some(WaitReason::Unconfirmed));
}

#[test]
fn requests_spread_and_the_counters_outlive_a_new_table() {
    let loads = Loads::default();
    let view = snapshot(&[started(), started()]);
    let first = Table::build(&view, &loads, None, &here());
    let mut held: Vec<_> = (0..4).map(|random| route(&first, &[], random)).collect();
    assert_eq!([0, 1].map(|n| loads.machine(&id(n)).in_flight()), [2, 2]);
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

/// A machine on a host and in a region.
fn at(host: &'static str, region: &'static str) -> M {
    M { host, region, ..started() }
}

/// As host `h1` in Frankfurt sees it.
fn seen_from_h1(machines: &[M], loads: &Loads, heard: &[(&str, Freshness)], rtt_ms: &[(&str, u32)]) -> Table {
    let mut view = snapshot(machines);
    view.heard = Arc::new(heard.iter().map(|(host, freshness)| (host.parse().unwrap(), *freshness)).collect());
    for m in machines {
        let fact = HostFact {
            id: m.host.parse().unwrap(),
            region: m.region.parse().unwrap(),
            cpus: 1,
            memory_mb: 1,
            memory_reserved_mb: 0,
            room: None,
            updated_at_ms: 0,
        };
        view = view.with_host(Arc::new(fact));
    }
    let rtt_ms = rtt_ms.iter().map(|(host, ms)| (host.parse().unwrap(), *ms)).collect();
    Table::build(&view, loads, None, &Vantage { host: Some("h1".parse().unwrap()), rtt_ms, ..here() })
}

/// The machines in the order in which requests that stay get them, one after the other.
fn order(table: &Table, head: &Head<'_>, requests: usize) -> Vec<u8> {
    let mut held = Vec::new();
    for random in 0..requests as u64 {
        held.push(table.route(head, &[], random, NOW));
    }
    let number = |decision: &Decision| match decision {
        Decision::Forward { target, .. } | Decision::Wake { target, .. } => (0..9).find(|n| id(*n) == target.machine).unwrap(),
        other => panic!("{other:?}"),
    };
    held.iter().map(number).collect()
}

#[test]
fn the_own_region_comes_first_then_the_nearest_and_each_has_its_soft_limit_before_the_next() {
    let full = |m: M| M { soft: 1, hard: Some(2), ..m };
    let machines = [full(at("h4", "syd")), full(at("h3", "ams")), full(at("h2", "fra")), full(at("h5", "moon"))];
    // As maps have it: of `moon` nobody knows where it is.
    let table = seen_from_h1(&machines, &Loads::default(), &[], &[]);
    assert_eq!(order(&table, &head(HOST), 8), [2, 1, 0, 3, 2, 1, 0, 3]);
    // As it was measured, which is worth more.
    let table = seen_from_h1(&machines, &Loads::default(), &[], &[("h3", 90), ("h4", 40), ("h5", 1)]);
    assert_eq!(order(&table, &head(HOST), 4), [2, 3, 0, 1]);
}

#[test]
fn in_a_region_the_least_loaded_comes_first_and_of_equals_the_own_host() {
    let machines = [at("h2", "fra"), at("h1", "fra"), at("h3", "fra")];
    let table = seen_from_h1(&machines, &Loads::default(), &[], &[]);
    let mut first = order(&table, &head(HOST), 3);
    assert_eq!(first[0], 1);
    first.sort_unstable();
    assert_eq!(first, [0, 1, 2]);
}

#[test]
fn who_is_not_heard_of_comes_last_but_comes() {
    let machines = [at("h1", "fra"), at("h2", "fra"), at("h3", "syd")];
    let heard = [("h1", Freshness::Old), ("h2", Freshness::Aging)];
    let limited = |m: M| M { soft: 1, hard: Some(1), ..m };
    let table = seen_from_h1(&machines.map(limited), &Loads::default(), &heard, &[]);
    assert_eq!(order(&table, &head(HOST), 3), [2, 1, 0], "far and fresh, near and aging, old");
    // What has just failed comes after what is only aging.
    let loads = Loads::default();
    let table = seen_from_h1(&[at("h2", "fra"), at("h3", "syd")], &loads, &heard, &[]);
    loads.host(&"h3".parse().unwrap()).record_failure(NOW);
    assert_eq!(order(&table, &head(HOST), 1), [0]);
    loads.host(&"h3".parse().unwrap()).record_success();
    assert_eq!(order(&table, &head(HOST), 1), [1]);
}

#[test]
fn one_that_sleeps_where_it_is_heard_of_is_better_than_one_that_runs_where_nobody_knows() {
    let asleep = |m: M| M { state: MachineState::Stopped, ..m };
    let old = [("h2", Freshness::Old)];
    for (machines, expected) in [
        (vec![at("h2", "fra"), asleep(at("h3", "syd"))], 1),
        (vec![at("h2", "fra"), asleep(at("h2", "fra"))], 0),
        (vec![asleep(at("h2", "fra")), asleep(at("h3", "syd"))], 1),
        (vec![asleep(at("h2", "fra"))], 0),
        (vec![M { state: MachineState::Starting, ..at("h2", "fra") }, asleep(at("h3", "syd"))], 1),
    ] {
        let table = seen_from_h1(&machines, &Loads::default(), &old, &[]);
        assert_eq!(order(&table, &head(HOST), 1), [expected], "{machines:?}");
    }
}

#[test]
fn a_host_that_failed_is_avoided_with_all_its_machines() {
    let loads = Loads::default();
    let table = seen_from_h1(&[at("h2", "fra"), at("h2", "fra"), at("h3", "syd")], &loads, &[], &[]);
    loads.host(&"h2".parse().unwrap()).record_failure(NOW);
    assert_eq!(order(&table, &head(HOST), 3), [2, 2, 2]);
    let later = table.route(&head(HOST), &[], 0, NOW + 60_000);
    assert!(matches!(later, Decision::Forward { target, .. } if target.machine != id(2)), "not for ever");
}

#[test]
fn a_host_that_was_removed_serves_nobody() {
    let mut view = snapshot(&[at("h2", "fra")]);
    let mut config = (*view.config).clone();
    config.removed_hosts.insert("h2".parse().unwrap());
    view.config = Arc::new(config);
    let table = Table::build(&view, &Loads::default(), None, &here());
    assert_eq!(rejected(route(&table, &[], 0)), (503, "PR11"));
}

#[test]
fn regions_that_a_request_names_come_before_all_others_or_alone() {
    let machines = [at("h1", "fra"), at("h3", "ams"), at("h4", "syd")];
    let table = seen_from_h1(&machines, &Loads::default(), &[], &[]);
    let prefer = |regions| order(&table, &Head { prefer_region: Some(regions), ..head(HOST) }, 1)[0];
    for (regions, expected) in [("syd,ams", 2), ("ams,syd", 1), ("eu", 0), ("apac", 2), ("iad", 0), ("???", 0), ("any", 0)] {
        assert_eq!(prefer(regions), expected, "{regions}");
    }
    let force = |regions| table.route(&Head { force_region: Some(regions), ..head(HOST) }, &[], 0, NOW);
    assert!(matches!(force("syd"), Decision::Forward { target, .. } if target.machine == id(2)));
    assert_eq!(rejected(force("iad")), (404, "PR14"));
    assert_eq!(rejected(force("???")), (400, "PR13"));
    // Nowhere else, whatever it means for the request.
    let asleep = M { state: MachineState::Stopped, autostart: false, ..at("h4", "syd") };
    let table = seen_from_h1(&[at("h1", "fra"), asleep.clone()], &Loads::default(), &[], &[]);
    assert!(matches!(table.route(&Head { force_region: Some("syd"), ..head(HOST) }, &[], 0, NOW), Decision::Reject(_)));
    let wakeable = M { autostart: true, ..asleep };
    let table = seen_from_h1(&[at("h1", "fra"), wakeable], &Loads::default(), &[], &[]);
    assert_eq!(order(&table, &Head { force_region: Some("syd"), ..head(HOST) }, 1), [1]);
    let one = id(0);
    let both = Head { force_region: Some("syd"), prefer_instance: Some(one.as_str()), ..head(HOST) };
    assert_eq!(order(&table, &both, 1), [1], "a preference does not lead out of a region");
}

#[test]
fn a_machine_is_forced_or_preferred_wherever_it_is() {
    let table = seen_from_h1(&[at("h1", "fra"), at("h4", "syd")], &Loads::default(), &[], &[]);
    let one = id(1);
    for head in [
        Head { force_instance: Some(one.as_str()), ..head(HOST) },
        Head { prefer_instance: Some(one.as_str()), ..head(HOST) },
    ] {
        assert_eq!(order(&table, &head, 1), [1]);
    }
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
    let places = prop::sample::select(vec![("h1", "fra"), ("h2", "fra"), ("h3", "ams"), ("h4", "syd"), ("h5", "moon")]);
    (states, flags, 1..6u32, prop::option::of(0..4u32), places).prop_map(
        |(state, (check, cordoned, autostart), soft, above, (host, region))| M {
            state,
            check,
            cordoned,
            autostart,
            force_https: false,
            soft,
            hard: above.map(|above| soft + above),
            host,
            region,
        },
    )
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

    /// Whoever is chosen, nobody who could have been is better: fresher, else below its soft limit where the chosen is
    /// not, else nearer.
    #[test]
    fn nobody_better_is_passed_over(
        machines in prop::collection::vec(any_machine(), 1..40),
        ages in prop::collection::vec(0..3usize, 4),
        busy in prop::collection::vec(any::<u64>(), 0..40),
        random: u64,
    ) {
        let ages = ages.iter().map(|age| [Freshness::Fresh, Freshness::Aging, Freshness::Old][*age]);
        let heard: Vec<_> = ["h2", "h3", "h4", "h5"].into_iter().zip(ages).collect();
        let table = seen_from_h1(&machines, &Loads::default(), &heard, &[("h4", 250)]);
        let _held: Vec<_> = busy.iter().map(|random| route(&table, &[], *random)).collect();
        let is_above = |c: &dunlin_routing::Candidate| c.load.in_flight() >= c.service.concurrency.soft_limit;
        let has_room = |c: &dunlin_routing::Candidate| c.service.concurrency.hard_limit.is_none_or(|hard| c.load.in_flight() < hard);
        let all = &table.find(HOST).unwrap().candidates;
        let value = |c: &dunlin_routing::Candidate| (c.freshness, is_above(c), c.distance);
        let values: Vec<_> = all.iter().map(|c| (c.availability == Availability::Ready && has_room(c)).then(|| value(c))).collect();
        let best = values.iter().flatten().min();
        match route(&table, &[], random) {
            Decision::Forward { target, .. } => {
                let n = all.iter().position(|c| c.machine == target.machine).unwrap();
                prop_assert_eq!(values[n].as_ref(), best);
            }
            Decision::Wake { target, .. } => {
                let is_last_resort = best.is_some_and(|(freshness, ..)| *freshness == Freshness::Old);
                prop_assert!(best.is_none() || is_last_resort && target.freshness != Freshness::Old);
            }
            _ => prop_assert!(best.is_none()),
        }
    }
}

/// As `h1` in Frankfurt sees it, which was told nothing by the hosts of other regions but what their regions have.
fn seen_with_summaries(machines: &[M], told: &[&str], summaries: &[(&str, Summary)]) -> Table {
    let mut view = snapshot(machines);
    let told: BTreeSet<HostId> = told.iter().map(|host| host.parse().unwrap()).collect();
    let untold = machines.iter().filter(|m| m.region != "fra").map(|m| m.host.parse().unwrap()).filter(|host| !told.contains(host)).collect();
    view = view.without_detail_of(&untold);
    view.told = Arc::new(told);
    let report = |(region, summary): &(&str, Summary)| ReportNews {
        host: format!("reporter-{region}").parse().unwrap(),
        region: region.parse().unwrap(),
        apps: vec![("web".parse().unwrap(), Some(*summary))],
        whole: true,
    };
    view = view.with_reports(summaries.iter().map(report).collect());
    Table::build(&view, &Loads::default(), None, &Vantage { host: Some("h1".parse().unwrap()), ..here() })
}

fn waits(decision: &Decision) -> Option<WaitReason> {
    if let Decision::Wait { reason, .. } = decision { Some(*reason) } else { None }
}

fn looked_into(table: &Table, head: &Head<'_>) -> Vec<String> {
    table.find(HOST).unwrap().look_into(head).into_iter().map(Region::to_string).collect()
}

const READY: Summary = Summary { ready: 1, wakeable: 0, running: 1 };
const WAKEABLE: Summary = Summary { ready: 0, wakeable: 1, running: 0 };
const NOTHING: Summary = Summary { ready: 0, wakeable: 0, running: 0 };

#[test]
fn what_only_other_regions_have_is_waited_for_and_not_for_ever() {
    let waiting = Head { detail: Detail::OfTheBest, ..head(HOST) };
    let far = [at("h3", "ams"), at("h4", "syd"), at("h5", "iad")];
    let table = seen_with_summaries(&far, &[], &[("ams", WAKEABLE), ("syd", READY), ("iad", NOTHING)]);
    assert_eq!(waits(&table.route(&waiting, &[], 0, NOW)), Some(WaitReason::Detail));
    assert_eq!(looked_into(&table, &waiting), ["syd", "ams"], "what is ready comes before what is near");
    let further = Head { detail: Detail::OfMany, ..waiting };
    assert_eq!((waits(&table.route(&further, &[], 0, NOW)), looked_into(&table, &further).len()), (Some(WaitReason::MoreDetail), 3));
    assert_eq!(rejected(route(&table, &[], 0)), (503, "PR15"), "none came");
    let forced = Head { force_region: Some("iad"), ..waiting };
    assert_eq!((waits(&table.route(&forced, &[], 0, NOW)), looked_into(&table, &forced)), (Some(WaitReason::Detail), vec!["iad".into()]));
    assert_eq!(rejected(table.route(&Head { force_region: Some("iad"), ..further }, &[], 0, NOW)), (503, "PR15"), "there is no other");
    let one = id(1);
    let instance = Head { force_instance: Some(one.as_str()), ..waiting };
    assert_eq!(waits(&table.route(&instance, &[], 0, NOW)), Some(WaitReason::Detail));
    assert_eq!(looked_into(&table, &instance), ["syd"]);
    // Nobody says anything of it: the nearest are asked.
    let table = seen_with_summaries(&far, &[], &[]);
    assert_eq!(looked_into(&table, &waiting), ["ams", "iad"]);
    // Once it is there, it is as if it had always been.
    let table = seen_with_summaries(&far, &["h4"], &[]);
    assert!(matches!(table.route(&waiting, &[], 0, NOW), Decision::Forward { target, .. } if target.machine == id(1)));
}

#[test]
fn nobody_looks_elsewhere_while_the_own_region_has_something() {
    let waiting = Head { detail: Detail::OfTheBest, ..head(HOST) };
    let summaries = [("syd", READY)];
    let asleep = M { state: MachineState::Stopped, ..at("h2", "fra") };
    for (own, wakes) in [(at("h2", "fra"), false), (asleep.clone(), true)] {
        let table = seen_with_summaries(&[own, at("h4", "syd")], &[], &summaries);
        match table.route(&waiting, &[], 0, NOW) {
            Decision::Forward { target, look_further, .. } => assert!(target.machine == id(0) && !look_further && !wakes),
            Decision::Wake { target, .. } => assert!(target.machine == id(0) && wakes),
            other => panic!("{other:?}"),
        }
    }
    // It serves, and is not what one would wish for: others are looked for meanwhile.
    let busy = M { soft: 1, ..at("h2", "fra") };
    let table = seen_with_summaries(&[busy, at("h4", "syd")], &[], &summaries);
    let held = [0, 1].map(|random| table.route(&waiting, &[], random, NOW));
    let looks = held.each_ref().map(|decision| matches!(decision, Decision::Forward { look_further: true, .. }));
    assert_eq!(looks, [false, true]);
    // It refused: then the other region is all there is.
    let table = seen_with_summaries(&[at("h2", "fra"), at("h4", "syd")], &[], &summaries);
    assert_eq!(waits(&table.route(&waiting, &[id(0)], 0, NOW)), Some(WaitReason::Detail));
    assert_eq!(waits(&route(&table, &[id(0)], 0)), Some(WaitReason::Tried));
    // What is coming here has its time, as ever.
    let boots = M { state: MachineState::Starting, ..at("h2", "fra") };
    let table = seen_with_summaries(&[boots, at("h4", "syd")], &[], &summaries);
    assert_eq!(waits(&table.route(&waiting, &[], 0, NOW)), Some(WaitReason::Coming));
}

#[test]
fn a_region_that_is_preferred_and_has_something_is_waited_for() {
    let prefers = Head { detail: Detail::OfTheBest, prefer_region: Some("syd"), ..head(HOST) };
    let machines = [at("h2", "fra"), at("h4", "syd")];
    for (summaries, expected) in [(vec![("syd", READY)], Some(WaitReason::Detail)), (vec![("syd", NOTHING)], None), (vec![], None)] {
        let table = seen_with_summaries(&machines, &[], &summaries);
        assert_eq!(waits(&table.route(&prefers, &[], 0, NOW)), expected, "{summaries:?}");
    }
    let table = seen_with_summaries(&machines, &[], &[("syd", READY)]);
    let done = Head { detail: Detail::OfNone, ..prefers };
    assert!(matches!(table.route(&done, &[], 0, NOW), Decision::Forward { target, .. } if target.machine == id(0)));
}

#[test]
fn a_machine_that_is_preferred_is_waited_for_where_it_is_not_seen() {
    let wanted = id(1);
    let prefers = Head { detail: Detail::OfTheBest, prefer_instance: Some(wanted.as_str()), ..head(HOST) };
    let machines = [at("h2", "fra"), at("h4", "syd"), at("h3", "ams"), at("h5", "iad")];
    let table = seen_with_summaries(&machines, &[], &[("ams", READY), ("iad", READY)]);
    assert_eq!(waits(&table.route(&prefers, &[], 0, NOW)), Some(WaitReason::Detail));
    assert_eq!(looked_into(&table, &prefers), ["ams", "iad", "syd"], "its region beside those that promise most");
    let done = Head { detail: Detail::OfNone, ..prefers };
    let decision = table.route(&done, &[], 0, NOW);
    assert!(matches!(decision, Decision::Forward { target, preferred_unavailable: true, .. } if target.machine == id(0)));
    let table = seen_with_summaries(&machines, &["h4"], &[]);
    assert!(matches!(table.route(&prefers, &[], 0, NOW), Decision::Forward { target, preferred_unavailable: false, .. } if target.machine == wanted));
}

#[test]
fn what_sleeps_here_is_woken_unless_as_many_run_elsewhere_as_may() {
    let asleep = M { state: MachineState::Stopped, ..at("h2", "fra") };
    for (summary, wakes) in [(NOTHING, true), (WAKEABLE, true), (READY, false)] {
        let mut view = snapshot(&[asleep.clone(), at("h4", "syd")]);
        let mut config = ConfigState::clone(&view.config);
        for n in 0..2 {
            config.machines.get_mut(&id(n)).unwrap().spec.services[0].max_machines_running = Some(1);
        }
        view.config = Arc::new(config);
        let apps = vec![("web".parse().unwrap(), Some(summary))];
        let report = ReportNews { host: "h4".parse().unwrap(), region: "syd".parse().unwrap(), apps, whole: true };
        let view = view.without_detail_of(&["h4".parse().unwrap()].into()).with_reports(vec![report]);
        let table = Table::build(&view, &Loads::default(), None, &here());
        let decision = table.route(&Head { detail: Detail::OfTheBest, ..head(HOST) }, &[], 0, NOW);
        assert_eq!(matches!(decision, Decision::Wake { .. }), wakes, "{summary:?}: {decision:?}");
    }
}
