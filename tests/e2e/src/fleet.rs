//! A cluster on one computer: each host a network namespace, linked to an "internet" that is a bridge in another one.
//!
//! ```text
//! w1 (10.77.0.1, control) --+
//! w2 (10.77.0.2) -----------+-- bridge: 10.77.0.254, where clients are
//! w3 (10.77.0.3) -----------+
//! ```
//! Faults are methods; what they did is undone by [`Fleet::heal`]. All of it is gone at the drop, also after a panic.

use crate::netns::link;
use crate::{Api, Namespace, Pulse, Server, kill, processes, text, until};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;
use std::thread::JoinHandle;
use tempfile::TempDir;

/// Where members meet.
pub const CLUSTER_PORT: u16 = 7373;
const REGIONS: [&str; 5] = ["ams", "fra", "iad", "nrt", "syd"];
/// Of this many hosts at most: their addresses are one block's.
const MAX_HOSTS: usize = 100;
const INTERNET: &str = "10.77.0.254";
/// The table of nftables with the faults of a host.
const FAULTS: &str = "e2e_faults";
/// What hosts may say at WARN while others are away.
const AWAY: &[&str] = &["this edge hears nothing of most hosts"];

/// The first of its hosts has control, until a test says otherwise.
pub struct Fleet {
    hosts: Vec<Host>,
    control: usize,
    /// Each host's server runs from a file of its own, which may be exchanged.
    has_own_binaries: bool,
    /// Of all its hosts, where it is not the computer's.
    clock: Option<Clock>,
    // After the hosts: they are taken down in it.
    internet: Namespace,
}

/// How far the hosts' clock is from the computer's, in a file.
struct Clock(TempDir);

impl Clock {
    fn path(&self) -> PathBuf {
        self.0.path().join("clock")
    }

    fn set(&self, ahead_days: u32) {
        // At once: it is read all the time.
        let next = self.0.path().join("next");
        fs::write(&next, format!("+{ahead_days}d\n")).unwrap();
        fs::rename(&next, self.path()).unwrap();
    }
}

struct Host {
    id: String,
    region: &'static str,
    number: usize,
    server: Server,
}

impl Host {
    fn address(&self) -> String {
        format!("10.77.0.{}", self.number)
    }

    /// Its end of the line, in the internet.
    fn port(&self) -> String {
        format!("to-{}", self.number)
    }

    /// A namespace with its address, on the line.
    fn plug_in(&mut self, internet: &Namespace) {
        let namespace = Namespace::make(&self.id);
        link(&namespace, "eth0", internet, &self.port());
        internet.ip(&["link", "set", &self.port(), "master", "br0"]);
        namespace.ip(&["address", "add", &format!("{}/24", self.address()), "dev", "eth0"]);
        namespace.ip(&["route", "add", "default", "via", INTERNET]);
        self.server.netns = Some(Arc::new(namespace));
    }

    fn namespace(&self) -> &Namespace {
        self.server.netns.as_ref().expect("it is plugged in")
    }
}

impl Fleet {
    /// These hosts, each in a region of its own, all of them up.
    pub fn start(ids: &[&str]) -> Self {
        Self::of_control(ids[0]).joined_by(&ids[1..])
    }

    /// The same, each with a binary of its own.
    pub fn with_own_binaries(ids: &[&str]) -> Self {
        Self::begin(ids[0], true, None).joined_by(&ids[1..])
    }

    /// The same, with a clock that the test sets.
    pub fn with_a_clock(ids: &[&str]) -> Self {
        let clock = Clock(tempfile::tempdir().unwrap());
        clock.set(0);
        Self::begin(ids[0], false, Some(clock)).joined_by(&ids[1..])
    }

    fn joined_by(mut self, ids: &[&str]) -> Self {
        for id in ids {
            self.join(id);
        }
        self
    }

    /// w1 to w6, two in each of three regions: w1 and w2 in ams, w3 and w4 in fra, w5 and w6 in iad.
    pub fn of_three_regions() -> Self {
        let mut fleet = Self::of_control("w1");
        for (id, region) in [("w2", "ams"), ("w3", "fra"), ("w4", "fra"), ("w5", "iad"), ("w6", "iad")] {
            fleet.join_in(id, region);
        }
        fleet
    }

    /// The host that has control, and no other yet.
    pub fn of_control(id: &str) -> Self {
        Self::begin(id, false, None)
    }

