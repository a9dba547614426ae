//! Logs of several machines together.

use crate::setup::World;
use dunlin_api::{HostApi, LogQuery};

fn tail(world: &World, query: LogQuery) -> Vec<String> {
    world.block_on(async {
        let mut stream = world.host().logs(query).await.unwrap();
        let mut lines = Vec::new();
        while let Some(line) = stream.lines.recv().await {
            lines.push(line.line);
        }
        lines
    })
}

pub fn the_newest_lines_are_the_last_of_all_machines() {
    let mut world = World::new();
    world.ended(2, "busybox seq 120000", |_| {});
    world.ended(1, "echo newest", |_| {});
    let all = LogQuery { app: Some("web".parse().unwrap()), ..LogQuery::default() };
    let lines = tail(&world, LogQuery { tail: Some(4), ..all.clone() });
    assert_eq!(lines, ["120000", "ended with exit code 0", "newest", "ended with exit code 0"]);
    let lines = tail(&world, all);
    assert_eq!(lines.len(), 50_000);
    assert_eq!(lines[49_996..], ["120000", "ended with exit code 0", "newest", "ended with exit code 0"]);
}

/// Their readers do not read. What they wait for stays bounded, is an app's own affair, and what is missing is said.
pub fn tails_that_nobody_reads_take_up_so_much_memory_and_no_more() {
    let mut world = World::new();
    world.ended(1, "busybox seq 60000", |_| {});
    world.ended(2, "busybox seq 60000", |spec| spec["app"] = "other".into());
    let of = |app: &str| LogQuery { app: Some(app.parse().unwrap()), ..LogQuery::default() };
    let mut held = Vec::new();
    let left_out = world.within(crate::setup::PATIENCE * 4, "memory for one app's lines is taken", || {
        let (first, stream) = world.block_on(async {
            let mut stream = world.host().logs(of("web")).await.unwrap();
            (stream.lines.recv().await.unwrap(), stream)
        });
        held.push(stream);
        (first.stream == "system").then_some(first.line)
    });
    assert!(left_out.starts_with("older lines are left out here"), "{left_out}");
    assert!((3..8).contains(&held.len()), "{}", held.len());
    assert_eq!(tail(&world, of("other")).len(), 50_000);
    held.clear();
    world.until("it is given back", || (tail(&world, of("web")).len() == 50_000).then_some(()));
}

pub fn a_machine_that_prints_without_end_loses_lines_and_is_nobodys_trouble() {
    let mut world = World::new();
    let loud = world.started(1, "busybox yes 'as fast as it can'", |_| {});
    let quiet = world.started(2, "echo began; sleep 1000", |_| {});
    let records = |id| dunlin_runtime::logs::read_logs(&world.machine_dir(id), Default::default(), 1_000_000).unwrap().0;
    let said = world.until("the loss is said", || {
        let lost = |line: &str| line.ends_with("lines were lost: over the rate of 1024 KiB a second");
        records(&loud).into_iter().find(|record| record.stream == "system" && lost(&record.line))
    });
    assert!(said.line.as_bytes()[0].is_ascii_digit(), "{said:?}");
    let log = world.machine_dir(&loud).join("log");
    let kept: u64 = std::fs::read_dir(log).unwrap().flatten().filter_map(|file| Some(file.metadata().ok()?.len())).sum();
    assert!(kept <= 21 << 20, "{kept} bytes");
    assert_eq!(records(&quiet).iter().map(|record| record.line.as_str()).collect::<Vec<_>>(), ["began"]);
    assert!(world.block_on(world.host().processes(&quiet)).is_ok());
}

pub fn a_follower_hears_machines_that_come_and_attempts_that_follow() {
    let mut world = World::new();
    let first = world.ended(1, "echo first", |_| {});
    let query = LogQuery { app: Some("web".parse().unwrap()), follow: true, ..LogQuery::default() };
    let mut stream = world.block_on(world.host().logs(query)).unwrap();
    let mut heard = |world: &World, wanted: &str| {
        let next = async {
            while let Some(line) = stream.lines.recv().await {
                if line.line == wanted {
                    return Some(line.machine);
                }
            }
            None
        };
        let heard = world.block_on(async { tokio::time::timeout(crate::setup::PATIENCE, next).await });
        heard.unwrap_or_else(|_| panic!("not heard: {wanted}"))
    };
    assert_eq!(heard(&world, "first"), Some(first.clone()));
    let second = world.ended(2, "echo second", |_| {});
    assert_eq!(heard(&world, "second"), Some(second));
    world.command(&first, dunlin_api::CommandKind::Start).unwrap();
    assert_eq!(heard(&world, "first"), Some(first), "of its next attempt");
}
