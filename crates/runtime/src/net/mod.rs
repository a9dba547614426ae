//! Networks of machines: one veth pair per machine, its addresses, routes and neighbours, and the host's firewall.
//!
//! ```text
//!   host                                   machine (own network namespace)
//!   169.254.1.1/32 dl1482e7a9d01c <------> eth0 10.201.0.5/32, default via 169.254.1.1
//!   10.201.0.5/32 dev dl1482e7a9d01c
//! ```
//!
//! There is no bridge: machines share no link, so that all they send passes the host's firewall. Addresses of the link
//! layer are fixed and neighbours permanent, so that nobody asks and nobody can answer wrongly. Owns interfaces whose
//! names it is given, and one nft table; never touches others, besides the accept rule that a foreign forward chain
//! with policy drop needs. Everything is blocking; no thread or process stays. Tested in `tests/net.rs`, with network
//! namespaces as host and internet.

pub mod firewall;
mod netlink;
pub mod ports;
mod resolvers;

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};

use firewall::Ipv4Prefix;
use netlink::Connection;
pub use resolvers::{Resolvers, resolvers};

/// The host as every machine sees it: its next hop, and the source of connections from the proxy.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// Name of the interface inside of the machine.
const MACHINE_IFNAME: &str = "eth0";
/// Every interface of every server's machines: foreign firewalls are told of them by this.
pub const IFNAME_PREFIX: &str = "dl";
/// The kernel's IFNAMSIZ less the closing zero.
const IFNAME_MAX: usize = 15;

#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error("{0:?} is no interface name: 1 to 15 of a-z A-Z 0-9 _ - are")]
    BadName(String),
    #[error("interface {0} exists already; detach it first")]
    AlreadyExists(String),
    #[error("process {0} is in the host's own network namespace; it needs one of its own before it can be attached")]
    SameNamespace(i32),
    #[error("interface group 0 is everybody's; take the number from the firewall")]
    NoGroup,
    /// Talking to the kernel failed; `what` names the one operation.
    #[error("cannot {what}")]
    Io { what: String, source: io::Error },
    #[error("nft refused to {what}: {output}")]
    Nft { what: &'static str, output: String },
    #[error("{0} is needed for the machines' firewall but was not found in /usr/sbin, /sbin, /usr/bin or /usr/local/sbin; install nftables")]
    NoNft(&'static str),
    /// Another server on this computer has it, or something else does.
    #[error("address {addr} is routed to interface {ifname} already; every server on a computer needs a machine prefix of its own")]
    AddressTaken { addr: Ipv4Addr, ifname: String },
    #[error("{0}")]
    Invalid(String),
}

pub type Result<T> = std::result::Result<T, NetError>;

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> NetError {
    let what = what.into();
    move |source| NetError::Io { what, source }
}

/// A machine's network as its supervisor needs it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetSpec {
    /// Host side interface.
    pub ifname: String,
    pub addr: Ipv4Addr,
    pub gateway: Ipv4Addr,
    /// The firewall's interface group; set as the interface is made, so that it is never without rules.
    pub group: u32,
    /// `None` is the kernel's 1500.
    #[serde(default)]
    pub mtu: Option<u32>,
}

impl NetSpec {
    pub fn new(ifname: String, addr: Ipv4Addr, group: u32) -> Self {
        NetSpec { ifname, addr, gateway: GATEWAY, group, mtu: None }
    }
}

pub(crate) fn check_ifname(name: &str) -> Result<()> {
    let fits = !name.is_empty()
        && name.len() <= IFNAME_MAX
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    if fits { Ok(()) } else { Err(NetError::BadName(name.chars().take(64).collect())) }
}

