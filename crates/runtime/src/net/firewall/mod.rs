//! The host's firewall for its machines: one nft table, swapped whole in one transaction, one set element per machine.
//!
//! Rules match the interface *group* of the machines' interfaces, which is set as an interface is made: one that
//! nobody has announced yet is closed, not open. What a machine may do: answer connections that came to it, reach
//! public IPv4 addresses behind the host's address, and ask the host's resolvers. Nothing else: no port of the host,
//! no other machine, no private, link-local, shared or metadata address, no multicast, no IPv6, no foreign source.
//!
//! Foreign forward chains with policy drop (Docker, ufw) get an accept rule for our interfaces; our own table still
//! decides. Everything is undone by `remove`.

mod foreign;
mod nft;
mod script;
mod strain;

use std::fmt;
use std::net::Ipv4Addr;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{NetError, Result, check_ifname, io_error};
use nft::Nft;
pub use strain::{Connections, Strain};
pub(crate) use nft::find_program;

/// Highest number of machines whose pins one table takes.
const MACHINES_MAX: usize = 65_536;
/// nft's own limit is 32 letters for a chain or set and 256 for a table; ours keeps rule comments short.
const TABLE_NAME_MAX: usize = 48;
/// Interface groups of Dunlin have this bit, which keeps them clear of numbers that people give by hand.
const GROUP_BIT: u32 = 0x4000_0000;
/// A machine may have this part of the connections that the host's kernel keeps track of, for machines and all else: it
/// drops everybody's new ones when it has no room.
const CONNECTIONS_PART: u32 = 4;
/// What a machine may always have, as long as there is any room: this part of its part.
const MODEST_PART: u32 = 16;
/// All machines together begin this part of the table's connections in a second, and half of that at once.
const NEW_PART: u32 = 16;
const IP_FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";

/// An IPv4 network such as `10.201.0.0/16`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ipv4Prefix {
    addr: Ipv4Addr,
    len: u8,
}

impl Ipv4Prefix {
    pub const fn addr(self) -> Ipv4Addr {
        self.addr
    }

    pub fn contains(self, addr: Ipv4Addr) -> bool {
        addr.to_bits() & self.mask() == self.addr.to_bits()
    }

    /// The n-th address of the network, counted from its first; `None` beyond its end.
    pub fn host(self, n: u32) -> Option<Ipv4Addr> {
        let addr = Ipv4Addr::from_bits(self.addr.to_bits().checked_add(n)?);
        self.contains(addr).then_some(addr)
    }

    fn mask(self) -> u32 {
        u32::MAX.checked_shl(32 - u32::from(self.len)).unwrap_or(0)
    }
}

impl FromStr for Ipv4Prefix {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let wrong = || format!("{text:?} is no IPv4 network such as 10.201.0.0/16");
        let (addr, len) = text.split_once('/').ok_or_else(wrong)?;
        let prefix = Ipv4Prefix { addr: addr.parse().map_err(|_| wrong())?, len: len.parse().map_err(|_| wrong())? };
        if prefix.len > 32 {
            return Err(wrong());
        }
        if !prefix.contains(prefix.addr) {
            let addr = Ipv4Addr::from_bits(prefix.addr.to_bits() & prefix.mask());
            return Err(format!("{text} has bits beyond its length; did you mean {addr}/{}?", prefix.len));
        }
        Ok(prefix)
    }
}

impl fmt::Display for Ipv4Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.addr, self.len)
    }
}

impl TryFrom<String> for Ipv4Prefix {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl From<Ipv4Prefix> for String {
    fn from(prefix: Ipv4Prefix) -> String {
        prefix.to_string()
    }
}

/// A machine as the firewall knows it: this source address on this interface, and no other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineRule {
    pub ifname: String,
    pub addr: Ipv4Addr,
}

/// What `apply` did besides its own table, for the log and `dunlin doctor`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Applied {
    /// Forwarding of IPv4 was off on this host and is on now.
    pub ip_forward_enabled: bool,
    /// Foreign chains that have our accept rules now.
    pub foreign_chains: Vec<String>,
    /// What a person should know or do.
    pub notes: Vec<String>,
}

/// One server instance's firewall. Values only; the kernel holds the state.
#[derive(Debug, Clone)]
pub struct Firewall {
    table: String,
    machine_prefix: Ipv4Prefix,
    resolvers: Vec<Ipv4Addr>,
    allowed: Vec<Ipv4Prefix>,
    closed: Vec<Ipv4Addr>,
    connections_max: u32,
    new_connections_per_s: u32,
    strain: Strain,
    nft: Nft,
}

