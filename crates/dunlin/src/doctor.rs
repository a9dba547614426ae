//! `dunlin doctor`: what this computer offers, what is missing, what that costs and how to mend it.

use crate::settings::Settings;
use anyhow::bail;
use dunlin_runtime::features::{FeatureCheck, check_all, of_an_ordinary_user};
use std::path::Path;

pub fn run(data_dir: &Path, json: bool) -> anyhow::Result<()> {
    let checks = check_all(data_dir);
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

fn print_check(check: &FeatureCheck) {
    println!("{:4} {:22} {}", if check.ok { "ok" } else { "MISS" }, check.name, check.found);
    if !check.ok {
        println!("     {:22} without it: {}", "", check.cost_if_missing);
        println!("     {:22} to mend it: {}", "", check.fix);
    }
}

/// What the server cannot run without; the rest is a warning.
pub fn require_for_server(settings: &Settings) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        let found: String = of_an_ordinary_user().iter().map(|check| match check.ok {
            true => format!("\n  {}: there ({})", check.name, check.found),
            false => format!("\n  {}: {}; without it: {}; to mend it: {}", check.name, check.found, check.cost_if_missing, check.fix),
        }).collect();
        bail!(
            "`dunlin server` needs root; this is what machines need, and what user {} has of it{found}\nhint: run it with sudo; \
             every other command of `dunlin` works for ordinary users, with a token of the server",
            rustix::process::geteuid().as_raw()
        );
    }
    let missing: Vec<FeatureCheck> = check_all(&settings.data_dir).into_iter().filter(|check| !check.ok).collect();
    for check in missing.iter().filter(|check| !check.required) {
        tracing::warn!(feature = check.name, found = %check.found, cost = check.cost_if_missing, fix = %check.fix, "missing");
    }
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
