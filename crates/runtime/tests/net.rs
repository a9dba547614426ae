//! The machines' network with real sockets. Every test makes its own namespaces: one plays the host, where the code
//! under test runs, one the internet, and one per machine. Nothing of the true host's network is touched.
#![allow(unsafe_code)] // `pre_exec` moves the child before it runs

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use dunlin_runtime::net::firewall::{Firewall, Ipv4Prefix, MachineRule, Strain};
use dunlin_runtime::net::{self, NetError, NetSpec};
use nix::sched::{CloneFlags, setns, unshare};

const ALLOWED: Duration = Duration::from_secs(5);
/// Long enough for a packet within one kernel, many times over; what is dropped costs this much per check.
const DENIED: Duration = Duration::from_millis(400);
const HOST: &str = "198.51.100.2";
const HOST_SECOND: &str = "198.51.100.3";
const SERVER: &str = "203.0.113.80";
const RESOLVER: &str = "10.255.255.53";
const PRIVATE: [&str; 6] = ["10.99.0.1", "172.16.0.9", "192.168.7.7", "100.64.0.1", "169.254.169.254", RESOLVER];

/// A network namespace that lives as long as its descriptor.
#[derive(Clone)]
struct Ns(Arc<OwnedFd>);

impl Ns {
    fn new() -> Self {
        std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("new network namespace");
            Ns(Arc::new(File::open("/proc/thread-self/ns/net").expect("open namespace").into()))
        })
        .join()
        .expect("namespace thread")
    }

    fn of(pid: u32) -> Self {
        Ns(Arc::new(File::open(format!("/proc/{pid}/ns/net")).expect("open namespace").into()))
    }

    fn spawn<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        let ns = self.clone();
        std::thread::spawn(move || {
            setns(ns.0.as_fd(), CloneFlags::CLONE_NEWNET).expect("enter namespace");
            work()
        })
    }

    fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        match self.spawn(work).join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    fn sh(&self, script: &str) -> String {
        let script = script.to_owned();
        self.run(move || {
            let output = Command::new("sh").args(["-ec", &script]).output().expect("run sh");
            assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8_lossy(&output.stdout).into_owned()
        })
    }
}

/// A TCP server that answers with the address it sees; ends with the value.
struct Server {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    addr: SocketAddr,
    ns: Ns,
}

impl Server {
    fn start(ns: &Ns, addr: &str) -> Self {
        let bind = addr.to_owned();
        let listener = ns.run(move || TcpListener::bind(&bind).expect("listen"));
        let addr = listener.local_addr().expect("address");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                if let Ok(mut stream) = stream {
                    let peer = stream.peer_addr().map(|peer| peer.ip().to_string()).unwrap_or_default();
                    let _client_may_be_gone = stream.write_all(peer.as_bytes());
                }
            }
        });
        Server { stop, thread: Some(thread), addr, ns: ns.clone() }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let addr = SocketAddr::new(if self.addr.ip().is_unspecified() { IpAddr::V4(Ipv4Addr::LOCALHOST) } else { self.addr.ip() }, self.addr.port());
        let woken = self.ns.run(move || TcpStream::connect_timeout(&addr, ALLOWED).is_ok());
        if let Some(thread) = self.thread.take()
            && woken
        {
            thread.join().expect("server thread");
        }
    }
}

/// A process in a network namespace that belongs to its own user namespace, as a machine's does.
struct Machine {
    child: Child,
    ns: Ns,
    spec: NetSpec,
}

impl Machine {
    fn start(id: &str, addr: &str, group: u32) -> Self {
        let mut command = Command::new("sleep");
        command.arg("300").stdin(Stdio::null());
        // SAFETY: one system call between fork and exec.
        unsafe {
            command.pre_exec(|| {
                unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET).map_err(std::io::Error::from)
            });
        }
        let child = command.spawn().expect("start");
        let ns = Ns::of(child.id());
        Machine { ns, spec: NetSpec::new(format!("dl{}", &id[..12]), addr.parse().expect("address"), group), child }
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("pid")
    }

    fn rule(&self) -> MachineRule {
        MachineRule { ifname: self.spec.ifname.clone(), addr: self.spec.addr }
    }

    fn attach(&self, host: &Ns) -> Result<(), NetError> {
        let (spec, pid) = (self.spec.clone(), self.pid());
        host.run(move || net::attach(&spec, pid))
    }

    fn reaches(&self, addr: &str) -> Option<String> {
        reach(&self.ns, addr, ALLOWED)
    }

    fn denied(&self, addr: &str) {
        assert_eq!(reach(&self.ns, addr, DENIED), None, "the machine reached {addr}");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }
}

