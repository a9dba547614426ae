//! Machines: what they are, and commands to the hosts that own them.

use super::Caller;
use crate::failure::Failure;
use crate::reconcile::destroy_machine;
use crate::releases::{busy, load_app};
use crate::rows::{Outcome, Row};
use crate::{Ctx, now_ms};
use axum::Json;
use axum::extract::{Extension, Path, Query, RawQuery, State};
use dunlin_api::wire::{self, ExecAnswer, ExecBody, ImageRefWire, StopMachine};
use dunlin_api::{Command, CommandKind, ErrorCode, ExecOutput, ExecRequest, ExecStdin, Refusal, Source, WaitFor};
use dunlin_model::config::words;
use dunlin_model::desired::{MachineRow, TombstoneReason};
use dunlin_model::{AppName, CommandId, MachineId, MachineState, MachineVersion};
use dunlin_view::Snapshot;
use http::{HeaderMap, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;

/// A host speaks of itself every 5 s: three times nothing is no accident.
const HOST_SILENT_MS: u64 = 15_000;
const COMMAND_DEADLINE_MS: u64 = 15_000;
const MAX_WAIT_S: u64 = 60;
/// The default, as on Fly.
const EXEC_TIMEOUT_S: u64 = 30;
const MAX_EXEC_TIMEOUT_S: u64 = 3600;
/// Of each stream; more ends the command.
const MAX_EXEC_OUTPUT_BYTES: usize = 8 * 1024 * 1024;
const MAX_STOP_TIMEOUT_MS: u64 = 300_000;

/// A machine as the API shows it: its row, and its newest fact if there is one, with its age.
pub(crate) fn wire(ctx: &Ctx, view: &Snapshot, row: &Row<MachineRow>) -> wire::Machine {
    let machine = &row.value;
    let spec = &machine.spec;
    let fact = view.machines.get(&machine.id);
    let of_itself = view.hosts.get(&machine.host).map(|host| host.updated_at_ms);
    let host_seen_at = of_itself.or(fact.map(|fact| fact.updated_at_ms));
    wire::Machine {
        id: machine.id.clone(),
        name: machine.name.clone(),
        state: fact.map_or(MachineState::Creating, |fact| fact.state),
        region: machine.region.clone(),
        instance_id: spec.version.to_string(),
        private_ip: machine.address.to_string(),
        image_ref: ImageRefWire {
            registry: format!("registry.{}", ctx.domain),
            repository: spec.image.repository.clone(),
            tag: spec.image.tag.clone(),
            digest: spec.image.digest.clone(),
        },
        config: spec.clone(),
        checks: fact.map(|fact| fact.checks.clone()).unwrap_or_default(),
        host_status: host_status(fact.is_some(), host_seen_at).into(),
        host_seen_at,
        cordoned: fact.is_some_and(|fact| fact.cordoned),
        process_group: spec.process_group.clone(),
        release: spec.release,
        restarts: fact.map_or(0, |fact| fact.restarts),
        exit: fact.and_then(|fact| fact.exit.clone()),
        problem: fact.and_then(|fact| fact.problem.clone()),
        created_at: machine.created_at_ms,
        updated_at: fact.map_or(machine.created_at_ms, |fact| fact.updated_at_ms),
    }
}

/// `unknown`: its host has said nothing of it. `unreachable`: what is shown is what the host said last, and that was
/// long ago.
fn host_status(is_known: bool, host_seen_at: Option<u64>) -> &'static str {
    match host_seen_at {
        _ if !is_known => "unknown",
        Some(at_ms) if now_ms() > at_ms.saturating_add(HOST_SILENT_MS) => "unreachable",
        _ => "ok",
    }
}

/// The machine's row, if it is the app's.
pub(crate) async fn load(ctx: &Ctx, app: &AppName, id: &MachineId) -> Result<Row<MachineRow>, Failure> {
    load_app(ctx, app).await?;
    let row = ctx.state.machine(id).await?.filter(|row| row.value.spec.app == *app);
    row.ok_or_else(|| {
        Failure::not_found(format!("app {app} has no machine {id}"))
            .hint(format!("`dunlin machine list --app {app}` shows those it has"))
    })
}

pub async fn list(
    State(ctx): State<Arc<Ctx>>,
    Path(app): Path<AppName>,
) -> Result<Json<Vec<wire::Machine>>, Failure> {
    load_app(&ctx, &app).await?;
    let rows = ctx.state.machines_of(&app).await?;
    let view = ctx.view.current();
    Ok(Json(rows.iter().map(|row| wire(&ctx, &view, row)).collect()))
}

