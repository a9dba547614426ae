//! Hosts: tokens to join with, what there is, cordon, drain, removal.

use super::given::optional;
use crate::failure::Failure;
use crate::members::{self, MAX_TOKEN_LIFETIME_S, TOKEN_LIFETIME_S};
use crate::removal::{self, Leftovers, Wish};
use crate::rows::{MemberRow, Row};
use crate::{Ctx, FleetQuestion, volumes};
use axum::Json;
use axum::extract::{Path, Query, State};
use bytes::Bytes;
use dunlin_api::fleet::{
    CreateHostToken, HostDetail, HostMachine, HostRemoved, HostShown, HostState, HostToken, HostVolume,
};
use dunlin_model::HostId;
use dunlin_model::desired::{HostRow, MachineRow};
use dunlin_model::volume::VolumeRow;
use dunlin_planner::{Stays, stays};
use dunlin_view::Snapshot;
use http::StatusCode;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;

pub async fn create_token(State(ctx): State<Arc<Ctx>>, body: Bytes) -> Result<(StatusCode, Json<HostToken>), Failure> {
    let CreateHostToken { ttl_s } = optional(&body)?;
    let ttl_s = ttl_s.unwrap_or(TOKEN_LIFETIME_S);
    if ttl_s == 0 || ttl_s > MAX_TOKEN_LIFETIME_S {
        return Err(Failure::invalid(format!("a token to join with lives between 1 second and {MAX_TOKEN_LIFETIME_S} seconds, which is a week")));
    }
    let (token, expires_at_ms) = members::create_token(&ctx, ttl_s).await?;
    Ok((StatusCode::CREATED, Json(HostToken { id: token.id.clone(), token: token.reveal(), expires_at_ms, join_address: members::fleet(&ctx)?.addr })))
}

/// What a host is shown from, read once for all of them.
struct Known {
    view: Arc<Snapshot>,
    members: BTreeMap<HostId, MemberRow>,
    machines: Vec<Row<MachineRow>>,
    volumes: Vec<Row<VolumeRow>>,
}

impl Known {
    async fn read(ctx: &Ctx) -> Result<Self, Failure> {
        let members = ctx.state.list_keyed::<MemberRow>("members/").await?;
        let members = members.into_iter().filter_map(|(key, row)| Some((key.strip_prefix("members/")?.parse().ok()?, row.value)));
        Ok(Self {
            view: ctx.view.current(),
            members: members.collect(),
            machines: ctx.state.machines().await?,
            volumes: ctx.state.list("volumes/").await?,
        })
    }

    fn machines_of<'k>(&'k self, id: &'k HostId) -> impl Iterator<Item = &'k MachineRow> {
        self.machines.iter().map(|row| &row.value).filter(move |row| row.host == *id)
    }

    fn volumes_of<'k>(&'k self, id: &'k HostId) -> impl Iterator<Item = &'k VolumeRow> {
        self.volumes.iter().map(|row| &row.value).filter(move |row| row.host == *id)
    }

    fn shown(&self, ctx: &Ctx, row: &HostRow) -> HostShown {
        let is_control = row.id == ctx.host_row.id;
        let is_up = is_control || ctx.fleet.as_ref().is_some_and(|fleet| (fleet.is_up)(&row.id));
        let (member, fact) = (self.members.get(&row.id), self.view.hosts.get(&row.id));
        HostShown {
            id: row.id.clone(),
            region: row.region.clone(),
            zone: row.zone.clone(),
            labels: row.labels.clone(),
            state: match (is_up, row.draining, row.cordoned) {
                (false, ..) => HostState::Unreachable,
                (_, true, _) => HostState::Draining,
                (_, _, true) => HostState::Cordoned,
                _ => HostState::Up,
            },
            cordoned: row.cordoned,
            draining: row.draining,
            is_control,
            joined_at_ms: row.joined_at_ms,
            addr: match is_control {
                true => ctx.fleet.as_ref().map(|fleet| fleet.addr),
                false => member.map(|member| member.addr),
            },
            version: if is_control { Some(ctx.version.clone()) } else { member.map(|member| member.version.clone()) },
            certificate_ends_at_ms: member.and_then(|member| member.certified_until_ms),
            machine_prefix: row.prefix.to_string(),
            cpus: row.cpus,
            memory_mb: row.memory_mb,
            memory_reserved_mb: fact.map(|fact| fact.memory_reserved_mb),
            room: fact.and_then(|fact| fact.room),
            said_at_ms: fact.map(|fact| fact.updated_at_ms),
            machines: self.machines_of(&row.id).count() as u32,
            volumes: self.volumes_of(&row.id).count() as u32,
        }
    }

