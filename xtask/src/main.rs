//! One entry for all house work: `cargo xtask demo|test|sim|fuzz|endure|bench|tidy`.
#![forbid(unsafe_code)]

mod bench;
mod demo;
mod demo_fleet;
mod endure;
mod fuzz;
mod lane;
mod packages;
mod sh;
mod test;
mod tidy;
mod vm;

use anyhow::bail;
use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask <command>

  demo            set everything up, start a server, launch the bundled sample, print its URL
  demo --hosts 3  a cluster of three hosts, each in a network namespace, with an app, until Ctrl-C
  demo --stop     stop that server and remove all it left in the kernel
  test            set everything up and pass all tests
  test --fast     without the end-to-end tests and those in QEMU
  test --vm       only the tests of the Linux side, on pure control groups v2 in QEMU
  sim --seed N    tell the story of one seed of the simulator (tests/sim)
  sim --minutes N look through as many seeds as that allows
  sim --flock ... the same of hosts that share state; with --hosts N figures of so many
  sim --fleet ... the same of hosts, plans and edges together
  fuzz [NAME]     feed foreign bytes to what reads them (--seconds N each, 60 by default)
  endure          start and stop machines 2,000 times (--cycles N) under kills of the agent, and count what is left
  bench [NAME]    print figures beside their peers': deploy, create, machines, neighbours, proxy, idle, scale,
                  placement, flock (with 10,000 simulated hosts: 5 GB; --without-simulated)
  tidy            check the house rules";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            for cause in error.chain().skip(1) {
                eprintln!("  caused by: {cause}");
            }
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[&str]) -> anyhow::Result<()> {
    match args {
        ["demo"] => demo::Demo::of_this_checkout().start(),
        ["demo", "--hosts", hosts] => demo_fleet::run(hosts),
        ["demo", "--stop"] => demo::Demo::of_this_checkout().stop(),
        ["test"] => test::run(test::Scope::All),
        ["test", "--fast"] => test::run(test::Scope::Fast),
        ["test", "--vm"] => vm::run().map(|alone| test::name(&alone)),
        ["sim", rest @ ..] => sh::run(sh::cargo().args(["run", "--quiet", "--package", "dunlin-sim", "--"]).args(rest)),
        ["endure", rest @ ..] => endure::command(rest),
        ["fuzz", rest @ ..] => fuzz::command(rest),
        ["bench", names @ ..] => bench::run(names),
        ["tidy"] => tidy::run(),
        _ => bail!("{USAGE}"),
    }
}
