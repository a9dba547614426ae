//! Commands and the checks that they pass, in the order of the state rules: deadline, generation and plan,
//! lease, version, legal move, admission.

use crate::record::{Goal, Record};
use dunlin_model::{CommandId, Generation, Lease, MachineState, MachineVersion, Source};
use serde::{Deserialize, Serialize};

/// Answers that are remembered, so that a repeated command gets its first one.
pub const MAX_REMEMBERED: usize = 64;

/// A command as the machine sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    pub id: CommandId,
    pub deadline_ms: u64,
    pub generation: Option<Generation>,
    /// Of the plan that gives it, if one does.
    pub plan: Option<Generation>,
    pub expected_version: Option<MachineVersion>,
    /// Of the lease that its sender holds.
    pub nonce: Option<String>,
    pub source: Source,
    /// Of the call that caused it.
    pub request_id: Option<String>,
    pub verb: Verb,
    /// The host's answer to "is there room for it?"; only a start or a wake asks.
    pub room: Result<(), String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verb {
    Start,
    /// A request's start: it may start only what sleeps, lets itself be woken and is not cordoned.
    Wake,
    /// Signal number and time until it is killed.
    Stop { signal: Option<i32>, timeout_ms: Option<u64> },
    /// Likewise.
    Restart { signal: Option<i32>, timeout_ms: Option<u64> },
    Signal { signal: i32 },
    Suspend,
    Cordon,
    Uncordon,
    /// Takes the lease, or makes that of the order's nonce last longer. `nonce` is the one to give.
    Lease { nonce: String, ttl_ms: u64, owner: String, description: String },
    Release,
}

impl Verb {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Wake => "wake",
            Self::Stop { .. } => "stop",
            Self::Restart { .. } => "restart",
            Self::Signal { .. } => "signal",
            Self::Suspend => "be suspended",
            Self::Cordon => "cordon",
            Self::Uncordon => "uncordon",
            Self::Lease { .. } => "be leased",
            Self::Release => "be released",
        }
    }
}

/// The acknowledgement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    pub previous_state: MachineState,
    /// Sequence of the first fact that shows the effect, or a later one.
    pub sequence: u64,
    /// That was taken or made to last longer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<Lease>,
}

/// Why not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Deny {
    TooLate,
    OldGeneration { offered: Generation, held: Generation },
    OldPlan { offered: Generation, held: Generation },
    Leased { owner: String, expires_at_ms: u64 },
    /// The nonce is of a lease that has ended.
    NotLeased,
    VersionMismatch { expected: MachineVersion, found: MachineVersion },
    IllegalMove { state: MachineState },
    Cordoned,
    /// After a boot its host does not know yet that it is still placed there.
    Unconfirmed,
    /// Its run has ended, and it is destroyed then.
    Over,
    NoRoom { why: String },
}

/// A command's id and its first answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remembered {
    pub id: CommandId,
    pub answer: Result<Asked, Deny>,
}

/// What the checks found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Checked {
    /// Seen before: the first answer again.
    Repeated(Result<Asked, Deny>),
    Denied(Deny),
    /// Legal, and nothing has to change.
    AlreadySo,
    Allowed,
}

