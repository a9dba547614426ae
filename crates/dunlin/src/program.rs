//! Which binary servers are started from, and how an upgrade that fails is taken back.
//!
//! An upgrade is a rename over the binary's path, then a reload. The keeper holds the last proven binary open, so that it
//! can start it whatever stands at the path now. A new one is on trial until its server was ready and lived on; one that
//! fails is moved to `<path>.failed`, the proven one takes its place again, and the outcome stands in
//! `<data>/run/upgrade.json`, for `dunlin upgrade` and for people.

use anyhow::Context;
use serde::{Deserialize, Serialize};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Tells a server that its binary is on trial. A variable and no flag: one of before there was such would not start with that.
pub const ON_TRIAL: &str = "DUNLIN_ON_TRIAL";

/// How an upgrade ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    Proven,
    WentBack { why: String },
}

pub struct Program {
    path: PathBuf,
    proven: File,
    /// A binary that has yet to show what it does.
    trial: Option<File>,
    outcome: PathBuf,
}

impl Program {
    pub fn of_this_process(data_dir: &Path) -> anyhow::Result<Self> {
        let proven = File::open("/proc/self/exe").context("this binary cannot be opened")?;
        Ok(Self { path: path_of("self")?, proven, trial: None, outcome: outcome_path(data_dir) })
    }

    pub fn is_on_trial(&self) -> bool {
        self.trial.is_some()
    }

    /// Looks at the path: another binary than the proven one goes on trial.
    pub fn take_up(&mut self) {
        self.trial = None;
        match File::open(&self.path).and_then(|found| Ok((same_file(&found, &self.proven)?, found))) {
            Ok((true, _)) => {}
            Ok((false, found)) => {
                tracing::info!(binary = %self.path.display(), "a new binary is on trial");
                self.trial = Some(found);
            }
            Err(error) => {
                tracing::error!(binary = %self.path.display(), %error, "the binary at its path cannot be opened; the one before goes on");
            }
        }
    }

    /// The program of the next server. By its path while that is the right one, so that people read its name in `ps`.
    pub fn command(&self) -> Command {
        let file = self.trial.as_ref().unwrap_or(&self.proven);
        let stands = File::open(&self.path).and_then(|found| same_file(&found, file)).unwrap_or(false);
        let mut command = match stands {
            true => Command::new(&self.path),
            false => {
                let mut command = Command::new(format!("/proc/self/fd/{}", file.as_raw_fd()));
                command.arg0("dunlin");
                command
            }
        };
        command.env_remove(ON_TRIAL);
        if self.is_on_trial() {
            command.env(ON_TRIAL, "1");
        }
        command
    }

    /// The trial is over and well.
    pub fn prove(&mut self) {
        if let Some(trial) = self.trial.take() {
            self.proven = trial;
            tracing::info!(binary = %self.path.display(), "the new binary is proven");
            self.tell(&Outcome::Proven);
        }
    }

    /// The trial failed: the binary before takes its place again.
    pub fn go_back(&mut self, why: &str) {
        self.trial = None;
        tracing::error!(binary = %self.path.display(), why, "the upgrade failed; going back to the binary before");
        if let Err(error) = self.restore() {
            tracing::error!(
                binary = %self.path.display(), error = format!("{error:#}"),
                "the file could not be put back: the server runs from the old one, put that back before the next boot"
            );
        }
        self.tell(&Outcome::WentBack { why: why.to_owned() });
    }

    fn restore(&mut self) -> anyhow::Result<()> {
        let failed = beside(&self.path, ".failed");
        let restored = install(&self.proven, &self.path, || fs::rename(&self.path, &failed))?;
        tracing::warn!(failed = %failed.display(), "the binary that failed was moved");
        self.proven = restored;
        Ok(())
    }

    fn tell(&self, outcome: &Outcome) {
        let told = serde_json::to_vec(outcome).map_err(io::Error::other).and_then(|json| {
            let new = beside(&self.outcome, ".new");
            fs::write(&new, json)?;
            fs::rename(new, &self.outcome)
        });
        if let Err(error) = told {
            tracing::warn!(%error, "how the upgrade ended could not be written down");
        }
    }
}

/// How the last upgrade ended, once it has.
pub fn outcome_of(data_dir: &Path) -> Option<Outcome> {
    serde_json::from_slice(&fs::read(outcome_path(data_dir)).ok()?).ok()
}

