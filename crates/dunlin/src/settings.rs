//! The server's settings: flag > environment > file > default, resolved and validated before a port
//! is bound. Every variable that Dunlin reads is declared here.

use anyhow::Context;
use clap::{Args, ValueEnum};
use dunlin_model::desired::{HOST_LABELS_MAX, Ipv4Prefix, is_host_label};
use dunlin_model::disk::{ROOTFS_DEFAULT_GB, ROOTFS_GB};
use dunlin_model::{HostId, Region, Zone};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Of looking at a machine before it is put to sleep.
const AUTOSTOP_AFTER_S: u64 = 60;
/// Long enough that a host which comes and goes moves nothing.
const REBALANCE_AFTER_S: u64 = 600;
const READY_MACHINES: u16 = 16;

pub const DEFAULT_MACHINE_PREFIX: &str = "10.201.0.0/16";
/// Where members of a cluster meet: UDP and TCP.
pub const DEFAULT_CLUSTER: &str = "0.0.0.0:7373";

/// Flags of `dunlin server`; each has a variable and a key of the settings file.
#[derive(Debug, Clone, Default, Args)]
pub struct ServerArgs {
    /// Settings file (TOML); its keys are the flags' names with underscores
    #[arg(long, env = "DUNLIN_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Address of the edge for HTTP [default: 0.0.0.0:80; 8080 for users that may not listen on 80]
    #[arg(long, env = "DUNLIN_HTTP", value_name = "ADDR:PORT")]
    pub http: Option<String>,
    /// Address of the edge for HTTPS [default: 0.0.0.0:443; 8443 likewise]
    #[arg(long, env = "DUNLIN_HTTPS", value_name = "ADDR:PORT")]
    pub https: Option<String>,
    /// Address where the servers of a cluster meet, UDP and TCP; `off` for a server that stays alone [default: 0.0.0.0:7373]
    #[arg(long, env = "DUNLIN_CLUSTER", value_name = "ADDR:PORT")]
    pub cluster: Option<String>,
    /// Where other servers reach that address [default: the address with which this computer reaches others]
    #[arg(long, env = "DUNLIN_ADVERTISE", value_name = "ADDR:PORT")]
    pub advertise: Option<String>,
    /// Apps are served as <app>.<domain> [default: localhost]
    #[arg(long, env = "DUNLIN_DOMAIN", value_name = "NAME")]
    pub domain: Option<String>,
    /// This server's id [default: h1]
    #[arg(long, env = "DUNLIN_HOST_ID", value_name = "ID")]
    pub host_id: Option<String>,
    /// The region that this server is in [default: local]
    #[arg(long, env = "DUNLIN_REGION", value_name = "CODE")]
    pub region: Option<String>,
    /// What fails as one with this server inside its region: a building, a rack; apps are spread over zones
    #[arg(long, env = "DUNLIN_ZONE", value_name = "NAME")]
    pub zone: Option<String>,
    /// What else is to be known of this server, for people
    #[arg(long = "label", env = "DUNLIN_LABELS", value_name = "KEY=VALUE", value_delimiter = ',')]
    pub labels: Option<Vec<String>>,
    /// What this server does: control, host, proxy [default: all three]
    ///
    /// host,proxy runs apps and serves traffic from what the server last knew, with no API.
    #[arg(long = "role", env = "DUNLIN_ROLE", value_name = "ROLE", value_delimiter = ',')]
    pub roles: Option<Vec<Role>>,
    /// Block of private addresses for machines [default: 10.201.0.0/16]
    #[arg(long, env = "DUNLIN_MACHINE_PREFIX", value_name = "NET/LEN")]
    pub machine_prefix: Option<String>,
    /// Where builds look for base images first
    #[arg(long, env = "DUNLIN_BASE_IMAGES", value_name = "WHERE")]
    pub base_images: Option<BaseImages>,
    /// Memory that machines may reserve, in MiB [default: the machine's memory less 512]
    #[arg(long, env = "DUNLIN_MEMORY_MB", value_name = "MIB")]
    pub memory_mb: Option<u32>,
    /// What a machine may write to its root file system, in GiB, if its configuration does not say [default: 8]
    #[arg(long, env = "DUNLIN_ROOTFS_GB", value_name = "GIB", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rootfs_gb: Option<u32>,
    /// Seconds without need for a machine after which auto_stop_machines puts it to sleep [default: 60]
    #[arg(long, env = "DUNLIN_AUTOSTOP_AFTER", value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub autostop_after: Option<u64>,
    /// Seconds without a change of an app after which its machines move apart if they stand too close together [default: 600]
    #[arg(long, env = "DUNLIN_REBALANCE_AFTER", value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub rebalance_after: Option<u64>,
    /// Stopped machines that stand ready, all but their program started, 2 MiB each; 0 for none [default: 16]
    #[arg(long, env = "DUNLIN_READY_MACHINES", value_name = "COUNT", value_parser = clap::value_parser!(u16).range(0..=1024))]
    pub ready_machines: Option<u16>,
    /// Format of the server's own log
    #[arg(long, env = "DUNLIN_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// Validate the settings, print them, and exit
    #[arg(long)]
    pub check_config: bool,
    /// Test hook: kill the server at this boundary between a durable write and an act
    #[arg(long, value_name = "POINT", hide = true)]
    pub kill_at: Option<String>,
}

