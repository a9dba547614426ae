//! Machines: what they are, and commands to the hosts that own them.

use super::given::{self, Body, optional};
use super::gone::{self, Found};
use super::leases;
use crate::destroyed;
use crate::failure::Failure;
use crate::fly::{self, rfc3339};
use crate::owners::{Owners, no_machine};
use crate::reconcile::destroy_machine;
use crate::releases::{busy, load_app};
use crate::rows::{Outcome, Row};
use crate::{Ctx, now_ms};
use axum::Json;
use axum::extract::{Extension, Path, Query, RawQuery, State};
use dunlin_api::wire::{self, ImageRefWire, StopMachine};
use dunlin_api::{Command, CommandAnswer, CommandKind, ErrorCode, Refusal, Source, WaitFor};
use dunlin_model::config::units;
use dunlin_model::desired::{AppRow, MachineRow, TombstoneReason};
use dunlin_model::{
    AppName, CommandId, ContainerState, ContainerStatus, HostId, MachineId, MachineSpec, MachineState, MachineVersion,
};
use dunlin_planner::is_replaceable;
use dunlin_view::{CheckStatus, MachineFact, Snapshot};
use http::HeaderMap;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A host speaks of itself every 5 s: three times nothing is no accident.
const HOST_SILENT_MS: u64 = 15_000;
const COMMAND_DEADLINE_MS: u64 = 15_000;
const MAX_WAIT_S: u64 = 60;
/// Supervisors, while machines are listed.
const MAX_ASKED_AT_ONCE: usize = 16;
const MAX_STOP_TIMEOUT_MS: u64 = 300_000;

/// A machine as the API shows it: its row, and its newest fact if there is one, with its age.
pub(crate) fn wire(owners: &Owners, view: &Snapshot, machine: &MachineRow, config: Value) -> wire::Machine {
    let spec = &machine.spec;
    let fact = view.machines.get(&machine.id);
    let of_itself = view.hosts.get(&machine.host).map(|host| host.updated_at_ms);
    let host_seen_at = of_itself.or(fact.map(|fact| fact.updated_at_ms));
    wire::Machine {
        id: machine.id.clone(),
        name: machine.name.clone(),
        app: spec.app.clone(),
        state: fact.map_or(MachineState::Creating, |fact| fact.state),
        region: machine.region.clone(),
        instance_id: spec.version.to_string(),
        version: spec.version.to_string(),
        private_ip: machine.address.to_string(),
        image_ref: ImageRefWire {
            registry: format!("registry.{}", owners.domain()),
            repository: spec.image.repository.clone(),
            tag: spec.image.tag.clone(),
            digest: spec.image.digest.clone(),
        },
        config,
        guest: spec.guest.clone(),
        checks: fact.map(|fact| fact.checks.iter().map(check).collect()).unwrap_or_default(),
        containers: containers(spec, fact.map(|fact| &**fact)),
        events: Value::Null,
        nonce: None,
        host_status: host_status(fact.is_some(), owners.is_dead(&machine.host), host_seen_at).into(),
        host_seen_at,
        cordoned: fact.is_some_and(|fact| fact.cordoned),
        process_group: spec.process_group.clone(),
        release: spec.release,
        restarts: fact.map_or(0, |fact| fact.restarts),
        exit: fact.and_then(|fact| fact.exit.as_deref().cloned()),
        problem: on_a_dead_host(owners, machine).or_else(|| fact.and_then(|fact| fact.problem.clone())),
        next_run_at: fact.and_then(|fact| fact.due_ms).map(rfc3339),
        created_at: rfc3339(machine.created_at_ms),
        updated_at: rfc3339(fact.map_or(machine.created_at_ms, |fact| fact.updated_at_ms)),
    }
}

