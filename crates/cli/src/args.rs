//! The command line.

use clap::{Args, Subcommand};
use dunlin_model::{AppName, HostId, MachineId, Region, RegionExpr, SnapshotId, VolumeId};
use std::path::PathBuf;

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub struct Globals {
    /// The server: https://api.example.org, or the path of its API socket
    #[arg(long, env = "DUNLIN_API", value_name = "URL", global = true)]
    pub api: Option<String>,
    /// Token for a server elsewhere (`dunlin tokens create` makes one)
    #[arg(long, env = "DUNLIN_TOKEN", value_name = "TOKEN", global = true, hide_env_values = true)]
    pub token: Option<String>,
    /// PEM file of a certificate authority to trust besides the system's
    #[arg(long, env = "DUNLIN_CA", value_name = "FILE", global = true)]
    pub ca: Option<PathBuf>,
    /// Where the state of the server on this computer is, used without --api [default: /var/lib/dunlin, or without root
    /// dunlin in $XDG_DATA_HOME or ~/.local/share]
    #[arg(long, env = "DUNLIN_DATA_DIR", value_name = "DIR", global = true)]
    pub data_dir: Option<PathBuf>,
    /// Print JSON
    #[arg(long, global = true)]
    pub json: bool,
}

/// Of a server that was told of no other.
pub const DEFAULT_DATA_DIR: &str = "/var/lib/dunlin";

impl Globals {
    pub fn data_dir(&self) -> PathBuf {
        self.data_dir.clone().unwrap_or_else(default_data_dir)
    }
}

/// That of the computer's server for root, whose alone it is. Everybody else may have a server of their own.
pub fn default_data_dir() -> PathBuf {
    #[cfg(unix)]
    if !rustix::process::geteuid().is_root() {
        let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let shared = absolute("XDG_DATA_HOME").or_else(|| Some(absolute("HOME")?.join(".local/share")));
        if let Some(shared) = shared {
            return shared.join("dunlin");
        }
    }
    DEFAULT_DATA_DIR.into()
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Look at an app's source, show what would be done, write its files and deploy it
    Launch(LaunchArgs),
    /// Build the app in this directory and release it
    Deploy(DeployArgs),
    /// Show what a deploy would do, and why, without doing it
    Plan(PlanArgs),
    /// List, create and destroy apps
    #[command(subcommand)]
    Apps(AppsCommand),
    /// Show an app's release, URL and machines
    Status(AppArgs),
    /// Show what an app's machines print
    Logs(LogsArgs),
    /// List, inspect and control machines
    #[command(subcommand, visible_alias = "machines")]
    Machine(MachineCommand),
    /// Create, list, extend, copy and destroy volumes: files that outlive machines
    #[command(subcommand, visible_alias = "volumes")]
    Volume(VolumeCommand),
    /// Open a shell in a machine of its own with the app's image, or run a command there
    ///
    /// The machine has the app's environment and secrets and none of its volumes. It is destroyed at the end.
    Console(Box<ConsoleArgs>),
    /// Open a shell in a running machine, or copy files
    #[command(subcommand)]
    Ssh(SshCommand),
    /// Show or change how many machines run
    #[command(subcommand)]
    Scale(ScaleCommand),
    /// Set, list and unset secrets
    #[command(subcommand)]
    Secrets(SecretsCommand),
    /// List an app's releases
    Releases(AppArgs),
    /// Return to an earlier release
    Rollback(RollbackArgs),
    /// Open the app's URL in a browser
    Open(AppArgs),
    /// Show or check the app's configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Create and revoke tokens
    #[command(subcommand)]
    Tokens(TokensCommand),
    /// Show how the cluster's hosts know of one another
    #[command(subcommand)]
    Cluster(ClusterCommand),
}