/// A part of what a server does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Control,
    Host,
    Proxy,
}

/// Where builds look for base images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BaseImages {
    /// At the registry that the image's name means, for example Docker Hub
    Upstream,
    /// First among those made here from Debian packages (`dunlin image bootstrap`)
    Bootstrapped,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct FileSettings {
    data_dir: Option<PathBuf>,
    http: Option<String>,
    https: Option<String>,
    cluster: Option<String>,
    advertise: Option<String>,
    domain: Option<String>,
    host_id: Option<String>,
    region: Option<String>,
    zone: Option<String>,
    label: Option<Vec<String>>,
    role: Option<Vec<Role>>,
    machine_prefix: Option<String>,
    base_images: Option<BaseImages>,
    memory_mb: Option<u32>,
    rootfs_gb: Option<u32>,
    autostop_after: Option<u64>,
    rebalance_after: Option<u64>,
    ready_machines: Option<u16>,
    log_format: Option<LogFormat>,
}

/// Settings as the server uses them. Nothing below the binary reads the environment.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    pub data_dir: PathBuf,
    pub http: SocketAddr,
    pub https: SocketAddr,
    /// `None`: this server takes no others and joins none.
    pub cluster: Option<SocketAddr>,
    pub advertise: Option<SocketAddr>,
    pub domain: String,
    pub host_id: HostId,
    pub region: Region,
    pub zone: Option<Zone>,
    pub labels: BTreeMap<String, String>,
    pub roles: Vec<Role>,
    pub machine_prefix: Ipv4Prefix,
    pub base_images: BaseImages,
    pub cpus: u32,
    pub memory_mb: u32,
    pub rootfs_gb: u32,
    pub autostop_after_s: u64,
    pub rebalance_after_s: u64,
    pub ready_machines: u16,
    pub log_format: LogFormat,
    pub kill_at: Option<String>,
}

