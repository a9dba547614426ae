//! What a person types at any computer: the commands that talk to a server through its API.
//!
//! Owns arguments, progress, tables and error texts. Links only core and `api`, so it builds where no
//! server runs. Standard output carries data only, everything else goes to standard error; with
//! `--json` standard output is JSON. Tested here for what it decides, and end to end for what it does.
#![forbid(unsafe_code)]

mod apps;
mod args;
mod config_file;
mod console;
mod context;
mod deploy;
mod exec;
mod exit;
mod hosts;
mod launch;
mod local_files;
mod logs;
mod machines;
mod plan;
mod printed;
mod secrets;
mod sftp;
mod ssh;
mod terminal;
mod ui;
mod upgrade;
mod volumes;

pub use args::{Command, DEFAULT_DATA_DIR, Globals, HostCommand, default_data_dir};
pub use exit::{CliError, Exit};

use dunlin_api::client::{Client, ClientConfig, Target};

/// Runs one command; prints its errors. The exit code says what became of it (see [`Exit`]).
pub async fn run(command: Command, globals: Globals) -> Exit {
    let json = globals.json;
    ended(dispatch(command, globals).await, json)
}

/// The same for one of the commands for hosts: the binary has more of them, which work on the host itself.
pub async fn run_host(command: HostCommand, globals: Globals) -> Exit {
    let json = globals.json;
    let result = match Session::new(globals) {
        Ok(session) => hosts::host(&session, command).await,
        Err(error) => Err(error),
    };
    ended(result, json)
}

/// Prints an error as that of any command.
pub fn ended(result: Result<Exit, CliError>, json: bool) -> Exit {
    match result {
        Ok(exit) => exit,
        Err(error) => {
            ui::print_error(&error, json);
            error.exit
        }
    }
}

async fn dispatch(command: Command, globals: Globals) -> Result<Exit, CliError> {
    let session = Session::new(globals)?;
    match command {
        Command::Launch(args) => launch::launch(&session, args).await,
        Command::Deploy(args) => deploy::deploy(&session, args).await,
        Command::Plan(args) => plan::plan(&session, args).await,
        Command::Apps(command) => apps::apps(&session, command).await,
        Command::Status(args) => apps::status(&session, args).await,
        Command::Logs(args) => logs::logs(&session, args).await,
        Command::Machine(command) => machines::machine(&session, command).await,
        Command::Volume(command) => volumes::volume(&session, command).await,
        Command::Console(args) => console::console(&session, *args).await,
        Command::Ssh(command) => ssh::ssh(&session, command).await,
        Command::Scale(command) => apps::scale(&session, command).await,
        Command::Secrets(command) => secrets::secrets(&session, command).await,
        Command::Releases(args) => deploy::releases(&session, args).await,
        Command::Rollback(args) => deploy::rollback(&session, args).await,
        Command::Open(args) => apps::open(&session, args).await,
        Command::Config(command) => config_file::config(&session, command).await,
        Command::Cluster(command) => hosts::cluster(&session, command).await,
        Command::Tokens(command) => secrets::tokens(&session, command).await,
    }
}

/// One command's connection and manner of speaking.
struct Session {
    client: Client,
    json: bool,
}

impl Session {
    fn new(globals: Globals) -> Result<Self, CliError> {
        let target = match &globals.api {
            Some(text) => Target::parse(text).map_err(|e| {
                CliError::usage(format!("--api: {e}")).hint("for example --api https://api.example.org")
            })?,
            None => Target::Unix(globals.data_dir().join("run/api.sock")),
        };
        let extra_roots_pem = match &globals.ca {
            None => None,
            Some(path) => Some(std::fs::read(path).map_err(|e| {
                CliError::usage(format!("the CA file {} cannot be read: {e}", path.display()))
            })?),
        };
        let client = Client::new(ClientConfig { target, token: globals.token, extra_roots_pem })?;
        Ok(Self { client, json: globals.json })
    }
}