#[derive(Debug, Clone, Default, Args)]
pub struct AppArgs {
    /// The app; without it, the one that the configuration in this directory names
    #[arg(short, long)]
    pub app: Option<AppName>,
    /// Configuration file [default: dunlin.toml or fly.toml in this directory]
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct LaunchArgs {
    /// Directory with the app's source
    #[arg(default_value = ".")]
    pub path: PathBuf,
    /// Name of the app [default: the directory's]
    #[arg(long)]
    pub name: Option<AppName>,
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
    /// Print the proposal and change nothing
    #[arg(long)]
    pub manifest: bool,
    /// Write the files but do not deploy
    #[arg(long)]
    pub no_deploy: bool,
    /// Run this image instead of building one
    #[arg(long)]
    pub image: Option<String>,
    /// The port that the image's program listens on [default: 8080]
    #[arg(long, requires = "image")]
    pub port: Option<u16>,
    #[command(flatten)]
    pub build: BuildArgs,
}

#[derive(Debug, Args)]
pub struct DeployArgs {
    /// Directory with the app's source
    #[arg(default_value = ".")]
    pub path: PathBuf,
    #[command(flatten)]
    pub target: AppArgs,
    /// Release this image instead of building
    #[arg(long)]
    pub image: Option<String>,
    #[command(flatten)]
    pub build: BuildArgs,
    /// Return once the release is written, without following it
    #[arg(long)]
    pub detach: bool,
}

#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Directory with the app's configuration
    #[arg(default_value = ".")]
    pub path: PathBuf,
    #[command(flatten)]
    pub target: AppArgs,
    /// Plan for this image instead of one that is still to be built
    #[arg(long)]
    pub image: Option<String>,
    /// Plan for so many machines: `3`, or `worker=2`
    #[arg(long = "count", value_name = "[GROUP=]COUNT")]
    pub counts: Vec<String>,
    /// Go on although this key of the configuration is not honoured yet
    #[arg(long, value_name = "KEY")]
    pub ignore: Vec<String>,
}