/// What the server at `addr` answers; `None` when there is no connection.
fn reach(ns: &Ns, addr: &str, timeout: Duration) -> Option<String> {
    let addr: SocketAddr = addr.parse().expect("socket address");
    ns.run(move || {
        let mut stream = TcpStream::connect_timeout(&addr, timeout).ok()?;
        stream.set_read_timeout(Some(timeout)).expect("timeout");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    })
}

/// Host and internet with a link between them. The internet has no route to machines.
struct Lab {
    host: Ns,
    internet: Ns,
    firewall: Firewall,
}

impl Lab {
    fn new(table: &str) -> Self {
        let (host, internet) = (Ns::new(), Ns::new());
        let far_end = internet.0.clone();
        // A new namespace forwards if the computer does.
        host.sh("ip link set lo up; ip link add up0 type veth peer name net0; echo 0 >/proc/sys/net/ipv4/ip_forward");
        host.run(move || {
            use std::os::fd::AsRawFd;
            let path = format!("/proc/{}/fd/{}", std::process::id(), far_end.as_raw_fd());
            assert!(Command::new("ip").args(["link", "set", "net0", "netns", &path]).status().expect("ip").success());
        });
        let mut script = "ip link set lo up; ip addr add 198.51.100.1/24 dev net0; ip link set net0 up;".to_owned();
        for addr in PRIVATE.iter().chain([&SERVER]) {
            script.push_str(&format!("ip addr add {addr}/32 dev lo;"));
        }
        internet.sh(&script);
        host.sh(&format!(
            "ip addr add {HOST}/24 dev up0; ip addr add {HOST_SECOND}/24 dev up0; ip link set up0 mtu 1400 up;
             ip route add default via 198.51.100.1"
        ));
        let firewall = Firewall::new(table, prefix("10.201.0.0/16"), vec![RESOLVER.parse().expect("address")]).expect("firewall");
        Lab { host, internet, firewall }
    }

    fn on_host<T: Send + 'static>(&self, work: impl FnOnce(&Firewall) -> T + Send + 'static) -> T {
        let firewall = self.firewall.clone();
        self.host.run(move || work(&firewall))
    }

    /// A machine that is pinned and attached.
    fn machine(&self, id: &str, addr: &str) -> Machine {
        let machine = Machine::start(id, addr, self.firewall.group());
        let rule = machine.rule();
        self.on_host(move |firewall| firewall.add_machine(&rule)).expect("pin");
        machine.attach(&self.host).expect("attach");
        machine
    }
}

fn prefix(text: &str) -> Ipv4Prefix {
    text.parse().expect("prefix")
}

