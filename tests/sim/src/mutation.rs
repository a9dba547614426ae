//! Rules that can be broken on purpose. A simulator that does not notice one of these proves nothing: a test wants
//! each to be found within a bounded number of seeds.
//!
//! They sit between the real core and its host, where they change what goes in or comes out.

use dunlin_machine::{Alive, Effect, Event, Record};
use dunlin_model::MachineState;

macro_rules! mutations {
    ($($(#[doc = $doc:literal])* $name:ident = $text:literal,)*) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Mutation { $($(#[doc = $doc])* $name,)* }

        impl Mutation {
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

mutations! {
    /// Acknowledges and acts, then journals.
    JournalLast = "journal-last",
    /// Journals, but does not wait for the disk.
    NoSync = "no-sync",
    /// Forgets in a crash which commands it has obeyed.
    ForgetCommands = "forget-commands",
    /// Executes again on recovery what the journal says was to be done.
    SpawnAgain = "spawn-again",
    /// Does not ask living supervisors on recovery.
    BelieveNobody = "believe-nobody",
    /// Does not read exit records on recovery.
    IgnoreExitRecords = "ignore-exit-records",
    /// Removes an exit record before the journal has it.
    AcknowledgeEarly = "acknowledge-early",
    /// Obeys a command of an older placement.
    OldGeneration = "old-generation",
    /// Obeys a command of a plan before the latest.
    OldPlan = "old-plan",
    /// Obeys an assignment of an older placement.
    OldAssignment = "old-assignment",
    /// After the disk was full hears an assignment again that is old by then.
    OldNews = "old-news",
    /// After the disk was full believes what it found before, and decides without it meanwhile.
    OldRecovery = "old-recovery",
    /// Obeys a command whose time is over.
    LateCommands = "late-commands",
    /// Leaves alive what is left of an attempt.
    NoCleanUp = "no-clean-up",
    /// Does not journal that a machine is to rest.
    ForgetStop = "forget-stop",
    /// Does not journal a cordon.
    ForgetCordon = "forget-cordon",
    /// Goes on after a crash with the sequence that the journal has.
    SequenceBack = "sequence-back",
    /// Publishes before it journals.
    PublishFirst = "publish-first",
    /// Destroys what a view does not name.
    AbsenceDestroys = "absence-destroys",
    /// Never comes back to a machine that waits for its restart.
    NoAlarm = "no-alarm",
    /// Keeps a machine that was destroyed.
    NeverForget = "never-forget",
    /// Does not go on with a stop after a crash.
    ForgetToStopAgain = "forget-to-stop-again",
    /// Lets anybody move a machine that is leased.
    IgnoreLeases = "ignore-leases",
    /// Does not journal a lease.
    ForgetLeases = "forget-leases",
    /// Leaves a machine frozen that is to go on.
    NoThaw = "no-thaw",
    /// Does not destroy what has ended for good.
    KeepOver = "keep-over",
    /// Does not journal that a time of the schedule was dealt with.
    ForgetTime = "forget-time",
    /// Never looks for room.
    NoAdmission = "no-admission",
}

/// What the agent hears.
pub fn event(mutation: Option<Mutation>, record: &Record, event: &mut Event) {
    use Mutation as M;
    match (mutation, event) {
        (Some(M::OldGeneration), Event::Ordered(order)) => order.generation = None,
        (Some(M::OldPlan), Event::Ordered(order)) => order.plan = None,
        (Some(M::LateCommands), Event::Ordered(order)) => order.deadline_ms = u64::MAX,
        (Some(M::IgnoreLeases), Event::Ordered(order)) => order.nonce = record.lease.as_ref().map(|lease| lease.nonce.clone()),
        (Some(M::NoAdmission), Event::Ordered(order)) => order.room = Ok(()),
        (Some(M::NoAdmission), Event::Prepared { room, .. }) => *room = Ok(()),
        (Some(M::OldAssignment), Event::Assigned(assignment)) => {
            assignment.placement = assignment.placement.max(record.assignment.placement);
        }
        (Some(M::BelieveNobody), Event::Recovered(alive)) => alive.attempt = None,
        (Some(M::IgnoreExitRecords), Event::Recovered(alive)) => alive.exit = None,
        (Some(M::ForgetToStopAgain), Event::Recovered(alive)) => alive.stopping = true,
        _ => {}
    }
}

/// What the agent does.
pub fn effects(mutation: Option<Mutation>, recovered: Option<&Alive>, before: &Record, effects: &mut Vec<Effect>) {
    use Mutation as M;
    let to_front = |effects: &mut Vec<Effect>, is: fn(&Effect) -> bool| effects.sort_by_key(|effect| !is(effect));
    match mutation {
        Some(M::JournalLast) => effects.sort_by_key(|effect| *effect == Effect::Journal),
        Some(M::PublishFirst) => to_front(effects, |effect| *effect == Effect::Publish),
        Some(M::AcknowledgeEarly) => to_front(effects, |effect| matches!(effect, Effect::CleanUp { .. })),
        Some(M::NoCleanUp) => effects.retain(|effect| !matches!(effect, Effect::CleanUp { .. })),
        Some(M::NoThaw) => effects.retain(|effect| !matches!(effect, Effect::Thaw { .. })),
        Some(M::NoAlarm) => effects.retain(|effect| !matches!(effect, Effect::WakeAt { .. })),
        Some(M::NeverForget) => effects.retain(|effect| *effect != Effect::Forget),
        Some(M::SpawnAgain) if recovered.is_some() && before.state == MachineState::Starting => {
            effects.retain(|effect| !matches!(effect, Effect::Spawn { .. }));
            effects.push(Effect::Spawn { attempt: before.attempt });
        }
        _ => {}
    }
}

/// What the journal gets.
pub fn record(mutation: Option<Mutation>, record: &mut Record) {
    match mutation {
        Some(Mutation::ForgetCommands) => record.commands.clear(),
        Some(Mutation::ForgetStop) if record.goal == dunlin_machine::Goal::Rest && record.may_live() => {
            record.goal = dunlin_machine::Goal::Run;
        }
        Some(Mutation::ForgetTime) => record.due_ms = record.due_ms.map(|due| due.saturating_sub(60_000)),
        Some(Mutation::ForgetLeases) => record.lease = None,
        Some(Mutation::ForgetCordon) => record.cordoned = false,
        _ => {}
    }
}
