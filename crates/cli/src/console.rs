//! `console`: a shell in a machine of its own, with the app's image, environment and secrets, but none of its volumes.
//!
//! The machine sleeps, and destroys itself once it has ended. We end it when we leave; should we not come to that, its
//! host does, because nobody is attached any more.

use crate::args::ConsoleArgs;
use crate::config_file::app_name;
use crate::exec::{self, Program};
use crate::{CliError, Exit, Session, ssh};
use dunlin_api::wire::{AppStatus, Machine, Release};
use dunlin_model::config::PrimaryRegion;
use dunlin_model::config::units::{CPUS, GUEST_SIZES, GuestSize, MEMORY_MB, parse_size_mb};
use dunlin_model::machine::CONSOLE_GROUP;
use dunlin_model::{AppName, Guest, MachineId};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

/// As long as the longest session and an hour: an end that depends on nobody.
const SLEEP_S: &str = "90000";
const START_TIMEOUT_S: u64 = 60;

pub async fn console(session: &Session, args: ConsoleArgs) -> Result<Exit, CliError> {
    let app = app_name(&args.target)?;
    let release = current_release(session, &app).await?;
    let configured = release.as_ref().and_then(|release| release.config.as_ref()?.console_command.as_deref());
    let command = ssh::words_or_shell(args.command.as_deref().or(configured))?;
    let program = Program { command, timeout: None, args: args.run.clone() };
    if let Some(id) = &args.machine {
        return exec::attach(session, &app, id, program).await;
    }
    let config = config(&app, release, &args)?;
    let body = json!({ "config": config, "region": args.region });
    let machine: Machine = session.client.post(&format!("/v1/apps/{app}/machines"), &body).await?;
    let ended = match started(session, &app, &machine.id).await {
        Ok(()) => exec::run(session, &app, &machine.id, program).await,
        Err(error) => Err(error),
    };
    destroy(session, &app, &machine.id).await;
    Ok(exec::exit(ended?))
}

/// With its configuration.
async fn current_release(session: &Session, app: &AppName) -> Result<Option<Release>, CliError> {
    match session.client.get::<AppStatus>(&format!("/v1/apps/{app}/status")).await?.release {
        Some(current) => Ok(Some(session.client.get(&format!("/v1/apps/{app}/releases/{}", current.version)).await?)),
        None => Ok(None),
    }
}

/// What the machine is asked to be, as Fly's clients write it.
fn config(app: &AppName, release: Option<Release>, args: &ConsoleArgs) -> Result<Value, CliError> {
    let image = args.image.clone().or(release.as_ref().map(|release| release.image.clone())).ok_or_else(|| {
        CliError::failed(format!("app {app} has no release whose image a console could have"))
            .hint("name an image with --image, or deploy first")
    })?;
    let released = release.and_then(|release| release.config).unwrap_or_default();
    let mut env: BTreeMap<String, String> = released.env.clone();
    if let Some(region) = released.primary_region.as_ref().and_then(PrimaryRegion::named) {
        env.entry("PRIMARY_REGION".to_owned()).or_insert_with(|| region.to_string());
    }
    env.extend(args.env.iter().cloned());
    Ok(json!({
        "image": image,
        "init": { "exec": ["sleep", SLEEP_S] },
        "env": env,
        "guest": guest(args, released.guest_for(CONSOLE_GROUP))?,
        "restart": { "policy": "no" },
        "auto_destroy": true,
        "metadata": { "fly_process_group": CONSOLE_GROUP },
    }))
}

/// The size that the app's configuration gives to machines of any group, unless another is asked for.
fn guest(args: &ConsoleArgs, usual: Guest) -> Result<Guest, CliError> {
    let mut guest = match &args.vm_size {
        None => usual,
        Some(name) => GuestSize::named(name).map(GuestSize::guest).ok_or_else(|| {
            let names: Vec<_> = GUEST_SIZES.iter().map(|size| size.name).collect();
            CliError::usage(format!("--vm-size: {name:?} is not a size")).hint(format!("use one of {}", names.join(", ")))
        })?,
    };
    if let Some(cpus) = args.vm_cpus {
        guest.cpus = within("--vm-cpus", cpus, CPUS)?;
    }
    if let Some(text) = &args.vm_memory {
        let mb = text.parse().ok().or_else(|| parse_size_mb(text));
        let mb = mb.ok_or_else(|| CliError::usage(format!("--vm-memory: {text:?} is not a size")).hint("for example 512 or 1gb"))?;
        guest.memory_mb = within("--vm-memory", mb, MEMORY_MB)?;
    }
    Ok(guest)
}

fn within(flag: &str, number: u32, range: RangeInclusive<u32>) -> Result<u32, CliError> {
    if range.contains(&number) {
        return Ok(number);
    }
    Err(CliError::usage(format!("{flag}: {number} is not between {} and {}", range.start(), range.end())).hint("choose another"))
}

async fn started(session: &Session, app: &AppName, id: &MachineId) -> Result<(), CliError> {
    let wait = format!("/v1/apps/{app}/machines/{id}/wait?state=started&timeout={START_TIMEOUT_S}");
    session.client.get::<Value>(&wait).await.map(drop).map_err(|error| {
        let error = CliError::from(error);
        let causes = [vec![error.message], error.causes].concat();
        CliError { causes, ..CliError::failed(format!("the console's machine {id} did not start")) }
            .hint("it runs `sleep`, which its image must have; `dunlin ssh console` opens a shell in a machine that runs")
    })
}

/// It may have destroyed itself already, and does so later where we cannot say it.
async fn destroy(session: &Session, app: &AppName, id: &MachineId) {
    let _ = session.client.delete::<Value>(&format!("/v1/apps/{app}/machines/{id}?force=true")).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use dunlin_model::CpuKind;

    fn check(change: impl FnOnce(&mut ConsoleArgs), expected: Option<(CpuKind, u32, u32)>) {
        let mut args = ConsoleArgs::default();
        change(&mut args);
        let usual = Guest { cpu_kind: CpuKind::Shared, cpus: 2, memory_mb: 512 };
        let guest = guest(&args, usual).ok();
        assert_eq!(guest.map(|guest| (guest.cpu_kind, guest.cpus, guest.memory_mb)), expected, "{args:?}");
    }

    #[test]
    fn a_size_is_the_apps_or_what_was_asked_for() {
        check(|_| {}, Some((CpuKind::Shared, 2, 512)));
        check(|args| args.vm_memory = Some("1024".into()), Some((CpuKind::Shared, 2, 1024)));
        check(|args| args.vm_memory = Some("1gb".into()), Some((CpuKind::Shared, 2, 1024)));
        check(|args| args.vm_cpus = Some(4), Some((CpuKind::Shared, 4, 512)));
        check(|args| args.vm_size = Some("performance-1x".into()), Some((CpuKind::Performance, 1, 2048)));
        check(|args| args.vm_size = Some("huge".into()), None);
        check(|args| args.vm_memory = Some("much".into()), None);
        check(|args| args.vm_cpus = Some(1000), None);
    }
}