#[test]
fn the_host_reaches_the_machine_and_nothing_stays_after_detach() {
    let lab = Lab::new("dunlin_attach");
    let mut machine = Machine::start("a1b2c3d4e5f607", "10.201.0.5", lab.firewall.group());
    machine.spec.mtu = lab.host.run(net::uplink_mtu).expect("mtu");
    assert_eq!(machine.spec.mtu, Some(1400));
    machine.attach(&lab.host).expect("attach");

    let server = Server::start(&machine.ns, "0.0.0.0:8080");
    assert_eq!(reach(&lab.host, "10.201.0.5:8080", ALLOWED).as_deref(), Some("169.254.1.1"));
    let loopback = Server::start(&machine.ns, "[::1]:8081");
    assert_eq!(reach(&machine.ns, "[::1]:8081", ALLOWED).as_deref(), Some("::1"));
    drop((server, loopback));

    let inside = machine.ns.sh("ip -o addr; ip route; ip neigh; cat /sys/class/net/lo/operstate");
    assert!(inside.contains("10.201.0.5/32"), "{inside}");
    assert!(inside.contains("default via 169.254.1.1 dev eth0"), "{inside}");
    assert!(inside.contains("169.254.1.1 dev eth0 lladdr 02:64:a9:fe:01:01 PERMANENT"), "{inside}");
    assert!(!inside.contains("fe80"), "{inside}");
    let outside = lab.host.sh("ip -d -o link show dla1b2c3d4e5f6; ip -o addr show dla1b2c3d4e5f6; ip neigh; ip route");
    assert!(outside.contains("mtu 1400") && outside.contains(&format!("group {}", lab.firewall.group())), "{outside}");
    assert!(outside.contains("10.201.0.5 dev dla1b2c3d4e5f6 lladdr 02:64:0a:c9:00:05 PERMANENT"), "{outside}");
    assert!(!outside.contains("fe80"), "{outside}");

    assert!(matches!(machine.attach(&lab.host), Err(NetError::AlreadyExists(_))));
    assert_eq!(lab.host.run(|| net::list("dl")).expect("list"), ["dla1b2c3d4e5f6"]);
    assert!(lab.host.run(|| net::detach("dla1b2c3d4e5f6")).expect("detach"));
    assert!(!lab.host.run(|| net::detach("dla1b2c3d4e5f6")).expect("detach again"));
    assert_eq!(lab.host.run(|| net::list("dl")).expect("list"), Vec::<String>::new());
    assert!(!lab.host.sh("ip route; ip neigh").contains("10.201.0.5"));
    machine.attach(&lab.host).expect("attach again");
}

#[test]
fn the_own_namespace_and_group_zero_are_refused() {
    let host = Ns::new();
    let spec = NetSpec::new("dla1b2c3d4e5f6".into(), Ipv4Addr::new(10, 201, 0, 5), 7);
    let child = host.run(|| Command::new("sleep").arg("300").spawn().expect("start"));
    let pid = i32::try_from(child.id()).expect("pid");
    let same = spec.clone();
    let refused = host.run(move || net::attach(&same, pid));
    let ungrouped = NetSpec { group: 0, ..spec };
    let no_group = host.run(move || net::attach(&ungrouped, pid));
    let mut child = child;
    child.kill().expect("kill");
    child.wait().expect("wait");
    assert!(matches!(refused, Err(NetError::SameNamespace(_))), "{refused:?}");
    assert!(matches!(no_group, Err(NetError::NoGroup)), "{no_group:?}");
}

/// Two servers with one prefix on a computer: neither takes what the other has.
#[test]
fn an_address_has_one_machine() {
    let lab = Lab::new("dunlin_twice");
    lab.on_host(|firewall| firewall.apply(&[])).expect("apply");
    let one = lab.machine("3333333333aaaa", "10.201.0.5");
    let two = lab.machine("4444444444bbbb", "10.201.0.6");
    let mut again = two.spec.clone();
    again.addr = one.spec.addr;
    again.ifname = "dl555555555555".into();
    let pid = i32::try_from(two.child.id()).expect("pid");
    lab.host.run({
        let ifname = two.spec.ifname.clone();
        move || net::detach(&ifname).expect("detach")
    });
    let refused = lab.host.run(move || net::attach(&again, pid));
    assert!(matches!(&refused, Err(NetError::AddressTaken { ifname, .. }) if *ifname == one.spec.ifname), "{refused:?}");
    assert_eq!(lab.host.run(|| net::list("dl")).expect("list"), [one.spec.ifname.as_str()]);
    assert!(lab.host.sh("ip route get 10.201.0.5").contains(&one.spec.ifname));
    let group = one.spec.group;
    let prefix: Ipv4Prefix = "10.201.0.0/24".parse().expect("prefix");
    assert_eq!(lab.host.run(move || net::taken_by_another(prefix, group)).expect("look"), None);
    let taken = lab.host.run(move || net::taken_by_another(prefix, group + 1)).expect("look");
    assert_eq!(taken, Some((one.spec.addr, one.spec.ifname.clone())));
    let other: Ipv4Prefix = "10.202.0.0/24".parse().expect("prefix");
    assert_eq!(lab.host.run(move || net::taken_by_another(other, group + 1)).expect("look"), None);
}