/// As its host says, which is asked for that. Of one that does not run, none does.
fn containers(spec: &MachineSpec, fact: Option<&MachineFact>) -> Vec<ContainerStatus> {
    match fact {
        Some(fact) if fact.state.is_running() => fact.containers.clone(),
        _ => {
            let stopped = |name: &String| ContainerStatus { name: name.clone(), state: ContainerState::Stopped };
            spec.containers.iter().map(|container| stopped(&container.name)).collect()
        }
    }
}

fn check(check: &CheckStatus) -> wire::CheckShown {
    wire::CheckShown {
        name: check.name.clone(),
        status: check.status,
        gates_routing: check.gates_routing,
        output: check.output.clone(),
        updated_at: rfc3339(check.updated_at_ms),
    }
}

/// What becomes of a machine whose host is lost, and what a person can do.
fn on_a_dead_host(owners: &Owners, machine: &MachineRow) -> Option<String> {
    let (host, id) = (&machine.host, &machine.id);
    if !owners.is_dead(host) {
        return None;
    }
    if machine.spec.release != 0 && is_replaceable(&machine.spec) {
        return Some(format!("host {host} is down: another machine takes its place"));
    }
    Some(format!(
        "host {host} is down, and the machine may run there all the same, so none takes its place: bring the host back, or, \
         once it is off for good, `dunlin machine destroy {id} --force` gives it up"
    ))
}

/// `unknown`: its host has said nothing of it. `unreachable`: what is shown is what the host said last, and that was
/// long ago.
fn host_status(is_known: bool, is_dead: bool, host_seen_at: Option<u64>) -> &'static str {
    match host_seen_at {
        _ if is_dead => "unreachable",
        _ if !is_known => "unknown",
        Some(at_ms) if now_ms() > at_ms.saturating_add(HOST_SILENT_MS) => "unreachable",
        _ => "ok",
    }
}

/// The machine's row, if it is the app's, for who is to change it.
pub(crate) async fn load(ctx: &Ctx, app: &AppName, id: &MachineId) -> Result<Row<MachineRow>, Failure> {
    load_app(ctx, app).await?;
    let row = ctx.state.machine(id).await?.filter(|row| row.value.spec.app == *app);
    row.ok_or_else(|| no_machine(app, id))
}

pub async fn list(
    Extension(owners): Extension<Owners>,
    Path(app): Path<AppName>,
    Query(query): Query<Vec<(String, String)>>,
) -> Result<Json<Vec<wire::Machine>>, Failure> {
    let app_row = owners.app(&app).await?;
    let filter = Filter::read(query)?;
    let rows = owners.machines_of(&app).await?;
    let configs = owners.configs(None).await?;
    let view = owners.observed(&rows).await;
    let shown = rows.iter().map(|row| {
        let config = if filter.is_summary { Value::Null } else { configs.shown(row) };
        (row, wire(&owners, &view, row, config))
    });
    let mut machines: Vec<_> = shown.filter(|(row, machine)| filter.takes(row, machine)).map(|(_, machine)| machine).collect();
    let has_containers = rows.iter().filter(|row| !row.spec.containers.is_empty());
    let has_containers = has_containers.map(|row| (row.id.clone(), row.host.clone()));
    ask_for_containers(&owners, &has_containers.collect(), &mut machines).await;
    if filter.with_destroyed {
        machines.extend(destroyed_of(&owners, &app_row, &filter, &view).await?);
    }
    Ok(Json(machines))
}

async fn destroyed_of(owners: &Owners, app: &AppRow, filter: &Filter, view: &Snapshot) -> Result<Vec<wire::Machine>, Failure> {
    let Owners::Control(ctx) = owners else {
        return Err(Failure::new(ErrorCode::Unavailable, "only control knows of machines that were destroyed, and it cannot be asked now")
            .hint("leave include_deleted out"));
    };
    let gone = destroyed::of_app(ctx, app).await?.into_iter().map(|gone| {
        let config = if filter.is_summary { Value::Null } else { fly::show(&gone.machine.spec, &ctx.domain) };
        let shown = gone::wire(owners, view, &gone, config);
        (gone, shown)
    });
    Ok(gone.filter(|(gone, shown)| filter.takes(&gone.machine, shown)).map(|(_, shown)| shown).collect())
}

