//! `cargo xtask test`: sets everything up and passes all tests.

use crate::demo::Demo;
use crate::{fuzz, lane, packages, sh, tidy, vm};
use anyhow::bail;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    All,
    /// Without the end-to-end tests and those in QEMU.
    Fast,
}

pub fn run(scope: Scope) -> anyhow::Result<()> {
    packages::ensure(packages::For::Test)?;
    tidy::run()?;
    sh::run(sh::cargo().args(["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"]))?;
    // The binary first: the end-to-end tests run it.
    sh::run(sh::cargo().args(["build", "--package", "dunlin"]))?;
    let mut alone = lane::run(&["--workspace", "--exclude", "dunlin-e2e"], &[])?;
    if scope == Scope::All {
        fuzz::run(fuzz::SECONDS, &[])?;
        if vm::is_possible() {
            alone.extend(vm::run()?);
        } else {
            println!("left out: the tests on pure control groups v2; QEMU is not installed, and there is no apt-get to install it");
        }
        // They mostly wait: for deadlines, restarts and each other's machines. Of the workspace, as above: nothing is built again.
        alone.extend(lane::run(&["--workspace", "--test", "e2e"], &["--test-threads=3"])?);
        demo()?;
    }
    name(&alone);
    Ok(())
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
