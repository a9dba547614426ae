//! `apps`, `status`, `scale`, `open`.

use crate::args::{AppArgs, AppsCommand, ScaleCommand};
use crate::config_file::app_name;
use crate::{CliError, Exit, Session, deploy, ui};
use dunlin_api::wire::{App, AppList, AppStatus, CreateApp, Machine, Release};
use std::collections::BTreeMap;

pub async fn apps(session: &Session, command: AppsCommand) -> Result<Exit, CliError> {
    match command {
        AppsCommand::List => list(session).await,
        AppsCommand::Create { name } => {
            let app: App = session.client.post("/v1/apps", &CreateApp::named(name)).await?;
            if session.json {
                ui::print_json(&app);
            } else {
                ui::print_line(&format!("created {}", app.name));
            }
            Ok(Exit::Ok)
        }
        AppsCommand::Destroy { name, yes, force } => {
            if !yes && !ui::confirm(&format!("Destroy {name}, its machines, secrets and releases?"))? {
                return Err(CliError::failed("nothing was destroyed"));
            }
            session.client.delete::<serde_json::Value>(&format!("/v1/apps/{name}?force={force}")).await?;
            if session.json {
                ui::print_json(&serde_json::json!({ "app": name, "destroyed": true }));
            } else {
                ui::print_line(&format!("destroyed {name}"));
            }
            Ok(Exit::Ok)
        }
    }
}

async fn list(session: &Session) -> Result<Exit, CliError> {
    let list: AppList = session.client.get("/v1/apps").await?;
    if session.json {
        ui::print_json(&list.apps);
        return Ok(Exit::Ok);
    }
    let rows = list.apps.iter().map(|app| {
        let release = if app.current_release == 0 { "-".into() } else { format!("v{}", app.current_release) };
        vec![app.name.to_string(), app.status.clone(), release, app.machine_count.to_string(), app.hostname.clone()]
    });
    ui::print_table(&["NAME", "STATUS", "RELEASE", "MACHINES", "HOST NAME"], &rows.collect::<Vec<_>>());
    Ok(Exit::Ok)
}

pub async fn status(session: &Session, args: AppArgs) -> Result<Exit, CliError> {
    let app = app_name(&args)?;
    let status: AppStatus = session.client.get(&format!("/v1/apps/{app}/status")).await?;
    if session.json {
        ui::print_json(&status);
        return Ok(Exit::Ok);
    }
    ui::print_line(&format!("app      {}", status.app.name));
    for url in &status.urls {
        ui::print_line(&format!("url      {url}"));
    }
    match &status.release {
        Some(release) => ui::print_line(&format!("release  v{} ({})", release.version, deploy::word(release.status))),
        None => ui::print_line("release  none yet; `dunlin deploy` makes the first"),
    }
    ui::print_line("");
    print_machines(&status.machines);
    for cost in &status.costs {
        ui::print_line(&format!("host     {}: {}", cost.name, cost.cost));
    }
    Ok(Exit::Ok)
}

pub fn print_machines(machines: &[Machine]) {
    let rows = machines.iter().map(|machine| {
        let passing = machine.checks.iter().filter(|c| c.status == dunlin_view::CheckState::Passing).count();
        let checks = match machine.checks.len() {
            0 => "-".to_owned(),
            all => format!("{passing}/{all} passing"),
        };
        vec![
            machine.id.to_string(),
            machine.process_group.clone(),
            machine.state.as_str().to_owned(),
            checks,
            format!("v{}", machine.release),
            machine.region.to_string(),
            machine.private_ip.clone(),
        ]
    });
    ui::print_table(
        &["MACHINE", "GROUP", "STATE", "CHECKS", "RELEASE", "REGION", "ADDRESS"],
        &rows.collect::<Vec<_>>(),
    );
    for machine in machines {
        if let Some(problem) = &machine.problem {
            ui::print_line(&format!("{}: {problem}", machine.id));
        }
        for check in machine.checks.iter().filter(|c| c.status != dunlin_view::CheckState::Passing) {
            ui::print_line(&format!("{}: check {} fails: {}", machine.id, check.name, check.output));
        }
    }
}

pub async fn scale(session: &Session, command: ScaleCommand) -> Result<Exit, CliError> {
    match command {
        ScaleCommand::Show(args) => {
            let app = app_name(&args)?;
            let counts: BTreeMap<String, u32> = session.client.get(&format!("/v1/apps/{app}/scale")).await?;
            print_counts(session, &counts);
            Ok(Exit::Ok)
        }
        ScaleCommand::Memory { .. } => Err(CliError::usage("the size of machines is part of the configuration")
            .hint("set memory and cpus under [[vm]] in fly.toml or dunlin.toml, then `dunlin deploy`")),
        ScaleCommand::Count { counts, target, detach } => {
            let app = app_name(&target)?;
            let counts = parse_counts(&counts)?;
            let release: Option<Release> =
                session.client.post(&format!("/v1/apps/{app}/scale"), &counts).await?;
            match release {
                Some(release) if detach => {
                    deploy::print_release(session, &release);
                    Ok(Exit::Ok)
                }
                Some(release) => deploy::follow(session, &app, release.version).await,
                None => {
                    print_counts(session, &counts);
                    Ok(Exit::Ok)
                }
            }
        }
    }
}

fn print_counts(session: &Session, counts: &BTreeMap<String, u32>) {
    if session.json {
        ui::print_json(counts);
        return;
    }
    let rows: Vec<_> = counts.iter().map(|(group, n)| vec![group.clone(), n.to_string()]).collect();
    ui::print_table(&["GROUP", "MACHINES"], &rows);
}

/// `3` means the group `app`; otherwise `GROUP=N`.
pub fn parse_counts(texts: &[String]) -> Result<BTreeMap<String, u32>, CliError> {
    texts.iter().map(|text| {
        let (group, count) = text.split_once('=').unwrap_or(("app", text));
        match count.parse() {
            Ok(count) => Ok((group.to_owned(), count)),
            Err(_) => Err(CliError::usage(format!("{text:?} is not a number of machines")).hint("for example `3` or `worker=2`")),
        }
    }).collect()
}

pub async fn open(session: &Session, args: AppArgs) -> Result<Exit, CliError> {
    let app = app_name(&args)?;
    let status: AppStatus = session.client.get(&format!("/v1/apps/{app}/status")).await?;
    let Some(url) = status.urls.first() else {
        return Err(CliError::failed(format!("{app} has no URL: it serves no HTTP")).hint("add [http_service] to its configuration"));
    };
    if session.json {
        ui::print_json(&serde_json::json!({ "url": url }));
        return Ok(Exit::Ok);
    }
    ui::print_line(url);
    let opener = if cfg!(target_os = "macos") { "open" } else if cfg!(windows) { "explorer" } else { "xdg-open" };
    match tokio::process::Command::new(opener).arg(url).stdin(std::process::Stdio::null()).status().await {
        Ok(status) if status.success() => Ok(Exit::Ok),
        _ => {
            eprintln!("no browser could be started here; the URL is above");
            Ok(Exit::Ok)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_name_their_group_or_mean_app() {
        let check = |texts: &[&str]| parse_counts(&texts.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>());
        assert_eq!(check(&["3"]).unwrap(), BTreeMap::from([("app".to_owned(), 3)]));
        assert_eq!(check(&["web=2", "worker=0"]).unwrap().len(), 2);
        assert!(check(&["many"]).is_err());
        assert!(check(&["app=-1"]).is_err());
    }
}
