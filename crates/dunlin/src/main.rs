//! The one binary: everything that a person types, the server, and the hidden personalities that the
//! server starts (the keeper's child, the per-machine supervisor, the builder inside its machine).
//!
//! Thin: arguments and settings here, wiring in [`server`], work in the crates.
#![forbid(unsafe_code)]

mod control;
mod doctor;
mod image;
mod join;
mod keeper;
mod log;
mod program;
mod server;
mod settings;
mod upgrade;

use anyhow::Context;
use clap::{CommandFactory, Parser, Subcommand};
use dunlin_cli::Globals;
use settings::{LogFormat, ServerArgs, Settings};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;

/// From source code to a running, routed app on your own servers.
#[derive(Parser)]
#[command(name = "dunlin", version, disable_help_subcommand = true)]
struct Dunlin {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    #[command(flatten)]
    Client(dunlin_cli::Command),
    /// Run the server on this computer
    Server(Box<ServerArgs>),
    /// Let hosts join the cluster, list, cordon, drain and remove them
    #[command(subcommand, visible_alias = "hosts")]
    Host(join::HostCommand),
    /// Back up control, and restore it on this or another computer
    #[command(subcommand)]
    Control(control::ControlCommand),
    /// Make base images from Debian packages
    #[command(subcommand)]
    Image(image::ImageCommand),
    /// Check what this computer offers and what is missing
    Doctor,
    /// Exchange the binary of the server on this computer; one that does not work is taken back
    Upgrade(upgrade::UpgradeArgs),
    /// Print the version
    Version,
    /// Print a completion script for a shell
    Completions { shell: clap_complete::Shell },
    /// End the machines of a stopped server and remove all that it left in the kernel; files stay
    Cleanup,
}

fn main() -> ExitCode {
    let mut args = std::env::args();
    let name = args.next().unwrap_or_default();
    match args.next().as_deref() {
        Some(personality) if dunlin_runtime::is_personality(personality) => dunlin_runtime::supervisor_main(),
        Some(dunlin_runtime::enclave::PERSONALITY) => dunlin_runtime::enclave::enclave_main(args.next()),
        Some(dunlin_builder::PERSONALITY) => dunlin_builder::inside_main(),
        Some(keeper::SERVE) => {
            // One that was started by a descriptor has its number for a name.
            let _ = rustix::thread::set_name(c"dunlin"); // only for people who look at a list
            let rest: Vec<String> = args.collect();
            let parsed = Dunlin::parse_from([name].into_iter().chain(rest));
            match parsed.command {
                Command::Server(args) => finish(serve(&args, parsed.globals.data_dir.as_deref())),
                _ => ExitCode::from(2),
            }
        }
        _ => match Dunlin::try_parse() {
            Ok(parsed) => dispatch(parsed),
            Err(error) => misused(&error),
        },
    }
}

/// What was typed is no command, or asks for help.
fn misused(error: &clap::Error) -> ExitCode {
    let is_json = std::env::args().take_while(|arg| arg != "--").any(|arg| arg == "--json");
    if !error.use_stderr() || !is_json {
        error.exit();
    }
    let text = error.to_string();
    let said: Vec<&str> = text.lines().map(|line| line.trim().trim_start_matches("error: ")).filter(|line| !line.is_empty()).collect();
    let (message, causes) = said.split_first().map_or(("", &[][..]), |(first, rest)| (*first, rest));
    eprintln!("{}", serde_json::json!({ "error": message, "causes": causes, "hint": "`dunlin --help` shows the commands", "request_id": null, "exit_code": 2 }));
    ExitCode::from(2)
}

fn dispatch(parsed: Dunlin) -> ExitCode {
    let json = parsed.globals.json;
    match parsed.command {
        Command::Client(command) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            match runtime {
                Ok(runtime) => runtime.block_on(dunlin_cli::run(command, parsed.globals)).into(),
                Err(e) => finish(Err(e.into())),
            }
        }
        Command::Server(args) => finish(keep(&args, parsed.globals.data_dir.as_deref(), json)),
        Command::Host(command) => join::run(command, parsed.globals).unwrap_or_else(|error| finish(Err(error))),
        Command::Control(command) => finish(control::run(command, &parsed.globals.data_dir(), json)),
        Command::Image(command) => finish(image::run(command, &parsed.globals.data_dir(), json)),
        Command::Doctor => finish(doctor::run(&parsed.globals.data_dir(), json)),
        Command::Upgrade(args) => finish(upgrade::run(&args, &parsed.globals.data_dir(), json)),
        Command::Version => {
            println!("{}", if json { version_json() } else { format!("dunlin {VERSION} ({COMMIT})") });
            ExitCode::SUCCESS
        }
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Dunlin::command(), "dunlin", &mut std::io::stdout());
            ExitCode::SUCCESS
        }
        Command::Cleanup => finish_as(cleanup(parsed.globals.data_dir.as_deref(), json), json),
    }
}

pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The commit that this was built from, where the build knew it.
pub const COMMIT: &str = match option_env!("DUNLIN_COMMIT") {
    Some(commit) => commit,
    None => "unknown commit",
};

fn version_json() -> String {
    serde_json::json!({ "version": VERSION, "commit": COMMIT }).to_string()
}

/// The parent: validates everything before a port is bound, then keeps a server running.
fn keep(args: &ServerArgs, data_dir: Option<&Path>, json: bool) -> anyhow::Result<()> {
    let settings = Settings::resolve(args, data_dir)?;
    if args.check_config {
        let summary = settings.summary();
        if json {
            println!("{}", toml_edit::de::from_str::<serde_json::Value>(&summary)?);
        } else {
            println!("{summary}");
        }
        return Ok(());
    }
    start_log(settings.log_format);
    if rustix::process::geteuid().is_root() {
        doctor::require_for_server(&settings)?;
    } else {
        doctor::require_for_enclave()?; // the rest is looked for inside of it
    }
    // The server resolves the same arguments again, so that a restart takes up a changed settings file.
    let args: Vec<String> = std::env::args().skip(1).collect();
    keeper::keep(&settings, &args)
}

fn serve(args: &ServerArgs, data_dir: Option<&Path>) -> anyhow::Result<()> {
    let settings = Settings::resolve(args, data_dir)?;
    start_log(settings.log_format);
    let sockets = keeper::receive_sockets()?;
    let mut outside = vec![];
    if let Some(namespaces) = &sockets.enclave {
        outside = dunlin_runtime::net::addresses().context("the addresses of this computer are not known")?;
        // Before there is a second thread: each would have to join by itself.
        dunlin_runtime::enclave::enter(namespaces.each_ref().map(AsFd::as_fd))
            .context("the server's own namespaces cannot be joined")?;
        doctor::require_for_server(&settings).map_err(|error| server::DoNotRestart(format!("{error:#}")))?;
    }
    server::run(settings, sockets, outside)
}

fn cleanup(data_dir: Option<&Path>, json: bool) -> anyhow::Result<()> {
    // It ends machines: nobody should do that by a forgotten flag.
    let data_dir = data_dir.context("whose machines should end? name the server's data directory with --data-dir")?;
    server::cleanup(data_dir)?;
    if json {
        println!("{}", serde_json::json!({ "cleaned_up": data_dir }));
    }
    Ok(())
}

fn start_log(format: LogFormat) {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_env("DUNLIN_LOG").unwrap_or_else(|_| EnvFilter::new("info,access=info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(log::Tee);
    match format {
        LogFormat::Text => builder.with_ansi(false).init(),
        LogFormat::Json => builder.json().init(),
    }
}

/// [`finish`], for a program that reads.
fn finish_as(result: anyhow::Result<()>, json: bool) -> ExitCode {
    match result {
        Err(error) if json => {
            let causes: Vec<String> = error.chain().skip(1).map(ToString::to_string).collect();
            eprintln!("{}", serde_json::json!({ "error": error.to_string(), "causes": causes, "hint": null, "request_id": null, "exit_code": 1 }));
            ExitCode::FAILURE
        }
        result => finish(result),
    }
}

fn finish(result: anyhow::Result<()>) -> ExitCode {
    let Err(error) = result else {
        return ExitCode::SUCCESS;
    };
    eprintln!("error: {error}");
    for cause in error.chain().skip(1) {
        eprintln!("  caused by: {cause}");
    }
    match error.downcast_ref::<server::DoNotRestart>() {
        Some(_) => ExitCode::from(keeper::EXIT_DO_NOT_RESTART as u8),
        None => ExitCode::FAILURE,
    }
}
