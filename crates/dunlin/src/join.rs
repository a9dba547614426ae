//! `dunlin host join` and `dunlin host leave`: what makes this computer a host of a cluster, and what ends that.

use crate::server::{fleet, keys};
use crate::settings::{ServerArgs, Settings};
use crate::{doctor, keeper};
use anyhow::{Context, bail};
use dunlin_api::ErrorBody;
use dunlin_cli::{Exit, Globals};
use dunlin_cluster::{Answering, JoinAnswer, JoinRequest, JoinToken, Member, MemberKeys, Said};
use dunlin_model::HostId;
use serde_json::{Value, json};
use std::io::Read as _;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs as _, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Less would be full with the first images.
const MIN_FREE_GB: u64 = 2;
const DEFAULT_PORT: u16 = 7373;
const MAX_HOST_ID_BYTES: usize = 40;
/// A token is shorter.
const MAX_TOKEN_BYTES: u64 = 1024;

#[derive(clap::Subcommand)]
pub enum HostCommand {
    #[command(flatten)]
    Client(dunlin_cli::HostCommand),
    /// Let this computer join a cluster, after a test of what it offers
    #[command(after_help = "Example, with what `dunlin host token` printed:\n  DUNLIN_JOIN_TOKEN=dnj1... dunlin host join 203.0.113.7 \
                            --region fra --zone rack-2\n  dunlin server")]
    Join(Box<JoinArgs>),
    /// Forget the cluster that this computer has joined
    #[command(after_help = "Examples:\n  dunlin host leave --api https://api.example.org --token ...   # control removes it, too\n  \
                            dunlin host leave --yes   # after `dunlin host remove ID` where control runs")]
    Leave(LeaveArgs),
}

#[derive(clap::Args)]
pub struct JoinArgs {
    /// Any server of the cluster, by its cluster address [default port: 7373]
    #[arg(value_name = "ADDR[:PORT]")]
    addr: String,
    /// What `dunlin host token` printed; `-` reads it from standard input
    #[arg(env = "DUNLIN_JOIN_TOKEN", hide_env_values = true)]
    token: String,
    /// This host's id for ever [default: this computer's name]
    #[arg(long, env = "DUNLIN_HOST_ID", value_name = "ID")]
    host_id: Option<String>,
    /// The region that it is in [default: local]
    #[arg(long, env = "DUNLIN_REGION", value_name = "CODE")]
    region: Option<String>,
    /// What fails as one with it inside its region: a building, a rack; apps are spread over zones
    #[arg(long, env = "DUNLIN_ZONE", value_name = "NAME")]
    zone: Option<String>,
    /// What else is to be known of it, for people
    #[arg(long = "label", env = "DUNLIN_LABELS", value_name = "KEY=VALUE", value_delimiter = ',')]
    labels: Option<Vec<String>>,
    /// Where its server will listen for others, UDP and TCP [default: 0.0.0.0:7373]
    #[arg(long, env = "DUNLIN_CLUSTER", value_name = "ADDR:PORT")]
    cluster: Option<String>,
    /// Where others reach that; it is dialed back there while it joins [default: the address with which this computer reaches ADDR]
    #[arg(long, env = "DUNLIN_ADVERTISE", value_name = "ADDR:PORT")]
    advertise: Option<String>,
    /// Block of private addresses for its machines [default: one that control chooses]
    #[arg(long, env = "DUNLIN_MACHINE_PREFIX", value_name = "NET/LEN")]
    machine_prefix: Option<String>,
    /// Memory that machines may reserve, in MiB [default: the computer's memory less 512]
    #[arg(long, env = "DUNLIN_MEMORY_MB", value_name = "MIB")]
    memory_mb: Option<u32>,
}

#[derive(clap::Args)]
pub struct LeaveArgs {
    /// Also when machines or volumes are on it: machines are destroyed, volumes given up
    #[arg(long)]
    force: bool,
    /// Do not ask, and without --api take it as said that control has removed this host
    #[arg(short, long)]
    yes: bool,
}

pub fn run(command: HostCommand, globals: Globals) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match command {
        HostCommand::Client(command) => Ok(runtime.block_on(dunlin_cli::run_host(command, globals)).into()),
        HostCommand::Join(args) => runtime.block_on(join(&args, globals.data_dir.as_deref(), globals.json)).map(|()| ExitCode::SUCCESS),
        HostCommand::Leave(args) => runtime.block_on(leave(&args, globals)),
    }
}

