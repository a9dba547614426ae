//! The machines' firewall and what should be in it: whoever takes it away, it comes back.

use crate::agent::chain;
use arc_swap::ArcSwap;
use dunlin_runtime::net::{self, NetError};
use dunlin_runtime::net::firewall::{Connections, Firewall, MachineRule, Strain};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How often it is looked at. Until then machines may be open, or cut off.
const LOOK: Duration = Duration::from_secs(5);
/// How often the kernel's table of connections is looked at.
const LOOK_AT_CONNECTIONS: Duration = Duration::from_millis(250);

/// Name servers of before stay open beside the newest, for the machines that still have them in their
/// resolv.conf; more than this are not kept.
const MAX_RESOLVERS: usize = 16;

pub struct KeptFirewall {
    group: u32,
    /// For machines that start now; read without waiting for nft.
    resolv_conf: ArcSwap<String>,
    /// Held while nft runs, so that a table that is set as a whole never lacks what was added meanwhile.
    kept: Mutex<Kept>,
}

struct Kept {
    firewall: Firewall,
    /// Every machine and builder that has, or is about to have, an interface.
    rules: BTreeMap<String, Ipv4Addr>,
    /// All that were the host's since the server's start, the newest first.
    resolvers: Vec<Ipv4Addr>,
    strain: Strain,
    /// The kernel has the table with all of `rules`, as far as was seen.
    is_set: bool,
}

impl KeptFirewall {
    /// Sets the table before any machine of these rules is started. Without it machines have no network, but
    /// everything else works: it is tried again.
    pub fn apply(firewall: Firewall, rules: impl Iterator<Item = MachineRule>) -> Self {
        let rules = rules.map(|rule| (rule.ifname, rule.addr)).collect();
        let (group, resolv_conf) = (firewall.group(), ArcSwap::default());
        let kept = Self { group, resolv_conf, kept: Mutex::new(Kept { firewall, rules, resolvers: vec![], strain: Strain::None, is_set: false }) };
        if let Err(error) = kept.take_resolvers(&mut kept.lock()) {
            tracing::warn!(error = %chain(&error), "machines cannot resolve names until this host can");
        }
        let set = kept.lock().set();
        match set {
            Ok(notes) => notes.iter().for_each(|note| tracing::info!(%note, "firewall")),
            Err(error) => tracing::error!(error = %chain(&error), "the firewall cannot be set; machines have no network"),
        }
        kept
    }

    pub fn group(&self) -> u32 {
        self.group
    }

    pub fn resolv_conf(&self) -> String {
        self.resolv_conf.load().to_string()
    }

    /// Before the interface exists. A machine that was added before costs nothing: its rule stays while it is stopped.
    pub fn add(&self, rule: &MachineRule) -> Result<(), NetError> {
        let mut kept = self.lock();
        let is_new = kept.rules.insert(rule.ifname.clone(), rule.addr) != Some(rule.addr);
        if kept.is_set && !is_new {
            return Ok(());
        }
        kept.is_set = kept.is_set && kept.firewall.add_machine(rule).is_ok();
        kept.make_good()
    }

    pub fn remove(&self, rule: &MachineRule) -> Result<(), NetError> {
        let mut kept = self.lock();
        kept.rules.remove(&rule.ifname);
        kept.is_set = kept.is_set && kept.firewall.remove_machine(rule).is_ok();
        kept.make_good()
    }

    /// Sets again what somebody flushed, follows the host's name servers, and passes the chains of a Docker or
    /// ufw that started later.
    fn look(&self) -> Result<(), NetError> {
        let mut kept = self.lock();
        // Without any the ones of before are as good as none; that was said, or the server's log would be full.
        let renamed = self.take_resolvers(&mut kept).unwrap_or(false);
        let was_set = kept.is_set;
        kept.is_set = false; // until it was seen
        let there = kept.firewall.is_applied()?;
        if there && !renamed && was_set {
            kept.is_set = true;
            return kept.firewall.pass_foreign_chains().map(drop);
        }
        kept.set()?;
        if renamed {
            tracing::info!(servers = ?kept.resolvers, "name servers for machines");
        }
        if !there {
            tracing::warn!(machines = kept.rules.len(), "the machines' firewall was gone; it is set again");
        }
        Ok(())
    }