/// Facts do not tell of containers, which come and go while the machine runs: the hosts of those that have some are asked.
/// What a host does not say is not shown.
async fn ask_for_containers(owners: &Owners, hosts: &BTreeMap<MachineId, HostId>, machines: &mut [wire::Machine]) {
    let mut asked: Vec<_> = machines.iter_mut().filter(|machine| machine.state.is_running() && hosts.contains_key(&machine.id)).collect();
    for some in asked.chunks_mut(MAX_ASKED_AT_ONCE) {
        let ids = some.iter().filter_map(|machine| Some((machine.id.clone(), hosts.get(&machine.id)?.clone())));
        let answers = futures_util::future::join_all(ids.map(async |(id, host)| {
            let owner = owners.reach(&host)?;
            owners.look(&host, owner.machine(&id)).await
        }))
        .await;
        for (machine, answer) in some.iter_mut().zip(answers) {
            machine.containers = answer.map(|fact| fact.containers).unwrap_or_default();
        }
    }
}

#[derive(Default)]
struct Filter {
    states: Vec<String>,
    regions: Vec<String>,
    metadata: Vec<(String, String)>,
    /// Without configurations.
    is_summary: bool,
    /// Also those that were destroyed a while ago.
    with_destroyed: bool,
}

impl Filter {
    fn read(query: Vec<(String, String)>) -> Result<Self, Failure> {
        let mut filter = Self::default();
        for (name, value) in query {
            match (name.as_str(), value.as_str()) {
                ("state", _) => {
                    for state in value.split(',') {
                        filter.states.push(state_named(state)?.as_str().to_owned());
                    }
                }
                ("region", _) => filter.regions.push(value),
                ("summary", "true" | "1" | "") => filter.is_summary = true,
                ("include_deleted", "true" | "1" | "") => filter.with_destroyed = true,
                ("summary" | "include_deleted", "false" | "0") => {}
                ("summary" | "include_deleted", _) => {
                    return Err(Failure::bad_request(format!("{name} is true or false, not {value:?}")));
                }
                _ => match name.strip_prefix("metadata.") {
                    Some(key) => filter.metadata.push((key.to_owned(), value)),
                    None => {
                        return Err(Failure::bad_request(format!("{name:?} is no filter for machines"))
                            .hint("use state, region, metadata.KEY, summary or include_deleted"));
                    }
                },
            }
        }
        Ok(filter)
    }

    fn takes(&self, row: &MachineRow, machine: &wire::Machine) -> bool {
        let is_one_of = |wanted: &[String], found: &str| wanted.is_empty() || wanted.iter().any(|one| one == found);
        let spec = &row.spec;
        let has = |key: &str, wanted: &str| match spec.metadata.get(key) {
            Some(value) => value == wanted,
            None => key == "fly_process_group" && spec.process_group == wanted,
        };
        is_one_of(&self.states, machine.state.as_str())
            && is_one_of(&self.regions, machine.region.as_str())
            && self.metadata.iter().all(|(key, wanted)| has(key, wanted))
    }
}

pub async fn get(
    Extension(owners): Extension<Owners>,
    Path((app, id)): Path<(AppName, MachineId)>,
) -> Result<Json<wire::Machine>, Failure> {
    match gone::found(&owners, &app, &id).await? {
        Found::There(row) => Ok(Json(asked(&owners, &row).await?)),
        Found::Destroyed(gone) => {
            let config = fly::show(&gone.machine.spec, owners.domain());
            let shown = gone::wire(&owners, &owners.view().current(), &gone, config);
            Ok(Json(wire::Machine { events: fly::events(&gone.last.events), ..shown }))
        }
    }
}

