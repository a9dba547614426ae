//! `machine`: list, status, start, stop, suspend, restart, exec, lease, destroy.

use crate::args::{LeaseCommand, MachineArgs, MachineCommand};
use crate::config_file::app_name;
use crate::{CliError, Exit, Session, apps, exec, ui};
use dunlin_api::client::Client;
use dunlin_api::wire::{AppList, ExecAnswer, ExecBody, Machine, StopMachine};
use dunlin_model::AppName;
use dunlin_model::config::words;
use serde_json::{Value, json};
use std::time::{SystemTime, UNIX_EPOCH};

const JSON_TIMEOUT_S: u64 = 60;

pub async fn machine(session: &Session, command: MachineCommand) -> Result<Exit, CliError> {
    match command {
        MachineCommand::List(args) => {
            let app = app_name(&args)?;
            let machines: Vec<Machine> = session.client.get(&format!("/v1/apps/{app}/machines")).await?;
            if session.json {
                ui::print_json(&machines);
            } else {
                apps::print_machines(&machines);
            }
            Ok(Exit::Ok)
        }
        MachineCommand::Status(target) => {
            let machine = find(session, &target).await?;
            if session.json {
                ui::print_json(&machine);
            } else {
                print_machine(&machine);
            }
            Ok(Exit::Ok)
        }
        MachineCommand::Start(target) => act(session, &target, "start", &json!({})).await,
        MachineCommand::Stop { target, signal, timeout } => {
            act(session, &target, "stop", &StopMachine { signal, timeout: timeout.map(Value::from) }).await
        }
        MachineCommand::Suspend(target) => act(session, &target, "suspend", &json!({})).await,
        MachineCommand::Restart(target) => act(session, &target, "restart", &json!({})).await,
        MachineCommand::Exec { target, timeout, run, command } if !session.json => {
            let command = words_of(command)?;
            let app = app_of(session, &target).await?;
            exec::attach(session, &app, &target.id, exec::Program { command, timeout, args: run }).await
        }
        MachineCommand::Exec { target, timeout, command, .. } => {
            exec_for_json(session, &target, timeout.unwrap_or(JSON_TIMEOUT_S), words_of(command)?).await
        }
        MachineCommand::Lease(LeaseCommand::View(target)) => view_lease(session, &target).await,
        MachineCommand::Lease(LeaseCommand::Clear(target)) => clear_lease(session, &target).await,
        MachineCommand::Destroy { target, force } => {
            let (app, id) = (app_of(session, &target).await?, &target.id);
            client(session, &target).delete::<Value>(&format!("/v1/apps/{app}/machines/{id}?force={force}")).await?;
            if session.json {
                ui::print_json(&json!({ "id": id, "destroyed": true }));
            } else {
                ui::print_line(&format!("destroyed {id}"));
            }
            Ok(Exit::Ok)
        }
    }
}

/// For what only the holder of a lease may do.
fn client(session: &Session, target: &MachineArgs) -> Client {
    target.lease.as_ref().map_or_else(|| session.client.clone(), |nonce| session.client.holding(nonce))
}

async fn view_lease(session: &Session, target: &MachineArgs) -> Result<Exit, CliError> {
    let (app, id) = (app_of(session, target).await?, &target.id);
    let lease: Value = client(session, target).get(&format!("/v1/apps/{app}/machines/{id}/lease")).await?;
    if session.json {
        ui::print_json(&lease["data"]);
        return Ok(Exit::Ok);
    }
    let text = |name: &str| lease["data"][name].as_str().unwrap_or_default().to_owned();
    ui::print_line(&format!("machine      {id}"));
    ui::print_line(&format!("owner        {}", text("owner")));
    ui::print_line(&format!("description  {}", text("description")));
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let left_s = lease["data"]["expires_at"].as_u64().unwrap_or_default().saturating_sub(now_s);
    ui::print_line(&format!("expires      in {left_s} s"));
    Ok(Exit::Ok)
}

async fn clear_lease(session: &Session, target: &MachineArgs) -> Result<Exit, CliError> {
    if target.lease.is_none() {
        return Err(CliError::usage("a lease is ended by its nonce").hint("add --lease NONCE, or wait until it expires: `dunlin machine lease view` says when"));
    }
    let (app, id) = (app_of(session, target).await?, &target.id);
    client(session, target).delete::<Value>(&format!("/v1/apps/{app}/machines/{id}/lease")).await?;
    if session.json {
        ui::print_json(&json!({ "id": id, "leased": false }));
    } else {
        ui::print_line(&format!("nobody has a lease of {id} any more"));
    }
    Ok(Exit::Ok)
}

