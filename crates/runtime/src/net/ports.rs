//! Who listens where, from `/proc`.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Lines of one table that are read; a host has far fewer listeners.
const SOCKETS_MAX: usize = 262_144;
/// State "listen" in the kernel's tables, and that of a datagram socket without a peer.
const STATE_LISTEN: &str = "0A";
const STATE_UNCONNECTED: &str = "07";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proto {
    Tcp,
    Tcp6,
    Udp,
    Udp6,
}

impl Proto {
    pub fn name(self) -> &'static str {
        match self {
            Proto::Tcp => "tcp",
            Proto::Tcp6 => "tcp6",
            Proto::Udp => "udp",
            Proto::Udp6 => "udp6",
        }
    }

    fn is_v6(self) -> bool {
        matches!(self, Proto::Tcp6 | Proto::Udp6)
    }

    /// Of a socket that waits for whoever comes.
    fn waiting_state(self) -> &'static str {
        match self {
            Proto::Tcp | Proto::Tcp6 => STATE_LISTEN,
            Proto::Udp | Proto::Udp6 => STATE_UNCONNECTED,
        }
    }
}


#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListenSocket {
    pub proto: Proto,
    pub addr: SocketAddr,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortOwner {
    pub pid: i32,
    pub comm: String,
}

/// Listening TCP sockets in the network namespace of `pid`. Says, for instance, that an app listens on 127.0.0.1 only.
pub fn listen_sockets(pid: i32) -> io::Result<Vec<ListenSocket>> {
    Ok(listening(&pid.to_string())?.into_iter().map(|(socket, _)| socket).collect())
}

/// Those, and datagram sockets without a peer, by inode: /proc's descriptors name them by it.
pub fn waiting_sockets(pid: i32) -> io::Result<HashMap<u64, ListenSocket>> {
    let tables = [Proto::Tcp, Proto::Tcp6, Proto::Udp, Proto::Udp6];
    Ok(table(&pid.to_string(), &tables)?.into_iter().map(|(socket, inode)| (inode, socket)).collect())
}

/// The process that listens on a TCP port of the calling thread's namespace, as far as /proc shows it.
pub fn port_owner(port: u16) -> Option<PortOwner> {
    let inodes: Vec<u64> = listening("thread-self")
        .ok()?
        .into_iter()
        .filter(|(socket, _)| socket.addr.port() == port)
        .map(|(_, inode)| inode)
        .collect();
    let wanted: Vec<String> = inodes.iter().map(|inode| format!("socket:[{inode}]")).collect();
    let processes = std::fs::read_dir("/proc").ok()?;
    processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .find(|pid| holds_one(*pid, &wanted))
        .map(|pid| PortOwner { pid, comm: comm(pid) })
}

fn holds_one(pid: i32, links: &[String]) -> bool {
    let Ok(descriptors) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    descriptors
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .any(|target| target.to_str().is_some_and(|target| links.iter().any(|link| link == target)))
}

fn comm(pid: i32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).map(|name| name.trim().to_owned()).unwrap_or_default()
}

fn listening(process: &str) -> io::Result<Vec<(ListenSocket, u64)>> {
    table(process, &[Proto::Tcp, Proto::Tcp6])
}

fn table(process: &str, protocols: &[Proto]) -> io::Result<Vec<(ListenSocket, u64)>> {
    let mut found = Vec::new();
    for proto in protocols.iter().copied() {
        match std::fs::read_to_string(format!("/proc/{process}/net/{}", proto.name())) {
            Ok(table) => found.extend(table.lines().skip(1).take(SOCKETS_MAX).filter_map(|line| parse(line, proto))),
            // A kernel without IPv6.
            Err(error) if proto.is_v6() && error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

fn parse(line: &str, proto: Proto) -> Option<(ListenSocket, u64)> {
    let mut fields = line.split_whitespace();
    let local = fields.nth(1)?;
    let state = fields.nth(1)?;
    let inode = fields.nth(5)?.parse().ok()?;
    if state != proto.waiting_state() {
        return None;
    }
    let (addr, port) = local.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    // Addresses are written as 32-bit words in the machine's own byte order.
    let mut bytes = Vec::with_capacity(16);
    for word in addr.as_bytes().chunks(8) {
        let word = u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    let ip = if proto.is_v6() {
        IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?))
    } else {
        IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?))
    };
    Some((ListenSocket { proto, addr: SocketAddr::new(ip, port) }, inode))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn our_own_listeners_are_found_with_address_and_owner() {
        let me = i32::try_from(std::process::id()).expect("pid");
        let v4 = TcpListener::bind("127.0.0.1:0").expect("listen");
        let addr = v4.local_addr().expect("address");
        assert!(listen_sockets(me).expect("tables").contains(&ListenSocket { proto: Proto::Tcp, addr }));
        let owner = port_owner(addr.port()).expect("owner");
        assert_eq!(owner.pid, me);
        assert!(!owner.comm.is_empty());

        let v6 = TcpListener::bind("[::1]:0").expect("listen");
        let addr = v6.local_addr().expect("address");
        assert!(listen_sockets(me).expect("tables").contains(&ListenSocket { proto: Proto::Tcp6, addr }));
    }

    #[test]
    fn datagram_sockets_wait_until_they_have_a_peer() {
        let me = i32::try_from(std::process::id()).expect("pid");
        let open = std::net::UdpSocket::bind("127.0.0.1:0").expect("bind");
        let connected = std::net::UdpSocket::bind("127.0.0.1:0").expect("bind");
        connected.connect(open.local_addr().expect("address")).expect("connect");
        let waiting: Vec<SocketAddr> =
            waiting_sockets(me).expect("tables").values().filter(|s| s.proto == Proto::Udp).map(|s| s.addr).collect();
        assert!(waiting.contains(&open.local_addr().expect("address")));
        assert!(!waiting.contains(&connected.local_addr().expect("address")));
    }

    #[test]
    fn a_free_port_has_no_owner() {
        let port = TcpListener::bind("127.0.0.1:0").expect("listen").local_addr().expect("address").port();
        assert_eq!(port_owner(port), None);
    }
}
