use super::*;
use dunlin_model::{MachineState, MachineVersion};
use proptest::prelude::*;

const NEW: &str = "new";
const BAKE_MS: u64 = 20_000;
const HANGS_AT_MS: u64 = 5_000;
const BYTES: u64 = 100_000_000;

fn host(n: usize) -> HostId {
    format!("h{n}").parse().unwrap()
}

fn machine(n: u8) -> MachineId {
    MachineId::from_random([n; 7])
}

fn look() -> Look {
    let one = MachineLook { state: MachineState::Started, version: MachineVersion::new(1, [0; 10]), healthy: true, crashed: None };
    Look {
        life: 1,
        version: "dunlin 1".into(),
        sha256: "old".into(),
        trial: Trial::None,
        lacks: BTreeSet::from(["buildah".to_owned()]),
        edge: None,
        machines: BTreeMap::from([(machine(1), one)]),
        answered: Answered { all: 1_000, failed: 10 },
    }
}

/// `hosts` of them, h0 has control.
fn upgrade(hosts: usize, parallel: u32) -> Upgrade {
    let all = (0..hosts).map(|n| (host(n), n)).collect();
    let turn = |host| Turn { host, phase: Phase::Waiting };
    Upgrade {
        id: "u1".into(),
        sha256: NEW.into(),
        bytes: BYTES,
        version: "dunlin 2".into(),
        parallel,
        bake_ms: BAKE_MS,
        control: host(0),
        started_at_ms: 0,
        state: State::Running,
        aborted: false,
        hosts: order(&all, &host(0), None).into_iter().map(turn).collect(),
        story_dropped: 0,
        story: vec![],
    }
}

/// What a host does with a new binary.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Does {
    Well,
    /// The file does not even run there.
    Refuses,
    /// Its server does not start, and the keeper goes back.
    NeverStarts,
    /// It runs, and its self-test fails.
    Fails,
    /// It runs, and is silent from some moment on.
    Hangs,
    /// It is not there.
    Away,
    /// Well, once the binary is there, at so many bytes a second.
    Slow(u64),
    /// Its line goes dead in the middle.
    Stalls,
}

/// What was sent of a try that began `ms` ago, and for how long nothing has moved.
fn on_its_way(does: Does, ms: u64) -> (u64, u64) {
    let (rate, end) = match does {
        Does::Slow(rate) => (rate, BYTES),
        Does::Stalls => (BYTES / 100, BYTES / 2),
        _ => return (BYTES, ms),
    };
    (end.min(rate * ms / 1000), ms.saturating_sub(end * 1000 / rate))
}

/// Hosts that do as they are told, as far as their binary lets them.
struct World {
    hosts: BTreeMap<HostId, (Does, Look, Option<String>)>,
    /// Since when the binary is on its way.
    sends: BTreeMap<HostId, u64>,
    now_ms: u64,
}

impl World {
    fn new(does: &[Does]) -> Self {
        let hosts = does.iter().enumerate().map(|(n, does)| (host(n), (*does, look(), None)));
        Self { hosts: hosts.collect(), sends: BTreeMap::new(), now_ms: 1_000 }
    }

    fn seen(&self, whom: &[HostId]) -> BTreeMap<HostId, Seen> {
        let seen = |id: &HostId| {
            let (does, look, refused) = &self.hosts[id];
            let is_silent = *does == Does::Away || (*does == Does::Hangs && look.trial.is_on() && self.now_ms > HANGS_AT_MS);
            let look = (!is_silent).then(|| look.clone());
            let sent = self.sends.get(id).map(|began_ms| {
                let (bytes, still_ms) = on_its_way(*does, self.now_ms - began_ms);
                Sent { bytes: Some(bytes), at_ms: self.now_ms - still_ms }
            });
            (id.clone(), Seen { look, heard: !is_silent, assigned: BTreeSet::from([machine(1)]), refused: refused.clone(), why_silent: None, sent })
        };
        whom.iter().map(seen).collect()
    }