    fn begin(id: &str, has_own_binaries: bool, clock: Option<Clock>) -> Self {
        let internet = Namespace::make("internet");
        internet.ip(&["link", "add", "br0", "type", "bridge"]);
        internet.ip(&["address", "add", &format!("{INTERNET}/24"), "dev", "br0"]);
        internet.ip(&["link", "set", "br0", "up"]);
        let mut fleet = Self { hosts: vec![], control: 0, has_own_binaries, clock, internet };
        let mut control = fleet.prepare(id, REGIONS[0], Server::prepare());
        let prefix = format!("{}0/24", control.server.address_prefix());
        control.server.flags = ["--host-id", id, "--region", control.region, "--machine-prefix", &prefix].map(str::to_owned).to_vec();
        control.server.flags.extend(["--advertise".into(), format!("{}:{CLUSTER_PORT}", control.address())]);
        control.server.boot();
        fleet.hosts.push(control);
        fleet
    }

    /// One more, with nothing but a token.
    pub fn join(&mut self, id: &str) {
        self.join_in(id, REGIONS[self.hosts.len() % REGIONS.len()]);
    }

    fn join_in(&mut self, id: &str, region: &'static str) {
        self.add_newcomer(id, region);
        let token = self.control().ok(&["host", "token"]);
        let joined = self.try_join(id, &self.hosts[0].id, token.trim());
        assert!(joined.status.success(), "{}\n--- log of control\n{}", text(&joined), self.control().log());
        self.start_again(id);
        self.until_up(&[id]);
    }

    /// A computer on the line that is in no cluster.
    pub fn newcomer(&mut self, id: &str) {
        self.add_newcomer(id, REGIONS[self.hosts.len() % REGIONS.len()]);
    }

    fn add_newcomer(&mut self, id: &str, region: &'static str) {
        let dir = tempfile::Builder::new().prefix("dunlin-e2e-").tempdir().unwrap();
        let data = dir.path().join("data");
        let host = self.prepare(id, region, Server::without_images(dir, data));
        self.hosts.push(host);
    }

    /// Its `dunlin host join --json`, which asks the member `at`.
    pub fn try_join(&self, id: &str, at: &str, token: &str) -> Output {
        let (host, at) = (self.find(id), self.member(at).to_string());
        let args = ["--json", "host", "join", &at, "--host-id", id, "--region", host.region];
        host.server.cli(host.server.dir(), &args).env("DUNLIN_JOIN_TOKEN", token).output().unwrap()
    }

    fn prepare(&self, id: &str, region: &'static str, mut server: Server) -> Host {
        assert!(self.hosts.len() < MAX_HOSTS, "their addresses are one block's");
        (server.http, server.https, server.bind) = (80, 443, "0.0.0.0");
        if self.has_own_binaries {
            server.with_own_binary();
        }
        server.clock = self.clock.as_ref().map(Clock::path);
        for text in AWAY {
            server.expect_log(text);
        }
        let mut host = Host { id: id.to_owned(), region, number: self.hosts.len() + 1, server };
        host.plug_in(&self.internet);
        host
    }

    pub fn control(&self) -> &Server {
        &self.hosts[self.control].server
    }

    /// Control runs there now.
    pub fn control_is(&mut self, id: &str) {
        self.control = self.hosts.iter().position(|host| host.id == id).expect("a host of this fleet");
    }

    pub fn host(&self, id: &str) -> &Server {
        &self.find(id).server
    }

    pub fn host_mut(&mut self, id: &str) -> &mut Server {
        &mut self.find_mut(id).server
    }

    /// The namespace between the hosts, where clients are.
    pub fn internet(&self) -> &str {
        self.internet.name()
    }

    /// Where its edge listens.
    pub fn edge(&self, id: &str) -> SocketAddr {
        format!("{}:80", self.find(id).address()).parse().unwrap()
    }

    /// Where it meets the other members.
    pub fn member(&self, id: &str) -> SocketAddr {
        format!("{}:{CLUSTER_PORT}", self.find(id).address()).parse().unwrap()
    }

