//! Starts machines that were made or changed by hand: what was promised in the transaction that wrote them is done after a
//! `kill -9`, too.

use crate::failure::{Failure, chain};
use crate::rows::{Change, Row};
use crate::{Ctx, hosts, now_ms};
use dunlin_api::{Command, CommandKind, Refusal, Source};
use dunlin_model::desired::MachineRow;
use dunlin_model::{CommandId, MachineId, MachineState, MachineVersion};
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Images may be large and disks slow; after this the machine stays as it is.
pub(crate) const LAUNCH_MS: u64 = 10 * 60_000;
const COMMAND_DEADLINE_MS: u64 = 15_000;
/// While there is something to start, hosts are asked this often.
const RETRY: Duration = Duration::from_millis(50);
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Launches that hosts are asked for side by side.
const MOST_AT_ONCE: usize = 64;

/// `launches/<machine>`: what is still to be done to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LaunchRow {
    pub version: MachineVersion,
    pub start: bool,
    pub cordon: bool,
    pub until_ms: u64,
    /// Of the request that asked for it.
    #[serde(default)]
    pub request_id: Option<String>,
    #[serde(default)]
    pub nonce: Option<String>,
}

pub(crate) async fn run(ctx: Arc<Ctx>, stop: CancellationToken) {
    loop {
        let pause = match look(&ctx).await {
            Ok(0) => LOOK_EVERY,
            Ok(_) => RETRY,
            Err(failure) => {
                tracing::error!(error = %chain(&failure), "machines that wait for their start could not be looked at");
                LOOK_EVERY
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = ctx.launches.notified() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Tries all; how many are left.
async fn look(ctx: &Ctx) -> Result<usize, Failure> {
    let mut left = 0;
    let launches = ctx.state.list_keyed::<LaunchRow>("launches/").await?;
    // Side by side: a host that does not answer holds up nobody else's machines.
    for some in launches.chunks(MOST_AT_ONCE) {
        for ended in join_all(some.iter().map(|(key, row)| try_one(ctx, key, row))).await {
            left += usize::from(!ended?);
        }
    }
    Ok(left)
}

/// Whether it has ended.
async fn try_one(ctx: &Ctx, key: &str, row: &Row<LaunchRow>) -> Result<bool, Failure> {
    let Some(id) = key.strip_prefix("launches/").and_then(|id| id.parse::<MachineId>().ok()) else { return Ok(true) };
    let machine = ctx.state.machine(&id).await?.filter(|machine| machine.value.spec.version == row.value.version);
    let ended = match &machine {
        Some(machine) => attempt(ctx, machine, &row.value).await,
        None => true, // destroyed, or in another version by now
    };
    if ended {
        // A newer row is another launch's.
        ctx.state.commit(Change::default().unchanged(key.to_owned(), row.modified).delete(key.to_owned())).await?;
    }
    Ok(ended)
}

/// Whether nothing is left to do, or can be done.
async fn attempt(ctx: &Ctx, machine: &Row<MachineRow>, launch: &LaunchRow) -> bool {
    let id = &machine.value.id;
    let mut verbs = vec![];
    if launch.cordon {
        verbs.push(("cordon", CommandKind::Cordon));
    }
    if launch.start {
        verbs.push(("start", CommandKind::Start));
    }
    for (name, kind) in verbs {
        let Ok(command) = format!("launch.{name}.{}", launch.version).parse::<CommandId>() else { return true };
        let command = Command {
            id: command,
            machine: id.clone(),
            deadline_ms: now_ms() + COMMAND_DEADLINE_MS,
            generation: Some(machine.value.placement),
            plan: None,
            expected_version: (name == "start").then(|| launch.version.clone()),
            nonce: launch.nonce.clone(),
            source: Source::User,
            request_id: launch.request_id.clone(),
            kind,
        };
        let sent = match hosts::reach(ctx, &machine.value.host) {
            Ok(host) => host.command(command).await,
            Err(refusal) => Err(refusal),
        };
        match sent {
            Ok(_) => {}
            Err(refusal) if passes(&refusal) && now_ms() < launch.until_ms => return false,
            Err(refusal) => {
                tracing::info!(machine = %id, %refusal, "the machine cannot {name} as it was asked to");
                return true;
            }
        }
    }
    true
}

/// The host has not seen the newest projection, is still at work, or cannot write down what it is told.
fn passes(refusal: &Refusal) -> bool {
    use MachineState as S;
    match refusal {
        Refusal::IllegalMove { state, .. } => matches!(state, S::Creating | S::Stopping | S::Updating | S::Restarting),
        Refusal::NoSuchMachine(_)
        | Refusal::VersionMismatch { .. }
        | Refusal::OldGeneration { .. }
        | Refusal::TooLate
        | Refusal::DiskFull(_)
        | Refusal::Busy(_)
        | Refusal::Failed(_)
        | Refusal::Unreachable { .. }
        | Refusal::Leased { .. } => true,
        _ => false,
    }
}
