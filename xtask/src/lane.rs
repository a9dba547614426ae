//! `cargo test` of a lane, where several whole servers share two cores. What fails beside others is tried once more, alone.
//!
//! A test that passes only alone still shows a race, of its own or of the product: the end of the run names it. But it says
//! nothing about the change that is being judged, so it does not refuse it.

use crate::sh;
use anyhow::{Context, bail};
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

/// More than these is no accident.
const MOST: usize = 5;

/// `args` select what `cargo test` runs, `options` are for the tests. Gives the names of those that passed only alone.
pub fn run(args: &[&str], options: &[&str]) -> anyhow::Result<Vec<String>> {
    let cargo = |options: &[&str]| {
        let mut cargo = sh::cargo();
        cargo.arg("test").args(args).arg("--no-fail-fast").arg("--").args(options);
        cargo
    };
    let Err((error, failed)) = attempt(&mut cargo(options)) else { return Ok(Vec::new()) };
    // Without a name, it was not a test that failed; one with a space is an example in a comment, which runs alone anyway.
    if failed.is_empty() || failed.len() > MOST || failed.iter().any(|name| name.contains(' ')) {
        return Err(error);
    }
    println!("once more, alone: {}", failed.join(", "));
    let names = failed.iter().map(String::as_str);
    sh::run(&mut cargo(&["--exact", "--test-threads=1"].into_iter().chain(names).collect::<Vec<_>>()))?;
    Ok(failed)
}

fn attempt(command: &mut Command) -> Result<(), (anyhow::Error, Vec<String>)> {
    let mut failed = Vec::new();
    let mut look = || {
        let mut child = command.stdout(Stdio::piped()).spawn().context("cargo could not be started")?;
        for line in BufReader::new(child.stdout.take().context("it has no output")?).split(b'\n') {
            let line = String::from_utf8_lossy(&line?).into_owned();
            println!("{line}");
            std::io::stdout().flush()?;
            failed.extend(failed_test(&line).map(str::to_owned));
        }
        let status = child.wait()?;
        if !status.success() {
            bail!("cargo test ended with {status}; the lines above say which tests failed");
        }
        Ok(())
    };
    look().map_err(|error| (error, failed))
}

/// The test that this line says has failed, by whichever harness.
pub fn failed_test(line: &str) -> Option<&str> {
    let (name, result) = line.trim_end().strip_prefix("test ")?.split_once(" ... ")?;
    result.starts_with("FAILED").then_some(name)
}

#[cfg(test)]
mod tests {
    use super::failed_test;

    #[test]
    fn what_failed_is_found_in_either_harness() {
        assert_eq!(failed_test("test volumes::it_grows ... FAILED"), Some("volumes::it_grows"));
        assert_eq!(failed_test("test life::it_ends ... FAILED (6.8s)"), Some("life::it_ends"));
        assert_eq!(failed_test("test life::it_ends ... ok (6.8s)"), None);
        assert_eq!(failed_test("test result: FAILED. 13 passed; 1 failed"), None);
    }
}