async fn app_of(session: &Session, target: &MachineArgs) -> Result<AppName, CliError> {
    match &target.app {
        Some(app) => Ok(app.clone()),
        None => Ok(find(session, target).await?.app),
    }
}

async fn find(session: &Session, target: &MachineArgs) -> Result<Machine, CliError> {
    let MachineArgs { id, app, .. } = target;
    if let Some(app) = app {
        return Ok(session.client.get(&format!("/v1/apps/{app}/machines/{id}")).await?);
    }
    let list: AppList = session.client.get("/v1/apps").await?;
    for app in &list.apps {
        let machines: Vec<Machine> = session.client.get(&format!("/v1/apps/{}/machines", app.name)).await?;
        if let Some(machine) = machines.into_iter().find(|machine| machine.id == *id) {
            return Ok(machine);
        }
    }
    Err(CliError::failed(format!("there is no machine {id}")).hint("`dunlin machine list --app APP` shows an app's machines"))
}

async fn act(session: &Session, target: &MachineArgs, verb: &str, body: &impl serde::Serialize) -> Result<Exit, CliError> {
    let machine = find(session, target).await?;
    let (app, id) = (&machine.app, &target.id);
    client(session, target).post::<Value>(&format!("/v1/apps/{app}/machines/{id}/{verb}"), body).await?;
    let wanted = match verb {
        "stop" => "stopped",
        "suspend" => "suspended",
        _ => "started",
    };
    let wait = format!("/v1/apps/{app}/machines/{id}/wait?state={wanted}&instance_id={}&timeout=60", machine.instance_id);
    session.client.get::<Value>(&wait).await?;
    let machine: Machine = session.client.get(&format!("/v1/apps/{app}/machines/{id}")).await?;
    if session.json {
        ui::print_json(&machine);
    } else {
        ui::print_line(&format!("{id} is {}", machine.state.as_str()));
    }
    Ok(Exit::Ok)
}

/// A whole command in one argument, as Fly's takes it, is split as a shell would; nothing else of a shell is done.
fn words_of(command: Vec<String>) -> Result<Vec<String>, CliError> {
    match command.as_slice() {
        [all] if all.contains(' ') => words::split(all)
            .map_err(|error| CliError::usage(format!("the command cannot be split into words: {error}"))),
        _ => Ok(command),
    }
}

/// The whole of what it says as one value.
async fn exec_for_json(session: &Session, target: &MachineArgs, timeout: u64, command: Vec<String>) -> Result<Exit, CliError> {
    let (app, id) = (app_of(session, target).await?, &target.id);
    let body = ExecBody { command, cmd: None, stdin: None, container: None, timeout: Some(timeout) };
    let answer: ExecAnswer = session.client.post(&format!("/v1/apps/{app}/machines/{id}/exec"), &body).await?;
    ui::print_json(&answer);
    Ok(exec::exit(answer.exit_code))
}

fn print_machine(machine: &Machine) {
    let line = |name: &str, value: &str| ui::print_line(&format!("{name:9} {value}"));
    line("machine", machine.id.as_str());
    line("app", machine.app.as_str());
    line("state", machine.state.as_str());
    let release = if machine.release == 0 { "none; made by hand".to_owned() } else { format!("v{}", machine.release) };
    line("release", &release);
    line("version", &machine.instance_id);
    line("image", &format!("{}@{}", machine.image_ref.repository, machine.image_ref.digest));
    line("address", &machine.private_ip);
    let guest = &machine.guest;
    line("size", &format!("{} cpu, {} MiB", guest.cpus, guest.memory_mb));
    line("restarts", &machine.restarts.to_string());
    if let Some(at) = &machine.next_run_at {
        line("next run", at);
    }
    for check in &machine.checks {
        line("check", &format!("{} {:?}: {}", check.name, check.status, check.output));
    }
    if let Some(exit) = &machine.exit {
        let how = match (exit.exit_code, exit.signal, exit.oom_killed) {
            (_, _, true) => "out of memory".to_owned(),
            (Some(code), _, _) => format!("exit code {code}"),
            (_, Some(signal), _) => format!("signal {signal}"),
            _ => exit.error.clone().unwrap_or_else(|| "unknown".into()),
        };
        line("last exit", &how);
    }
    if let Some(problem) = &machine.problem {
        line("problem", problem);
    }
}