/// Before the next upgrade: whatever stands there then is how that one ended.
pub fn forget_outcome(data_dir: &Path) -> anyhow::Result<()> {
    match fs::remove_file(outcome_path(data_dir)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).context("the outcome of the upgrade before cannot be removed")
        }
        _ => Ok(()),
    }
}

/// Where the outcome of the last upgrade stands.
pub fn outcome_path(data_dir: &Path) -> PathBuf {
    data_dir.join("run/upgrade.json")
}

/// Copies a binary to `path`, whole or not at all. `before_it_stands` is the last thing before the rename.
pub fn install(binary: &File, path: &Path, before_it_stands: impl FnOnce() -> io::Result<()>) -> anyhow::Result<File> {
    let new = beside(path, ".new");
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("{} is in the way", new.display()));
        }
        _ => {}
    }
    let mut copy = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o755)
        .open(&new)
        .with_context(|| format!("{} cannot be made", new.display()))?;
    // A handle of its own: the other one's position is somebody else's.
    let mut source = File::open(format!("/proc/self/fd/{}", binary.as_raw_fd())).context("the binary cannot be read")?;
    io::copy(&mut source, &mut copy).context("the binary cannot be copied")?;
    copy.sync_all()?;
    drop(copy);
    before_it_stands().with_context(|| format!("{} cannot be replaced", path.display()))?;
    fs::rename(&new, path).with_context(|| format!("{} cannot be replaced", path.display()))?;
    Ok(File::open(path)?)
}

/// Where a process's binary is, or the one that an upgrade put in its place.
pub fn path_of(process: &str) -> anyhow::Result<PathBuf> {
    let link = fs::read_link(format!("/proc/{process}/exe"));
    let path = link.with_context(|| format!("the binary of process {process} is not known"))?.into_os_string().into_vec();
    let path = path.strip_suffix(b" (deleted)").unwrap_or(&path);
    Ok(OsStr::from_bytes(path).into())
}

pub fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name: OsString = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

fn same_file(one: &File, other: &File) -> io::Result<bool> {
    let (one, other) = (one.metadata()?, other.metadata()?);
    Ok((one.dev(), one.ino()) == (other.dev(), other.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn contents(path: &Path) -> String {
        let mut text = String::new();
        File::open(path).unwrap().read_to_string(&mut text).unwrap();
        text
    }

    /// As after a start from `path`.
    fn program(dir: &Path) -> Program {
        let path = dir.join("dunlin");
        fs::write(&path, "old").unwrap();
        Program { proven: File::open(&path).unwrap(), path, trial: None, outcome: dir.join("upgrade.json") }
    }

    fn replace(program: &Program, with: &str) {
        let new = beside(&program.path, ".mine");
        fs::write(&new, with).unwrap();
        fs::rename(new, &program.path).unwrap();
    }

    #[test]
    fn a_reload_of_the_same_binary_is_no_trial() {
        let dir = tempfile::tempdir().unwrap();
        let mut program = program(dir.path());
        program.take_up();
        assert!(!program.is_on_trial());
        assert_eq!(program.command().get_program(), program.path.as_os_str());
    }

    #[test]
    fn what_fails_is_moved_and_the_old_one_stands_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut program = program(dir.path());
        replace(&program, "bad");
        // Until the reload the old one is what is started.
        assert!(program.command().get_program().as_bytes().starts_with(b"/proc/self/fd/"));
        program.take_up();
        assert!(program.is_on_trial());
        assert_eq!(program.command().get_program(), program.path.as_os_str());
        program.go_back("it burnt");
        assert_eq!((contents(&program.path).as_str(), program.is_on_trial()), ("old", false));
        assert_eq!(contents(&beside(&program.path, ".failed")), "bad");
        assert_eq!(program.command().get_program(), program.path.as_os_str());
        let outcome: Outcome = serde_json::from_str(&contents(&program.outcome)).unwrap();
        assert_eq!(outcome, Outcome::WentBack { why: "it burnt".into() });
        // What stands there now is the proven one: nothing to try.
        program.take_up();
        assert!(!program.is_on_trial());
    }

    #[test]
    fn what_is_proven_is_what_the_next_failure_goes_back_to() {
        let dir = tempfile::tempdir().unwrap();
        let mut program = program(dir.path());
        replace(&program, "good");
        program.take_up();
        program.prove();
        replace(&program, "bad");
        program.take_up();
        program.go_back("it burnt");
        assert_eq!(contents(&program.path), "good");
    }
}