#[test]
fn a_machine_reaches_the_internet_and_the_resolvers_and_nothing_else() {
    let lab = Lab::new("dunlin_paths");
    let applied = lab.on_host(|firewall| firewall.apply(&[])).expect("apply");
    assert!(applied.ip_forward_enabled);
    let one = lab.machine("1111111111aaaa", "10.201.0.1");
    let two = lab.machine("2222222222bbbb", "10.201.0.2");
    let _internet: Vec<Server> = ["0.0.0.0:80", "0.0.0.0:53"].iter().map(|addr| Server::start(&lab.internet, addr)).collect();
    let _host = Server::start(&lab.host, "0.0.0.0:9000");
    let _machine = Server::start(&two.ns, "0.0.0.0:8080");

    // Allowed: the internet from the host's address, the resolver's port 53, connections from the host.
    assert_eq!(one.reaches(&format!("{SERVER}:80")).as_deref(), Some(HOST));
    assert_eq!(one.reaches(&format!("{RESOLVER}:53")).as_deref(), Some(HOST));
    assert_eq!(reach(&lab.host, "10.201.0.2:8080", ALLOWED).as_deref(), Some("169.254.1.1"));
    // All targets below are alive: the host reaches them.
    for addr in PRIVATE {
        assert!(reach(&lab.host, &format!("{addr}:80"), ALLOWED).is_some(), "{addr}");
    }
    assert!(reach(&lab.internet, &format!("{HOST}:9000"), ALLOWED).is_some());

    for addr in PRIVATE {
        one.denied(&format!("{addr}:80"));
    }
    one.denied("10.99.0.1:53");
    one.denied("10.201.0.2:8080");
    for addr in [HOST, HOST_SECOND, "169.254.1.1"] {
        one.denied(&format!("{addr}:9000"));
    }
    // Nobody routes into a machine from outside.
    lab.internet.sh(&format!("ip route add 10.201.0.0/16 via {HOST}"));
    assert_eq!(reach(&lab.internet, "10.201.0.2:8080", DENIED), None);

    // What the operator opens is open.
    let opened = lab.firewall.clone().allow(vec![prefix("10.99.0.0/24")]);
    let rules = [one.rule(), two.rule()];
    lab.host.run(move || opened.apply(&rules)).expect("apply");
    assert_eq!(one.reaches("10.99.0.1:80").as_deref(), Some(HOST));
    one.denied("172.16.0.9:80");

    // Without the table the same paths are open: it was the table that closed them, and all of it goes.
    lab.on_host(|firewall| firewall.remove()).expect("remove");
    assert_eq!(lab.host.sh("nft list ruleset"), "");
    assert_eq!(lab.host.sh("cat /proc/sys/net/ipv4/ip_forward").trim(), "0");
    assert_eq!(one.reaches(&format!("{HOST}:9000")).as_deref(), Some("10.201.0.1"));
    lab.host.sh("echo 1 >/proc/sys/net/ipv4/ip_forward");
    assert_eq!(one.reaches("10.201.0.2:8080").as_deref(), Some("10.201.0.1"));
}

#[test]
fn whoever_has_the_address_of_a_machine_that_is_not_up_elsewhere_gets_nothing_of_the_host() {
    let lab = Lab::new("dunlin_away");
    lab.internet.sh("ip addr add 10.201.0.77/32 dev lo");
    let _stranger = Server::start(&lab.internet, "0.0.0.0:8080");
    assert!(reach(&lab.host, "10.201.0.77:8080", ALLOWED).is_some(), "the default route leads there");
    lab.on_host(|firewall| firewall.apply(&[])).expect("apply");
    let target = "10.201.0.77:8080".parse().expect("address");
    let refused = lab.host.run(move || TcpStream::connect_timeout(&target, ALLOWED).map(drop).map_err(|e| e.kind()));
    assert_eq!(refused, Err(std::io::ErrorKind::ConnectionRefused));
    let one = lab.machine("7777777777aaaa", "10.201.0.77");
    let _machine = Server::start(&one.ns, "0.0.0.0:8080");
    assert!(reach(&lab.host, "10.201.0.77:8080", ALLOWED).is_some());
}