/// Asks the owner, and falls back to what was last heard.
pub(crate) async fn asked(owners: &Owners, row: &MachineRow) -> Result<wire::Machine, Failure> {
    let id = &row.id;
    let configs = owners.configs(Some(id)).await?;
    let mut view = Snapshot::clone(&owners.view().current());
    let host = &row.host;
    let (answer, events) = match owners.reach(host) {
        Ok(owner) => tokio::join!(owners.look(host, owner.machine(id)), owners.look(host, owner.events(id))),
        Err(refusal) => (Err(refusal.clone()), Err(refusal)),
    };
    if let Ok(fact) = &answer {
        view.machines.insert(id.clone(), Arc::new(fact.clone()));
    }
    let mut shown = wire(owners, &view, row, configs.shown(row));
    if let Ok(events) = events {
        shown.events = fly::events(&events);
    }
    Ok(match answer {
        Ok(_) => wire::Machine { host_status: "ok".into(), host_seen_at: Some(now_ms()), ..shown },
        Err(Refusal::NoSuchMachine(_)) => shown, // it answers, and has not taken the machine up yet
        Err(refusal) => {
            tracing::debug!(machine = %id, %refusal, "the host does not answer for the machine");
            wire::Machine { host_status: "unreachable".into(), ..shown }
        }
    })
}

#[derive(Debug, Deserialize)]
pub struct Destroy {
    #[serde(default)]
    force: bool,
    #[serde(default)]
    kill: bool,
}

pub async fn destroy(
    State(ctx): State<Arc<Ctx>>,
    Path((app, id)): Path<(AppName, MachineId)>,
    Query(query): Query<Destroy>,
    headers: HeaderMap,
) -> Result<Json<Value>, Failure> {
    let row = load(&ctx, &app, &id).await?;
    let last = destroyed::last(&ctx, &row.value).await;
    match leases::check(&ctx, &row, &headers).await {
        // Whoever forces it gives up what a host that is lost knows of a lease; it destroys the machine when it returns.
        Err(failure) if failure.code == ErrorCode::Unavailable && query.force => {
            tracing::info!(%app, machine = %id, why = failure.message, "destroyed although its host cannot be asked");
        }
        Err(failure) if failure.code == ErrorCode::Unavailable => {
            return Err(failure.hint("`--force` gives the machine up without its host, which destroys it when it returns"));
        }
        checked => checked?,
    }
    let state = ctx.view.current().machines.get(&id).map(|fact| fact.state);
    if let Some(state) = state.filter(|state| state.is_running())
        && !query.force
        && !query.kill
    {
        return Err(Failure::new(ErrorCode::FailedPrecondition, format!("machine {id} is {}", state.as_str()))
            .hint("stop it first, or force its end with `--force`"));
    }
    let change = destroy_machine(&row, TombstoneReason::Person).also(destroyed::note(&row.value, last));
    match ctx.state.commit(change).await? {
        Outcome::Committed => {
            ctx.work.notify_one();
            let group = &row.value.spec.process_group;
            // One made by hand is in no release's count.
            let note = (row.value.spec.release != 0).then(|| {
                format!("a new machine takes its place while {group} should have as many: `dunlin scale count` changes how many")
            });
            Ok(Json(json!({ "ok": true, "note": note })))
        }
        Outcome::Conflict => Err(busy(&app)),
    }
}

async fn command(
    owners: &Owners,
    app: &AppName,
    id: &MachineId,
    headers: &HeaderMap,
    kind: CommandKind,
) -> Result<Json<Value>, Failure> {
    let row = owners.machine(app, id).await?;
    let answer = send(owners, &row, headers, kind).await?;
    Ok(Json(json!({ "ok": true, "previous_state": answer.previous_state.as_str(), "migrated": false, "new_host": "" })))
}

pub(super) async fn send(
    owners: &Owners,
    row: &MachineRow,
    headers: &HeaderMap,
    kind: CommandKind,
) -> Result<CommandAnswer, Failure> {
    let command = Command {
        id: command_id(headers)?,
        machine: row.id.clone(),
        deadline_ms: now_ms() + COMMAND_DEADLINE_MS,
        generation: Some(row.placement),
        plan: None,
        expected_version: None,
        nonce: leases::nonce(headers)?,
        source: Source::User,
        request_id: super::request_id(),
        kind,
    };
    Ok(owners.reach(&row.host)?.command(command).await?)
}

