//! Which images this host needs, for the collector of a host without control, which alone knows what releases name.

use crate::agent::{Agent, Input};
use crate::Host;
use dunlin_model::MachineSpec;
use std::collections::BTreeSet;
use tokio::sync::oneshot;

impl Host {
    /// Digests of the images of its machines: of those that it has, in the version that runs and in the one that should,
    /// and of those that the view assigns to it. The view alone would not do, since absence from it orders nothing. All
    /// else may go: it comes again from another host. `None`: the host stops, and nobody knows.
    pub async fn images_in_use(&self) -> Option<Vec<String>> {
        let (reply, answer) = oneshot::channel();
        self.inputs.send(Input::Images(reply)).await.ok()?;
        let mut used = answer.await.ok()?;
        let (view, id) = (self.shared.view.current(), &self.shared.config.id);
        let assigned = view.config.machines.values().filter(|machine| machine.host == *id);
        used.extend(assigned.flat_map(|machine| digests(&machine.spec)));
        Some(used.into_iter().collect())
    }
}

impl Agent {
    pub(crate) fn images(&self) -> BTreeSet<String> {
        let records = self.slots.values().map(|slot| slot.machine.record());
        records.flat_map(|record| digests(record.spec()).chain(digests(&record.assignment.spec))).collect()
    }
}

fn digests(spec: &MachineSpec) -> impl Iterator<Item = String> {
    spec.images().map(|image| image.digest.clone())
}
