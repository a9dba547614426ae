//! `ssh`: a shell in a running machine, and copies of files.

use crate::args::{RunningArgs, SftpCommand, SshCommand};
use crate::config_file::app_name;
use crate::exec::{self, Program};
use crate::{CliError, Exit, Session, sftp};
use dunlin_api::wire::Machine;
use dunlin_model::config::words;
use dunlin_model::machine::CONSOLE_GROUP;
use dunlin_model::{AppName, MachineId, MachineState};

/// The better shell of those that the image has.
pub const SHELL: [&str; 3] = ["sh", "-c", "if command -v bash >/dev/null 2>&1; then exec bash -l; else exec sh -l; fi"];

pub async fn ssh(session: &Session, command: SshCommand) -> Result<Exit, CliError> {
    match command {
        SshCommand::Console { target, command, run } => {
            let (app, id) = running(session, &target).await?;
            let command = words_or_shell(command.as_deref())?;
            let program = Program { command, timeout: None, args: run };
            exec::attach(session, &app, &id, program).await
        }
        SshCommand::Sftp(SftpCommand::Get { remote, local, target, force, recursive: _ }) => {
            let (app, id) = running(session, &target).await?;
            sftp::get(session, (&app, &id), &remote, local.as_deref(), force).await
        }
        SshCommand::Sftp(SftpCommand::Put { local, remote, target, recursive: _ }) => {
            let (app, id) = running(session, &target).await?;
            sftp::put(session, (&app, &id), &local, remote.as_deref()).await
        }
    }
}

pub fn words_or_shell(command: Option<&str>) -> Result<Vec<String>, CliError> {
    match command {
        None => Ok(SHELL.map(str::to_owned).to_vec()),
        Some(text) => words::split(text).map_err(|error| {
            CliError::usage(format!("the command cannot be split into words: {error}"))
                .hint("for variables, pipes and redirections: -C 'sh -c \"...\"'")
        }),
    }
}

/// The machine that is named, or the first that runs.
async fn running(session: &Session, args: &RunningArgs) -> Result<(AppName, MachineId), CliError> {
    let app = app_name(&args.target)?;
    if let Some(id) = &args.machine {
        return Ok((app, id.clone()));
    }
    let machines: Vec<Machine> = session.client.get(&format!("/v1/apps/{app}/machines")).await?;
    // A console is somebody's own.
    let is_the_apps = |machine: &&Machine| machine.process_group != CONSOLE_GROUP;
    let mut running = machines.iter().filter(is_the_apps).filter(|machine| machine.state == MachineState::Started);
    let Some(first) = running.next() else {
        return Err(CliError::failed(format!("no machine of {app} runs")).hint(match machines.first() {
            Some(machine) => format!("`dunlin machine start {}` starts one", machine.id),
            None => "`dunlin deploy` makes some".to_owned(),
        }));
    };
    if running.next().is_some() {
        eprintln!("in machine {} ({}); --machine names another", first.id, first.process_group);
    }
    Ok((app, first.id.clone()))
}