    fn obey(&mut self, id: &str, order: &Order) {
        match order {
            Order::Install { host, .. } => {
                let (does, look, refused) = self.hosts.get_mut(host).unwrap();
                assert!(!look.trial.is_on(), "it is told once");
                let began_ms = *self.sends.entry(host.clone()).or_insert(self.now_ms);
                if on_its_way(*does, self.now_ms - began_ms).0 < BYTES {
                    return;
                }
                match does {
                    Does::Refuses => *refused = Some("it does not run here".into()),
                    Does::NeverStarts => {
                        look.life += 2;
                        look.trial = Trial::WentBack { upgrade: id.into(), why: "exit status 3".into() };
                    }
                    _ => {
                        look.life += 1;
                        (look.sha256, look.version) = (NEW.into(), "dunlin 2".into());
                        look.trial = Trial::On { upgrade: id.into() };
                        look.answered = Answered::default();
                        if *does == Does::Fails {
                            look.lacks.insert("nft".into());
                        }
                    }
                }
            }
            Order::Keep { host } => self.hosts.get_mut(host).unwrap().1.trial = Trial::Kept { upgrade: id.into() },
            Order::GoBack { host, why } => {
                let (does, look, _) = self.hosts.get_mut(host).unwrap();
                if *does != Does::Hangs && look.trial.is_on() {
                    *look = Look { life: look.life + 1, ..super::tests::look() };
                    look.trial = Trial::WentBack { upgrade: id.into(), why: why.clone() };
                }
            }
        }
    }

    /// To the end, with everything that must hold on the way.
    fn run(&mut self, upgrade: &mut Upgrade) {
        for _ in 0..5_000 {
            let seen = self.seen(&watched(upgrade));
            let next = advance(upgrade, &seen, self.now_ms);
            holds(upgrade, &next);
            *upgrade = next;
            for order in orders(upgrade, &seen) {
                self.obey(&upgrade.id, &order);
            }
            self.sends.retain(|host, _| upgrade.hosts.iter().any(|turn| turn.host == *host && matches!(turn.phase, Phase::Installing { .. })));
            if upgrade.state != State::Running {
                return;
            }
            self.now_ms += 1_000;
        }
        panic!("it has no end: {upgrade:?}");
    }
}

fn holds(before: &Upgrade, after: &Upgrade) {
    let under_way = || after.hosts.iter().filter(|turn| turn.phase.is_under_way());
    let kept = after.hosts.iter().filter(|turn| matches!(turn.phase, Phase::Kept { .. })).count();
    let most = if kept == 0 { 1 } else { after.parallel as usize };
    assert!(under_way().count() <= most, "{after:?}");
    let begins = before.hosts.iter().zip(&after.hosts).filter(|(was, is)| was.phase == Phase::Waiting && is.phase.is_under_way());
    let begins: Vec<&HostId> = begins.map(|(_, is)| &is.host).collect();
    let has_failed = after.hosts.iter().any(|turn| matches!(turn.phase, Phase::Failed { .. }));
    assert!(begins.is_empty() || !has_failed, "{after:?}");
    if under_way().any(|turn| turn.host == after.control) {
        assert!(under_way().count() == 1, "control's host is alone: {after:?}");
    }
}

fn phase_of(upgrade: &Upgrade, n: usize) -> &Phase {
    &upgrade.hosts.iter().find(|turn| turn.host == host(n)).unwrap().phase
}

#[test]
fn the_canary_is_first_and_control_last() {
    let hosts = BTreeMap::from([(host(0), 9), (host(1), 0), (host(2), 2), (host(3), 1)]);
    let check = |canary: Option<usize>, expected: [usize; 4]| {
        let canary = canary.map(host);
        assert_eq!(order(&hosts, &host(0), canary.as_ref()), expected.map(host), "{canary:?}");
    };
    check(None, [3, 1, 2, 0]);
    check(Some(1), [1, 2, 3, 0]);
    check(Some(0), [0, 1, 2, 3]);
    assert_eq!(order(&BTreeMap::from([(host(0), 0)]), &host(0), None), [host(0)]);
}

