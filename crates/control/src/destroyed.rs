//! Machines that are gone, kept for a while for those who ask what there was. Nothing else reads them: what destroys a
//! machine is its tombstone.

use crate::failure::Failure;
use crate::rows::{Change, key};
use crate::{Ctx, now_ms};
use dunlin_model::desired::{AppRow, MachineRow};
use serde::{Deserialize, Serialize};

const KEPT_MS: u64 = 24 * 3600 * 1000;
/// Of one app, the newest.
const KEPT_OF_AN_APP: usize = 100;

/// `destroyed/<app>/<machine>`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct DestroyedRow {
    pub machine: MachineRow,
    pub at_ms: u64,
}

/// The part of the transaction that destroys it. Its files are not kept: they may be large, and nobody is shown them.
pub(crate) fn note(machine: &MachineRow) -> Change {
    let mut machine = machine.clone();
    machine.spec.files.clear();
    let key = key::destroyed(&machine.spec.app, &machine.id);
    Change::default().put(key, &DestroyedRow { machine, at_ms: now_ms() })
}

/// The newest first. Those of an earlier app of the same name are nobody's business any more.
pub(crate) async fn of_app(ctx: &Ctx, app: &AppRow) -> Result<Vec<DestroyedRow>, Failure> {
    let rows = ctx.state.list::<DestroyedRow>(&key::destroyed_of(&app.name)).await?;
    let mut rows: Vec<_> = rows.into_iter().map(|row| row.value).filter(|row| row.at_ms >= app.created_at_ms).collect();
    rows.retain(|row| now_ms() < row.at_ms.saturating_add(KEPT_MS));
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