impl Settings {
    /// Resolves and validates; the error names every problem at once.
    /// `data_dir` is the flag or the variable of all commands.
    pub fn resolve(args: &ServerArgs, data_dir: Option<&Path>) -> anyhow::Result<Self> {
        let file = match &args.config {
            None => FileSettings::default(),
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .with_context(|| format!("the settings file {} cannot be read", path.display()))?;
                parse_file(&text).with_context(|| format!("the settings file {} is not valid", path.display()))?
            }
        };
        let mut problems = String::new();
        let mut parse = Parse { problems: &mut problems };
        let (usual_http, usual_https) = match may_bind_low_ports() {
            true => ("0.0.0.0:80", "0.0.0.0:443"),
            false => ("0.0.0.0:8080", "0.0.0.0:8443"),
        };
        let http = parse.socket("http", args.http.as_ref().or(file.http.as_ref()), usual_http);
        let https = parse.socket("https", args.https.as_ref().or(file.https.as_ref()), usual_https);
        let data_dir =
            data_dir.map(Path::to_owned).or(file.data_dir).unwrap_or_else(dunlin_cli::default_data_dir);
        let data_dir = std::path::absolute(&data_dir)?;
        let joined = Joined::of(&data_dir)?;
        let cluster = parse.cluster(args.cluster.as_ref().or(file.cluster.as_ref()), &joined);
        let advertise = args.advertise.as_ref().or(file.advertise.as_ref());
        let advertise = advertise.and_then(|text| parse.socket("advertise", Some(text), "")).or(joined.advertise);
        let domain = parse.as_joined("domain", args.domain.as_ref().or(file.domain.as_ref()), joined.domain.as_ref());
        let domain = parse.domain(domain.as_ref());
        let host_id = parse.as_joined("host-id", args.host_id.as_ref().or(file.host_id.as_ref()), joined.host_id.as_ref());
        let host_id = parse.name("host-id", host_id.as_ref(), "h1");
        let region = parse.as_joined("region", args.region.as_ref().or(file.region.as_ref()), joined.region.as_ref());
        let region = parse.name("region", region.as_ref(), "local");
        let zone = args.zone.as_ref().or(file.zone.as_ref()).or(joined.zone.as_ref());
        let zone = zone.and_then(|zone| parse.name("zone", Some(zone), ""));
        let labels = args.labels.as_ref().or(file.label.as_ref());
        let labels = labels.map_or_else(|| joined.labels.clone(), |given| parse.labels(given));
        let roles = parse.roles(args.roles.as_ref().or(file.role.as_ref()), &joined);
        let prefix = args.machine_prefix.as_ref().or(file.machine_prefix.as_ref());
        let prefix = parse.as_joined("machine-prefix", prefix, joined.machine_prefix.as_ref());
        let prefix = parse.prefix(prefix.as_ref());
        let memory_mb = args.memory_mb.or(file.memory_mb).map_or_else(default_memory_mb, Ok)?;
        if let (Some(http), Some(https)) = (http, https)
            && http == https
            && http.port() != 0
        {
            let _ = writeln!(problems, "  http and https are both {http}: give each a port of its own");
        }
        match (http, https, domain, host_id, region, roles, prefix) {
            (Some(http), Some(https), Some(domain), Some(host_id), Some(region), Some(roles), Some(machine_prefix))
                if problems.is_empty() =>
            {
                Ok(Self {
                    data_dir,
                    http,
                    https,
                    cluster,
                    advertise,
                    domain,
                    host_id,
                    region,
                    zone,
                    labels,
                    roles,
                    machine_prefix,
                    base_images: args.base_images.or(file.base_images).unwrap_or(BaseImages::Upstream),
                    cpus: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
                    memory_mb,
                    rootfs_gb: args.rootfs_gb.or(file.rootfs_gb).unwrap_or(ROOTFS_DEFAULT_GB).clamp(*ROOTFS_GB.start(), *ROOTFS_GB.end()),
                    autostop_after_s: args.autostop_after.or(file.autostop_after).unwrap_or(AUTOSTOP_AFTER_S).clamp(1, 86_400),
                    rebalance_after_s: args.rebalance_after.or(file.rebalance_after).unwrap_or(REBALANCE_AFTER_S).clamp(1, 86_400),
                    ready_machines: args.ready_machines.or(file.ready_machines).unwrap_or(READY_MACHINES).min(1024),
                    log_format: args.log_format.or(file.log_format).unwrap_or(LogFormat::Text),
                    kill_at: args.kill_at.clone(),
                })
            }
            _ => anyhow::bail!("the settings are not valid:\n{}", problems.trim_end()),
        }
    }

    /// The socket on which root reaches the API.
    pub fn api_socket(&self) -> PathBuf {
        api_socket(&self.data_dir)
    }

    pub fn run_dir(&self) -> PathBuf {
        self.data_dir.join("run")
    }

    pub fn summary(&self) -> String {
        format!(
            "data_dir = {:?}\nhttp = {:?}\nhttps = {:?}\ncluster = {:?}\n{}domain = {:?}\nhost_id = {:?}\nregion = {:?}\n{}label = {:?}\n\
             role = {:?}\n\
             machine_prefix = \"{}/{}\"\nbase_images = {:?}\nmemory_mb = {}\nrootfs_gb = {}\nautostop_after = {}\n\
             rebalance_after = {}\nready_machines = {}\nlog_format = {:?}",
            self.data_dir,
            self.http.to_string(),
            self.https.to_string(),
            self.cluster.map_or("off".to_owned(), |address| address.to_string()),
            self.advertise.map_or(String::new(), |address| format!("advertise = {:?}\n", address.to_string())),
            self.domain,
            self.host_id.as_str(),
            self.region.as_str(),
            self.zone.as_ref().map_or(String::new(), |zone| format!("zone = {:?}\n", zone.as_str())),
            self.labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>(),
            role_names(&self.roles).split(',').collect::<Vec<_>>(),
            self.machine_prefix.network,
            self.machine_prefix.length,
            format!("{:?}", self.base_images).to_lowercase(),
            self.memory_mb,
            self.rootfs_gb,
            self.autostop_after_s,
            self.rebalance_after_s,
            self.ready_machines,
            format!("{:?}", self.log_format).to_lowercase(),
        )
    }
}