    fn detail(&self, ctx: &Ctx, row: &HostRow) -> HostDetail {
        let machine = |machine: &MachineRow| HostMachine {
            id: machine.id.clone(),
            app: machine.spec.app.clone(),
            process_group: machine.spec.process_group.clone(),
            state: self.view.machines.get(&machine.id).map(|fact| fact.state),
            volumes: machine.spec.mounts.iter().map(|mount| mount.volume.clone()).collect(),
            stays: stays(&machine.spec).map(|why| told(why, machine)),
        };
        let machines: Vec<HostMachine> = self.machines_of(&row.id).map(machine).collect();
        let free = self.volumes_of(&row.id).filter(|volume| volumes::holder(&self.machines, &volume.id).is_none());
        let shown = |volume: &VolumeRow| HostVolume { id: volume.id.clone(), app: volume.app.clone(), name: volume.name.clone() };
        HostDetail {
            host: self.shown(ctx, row),
            moving: if row.draining { machines.iter().filter(|machine| machine.stays.is_none()).count() as u32 } else { 0 },
            free_volumes: free.map(shown).collect(),
            machines,
        }
    }
}

fn told(why: Stays, machine: &MachineRow) -> String {
    let (id, app) = (&machine.id, &machine.spec.app);
    match why {
        Stays::HasVolume => format!(
            "its volume is on this host; when the app can do without its files, destroy the machine (`dunlin machine destroy {id}`) \
             and the volume, and `dunlin deploy --app {app}` makes others elsewhere"
        ),
        Stays::IsExclusive => format!(
            "it has no service, so that two of it might do the same work twice; `dunlin machine destroy {id}` ends it, and another \
             one is made elsewhere"
        ),
        Stays::IsPassing => format!("it ends by itself or runs by the clock; wait, or `dunlin machine destroy {id}`"),
        Stays::IsByHand => format!("it was made by hand: make another one elsewhere, then `dunlin machine destroy {id}`"),
    }
}

pub async fn list(State(ctx): State<Arc<Ctx>>) -> Result<Json<Vec<HostShown>>, Failure> {
    let known = Known::read(&ctx).await?;
    let rows = ctx.state.list::<HostRow>("hosts/").await?;
    Ok(Json(rows.iter().map(|row| known.shown(&ctx, &row.value)).collect()))
}

pub(super) async fn detail(ctx: &Ctx, id: &HostId) -> Result<Json<HostDetail>, Failure> {
    let row = removal::load(ctx, id).await?;
    Ok(Json(Known::read(ctx).await?.detail(ctx, &row.value)))
}

pub async fn get(State(ctx): State<Arc<Ctx>>, Path(id): Path<HostId>) -> Result<Json<HostDetail>, Failure> {
    detail(&ctx, &id).await
}

async fn wished(ctx: &Ctx, id: &HostId, wish: Wish) -> Result<Json<HostDetail>, Failure> {
    removal::wish(ctx, id, wish).await?;
    detail(ctx, id).await
}

pub async fn cordon(State(ctx): State<Arc<Ctx>>, Path(id): Path<HostId>) -> Result<Json<HostDetail>, Failure> {
    wished(&ctx, &id, Wish::Cordon).await
}

pub async fn uncordon(State(ctx): State<Arc<Ctx>>, Path(id): Path<HostId>) -> Result<Json<HostDetail>, Failure> {
    wished(&ctx, &id, Wish::Uncordon).await
}

pub async fn drain(State(ctx): State<Arc<Ctx>>, Path(id): Path<HostId>) -> Result<Json<HostDetail>, Failure> {
    wished(&ctx, &id, Wish::Drain).await
}

#[derive(Debug, Deserialize)]
pub struct Remove {
    #[serde(default)]
    force: bool,
}

pub async fn remove(
    State(ctx): State<Arc<Ctx>>,
    Path(id): Path<HostId>,
    Query(query): Query<Remove>,
) -> Result<Json<HostRemoved>, Failure> {
    let leftovers = if query.force { Leftovers::GiveUp } else { Leftovers::Refuse };
    removal::remove(&ctx, &id, leftovers).await.map(Json)
}

pub async fn cluster_status(State(ctx): State<Arc<Ctx>>) -> Result<Json<Value>, Failure> {
    let asked = (members::fleet(&ctx)?.ask)(FleetQuestion::Status);
    Ok(Json(asked.await))
}

pub async fn cluster_verify(State(ctx): State<Arc<Ctx>>) -> Result<Json<Value>, Failure> {
    let asked = (members::fleet(&ctx)?.ask)(FleetQuestion::Verify);
    Ok(Json(asked.await))
}