pub(crate) fn check(record: &Record, order: &Order, now_ms: u64) -> Checked {
    if let Some(remembered) = record.commands.iter().find(|remembered| remembered.id == order.id) {
        return Checked::Repeated(remembered.answer.clone());
    }
    if now_ms > order.deadline_ms {
        return Checked::Denied(Deny::TooLate);
    }
    let held = record.assignment.placement;
    if let Some(offered) = order.generation.filter(|offered| *offered < held) {
        return Checked::Denied(Deny::OldGeneration { offered, held });
    }
    if let Some(offered) = order.plan.filter(|offered| *offered < record.plan) {
        return Checked::Denied(Deny::OldPlan { offered, held: record.plan });
    }
    if let Err(deny) = check_lease(record, order, now_ms) {
        return Checked::Denied(deny);
    }
    if let Some(expected) = order.expected_version.as_ref().filter(|expected| *expected != record.version()) {
        let found = record.version().clone();
        return Checked::Denied(Deny::VersionMismatch { expected: expected.clone(), found });
    }
    if order.verb == Verb::Wake && record.cordoned {
        return Checked::Denied(Deny::Cordoned);
    }
    if order.verb == Verb::Wake && record.unconfirmed {
        return Checked::Denied(Deny::Unconfirmed);
    }
    if matches!(order.verb, Verb::Start | Verb::Wake) && record.is_over() {
        return Checked::Denied(Deny::Over);
    }
    match legal_move(record, &order.verb) {
        Move::Illegal => Checked::Denied(Deny::IllegalMove { state: record.state }),
        Move::AlreadyThere => Checked::AlreadySo,
        Move::Legal => match (&order.verb, &order.room) {
            (Verb::Start | Verb::Wake, Err(why)) => Checked::Denied(Deny::NoRoom { why: why.clone() }),
            _ => Checked::Allowed,
        },
    }
}

/// A nonce whose lease has ended opens nothing, even if nobody has one now: others may have moved the machine since.
fn check_lease(record: &Record, order: &Order, now_ms: u64) -> Result<(), Deny> {
    match (record.lease(now_ms), &order.nonce) {
        (Some(lease), Some(nonce)) if lease.nonce == *nonce => Ok(()),
        (Some(Lease { owner, expires_at_ms, .. }), _) => {
            Err(Deny::Leased { owner: owner.clone(), expires_at_ms: *expires_at_ms })
        }
        (None, Some(_)) => Err(Deny::NotLeased),
        (None, None) if order.verb == Verb::Release => Err(Deny::NotLeased),
        (None, None) => Ok(()),
    }
}

enum Move {
    Legal,
    AlreadyThere,
    Illegal,
}

fn legal_move(record: &Record, verb: &Verb) -> Move {
    use MachineState as S;
    match (verb, record.state) {
        // It stops only to start again: to stop for good is another thing.
        (Verb::Stop { .. }, S::Stopping) if record.goal == Goal::Again => Move::Legal,
        (_, S::Destroying | S::Destroyed) => Move::Illegal,
        (Verb::Cordon | Verb::Uncordon | Verb::Lease { .. } | Verb::Release, _) => Move::Legal,
        // It is asked to go on.
        (Verb::Start, S::Suspending) => Move::Legal,
        (Verb::Start, S::Created | S::Stopped | S::Suspended | S::Failed | S::Restarting) => Move::Legal,
        (Verb::Start, S::Starting | S::Started | S::Updating) => Move::AlreadyThere,
        (Verb::Start, S::Creating | S::Stopping) => Move::Illegal,
        (Verb::Wake, state) if state.is_asleep() && record.wakes() => Move::Legal,
        // It comes up by itself.
        (Verb::Wake, S::Starting | S::Started | S::Updating | S::Restarting) => Move::AlreadyThere,
        (Verb::Wake, _) => Move::Illegal,
        (Verb::Stop { .. }, S::Starting | S::Started | S::Suspending | S::Suspended) => Move::Legal,
        (Verb::Stop { .. }, S::Restarting | S::Updating) => Move::Legal,
        (Verb::Stop { .. }, S::Created | S::Stopped | S::Failed | S::Stopping) => Move::AlreadyThere,
        (Verb::Stop { .. }, S::Creating) => Move::Illegal,
        (Verb::Suspend, S::Started) => Move::Legal,
        (Verb::Suspend, S::Suspending | S::Suspended) => Move::AlreadyThere,
        (Verb::Restart { .. }, S::Started | S::Starting) => Move::Legal,
        (Verb::Signal { .. }, S::Started) => Move::Legal,
        (Verb::Suspend | Verb::Restart { .. } | Verb::Signal { .. }, _) => Move::Illegal,
    }
}
