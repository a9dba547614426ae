//! Which of the other hosts are dead. Control's own probe alone never says so: the host must be silent in gossip, too,
//! and down in the eyes of its members. What is known is in memory; a new process counts anew.
//!
//! ```text
//! there --probe fails--> failing since t --5 s, silent, down--> dead --probe answers--> there
//! ```

use crate::failure::{Failure, chain};
use crate::start::{Fleet, Probe};
use crate::{Ctx, now_ms, standbys};
use dunlin_model::HostId;
use dunlin_model::desired::{HostRow, MachineRow};
use dunlin_planner::is_replaceable;
use dunlin_view::Freshness;
use futures_util::future::join_all;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

const PROBE_EVERY: Duration = Duration::from_secs(1);
/// The probe gives up by itself after a second; this is for one that does not.
const PROBE_WAIT: Duration = Duration::from_secs(2);
/// A host whose probe has failed for this long may be dead.
const FAILS_FOR_MS: u64 = 5_000;

/// What is known of the other hosts.
pub(crate) struct Watched {
    probe: Option<Probe>,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    failing_since_ms: BTreeMap<HostId, u64>,
    dead: BTreeSet<HostId>,
    /// Most hosts seem dead: it is control that is cut off.
    cut_off: bool,
}

impl Watched {
    pub fn new(probe: Option<Probe>) -> Self {
        Self { probe, known: Mutex::default() }
    }

    /// Nothing asked of it is answered.
    pub fn is_dead(&self, host: &HostId) -> bool {
        self.lock().dead.contains(host)
    }

    /// Those whose machines are to be replaced: none, while control itself may be what is cut off.
    pub fn dead(&self) -> BTreeSet<HostId> {
        let known = self.lock();
        if known.cut_off { BTreeSet::new() } else { known.dead.clone() }
    }

