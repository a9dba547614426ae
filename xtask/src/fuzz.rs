//! `cargo xtask fuzz`: libFuzzer on everything that reads foreign bytes, with the stable compiler.
//!
//! Each target begins with what `fuzz/corpus/<target>` has; what it finds beyond that stays in the target directory. A crash is
//! kept there too, and the command that shows it again is printed.

use crate::{packages, sh};
use anyhow::{Context, bail};
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// What cargo-fuzz tells the compiler, but for the sanitizer of addresses, which wants an unstable one.
const FLAGS: &[&str] = &[
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
    "--cfg",
    "fuzzing",
];
const HOST: &str = "x86_64-unknown-linux-gnu";
/// Each, two at a time; the gate takes that long too.
pub const SECONDS: u32 = 60;
const MAX_INPUT_BYTES: u32 = 8 * 1024;
const MAX_MEMORY_MB: u32 = 1024;

pub fn command(args: &[&str]) -> anyhow::Result<()> {
    let (mut seconds, mut only) = (SECONDS, vec![]);
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match *arg {
            "--seconds" => seconds = args.next().and_then(|n| n.parse().ok()).context("--seconds wants a number")?,
            name => only.push(name.to_owned()),
        }
    }
    run(seconds, &only)
}

/// Builds all of them.
pub fn build() -> anyhow::Result<()> {
    packages::ensure(packages::For::Fuzz)?;
    let mut build = sh::cargo();
    build.current_dir(sh::root().join("fuzz")).args(["build", "--release", "--quiet", "--bins", "--target", HOST, "--target-dir"]);
    sh::run(build.arg(home()).env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\u{1f}")))
}

pub fn run(seconds: u32, only: &[String]) -> anyhow::Result<()> {
    let all = targets()?;
    if let Some(unknown) = only.iter().find(|name| !all.contains(name)) {
        bail!("there is no fuzz target {unknown}; they are {}", all.join(", "));
    }
    build()?;
    let chosen: Vec<&String> = all.iter().filter(|name| only.is_empty() || only.contains(name)).collect();
    let mut failed = vec![];
    for pair in chosen.chunks(2) {
        let running = pair.iter().map(|name| Ok((*name, start(name, seconds)?))).collect::<anyhow::Result<Vec<_>>>()?;
        for (name, child) in running {
            let ended = child.wait_with_output()?;
            let said = String::from_utf8_lossy(&ended.stderr);
            let summary = said.lines().rev().find(|line| line.starts_with("Done ")).unwrap_or("it did not come to its end");
            println!("fuzz {name}: {summary}");
            if !ended.status.success() {
                let last: Vec<&str> = said.lines().rev().take(40).collect();
                last.iter().rev().for_each(|line| println!("  {line}"));
                failed.push(name.as_str());
            }
        }
    }
    if !failed.is_empty() {
        bail!("inputs were found that {} cannot take; the lines above name them", failed.join(", "));
    }
    Ok(())
}

fn home() -> PathBuf {
    sh::target_dir().join("fuzz")
}

fn start(name: &str, seconds: u32) -> anyhow::Result<Child> {
    let home = home();
    let (found, crashes) = (home.join("found").join(name), home.join("crashes"));
    fs::create_dir_all(&found)?;
    fs::create_dir_all(&crashes)?;
    // Nothing waits for it: it counts what it finds, not how soon.
    let child = sh::leaving_others_first(Command::new(home.join(HOST).join("release").join(name)))
        .args([&found, &sh::root().join("fuzz/corpus").join(name)])
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={MAX_INPUT_BYTES}"))
        .arg(format!("-rss_limit_mb={MAX_MEMORY_MB}"))
        .arg(format!("-artifact_prefix={}/{name}-", crashes.display()))
        .args(["-timeout=30", "-print_final_stats=0", "-verbosity=1"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    child.with_context(|| format!("the fuzz target {name} could not be started"))
}

fn targets() -> anyhow::Result<Vec<String>> {
    let dir: PathBuf = sh::root().join("fuzz/fuzz_targets");
    let mut names = vec![];
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if let Some(name) = path.file_stem().filter(|_| path.extension().is_some_and(|extension| extension == "rs")) {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}