/// Connects the network namespace of process `pid` to the host. On an error nothing stays behind.
pub fn attach(spec: &NetSpec, pid: i32) -> Result<()> {
    check_ifname(&spec.ifname)?;
    if spec.group == 0 {
        return Err(NetError::NoGroup);
    }
    let machine_ns = open_netns(&format!("/proc/{pid}/ns/net"))?;
    let host_ns = open_netns("/proc/thread-self/ns/net")?;
    if same_file(&machine_ns, &host_ns)? {
        return Err(NetError::SameNamespace(pid));
    }
    let mut host = Connection::open().map_err(io_error("open a netlink socket"))?;
    create_pair(&mut host, spec, &machine_ns)?;
    let done = configure_host(&mut host, spec).and_then(|()| inside(&machine_ns, &host_ns, || configure_machine(spec)));
    if let Err(error) = done {
        if let Err(left) = detach(&spec.ifname) {
            tracing::warn!(ifname = %spec.ifname, error = %left, "a half attached interface stays behind");
        }
        return Err(error);
    }
    Ok(())
}

/// Removes the pair, both ends at once. False: there was none (the machine's end took it along).
pub fn detach(ifname: &str) -> Result<bool> {
    check_ifname(ifname)?;
    let mut host = Connection::open().map_err(io_error("open a netlink socket"))?;
    let mut link = LinkMessage::default();
    link.attributes.push(LinkAttribute::IfName(ifname.to_owned()));
    match host.request(RouteNetlinkMessage::DelLink(link), 0) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(false),
        Err(source) => Err(NetError::Io { what: format!("remove interface {ifname}"), source }),
    }
}

/// Of a network namespace that was just made.
pub(crate) fn raise_loopback() -> Result<()> {
    let mut connection = Connection::open().map_err(io_error("open a netlink socket"))?;
    set_up(&mut connection, index_of("lo")?, "lo")
}

/// Makes a pair within the calling thread's namespace, for the feature check: it leaves the pair to the namespace's end.
pub(crate) fn probe_veth() -> Result<()> {
    let mut connection = Connection::open().map_err(io_error("open a netlink socket"))?;
    let mut peer = LinkMessage::default();
    peer.attributes = vec![LinkAttribute::IfName("probe1".to_owned())];
    let mut link = LinkMessage::default();
    link.attributes = vec![LinkAttribute::IfName("probe0".to_owned()), pair(peer)];
    connection
        .request(RouteNetlinkMessage::NewLink(link), NLM_F_CREATE | NLM_F_EXCL)
        .map_err(io_error("make an interface pair"))
}

/// Interfaces of this namespace whose names start with `prefix`, sorted.
pub fn list(prefix: &str) -> Result<Vec<String>> {
    let mut names: Vec<String> =
        links()?.into_iter().map(|link| link.name).filter(|name| name.starts_with(prefix)).collect();
    names.sort();
    Ok(names)
}

/// MTU of the interface that the default route leaves by. Machines take the same, or else packets that are too long
/// die at the host.
pub fn uplink_mtu() -> Result<Option<u32>> {
    let table = std::fs::read_to_string("/proc/thread-self/net/route").map_err(io_error("read the routes"))?;
    let uplink = table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let is_default = fields.get(1) == Some(&"00000000") && fields.get(7) == Some(&"00000000");
            is_default.then(|| (fields[6].parse::<u32>().unwrap_or(u32::MAX), fields[0].to_owned()))
        })
        .min();
    let Some((_, uplink)) = uplink else { return Ok(None) };
    Ok(links()?.into_iter().find(|link| link.name == uplink).and_then(|link| link.mtu))
}

/// An address of the network that another server's machine has: two servers with one prefix would take each
/// other's routes.
pub fn taken_by_another(prefix: Ipv4Prefix, group: u32) -> Result<Option<(Ipv4Addr, String)>> {
    let foreign: BTreeSet<String> = links()?
        .into_iter()
        .filter(|link| link.name.starts_with(IFNAME_PREFIX) && link.group != Some(group))
        .map(|link| link.name)
        .collect();
    Ok(host_routes()?.into_iter().find(|(addr, ifname)| prefix.contains(*addr) && foreign.contains(ifname)))
}