/// Asks the owner, and falls back to what was last heard.
pub async fn get(
    State(ctx): State<Arc<Ctx>>,
    Path((app, id)): Path<(AppName, MachineId)>,
) -> Result<Json<wire::Machine>, Failure> {
    let row = load(&ctx, &app, &id).await?;
    let mut view = Snapshot::clone(&ctx.view.current());
    let answer = ctx.host.machine(&id).await;
    if let Ok(fact) = &answer {
        view.machines.insert(id.clone(), Arc::new(fact.clone()));
    }
    let shown = wire(&ctx, &view, &row);
    Ok(Json(match answer {
        Ok(_) => wire::Machine { host_status: "ok".into(), host_seen_at: Some(now_ms()), ..shown },
        Err(Refusal::NoSuchMachine(_)) => shown, // it answers, and has not taken the machine up yet
        Err(refusal) => {
            tracing::debug!(machine = %id, %refusal, "the host does not answer for the machine");
            wire::Machine { host_status: "unreachable".into(), ..shown }
        }
    }))
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
) -> Result<Json<Value>, Failure> {
    let row = load(&ctx, &app, &id).await?;
    let state = ctx.view.current().machines.get(&id).map(|fact| fact.state);
    if let Some(state) = state.filter(|state| state.is_running())
        && !query.force
        && !query.kill
    {
        return Err(Failure::new(ErrorCode::FailedPrecondition, format!("machine {id} is {}", state.as_str()))
            .hint("stop it first, or force its end with `--force`"));
    }
    match ctx.state.commit(destroy_machine(&row, TombstoneReason::Person)).await? {
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
    ctx: &Ctx,
    app: &AppName,
    id: &MachineId,
    headers: &HeaderMap,
    kind: CommandKind,
) -> Result<Json<Value>, Failure> {
    let row = load(ctx, app, id).await?;
    let nonce = headers.get("fly-machine-lease-nonce").and_then(|value| value.to_str().ok());
    let command = Command {
        id: command_id(headers)?,
        machine: id.clone(),
        deadline_ms: now_ms() + COMMAND_DEADLINE_MS,
        generation: Some(row.value.placement),
        plan: None,
        expected_version: None,
        nonce: nonce.map(str::to_owned),
        source: Source::User,
        request_id: headers.get("fly-request-id").and_then(|value| value.to_str().ok()).map(str::to_owned),
        kind,
    };
    let answer = ctx.host.command(command).await?;
    Ok(Json(json!({ "ok": true, "previous_state": answer.previous_state.as_str(), "migrated": false, "new_host": "" })))
}

/// The client's own id, so that its repeat gets the first answer; otherwise a fresh one.
fn command_id(headers: &HeaderMap) -> Result<CommandId, Failure> {
    if let Some(given) = headers.get("dunlin-command-id") {
        let text = given.to_str().map_err(|_| Failure::bad_request("the header dunlin-command-id is not text"))?;
        return format!("user.{text}").parse().map_err(|error| Failure::bad_request(format!("{error}")));
    }
    let random: String = crate::keys::random::<12>().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("user.{random}").parse().map_err(|error| Failure::internal("a command id could not be made", &error))
}

pub async fn start(
    State(ctx): State<Arc<Ctx>>,
    Path((app, id)): Path<(AppName, MachineId)>,
    headers: HeaderMap,
) -> Result<Json<Value>, Failure> {
    command(&ctx, &app, &id, &headers, CommandKind::Start).await
}

pub async fn stop(
    State(ctx): State<Arc<Ctx>>,
    Path((app, id)): Path<(AppName, MachineId)>,
    headers: HeaderMap,
    body: bytes::Bytes,
) -> Result<Json<Value>, Failure> {
    let body: StopMachine = optional(&body)?;
    let timeout_ms = body.timeout.as_ref().map(duration_ms).transpose()?;
    command(&ctx, &app, &id, &headers, CommandKind::Stop { signal: body.signal, timeout_ms }).await
}

pub async fn suspend(
    State(ctx): State<Arc<Ctx>>,
    Path((app, id)): Path<(AppName, MachineId)>,
    headers: HeaderMap,
) -> Result<Json<Value>, Failure> {
    command(&ctx, &app, &id, &headers, CommandKind::Suspend).await
}

#[derive(Debug, Deserialize)]
pub struct Restart {
    timeout: Option<String>,
}

pub async fn restart(
    State(ctx): State<Arc<Ctx>>,
    Path((app, id)): Path<(AppName, MachineId)>,
    Query(query): Query<Restart>,
    headers: HeaderMap,
) -> Result<Json<Value>, Failure> {
    let timeout_ms = query.timeout.map(|text| duration_ms(&Value::String(text))).transpose()?;
    command(&ctx, &app, &id, &headers, CommandKind::Restart { timeout_ms }).await
}

#[derive(Debug, Deserialize)]
pub struct Signal {
    signal: String,
}

pub async fn signal(
    State(ctx): State<Arc<Ctx>>,
    Path((app, id)): Path<(AppName, MachineId)>,
    headers: HeaderMap,
    Json(body): Json<Signal>,
) -> Result<Json<Value>, Failure> {
    command(&ctx, &app, &id, &headers, CommandKind::Signal { signal: body.signal }).await
}

pub async fn cordon(
    State(ctx): State<Arc<Ctx>>,
    Path((app, id)): Path<(AppName, MachineId)>,
    headers: HeaderMap,
) -> Result<Json<Value>, Failure> {
    command(&ctx, &app, &id, &headers, CommandKind::Cordon).await
}

pub async fn uncordon(
    State(ctx): State<Arc<Ctx>>,
    Path((app, id)): Path<(AppName, MachineId)>,
    headers: HeaderMap,
) -> Result<Json<Value>, Failure> {
    command(&ctx, &app, &id, &headers, CommandKind::Uncordon).await
}

/// A body that may be missing.
fn optional<T: Default + serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Failure> {
    if body.iter().all(u8::is_ascii_whitespace) {
        return Ok(T::default());
    }
    serde_json::from_slice(body).map_err(|error| Failure::invalid(format!("the body is not what it should be: {error}")))
}

/// Seconds as a number, or a duration like `10s`.
fn duration_ms(value: &Value) -> Result<u64, Failure> {
    let ms = match value {
        Value::Number(seconds) => seconds.as_f64().map(|seconds| (seconds.max(0.0) * 1000.0) as u64),
        Value::String(text) => parse_duration_ms(text.trim()),
        _ => None,
    };
    let ms = ms.ok_or_else(|| Failure::invalid(format!("{value} is not a duration")).hint("for example 10 or \"10s\""))?;
    Ok(ms.min(MAX_STOP_TIMEOUT_MS))
}

fn parse_duration_ms(text: &str) -> Option<u64> {
    let (number, factor) = match text {
        _ if text.ends_with("ms") => (&text[..text.len() - 2], 1.0),
        _ if text.ends_with('s') => (&text[..text.len() - 1], 1000.0),
        _ if text.ends_with('m') => (&text[..text.len() - 1], 60_000.0),
        _ => (text, 1000.0),
    };
    let number: f64 = number.parse().ok()?;
    (number.is_finite() && number >= 0.0).then_some((number * factor) as u64)
}

/// `state` may be repeated, and `settled` means any state that does not pass by itself.
pub async fn wait(
    State(ctx): State<Arc<Ctx>>,
    Path((app, id)): Path<(AppName, MachineId)>,
    RawQuery(query): RawQuery,
) -> Result<Json<Value>, Failure> {
    load(&ctx, &app, &id).await?;
    let wait = parse_wait(query.as_deref().unwrap_or_default())?;
    let fact = ctx.host.wait(&id, wait).await?;
    Ok(Json(json!({ "ok": true, "state": fact.state.as_str(), "version": fact.version })))
}

fn parse_wait(query: &str) -> Result<WaitFor, Failure> {
    let mut wait = WaitFor { states: vec![], version: None, timeout_ms: MAX_WAIT_S * 1000 };
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
                let state = serde_json::from_value(Value::String(value.to_owned()));
                wait.states.push(state.map_err(|_| {
                    Failure::bad_request(format!("{value:?} is not a state of a machine"))
                        .hint("wait for started, stopped, suspended, destroyed or settled")
                })?);
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
            _ => {}
        }
    }
    if wait.states.is_empty() {
        wait.states.push(MachineState::Started);
    }
    Ok(wait)
}

