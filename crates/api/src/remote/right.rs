//! Calls of a member that is not control: each carries the proof of somebody who may ask for it, made for that call, that
//! host and the next seconds. The host judges by itself, so that a member that was broken into commands nothing but what it
//! was given tokens for.

use super::call::Call;
use crate::host::{CommandKind, Refusal, Source};
use dunlin_model::proof::Proof;
use dunlin_model::token::{TokenError, Verb};
use dunlin_model::{AppName, HostId, MachineId};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// As for commands, clocks that differ by more make calls late.
const VALID_MS: u64 = 30_000;

/// Makes the proof of a call's text, for whoever has asked.
pub type Bearer = Arc<dyn Fn(&[u8]) -> Result<Proof, TokenError> + Send + Sync>;

/// Whether a proof of these bytes gives the right.
pub type Judge = Arc<dyn Fn(&Proof, &[u8], &Right) -> Result<(), Refusal> + Send + Sync>;

/// Who asks a host.
#[derive(Clone)]
pub enum Asker {
    Control,
    /// Nobody by itself: what comes with a proof is judged.
    Member(Judge),
}

/// What a call needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Right {
    pub verb: Verb,
    pub app: Option<AppName>,
    pub machine: Option<MachineId>,
}

/// What is signed, as text.
#[derive(Serialize, Deserialize)]
pub(super) struct Proven {
    host: HostId,
    until_ms: u64,
    call: Call,
}

pub(super) fn proven(call: &Call, host: &HostId, bearer: &Bearer, now_ms: u64) -> Result<Call, Refusal> {
    let proven = Proven { host: host.clone(), until_ms: now_ms + VALID_MS, call: call.clone() };
    let asked = serde_json::to_string(&proven).map_err(|e| Refusal::Invalid(format!("the call cannot be written down: {e}")))?;
    let proof = bearer(asked.as_bytes()).map_err(|error| Refusal::Forbidden(error.to_string()))?;
    Ok(Call::Proven { proof, asked })
}

/// The call that this caller may make of `host`, or why not.
pub(super) fn granted(call: Call, asker: &Asker, host: &HostId, now_ms: u64) -> Result<Call, Refusal> {
    let (judge, proof, asked) = match (asker, call) {
        (_, Call::Proven { .. }) if matches!(asker, Asker::Control) => {
            return Err(Refusal::Invalid("control asks by its own word".into()));
        }
        (Asker::Control, call) => return Ok(call),
        (Asker::Member(judge), Call::Proven { proof, asked }) => (judge, proof, asked),
        (Asker::Member(_), _) => {
            return Err(Refusal::Forbidden(format!("host {host} takes such a call from control alone, or with somebody's proof")));
        }
    };
    let unreadable = |e: serde_json::Error| Refusal::Invalid(format!("host {host} does not understand the call: {e}"));
    let Proven { host: to, until_ms, call } = serde_json::from_str(&asked).map_err(unreadable)?;
    if to != *host {
        return Err(Refusal::Forbidden(format!("the call is for host {to}")));
    }
    if until_ms <= now_ms {
        return Err(Refusal::TooLate);
    }
    if until_ms - now_ms > 2 * VALID_MS {
        return Err(Refusal::Forbidden(format!("the proof would be valid for too long: do the clocks of hosts differ by more than {} s?", VALID_MS / 1000)));
    }
    let right = right(&call).ok_or_else(|| Refusal::Forbidden(format!("host {host} takes such a call from control alone")))?;
    judge(&proof, asked.as_bytes(), &right)?;
    Ok(call)
}

/// `None`: control alone asks for it.
fn right(call: &Call) -> Option<Right> {
    let of = |verb, machine: &MachineId| Some(Right { verb, app: None, machine: Some(machine.clone()) });
    match call {
        Call::Command(command) if command.source == Source::User && command.plan.is_none() => match command.kind {
            CommandKind::Start
            | CommandKind::Stop { .. }
            | CommandKind::Restart { .. }
            | CommandKind::Signal { .. }
            | CommandKind::Suspend
            | CommandKind::Cordon
            | CommandKind::Uncordon
            | CommandKind::Lease { .. }
            | CommandKind::Release => of(Verb::Deploy, &command.machine),
        },
        Call::Machine(id) | Call::Events(id) | Call::Lease(id) | Call::Processes(id) | Call::ListenSockets(id) => of(Verb::Read, id),
        Call::Wait { machine, .. } => of(Verb::Read, machine),
        Call::Exec(open) => of(Verb::Exec, &open.machine),
        // Without an app they would be everybody's.
        Call::Logs(query) => query.app.as_ref().map(|app| Right { verb: Verb::Read, app: Some(app.clone()), machine: query.machine.clone() }),
        Call::Command(_)
        | Call::Reserve(_)
        | Call::CheckAnswer { .. }
        | Call::Volume { .. }
        | Call::VolumeRoom { .. }
        | Call::VolumeEncryption
        | Call::Snapshots(_)
        | Call::Snapshot { .. }
        | Call::Proven { .. } => None,
    }
}
