//! Which host owns a machine, and how it is reached for whoever asks: all that commands to machines, logs and looks at them
//! need. Control knows it from desired state. A member that cannot ask control knows it from config facts, and shows other
//! hosts the proof of its caller.

use crate::failure::Failure;
use crate::machine_rows::{self, ConfigsRow};
use crate::releases::load_app;
use crate::rows::key;
use crate::without::WithoutControl;
use crate::{Ctx, fly, hosts};
use dunlin_api::{HostApi, Refusal};
use dunlin_cluster::View;
use dunlin_model::desired::{AppRow, MachineRow, TombstoneRow};
use dunlin_model::{AppName, HostId, MachineId, OrgName, Region};
use dunlin_view::{AppFact, Freshness, MachineAssignment, Snapshot};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// A region that is far away answers within a second.
const DETAIL_WITHIN: Duration = Duration::from_secs(2);

#[derive(Clone)]
pub(crate) enum Owners {
    Control(Arc<Ctx>),
    /// And the token of whoever asks; root on this host has none.
    Member(Arc<WithoutControl>, Option<Arc<str>>),
}

/// Configurations as they were given; of a machine without one, what its spec says.
pub(crate) struct Configs {
    given: BTreeMap<MachineId, ConfigsRow>,
    domain: String,
}

impl Configs {
    pub fn shown(&self, machine: &MachineRow) -> Value {
        match self.given.get(&machine.id) {
            Some(given) => given.shown(&machine.spec, &self.domain),
            None => fly::show(&machine.spec, &self.domain),
        }
    }
}

impl Owners {
    pub fn view(&self) -> &View {
        match self {
            Self::Control(ctx) => &ctx.view,
            Self::Member(member, _) => &member.view,
        }
    }

    /// The view, with what runs of these machines as far as that can be known. Control's has it all; a member's is told of other
    /// regions when it asks.
    pub async fn observed(&self, machines: &[MachineRow]) -> Arc<Snapshot> {
        let Self::Member(member, _) = self else { return self.view().current() };
        let unseen = |view: &Snapshot| -> BTreeSet<(Region, AppName)> {
            let is_unseen = |row: &&MachineRow| {
                row.region != member.region && !view.told.contains(&row.host) && view.freshness(&row.host) != Freshness::Old
            };
            machines.iter().filter(is_unseen).map(|row| (row.region.clone(), row.spec.app.clone())).collect()
        };
        let mut changes = member.view.subscribe();
        for (region, app) in unseen(&changes.current()) {
            (member.see_detail)(&region, &app);
        }
        let all = async {
            while !unseen(&changes.current()).is_empty() {
                changes.changed().await;
            }
        };
        let _ = tokio::time::timeout(DETAIL_WITHIN, all).await; // what did not come is shown as not heard of
        member.view.current()
    }

    pub fn domain(&self) -> &str {
        match self {
            Self::Control(ctx) => &ctx.domain,
            Self::Member(member, _) => &member.version.domain,
        }
    }

    /// Of the edge: HTTP, HTTPS.
    pub fn ports(&self) -> (u16, u16) {
        match self {
            Self::Control(ctx) => (ctx.http_port, ctx.https_port),
            Self::Member(member, _) => (member.version.http_port, member.version.https_port),
        }
    }

    pub fn org(&self) -> &OrgName {
        match self {
            Self::Control(ctx) => &ctx.org,
            Self::Member(member, _) => &member.org,
        }
    }

    pub fn stop(&self) -> &CancellationToken {
        match self {
            Self::Control(ctx) => &ctx.stop,
            Self::Member(member, _) => &member.stop,
        }
    }

    /// The host on which this runs.
    pub fn here(&self) -> &Arc<dyn HostApi> {
        match self {
            Self::Control(ctx) => &ctx.host,
            Self::Member(member, _) => &member.host,
        }
    }

    /// Whether there are hosts beside this one.
    pub fn is_fleet(&self) -> bool {
        match self {
            Self::Control(ctx) => ctx.reach.is_some(),
            Self::Member(..) => true,
        }
    }

    /// By control's word; members find no host dead.
    pub fn is_dead(&self, host: &HostId) -> bool {
        match self {
            Self::Control(ctx) => ctx.watched.is_dead(host),
            Self::Member(..) => false,
        }
    }

    pub fn reach(&self, host: &HostId) -> Result<Arc<dyn HostApi>, Refusal> {
        match self {
            Self::Control(ctx) => hosts::reach(ctx, host),
            Self::Member(member, _) if member.host.host_id() == host => Ok(Arc::clone(&member.host)),
            Self::Member(_, None) => Err(Refusal::Forbidden(format!(
                "root on this host has a say in its own machines alone while control is away, and this one is on host {host}"
            ))),
            Self::Member(member, Some(token)) => (member.reach)(host, token)
                .ok_or_else(|| Refusal::Unreachable { host: host.clone(), why: "no address of it is known here".into() }),
        }
    }