async fn join(args: &JoinArgs, data_dir: Option<&Path>, json: bool) -> anyhow::Result<()> {
    let settings = settings(args, data_dir)?;
    let addr = resolve(&args.addr)?;
    let token = token(&args.token)?;
    let cluster = settings.cluster.context("a host of a cluster listens for others: leave `--cluster off` out")?;
    let say = |text: &str| if !json { eprintln!("{text}") };
    let tested = test_itself(&settings.data_dir, cluster, say)?;
    let advertise = settings.advertise.map_or_else(|| address_towards(addr, cluster), Ok)?;
    let dir = member_dir(&settings.data_dir);
    let host_key = keys::host_key(&settings.data_dir.join("host/host.key"))?;
    let keys = MemberKeys::to_join_with(&dir)?;
    let request = JoinRequest {
        token: token.proof(),
        host: settings.host_id.clone(),
        region: settings.region.clone(),
        machine_prefix: args.machine_prefix.as_ref().map(|_| settings.machine_prefix),
        report: fleet::report(&settings, host_key.sealing_key().to_base64(), &keys, advertise)?,
        answers: true,
    };
    let answering = Answering::start(&keys, (tested.udp, tested.tcp)).context("this computer cannot answer while it joins")?;
    say(&format!("asking the cluster at {addr} to take host {} in; it is dialed back at {advertise}, UDP and TCP", settings.host_id));
    let request = serde_json::to_vec(&request)?;
    let answer = answering.during(dunlin_cluster::join(addr, token.ca_sha256, &request)).await?;
    let answer = read(&answer)?;
    if !answer.is_of(&token) {
        bail!("the server at {addr} answered with another authority than the token names; nothing was kept\n  \
               hint: make a new token where control runs, and see who answers at {addr}");
    }
    let found = Found { free_gb: tested.free_gb, listens: cluster, advertise, reached_by: answer.reached_by.clone() };
    let said = Said {
        listen: Some(cluster),
        // What was found is found again at each start: a computer's address changes, and so does that of a copied disk.
        advertise: settings.advertise,
        zone: settings.zone.clone(),
        labels: settings.labels.clone(),
        controls: false,
    };
    let member = Member { said, ..answer.member(settings.host_id.clone(), keys) };
    member.save(&dir)?;
    joined(&member, &settings.data_dir, &found, json);
    Ok(())
}

/// What the tests have found, here and from the other side.
struct Found {
    free_gb: u64,
    listens: SocketAddr,
    advertise: SocketAddr,
    /// `None`: it was not dialed back this time.
    reached_by: Option<HostId>,
}

impl Found {
    fn checks(&self) -> Vec<Value> {
        let check = |name: &str, found: String| json!({ "name": name, "ok": true, "found": found });
        let mut checks = vec![
            check("disk", format!("{} GB are free", self.free_gb)),
            check("cluster port", format!("{} is free, UDP and TCP", self.listens)),
        ];
        if let Some(by) = &self.reached_by {
            checks.extend(["UDP", "TCP"].map(|over| check(&format!("reached over {over}"), format!("at {}, by host {by}", self.advertise))));
        }
        checks
    }
}

fn joined(member: &Member, data_dir: &Path, found: &Found, json: bool) {
    let advertise = found.advertise;
    let server = match data_dir == dunlin_cli::default_data_dir() {
        true => "dunlin server".to_owned(),
        false => format!("dunlin server --data-dir {}", data_dir.display()),
    };
    if json {
        let said = json!({
            "host": member.host, "region": member.region, "domain": member.domain, "control": member.control,
            "machine_prefix": member.machine_prefix.to_string(), "advertise": advertise, "reached_by": found.reached_by, "checks": found.checks(), "next": server,
        });
        println!("{said}");
        return;
    }
    println!("joined as {} in {}; machines get addresses of {}", member.host, member.region, member.machine_prefix);
    match &found.reached_by {
        Some(by) => eprintln!("host {by} has reached it at {advertise}, UDP and TCP. Next, start its server:\n  {server}"),
        None => eprintln!("others will reach it at {advertise}, UDP and TCP: let them through. Next, start its server:\n  {server}"),
    }
}

