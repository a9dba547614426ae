//! Machines that destroy themselves. Their host says that such a run is over, and they get their tombstone here. Nothing
//! is kept in between: the host goes on saying it until the machine is gone, whoever was away meanwhile.

use crate::{Ctx, destroyed};
use crate::failure::{Failure, chain};
use crate::reconcile::destroy_machine;
use crate::rows::Outcome;
use dunlin_model::desired::TombstoneReason;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Facts ring; this is for what could not be written then.
const LOOK_EVERY: Duration = Duration::from_secs(5);

pub(crate) async fn run(ctx: Arc<Ctx>, stop: CancellationToken) {
    let mut view = ctx.view.subscribe();
    loop {
        if let Err(failure) = look(&ctx).await {
            tracing::error!(error = %chain(&failure), "machines whose run has ended could not be destroyed; it is tried again");
        }
        tokio::select! {
            () = stop.cancelled() => return,
            _ = view.changed() => {}
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
    }
}

async fn look(ctx: &Ctx) -> Result<(), Failure> {
    let view = ctx.view.current();
    for fact in view.machines.values().filter(|fact| fact.over) {
        let Some(row) = ctx.state.machine(&fact.id).await? else { continue }; // it has its tombstone
        let machine = &row.value;
        // A newer version is another life.
        if machine.spec.version != fact.version || machine.placement != fact.placement || machine.host != fact.host {
            continue;
        }
        // What it was made for is known by its end.
        let last = destroyed::last(ctx, machine).await;
        let change = destroy_machine(&row, TombstoneReason::Person).also(destroyed::note(machine, last));
        if ctx.state.commit(change).await? == Outcome::Committed {
            tracing::info!(app = %machine.spec.app, machine = %machine.id, "its run has ended, and it is destroyed");
            ctx.work.notify_one();
        }
    }
    Ok(())
}
