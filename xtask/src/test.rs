//! `cargo xtask test`: sets everything up and passes all tests.

use crate::demo::Demo;
use crate::lane::Lane;
use crate::{fuzz, packages, sh, tidy, vm};
use anyhow::bail;
use std::io::{self, Write};
use std::thread;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    All,
    /// Without the end-to-end tests and those in QEMU.
    Fast,
}

/// They compute: the cores, the simulator, the Linux side.
const QUICK: Lane = Lane { args: &["--workspace", "--exclude", "dunlin-e2e"], options: &[] };
/// They mostly wait: for deadlines, restarts and each other's machines. Of the workspace, as above: nothing is built again.
const END_TO_END: Lane = Lane { args: &["--workspace", "--test", "e2e"], options: &["--test-threads=3"] };

pub fn run(scope: Scope) -> anyhow::Result<()> {
    packages::ensure(packages::For::Test)?;
    tidy::run()?;
    sh::run(sh::cargo().args(["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"]))?;
    // The binary first: the end-to-end tests run it.
    sh::run(sh::cargo().args(["build", "--package", "dunlin"]))?;
    let alone = match scope {
        Scope::Fast => QUICK.run()?,
        Scope::All => all()?,
    };
    name(&alone);
    Ok(())
}

/// What computes runs beside what waits, and takes only what that leaves of the processors.
fn all() -> anyhow::Result<Vec<String>> {
    QUICK.build()?;
    END_TO_END.build()?;
    fuzz::build()?;
    let mut told = Vec::new();
    let (quick, fuzzed, end_to_end) = thread::scope(|scope| {
        println!("beside the end-to-end tests run all others and the fuzzing; what they say comes behind");
        let beside = scope.spawn(|| (QUICK.attempt(sh::leaving_others_first(sh::cargo()), &mut told), fuzz::run(fuzz::SECONDS, &[])));
        let end_to_end = END_TO_END.attempt(sh::cargo(), &mut io::stdout());
        let (quick, fuzzed) = beside.join().expect("it does not panic");
        (quick, fuzzed, end_to_end)
    });
    io::stdout().write_all(&told)?;
    fuzzed?;
    let mut alone = QUICK.settle(quick)?;
    alone.extend(END_TO_END.settle(end_to_end)?);
    if vm::is_possible() {
        alone.extend(vm::run()?);
    } else {
        println!("left out: the tests on pure control groups v2; QEMU is not installed, and there is no apt-get to install it");
    }
    demo()?;
    Ok(alone)
}

/// Tests that passed only when nothing else ran: to be mended.
pub fn name(alone: &[String]) {
    if !alone.is_empty() {
        println!("passed only alone, so there is a race in each, or in what it tests:\n  {}", alone.join("\n  "));
    }
}

/// As people use it: started, started again, stopped, and nothing of it is left.
fn demo() -> anyhow::Result<()> {
    let demo = Demo::for_tests();
    let done = demo.start().and_then(|()| demo.start());
    demo.stop()?;
    done?;
    let leftovers = dunlin_e2e::leftovers(&demo.data());
    if !leftovers.is_empty() {
        bail!("the demo left something behind:\n  {}", leftovers.join("\n  "));
    }
    Ok(())
}
