//! `dunlin upgrade`: puts another binary in the place of the running server's, reloads it and says how that ended.

use crate::keeper;
use crate::program::{self, Outcome};
use crate::server::operate;
use anyhow::{Context, bail};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Longer than a trial takes with its way back.
const PATIENCE: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_millis(100);

#[derive(clap::Args)]
pub struct UpgradeArgs {
    /// The new binary; by default the one that is asked to do this
    binary: Option<PathBuf>,
}

pub fn run(args: &UpgradeArgs, data_dir: &Path, json: bool) -> anyhow::Result<()> {
    let Some(keeper) = keeper::holder(data_dir)? else {
        bail!("no server uses {}; start it from the new binary, or name its --data-dir", data_dir.display());
    };
    let binary = match &args.binary {
        Some(path) => path.clone(),
        None => std::env::current_exe().context("the path of this binary is not known")?,
    };
    let version = version_of(&binary)?;
    let path = program::path_of(&keeper)?;
    if fs::canonicalize(&binary)? == fs::canonicalize(&path).unwrap_or_default() {
        bail!("{} is the server's own binary; name the new one: dunlin upgrade PATH", binary.display());
    }
    program::forget_outcome(data_dir)?;
    // What becomes of this one is none of control's business.
    match fs::remove_file(operate::record_path(data_dir)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).context("what control gave last cannot be forgotten");
        }
        _ => {}
    }
    let outcome = program::outcome_path(data_dir);
    say(json, &format!("installing {version} at {}", path.display()));
    program::install(&File::open(&binary)?, &path, || Ok(()))?;
    let pid = keeper.parse().ok().and_then(rustix::process::Pid::from_raw).context("the keeper's process id")?;
    rustix::process::kill_process(pid, rustix::process::Signal::HUP)
        .with_context(|| format!("the keeper (process {keeper}) could not be told to reload"))?;
    say(json, "the server restarts; machines go on, connections wait. Watching it for 10 s once it is ready");
    let outcome = wait_for(&outcome)?;
    if json {
        println!("{}", serde_json::to_string(&outcome)?);
    }
    match outcome {
        Outcome::Proven => {
            say(json, &format!("the server runs {version}"));
            Ok(())
        }
        Outcome::WentBack { why } => bail!(
            "the new binary did not work: {why}\n  the server runs the one before again\n  \
             hint: the server's log says more; the new binary is {}.failed",
            path.display()
        ),
    }
}

/// A binary that cannot even say its version is not installed.
pub fn version_of(binary: &Path) -> anyhow::Result<String> {
    let output = Command::new(binary)
        .arg("version")
        .stdin(Stdio::null())
        .output()
        .with_context(|| {
            format!("{} cannot be run on this computer\n  hint: is it for another system, or not whole?", binary.display())
        })?;
    let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if !output.status.success() || !version.starts_with("dunlin ") {
        bail!(
            "{} is no dunlin: `version` ended with {} and said {version:?}\n  hint: dunlin upgrade PATH-OF-THE-NEW-BINARY",
            binary.display(),
            output.status
        );
    }
    Ok(version)
}

fn wait_for(outcome: &Path) -> anyhow::Result<Outcome> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match fs::read(outcome) {
            Ok(json) => return serde_json::from_slice(&json).context("the keeper's word on the upgrade is not readable"),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).context("the keeper's word on the upgrade cannot be read"),
        }
        if Instant::now() >= deadline {
            bail!("the keeper said nothing for {} s; the server's log says what it does", PATIENCE.as_secs());
        }
        std::thread::sleep(LOOK);
    }
}

fn say(json: bool, line: &str) {
    if !json {
        println!("{line}");
    }
}
