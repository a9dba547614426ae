//! Probes the other hosts and tells which of them are dead, as [`Watch`] finds it: silent is who is silent in gossip, and
//! down in the eyes of its members.

use crate::failure::{Failure, chain};
use crate::start::{Fleet, Probe};
use crate::{Ctx, now_ms, standbys};
use dunlin_model::HostId;
use dunlin_model::desired::{HostRow, MachineRow};
use dunlin_planner::{Watch, Watched as Round, is_replaceable};
use dunlin_view::Freshness;
use futures_util::future::join_all;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

const PROBE_EVERY: Duration = Duration::from_secs(1);
/// The probe gives up by itself after a second; this is for one that does not.
const PROBE_WAIT: Duration = Duration::from_secs(2);

/// What is known of the other hosts.
pub(crate) struct Watched {
    probe: Option<Probe>,
    watch: Mutex<Watch>,
}

impl Watched {
    pub fn new(probe: Option<Probe>) -> Self {
        Self { probe, watch: Mutex::default() }
    }

    /// Nothing asked of it is answered.
    pub fn is_dead(&self, host: &HostId) -> bool {
        self.lock().is_dead(host)
    }

    /// Those whose machines are to be replaced: none, while control itself may be what is cut off.
    pub fn dead(&self) -> BTreeSet<HostId> {
        self.lock().dead()
    }

    /// It answered in the last round.
    pub fn answers(&self, host: &HostId) -> bool {
        self.lock().answers(host)
    }

    fn lock(&self) -> MutexGuard<'_, Watch> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
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
    let round = ctx.watched.lock().hear(&answers, hosts.len(), is_silent, now_ms());
    if !round.is_nothing() {
        tell(&round, answers.iter().filter(|(_, answered)| !answered).count(), hosts.len());
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

fn tell(round: &Round, failing: usize, all: usize) {
    for host in &round.died {
        tracing::warn!(%host, "the host is dead: it answers nobody; machines that may run elsewhere are replaced");
    }
    for host in &round.returned {
        tracing::info!(%host, "the host is there again");
    }
    if round.cut_off == Some(true) {
        tracing::error!(failing, all, "most hosts do not answer: control itself may be cut off, so it replaces no machines");
    }
}