#[test]
fn an_interface_is_closed_until_its_machine_is_added_and_again_after() {
    let lab = Lab::new("dunlin_pins");
    lab.on_host(|firewall| firewall.apply(&[])).expect("apply");
    let _server = Server::start(&lab.internet, "0.0.0.0:80");
    let target = format!("{SERVER}:80");
    let machine = Machine::start("3333333333cccc", "10.201.0.3", lab.firewall.group());
    machine.attach(&lab.host).expect("attach");
    machine.denied(&target);
    let rule = machine.rule();
    lab.on_host(move |firewall| firewall.add_machine(&rule)).expect("add");
    assert_eq!(machine.reaches(&target).as_deref(), Some(HOST));

    // Another source address than its own gets nowhere, not even to the internet.
    machine.ns.sh("ip addr add 10.201.0.66/32 dev eth0");
    let from = |addr: &'static str, timeout: Duration| {
        let output = machine.ns.run(move || {
            Command::new("python3")
                .args(["-c", "import socket,sys\ns=socket.create_connection((sys.argv[2],80),float(sys.argv[3]),(sys.argv[1],0))\nprint(s.recv(99).decode())"])
                .args([addr, SERVER, &timeout.as_secs_f32().to_string()])
                .output()
                .expect("python3")
        });
        output.status.success()
    };
    assert!(from("10.201.0.3", ALLOWED));
    assert!(!from("10.201.0.66", DENIED));

    // A swap of the whole table, and a second one by a new process, keep what they are given.
    let rule = machine.rule();
    let again = lab.on_host(move |firewall| firewall.apply(std::slice::from_ref(&rule))).expect("apply");
    assert!(!again.ip_forward_enabled);
    assert_eq!(machine.reaches(&target).as_deref(), Some(HOST));
    for _ in 0..2 {
        let rule = machine.rule();
        lab.on_host(move |firewall| firewall.remove_machine(&rule)).expect("remove");
    }
    machine.denied(&target);
    lab.on_host(|firewall| firewall.remove()).expect("remove");
    assert_eq!(lab.host.sh("cat /proc/sys/net/ipv4/ip_forward").trim(), "0");
}

#[test]
fn udp_multicast_and_ipv6_do_not_reach_the_host() {
    let lab = Lab::new("dunlin_odd");
    lab.on_host(|firewall| firewall.apply(&[])).expect("apply");
    let machine = lab.machine("4444444444dddd", "10.201.0.4");
    let ifname = machine.spec.ifname.clone();
    // As a machine with much power, and a careless host, could have it.
    machine.ns.sh("echo 0 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6; ip -6 addr add fe80::4/64 dev eth0 nodad; ip route add 224.0.0.0/4 dev eth0");
    lab.host.sh(&format!("echo 0 >/proc/sys/net/ipv6/conf/{ifname}/disable_ipv6; ip -6 addr add fe80::1/64 dev {ifname} nodad"));
    let host_index = lab.host.sh(&format!("cat /proc/self/net/igmp >/dev/null; ip -o link show {ifname} | cut -d: -f1"));
    let machine_index: u32 = machine.ns.sh("ip -o link show eth0 | cut -d: -f1").trim().parse().expect("index");
    let host_index: u32 = host_index.trim().parse().expect("index");

    let four = lab.host.run(move || {
        let socket = UdpSocket::bind("0.0.0.0:5353").expect("bind");
        socket.join_multicast_v4(&Ipv4Addr::new(224, 0, 0, 251), &Ipv4Addr::new(169, 254, 1, 1)).expect("join");
        socket
    });
    let six = lab.host.run(move || {
        let socket = UdpSocket::bind("[::]:5454").expect("bind");
        socket.join_multicast_v6(&"ff02::fb".parse().expect("address"), host_index).expect("join");
        socket
    });
    let send = |to: String| {
        machine.ns.run(move || {
            let to: SocketAddr = to.parse().expect("address");
            let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).expect("bind");
            socket.send_to(b"x", to).expect("send");
        });
    };
    let targets = [
        (&four, format!("{HOST}:5353")),
        (&four, "224.0.0.251:5353".to_owned()),
        (&six, format!("[fe80::1%{machine_index}]:5454")),
        (&six, format!("[ff02::fb%{machine_index}]:5454")),
    ];
    for (socket, to) in &targets {
        send(to.clone());
        assert!(!got(socket, DENIED), "{to} came through");
    }
    lab.on_host(|firewall| firewall.remove()).expect("remove");
    for (socket, to) in &targets {
        send(to.clone());
        assert!(got(socket, ALLOWED), "{to} should arrive without the firewall");
    }
}

