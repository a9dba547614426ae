//! What is written to nft. A script is one transaction: all of it holds, or none.

use std::fmt::Display;

use super::{Firewall, MACHINES_MAX, MODEST_PART, MachineRule, Strain};

/// Name of the empty chain that stands for "forwarding was off before".
pub(super) const FORWARDING_WAS_OFF: &str = "forwarding_was_off";

/// The chains that close machines in; none of them is ever empty.
pub(super) const CHAINS: [&str; 9] =
    ["pin", "tracked", "many", "input", "output", "forward", "from_machine", "to_machine", "postrouting"];

/// Destinations that are not the public internet: this network, private, shared (CGNAT), loopback, link-local with the
/// metadata services of clouds, protocol assignments, benchmarks, multicast, reserved with broadcast. The networks
/// for documentation are not here: nobody's services are in them, and laboratories use them as an internet.
const NOT_PUBLIC: [&str; 11] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "224.0.0.0/4",
    "240.0.0.0/4",
];

pub(super) fn table(firewall: &Firewall, machines: &[MachineRule], forwarding_was_off: bool) -> String {
    let Firewall { table, machine_prefix, connections_max, new_connections_per_s, .. } = firewall;
    let (modest, new_per_s) = ((connections_max / MODEST_PART).max(1), (*new_connections_per_s).max(1));
    let at_once = new_per_s.div_ceil(2);
    let (many, strained) = (many(firewall).join("\n    "), strained(firewall.strain));
    let group = firewall.group();
    let pins = elements(machines.iter().map(pin));
    let resolvers = elements(firewall.resolvers.iter());
    let allowed = elements(firewall.allowed.iter());
    let machine_net = machine_prefix.to_string();
    let further: Vec<String> = firewall.closed.iter().map(ToString::to_string).collect();
    let closed = elements(NOT_PUBLIC.iter().copied().chain([machine_net.as_str()]).chain(further.iter().map(String::as_str)));
    let memory = if forwarding_was_off { format!("chain {FORWARDING_WAS_OFF} {{ }}") } else { String::new() };
    // What the host sends to a machine that is not up would leave by the default route, for whoever has that address there.
    // Priorities: the pin comes before connection tracking, the rest a little before other people's filters.
    format!(
        "add table inet {table}
delete table inet {table}
table inet {table} {{
  set pins {{ type ifname . ipv4_addr; {pins} }}
  set resolvers {{ type ipv4_addr; {resolvers} }}
  set allowed {{ type ipv4_addr; flags interval; auto-merge; {allowed} }}
  set closed {{ type ipv4_addr; flags interval; auto-merge; {closed} }}
  set connections {{ type ipv4_addr; size {MACHINES_MAX}; flags dynamic; }}
  set further {{ type ipv4_addr; size {MACHINES_MAX}; flags dynamic; }}
  {memory}
  chain tracked {{
    jump strained
    ct state new add @connections {{ ip saddr ct count over {modest} }} jump many
    ct state new limit rate over {new_per_s}/second burst {at_once} packets counter drop
  }}
  chain strained {{
    {strained}
  }}
  chain many {{
    {many}
  }}
  chain pin {{
    type filter hook prerouting priority raw - 10; policy accept;
    iifgroup != {group} accept
    iifname . ip saddr @pins accept
    counter drop
  }}
  chain input {{
    type filter hook input priority filter - 10; policy accept;
    iifgroup != {group} accept
    ct state established,related accept
    jump tracked
    ip daddr @resolvers meta l4proto {{ tcp, udp }} th dport 53 accept
    counter drop
  }}
  chain output {{
    type filter hook output priority filter - 10; policy accept;
    oifgroup {group} accept
    oif lo accept
    ip daddr {machine_net} meta l4proto tcp counter reject with tcp reset
    ip daddr {machine_net} counter reject with icmp type host-unreachable
  }}
  chain forward {{
    type filter hook forward priority filter - 10; policy accept;
    iifgroup {group} jump from_machine
    oifgroup {group} jump to_machine
  }}
  chain from_machine {{
    oifgroup {group} counter drop
    ct state established,related accept
    ct state invalid counter drop
    jump tracked
    fib daddr type != unicast counter drop
    ip daddr @resolvers meta l4proto {{ tcp, udp }} th dport 53 accept
    ip daddr @allowed accept
    ip daddr @closed counter drop
    meta nfproto ipv4 accept
    counter drop
  }}
  chain to_machine {{
    ct state established,related accept
    counter drop
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {machine_net} oifgroup != {group} masquerade
  }}
}}
"
    )
}

/// For a machine that has more than a modest number of connections; those beyond are counted again, up to its part.
fn many(firewall: &Firewall) -> Vec<String> {
    let further = firewall.connections_max.saturating_sub(firewall.connections_max / MODEST_PART);
    let refused = (firewall.strain >= Strain::Tight).then(|| "counter drop".to_owned());
    refused.into_iter().chain([format!("add @further {{ ip saddr ct count over {further} }} counter drop")]).collect()
}

fn strained(strain: Strain) -> &'static str {
    if strain == Strain::Full { "ct state new counter drop" } else { "" }
}

/// The same rules in a table that is there; what it has counted stays.
pub(super) fn strain(firewall: &Firewall) -> String {
    let table = &firewall.table;
    let mut script = format!("flush chain inet {table} strained\nflush chain inet {table} many\n");
    let of_all = Some(strained(firewall.strain)).filter(|rule| !rule.is_empty()).map(|rule| ("strained", rule.to_owned()));
    for (chain, rule) in of_all.into_iter().chain(many(firewall).into_iter().map(|rule| ("many", rule))) {
        script.push_str(&format!("add rule inet {table} {chain} {rule}\n"));
    }
    script
}

pub(super) fn add_element(table: &str, machine: &MachineRule) -> String {
    format!("add element inet {table} pins {{ {} }}\n", pin(machine))
}

/// Adding first makes the deletion hold also when the element was not there.
pub(super) fn remove_element(table: &str, machine: &MachineRule) -> String {
    format!("{}delete element inet {table} pins {{ {} }}\n", add_element(table, machine), pin(machine))
}

pub(super) fn no_table(table: &str) -> String {
    format!("add table inet {table}\ndelete table inet {table}\n")
}

fn pin(machine: &MachineRule) -> String {
    format!("\"{}\" . {}", machine.ifname, machine.addr)
}

/// nft refuses an empty list of elements.
fn elements(items: impl Iterator<Item = impl Display>) -> String {
    let items: Vec<String> = items.map(|item| item.to_string()).collect();
    if items.is_empty() { String::new() } else { format!("elements = {{ {} }};", items.join(", ")) }
}