#[derive(Debug, Default, Args)]
pub struct BuildArgs {
    /// Set a variable for the build only (NAME=VALUE)
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    pub build_arg: Vec<(String, String)>,
    /// Give the build a secret for RUN --mount=type=secret; it never reaches the image
    ///
    /// NAME=VALUE, NAME=@FILE, or NAME=- to read the value from standard input.
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    pub build_secret: Vec<(String, String)>,
    /// Stop at this stage of the Dockerfile
    #[arg(long)]
    pub build_target: Option<String>,
    /// Build every layer again
    #[arg(long)]
    pub no_cache: bool,
    /// Go on although this key of the configuration is not honoured yet
    #[arg(long, value_name = "KEY")]
    pub ignore: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub enum AppsCommand {
    List,
    Create { name: AppName },
    /// Destroy an app and all its machines
    Destroy {
        name: AppName,
        #[arg(short, long)]
        yes: bool,
        /// Also when somebody has leased one of its machines, or a host cannot say whether
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Args)]
pub struct LogsArgs {
    #[command(flatten)]
    pub target: AppArgs,
    /// Go on as lines come
    #[arg(short, long)]
    pub follow: bool,
    /// Only this machine's
    #[arg(long)]
    pub machine: Option<MachineId>,
    /// Only lines of this last time, such as 10m or 2h
    #[arg(long, value_name = "TIME")]
    pub since: Option<String>,
    /// At most this many of the newest lines [default: 100, or all since the time that --since names]
    #[arg(short = 'n', long)]
    pub tail: Option<usize>,
}

/// A machine: ids are unique on the platform, so that the app needs no naming.
#[derive(Debug, Args)]
pub struct MachineArgs {
    pub id: MachineId,
    /// The machine's app [default: found by the machine's id]
    #[arg(short, long)]
    pub app: Option<AppName>,
    /// Nonce of the lease of it that you hold
    #[arg(long, value_name = "NONCE")]
    pub lease: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum MachineCommand {
    /// List an app's machines
    List(AppArgs),
    /// Show one machine: its state, checks and last exit
    Status(MachineArgs),
    /// Start a machine and wait until it runs
    Start(MachineArgs),
    /// Stop a machine: a signal, then the kill; a request starts it again where autostart is on
    Stop {
        #[command(flatten)]
        target: MachineArgs,
        /// First signal, such as SIGTERM
        #[arg(long)]
        signal: Option<String>,
        /// Seconds until it is killed
        #[arg(long)]
        timeout: Option<u64>,
    },
    /// Freeze a machine and wait until it stands still; its memory is kept, a start or a request thaws it
    Suspend(MachineArgs),
    /// Stop a machine and start it again
    Restart(MachineArgs),
    /// Run a command in a running machine; its exit code becomes this one's
    ///
    /// What is piped in is the command's input. At a terminal the command gets one as well.
    Exec {
        #[command(flatten)]
        target: MachineArgs,
        /// Seconds until it is ended [default: a day; 60 with --json]
        #[arg(long)]
        timeout: Option<u64>,
        #[command(flatten)]
        run: RunArgs,
        #[arg(trailing_var_arg = true, required = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Show or end the lease of a machine, which keeps others from changing it
    #[command(subcommand, visible_alias = "leases")]
    Lease(LeaseCommand),
    /// Destroy a machine and what it wrote; `scale count` says how many there are to be
    Destroy {
        #[command(flatten)]
        target: MachineArgs,
        /// Also when it runs
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum LeaseCommand {
    /// Show who has it, and until when
    View(MachineArgs),
    /// End the lease whose nonce --lease gives
    Clear(MachineArgs),
}

// Ids are unique on the platform, so that the app needs no naming.
#[derive(Debug, Args)]
pub struct VolumeArgs {
    /// The volume's id
    pub id: VolumeId,
    /// The volume's app [default: found by the volume's id]
    #[arg(short, long)]
    pub app: Option<AppName>,
}

#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Make a volume; a deploy takes it for a machine whose [mounts] name it
    Create {
        name: String,
        #[command(flatten)]
        target: AppArgs,
        /// GB, which it takes from the disk at once [default: 1, or that of the snapshot]
        #[arg(short, long)]
        size: Option<u32>,
        #[arg(short, long)]
        region: Option<Region>,
        /// Begin with what a snapshot has
        #[arg(long)]
        snapshot_id: Option<SnapshotId>,
        /// Days that its snapshots are kept [default: 5]
        #[arg(long)]
        snapshot_retention: Option<u32>,
        /// A snapshot a day [default: true]
        #[arg(long, value_name = "BOOL")]
        scheduled_snapshots: Option<bool>,
        /// Encrypt it on its host's disk [default: where the host can, and a copy as what it is of]
        #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
        encrypted: Option<bool>,
        /// The same as --encrypted=false
        #[arg(long, conflicts_with = "encrypted")]
        no_encryption: bool,
    },
    /// List an app's volumes, how full they are and which machines have them
    List(AppArgs),
    /// Show one volume
    Show(VolumeArgs),
    /// Make a volume larger, in GB; its machine goes on
    Extend {
        #[command(flatten)]
        target: VolumeArgs,
        #[arg(short, long)]
        size: u32,
    },
    /// Change whether snapshots are made by themselves, and how long those are kept that are made from now on
    #[command(group(clap::ArgGroup::new("change").required(true).multiple(true)))]
    Update {
        #[command(flatten)]
        target: VolumeArgs,
        /// Days
        #[arg(long, group = "change")]
        snapshot_retention: Option<u32>,
        /// A snapshot a day
        #[arg(long, value_name = "BOOL", group = "change")]
        scheduled_snapshots: Option<bool>,
    },
    /// Make a volume that begins as a copy of another one as it is now
    Fork {
        #[command(flatten)]
        target: VolumeArgs,
        /// [default: that of the volume]
        #[arg(short, long)]
        name: Option<String>,
        /// GB [default: that of the volume]
        #[arg(short, long)]
        size: Option<u32>,
    },
    /// Destroy a volume that no machine has, with its snapshots
    Destroy {
        #[command(flatten)]
        target: VolumeArgs,
        #[arg(short, long)]
        yes: bool,
    },
    /// Make and list snapshots
    #[command(subcommand)]
    Snapshots(SnapshotsCommand),
}

#[derive(Debug, Subcommand)]
pub enum SnapshotsCommand {
    /// List what was kept of a volume
    List(VolumeArgs),
    /// Copy what the volume has now; its machine goes on, and waits with writes for a moment
    Create(VolumeArgs),
}

/// How a command runs beside a machine's program.
#[derive(Debug, Clone, Default, Args)]
pub struct RunArgs {
    /// Run as this user of the image [default: the machine's own]
    #[arg(short, long, default_value = "", hide_default_value = true)]
    pub user: String,
    /// In this container of a machine with several [default: `app`, or else the first]
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub container: String,
    /// Give it a terminal, also when nobody sits at one here
    #[arg(short, long, visible_alias = "pty", conflicts_with = "no_tty")]
    pub tty: bool,
    /// Give it no terminal
    #[arg(long)]
    pub no_tty: bool,
    /// Kind of this terminal
    #[arg(long, env = "TERM", default_value = "xterm", hide = true)]
    pub term: String,
}

/// One of an app's running machines.
#[derive(Debug, Args)]
pub struct RunningArgs {
    #[command(flatten)]
    pub target: AppArgs,
    /// The machine [default: the first that runs]
    #[arg(long)]
    pub machine: Option<MachineId>,
}

#[derive(Debug, Default, Args)]
pub struct ConsoleArgs {
    #[command(flatten)]
    pub target: AppArgs,
    /// Run this instead of a shell; no shell reads it, its words are split
    #[arg(short = 'C', long, value_name = "COMMAND")]
    pub command: Option<String>,
    /// Use this machine, which runs already, instead of one of its own
    #[arg(long, value_name = "ID", conflicts_with_all = ["image", "region", "env", "vm_size", "vm_cpus", "vm_memory"])]
    pub machine: Option<MachineId>,
    /// The machine's image [default: that of the current release]
    #[arg(short, long)]
    pub image: Option<String>,
    /// Where, the preferred region first: fra,ams,eu
    #[arg(short, long)]
    pub region: Option<RegionExpr>,
    /// Set a variable of the machine
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = pair)]
    pub env: Vec<(String, String)>,
    /// Size by name, such as shared-cpu-2x [default: that of [[vm]] for all, or shared-cpu-1x]
    #[arg(long, value_name = "NAME")]
    pub vm_size: Option<String>,
    #[arg(long, value_name = "NUMBER")]
    pub vm_cpus: Option<u32>,
    /// MB, or with a unit such as 1gb
    #[arg(long, value_name = "MEMORY")]
    pub vm_memory: Option<String>,
    #[command(flatten)]
    pub run: RunArgs,
}

#[derive(Debug, Subcommand)]
pub enum SshCommand {
    /// Open a shell in a running machine, or run a command there
    Console {
        #[command(flatten)]
        target: RunningArgs,
        /// Run this instead of a shell; no shell reads it, its words are split
        #[arg(short = 'C', long, value_name = "COMMAND")]
        command: Option<String>,
        #[command(flatten)]
        run: RunArgs,
    },
    /// Copy files out of a running machine and into it; its image needs no program for that
    #[command(subcommand)]
    Sftp(SftpCommand),
}

#[derive(Debug, Subcommand)]
pub enum SftpCommand {
    /// Copy a file or directory out of the machine
    Get {
        remote: String,
        /// [default: the same name, in this directory]
        local: Option<PathBuf>,
        #[command(flatten)]
        target: RunningArgs,
        /// Replace what is there
        #[arg(long)]
        force: bool,
        /// Needless: directories are copied with all that is in them
        #[arg(short = 'R', long, hide = true)]
        recursive: bool,
    },
    /// Copy a file or directory into the machine; a file is replaced in one step
    Put {
        local: PathBuf,
        /// A directory that is there, or the new name [default: the same name, in /]
        remote: Option<String>,
        #[command(flatten)]
        target: RunningArgs,
        /// Needless: directories are copied with all that is in them
        #[arg(short = 'R', long, hide = true)]
        recursive: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum ScaleCommand {
    /// Set the number of machines: `3`, or by process group `app=3 worker=1`
    Count {
        #[arg(required = true)]
        counts: Vec<String>,
        #[command(flatten)]
        target: AppArgs,
        /// Return once the release is written, without following it
        #[arg(long)]
        detach: bool,
    },
    /// Show how many machines of each process group are to run
    Show(AppArgs),
    /// As people of Fly type it
    #[command(hide = true, visible_aliases = ["vm"])]
    Memory {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        _rest: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub enum SecretsCommand {
    /// Set secrets and release them: NAME=VALUE, or NAME=- to read the value from standard input
    Set {
        #[arg(required = true, value_parser = pair)]
        pairs: Vec<(String, String)>,
        #[command(flatten)]
        target: AppArgs,
        #[arg(long)]
        detach: bool,
        /// Store them; the next release brings them to the machines
        #[arg(long)]
        stage: bool,
    },
    /// Set secrets from standard input, one NAME=VALUE a line, and release them
    Import {
        #[command(flatten)]
        target: AppArgs,
        #[arg(long)]
        detach: bool,
        /// Store them; the next release brings them to the machines
        #[arg(long)]
        stage: bool,
    },
    /// Names and digests; values are never shown
    List(AppArgs),
    /// Take secrets away and release that
    Unset {
        #[arg(required = true)]
        names: Vec<String>,
        #[command(flatten)]
        target: AppArgs,
        #[arg(long)]
        detach: bool,
        /// Take them out of the store; the next release takes them from the machines
        #[arg(long)]
        stage: bool,
    },
}

#[derive(Debug, Args)]
pub struct RollbackArgs {
    /// The release to return to [default: the last good one before the current]
    pub version: Option<u32>,
    #[command(flatten)]
    pub target: AppArgs,
    #[arg(long)]
    pub detach: bool,
}

#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print the configuration as it is understood
    Show(AppArgs),
    /// Check it without deploying
    Validate(AppArgs),
}

#[derive(Debug, Subcommand)]
pub enum TokensCommand {
    /// Print a new token
    Create {
        /// What it may do: read, deploy, admin, exec, pull, push; several, or separated by commas
        #[arg(long = "verb", value_delimiter = ',', default_value = "read,deploy,pull,push")]
        verbs: Vec<String>,
        /// Only this app; several, or separated by commas [default: all]
        #[arg(short, long = "app", value_delimiter = ',')]
        apps: Vec<AppName>,
        /// Days until it expires
        #[arg(long, default_value_t = 30)]
        days: u64,
    },
    /// Make a token useless
    Revoke {
        /// As `tokens create` printed it
        id: String,
    },
}

/// Of `host`; those that work on the host itself are the binary's.
#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// Print a token that lets one host join the cluster
    #[command(after_help = "Example:\n  dunlin host token --ttl 15m\n  # on the new host, as root, with what was printed:\n  \
                            DUNLIN_JOIN_TOKEN=dnj1... dunlin host join 203.0.113.7:7373")]
    Token {
        /// How long it may be used, such as 15m; at most 7d
        #[arg(long, value_name = "TIME", default_value = "1h")]
        ttl: String,
    },
    /// List the cluster's hosts
    List,
    /// Show one host, its machines, and how far a drain is
    Status { id: HostId },
    /// Keep new machines away from a host; those that it has stay
    Cordon { id: HostId },
    /// Let a host have new machines again; ends a drain, too
    Uncordon { id: HostId },
    /// Move a host's machines to others, one at a time, each with its successor healthy first
    #[command(after_help = "Machines with volumes stay, and so do those that must not run twice: `dunlin host status ID` says \
                            which, and what can be done.\n\nExample:\n  dunlin host drain h2 && dunlin host status h2")]
    Drain { id: HostId },
    /// Collect what a person needs who looks for a fault on a host, without secrets, in one tar.gz
    #[command(after_help = "A host that cannot be reached is told of as far as control knows it; missing.txt in the bundle says what is not in \
                            it.\n\nExample:\n  dunlin host debug h2 -o h2.tar.gz")]
    Debug {
        id: HostId,
        /// Where to write it; `-` is standard output [default: dunlin-debug-ID.tar.gz here]
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Remove a host from the cluster for good; its id is never used again
    #[command(after_help = "Example, of a host that is lost:\n  dunlin host remove h2 --force")]
    Remove {
        id: HostId,
        /// Also when machines or volumes are on it: machines are destroyed, volumes given up
        #[arg(long)]
        force: bool,
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
    },
}

#[derive(Debug, Clone, Subcommand)]
pub enum ClusterCommand {
    /// Show the members that control's host knows of, and how fresh what each says is
    Status,
    /// Check that what control's host holds is what its writers signed
    Verify,
    /// Exchange the binary on all hosts, one after the other; it stops by itself where a host does worse with it
    ///
    /// The canary takes it first and is watched, then the others; control's host is the last. A host that does worse goes back to
    /// the binary from before, and nobody else begins. Machines and their connections live on.
    #[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true, after_help = "As root where control runs. It goes on without this command, and with a control that was \
        started again.\n\nExamples:\n  dunlin cluster upgrade --binary ./dunlin\n  dunlin cluster upgrade --binary ./dunlin --canary h2 --bake 10m --parallel 4\n  \
        dunlin cluster upgrade status")]
    Upgrade(UpgradeArgs),
}

#[derive(Debug, Clone, Args)]
pub struct UpgradeArgs {
    #[command(subcommand)]
    pub command: Option<UpgradeCommand>,
    /// The new binary
    #[arg(long, value_name = "FILE", required = true)]
    pub binary: Option<PathBuf>,
    /// The host that takes it first [default: one with few machines]
    #[arg(long, value_name = "HOST")]
    pub canary: Option<HostId>,
    /// How many hosts take it at once, once the canary has kept it
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub parallel: u32,
    /// How long each host is watched before it keeps it
    #[arg(long, value_name = "TIME", default_value = "60s")]
    pub bake: String,
    /// Begin it and do not wait for its end
    #[arg(long)]
    pub detach: bool,
}

#[derive(Debug, Clone, Copy, Subcommand)]
pub enum UpgradeCommand {
    /// Show how far the upgrade is, or how the last one ended
    Status,
    /// Let an upgrade that has stopped go on, with another turn for the hosts that failed
    Resume,
    /// End an upgrade: hosts that are not through go back, those that kept the new binary stay with it
    Abort,
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("expected NAME=VALUE".into()),
    }
}
