//! Standbys: machines that rest, and run while the host of one that they stand in for is dead.
//!
//! ```text
//! resting --host of a watched one dead--> due --start accepted--> standing in --that host answers again--> resting
//!                                                                      +-- the watched one was destroyed --> its own
//! ```
//!
//! What is under way is in the store, so that a control process that is killed in the middle neither forgets a standby nor starts it
//! again after a person has stopped it. While a host is cut off and not dead both run: whoever names a standby asks for that.

use crate::failure::Failure;
use crate::rows::{Change, Row, key};
use crate::{Ctx, hosts, now_ms};
use dunlin_api::{Command, CommandKind, Refusal, Source};
use dunlin_model::desired::MachineRow;
use dunlin_model::{HostId, MachineId, MachineSpec, MachineState};
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

const PREFIX: &str = "standing_in/";
const COMMAND_DEADLINE_MS: u64 = 15_000;

/// `standing_in/<machine>`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StandingInRow {
    pub watched: MachineId,
    pub since_ms: u64,
    /// Its host has accepted the start. From then on it is a person's to stop.
    pub started: bool,
}

/// Hosts that a standby must not share.
pub(crate) fn hosts_of_watched(spec: &MachineSpec, machines: &[Row<MachineRow>]) -> Result<BTreeSet<HostId>, Failure> {
    let host = |id: &MachineId| {
        let row = machines.iter().find(|row| row.value.id == *id);
        row.map(|row| row.value.host.clone()).ok_or_else(|| {
            Failure::invalid(format!("config.standbys cannot be used: app {} has no machine {id}", spec.app))
                .hint(format!("`dunlin machine list --app {}` shows those it has", spec.app))
        })
    };
    spec.standbys.iter().map(host).collect()
}

/// A machine that has its place becomes a standby of others only where they are elsewhere.
pub(crate) fn check_apart(spec: &MachineSpec, machines: &[Row<MachineRow>], row: &MachineRow) -> Result<(), Failure> {
    if hosts_of_watched(spec, machines)?.contains(&row.host) {
        return Err(Failure::invalid(format!("config.standbys cannot be used: host {} would be lost with both", row.host))
            .hint("make another machine: it is placed on another host"));
    }
    Ok(())
}

pub(crate) async fn stands_in(ctx: &Ctx, id: &MachineId) -> Result<bool, Failure> {
    Ok(ctx.state.get::<StandingInRow>(&key::standing_in(id)).await?.is_some())
}

/// After each round of probes. Reads the machines only where a host is dead, or was.
pub(crate) async fn look(ctx: &Ctx) -> Result<(), Failure> {
    let dead = ctx.watched.dead();
    let marks = ctx.state.list_keyed::<StandingInRow>(PREFIX).await?;
    if dead.is_empty() && marks.is_empty() {
        return Ok(());
    }
    let rows = ctx.state.machines().await?;
    let machines: BTreeMap<&MachineId, &MachineRow> = rows.iter().map(|row| (&row.value.id, &row.value)).collect();
    let marked: BTreeSet<&str> = marks.iter().filter_map(|(key, _)| key.strip_prefix(PREFIX)).collect();
    for standby in machines.values().filter(|row| !row.spec.standbys.is_empty() && !marked.contains(row.id.as_str())) {
        let lost = standby.spec.standbys.iter().find(|id| machines.get(id).is_some_and(|row| dead.contains(&row.host)));
        if let Some(watched) = lost {
            let mark = StandingInRow { watched: watched.clone(), since_ms: now_ms(), started: false };
            let key = key::standing_in(&standby.id);
            ctx.state.commit(Change::default().absent(key.clone()).put(key, &mark)).await?;
        }
    }
    let marks = ctx.state.list_keyed::<StandingInRow>(PREFIX).await?;
    join_all(marks.iter().map(|(key, mark)| go_on(ctx, &machines, key, mark))).await.into_iter().collect()
}

async fn go_on(ctx: &Ctx, machines: &BTreeMap<&MachineId, &MachineRow>, key: &str, mark: &Row<StandingInRow>) -> Result<(), Failure> {
    let id = key.strip_prefix(PREFIX).and_then(|id| id.parse::<MachineId>().ok());
    let standby = id.and_then(|id| machines.get(&id).copied());
    let is_back = |watched: &MachineRow| ctx.watched.answers(&watched.host);
    let change = Change::default().unchanged(key.to_owned(), mark.modified);
    let change = match (standby, machines.get(&mark.value.watched)) {
        // Nothing is left to stand in for: it goes on, as any other machine.
        (None, _) => change.delete(key.to_owned()),
        (Some(_), None) if mark.value.started => change.delete(key.to_owned()),
        (Some(standby), Some(watched)) if is_back(watched) => {
            if mark.value.started && !tell(ctx, standby, mark, CommandKind::Stop { signal: None, timeout_ms: None }).await {
                return Ok(());
            }
            tracing::info!(app = %standby.spec.app, machine = %standby.id, watched = %watched.id, "what it stood in for is there again");
            change.delete(key.to_owned())
        }
        (Some(standby), watched) if !mark.value.started => {
            if !tell(ctx, standby, mark, CommandKind::Start).await {
                return Ok(());
            }
            let host = watched.map(|row| row.host.as_str());
            tracing::info!(app = %standby.spec.app, machine = %standby.id, watched = %mark.value.watched, host, "the standby was started");
            change.put(key.to_owned(), &StandingInRow { started: true, ..mark.value.clone() })
        }
        _ => return Ok(()),
    };
    ctx.state.commit(change).await.map(drop)
}

/// Whether its host has done it, or it was so already. What is refused is tried again after the next round.
async fn tell(ctx: &Ctx, standby: &MachineRow, mark: &Row<StandingInRow>, kind: CommandKind) -> bool {
    let verb = if kind == CommandKind::Start { "start" } else { "stop" };
    let Ok(command) = format!("standby.{verb}.{}", mark.value.since_ms).parse() else { return false };
    let command = Command {
        id: command,
        machine: standby.id.clone(),
        deadline_ms: now_ms() + COMMAND_DEADLINE_MS,
        generation: Some(standby.placement),
        plan: None,
        expected_version: None,
        nonce: None,
        source: Source::Plan,
        request_id: None,
        kind,
    };
    let sent = match hosts::reach(ctx, &standby.host) {
        Ok(host) => host.command(command).await,
        Err(refusal) => Err(refusal),
    };
    match sent {
        Ok(_) => true,
        Err(Refusal::IllegalMove { state: MachineState::Started | MachineState::Starting, .. }) => verb == "start",
        Err(Refusal::IllegalMove { state: MachineState::Created | MachineState::Stopped | MachineState::Failed, .. }) => verb == "stop",
        Err(refusal) => {
            tracing::info!(app = %standby.spec.app, machine = %standby.id, %refusal, "the standby cannot {verb} yet");
            false
        }
    }
}