/// What a server that has joined a cluster was told there. That of control itself is told nothing, unless it joined before
/// control was restored on it.
#[derive(Default)]
struct Joined {
    is_member: bool,
    listen: Option<SocketAddr>,
    advertise: Option<SocketAddr>,
    domain: Option<String>,
    host_id: Option<String>,
    region: Option<String>,
    machine_prefix: Option<String>,
    zone: Option<String>,
    labels: BTreeMap<String, String>,
}

impl Joined {
    fn of(data_dir: &Path) -> anyhow::Result<Self> {
        let member = dunlin_cluster::Member::load(&data_dir.join("cluster"))?;
        let is_member = |member: &dunlin_cluster::Member| member.control != member.host;
        let Some(member) = member.filter(|member| is_member(member) || member.said.controls) else { return Ok(Self::default()) };
        let prefix = member.machine_prefix;
        Ok(Self {
            is_member: is_member(&member),
            listen: member.said.listen,
            advertise: member.said.advertise,
            zone: member.said.zone.map(|zone| zone.to_string()),
            labels: member.said.labels,
            domain: Some(member.domain),
            host_id: Some(member.host.to_string()),
            region: Some(member.region.to_string()),
            machine_prefix: Some(format!("{}/{}", prefix.network, prefix.length)),
        })
    }
}

fn role_names(roles: &[Role]) -> String {
    let names: Vec<String> = roles.iter().map(|role| format!("{role:?}").to_lowercase()).collect();
    names.join(",")
}

/// Where the API's socket is in a data directory.
pub fn api_socket(data_dir: &Path) -> PathBuf {
    data_dir.join("run/api.sock")
}

fn parse_file(text: &str) -> anyhow::Result<FileSettings> {
    Ok(toml_edit::de::from_str(text)?)
}

struct Parse<'a> {
    problems: &'a mut String,
}