/// The kernel keeps all connections of a host in one table, and drops everybody's new ones once it is full.
#[test]
fn a_machine_takes_no_more_than_its_part_of_the_connections() {
    const MOST: u16 = 50;
    let lab = Lab::new("dunlin_part");
    lab.host.run({
        let firewall = lab.firewall.clone().with_connections_max(u32::from(MOST));
        move || firewall.apply(&[])
    })
    .expect("apply");
    let greedy = lab.machine("7777777777dddd", "10.201.0.7");
    let other = lab.machine("8888888888dddd", "10.201.0.8");
    let _server = Server::start(&lab.internet, "0.0.0.0:80");
    let received = lab.internet.run(|| UdpSocket::bind("0.0.0.0:7000").expect("bind"));
    // Every source port is a connection of its own to the kernel.
    greedy.ns.run(|| {
        for _ in 0..3 * MOST {
            UdpSocket::bind("0.0.0.0:0").expect("bind").send_to(b"x", (SERVER, 7000)).expect("send");
        }
    });
    let mut through = 0;
    while got(&received, DENIED) {
        through += 1;
    }
    assert!((MOST / 2..=MOST + 2).contains(&through), "{through} of {} came through", 3 * MOST);
    greedy.denied(&format!("{SERVER}:80"));
    assert_eq!(other.reaches(&format!("{SERVER}:80")).as_deref(), Some(HOST));
}

/// That table is the host's, too: machines together leave it some, and who has few connections is refused last.
#[test]
fn all_machines_together_leave_connections_to_the_host() {
    let lab = Lab::new("dunlin_strain");
    let firewall = lab.firewall.clone().with_connections_max(64);
    lab.host.run({
        let firewall = firewall.clone();
        move || firewall.apply(&[])
    })
    .expect("apply");
    let greedy = lab.machine("7777777777eeee", "10.201.0.7");
    let other = lab.machine("8888888888eeee", "10.201.0.8");
    let _server = Server::start(&lab.internet, "0.0.0.0:80");
    let received = lab.internet.run(|| UdpSocket::bind((SERVER, 7000)).expect("bind"));
    let target = format!("{SERVER}:80");
    greedy.ns.run(|| {
        for _ in 0..20 {
            UdpSocket::bind("0.0.0.0:0").expect("bind").send_to(b"x", (SERVER, 7000)).expect("send");
        }
    });
    assert_eq!((0..20).filter(|_| got(&received, DENIED)).count(), 20);
    let talking = other.ns.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").expect("bind");
        socket.send_to(b"x", (SERVER, 7000)).expect("send");
        socket
    });
    let mut buffer = [0; 16];
    received.set_read_timeout(Some(ALLOWED)).expect("timeout");
    let (_, from) = received.recv_from(&mut buffer).expect("receive");
    received.send_to(b"y", from).expect("send");
    assert!(got(&talking, ALLOWED));
    let set = |strain: Strain| {
        let firewall = firewall.clone();
        lab.host.run(move || firewall.set_strain(strain)).expect("set");
    };
    set(Strain::Tight);
    greedy.denied(&target);
    assert_eq!(other.reaches(&target).as_deref(), Some(HOST));
    set(Strain::Full);
    greedy.denied(&target);
    other.denied(&target);
    // What is open stays open, and a table that is set anew is as strict.
    talking.send_to(b"x", (SERVER, 7000)).expect("send");
    assert!(got(&received, ALLOWED));
    let rules = [greedy.rule(), other.rule()];
    let again = firewall.clone().with_strain(Strain::Full);
    lab.host.run(move || again.apply(&rules)).expect("apply");
    assert!(lab.on_host(|firewall| firewall.is_applied()).expect("look"));
    other.denied(&target);
    set(Strain::None);
    assert!(lab.on_host(|firewall| firewall.is_applied()).expect("look"));
    assert_eq!(other.reaches(&target).as_deref(), Some(HOST));
    assert_eq!(greedy.reaches(&target).as_deref(), Some(HOST));
}

