//! Other people's forward chains. A packet must pass every chain on the hook, so one with policy drop (Docker, ufw)
//! stops our machines whatever our own table says. It gets two accept rules that name our interfaces, marked with our
//! table's name, and loses them with it.

use std::path::Path;
use std::process::Command;

use super::super::{IFNAME_PREFIX, NetError, Result, io_error};
use super::nft::{Chain, Nft, find_program};

/// Tables of the old in-kernel iptables, which nft does not show.
const LEGACY_TABLES: &str = "/proc/thread-self/net/ip_tables_names";
/// Removing the same rule more often than it can have been added.
const LEGACY_REPEATS: usize = 16;

pub(super) fn open(nft: &Nft, table: &str) -> Result<(Vec<String>, Vec<String>)> {
    let mut opened = Vec::new();
    let mut notes = Vec::new();
    let chains = nft.chains()?;
    for chain in chains.iter().filter(|chain| is_dropping_forward(chain, table)) {
        if rules_of(nft, chain, table)?.is_empty() {
            nft.run("let machines through a foreign chain", &accept_script(chain, table))?;
            tracing::info!(chain = %place_of(chain), "added accept rules for machines to a foreign forward chain");
        }
        opened.push(place_of(chain));
    }
    if let Some(legacy) = Legacy::find()? {
        if legacy.drops()? {
            legacy.open(table)?;
            opened.push("iptables-legacy filter FORWARD".to_owned());
        }
    } else if legacy_filter_loaded() {
        notes.push(
            "the old iptables filter table is loaded but iptables-legacy is not installed, so its FORWARD policy is \
             not known; if machines cannot reach the internet, allow forwarding from and to dl+ there"
                .to_owned(),
        );
    }
    if chains.iter().any(|chain| chain.family == "inet" && chain.table == "firewalld") {
        notes.push(
            "firewalld may reject what machines send; if they cannot reach the internet run: \
             firewall-cmd --permanent --zone=trusted --add-interface=dl+ && firewall-cmd --reload"
                .to_owned(),
        );
    }
    Ok((opened, notes))
}

pub(super) fn close(nft: &Nft, table: &str) -> Result<Vec<String>> {
    for chain in nft.chains()?.iter().filter(|chain| is_foreign_forward(chain, table)) {
        for handle in rules_of(nft, chain, table)? {
            let Chain { family, table, name, .. } = chain;
            nft.run("remove a rule from a foreign chain", &format!("delete rule {family} {table} {name} handle {handle}\n"))?;
        }
    }
    if let Some(legacy) = Legacy::find()? {
        legacy.close(table)?;
    }
    Ok(Vec::new())
}

/// A chain besides ours that translates addresses on the way out: its owner forwards, too.
pub(super) fn others_translate(nft: &Nft) -> Result<Option<String>> {
    Ok(nft
        .chains()?
        .iter()
        .find(|chain| chain.kind.as_deref() == Some("nat") && chain.hook.as_deref() == Some("postrouting"))
        .map(place_of))
}

fn is_foreign_forward(chain: &Chain, table: &str) -> bool {
    chain.hook.as_deref() == Some("forward")
        && chain.kind.as_deref() == Some("filter")
        && matches!(chain.family.as_str(), "ip" | "inet")
        && !(chain.family == "inet" && chain.table == table)
}

fn is_dropping_forward(chain: &Chain, table: &str) -> bool {
    is_foreign_forward(chain, table) && chain.policy.as_deref() == Some("drop")
}

/// Handles of our rules in a foreign chain.
fn rules_of(nft: &Nft, chain: &Chain, table: &str) -> Result<Vec<u64>> {
    let mark = mark(table);
    Ok(nft.rules(chain)?.into_iter().filter(|rule| rule.comment.as_deref() == Some(&mark)).map(|rule| rule.handle).collect())
}

/// By name, not by group: `iptables -S` can show names, and would refuse the whole table for a group.
fn accept_script(chain: &Chain, table: &str) -> String {
    let place = place_of(chain);
    let mark = mark(table);
    format!(
        "insert rule {place} oifname \"{IFNAME_PREFIX}*\" counter accept comment \"{mark}\"\n\
         insert rule {place} iifname \"{IFNAME_PREFIX}*\" counter accept comment \"{mark}\"\n"
    )
}

fn mark(table: &str) -> String {
    format!("machines of {table}")
}

fn place_of(chain: &Chain) -> String {
    format!("{} {} {}", chain.family, chain.table, chain.name)
}

fn legacy_filter_loaded() -> bool {
    std::fs::read_to_string(LEGACY_TABLES).is_ok_and(|tables| tables.lines().any(|line| line.trim() == "filter"))
}

/// The iptables of old, where the kernel has its filter table loaded.
struct Legacy(std::path::PathBuf);

impl Legacy {
    fn find() -> Result<Option<Self>> {
        if !Path::new(LEGACY_TABLES).exists() || !legacy_filter_loaded() {
            return Ok(None);
        }
        Ok(find_program("iptables-legacy").map(Legacy))
    }

    fn drops(&self) -> Result<bool> {
        let listed = self.call(&["-S", "FORWARD"])?;
        Ok(String::from_utf8_lossy(&listed.stdout).lines().any(|line| line.trim() == "-P FORWARD DROP"))
    }

    fn open(&self, table: &str) -> Result<()> {
        for direction in ["-i", "-o"] {
            if !self.call(&rule("-C", direction, &mark(table)))?.status.success() {
                let added = self.call(&rule("-I", direction, &mark(table)))?;
                if !added.status.success() {
                    let output = String::from_utf8_lossy(&added.stderr).into_owned();
                    return Err(NetError::Nft { what: "let machines through the old iptables", output });
                }
            }
        }
        Ok(())
    }

    fn close(&self, table: &str) -> Result<()> {
        for direction in ["-i", "-o"] {
            for _ in 0..LEGACY_REPEATS {
                if !self.call(&rule("-D", direction, &mark(table)))?.status.success() {
                    break;
                }
            }
        }
        Ok(())
    }

    fn call<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> Result<std::process::Output> {
        Command::new(&self.0).arg("-w").args(arguments).output().map_err(io_error(format!("run {}", self.0.display())))
    }
}

fn rule(verb: &str, direction: &str, mark: &str) -> Vec<String> {
    let interface = format!("{IFNAME_PREFIX}+");
    [verb, "FORWARD", direction, &interface, "-m", "comment", "--comment", mark, "-j", "ACCEPT"].map(str::to_owned).to_vec()
}