impl Parse<'_> {
    fn keep<T, E: std::fmt::Display>(&mut self, key: &str, text: &str, parsed: Result<T, E>) -> Option<T> {
        parsed.map_err(|e| { let _ = writeln!(self.problems, "  {key} = {text:?}: {e}"); }).ok()
    }

    fn socket(&mut self, key: &str, text: Option<&String>, default: &str) -> Option<SocketAddr> {
        let text = text.map_or(default, String::as_str);
        let parsed = text.parse::<SocketAddr>().map_err(|_| "expected ADDRESS:PORT, for example 0.0.0.0:80");
        self.keep(key, text, parsed)
    }

    fn name<T: std::str::FromStr<Err = dunlin_model::InvalidName>>(
        &mut self,
        key: &str,
        text: Option<&String>,
        default: &str,
    ) -> Option<T> {
        let text = text.map_or(default, String::as_str);
        self.keep(key, text, text.parse::<T>().map_err(|e| e.rule))
    }

    fn roles(&mut self, roles: Option<&Vec<Role>>, joined: &Joined) -> Option<Vec<Role>> {
        let usual = if joined.is_member { vec![Role::Host, Role::Proxy] } else { vec![Role::Control, Role::Host, Role::Proxy] };
        let mut roles = roles.cloned().unwrap_or(usual);
        roles.sort_unstable();
        roles.dedup();
        let text = role_names(&roles);
        if joined.is_member && roles.contains(&Role::Control) {
            return self.keep("role", &text, Err("this server has joined a cluster whose control runs elsewhere: leave out control"));
        }
        let valid = roles.contains(&Role::Host) && roles.contains(&Role::Proxy);
        self.keep("role", &text, valid.then_some(roles).ok_or("host and proxy run together; leave out control only"))
    }

    fn cluster(&mut self, text: Option<&String>, joined: &Joined) -> Option<SocketAddr> {
        match text.map(String::as_str) {
            None if joined.listen.is_some() => joined.listen,
            Some("off") if !joined.is_member => None,
            Some("off") => self.keep("cluster", "off", Err("this server has joined a cluster; `dunlin host leave` ends that")),
            _ => self.socket("cluster", text, DEFAULT_CLUSTER),
        }
    }

    /// What the cluster has settled for a member: it may be said again, and not be said otherwise.
    fn as_joined(&mut self, key: &str, given: Option<&String>, joined: Option<&String>) -> Option<String> {
        if let (Some(given), Some(joined)) = (given, joined)
            && given != joined
        {
            let _ = writeln!(self.problems, "  {key} = {given:?}: this server has joined its cluster with {joined:?}; leave it out");
        }
        joined.or(given).cloned()
    }

    fn labels(&mut self, given: &[String]) -> BTreeMap<String, String> {
        let mut labels = BTreeMap::new();
        for text in given {
            let parsed = text.split_once('=').filter(|(key, value)| is_host_label(key) && is_host_label(value));
            let parsed = parsed.filter(|_| labels.len() < HOST_LABELS_MAX).ok_or("expected KEY=VALUE of at most 63 visible characters each, and 16 of them");
            if let Some((key, value)) = self.keep("label", text, parsed) {
                labels.insert(key.to_owned(), value.to_owned());
            }
        }
        labels
    }

    fn domain(&mut self, text: Option<&String>) -> Option<String> {
        let text = text.map_or("localhost", String::as_str).to_ascii_lowercase();
        let valid = text.len() <= 190 && text.split('.').all(|label| label.parse::<dunlin_model::AppName>().is_ok());
        self.keep("domain", &text, valid.then(|| text.clone()).ok_or("expected a domain name such as example.org"))
    }

    fn prefix(&mut self, text: Option<&String>) -> Option<Ipv4Prefix> {
        let text = text.map_or(DEFAULT_MACHINE_PREFIX, String::as_str);
        let parsed = parse_prefix(text).ok_or("expected a private block of at least a /24, such as 10.201.0.0/16");
        self.keep("machine-prefix", text, parsed)
    }
}

pub fn parse_prefix(text: &str) -> Option<Ipv4Prefix> {
    let (network, length) = text.split_once('/')?;
    let prefix = Ipv4Prefix { network: network.parse().ok()?, length: length.parse().ok()? };
    prefix.is_for_machines().then_some(prefix)
}