/// IPv4 addresses of this network that are not loopback's.
pub fn addresses() -> Result<Vec<Ipv4Addr>> {
    let mut host = Connection::open().map_err(io_error("open a netlink socket"))?;
    let mut wanted = AddressMessage::default();
    wanted.header.family = AddressFamily::Inet;
    let answers = host.dump(RouteNetlinkMessage::GetAddress(wanted), NLM_F_DUMP).map_err(io_error("list the addresses"))?;
    let attributes = answers.into_iter().filter_map(|answer| match answer {
        RouteNetlinkMessage::NewAddress(address) => Some(address.attributes),
        _ => None,
    });
    let addresses = attributes.flatten().filter_map(|attribute| match attribute {
        AddressAttribute::Local(IpAddr::V4(addr)) if !addr.is_loopback() => Some(addr),
        _ => None,
    });
    Ok(addresses.collect::<BTreeSet<_>>().into_iter().collect())
}

/// Routes to single addresses, and their interfaces.
fn host_routes() -> Result<Vec<(Ipv4Addr, String)>> {
    let table = std::fs::read_to_string("/proc/thread-self/net/route").map_err(io_error("read the routes"))?;
    let routes = table.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if fields.get(7) != Some(&"FFFFFFFF") {
            return None;
        }
        // The kernel prints the address as it lies in memory.
        let addr = Ipv4Addr::from(u32::from_str_radix(fields[1], 16).ok()?.to_ne_bytes());
        Some((addr, fields[0].to_owned()))
    });
    Ok(routes.collect())
}

struct Link {
    name: String,
    mtu: Option<u32>,
    group: Option<u32>,
}

fn links() -> Result<Vec<Link>> {
    let mut host = Connection::open().map_err(io_error("open a netlink socket"))?;
    let answers = host
        .dump(RouteNetlinkMessage::GetLink(LinkMessage::default()), NLM_F_DUMP)
        .map_err(io_error("list the interfaces"))?;
    let mut found = Vec::new();
    for answer in answers {
        let RouteNetlinkMessage::NewLink(link) = answer else { continue };
        let (mut name, mut mtu, mut group) = (None, None, None);
        for attribute in link.attributes {
            match attribute {
                LinkAttribute::IfName(value) => name = Some(value),
                LinkAttribute::Mtu(value) => mtu = Some(value),
                LinkAttribute::Group(value) => group = Some(value),
                _ => {}
            }
        }
        found.extend(name.map(|name| Link { name, mtu, group }));
    }
    Ok(found)
}

/// The peer is made within the machine's namespace: it is never seen on the host, and cannot clash with a name there.
fn create_pair(host: &mut Connection, spec: &NetSpec, machine_ns: &OwnedFd) -> Result<()> {
    let mut peer = LinkMessage::default();
    peer.attributes = vec![
        LinkAttribute::IfName(MACHINE_IFNAME.to_owned()),
        LinkAttribute::Address(mac(spec.addr)),
        LinkAttribute::NetNsFd(machine_ns.as_raw_fd()),
    ];
    let mut link = LinkMessage::default();
    link.attributes = vec![
        LinkAttribute::IfName(spec.ifname.clone()),
        LinkAttribute::Address(mac(spec.gateway)),
        LinkAttribute::Group(spec.group),
    ];
    if let Some(mtu) = spec.mtu {
        peer.attributes.push(LinkAttribute::Mtu(mtu));
        link.attributes.push(LinkAttribute::Mtu(mtu));
    }
    link.attributes.push(pair(peer));
    match host.request(RouteNetlinkMessage::NewLink(link), NLM_F_CREATE | NLM_F_EXCL) {
        Ok(()) => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Err(NetError::AlreadyExists(spec.ifname.clone())),
        Err(source) => Err(NetError::Io { what: format!("make the interface pair {}", spec.ifname), source }),
    }
}

fn pair(peer: LinkMessage) -> LinkAttribute {
    LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth), LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer)))])
}