/// The settings of the server that is to come: what is wrong with them is said now.
fn settings(args: &JoinArgs, data_dir: Option<&Path>) -> anyhow::Result<Settings> {
    let data = data_dir.map_or_else(dunlin_cli::default_data_dir, Path::to_owned);
    if let Some(member) = Member::load(&member_dir(&data))?.filter(|member| member.host != member.control) {
        bail!(
            "this computer has joined a cluster already, as {}\n  hint: start its server (`dunlin server`), or `dunlin host leave` first",
            member.host
        );
    }
    let named = args.host_id.clone().or_else(host_name);
    let host_id = named.context("this computer's name is no id for a host: choose one with --host-id")?;
    let args = ServerArgs {
        host_id: Some(host_id),
        region: args.region.clone(),
        zone: args.zone.clone(),
        labels: args.labels.clone(),
        cluster: args.cluster.clone(),
        advertise: args.advertise.clone(),
        machine_prefix: args.machine_prefix.clone(),
        memory_mb: args.memory_mb,
        ..ServerArgs::default()
    };
    Settings::resolve(&args, data_dir)
}

/// This computer has what a host needs, and these are the sockets at which it will listen.
struct Tested {
    free_gb: u64,
    udp: UdpSocket,
    tcp: TcpListener,
}

/// What would keep its server from working is found before the cluster counts on it.
fn test_itself(data_dir: &Path, cluster: SocketAddr, say: impl Fn(&str)) -> anyhow::Result<Tested> {
    if let Some(pid) = keeper::holder(data_dir)? {
        bail!("a server (process {pid}) uses {}\n  hint: stop it first; it starts anew as a host of the cluster", data_dir.display());
    }
    let own_cluster = data_dir.join("control/store.db");
    if own_cluster.exists() {
        bail!(
            "this computer is control of a cluster of its own: {} is there\n  \
             hint: join with another --data-dir, or remove {} if nothing in it is needed",
            own_cluster.display(),
            data_dir.display()
        );
    }
    make(data_dir)?;
    if rustix::process::geteuid().is_root() {
        doctor::require(data_dir, |check| {
            say(&format!("{}: {}; without it: {}; to mend it: {}", check.name, check.found, check.cost_if_missing, check.fix));
        })?;
    } else {
        doctor::require_for_enclave()?;
    }
    let free_gb = free_gb(data_dir)?;
    if free_gb < MIN_FREE_GB {
        bail!(
            "{} has {free_gb} GB free, and a host needs {MIN_FREE_GB}\n  hint: free some space, or name a --data-dir on a larger disk",
            data_dir.display()
        );
    }
    let busy = || format!("its server could not listen at {cluster}; choose another address with --cluster");
    let tcp = TcpListener::bind(cluster).with_context(busy)?;
    let udp = UdpSocket::bind(tcp.local_addr()?).with_context(busy)?;
    say(&format!("this computer has what a host needs; {free_gb} GB of disk are free"));
    Ok(Tested { free_gb, udp, tcp })
}

fn make(data_dir: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(data_dir);
    made.with_context(|| format!("{} cannot be made", data_dir.display()))
}

fn free_gb(data_dir: &Path) -> anyhow::Result<u64> {
    let disk = rustix::fs::statvfs(data_dir).with_context(|| format!("the disk of {} is not known", data_dir.display()))?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize) >> 30)
}

/// A name or an address, with or without a port.
fn resolve(text: &str) -> anyhow::Result<SocketAddr> {
    let found = match text.to_socket_addrs() {
        Ok(found) => Ok(found),
        Err(with_port) => (text, DEFAULT_PORT).to_socket_addrs().map_err(|_| with_port),
    };
    let found = found.with_context(|| format!("{text:?} is no address of a server: use for example 203.0.113.7:7373"))?;
    let mut found: Vec<SocketAddr> = found.collect();
    found.sort_by_key(SocketAddr::is_ipv6);
    found.first().copied().with_context(|| format!("{text:?} has no address"))
}

fn token(given: &str) -> anyhow::Result<JoinToken> {
    if given != "-" {
        return Ok(given.parse::<JoinToken>()?);
    }
    let mut text = String::new();
    std::io::stdin().take(MAX_TOKEN_BYTES).read_to_string(&mut text).context("no token could be read from standard input")?;
    Ok(text.parse::<JoinToken>()?)
}

/// The address that the kernel would send from; nothing is sent.
pub fn address_towards(addr: SocketAddr, cluster: SocketAddr) -> anyhow::Result<SocketAddr> {
    if !cluster.ip().is_unspecified() {
        return Ok(cluster);
    }
    let any: SocketAddr = if addr.is_ipv4() { "0.0.0.0:0".parse()? } else { "[::]:0".parse()? };
    let towards = UdpSocket::bind(any).and_then(|socket| socket.connect(addr).and_then(|()| socket.local_addr()));
    let own = towards.with_context(|| format!("no way leads to {addr}; name this computer's address with --advertise if there is one"))?;
    Ok(SocketAddr::new(own.ip(), cluster.port()))
}