impl Firewall {
    pub fn new(table_name: &str, machine_prefix: Ipv4Prefix, resolvers: Vec<Ipv4Addr>) -> Result<Self> {
        let fits = table_name.len() <= TABLE_NAME_MAX
            && table_name.starts_with(|c: char| c.is_ascii_lowercase())
            && table_name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        if !fits {
            return Err(NetError::Invalid(format!(
                "{table_name:?} is no table name: a letter and then up to {} of a-z 0-9 _ are",
                TABLE_NAME_MAX - 1
            )));
        }
        Ok(Firewall {
            table: table_name.to_owned(),
            machine_prefix,
            resolvers,
            allowed: Vec::new(),
            closed: Vec::new(),
            connections_max: strain::kept() / CONNECTIONS_PART,
            new_connections_per_s: strain::kept() / NEW_PART,
            strain: Strain::None,
            nft: Nft::find()?,
        })
    }

    /// Destinations that look public and are not for machines.
    #[must_use]
    pub fn close(mut self, destinations: Vec<Ipv4Addr>) -> Self {
        self.closed = destinations;
        self
    }

    /// Private destinations that the operator opens for machines, a database in the local network for example.
    #[must_use]
    pub fn allow(mut self, destinations: Vec<Ipv4Prefix>) -> Self {
        self.allowed = destinations;
        self
    }

    /// The name servers that machines may ask.
    #[must_use]
    pub fn with_resolvers(mut self, resolvers: Vec<Ipv4Addr>) -> Self {
        self.resolvers = resolvers;
        self
    }

    /// How many connections one machine may have at once, instead of a part of the host's.
    #[must_use]
    pub fn with_connections_max(mut self, connections: u32) -> Self {
        self.connections_max = connections;
        self
    }

    /// How many connections all machines together may begin in a second, instead of a part of what the host keeps track of.
    #[must_use]
    pub fn with_new_connections(mut self, per_s: u32) -> Self {
        self.new_connections_per_s = per_s;
        self
    }

    /// What [`apply`](Self::apply) leaves of new connections.
    #[must_use]
    pub fn with_strain(mut self, strain: Strain) -> Self {
        self.strain = strain;
        self
    }

    /// The interface group of this instance's machines: from the table's name, so the same after every start.
    pub fn group(&self) -> u32 {
        let hash = self.table.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        GROUP_BIT | (hash & (GROUP_BIT - 1))
    }

    /// Swaps the whole table in one transaction, lets our interfaces through foreign chains, turns forwarding on.
    /// Packets of running machines never meet an absent or a half table.
    pub fn apply(&self, machines: &[MachineRule]) -> Result<Applied> {
        if machines.len() > MACHINES_MAX {
            return Err(NetError::Invalid(format!("{} machines are over the firewall's {MACHINES_MAX}", machines.len())));
        }
        for machine in machines {
            self.check(machine)?;
        }
        let forwarding_is_off = !forwarding()?;
        let was_off = forwarding_is_off || self.remembers_forwarding_off()?;
        self.nft.run("swap the machines' table", &script::table(self, machines, was_off))?;
        if forwarding_is_off {
            set_forwarding(true)?;
            tracing::info!("turned net.ipv4.ip_forward on, so that machines reach the internet");
        }
        let (foreign_chains, notes) = self.pass_foreign_chains()?;
        Ok(Applied { ip_forward_enabled: forwarding_is_off, foreign_chains, notes })
    }

    /// Puts our accept rules into foreign forward chains that drop by policy, where they are missing. `apply` does it;
    /// call it again from time to time, as a Docker that starts later brings its chain later.
    pub fn pass_foreign_chains(&self) -> Result<(Vec<String>, Vec<String>)> {
        foreign::open(&self.nft, &self.table)
    }

    /// Whether the table is there with its rules, and forwarding is on: `systemctl restart nftables` flushes other
    /// people's tables too, and machines are open then.
    pub fn is_applied(&self) -> Result<bool> {
        let there = self.nft.chains()?.iter().any(|chain| chain.family == "inet" && chain.table == self.table);
        if !there || !forwarding()? {
            return Ok(false);
        }
        let rules = self.nft.rules_of_table(&self.table)?;
        Ok(script::CHAINS.iter().all(|chain| rules.iter().any(|rule| rule.chain == *chain)))
    }

    /// Pins one more machine to its address. Do this before its interface exists.
    pub fn add_machine(&self, machine: &MachineRule) -> Result<()> {
        self.check(machine)?;
        self.nft.run("add a machine", &script::add_element(&self.table, machine))
    }