    /// For people who look: an answer of a host elsewhere is not waited for long.
    pub async fn look<T>(&self, host: &HostId, asked: impl Future<Output = Result<T, Refusal>>) -> Result<T, Refusal> {
        hosts::look(self.here().host_id(), host, asked).await
    }

    pub async fn app(&self, app: &AppName) -> Result<AppRow, Failure> {
        match self {
            Self::Control(ctx) => Ok(load_app(ctx, app).await?.value),
            Self::Member(member, _) => {
                let view = member.view.current();
                let fact = view.config.apps.get(app);
                fact.map(|fact| row_of_app(app, fact)).ok_or_else(|| {
                    Failure::not_found(format!("there is no app {app}, as far as this host has heard"))
                        .hint("`dunlin apps list` shows those that it knows; control, which cannot be asked now, may know more")
                })
            }
        }
    }

    pub async fn apps(&self) -> Result<Vec<AppRow>, Failure> {
        match self {
            Self::Control(ctx) => Ok(ctx.state.list::<AppRow>("apps/").await?.into_iter().map(|row| row.value).collect()),
            Self::Member(member, _) => Ok(member.view.current().config.apps.iter().map(|(name, fact)| row_of_app(name, fact)).collect()),
        }
    }

    pub async fn machines(&self) -> Result<Vec<MachineRow>, Failure> {
        match self {
            Self::Control(ctx) => Ok(ctx.state.machines().await?.into_iter().map(|row| row.value).collect()),
            Self::Member(member, _) => Ok(member.view.current().config.machines.values().map(row_of_machine).collect()),
        }
    }

    pub async fn machines_of(&self, app: &AppName) -> Result<Vec<MachineRow>, Failure> {
        Ok(self.machines().await?.into_iter().filter(|row| row.spec.app == *app).collect())
    }

    pub async fn known(&self, id: &MachineId) -> Result<Option<MachineRow>, Failure> {
        match self {
            Self::Control(ctx) => Ok(ctx.state.machine(id).await?.map(|row| row.value)),
            Self::Member(member, _) => Ok(member.view.current().config.machines.get(id).map(row_of_machine)),
        }
    }

    /// The machine, if it is the app's.
    pub async fn machine(&self, app: &AppName, id: &MachineId) -> Result<MachineRow, Failure> {
        self.app(app).await?;
        self.known(id).await?.filter(|row| row.spec.app == *app).ok_or_else(|| no_machine(app, id))
    }

    /// Whether it was one of the app's that is destroyed.
    pub async fn is_destroyed(&self, app: &AppName, id: &MachineId) -> Result<bool, Failure> {
        match self {
            Self::Control(ctx) => {
                let tombstone = ctx.state.get::<TombstoneRow>(&key::tombstone(id)).await?;
                Ok(tombstone.is_some_and(|tombstone| tombstone.value.app == *app))
            }
            Self::Member(member, _) => {
                let view = member.view.current();
                Ok(view.config.tombstones.contains_key(id) && view.machines.get(id).is_some_and(|fact| fact.app == *app))
            }
        }
    }

    /// The host of a machine; of one that was destroyed, the host that still ends it.
    pub async fn of(&self, id: &MachineId) -> Result<Arc<dyn HostApi>, Refusal> {
        match self {
            Self::Control(ctx) => hosts::of_machine(ctx, id).await,
            Self::Member(member, _) => {
                let view = member.view.current();
                let host = view.config.machines.get(id).map(|row| &row.host).or_else(|| view.config.tombstones.get(id));
                self.reach(host.ok_or_else(|| Refusal::NoSuchMachine(id.clone()))?)
            }
        }
    }

    /// All that were given; `None`: of all machines.
    pub async fn configs(&self, of: Option<&MachineId>) -> Result<Configs, Failure> {
        let given = match (self, of) {
            (Self::Control(ctx), None) => machine_rows::all_configs(ctx).await?,
            (Self::Control(ctx), Some(id)) => {
                let found = ctx.state.get::<ConfigsRow>(&key::configs(id)).await?;
                found.map(|row| (id.clone(), row.value)).into_iter().collect()
            }
            (Self::Member(..), _) => BTreeMap::new(),
        };
        Ok(Configs { given, domain: self.domain().to_owned() })
    }
}

pub(crate) fn no_machine(app: &AppName, id: &MachineId) -> Failure {
    Failure::not_found(format!("app {app} has no machine {id}"))
        .hint(format!("`dunlin machine list --app {app}` shows those it has"))
}

/// As far as config facts tell.
fn row_of_app(name: &AppName, fact: &AppFact) -> AppRow {
    AppRow {
        name: name.clone(),
        org: fact.org.clone(),
        created_at_ms: fact.created_at_ms,
        current_release: fact.current_release,
        last_good_release: fact.current_release,
        scale: BTreeMap::new(),
        destroying: false,
    }
}

fn row_of_machine(fact: &MachineAssignment) -> MachineRow {
    let MachineAssignment { id, name, host, region, address, placement, created_at_ms, spec } = fact.clone();
    MachineRow { id, name, host, region, address, placement, created_at_ms, spec }
}