/// This computer's name, as far as it can be an id.
fn host_name() -> Option<String> {
    as_host_id(std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?.trim())
}

fn as_host_id(name: &str) -> Option<String> {
    let first = name.split('.').next()?.to_ascii_lowercase();
    let valid = |c: char| if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '-' };
    let text: String = first.chars().map(valid).take(MAX_HOST_ID_BYTES).collect();
    let text = text.trim_matches('-');
    text.parse::<HostId>().ok().map(|id| id.to_string())
}

/// What control answers to a host that joins, or says anew who it is.
pub fn read(answer: &[u8]) -> anyhow::Result<JoinAnswer> {
    let value: Value = serde_json::from_slice(answer).context("the cluster's answer could not be read")?;
    if value.get("error").is_some() {
        let refused: ErrorBody = serde_json::from_value(value).context("the cluster's refusal could not be read")?;
        let hint = refused.hint.map_or(String::new(), |hint| format!("\n  hint: {hint}"));
        bail!("the cluster does not take this host in: {}{hint}", refused.error);
    }
    serde_json::from_value(value).context("the cluster's answer could not be read; are both of a similar version? see `dunlin version`")
}

fn member_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("cluster")
}

async fn leave(args: &LeaveArgs, globals: Globals) -> anyhow::Result<ExitCode> {
    let (data_dir, json) = (globals.data_dir(), globals.json);
    let dir = member_dir(&data_dir);
    let member = Member::load(&dir)?.with_context(|| format!("the host of {} is in no cluster", data_dir.display()))?;
    let host = &member.host;
    if *host == member.control {
        bail!("control of the cluster runs on this host: it cannot leave\n  hint: let control run elsewhere first, from a backup");
    }
    if let Some(pid) = keeper::holder(&data_dir)? {
        bail!("the server of this host (process {pid}) runs\n  hint: `dunlin host drain {host}` where control runs moves its machines; then stop it");
    }
    if globals.api.is_some() {
        let remove = dunlin_cli::HostCommand::Remove { id: host.clone(), force: args.force, yes: args.yes };
        let exit = dunlin_cli::run_host(remove, globals).await;
        if exit != Exit::Ok {
            return Ok(exit.into());
        }
    } else if !args.yes {
        bail!(
            "control has to remove this host first, and it was not named\n  \
             hint: `dunlin host remove {host}` where control runs, then `dunlin host leave --yes` here; or name control's API with --api"
        );
    }
    // Of this cluster: another one's word would seem older than it, and nobody would be obeyed.
    let view = data_dir.join("view.snapshot");
    match std::fs::remove_file(&view) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("{} cannot be removed, so this host is still a member; mend that and leave again", view.display()));
        }
        _ => {}
    }
    Member::forget(&dir)?;
    match json {
        true => println!("{}", json!({ "host": host, "left": true })),
        false => {
            println!("{host} has left its cluster");
            eprintln!(
                "files of its machines and volumes are still in {}; `dunlin cleanup --data-dir {}` ends what still runs",
                data_dir.display(),
                data_dir.display()
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(clap::Parser)]
    struct Line {
        #[command(subcommand)]
        command: HostCommand,
    }

    fn join_args(words: &[&str]) -> JoinArgs {
        let words = ["host", "join"].iter().chain(words);
        match Line::try_parse_from(words).unwrap_or_else(|error| panic!("{error}")).command {
            HostCommand::Join(args) => *args,
            _ => panic!("join was parsed as something else"),
        }
    }

    #[test]
    fn a_computers_name_becomes_an_id() {
        for (name, expected) in [
            ("web-1", Some("web-1")),
            ("Web_1.example.org", Some("web-1")),
            ("-x-", Some("x")),
            ("___", None),
            ("", None),
        ] {
            assert_eq!(as_host_id(name).as_deref(), expected, "{name}");
        }
        assert_eq!(as_host_id(&"a".repeat(60)).unwrap().len(), MAX_HOST_ID_BYTES);
    }

    #[test]
    fn an_address_has_a_port_or_the_usual_one() {
        for (text, expected) in [("10.0.0.1", "10.0.0.1:7373"), ("10.0.0.1:99", "10.0.0.1:99"), ("::1", "[::1]:7373"), ("[::1]:5", "[::1]:5")] {
            assert_eq!(resolve(text).unwrap(), expected.parse().unwrap(), "{text}");
        }
        assert!(resolve("no such host").is_err());
        let towards = address_towards("127.0.0.1:9".parse().unwrap(), "0.0.0.0:7373".parse().unwrap()).unwrap();
        assert_eq!(towards, "127.0.0.1:7373".parse().unwrap());
        let given = "10.1.2.3:99".parse().unwrap();
        assert_eq!(address_towards("127.0.0.1:9".parse().unwrap(), given).unwrap(), given);
    }

    #[test]
    fn a_refusal_is_told_with_what_to_do() {
        let body = br#"{"error":"duplicate identity: there is a host h2","status":"name_taken","hint":"choose another id"}"#;
        let error = read(body).err().unwrap().to_string();
        assert!(error.contains("duplicate identity") && error.contains("hint: choose another id"), "{error}");
        assert!(read(b"{}").is_err() && read(b"no").is_err());
    }

    /// What the self-test refuses; where it gets that far, the cluster is not asked.
    #[tokio::test]
    async fn what_keeps_a_computer_from_joining_is_found_first() {
        let token = JoinToken::generate([0; 32]).reveal();
        let check = async |data: &Path, words: &[&str], says: &str| {
            let words = [&["127.0.0.1:1", &token, "--host-id", "h2"], words].concat();
            let error = join(&join_args(&words), Some(data), true).await.unwrap_err();
            let error = format!("{error:#}");
            assert!(error.contains(says), "{says}: {error}");
            assert!(!error.contains(&token[22..60]), "no secret in {error}");
        };
        let empty = tempfile::tempdir().unwrap();
        check(empty.path(), &["--region", "Frankfurt!"], "region = ").await;
        check(empty.path(), &["--cluster", "off"], "listens for others").await;
        check(empty.path(), &["--machine-prefix", "8.8.8.0/24"], "machine-prefix = ").await;
        let own = tempfile::tempdir().unwrap();
        std::fs::create_dir(own.path().join("control")).unwrap();
        std::fs::write(own.path().join("control/store.db"), "").unwrap();
        check(own.path(), &[], "control of a cluster of its own").await;
        let held = tempfile::tempdir().unwrap();
        let lock = std::fs::File::create(held.path().join("dunlin.lock")).unwrap();
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
        check(held.path(), &[], "uses").await;
    }

    #[tokio::test]
    async fn a_member_joins_no_second_time_and_leaves_when_control_has_let_it_go() {
        let data = tempfile::tempdir().unwrap();
        let dir = member_dir(data.path());
        let authority = dunlin_cluster::Authority::load_or_create(&data.path().join("authority"), 0).unwrap();
        let keys = MemberKeys::generate().unwrap();
        let (host, region): (HostId, dunlin_model::Region) = ("h2".parse().unwrap(), "fra".parse().unwrap());
        let answer = JoinAnswer {
            issued: authority.issue(&host, &region, 1, &keys.public().unwrap(), 0).unwrap(),
            region,
            epoch: 1,
            domain: "localhost".into(),
            machine_prefix: dunlin_model::desired::Ipv4Prefix { network: "10.208.0.0".parse().unwrap(), length: 20 },
            control: "h1".parse().unwrap(),
            peers: vec![],
            reached_by: None,
        };
        let token = JoinToken::generate(authority.ca_sha256().unwrap());
        assert!(answer.is_of(&token) && !answer.is_of(&JoinToken::generate([0; 32])));
        answer.member(host, keys).save(&dir).unwrap();
        let words = ["127.0.0.1:1", &token.reveal()];
        let error = join(&join_args(&words), Some(data.path()), true).await.unwrap_err().to_string();
        assert!(error.contains("has joined a cluster already, as h2"), "{error}");
        let globals = Globals { api: None, token: None, ca: None, data_dir: Some(data.path().to_owned()), json: true };
        let error = leave(&LeaveArgs { force: false, yes: false }, globals.clone()).await.unwrap_err().to_string();
        assert!(error.contains("dunlin host remove h2") && Member::load(&dir).unwrap().is_some(), "{error}");
        leave(&LeaveArgs { force: false, yes: true }, globals.clone()).await.unwrap();
        assert!(Member::load(&dir).unwrap().is_none());
        assert!(leave(&LeaveArgs { force: false, yes: true }, globals).await.unwrap_err().to_string().contains("in no cluster"));
    }
}
