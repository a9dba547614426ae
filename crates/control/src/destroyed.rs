//! Machines that are gone, kept for a while for those who ask what there was. Nothing else reads them: what destroys a
//! machine is its tombstone.

use crate::failure::Failure;
use crate::rows::{Change, key};
use crate::{Ctx, hosts, now_ms};
use dunlin_model::desired::{AppRow, MachineRow};
use dunlin_model::{ExitInfo, MachineEvent, MachineId};
use serde::{Deserialize, Serialize};

const KEPT_MS: u64 = 24 * 3600 * 1000;
/// Of one app, the newest.
const KEPT_OF_AN_APP: usize = 100;
/// Of a machine, the newest: some ten runs. A few hundred bytes each, beside the row of the machine.
const KEPT_EVENTS: usize = 32;

/// `destroyed/<app>/<machine>`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct DestroyedRow {
    pub machine: MachineRow,
    pub at_ms: u64,
    #[serde(flatten)]
    pub last: Last,
}

/// What its host said of it before it was destroyed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Last {
    /// How its last run ended, if it did not run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<ExitInfo>,
    #[serde(default)]
    pub restarts: u32,
    /// The newest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub events: Vec<MachineEvent>,
}

/// Without its events, which nobody is asked for.
pub(crate) fn heard(ctx: &Ctx, machine: &MachineRow) -> Last {
    let view = ctx.view.current();
    let fact = view.machines.get(&machine.id);
    Last { exit: fact.and_then(|fact| fact.exit.as_deref().cloned()), restarts: fact.map_or(0, |fact| fact.restarts), events: vec![] }
}

/// With its events, if its host answers soon. No machine is kept because it does not.
pub(crate) async fn last(ctx: &Ctx, machine: &MachineRow) -> Last {
    let (host, id) = (&machine.host, &machine.id);
    let told = match hosts::reach(ctx, host) {
        Ok(owner) => hosts::look(ctx.host.host_id(), host, owner.events(id)).await,
        Err(refusal) => Err(refusal),
    };
    let mut events = told.unwrap_or_else(|refusal| {
        tracing::debug!(machine = %id, %refusal, "its host does not tell what happened to it before it is destroyed");
        vec![]
    });
    events.truncate(KEPT_EVENTS);
    Last { events, ..heard(ctx, machine) }
}

/// The part of the transaction that destroys it. Its files are not kept: they may be large, and nobody is shown them.
pub(crate) fn note(machine: &MachineRow, last: Last) -> Change {
    let mut machine = machine.clone();
    machine.spec.files.clear();
    let key = key::destroyed(&machine.spec.app, &machine.id);
    Change::default().put(key, &DestroyedRow { machine, at_ms: now_ms(), last })
}

/// One that is still kept.
pub(crate) async fn find(ctx: &Ctx, app: &AppRow, id: &MachineId) -> Result<Option<DestroyedRow>, Failure> {
    let row = ctx.state.get::<DestroyedRow>(&key::destroyed(&app.name, id)).await?;
    Ok(row.map(|row| row.value).filter(|row| row.is_kept(app)))
}

impl DestroyedRow {
    /// Those of an earlier app of the same name are nobody's business any more.
    fn is_kept(&self, app: &AppRow) -> bool {
        self.at_ms >= app.created_at_ms && now_ms() < self.at_ms.saturating_add(KEPT_MS)
    }
}

/// The newest first.
pub(crate) async fn of_app(ctx: &Ctx, app: &AppRow) -> Result<Vec<DestroyedRow>, Failure> {
    let rows = ctx.state.list::<DestroyedRow>(&key::destroyed_of(&app.name)).await?;
    let mut rows: Vec<_> = rows.into_iter().map(|row| row.value).filter(|row| row.is_kept(app)).collect();
    rows.sort_by_key(|row| std::cmp::Reverse(row.at_ms));
    rows.truncate(KEPT_OF_AN_APP);
    Ok(rows)
}

/// Forgets at most `most` of those that are kept no longer.
pub(crate) async fn forget(ctx: &Ctx, most: usize) -> Result<(), Failure> {
    let mut rows = ctx.state.list_keyed::<DestroyedRow>("destroyed/").await?;
    rows.sort_by_key(|(_, row)| std::cmp::Reverse(row.value.at_ms));
    let mut of_app = std::collections::BTreeMap::new();
    let mut change = Change::default();
    for (key, row) in rows {
        let newer = of_app.entry(row.value.machine.spec.app.clone()).or_insert(0usize);
        *newer += 1;
        let is_old = now_ms() >= row.value.at_ms.saturating_add(KEPT_MS);
        if change.then.len() < most && (is_old || *newer > KEPT_OF_AN_APP) {
            change = change.delete(key);
        }
    }
    if !change.then.is_empty() {
        ctx.state.commit(change).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_row_of_before_it_had_what_was_last_is_read() {
        let spec = json!({
            "version": "01J00000000000000000000000", "org": "personal", "app": "web", "process_group": "app", "release": 0,
            "image": { "repository": "web", "digest": "sha256:00" },
            "guest": { "cpu_kind": "shared", "cpus": 1, "memory_mb": 256 },
        });
        let machine = json!({
            "id": "0a000000000000", "name": "x", "host": "h1", "region": "local", "address": "10.0.0.1",
            "placement": { "incarnation": 1, "revision": 1 }, "created_at_ms": 0, "spec": spec,
        });
        let row: DestroyedRow = serde_json::from_value(json!({ "machine": machine, "at_ms": 7 })).unwrap();
        assert_eq!((row.at_ms, &row.last), (7, &Last::default()));
        assert_eq!(serde_json::from_value::<DestroyedRow>(serde_json::to_value(&row).unwrap()).unwrap(), row);
    }
}
