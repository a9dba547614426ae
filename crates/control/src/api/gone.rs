//! Machines that were destroyed, for those who ask after them for a while.

use super::machines;
use crate::destroyed::{self, DestroyedRow};
use crate::failure::Failure;
use crate::fly::rfc3339;
use crate::owners::Owners;
use dunlin_api::wire;
use dunlin_model::desired::MachineRow;
use dunlin_model::{AppName, MachineId, MachineState};
use dunlin_view::Snapshot;
use serde_json::Value;

/// A machine that somebody asks after.
pub(super) enum Found {
    There(Box<MachineRow>),
    /// A while ago.
    Destroyed(Box<DestroyedRow>),
}

pub(super) async fn found(owners: &Owners, app: &AppName, id: &MachineId) -> Result<Found, Failure> {
    let missing = match owners.machine(app, id).await {
        Ok(row) => return Ok(Found::There(Box::new(row))),
        Err(missing) => missing,
    };
    // Members know of no machine that was destroyed.
    let Owners::Control(ctx) = owners else { return Err(missing) };
    let app = owners.app(app).await?;
    match destroyed::find(ctx, &app, id).await? {
        Some(gone) => Ok(Found::Destroyed(Box::new(gone))),
        None => Err(missing),
    }
}

pub(super) fn wire(owners: &Owners, view: &Snapshot, gone: &DestroyedRow, config: Value) -> wire::Machine {
    let shown = machines::wire(owners, view, &gone.machine, config);
    // Its host may still be at it.
    let is_over = view.is_rid_of(&gone.machine.host, &gone.machine.id);
    let state = if is_over { MachineState::Destroyed } else { MachineState::Destroying };
    wire::Machine {
        state,
        host_status: "ok".into(),
        problem: None,
        restarts: gone.last.restarts,
        exit: gone.last.exit.clone(),
        next_run_at: None,
        updated_at: rfc3339(gone.at_ms),
        ..shown
    }
}
