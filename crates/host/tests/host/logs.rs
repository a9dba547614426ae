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
