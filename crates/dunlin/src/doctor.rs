//! `dunlin doctor`: what this computer offers, what is missing, what that costs and how to mend it.

use crate::settings::Settings;
use anyhow::{Context, bail};
use dunlin_runtime::enclave::{self, Enclave};
use dunlin_runtime::features::{FeatureCheck, check_all, of_an_ordinary_user};
use std::path::{Path, PathBuf};

pub fn run(data_dir: &Path, json: bool) -> anyhow::Result<()> {
    let checks = if rustix::process::geteuid().is_root() { check_all(data_dir) } else { of_an_enclave(data_dir)? };
    if json {
        println!("{}", serde_json::to_string_pretty(&checks)?);
    } else {
        for check in &checks {
            print_check(check);
        }
    }
    match checks.iter().filter(|check| !check.ok).count() {
        0 => Ok(()),
        missing => bail!("{missing} of {} checks failed", checks.len()),
    }
}

/// What an ordinary user has, and what is found in namespaces like those of its server, where those can be made.
fn of_an_enclave(data_dir: &Path) -> anyhow::Result<Vec<FeatureCheck>> {
    let mut checks = of_an_ordinary_user();
    if checks.iter().any(|check| check.required && !check.ok) {
        return Ok(checks);
    }
    let scratch = Scratch::new()?;
    let enclave = Enclave::find_or_make(&scratch.0)?;
    let _ = enclave::connect(&enclave, &scratch.0); // what became of it is found inside
    let inside = enclave::enter(enclave.descriptors()).map(|()| check_all(data_dir));
    enclave.end(&scratch.0)?;
    let inside = inside?;
    // What was looked up outside is now known for sure.
    checks.retain(|check| inside.iter().all(|known| known.name != check.name));
    checks.extend(inside);
    Ok(checks)
}

/// A directory that is gone in the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> anyhow::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        let dir = std::env::temp_dir().join(format!("dunlin-doctor-{}", std::process::id()));
        std::fs::DirBuilder::new().mode(0o700).create(&dir).with_context(|| format!("{} cannot be made", dir.display()))?;
        Ok(Self(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0); // in the way of nobody
    }
}

fn print_check(check: &FeatureCheck) {
    println!("{:4} {:22} {}", if check.ok { "ok" } else { "MISS" }, check.name, check.found);
    if !check.ok {
        println!("     {:22} without it: {}", "", check.cost_if_missing);
        println!("     {:22} to mend it: {}", "", check.fix);
    }
}

/// What an ordinary user needs to have a server; the rest is told inside, where it is known for sure.
pub fn require_for_enclave() -> anyhow::Result<()> {
    let checks = of_an_ordinary_user();
    if checks.iter().all(|check| check.ok || !check.required) {
        return Ok(());
    }
    let found: String = checks.iter().map(|check| match check.ok {
        true => format!("\n  {}: there ({})", check.name, check.found),
        false => format!("\n  {}: {}; without it: {}; to mend it: {}", check.name, check.found, check.cost_if_missing, check.fix),
    }).collect();
    bail!(
        "`dunlin server` needs root, or what lets user {} be root of namespaces of its own; this is what there is of it{found}\n\
         hint: mend what is said above, or run it with sudo; every other command of `dunlin` works for ordinary users, with a \
         token of the server",
        rustix::process::geteuid().as_raw()
    );
}

/// What the server cannot run without; the rest is a warning.
pub fn require_for_server(settings: &Settings) -> anyhow::Result<()> {
    require(&settings.data_dir, |check| {
        tracing::warn!(feature = check.name, found = %check.found, cost = check.cost_if_missing, fix = %check.fix, "missing");
    })
}

/// The same for a server that is to come. What it can do without is told.
pub fn require(data_dir: &Path, tell: impl Fn(&FeatureCheck)) -> anyhow::Result<()> {
    let missing: Vec<FeatureCheck> = check_all(data_dir).into_iter().filter(|check| !check.ok).collect();
    missing.iter().filter(|check| !check.required).for_each(tell);
    let required: Vec<String> = missing
        .iter()
        .filter(|check| check.required)
        .map(|check| format!("\n  {}: {}; without it: {}; to mend it: {}", check.name, check.found, check.cost_if_missing, check.fix))
        .collect();
    if !required.is_empty() {
        bail!("this computer lacks what the server needs; `dunlin doctor` shows all of it{}", required.concat());
    }
    Ok(())
}