    /// A thread of the test on that host, as far as the network goes.
    pub fn spawn_on<T: Send + 'static>(&self, id: &str, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        self.find(id).namespace().spawn(work)
    }

    /// What control says of all hosts.
    pub fn list(&self) -> Vec<Value> {
        self.ask("/v1/hosts").as_array().cloned().unwrap_or_default()
    }

    pub fn state_of(&self, id: &str) -> Option<String> {
        self.list().iter().find(|host| host["id"] == id)?["state"].as_str().map(str::to_owned)
    }

    pub fn until_up(&self, ids: &[&str]) {
        for id in ids {
            let up = || self.state_of(id).as_deref() == Some("up");
            assert!(until(up), "{id} is not up: {:?}\n--- its log\n{}", self.list(), self.host(id).log());
        }
    }

    /// Requests to an app by somebody elsewhere, through the edge of `host`.
    pub fn pulse(&self, host: &str, app: &str, per_second: u32) -> Pulse {
        Pulse::start(&self.internet, self.edge(host), &format!("{app}.localhost"), "/", per_second)
    }

    /// The head of an answer of an app, through the edge of `host`, to a request with this field.
    pub fn head(&self, host: &str, app: &str, field: &str) -> String {
        let url = format!("http://{}/", self.edge(host));
        let mut curl = self.internet.command("curl");
        let output = curl.args(["-sS", "-i", "--max-time", "30", "-H", &format!("host: {app}.localhost"), "-H", field, &url]).output().unwrap();
        text(&output).to_lowercase()
    }

    /// What control says of the machines of an app, and which host each is on.
    pub fn machines(&self, app: &str) -> BTreeMap<String, String> {
        let mut found = BTreeMap::new();
        for host in &self.hosts {
            let detail = self.ask(&format!("/v1/hosts/{}", host.id));
            let machines = detail["machines"].as_array().into_iter().flatten().filter(|machine| machine["app"] == app);
            found.extend(machines.map(|machine| (machine["id"].as_str().unwrap().to_owned(), host.id.clone())));
        }
        found
    }

    /// What control's API answers; null where it does not.
    pub fn ask(&self, path: &str) -> Value {
        let answer = Api::of(&self.control().data()).once("GET", path, &[], "");
        answer.ok().and_then(|(_, body)| serde_json::from_str(&body).ok()).unwrap_or_default()
    }

    /// (machine, host) for each supervisor that lives, whatever anybody says.
    pub fn supervised(&self) -> Vec<(String, String)> {
        let mut found = Vec::new();
        for (pid, line) in processes().iter().filter(|(_, line)| line.contains("__supervisor")) {
            let host = self.hosts.iter().find(|host| host.namespace().has(*pid));
            if let (Some(host), Some(machine)) = (host, line.rsplit(' ').next()) {
                found.push((machine.to_owned(), host.id.clone()));
            }
        }
        found.sort();
        found
    }

    /// Until the app has so many machines, all of them started, and each runs where control says and nowhere else.
    pub fn until_whole(&self, app: &str, count: usize) {
        let mut story = String::new();
        let whole = || {
            let list = self.control().dunlin(&["machine", "list", "--app", app, "--json"]);
            let Ok(list) = serde_json::from_slice::<Vec<Value>>(&list.stdout) else { return false };
            let (wanted, is) = (self.machines(app).into_iter().collect::<Vec<_>>(), self.supervised());
            let is: Vec<_> = is.into_iter().filter(|(machine, _)| wanted.iter().any(|(id, _)| id == machine)).collect();
            story = format!("control says {wanted:?}, there are {is:?}: {list:?}");
            list.len() == count && list.iter().all(|machine| machine["state"] == "started") && wanted == is
        };
        let became = until(whole);
        assert!(became, "{app} is not whole: {story}\n--- log of control\n{}", self.control().log());
    }

    /// The server of a host that was stopped; nobody waits for it.
    pub fn start_again(&mut self, id: &str) {
        self.find_mut(id).server.spawn();
    }

    /// A copy of the host's disk, in another computer with another address. It is started, and nobody waits for it.
    pub fn clone_of(&mut self, id: &str, name: &str) {
        let dir = tempfile::Builder::new().prefix("dunlin-e2e-").tempdir().unwrap();
        let data = dir.path().join("data");
        let copied = Command::new("cp").args(["-a", "--one-file-system"]).arg(&self.host(id).data).arg(&data).status().unwrap();
        assert!(copied.success());
        let mut clone = self.prepare(name, self.find(id).region, Server::without_images(dir, data));
        clone.server.spawn();
        self.hosts.push(clone);
    }

    // --- faults

    /// Power off: everything that runs there ends at once, and nobody is told.
    pub fn kill(&mut self, id: &str) {
        self.cut(id);
        let host = self.find_mut(id);
        // Some of it may have a moment to see the rest go.
        ["the keeper is gone", "its supervisor was killed", "the server died; restarting it"].iter().for_each(|text| host.server.expect_log(text));
        host.namespace().kill_all();
        host.server.forget_keeper();
    }

    /// And on again: what the kernel knew of its network is gone.
    pub fn power_on(&mut self, id: &str) {
        let n = self.hosts.iter().position(|host| host.id == id).expect("a host of this fleet");
        let host = &mut self.hosts[n];
        self.internet.ip(&["link", "del", &host.port()]);
        host.plug_in(&self.internet);
        host.server.spawn();
    }

    pub fn power_cycle(&mut self, id: &str) {
        self.kill(id);
        self.power_on(id);
    }

    /// The clocks of all hosts are so far ahead from now on.
    pub fn set_clocks(&self, ahead_days: u32) {
        self.clock.as_ref().expect("it was made with a clock").set(ahead_days);
    }

    /// Pulls its line.
    pub fn cut(&self, id: &str) {
        self.internet.ip(&["link", "set", &self.find(id).port(), "down"]);
    }

    /// Nothing of `from` reaches `to`; the other direction is whole.
    pub fn one_way(&self, from: &str, to: &str) {
        self.drop_at(to, "input", &["ip", "saddr", &self.find(from).address()]);
    }

    /// The same, and it outlives power cycles of `to`.
    pub fn one_way_from(&self, from: &str, to: &str) {
        self.drop_at(from, "output", &["ip", "daddr", &self.find(to).address()]);
    }

    /// What members say over UDP is lost, forwarded requests are not.
    pub fn cut_gossip_only(&self, id: &str) {
        let port = CLUSTER_PORT.to_string();
        self.drop_at(id, "input", &["udp", "dport", &port]);
        self.drop_at(id, "output", &["udp", "sport", &port]);
        self.drop_at(id, "output", &["udp", "dport", &port]);
    }

    /// As a firewall there that lets nothing in at the cluster's port over `protocol`.
    pub fn close_port(&self, id: &str, protocol: &str) {
        self.drop_at(id, "input", &[protocol, "dport", &CLUSTER_PORT.to_string()]);
    }

    fn drop_at(&self, id: &str, hook: &str, what: &[&str]) {
        let namespace = self.find(id).namespace();
        namespace.nft(&["add", "table", "inet", FAULTS]);
        let chain = format!("{{ type filter hook {hook} priority -300 ; }}");
        namespace.nft(&["add", "chain", "inet", FAULTS, hook, &chain]);
        namespace.nft(&[&["add", "rule", "inet", FAULTS, hook], what, &["drop"]].concat());
    }

    /// So many of a hundred packets are lost on its line, in each direction.
    pub fn lose(&self, id: &str, percent: u32) {
        for (hook, side) in [("input", "iifname"), ("output", "oifname")] {
            self.drop_at(id, hook, &[side, "eth0", "numgen", "random", "mod", "100", "<", &percent.to_string()]);
        }
        // What nft drops on the way out is told to who sent it, unlike on a real line.
        self.host(id).expect_log("sendmsg error");
    }

    /// Its server hangs: the kernel goes on taking connections for it, and its machines run.
    pub fn freeze(&self, id: &str) {
        self.server_pids(id).into_iter().for_each(|pid| kill(pid, "STOP"));
    }

    pub fn thaw(&self, id: &str) {
        self.server_pids(id).into_iter().for_each(|pid| kill(pid, "CONT"));
    }

    /// Of keeper and server.
    fn server_pids(&self, id: &str) -> Vec<u32> {
        let namespace = self.find(id).namespace();
        let is_server = |(pid, line): &(u32, String)| line.contains(" server ") && namespace.has(*pid);
        let pids: Vec<u32> = processes().into_iter().filter(is_server).map(|(pid, _)| pid).collect();
        assert!(!pids.is_empty(), "the server of {id} runs");
        pids
    }

    /// All faults of its network end.
    pub fn heal(&self, id: &str) {
        let host = self.find(id);
        host.namespace().nft(&["add", "table", "inet", FAULTS]);
        host.namespace().nft(&["delete", "table", "inet", FAULTS]);
        self.internet.ip(&["link", "set", &host.port(), "up"]);
    }

    fn find(&self, id: &str) -> &Host {
        self.hosts.iter().find(|host| host.id == id).expect("a host of this fleet")
    }

    fn find_mut(&mut self, id: &str) -> &mut Host {
        self.hosts.iter_mut().find(|host| host.id == id).expect("a host of this fleet")
    }
}