#[test]
fn all_hosts_take_a_good_binary() {
    let mut world = World::new(&[Does::Well; 5]);
    let mut upgrade = upgrade(5, 2);
    world.run(&mut upgrade);
    assert_eq!(upgrade.state, State::Done, "{:#?}", upgrade.story);
    assert!(world.hosts.values().all(|(_, look, _)| look.sha256 == NEW && look.trial.is_kept("u1")));
    // Again, it is there already.
    let mut again = Upgrade { id: "u2".into(), ..super::tests::upgrade(5, 1) };
    world.run(&mut again);
    assert_eq!(again.state, State::Done);
    assert!(world.hosts.values().all(|(_, look, _)| look.trial.is_kept("u1")), "nobody was touched");
}

#[test]
fn a_bad_binary_stops_at_the_canary_which_goes_back() {
    for (does, says, is_back) in [
        (Does::Refuses, "did not take the binary: it does not run here", true),
        (Does::NeverStarts, "exit status 3", true),
        (Does::Fails, "self-test fails at \"nft\"", true),
        (Does::Hangs, "has not answered for", false),
    ] {
        let mut world = World::new(&[Does::Well, does, Does::Well]);
        let mut upgrade = upgrade(3, 3);
        world.run(&mut upgrade);
        let State::Stopped { why } = &upgrade.state else { panic!("{does:?}: {upgrade:?}") };
        assert!(why.starts_with("h1: ") && why.contains(says), "{does:?}: {why}");
        assert!(matches!(phase_of(&upgrade, 1), Phase::Failed { is_back: found, .. } if *found == is_back), "{upgrade:?}");
        for untouched in [0, 2] {
            assert_eq!((phase_of(&upgrade, untouched), &world.hosts[&host(untouched)].1), (&Phase::Waiting, &look()), "{does:?}");
        }
        // Mended, it goes on.
        world.hosts.insert(host(1), (Does::Well, Look { life: 7, ..look() }, None));
        upgrade.resume("u1.1".into(), world.now_ms);
        world.run(&mut upgrade);
        assert_eq!(upgrade.state, State::Done, "{does:?}: {:#?}", upgrade.story);
    }
}

/// 200 s on the way, which the 180 s of the rest do not know of.
#[test]
fn a_slow_line_fails_nobody_and_a_dead_one_does() {
    let mut world = World::new(&[Does::Well, Does::Slow(BYTES / 200), Does::Slow(BYTES / 900)]);
    let mut upgrade = upgrade(3, 1);
    world.run(&mut upgrade);
    assert_eq!(upgrade.state, State::Done, "{:#?}", upgrade.story);
    assert!(upgrade.story.iter().any(|line| line.text == "h1: has the binary after 200 s"), "{:#?}", upgrade.story);

    for (does, says, within_ms) in [
        (Does::Stalls, "stopped on its way: 50000000 of 100000000 bytes", 150_000),
        (Does::Slow(1_000), "did not get there within 60 minutes", 3_650_000),
    ] {
        let mut world = World::new(&[Does::Well, does, Does::Well]);
        let mut upgrade = super::tests::upgrade(3, 1);
        world.run(&mut upgrade);
        let State::Stopped { why } = &upgrade.state else { panic!("{does:?}: {upgrade:?}") };
        assert!(why.contains(says) && world.now_ms < within_ms, "{does:?} at {}: {why}", world.now_ms);
        assert!(matches!(phase_of(&upgrade, 1), Phase::Failed { is_back: true, .. }), "nothing was touched there: {upgrade:?}");
        assert_eq!(world.hosts[&host(1)].1, look());
    }
}