/// Between two looks at the table they cannot fill it.
#[test]
fn machines_begin_so_many_connections_in_a_second_and_no_more() {
    let lab = Lab::new("dunlin_rate");
    let firewall = lab.firewall.clone().with_new_connections(20);
    lab.host.run(move || firewall.apply(&[])).expect("apply");
    let machines = [lab.machine("7777777777ffff", "10.201.0.7"), lab.machine("8888888888ffff", "10.201.0.8")];
    let received = lab.internet.run(|| UdpSocket::bind("0.0.0.0:7000").expect("bind"));
    for machine in &machines {
        machine.ns.run(|| {
            for _ in 0..100 {
                UdpSocket::bind("0.0.0.0:0").expect("bind").send_to(b"x", (SERVER, 7000)).expect("send");
            }
        });
    }
    let mut through = 0;
    while got(&received, DENIED) {
        through += 1;
    }
    assert!((5..60).contains(&through), "{through} of 200 came through");
}

fn got(socket: &UdpSocket, timeout: Duration) -> bool {
    socket.set_read_timeout(Some(timeout)).expect("timeout");
    socket.recv(&mut [0; 16]).is_ok()
}

#[test]
fn a_foreign_chain_that_drops_is_passed_and_left_as_it_was() {
    let lab = Lab::new("dunlin_foreign");
    // As Docker leaves it.
    lab.host.sh("iptables -P FORWARD DROP; iptables -N DOCKER-USER; iptables -A FORWARD -j DOCKER-USER");
    lab.host.sh("nft 'table inet other { chain f { type filter hook forward priority 0; policy drop; }; }'");
    let before = lab.host.sh("iptables -S; nft list table inet other");
    let _server = Server::start(&lab.internet, "0.0.0.0:80");
    let target = format!("{SERVER}:80");

    // The chains do stop machines when nobody lets them through.
    lab.host.sh("nft 'table inet dunlin_foreign { chain forward { type filter hook forward priority -10; policy accept; }; }'; echo 1 >/proc/sys/net/ipv4/ip_forward");
    let machine = Machine::start("5555555555eeee", "10.201.0.5", lab.firewall.group());
    machine.attach(&lab.host).expect("attach");
    lab.host.sh("nft 'table ip nat2 { chain p { type nat hook postrouting priority 100; ip saddr 10.201.0.0/16 masquerade; }; }'");
    machine.denied(&target);
    lab.host.sh("nft delete table ip nat2; echo 0 >/proc/sys/net/ipv4/ip_forward");

    let rule = machine.rule();
    let applied = lab.on_host(move |firewall| firewall.apply(&[rule])).expect("apply");
    assert_eq!(applied.foreign_chains.len(), 2, "{applied:?}");
    assert_eq!(machine.reaches(&target).as_deref(), Some(HOST));
    let rules = lab.host.sh("iptables -S FORWARD");
    assert!(rules.contains("-i dl+") && rules.contains("-o dl+"), "{rules}");
    // A second time adds nothing.
    let rule = machine.rule();
    lab.on_host(move |firewall| firewall.apply(&[rule])).expect("apply again");
    assert_eq!(lab.host.sh("iptables -S FORWARD"), rules);

    // Docker's own NAT keeps forwarding on when we leave.
    lab.host.sh("iptables -t nat -A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE");
    let notes = lab.on_host(|firewall| firewall.remove()).expect("remove");
    assert!(notes.iter().any(|note| note.contains("ip_forward")), "{notes:?}");
    assert_eq!(lab.host.sh("cat /proc/sys/net/ipv4/ip_forward").trim(), "1");
    assert_eq!(lab.host.sh("iptables -S; nft list table inet other"), before);
}