/// The client's own, or a fresh one.
fn command_id(headers: &HeaderMap) -> Result<CommandId, Failure> {
    if let Some(given) = given::command_id(headers)? {
        return Ok(given);
    }
    let random: String = crate::keys::random::<12>().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("user.{random}").parse().map_err(|error| Failure::internal("a command id could not be made", &error))
}

pub async fn start(
    Extension(owners): Extension<Owners>,
    Path((app, id)): Path<(AppName, MachineId)>,
    headers: HeaderMap,
) -> Result<Json<Value>, Failure> {
    command(&owners, &app, &id, &headers, CommandKind::Start).await
}

pub async fn stop(
    Extension(owners): Extension<Owners>,
    Path((app, id)): Path<(AppName, MachineId)>,
    headers: HeaderMap,
    body: bytes::Bytes,
) -> Result<Json<Value>, Failure> {
    let body: StopMachine = optional(&body)?;
    // Fly's Go client sends `0s` where nothing was asked for.
    let timeout = body.timeout.filter(|timeout| *timeout != json!("0s"));
    let timeout_ms = timeout.as_ref().map(duration_ms).transpose()?;
    command(&owners, &app, &id, &headers, CommandKind::Stop { signal: body.signal, timeout_ms }).await
}

pub async fn suspend(
    Extension(owners): Extension<Owners>,
    Path((app, id)): Path<(AppName, MachineId)>,
    headers: HeaderMap,
) -> Result<Json<Value>, Failure> {
    command(&owners, &app, &id, &headers, CommandKind::Suspend).await
}

/// By the query, as one of Fly's clients has it, or in the body, as another.
#[derive(Debug, Default, Deserialize)]
pub struct Restart {
    timeout: Option<Value>,
    signal: Option<String>,
    /// A text in a query.
    force_stop: Option<Value>,
}

impl Restart {
    /// How long its program has to end by itself.
    fn timeout_ms(&self) -> Result<Option<u64>, Failure> {
        let timeout_ms = self.timeout.as_ref().map(duration_ms).transpose()?;
        match &self.force_stop {
            None | Some(Value::Null | Value::Bool(false)) => Ok(timeout_ms),
            Some(Value::Bool(true)) => Ok(Some(0)),
            Some(Value::String(text)) if text == "true" => Ok(Some(0)),
            Some(Value::String(text)) if text == "false" || text.is_empty() => Ok(timeout_ms),
            Some(other) => Err(Failure::invalid(format!("force_stop is true or false, not {other}"))),
        }
    }
}

pub async fn restart(
    Extension(owners): Extension<Owners>,
    Path((app, id)): Path<(AppName, MachineId)>,
    Query(query): Query<Restart>,
    headers: HeaderMap,
    body: bytes::Bytes,
) -> Result<Json<Value>, Failure> {
    let body: Restart = optional(&body)?;
    // Each is read for itself: what cannot be used in one is not hidden by the other.
    let (of_query, of_body) = (query.timeout_ms()?, body.timeout_ms()?);
    let signal = [query.signal, body.signal].into_iter().flatten().find(|signal| !signal.is_empty());
    command(&owners, &app, &id, &headers, CommandKind::Restart { signal, timeout_ms: of_query.or(of_body) }).await
}

#[derive(Debug, Deserialize)]
pub struct Signal {
    /// A name, or the number that Fly's client sends to kill.
    signal: Value,
}

pub async fn signal(
    Extension(owners): Extension<Owners>,
    Path((app, id)): Path<(AppName, MachineId)>,
    headers: HeaderMap,
    Body(body): Body<Signal>,
) -> Result<Json<Value>, Failure> {
    let signal = match body.signal {
        Value::String(name) => name,
        Value::Number(number) => number.to_string(),
        _ => return Err(Failure::invalid("signal must be a name such as SIGTERM, or a number")),
    };
    command(&owners, &app, &id, &headers, CommandKind::Signal { signal }).await
}