fn configure_host(host: &mut Connection, spec: &NetSpec) -> Result<()> {
    let name = spec.ifname.as_str();
    // Before the interface is up: otherwise the kernel gives it an IPv6 link-local address at once.
    set_sysctl_if_there(&format!("net/ipv6/conf/{name}/disable_ipv6"), "1")?;
    set_sysctl(&format!("net/ipv4/conf/{name}/rp_filter"), "1")?;
    set_sysctl(&format!("net/ipv4/conf/{name}/accept_redirects"), "0")?;
    set_sysctl(&format!("net/ipv4/conf/{name}/send_redirects"), "0")?;
    set_sysctl(&format!("net/ipv4/conf/{name}/forwarding"), "1")?;
    let index = index_of(name)?;
    add_address(host, index, spec.gateway)?;
    set_up(host, index, name)?;
    add_neighbour(host, index, spec.addr)?;
    add_route(host, index, Route::Host { to: spec.addr, source: spec.gateway })
}

/// Runs within the machine's namespace.
fn configure_machine(spec: &NetSpec) -> Result<()> {
    let mut machine = Connection::open().map_err(io_error("open a netlink socket in the machine"))?;
    set_up(&mut machine, index_of("lo")?, "lo")?;
    // Machines have no IPv6 to the outside; `::1` on lo stays, as many programs listen on `::`.
    set_sysctl_if_there("net/ipv6/conf/default/disable_ipv6", "1")?;
    set_sysctl_if_there(&format!("net/ipv6/conf/{MACHINE_IFNAME}/disable_ipv6"), "1")?;
    // Apps that run as another user than root listen on 80 and 443 here; the namespace is the machine's alone.
    set_sysctl("net/ipv4/ip_unprivileged_port_start", "0")?;
    let index = index_of(MACHINE_IFNAME)?;
    add_address(&mut machine, index, spec.addr)?;
    set_up(&mut machine, index, MACHINE_IFNAME)?;
    add_neighbour(&mut machine, index, spec.gateway)?;
    add_route(&mut machine, index, Route::Host { to: spec.gateway, source: spec.addr })?;
    add_route(&mut machine, index, Route::Default { via: spec.gateway, source: spec.addr })
}

fn set_up(connection: &mut Connection, index: u32, name: &str) -> Result<()> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    connection
        .request(RouteNetlinkMessage::SetLink(link), 0)
        .map_err(io_error(format!("bring interface {name} up")))
}

fn add_address(connection: &mut Connection, index: u32, addr: Ipv4Addr) -> Result<()> {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.prefix_len = 32;
    message.header.index = index;
    message.header.scope = if addr.is_link_local() { AddressScope::Link } else { AddressScope::Universe };
    message.attributes =
        vec![AddressAttribute::Local(IpAddr::V4(addr)), AddressAttribute::Address(IpAddr::V4(addr))];
    connection
        .request(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
        .map_err(io_error(format!("set address {addr}")))
}

fn add_neighbour(connection: &mut Connection, index: u32, addr: Ipv4Addr) -> Result<()> {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.kind = RouteType::Unicast;
    message.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::Inet(addr)),
        NeighbourAttribute::LinkLayerAddress(mac(addr)),
    ];
    connection
        .request(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
        .map_err(io_error(format!("set the neighbour {addr}")))
}

enum Route {
    /// One address straight on the link.
    Host { to: Ipv4Addr, source: Ipv4Addr },
    Default { via: Ipv4Addr, source: Ipv4Addr },
}

