//! Builder machines: one an organization, gone when their time is over or nobody listens.

use crate::setup::World;
use dunlin_api::{ExecOutput, HostApi};
use std::time::Duration;

/// What a build printed, and how it ended.
fn run(world: &World, script: &str) -> (String, ExecOutput) {
    world.block_on(async {
        let mut run = world.host().run_builder(world.build(script, 60_000)).await.unwrap();
        let mut printed = String::new();
        loop {
            match run.output.recv().await.expect("it says how it ended") {
                ExecOutput::Stdout(bytes) | ExecOutput::Stderr(bytes) => printed += &String::from_utf8_lossy(&bytes),
                last => return (printed, last),
            }
        }
    })
}

fn until_gone(world: &World) {
    let machines = world.dir.path().join("builder/machines");
    let left = || std::fs::read_dir(&machines).map_or(0, |entries| entries.count());
    world.until("no builder is left", || (left() == 0).then_some(()));
}

pub fn a_caller_that_goes_away_leaves_no_builder() {
    let world = World::new();
    let (printed, last) = run(&world, "echo hello; exit 3");
    assert_eq!((printed.as_str(), last), ("hello\n", ExecOutput::Exited(3)));
    for _ in 0..5 {
        // It goes away just when the machine is being made.
        let begun = async {
            while dunlin_runtime::lock_holder(&world.dir.path().join("builder/machines/builder-0")).unwrap().is_none() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        world.block_on(async {
            tokio::select! {
                _ = world.host().run_builder(world.build("sleep 1000", 3_600_000)) => {}
                () = begun => {}
            }
        });
        until_gone(&world);
    }
    assert_eq!(run(&world, "exit 4").1, ExecOutput::Exited(4));
}

/// A reader that takes nothing holds neither the builder nor the next build's turn longer than the build's time.
pub fn a_reader_that_stalls_holds_nobody_up() {
    let world = World::new();
    let stalled = world.block_on(world.host().run_builder(world.build("yes", 2_000))).unwrap();
    assert_eq!(run(&world, "exit 5").1, ExecOutput::Exited(5));
    let mut stalled = stalled.output;
    let last = world.block_on(async {
        let mut last = None;
        while let Some(output) = stalled.recv().await {
            last = Some(output);
        }
        last
    });
    assert!(matches!(last, Some(ExecOutput::Failed(_) | ExecOutput::Stdout(_))), "{last:?}");
}