pub async fn cordon(
    Extension(owners): Extension<Owners>,
    Path((app, id)): Path<(AppName, MachineId)>,
    headers: HeaderMap,
) -> Result<Json<Value>, Failure> {
    command(&owners, &app, &id, &headers, CommandKind::Cordon).await
}

pub async fn uncordon(
    Extension(owners): Extension<Owners>,
    Path((app, id)): Path<(AppName, MachineId)>,
    headers: HeaderMap,
) -> Result<Json<Value>, Failure> {
    command(&owners, &app, &id, &headers, CommandKind::Uncordon).await
}

/// Seconds as a number, or a duration like `10s`.
fn duration_ms(value: &Value) -> Result<u64, Failure> {
    let ms = match value {
        Value::Number(seconds) => seconds.as_f64().map(|seconds| (seconds.max(0.0) * 1000.0) as u64),
        Value::String(text) => {
            let seconds = text.trim().parse::<u32>().ok().map(|seconds| u64::from(seconds) * 1000);
            seconds.or_else(|| units::parse_duration_ms(text))
        }
        _ => None,
    };
    let ms = ms.ok_or_else(|| Failure::invalid(format!("{value} is not a duration")).hint("for example 10 or \"10s\""))?;
    Ok(ms.min(MAX_STOP_TIMEOUT_MS))
}

/// `state` may be repeated, and `settled` means any state that does not pass by itself.
pub async fn wait(
    Extension(owners): Extension<Owners>,
    Path((app, id)): Path<(AppName, MachineId)>,
    RawQuery(query): RawQuery,
) -> Result<Json<Value>, Failure> {
    let wait = parse_wait(query.as_deref().unwrap_or_default())?;
    let awaits_end = wait.states.contains(&MachineState::Destroyed);
    if let Err(missing) = owners.machine(&app, &id).await {
        // Its row goes at once; its host needs a moment.
        if !awaits_end || !owners.is_destroyed(&app, &id).await? {
            return Err(missing);
        }
    }
    let waited = match owners.of(&id).await {
        Ok(host) => host.wait(&id, wait.clone()).await,
        Err(refusal) => Err(refusal),
    };
    match waited {
        Ok(fact) => Ok(Json(json!({ "ok": true, "state": fact.state.as_str(), "version": fact.version }))),
        Err(Refusal::NoSuchMachine(_)) if awaits_end && owners.known(&id).await?.is_none() => {
            Ok(Json(json!({ "ok": true, "state": "destroyed" })))
        }
        Err(refusal @ Refusal::Unreachable { .. }) => last_heard(&owners, &id, &wait).map(Json).ok_or_else(|| refusal.into()),
        Err(refusal) => Err(refusal.into()),
    }
}

/// What its host said before it could not be reached any more, if that is what was waited for.
fn last_heard(owners: &Owners, id: &MachineId, wait: &WaitFor) -> Option<Value> {
    let view = owners.view().current();
    let fact = view.machines.get(id).filter(|_| wait.after_event.is_none())?;
    let is_it = wait.states.contains(&fact.state) && wait.version.as_ref().is_none_or(|version| *version == fact.version);
    is_it.then(|| json!({ "ok": true, "state": fact.state.as_str(), "version": fact.version, "host_status": "unreachable" }))
}

fn state_named(name: &str) -> Result<MachineState, Failure> {
    serde_json::from_value(Value::String(name.to_owned())).map_err(|_| {
        Failure::bad_request(format!("{name:?} is not a state of a machine"))
            .hint("they are created, starting, started, stopping, stopped, suspending, suspended, restarting, updating, failed and destroyed")
    })
}