/// The last exit and the present state, in the shape of the Machines API.
pub async fn events(
    State(ctx): State<Arc<Ctx>>,
    Path((app, id)): Path<(AppName, MachineId)>,
) -> Result<Json<Value>, Failure> {
    load(&ctx, &app, &id).await?;
    let fact = ctx.host.machine(&id).await?;
    let mut events = vec![json!({
        "id": format!("{id}.{}", fact.sequence),
        "type": "status",
        "status": fact.state.as_str(),
        "source": "host",
        "timestamp": fact.updated_at_ms,
    })];
    if let Some(exit) = &fact.exit {
        events.push(json!({
            "id": format!("{id}.exit.{}", exit.attempt),
            "type": "exit",
            "status": "stopped",
            "source": "host",
            "timestamp": exit.at_ms,
            "request": { "exit_event": {
                "exit_code": exit.exit_code, "signal": exit.signal, "oom_killed": exit.oom_killed,
                "requested_stop": exit.requested_stop, "exited_at": exit.at_ms,
            }, "restart_count": fact.restarts },
        }));
    }
    Ok(Json(Value::Array(events)))
}

pub async fn exec(
    State(ctx): State<Arc<Ctx>>,
    Path((app, id)): Path<(AppName, MachineId)>,
    Extension(caller): Extension<Caller>,
    Json(body): Json<ExecBody>,
) -> Result<(StatusCode, Json<ExecAnswer>), Failure> {
    load(&ctx, &app, &id).await?;
    let program = body.command.first().or(body.cmd.as_ref()).and_then(|text| text.split_whitespace().next());
    let program = program.unwrap_or_default().to_owned();
    // Twice: who began something that never ends is to be found as well.
    tracing::info!(%app, machine = %id, program, by = caller.name(), "exec begins");
    let ended = run(&ctx, &id, body).await;
    let outcome = match &ended {
        Ok(answer) => format!("exit code {}", answer.exit_code),
        Err(failure) => failure.message.clone(),
    };
    tracing::info!(%app, machine = %id, program, by = caller.name(), outcome, "exec ended");
    ended.map(|answer| (StatusCode::OK, Json(answer)))
}