/// What is durable of a turn, and what whoever sends the binary knows of it, at 1,000 s.
#[test]
fn a_turn_outlives_whoever_sends_the_binary() {
    const NOW_MS: u64 = 1_000_000;
    let check = |given_ms: Option<u64>, sent: Option<(Option<u64>, u64)>, expected: Result<Option<u64>, &str>| {
        let mut upgrade = upgrade(2, 1);
        upgrade.hosts[0].phase = Phase::Installing { since_ms: 100_000, before: Box::new(look()), given_ms };
        let seen = Seen { sent: sent.map(|(bytes, at_ms)| Sent { bytes, at_ms }), ..Seen::default() };
        let next = advance(&upgrade, &BTreeMap::from([(host(1), seen)]), NOW_MS);
        match (&next.hosts[0].phase, expected) {
            (Phase::Installing { given_ms, .. }, Ok(expected)) => assert_eq!(*given_ms, expected, "{sent:?}"),
            (Phase::GoingBack { why, .. }, Err(expected)) => assert!(why.contains(expected), "{why}"),
            (phase, _) => panic!("{given_ms:?} {sent:?}: {phase:?}"),
        }
    };
    check(None, Some((Some(7), NOW_MS - 1)), Ok(None));
    check(None, Some((Some(7), NOW_MS - 60_001)), Err("stopped on its way: 7 of"));
    check(None, Some((Some(BYTES), NOW_MS - 60_001)), Ok(Some(NOW_MS - 60_001)));
    check(Some(NOW_MS - 180_000), Some((Some(BYTES), NOW_MS - 180_000)), Ok(Some(NOW_MS - 180_000)));
    check(Some(NOW_MS - 180_001), Some((Some(BYTES), NOW_MS - 180_001)), Err("no server of it answered within 180 s"));
    // The try that was whole has not got there, and another one is under way.
    check(Some(NOW_MS - 180_001), Some((Some(7), NOW_MS - 1)), Ok(None));
    // Control has been away for long, and has just begun to look again: the host may be slow to be reached.
    check(Some(NOW_MS - 500_000), Some((None, NOW_MS - 1)), Ok(Some(NOW_MS - 500_000)));
    check(None, Some((None, NOW_MS - 1)), Ok(None));
    check(None, Some((None, NOW_MS - 60_001)), Err("stopped on its way: 0 of"));
    check(None, None, Err("stopped on its way"));
    // As a control of before wrote it.
    let before = serde_json::json!({ "phase": "installing", "since_ms": 1, "before": look() });
    assert!(matches!(serde_json::from_value(before).unwrap(), Phase::Installing { given_ms: None, .. }));
}

#[test]
fn what_was_halted_is_stopped_and_names_who_was_under_way() {
    let mut upgrade = upgrade(3, 1);
    upgrade.hosts[0].phase = Phase::Kept { at_ms: 1 };
    upgrade.hosts[1].phase = Phase::Installing { since_ms: 1, before: Box::new(look()), given_ms: None };
    upgrade.halt("nobody knows", 5);
    assert_eq!(upgrade.state, State::Stopped { why: "nobody knows".into() });
    assert!(matches!(&upgrade.hosts[1].phase, Phase::Failed { is_back: false, at_ms: 5, .. }));
    assert_eq!((&upgrade.hosts[0].phase, &upgrade.hosts[2].phase), (&Phase::Kept { at_ms: 1 }, &Phase::Waiting));
    assert_eq!(advance(&upgrade, &World::new(&[Does::Well; 3]).seen(&[host(0), host(1), host(2)]), 9), upgrade, "nobody begins");
}

#[test]
fn who_is_away_is_left_out_and_named() {
    let mut world = World::new(&[Does::Well, Does::Away, Does::Well]);
    let mut upgrade = upgrade(3, 1);
    world.run(&mut upgrade);
    assert_eq!(upgrade.state, State::Done);
    assert!(matches!(phase_of(&upgrade, 1), Phase::Skipped { .. }));
    assert!(upgrade.story.iter().any(|line| line.text.contains("h1: is left out")), "{:?}", upgrade.story);
}

#[test]
fn an_end_by_an_operator_takes_back_who_is_under_way() {
    let mut world = World::new(&[Does::Well; 3]);
    let mut upgrade = upgrade(3, 1);
    for _ in 0..6 {
        let seen = world.seen(&watched(&upgrade));
        upgrade = advance(&upgrade, &seen, world.now_ms);
        orders(&upgrade, &seen).iter().for_each(|order| world.obey("u1", order));
        world.now_ms += 1_000;
    }
    assert!(matches!(phase_of(&upgrade, 1), Phase::Baking { .. }), "{upgrade:?}");
    upgrade.abort(world.now_ms);
    world.run(&mut upgrade);
    assert!(matches!(upgrade.state, State::Stopped { .. }));
    assert_eq!(world.hosts[&host(1)].1.sha256, "old");
}