fn parse_wait(query: &str) -> Result<WaitFor, Failure> {
    let mut wait = WaitFor { states: vec![], version: None, after_event: None, timeout_ms: MAX_WAIT_S * 1000 };
    let mut needs_version = false;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        match name {
            "state" if value == "settled" => wait.states.extend([
                MachineState::Started,
                MachineState::Stopped,
                MachineState::Suspended,
                MachineState::Failed,
                MachineState::Destroyed,
            ]),
            "state" => {
                let state = state_named(value).map_err(|failure| failure.hint("wait for started, stopped, suspended, destroyed or settled"))?;
                // Any of its versions may have stopped before; the caller means one.
                needs_version |= state == MachineState::Stopped;
                wait.states.push(state);
            }
            "instance_id" | "version" => {
                let version: Result<MachineVersion, _> = value.parse();
                wait.version = Some(version.map_err(|error| Failure::bad_request(error.to_string()))?);
            }
            "timeout" => {
                let seconds: u64 = value.trim_end_matches('s').parse().map_err(|_| {
                    Failure::bad_request(format!("{value:?} is not a number of seconds"))
                })?;
                wait.timeout_ms = seconds.clamp(1, MAX_WAIT_S) * 1000;
            }
            "from_event_id" if value.is_empty() => {}
            "from_event_id" => {
                wait.after_event = Some(value.parse().map_err(|_| {
                    Failure::bad_request(format!("{value:?} is not the id of an event"))
                        .hint("GET .../events shows those of the machine")
                })?);
            }
            _ => return Err(Failure::bad_request(format!("{name:?} is no argument of a wait"))),
        }
    }
    if needs_version && wait.version.is_none() {
        return Err(Failure::bad_request("a wait for stopped wants to know of which version")
            .hint("add instance_id, as the machine shows it; or wait for settled"));
    }
    if wait.states.is_empty() {
        wait.states.push(MachineState::Started);
    }
    Ok(wait)
}

#[derive(Debug, Deserialize)]
pub struct Events {
    limit: Option<usize>,
}

/// What happened to it, the newest first.
pub async fn events(
    Extension(owners): Extension<Owners>,
    Path((app, id)): Path<(AppName, MachineId)>,
    Query(query): Query<Events>,
) -> Result<Json<Value>, Failure> {
    let mut events = match gone::found(&owners, &app, &id).await? {
        Found::There(row) => owners.reach(&row.host)?.events(&id).await?,
        Found::Destroyed(gone) => gone.last.events,
    };
    events.truncate(query.limit.unwrap_or(usize::MAX));
    Ok(Json(fly::events(&events)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_seconds_or_say_their_unit() {
        let check = |value: Value, expected| assert_eq!(duration_ms(&value).ok(), expected, "{value}");
        check(json!(10), Some(10_000));
        check(json!("10s"), Some(10_000));
        check(json!("250ms"), Some(250));
        check(json!("2m"), Some(120_000));
        check(json!("1m30s"), Some(90_000));
        check(json!("1h"), Some(MAX_STOP_TIMEOUT_MS));
        check(json!("1x"), None);
        check(json!(-1), Some(0));
        check(json!([]), None);
    }

    #[test]
    fn a_wait_names_its_states() {
        let wait = parse_wait("state=stopped&state=failed&timeout=5&instance_id=01HZXV9Z3M8Q6T2V5W7Y9A1B3C").unwrap();
        assert_eq!(wait.states, [MachineState::Stopped, MachineState::Failed]);
        assert!(parse_wait("state=stopped").is_err() && parse_wait("state=settled").is_ok());
        assert_eq!(wait.timeout_ms, 5_000);
        assert_eq!(parse_wait("").unwrap().states, [MachineState::Started]);
        assert_eq!(parse_wait("timeout=600").unwrap().timeout_ms, 60_000);
        assert!(parse_wait("state=happy").is_err());
        assert_eq!(parse_wait("from_event_id=").unwrap().after_event, None);
        assert_eq!(parse_wait("from_event_id=17").unwrap().after_event, Some(17));
        assert!(parse_wait("from_event_id=01H").is_err());
    }
}