#[test]
fn the_old_iptables_that_drops_is_passed_and_left_as_it_was() {
    let lab = Lab::new("dunlin_legacy");
    lab.host.sh("iptables-legacy -P FORWARD DROP");
    let before = lab.host.sh("iptables-legacy -S");
    let _server = Server::start(&lab.internet, "0.0.0.0:80");
    let applied = lab.on_host(|firewall| firewall.apply(&[])).expect("apply");
    assert_eq!(applied.foreign_chains, ["iptables-legacy filter FORWARD"]);
    let machine = lab.machine("8888888888bbbb", "10.201.0.8");
    let target = format!("{SERVER}:80");
    assert_eq!(machine.reaches(&target).as_deref(), Some(HOST));
    lab.host.sh("iptables-legacy -F FORWARD");
    machine.denied(&target);
    // Somebody flushed the chain: the next look mends it.
    let passed = lab.on_host(|firewall| firewall.pass_foreign_chains()).expect("pass");
    assert_eq!(passed.0.len(), 1);
    assert_eq!(machine.reaches(&target).as_deref(), Some(HOST));
    lab.on_host(|firewall| firewall.remove()).expect("remove");
    assert_eq!(lab.host.sh("iptables-legacy -S"), before);
}

/// A name in a set costs the same with many machines as with few, and so does an interface.
#[test]
fn many_machines_are_added_and_attached() {
    const MACHINES: u8 = 40;
    let lab = Lab::new("dunlin_many");
    lab.on_host(|firewall| firewall.apply(&[])).expect("apply");
    let started: Vec<Machine> = (0..MACHINES)
        .map(|n| Machine::start(&format!("{n:08x}aaaaaa"), &format!("10.201.1.{n}"), lab.firewall.group()))
        .collect();
    for machine in &started {
        let rule = machine.rule();
        lab.on_host(move |firewall| firewall.add_machine(&rule)).expect("add");
    }
    for machine in &started {
        machine.attach(&lab.host).expect("attach");
    }
    assert_eq!(lab.host.run(|| net::list("dl")).expect("list").len(), usize::from(MACHINES));
    // The end of a machine takes its interface along.
    drop(started);
    let begin = std::time::Instant::now();
    while !lab.host.run(|| net::list("dl")).expect("list").is_empty() {
        assert!(begin.elapsed() < Duration::from_secs(30), "interfaces of ended machines stay");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn two_instances_live_side_by_side() {
    let lab = Lab::new("dunlin_left");
    let right = Firewall::new("dunlin_right", prefix("10.202.0.0/16"), Vec::new()).expect("firewall");
    let other = right.clone();
    lab.on_host(|firewall| firewall.apply(&[])).expect("apply");
    lab.host.run(move || other.apply(&[])).expect("apply");
    let _server = Server::start(&lab.internet, "0.0.0.0:80");
    let left_machine = lab.machine("6666666666ffff", "10.201.0.6");
    let right_machine = Machine::start("7777777777aaaa", "10.202.0.7", right.group());
    let (other, rule) = (right.clone(), right_machine.rule());
    lab.host.run(move || other.add_machine(&rule)).expect("add");
    right_machine.attach(&lab.host).expect("attach");
    let target = format!("{SERVER}:80");
    assert_eq!(left_machine.reaches(&target).as_deref(), Some(HOST));
    assert_eq!(right_machine.reaches(&target).as_deref(), Some(HOST));
    let _left_server = Server::start(&left_machine.ns, "0.0.0.0:8080");
    right_machine.denied("10.201.0.6:8080");

    lab.on_host(|firewall| firewall.remove()).expect("remove");
    assert_eq!(right_machine.reaches(&target).as_deref(), Some(HOST), "the other's removal must not cut this one off");
}
