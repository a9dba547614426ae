//! An authority, members of its making, and waiting for what must become true.

use dunlin_cluster::{Authority, Cluster, ClusterConfig, Member, MemberKeys, View};
use dunlin_model::desired::Ipv4Prefix;
use dunlin_model::{Generation, HostId, MachineId, MachineState, MachineVersion};
use dunlin_view::{ConfigState, HostFact, MachineAssignment, MachineFact};
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, SystemTime};
use tempfile::TempDir;

/// Far above what anything here takes; whoever waits so long has failed.
const DEADLINE: Duration = Duration::from_secs(60);

pub struct World {
    pub dir: TempDir,
    pub authority: Authority,
}

pub struct Host {
    pub cluster: Cluster,
    pub view: View,
}

pub fn now_ms() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis() as u64
}

pub fn id(name: &str) -> HostId {
    name.parse().unwrap()
}

/// A port that was free a moment ago: a host that is started again has to be where it was.
pub fn free_addr() -> SocketAddr {
    std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

impl World {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::load_or_create(&dir.path().join("authority"), now_ms()).unwrap();
        Self { dir, authority }
    }

    pub fn member(&self, name: &str, peers: &[(&str, SocketAddr)]) -> Member {
        self.member_in("fra", name, peers)
    }

    pub fn member_in(&self, region: &str, name: &str, peers: &[(&str, SocketAddr)]) -> Member {
        let (host, region) = (id(name), region.parse().unwrap());
        let keys = MemberKeys::generate().unwrap();
        let issued = self.authority.issue(&host, &region, 1, &keys.public().unwrap(), now_ms()).unwrap();
        Member {
            host,
            region,
            epoch: 1,
            domain: "localhost".into(),
            machine_prefix: Ipv4Prefix { network: "10.202.0.0".parse().unwrap(), length: 16 },
            control: id("h1"),
            peers: peers.iter().map(|(name, addr)| (id(name), *addr)).collect(),
            said: Default::default(),
            keys,
            issued,
        }
    }

    pub async fn start(&self, member: Member, listen: SocketAddr) -> Host {
        let folder = member.host.to_string();
        self.start_in(&folder, member, listen).await
    }

    pub async fn start_in(&self, folder: &str, member: Member, listen: SocketAddr) -> Host {
        self.start_at(folder, member, (listen, listen)).await
    }

    pub async fn start_at(&self, folder: &str, member: Member, (listen, advertise): (SocketAddr, SocketAddr)) -> Host {
        let dir = self.dir.path().join(folder);
        member.save(&dir).unwrap();
        let view = View::memory();
        let bound = async {
            loop {
                match UdpSocket::bind(listen) {
                    Ok(socket) => return socket,
                    // The port of a process that has just shut down.
                    Err(_) => tokio::task::yield_now().await,
                }
            }
        };
        let socket = tokio::time::timeout(DEADLINE, bound).await.expect("the port is free");
        let config = ClusterConfig { member, socket, advertise, dir };
        let cluster = Cluster::start(config, view.clone()).await.unwrap();
        Host { cluster, view }
    }

    /// The first knows nobody, the others know the first.
    pub async fn fleet(&self, names: &[&str]) -> Vec<Host> {
        self.fleet_in(&names.iter().map(|name| ("fra", *name)).collect::<Vec<_>>()).await
    }

    /// The same in several regions.
    pub async fn fleet_in(&self, places: &[(&str, &str)]) -> Vec<Host> {
        let [(region, first), others @ ..] = places else { panic!("a fleet has a host") };
        let at = free_addr();
        let mut hosts = vec![self.start(self.member_in(region, first, &[]), at).await];
        for (region, name) in others {
            hosts.push(self.start(self.member_in(region, name, &[(first, at)]), "127.0.0.1:0".parse().unwrap()).await);
        }
        hosts
    }
}

impl Host {
    /// As a host does: its machines first, itself last.
    pub fn says(&self, machines: &[MachineFact]) {
        machines.iter().for_each(|fact| self.view.publish_machine(fact.clone()).unwrap());
        self.view.publish_host(host_fact(self.cluster.host(), now_ms()));
    }

    pub fn sees(&self, machine: &MachineId) -> Option<u64> {
        self.view.current().machines.get(machine).map(|fact| fact.sequence)
    }
}

pub fn host_fact(id: &HostId, updated_at_ms: u64) -> HostFact {
    HostFact { id: id.clone(), region: "fra".parse().unwrap(), cpus: 2, memory_mb: 1024, memory_reserved_mb: 0, room: None, updated_at_ms }
}

pub fn machine_id(number: u32) -> MachineId {
    let [a, b, c, d] = number.to_be_bytes();
    MachineId::from_random([7, 7, 7, a, b, c, d])
}

pub fn machine(number: u32, host: &str, sequence: u64) -> MachineFact {
    MachineFact {
        id: machine_id(number),
        host: id(host),
        app: "web".parse().unwrap(),
        sequence,
        placement: Generation::default(),
        state: MachineState::Started,
        version: MachineVersion::new(1, [0; 10]),
        release: 1,
        process_group: "app".into(),
        attempt: 1,
        address: "10.201.0.1".parse().unwrap(),
        cordoned: false,
        checks: vec![],
        exit: None,
        restarts: 0,
        problem: None,
        over: false,
        unconfirmed: false,
        due_ms: None,
        containers: vec![],
        updated_at_ms: now_ms(),
    }
}

pub fn assignment(number: u32, host: &str) -> MachineAssignment {
    let spec = serde_json::json!({
        "version": MachineVersion::new(1, [0; 10]), "org": "personal", "app": "web", "process_group": "app", "release": 1,
        "image": {"repository": "web", "digest": format!("sha256:{}", "a".repeat(64))},
        "env": {"TEXT": "x".repeat(700)},
        "guest": {"cpu_kind": "shared", "cpus": 1, "memory_mb": 256},
    });
    MachineAssignment {
        id: machine_id(number),
        name: format!("machine-{number}"),
        host: id(host),
        region: "fra".parse().unwrap(),
        address: std::net::Ipv4Addr::from(0x0ac9_0000 + number),
        placement: Generation { incarnation: 1, revision: 1 },
        created_at_ms: 0,
        spec: serde_json::from_value(spec).unwrap(),
    }
}

pub fn config(revision: u64) -> ConfigState {
    ConfigState { generation: Generation { incarnation: 1, revision }, ..ConfigState::default() }
}

/// Waits until it is so.
pub async fn until(what: &str, is_so: impl Fn() -> bool) {
    let wait = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(DEADLINE, wait).await.unwrap_or_else(|_| panic!("{what}: still not so after {DEADLINE:?}"));
}

pub async fn all_see_each_other(hosts: &[Host]) {
    until("all are members", || hosts.iter().all(|host| hosts.iter().all(|other| host.cluster.is_up(other.cluster.host())))).await;
}