async fn run(ctx: &Ctx, id: &MachineId, body: ExecBody) -> Result<ExecAnswer, Failure> {
    let command = match (body.command.is_empty(), body.cmd) {
        (false, _) => body.command,
        (true, Some(text)) => words::split(&text).map_err(|error| Failure::invalid(format!("the command cannot be split into words: {error}")))?,
        (true, None) => return Err(Failure::invalid("the body has no command").hint("for example {\"command\": [\"ls\", \"-l\"]}")),
    };
    let timeout_s = body.timeout.unwrap_or(EXEC_TIMEOUT_S).clamp(1, MAX_EXEC_TIMEOUT_S);
    let stdin = ExecStdin::Whole(body.stdin.unwrap_or_default().into());
    let request = ExecRequest { stdin, ..ExecRequest::new(id.clone(), command, timeout_s * 1000) };
    let mut session = ctx.host.exec(request).await?;
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    while let Some(output) = session.output.recv().await {
        let (stream, bytes) = match output {
            ExecOutput::Stdout(bytes) => (&mut stdout, bytes),
            ExecOutput::Stderr(bytes) => (&mut stderr, bytes),
            ExecOutput::Exited(exit_code) => {
                let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
                return Ok(ExecAnswer { exit_code, stdout: text(stdout), stderr: text(stderr) });
            }
            ExecOutput::Failed(why) => return Err(Failure::from(Refusal::Failed(why))),
        };
        if stream.len() + bytes.len() > MAX_EXEC_OUTPUT_BYTES {
            return Err(Failure::new(ErrorCode::TooLarge, format!("the command said more than {} MiB", MAX_EXEC_OUTPUT_BYTES >> 20))
                .hint("write the output to a file in the machine, or make it shorter"));
        }
        stream.extend_from_slice(&bytes);
    }
    Err(Failure::new(ErrorCode::Internal, "the session ended without an exit code").hint("the machine may have stopped: try again"))
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
        check(json!("1h"), None);
        check(json!(-1), Some(0));
        check(json!([]), None);
    }

    #[test]
    fn a_wait_names_its_states() {
        let wait = parse_wait("state=stopped&state=failed&timeout=5").unwrap();
        assert_eq!(wait.states, [MachineState::Stopped, MachineState::Failed]);
        assert_eq!(wait.timeout_ms, 5_000);
        assert_eq!(parse_wait("").unwrap().states, [MachineState::Started]);
        assert_eq!(parse_wait("timeout=600").unwrap().timeout_ms, 60_000);
        assert!(parse_wait("state=happy").is_err());
    }
}