#[test]
fn what_is_worse_is_named() {
    let assigned = BTreeSet::from([machine(1)]);
    let check = |change: &dyn Fn(&mut Look), expected: Option<&str>| {
        let mut now = look();
        now.answered = Answered::default();
        change(&mut now);
        let found = worse(&look(), &now, &assigned);
        match expected {
            None => assert_eq!(found, None),
            Some(text) => assert!(found.as_ref().is_some_and(|found| found.contains(text)), "{text}: {found:?}"),
        }
    };
    let with = |change: fn(&mut MachineLook)| move |look: &mut Look| change(look.machines.get_mut(&machine(1)).unwrap());
    check(&|_| {}, None);
    check(&|look| look.lacks.clear(), None);
    check(&|look| _ = look.lacks.insert("nft".into()), Some("\"nft\""));
    check(&|look| look.edge = Some("no answer".into()), Some("own edge fails: no answer"));
    check(&|look| look.machines.clear(), Some("not known there"));
    check(&with(|machine| machine.healthy = false), Some("checks that fail"));
    check(&with(|machine| machine.crashed = Some(3)), Some("ended by itself"));
    check(&with(|machine| machine.state = MachineState::Failed), Some("is failed"));
    check(&with(|machine| (machine.state, machine.healthy) = (MachineState::Suspended, false)), None);
    check(&with(|machine| (machine.version, machine.healthy) = (MachineVersion::new(2, [0; 10]), false)), None);
    check(&|look| look.answered = Answered { all: 100, failed: 3 }, None);
    check(&|look| look.answered = Answered { all: 1_000, failed: 29 }, None);
    check(&|look| look.answered = Answered { all: 100, failed: 5 }, Some("5 of 100 answers"));
    assert_eq!(worse(&look(), &Look { machines: BTreeMap::new(), ..look() }, &BTreeSet::new()), None, "it has moved");
}

#[test]
fn a_moment_of_weakness_is_no_verdict() {
    let mut world = World::new(&[Does::Well; 2]);
    let mut upgrade = upgrade(2, 1);
    for round in 0..300 {
        let mut seen = world.seen(&watched(&upgrade));
        if round % 9 != 0 {
            seen.values_mut().filter(|seen| seen.look.as_ref().is_some_and(|look| look.trial.is_on())).for_each(|seen| seen.heard = false);
        }
        upgrade = advance(&upgrade, &seen, world.now_ms);
        orders(&upgrade, &seen).iter().for_each(|order| world.obey("u1", order));
        world.now_ms += 1_000;
    }
    assert_eq!(upgrade.state, State::Done, "{:#?}", upgrade.story);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever hosts do: it ends, only hosts that did well have it, and one failure is the last.
    #[test]
    fn it_ends_and_does_no_more_harm_than_it_must(kinds in prop::collection::vec(0u8..14, 1..9), parallel in 1u32..5) {
        let does = |kind: &u8| match kind {
            0 => Does::Refuses,
            1 => Does::NeverStarts,
            2 => Does::Fails,
            3 => Does::Hangs,
            4 => Does::Away,
            5 => Does::Slow(BYTES / 250),
            6 => Does::Stalls,
            _ => Does::Well,
        };
        let does: Vec<Does> = kinds.iter().map(does).collect();
        let mut world = World::new(&does);
        let mut upgrade = upgrade(does.len(), parallel);
        world.run(&mut upgrade);
        for turn in &upgrade.hosts {
            let (does, look, _) = &world.hosts[&turn.host];
            let has_new = look.sha256 == NEW;
            match turn.phase {
                Phase::Kept { .. } => prop_assert!(has_new && matches!(does, Does::Well | Does::Slow(_))),
                Phase::Failed { is_back, .. } => prop_assert!(has_new != is_back),
                Phase::Waiting | Phase::Skipped { .. } => prop_assert!(!has_new),
                _ => prop_assert!(false, "{turn:?} is under way"),
            }
        }
        let failed = upgrade.hosts.iter().filter(|turn| matches!(turn.phase, Phase::Failed { .. })).count();
        prop_assert_eq!(failed == 0, upgrade.state == State::Done);
        prop_assert!(failed <= parallel as usize);
        // It is plain data, as the store keeps it.
        let json = serde_json::to_string(&upgrade).unwrap();
        prop_assert_eq!(serde_json::from_str::<Upgrade>(&json).unwrap(), upgrade);
    }
}