    /// It answered in the last round.
    pub fn answers(&self, host: &HostId) -> bool {
        !self.lock().failing_since_ms.contains_key(host)
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) async fn run(ctx: Arc<Ctx>, stop: CancellationToken) {
    let (Some(probe), Some(fleet)) = (&ctx.watched.probe, &ctx.fleet) else { return };
    loop {
        if let Err(failure) = look(&ctx, probe, fleet).await {
            tracing::error!(error = %chain(&failure), "hosts could not be looked at; it is tried again");
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(PROBE_EVERY) => {}
        }
    }
}

async fn look(ctx: &Ctx, probe: &Probe, fleet: &Fleet) -> Result<(), Failure> {
    let hosts = ctx.state.list::<HostRow>("hosts/").await?;
    let hosts: BTreeSet<HostId> = hosts.into_iter().map(|row| row.value.id).collect();
    let others = hosts.iter().filter(|id| *id != ctx.host.host_id());
    let answers = join_all(others.map(async |host| {
        let answered = tokio::time::timeout(PROBE_WAIT, probe(host.clone())).await;
        (host.clone(), answered.unwrap_or(false))
    }));
    let answers = answers.await;
    let view = ctx.view.current();
    // A host that was never heard of in this process is silent, too.
    let is_heard = |host: &HostId| view.heard.get(host) == Some(&Freshness::Fresh);
    let is_silent = |host: &HostId| !is_heard(host) && !(fleet.is_up)(host);
    let before = ctx.watched.dead();
    let changed = ctx.watched.lock().hear(&answers, hosts.len(), is_silent, now_ms());
    if changed {
        tell_of_those_who_stay(ctx, &before).await?;
        ctx.work.notify_one();
    }
    standbys::look(ctx).await
}

/// Machines that may not run twice stay with their host, until it is back or an operator knows that it is off.
async fn tell_of_those_who_stay(ctx: &Ctx, before: &BTreeSet<HostId>) -> Result<(), Failure> {
    let dead = ctx.watched.dead();
    let is_new = |host: &HostId| dead.contains(host) && !before.contains(host);
    let stays = |row: &&MachineRow| is_new(&row.host) && (row.spec.release == 0 || !is_replaceable(&row.spec));
    let rows = ctx.state.machines().await?;
    for row in rows.iter().map(|row| &row.value).filter(stays) {
        tracing::warn!(
            app = %row.spec.app, machine = %row.id, host = %row.host,
            "the machine stays on its dead host, where it may still run: bring the host back, or destroy the machine by force"
        );
    }
    Ok(())
}

impl Known {
    /// What the probes of a round have said; whether that changes who is dead.
    fn hear(
        &mut self,
        answers: &[(HostId, bool)],
        all_hosts: usize,
        is_silent: impl Fn(&HostId) -> bool,
        now_ms: u64,
    ) -> bool {
        self.failing_since_ms.retain(|host, _| answers.iter().any(|(other, answered)| other == host && !answered));
        for (host, _) in answers.iter().filter(|(_, answered)| !answered) {
            self.failing_since_ms.entry(host.clone()).or_insert(now_ms);
        }
        let for_long = |since_ms: &u64| now_ms >= since_ms.saturating_add(FAILS_FOR_MS);
        let failing = self.failing_since_ms.iter();
        let dead = failing.filter(|(host, since_ms)| for_long(since_ms) && (self.dead.contains(*host) || is_silent(host)));
        let dead: BTreeSet<HostId> = dead.map(|(host, _)| host.clone()).collect();
        // This host counts as reachable.
        let cut_off = 2 * (all_hosts.saturating_sub(self.failing_since_ms.len())) < all_hosts;
        let changed = dead != self.dead || cut_off != self.cut_off;
        for host in dead.difference(&self.dead) {
            tracing::warn!(%host, "the host is dead: it answers nobody; machines that may run elsewhere are replaced");
        }
        for host in self.dead.difference(&dead) {
            tracing::info!(%host, "the host is there again");
        }
        if cut_off && !self.cut_off {
            let (failing, all) = (self.failing_since_ms.len(), all_hosts);
            tracing::error!(failing, all, "most hosts do not answer: control itself may be cut off, so it replaces no machines");
        }
        (self.dead, self.cut_off) = (dead, cut_off);
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: [usize; 0] = [];

    fn host(n: usize) -> HostId {
        format!("h{n}").parse().unwrap()
    }

    /// A round in which of `all` hosts, this one the first, those named do not answer.
    fn round(known: &mut Known, all: usize, failing: &[usize], silent: &[usize], now_ms: u64) -> Vec<usize> {
        let answers: Vec<_> = (2..=all).map(|n| (host(n), !failing.contains(&n))).collect();
        known.hear(&answers, all, |id| silent.iter().any(|n| host(*n) == *id), now_ms);
        (2..=all).filter(|n| known.dead.contains(&host(*n))).collect()
    }

    #[test]
    fn a_host_is_dead_when_everybody_says_so_for_long_enough() {
        let mut known = Known::default();
        assert_eq!(round(&mut known, 3, &[2], &[2], 1_000), NONE);
        assert_eq!(round(&mut known, 3, &[2], &[2], 5_900), NONE);
        assert_eq!(round(&mut known, 3, &[2], &[], 6_000), NONE, "others still hear of it");
        assert_eq!(round(&mut known, 3, &[2], &[2], 7_000), [2]);
        assert_eq!(round(&mut known, 3, &[2], &[], 8_000), [2], "what is old news is not heard again");
        assert_eq!(round(&mut known, 3, &[], &[], 9_000), NONE);
        assert_eq!(round(&mut known, 3, &[2], &[2], 9_500), NONE, "it counts anew");
        assert_eq!(round(&mut known, 3, &[2], &[2], 14_500), [2]);
        assert_eq!(round(&mut known, 2, &[], &[], 15_000), NONE, "a host that has left is no dead one");
    }

    #[test]
    fn one_answer_in_between_is_enough() {
        let mut known = Known::default();
        for n in 0..100 {
            let failing: &[usize] = if n % 4 == 3 { &[] } else { &[2] };
            assert_eq!(round(&mut known, 3, failing, &[2], n * 1_000), NONE);
        }
    }

    #[test]
    fn who_hears_of_fewer_than_half_is_cut_off() {
        let check = |all: usize, failing: &[usize], cut_off: bool| {
            let mut known = Known::default();
            for now_ms in [0, 5_000] {
                round(&mut known, all, failing, failing, now_ms);
            }
            assert_eq!(known.cut_off, cut_off, "{failing:?} of {all}");
        };
        check(2, &[2], false);
        check(3, &[2], false);
        check(3, &[2, 3], true);
        check(4, &[2, 3], false);
        check(4, &[2, 3, 4], true);
    }
}