/// Ordinary users listen above `net.ipv4.ip_unprivileged_port_start` only.
fn may_bind_low_ports() -> bool {
    let first = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
    let is_low = |text: String| text.trim().parse::<u32>().is_ok_and(|first| first <= 80);
    rustix::process::geteuid().is_root() || first.is_ok_and(is_low)
}

/// The machine's memory less what the system and the server themselves need.
fn default_memory_mb() -> anyhow::Result<u32> {
    let text = std::fs::read_to_string("/proc/meminfo").context("/proc/meminfo cannot be read")?;
    let total_kb = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok())
        .context("/proc/meminfo has no MemTotal")?;
    Ok(u32::try_from(total_kb / 1024).unwrap_or(u32::MAX).saturating_sub(512).max(128))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("server.toml");
        std::fs::write(&path, "domain = \"example.org\"\nregion = \"fra\"\n").unwrap();
        let args = ServerArgs { config: Some(path), region: Some("ams".into()), ..Default::default() };
        let settings = Settings::resolve(&args, None).unwrap();
        assert_eq!((settings.domain.as_str(), settings.region.as_str()), ("example.org", "ams"));
        assert_eq!(settings.http.port(), 80);
        assert_eq!(settings.cluster, Some(DEFAULT_CLUSTER.parse().unwrap()));
    }

    #[test]
    fn a_server_that_joined_is_who_it_was_told_to_be() {
        let dir = tempfile::tempdir().unwrap();
        let prefix = parse_prefix("10.208.16.0/20").unwrap();
        let (host, region): (HostId, Region) = ("w2".parse().unwrap(), "fra".parse().unwrap());
        let authority = dunlin_cluster::Authority::load_or_create(dir.path(), 0).unwrap();
        let keys = dunlin_cluster::MemberKeys::generate().unwrap();
        let issued = authority.issue(&host, &region, 1, &keys.public().unwrap(), 0).unwrap();
        let member = dunlin_cluster::Member {
            host,
            region,
            epoch: 1,
            domain: "example.org".into(),
            machine_prefix: prefix,
            control: "w1".parse().unwrap(),
            peers: vec![],
            said: dunlin_cluster::Said { zone: "rack-1".parse().ok(), ..Default::default() },
            keys,
            issued,
        };
        member.save(&dir.path().join("cluster")).unwrap();
        let settings = Settings::resolve(&ServerArgs::default(), Some(dir.path())).unwrap();
        assert_eq!((settings.host_id.as_str(), settings.domain.as_str()), ("w2", "example.org"));
        assert_eq!(settings.zone.unwrap().as_str(), "rack-1");
        assert_eq!((settings.roles, settings.machine_prefix), (vec![Role::Host, Role::Proxy], prefix));
        let args = ServerArgs {
            host_id: Some("w3".into()),
            roles: Some(vec![Role::Control, Role::Host, Role::Proxy]),
            cluster: Some("off".into()),
            ..Default::default()
        };
        let error = format!("{:#}", Settings::resolve(&args, Some(dir.path())).unwrap_err());
        for told in ["host-id = \"w3\"", "\"w2\"", "role = ", "cluster = \"off\""] {
            assert!(error.contains(told), "{error}");
        }
    }

    #[test]
    fn every_problem_is_named_at_once() {
        let args = ServerArgs {
            http: Some("80".into()),
            region: Some("Frankfurt!".into()),
            zone: Some("Rack 1".into()),
            labels: Some(vec!["disk=nvme".into(), "fast".into()]),
            machine_prefix: Some("8.8.8.0/24".into()),
            ..Default::default()
        };
        let error = format!("{:#}", Settings::resolve(&args, None).unwrap_err());
        for key in ["http = ", "region = ", "zone = ", "label = \"fast\"", "machine-prefix = "] {
            assert!(error.contains(key), "{error}");
        }
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_place() {
        let error = format!("{:#}", parse_file("domian = \"x\"").unwrap_err());
        assert!(error.contains("domian") && error.contains("line 1"), "{error}");
    }
}