    /// Lets as much of the machines' new connections pass as the kernel's table has room for.
    fn strain(&self, strain: Strain) -> Result<(), NetError> {
        let mut kept = self.lock();
        kept.strain = strain; // also of a table that is set anew
        if kept.is_set { kept.firewall.set_strain(strain) } else { Ok(()) }
    }

    /// Reads the host's name servers; true when they are others than before.
    fn take_resolvers(&self, kept: &mut Kept) -> Result<bool, NetError> {
        let found = net::resolvers()?;
        let changed = **self.resolv_conf.load() != found.resolv_conf();
        self.resolv_conf.store(Arc::new(found.resolv_conf()));
        let before = std::mem::replace(&mut kept.resolvers, found.servers);
        let others: Vec<_> = before.into_iter().filter(|old| !kept.resolvers.contains(old)).collect();
        kept.resolvers.extend(others);
        kept.resolvers.truncate(MAX_RESOLVERS);
        Ok(changed)
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        // One insertion or removal at a time: a panic elsewhere left nothing half done.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn make_good(&mut self) -> Result<(), NetError> {
        if self.is_set { Ok(()) } else { self.set().map(drop) }
    }

    fn set(&mut self) -> Result<Vec<String>, NetError> {
        let rules: Vec<MachineRule> =
            self.rules.iter().map(|(ifname, addr)| MachineRule { ifname: ifname.clone(), addr: *addr }).collect();
        let applied = self.firewall.clone().with_resolvers(self.resolvers.clone()).with_strain(self.strain).apply(&rules);
        self.is_set = applied.is_ok();
        Ok(applied?.notes)
    }
}

/// Keeps machines from filling the kernel's table of connections until the agent ends.
pub async fn watch_connections(shared: Arc<crate::Shared>, agent_lives: impl Fn() -> bool) {
    let (mut now, mut failing) = (Strain::None, false);
    loop {
        tokio::time::sleep(LOOK_AT_CONNECTIONS).await;
        if !agent_lives() {
            return;
        }
        let Some(connections) = Connections::look() else { continue };
        let strain = connections.strain();
        if strain == now {
            continue;
        }
        let kept = shared.clone();
        match tokio::task::spawn_blocking(move || kept.firewall.strain(strain)).await {
            Ok(Ok(())) => {
                let Connections { now: has, most } = connections;
                match strain {
                    Strain::None => tracing::info!(has, most, "machines may open connections again"),
                    Strain::Tight => tracing::warn!(has, most, "the kernel's table of connections fills up: machines that have many get no more"),
                    Strain::Full => tracing::warn!(
                        has, most, "the kernel's table of connections is nearly full: machines open no more; raise net.netfilter.nf_conntrack_max \
                        if none of them is to blame"
                    ),
                }
                (now, failing) = (strain, false);
            }
            Ok(Err(error)) if !failing => {
                tracing::error!(error = %chain(&error), "machines cannot be kept from filling the kernel's table of connections");
                failing = true;
            }
            Ok(Err(_)) => {} // said once
            Err(_) => {}     // a panic in it was reported by itself
        }
    }
}

/// Looks at the firewall until the agent ends.
pub async fn keep(shared: Arc<crate::Shared>, agent_lives: impl Fn() -> bool) {
    let mut failing = false;
    loop {
        tokio::time::sleep(LOOK).await;
        if !agent_lives() {
            return;
        }
        let kept = shared.clone();
        let looked = tokio::task::spawn_blocking(move || kept.firewall.look()).await;
        match looked {
            Ok(Err(error)) if !failing => {
                tracing::error!(error = %chain(&error), "the firewall cannot be looked after; machines may be open or cut off");
                failing = true;
            }
            Ok(Ok(())) => failing = false,
            Ok(Err(_)) => {} // said once
            Err(_) => {}     // a panic in it was reported by itself
        }
    }
}