fn add_route(connection: &mut Connection, index: u32, route: Route) -> Result<()> {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.kind = RouteType::Unicast;
    message.attributes.push(RouteAttribute::Oif(index));
    let taken = match &route {
        Route::Host { to, .. } => Some(*to),
        Route::Default { .. } => None,
    };
    let (what, source) = match route {
        Route::Host { to, source } => {
            message.header.scope = RouteScope::Link;
            message.header.destination_prefix_length = 32;
            message.attributes.push(RouteAttribute::Destination(RouteAddress::Inet(to)));
            (format!("add the route to {to}"), source)
        }
        Route::Default { via, source } => {
            message.header.scope = RouteScope::Universe;
            message.attributes.push(RouteAttribute::Gateway(RouteAddress::Inet(via)));
            (format!("add the default route by {via}"), source)
        }
    };
    message.attributes.push(RouteAttribute::PrefSource(RouteAddress::Inet(source)));
    // Routes go with their interface: one that is there belongs to somebody who lives.
    match (connection.request(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_EXCL), taken) {
        (Err(error), Some(addr)) if error.raw_os_error() == Some(libc::EEXIST) => {
            let holder = host_routes()?.into_iter().find(|(routed, _)| *routed == addr);
            Err(NetError::AddressTaken { addr, ifname: holder.map_or_else(|| "unknown".into(), |(_, ifname)| ifname) })
        }
        (added, _) => added.map_err(io_error(what)),
    }
}

/// A link layer address from the IP address: locally administered, the same on every run.
fn mac(addr: Ipv4Addr) -> Vec<u8> {
    let [a, b, c, d] = addr.octets();
    vec![0x02, b'd', a, b, c, d]
}

fn index_of(name: &str) -> Result<u32> {
    let c_name = std::ffi::CString::new(name).map_err(|_| NetError::BadName(name.to_owned()))?;
    // SAFETY: the name ends in NUL and lives across the call.
    match unsafe { libc::if_nametoindex(c_name.as_ptr()) } {
        0 => Err(NetError::Io { what: format!("find interface {name}"), source: io::Error::last_os_error() }),
        index => Ok(index),
    }
}

/// `/proc/sys/net` shows the namespace of the thread that opens a file in it.
fn set_sysctl(key: &str, value: &str) -> Result<()> {
    std::fs::write(format!("/proc/sys/{key}"), value).map_err(io_error(format!("set {} to {value}", key.replace('/', "."))))
}

/// For IPv6 keys: a kernel without IPv6 has none of them, and nothing to turn off.
fn set_sysctl_if_there(key: &str, value: &str) -> Result<()> {
    match set_sysctl(key, value) {
        Err(NetError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn open_netns(path: &str) -> Result<OwnedFd> {
    std::fs::File::open(path).map(OwnedFd::from).map_err(io_error(format!("open {path}")))
}

fn same_file(a: &OwnedFd, b: &OwnedFd) -> Result<bool> {
    let stat = |fd: &OwnedFd| nix::sys::stat::fstat(fd).map_err(|e| io_error("look at a namespace")(e.into()));
    let (a, b) = (stat(a)?, stat(b)?);
    Ok(a.st_dev == b.st_dev && a.st_ino == b.st_ino)
}

/// Runs `work` with the calling thread in another network namespace, and comes back whatever happens.
fn inside<T>(machine_ns: &OwnedFd, host_ns: &OwnedFd, work: impl FnOnce() -> Result<T>) -> Result<T> {
    struct Back<'a>(&'a OwnedFd);
    impl Drop for Back<'_> {
        fn drop(&mut self) {
            if let Err(error) = setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET) {
                // Going on would set up the host's network inside of a machine, or the other way around.
                tracing::error!(%error, "cannot return to the host's network namespace; ending the process");
                std::process::abort();
            }
        }
    }
    setns(machine_ns.as_fd(), CloneFlags::CLONE_NEWNET).map_err(|e| io_error("enter the machine's network namespace")(e.into()))?;
    let _back = Back(host_ns);
    work()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_names_fit_the_kernel() {
        for bad in ["", "a/b", "0123456789abcdef", "a b", "a\"b"] {
            assert!(check_ifname(bad).is_err(), "{bad}");
        }
        assert!(check_ifname("dl1482e7a9d01c").is_ok());
    }

    #[test]
    fn link_layer_addresses_are_local_and_unicast() {
        let mac = mac(Ipv4Addr::new(10, 201, 3, 4));
        assert_eq!(mac, [0x02, 0x64, 10, 201, 3, 4]);
    }
}
