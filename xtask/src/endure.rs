//! `cargo xtask endure`: thousands of starts and stops of machines, while the agent is killed about every second.

use crate::{packages, sh};
use anyhow::{Context, anyhow, bail};
use dunlin_e2e::{Endurance, Endured, Server, endure};

const CYCLES: usize = 2000;
const MACHINES: usize = 8;
const USAGE: &str = "usage: cargo xtask endure [--cycles N] [--machines N]";

pub fn command(args: &[&str]) -> anyhow::Result<()> {
    let mut plan = Endurance { cycles: CYCLES, machines: MACHINES };
    let mut rest = args.iter();
    while let Some(flag) = rest.next() {
        let value = rest.next().with_context(|| format!("{flag} wants a value\n{USAGE}"))?;
        let number = value.parse::<usize>().ok().filter(|number| *number > 0);
        let number = number.with_context(|| format!("{flag} wants a number above 0, not {value:?}"))?;
        match *flag {
            "--cycles" => plan.cycles = number,
            "--machines" => plan.machines = number,
            _ => bail!("{flag} is unknown\n{USAGE}"),
        }
    }
    packages::ensure(packages::For::Test)?;
    sh::run(sh::cargo().args(["build", "--package", "dunlin"]))?;
    let server = Server::start();
    let Endured { made_and_destroyed, kills, took, census } =
        endure(&server, &plan).map_err(|broken| anyhow!("{broken}\n--- the server's log is {}", kept_log(&server)))?;
    println!(
        "{} starts and stops of {} machines, {made_and_destroyed} machines made and destroyed, {kills} kills of the agent, in {} s",
        plan.cycles,
        plan.machines,
        took.as_secs()
    );
    println!("no machine ran twice, none was lost; before and after there are {census}");
    Ok(())
}

/// The server's directory goes with it.
fn kept_log(server: &Server) -> String {
    let kept = sh::target_dir().join("endure.log");
    match std::fs::write(&kept, server.log()) {
        Ok(()) => kept.display().to_string(),
        Err(error) => format!("lost: {error}"),
    }
}