    /// Lets fewer of the machines' new connections pass, or all of them again, in the table that is there.
    pub fn set_strain(&self, strain: Strain) -> Result<()> {
        self.nft.run("bound the machines' connections", &script::strain(&self.clone().with_strain(strain)))
    }

    /// Closes the interface of a machine again. A machine that is not in the table is fine.
    pub fn remove_machine(&self, machine: &MachineRule) -> Result<()> {
        self.check(machine)?;
        self.nft.run("remove a machine", &script::remove_element(&self.table, machine))
    }

    /// Removes all that `apply` brought, also by an earlier process. Returns what a person should know.
    pub fn remove(&self) -> Result<Vec<String>> {
        let mut notes = foreign::close(&self.nft, &self.table)?;
        let was_off = self.remembers_forwarding_off()?;
        self.nft.run("remove the machines' table", &script::no_table(&self.table))?;
        if was_off {
            match foreign::others_translate(&self.nft)? {
                None => set_forwarding(false)?,
                Some(chain) => notes.push(format!(
                    "net.ipv4.ip_forward was off before Dunlin turned it on; it stays on, as {chain} may need it"
                )),
            }
        }
        Ok(notes)
    }

    fn check(&self, machine: &MachineRule) -> Result<()> {
        check_ifname(&machine.ifname)?;
        if self.machine_prefix.contains(machine.addr) {
            return Ok(());
        }
        Err(NetError::Invalid(format!("{} of {} is not in {}", machine.addr, machine.ifname, self.machine_prefix)))
    }

    /// An empty chain in the table is the note that forwarding was off: it lives exactly as long as the table.
    fn remembers_forwarding_off(&self) -> Result<bool> {
        Ok(self.nft.chains()?.iter().any(|chain| {
            chain.family == "inet" && chain.table == self.table && chain.name == script::FORWARDING_WAS_OFF
        }))
    }
}

fn forwarding() -> Result<bool> {
    let value = std::fs::read_to_string(IP_FORWARD).map_err(io_error(format!("read {IP_FORWARD}")))?;
    Ok(value.trim() == "1")
}

fn set_forwarding(on: bool) -> Result<()> {
    std::fs::write(Path::new(IP_FORWARD), if on { "1" } else { "0" }).map_err(io_error(format!("write {IP_FORWARD}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(text: &str) -> Ipv4Prefix {
        text.parse().expect("prefix")
    }

    #[test]
    fn prefixes_know_their_bounds() {
        let net = prefix("10.201.0.0/16");
        assert_eq!(net.to_string(), "10.201.0.0/16");
        assert!(net.contains(Ipv4Addr::new(10, 201, 255, 255)));
        assert!(!net.contains(Ipv4Addr::new(10, 202, 0, 0)));
        assert_eq!(net.host(5), Some(Ipv4Addr::new(10, 201, 0, 5)));
        assert_eq!(net.host(65_536), None);
        assert!(prefix("0.0.0.0/0").contains(Ipv4Addr::BROADCAST));
        assert_eq!(prefix("255.255.255.255/32").host(1), None);
        for bad in ["10.0.0.0", "10.0.0.0/33", "10.0.0.1/8", "x/8", "10.0.0.0/-1", ""] {
            assert!(bad.parse::<Ipv4Prefix>().is_err(), "{bad}");
        }
        assert_eq!(serde_json::to_string(&net).expect("json"), "\"10.201.0.0/16\"");
    }

    #[test]
    fn two_instances_have_two_groups_and_neither_is_the_default() {
        let of = |name: &str| Firewall::new(name, prefix("10.201.0.0/16"), Vec::new()).expect("firewall").group();
        assert_ne!(of("dunlin_a"), of("dunlin_b"));
        assert_eq!(of("dunlin_a"), of("dunlin_a"));
        assert!(of("dunlin") >= GROUP_BIT);
    }

    #[test]
    fn names_and_addresses_cannot_smuggle_rules() {
        for bad in ["", "1a", "a b", "a;", "A", "a{", &"x".repeat(49)] {
            assert!(Firewall::new(bad, prefix("10.201.0.0/16"), Vec::new()).is_err(), "{bad}");
        }
        let firewall = Firewall::new("dunlin", prefix("10.201.0.0/16"), Vec::new()).expect("firewall");
        for (ifname, addr) in [("dl1\" accept", [10, 201, 0, 1]), ("dl1", [10, 202, 0, 1]), ("", [10, 201, 0, 1])] {
            let machine = MachineRule { ifname: ifname.to_owned(), addr: Ipv4Addr::from(addr) };
            assert!(firewall.check(&machine).is_err(), "{machine:?}");
        }
    }
}
