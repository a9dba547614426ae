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

/// What one `cargo test` runs.
pub struct Lane {
    /// They select the tests.
    pub args: &'static [&'static str],
    /// For the tests themselves.
    pub options: &'static [&'static str],
}

/// How a lane went at first.
pub struct Ran {
    /// By name.
    failed: Vec<String>,
    error: Option<anyhow::Error>,
}

impl Lane {
    /// Builds what it runs, and does not run it.
    pub fn build(&self) -> anyhow::Result<()> {
        sh::run(sh::cargo().arg("test").args(self.args).arg("--no-run"))
    }

    /// Where nothing else runs. Gives the names of those that passed only alone.
    pub fn run(&self) -> anyhow::Result<Vec<String>> {
        self.settle(self.attempt(sh::cargo(), &mut std::io::stdout()))
    }

    /// Beside others, `cargo` being how it is run. [`Self::settle`] is to follow, when they are done.
    pub fn attempt(&self, cargo: Command, out: &mut impl Write) -> Ran {
        let mut failed = Vec::new();
        let error = pass_on(&mut self.command(cargo, self.options), out, &mut failed).err();
        Ran { failed, error }
    }

    /// Tries once more, alone, what failed. Gives the names of those that then passed.
    pub fn settle(&self, ran: Ran) -> anyhow::Result<Vec<String>> {
        let Ran { failed, error } = ran;
        let Some(error) = error else { return Ok(Vec::new()) };
        // Without a name, it was not a test that failed; one with a space is an example in a comment, which runs alone anyway.
        if failed.is_empty() || failed.len() > MOST || failed.iter().any(|name| name.contains(' ')) {
            return Err(error);
        }
        println!("once more, alone: {}", failed.join(", "));
        let names = failed.iter().map(String::as_str);
        sh::run(&mut self.command(sh::cargo(), &["--exact", "--test-threads=1"].into_iter().chain(names).collect::<Vec<_>>()))?;
        Ok(failed)
    }

    fn command(&self, mut cargo: Command, options: &[&str]) -> Command {
        cargo.arg("test").args(self.args).arg("--no-fail-fast").arg("--").args(options);
        cargo
    }
}

/// Passes its lines on to `out`, and the names of tests that failed to `failed`.
fn pass_on(command: &mut Command, out: &mut impl Write, failed: &mut Vec<String>) -> anyhow::Result<()> {
    let mut child = command.stdout(Stdio::piped()).spawn().context("cargo could not be started")?;
    for line in BufReader::new(child.stdout.take().context("it has no output")?).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        writeln!(out, "{line}")?;
        out.flush()?;
        failed.extend(failed_test(&line).map(str::to_owned));
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("cargo test ended with {status}; the lines above say which tests failed");
    }
    Ok(())
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
