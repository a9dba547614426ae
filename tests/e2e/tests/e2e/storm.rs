//! Minutes of faults at random, by hand: `cargo test -p dunlin-e2e storm -- --ignored`. `DUNLIN_STORM` is for how many seconds.

use crate::deploys::{config, image};
use crate::fleet::app;
use dunlin_e2e::*;
use std::collections::BTreeSet;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const ALL: [&str; 3] = ["w1", "w2", "w3"];

/// Whatever happened, in the end the fleet is whole and serves the last release that succeeded.
#[test]
#[ignore = "takes minutes"]
fn after_a_storm_of_faults_the_fleet_is_whole() {
    let seconds = std::env::var("DUNLIN_STORM").ok().and_then(|text| text.parse().ok()).unwrap_or(120);
    let mut fleet = Fleet::start(&ALL);
    ALL.iter().for_each(|id| fleet.host(id).expect_log("")); // nothing is unexpected in a storm
    let dir = app(&fleet, 3);
    let image = image(fleet.control());
    let pulses: Vec<_> = ALL.iter().map(|id| (*id, fleet.pulse(id, "web", 5))).collect();

    let (over, good) = (AtomicBool::new(false), AtomicU32::new(1));
    let data = fleet.control().data();
    // Through the API's socket, so from anywhere.
    let deploy = || Command::new(binary()).arg("--data-dir").arg(&data).args(["deploy", "--image", &image]).current_dir(&dir).output().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            for release in 2.. {
                if over.load(Ordering::Relaxed) {
                    return;
                }
                config(&dir, &release.to_string(), "");
                let answer = deploy();
                println!("deploy of {release}: {} {}", answer.status, text(&answer).lines().last().unwrap_or_default());
                if answer.status.success() {
                    good.store(release, Ordering::Relaxed);
                }
            }
        });
        weather(&mut fleet, Duration::from_secs(seconds));
        over.store(true, Ordering::Relaxed);
    });
    let calm = Instant::now();
    fleet.control().wait_ready();
    fleet.until_up(&ALL);
    fleet.until_whole("web", 3);
    println!("whole {:?} after the storm", calm.elapsed());
    let now = fleet.control().get("web", "/").1;
    println!("{now} serves; the last deploy that said that it succeeded was of {}", good.load(Ordering::Relaxed));
    for id in ALL {
        fleet.host(id).until("it serves what the others serve", || fleet.host(id).get("web", "/") == (200, now.clone()));
    }
    for (edge, pulse) in pulses {
        let heard = pulse.stop();
        let failed = Heard::failed(&heard);
        println!("{edge}: {} of {} failed, longest gap {:?}; {:?}", failed.len(), heard.len(), Heard::longest_gap(&heard), failed.iter().map(|heard| &heard.answer).collect::<BTreeSet<_>>());
    }
}

fn weather(fleet: &mut Fleet, lasts: Duration) {
    let (began, mut random) = (Instant::now(), Random::seeded());
    println!("DUNLIN_TEST_SEED={:x}", random.0);
    while began.elapsed() < lasts {
        let (one, other) = (ALL[random.below(3) as usize], ALL[random.below(3) as usize]);
        let pause = Duration::from_millis(500 + random.below(9_500));
        let what = random.below(7);
        println!("{:>6.1} s: {} {one} {other} for {pause:?}", began.elapsed().as_secs_f32(), ["kill -9 of", "power off", "cut", "one way", "no gossip", "kill -9 of", "fair"][what as usize]);
        match what {
            0 | 5 => fleet.host(one).server_pid().into_iter().for_each(|pid| kill(pid, "KILL")),
            1 => fleet.kill(one),
            2 => fleet.cut(one),
            3 if one != other => fleet.one_way(one, other),
            4 => fleet.cut_gossip_only(one),
            _ => {}
        }
        thread::sleep(pause);
        if what == 1 {
            fleet.power_on(one);
        }
        ALL.iter().for_each(|id| fleet.heal(id));
        thread::sleep(pause / 4);
    }
}
