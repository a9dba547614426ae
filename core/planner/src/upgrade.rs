//! A new binary for all hosts: one takes it, is judged, and only then the next ones begin.
//!
//! ```text
//! waiting --> installing --its new server answers--> baking --fine to the end--> keeping --> kept
//!    |             |                                    |
//!    |             | refused, never came                | worse for long, silent, it went back
//!    v             v                                    v
//! skipped        failed <------------------------- going back
//! ```
//!
//! After a failure nobody else begins. The first host to take the binary is alone, and so is that of control, the last one.
//! [`advance`] says how an [`Upgrade`] goes on from what is [`Seen`]; [`orders`] what hosts are to be told, which is a function of
//! the phases alone, so that whoever lost its memory tells them again.

mod judge;

pub use judge::{Answered, Look, MachineLook, Trial, worse};

use dunlin_model::{HostId, MachineId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// A host that has the binary tries whether it runs at all, then its server starts anew, within this.
pub const INSTALLED_WITHIN_MS: u64 = 180_000;
/// A binary of which nothing has moved for so long does not come any more. The host gives up after half of that, and says why.
pub const STALLED_FOR_MS: u64 = 60_000;
/// However slow the line is: 100 MB in this are 230 kbit/s, and all who wait for their turn wait for this host.
pub const SENT_WITHIN_MS: u64 = 3_600_000;
/// A host that takes longer to get the binary is worth a line of the story.
const LONG_ON_ITS_WAY_MS: u64 = 30_000;
/// A restart, or a load that passes, is no verdict.
pub const WORSE_FOR_MS: u64 = 15_000;
/// A look that came is noted down this often: the store is not for heartbeats.
const NOTED_EVERY_MS: u64 = 10_000;
/// Whose server does not answer for so long is not well.
pub const ANSWERS_WITHIN_MS: u64 = 30_000;
/// Past the bake, before a host that heard nothing goes back by itself: what judging and telling may take.
pub const WORD_WITHIN_MS: u64 = 90_000;
pub const MAX_PARALLEL: u32 = 64;
/// Below it a host's keeper has not even seen its new server live.
pub const MIN_BAKE_MS: u64 = 12_000;
pub const MAX_BAKE_MS: u64 = 24 * 3600 * 1000;
/// Of the story that people read; the last lines are kept.
const MAX_STORY: usize = 400;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Upgrade {
    pub id: String,
    pub sha256: String,
    pub bytes: u64,
    /// What the binary says of itself.
    pub version: String,
    pub parallel: u32,
    pub bake_ms: u64,
    /// Where the one who judges runs: it is the last.
    pub control: HostId,
    pub started_at_ms: u64,
    pub state: State,
    /// An operator wants no more of it: hosts that are not through go back.
    pub aborted: bool,
    /// In the order of their turns, the canary first.
    pub hosts: Vec<Turn>,
    /// Lines that were dropped from the story's beginning.
    #[serde(default)]
    pub story_dropped: u64,
    pub story: Vec<Line>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum State {
    Running,
    /// Nobody begins any more, and nobody is under way.
    Stopped { why: String },
    Done,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Turn {
    pub host: HostId,
    pub phase: Phase,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    pub at_ms: u64,
    pub text: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "snake_case")]
pub enum Phase {
    Waiting,
    /// `before`: how it did when it was its turn. `given_ms`: when it had all of the binary.
    Installing {
        since_ms: u64,
        before: Box<Look>,
        #[serde(default)]
        given_ms: Option<u64>,
    },
    Baking { since_ms: u64, before: Box<Look>, life: u64, seen_ms: u64, worse: Option<Worse> },
    /// It is fine; its keeper is to hear of it.
    Keeping { since_ms: u64 },
    GoingBack { since_ms: u64, why: String },
    Kept { at_ms: u64 },
    /// `is_back`: the binary from before runs there, as far as is known.
    Failed { at_ms: u64, why: String, is_back: bool },
    /// It was not there when it was its turn.
    Skipped { why: String },
}

/// Since when it does worse without a break.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Worse {
    pub since_ms: u64,
    pub why: String,
}

/// What is known of a host at this moment.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Seen {
    /// Its own answer; `None`: it gave none.
    pub look: Option<Look>,
    /// Facts of it are fresh.
    pub heard: bool,
    /// Machines that are still to be there.
    pub assigned: BTreeSet<MachineId>,
    /// It said no to the order to install, and has changed nothing.
    pub refused: Option<String>,
    /// Where there is no look: why.
    pub why_silent: Option<String>,
    /// Of one that is to take the binary.
    pub sent: Option<Sent>,
}

/// How far the binary is on its way to a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sent {
    /// In the last try; `None`: there was none since whoever sends it began to look.
    pub bytes: Option<u64>,
    /// When that last became another, or the looking began.
    pub at_ms: u64,
}

/// What a host is to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// Within so many seconds after its new server is ready it hears that it is fine, or goes back by itself.
    Install { host: HostId, word_within_s: u64 },
    Keep { host: HostId },
    GoBack { host: HostId, why: String },
}

/// The canary first, control's host last. Without a wish it is a host with machines, the fewest: what is not used shows little.
pub fn order(hosts: &BTreeMap<HostId, usize>, control: &HostId, canary: Option<&HostId>) -> Vec<HostId> {
    let chosen = hosts.iter().filter(|(host, _)| *host != control).min_by_key(|(_, machines)| (**machines == 0, **machines));
    let first = canary.or(chosen.map(|(host, _)| host));
    let mut all: Vec<&HostId> = hosts.keys().collect();
    all.sort_by_key(|host| (Some(*host) != first, *host == control, *host));
    all.into_iter().cloned().collect()
}

/// Whom it is of use to look at now.
pub fn watched(upgrade: &Upgrade) -> Vec<HostId> {
    let next = next_turns(upgrade).into_iter().map(|n| upgrade.hosts[n].host.clone());
    let under_way = upgrade.hosts.iter().filter(|turn| turn.phase.is_under_way()).map(|turn| turn.host.clone());
    under_way.chain(next).collect()
}

/// How it goes on. Does nothing once the upgrade has ended.
pub fn advance(upgrade: &Upgrade, seen: &BTreeMap<HostId, Seen>, now_ms: u64) -> Upgrade {
    let mut next = upgrade.clone();
    if next.state != State::Running {
        return next;
    }
    let nobody = Seen::default();
    for n in 0..next.hosts.len() {
        if !next.hosts[n].phase.is_under_way() {
            continue;
        }
        let turn = next.hosts[n].clone();
        let phase = step(&next, &turn, seen.get(&turn.host).unwrap_or(&nobody), now_ms);
        next.enter(n, phase, now_ms);
    }
    for n in next_turns(&next) {
        let host = next.hosts[n].host.clone();
        let phase = begin(&next, seen.get(&host), now_ms);
        next.enter(n, phase, now_ms);
    }
    next.end(now_ms);
    next
}

/// What hosts are to hear in these phases; telling it twice does no harm.
pub fn orders(upgrade: &Upgrade, seen: &BTreeMap<HostId, Seen>) -> Vec<Order> {
    let word_within_s = upgrade.word_within_ms().div_ceil(1000);
    let order = |turn: &Turn| {
        let host = turn.host.clone();
        let trial = seen.get(&host).and_then(|seen| seen.look.as_ref()).map(|look| &look.trial);
        match &turn.phase {
            Phase::Installing { .. } if trial.is_none_or(|trial| trial.is_of(&upgrade.id)) => None,
            Phase::Installing { .. } => Some(Order::Install { host, word_within_s }),
            Phase::Keeping { .. } => Some(Order::Keep { host }),
            Phase::GoingBack { why, .. } => Some(Order::GoBack { host, why: why.clone() }),
            _ => None,
        }
    };
    upgrade.hosts.iter().filter_map(order).collect()
}

impl Upgrade {
    /// Those who failed or were not there get another turn, under another id: what became of them under this one is known.
    pub fn resume(&mut self, id: String, now_ms: u64) {
        self.id = id;
        for turn in &mut self.hosts {
            if matches!(turn.phase, Phase::Failed { .. } | Phase::Skipped { .. }) {
                turn.phase = Phase::Waiting;
            }
        }
        (self.state, self.aborted) = (State::Running, false);
        self.tell(now_ms, "an operator lets it go on; hosts that failed or were left out get another turn".into());
    }

    /// Whoever went on with it is gone, and how far it came since then is not known here.
    pub fn halt(&mut self, why: &str, now_ms: u64) {
        for turn in self.hosts.iter_mut().filter(|turn| turn.phase.is_under_way()) {
            let why = "what became of the binary there is not known here: its keeper has gone back by itself unless it was told to keep it";
            turn.phase = failed(now_ms, why, false);
        }
        self.state = State::Stopped { why: why.to_owned() };
        self.tell(now_ms, format!("stopped: {why}"));
    }

    pub fn abort(&mut self, now_ms: u64) {
        self.aborted = true;
        self.tell(now_ms, "an operator ends it: hosts that are not through go back, those that kept the new binary stay with it".into());
    }

    /// After its new server is ready, a host's keeper waits no longer for control's word.
    fn word_within_ms(&self) -> u64 {
        self.bake_ms + WORSE_FOR_MS + WORD_WITHIN_MS
    }

    pub fn tell(&mut self, at_ms: u64, text: String) {
        self.story.push(Line { at_ms, text });
        if self.story.len() > MAX_STORY {
            self.story.remove(0);
            self.story_dropped += 1;
        }
    }

    fn enter(&mut self, n: usize, phase: Phase, now_ms: u64) {
        if self.hosts[n].phase == phase {
            return;
        }
        if let Some(text) = told(self, &self.hosts[n].phase, &phase) {
            let text = format!("{}: {text}", self.hosts[n].host);
            self.tell(now_ms, text);
        }
        self.hosts[n].phase = phase;
    }

    fn end(&mut self, now_ms: u64) {
        if self.hosts.iter().any(|turn| turn.phase.is_under_way()) {
            return;
        }
        let failed: Vec<String> = self.hosts.iter().filter_map(Turn::failure).collect();
        let left = self.hosts.iter().filter(|turn| turn.phase == Phase::Waiting).count();
        self.state = match (failed.is_empty(), self.aborted, left) {
            (false, ..) => State::Stopped { why: failed.join("; ") },
            (_, true, _) => State::Stopped { why: "an operator ended it".into() },
            (_, _, 0) => State::Done,
            _ => return,
        };
        let kept = self.hosts.iter().filter(|turn| matches!(turn.phase, Phase::Kept { .. })).count();
        let all = self.hosts.len();
        let text = match &self.state {
            State::Done => format!("done: {kept} of {all} hosts run {}", self.version),
            _ => format!("stopped: {kept} of {all} hosts run {}, {left} were not touched", self.version),
        };
        self.tell(now_ms, text);
    }
}

impl Turn {
    fn failure(&self) -> Option<String> {
        match &self.phase {
            Phase::Failed { why, .. } => Some(format!("{}: {why}", self.host)),
            _ => None,
        }
    }
}

impl Phase {
    pub fn is_under_way(&self) -> bool {
        matches!(self, Self::Installing { .. } | Self::Baking { .. } | Self::Keeping { .. } | Self::GoingBack { .. })
    }
}

/// Whose turn it may be now, as places in the list.
fn next_turns(upgrade: &Upgrade) -> Vec<usize> {
    let has_failed = upgrade.hosts.iter().any(|turn| matches!(turn.phase, Phase::Failed { .. }));
    if upgrade.state != State::Running || upgrade.aborted || has_failed {
        return vec![];
    }
    let under_way = upgrade.hosts.iter().filter(|turn| turn.phase.is_under_way()).count();
    let is_proven = upgrade.hosts.iter().any(|turn| matches!(turn.phase, Phase::Kept { .. }));
    let room = if is_proven { upgrade.parallel.clamp(1, MAX_PARALLEL) as usize } else { 1 };
    let waiting = || upgrade.hosts.iter().enumerate().filter(|(_, turn)| turn.phase == Phase::Waiting);
    let is_control = |turn: &Turn| turn.host == upgrade.control;
    // That of control is the first only where an operator made it the canary.
    let first_is_control = upgrade.hosts.first().is_some_and(|turn| is_control(turn) && turn.phase == Phase::Waiting);
    let others: Vec<usize> = waiting().filter(|(_, turn)| !is_control(turn)).map(|(n, _)| n).collect();
    match (first_is_control, others.is_empty(), under_way) {
        (true, _, 0) => vec![0],
        (true, ..) => vec![],
        (_, false, _) => others.into_iter().take(room.saturating_sub(under_way)).collect(),
        (_, true, 0) => waiting().map(|(n, _)| n).collect(),
        (_, true, _) => vec![],
    }
}

/// It is a host's turn.
fn begin(upgrade: &Upgrade, seen: Option<&Seen>, now_ms: u64) -> Phase {
    match seen {
        // Nobody has asked it yet.
        None => Phase::Waiting,
        Some(Seen { look: Some(look), .. }) if look.sha256 == upgrade.sha256 && !look.trial.is_on() => Phase::Kept { at_ms: now_ms },
        Some(Seen { look: Some(look), heard: true, .. }) => Phase::Installing { since_ms: now_ms, before: Box::new(look.clone()), given_ms: None },
        Some(Seen { look: None, why_silent, .. }) => Phase::Skipped {
            why: why_silent.clone().unwrap_or_else(|| "it does not answer".into()),
        },
        Some(_) => Phase::Skipped { why: "others hear nothing of it".into() },
    }
}

fn step(upgrade: &Upgrade, turn: &Turn, seen: &Seen, now_ms: u64) -> Phase {
    let went_back = seen.look.as_ref().and_then(|look| look.trial.went_back(&upgrade.id));
    match (&turn.phase, went_back) {
        (Phase::GoingBack { why, .. }, Some(_)) => failed(now_ms, why, true),
        (_, Some(why)) => failed(now_ms, why, true),
        (Phase::Installing { .. }, None) => installing(upgrade, &turn.phase, seen, now_ms),
        (Phase::Baking { .. }, None) => baking(upgrade, &turn.phase, seen, now_ms),
        (Phase::Keeping { since_ms }, None) => match &seen.look {
            Some(look) if look.trial.is_kept(&upgrade.id) => Phase::Kept { at_ms: now_ms },
            _ if now_ms > since_ms + WORD_WITHIN_MS => {
                failed(now_ms, "it is fine, and did not hear so in time; its keeper goes back by itself", false)
            }
            _ => turn.phase.clone(),
        },
        // It never took it, and nobody sends it any more.
        (Phase::GoingBack { since_ms, why }, None) if now_ms > since_ms + WORSE_FOR_MS && is_untouched(upgrade, seen) => failed(now_ms, why, true),
        (Phase::GoingBack { since_ms, why }, None) if now_ms > since_ms + upgrade.word_within_ms() + INSTALLED_WITHIN_MS => {
            failed(now_ms, &format!("{why}; and it does not say that it went back, which its keeper does by itself"), false)
        }
        (other, None) => (*other).clone(),
    }
}

fn failed(at_ms: u64, why: &str, is_back: bool) -> Phase {
    Phase::Failed { at_ms, why: why.to_owned(), is_back }
}

fn is_untouched(upgrade: &Upgrade, seen: &Seen) -> bool {
    seen.look.as_ref().is_some_and(|look| !look.trial.is_of(&upgrade.id) && look.sha256 != upgrade.sha256)
}

fn installing(upgrade: &Upgrade, phase: &Phase, seen: &Seen, now_ms: u64) -> Phase {
    let Phase::Installing { since_ms, before, given_ms } = phase else { unreachable!("its caller has looked") };
    // A try that is not through yet says that the one before has failed, however much of it was sent.
    let given_ms = match seen.sent {
        Some(Sent { bytes: Some(bytes), at_ms }) => (bytes >= upgrade.bytes).then(|| given_ms.unwrap_or(at_ms)),
        _ => *given_ms,
    };
    let back = |why: String| Phase::GoingBack { since_ms: now_ms, why };
    if let Some(why) = &seen.refused {
        return failed(now_ms, &format!("it did not take the binary: {why}"), true);
    }
    match &seen.look {
        Some(look) if look.life != before.life && look.trial.is_of(&upgrade.id) => {
            Phase::Baking { since_ms: now_ms, before: before.clone(), life: look.life, seen_ms: now_ms, worse: None }
        }
        _ if upgrade.aborted => back("an operator ended the upgrade".into()),
        _ => match too_late(upgrade, (*since_ms, given_ms), seen, now_ms) {
            Some(why) => back(why),
            None => Phase::Installing { since_ms: *since_ms, before: before.clone(), given_ms },
        },
    }
}

/// The transfer has as long as it moves, and the rest counts from its end. Whoever has only begun to look lets its host's turn begin anew.
fn too_late(upgrade: &Upgrade, (since_ms, given_ms): (u64, Option<u64>), seen: &Seen, now_ms: u64) -> Option<String> {
    let looks_since_ms = seen.sent.filter(|sent| sent.bytes.is_none()).map_or(0, |sent| sent.at_ms);
    if let Some(given_ms) = given_ms {
        let is_late = now_ms > given_ms.max(looks_since_ms) + INSTALLED_WITHIN_MS;
        return is_late.then(|| format!("it has the binary, and no server of it answered within {} s", INSTALLED_WITHIN_MS / 1000));
    }
    let Sent { bytes, at_ms } = seen.sent.unwrap_or(Sent { bytes: None, at_ms: since_ms });
    let so_far = format!("{} of {} bytes were sent", bytes.unwrap_or(0), upgrade.bytes);
    if now_ms > since_ms.max(looks_since_ms) + SENT_WITHIN_MS {
        return Some(format!("the binary did not get there within {} minutes: {so_far}; mend the line to it", SENT_WITHIN_MS / 60_000));
    }
    (now_ms > at_ms + STALLED_FOR_MS).then(|| format!("the binary stopped on its way: {so_far}, and no more for {} s; mend the line to it", STALLED_FOR_MS / 1000))
}

fn baking(upgrade: &Upgrade, phase: &Phase, seen: &Seen, now_ms: u64) -> Phase {
    let Phase::Baking { since_ms, before, life, seen_ms, worse: was } = phase else { unreachable!("its caller has looked") };
    let back = |why: String| Phase::GoingBack { since_ms: now_ms, why };
    if upgrade.aborted {
        return back("an operator ended the upgrade".into());
    }
    let Some(look) = &seen.look else {
        let silent_ms = now_ms.saturating_sub(*seen_ms);
        return match silent_ms > ANSWERS_WITHIN_MS {
            true => back(format!("it has not answered for {} s", silent_ms / 1000)),
            false => phase.clone(),
        };
    };
    if look.life != *life {
        return back("its new server has started once more".into());
    }
    let why = match seen.heard {
        false => Some("others hear nothing of it".to_owned()),
        true => worse(before, look, &seen.assigned),
    };
    let worse = why.map(|why| was.clone().unwrap_or(Worse { since_ms: now_ms, why }));
    let seen_ms = if now_ms >= seen_ms + NOTED_EVERY_MS { now_ms } else { *seen_ms };
    match &worse {
        Some(worse) if now_ms >= worse.since_ms + WORSE_FOR_MS => back(worse.why.clone()),
        None if now_ms >= since_ms + upgrade.bake_ms => Phase::Keeping { since_ms: now_ms },
        _ => Phase::Baking { since_ms: *since_ms, before: before.clone(), life: *life, seen_ms, worse },
    }
}

/// What a change of phase is to people.
fn told(upgrade: &Upgrade, from: &Phase, to: &Phase) -> Option<String> {
    let bake_s = upgrade.bake_ms / 1000;
    Some(match (from, to) {
        (_, Phase::Waiting) => return None,
        (Phase::Installing { since_ms, given_ms: None, .. }, Phase::Installing { given_ms: Some(at_ms), .. }) => match at_ms.saturating_sub(*since_ms) {
            0..LONG_ON_ITS_WAY_MS => return None,
            took_ms => format!("has the binary after {} s", took_ms / 1000),
        },
        (Phase::Installing { .. }, Phase::Installing { .. }) => return None,
        (_, Phase::Installing { before, .. }) => format!("takes the binary; it runs {}", before.version),
        (Phase::Installing { .. }, Phase::Baking { .. }) => format!("runs the new binary; watched for {bake_s} s"),
        (Phase::Baking { worse: None, .. }, Phase::Baking { worse: Some(worse), .. }) => format!("does worse: {}", worse.why),
        (Phase::Baking { worse: Some(_), .. }, Phase::Baking { worse: None, .. }) => "is well again".into(),
        (_, Phase::Baking { .. } | Phase::Keeping { .. }) => return None,
        (_, Phase::GoingBack { why, .. }) => format!("is to go back: {why}"),
        (Phase::Waiting, Phase::Kept { .. }) => "has this binary already".into(),
        (_, Phase::Kept { .. }) => format!("keeps {}", upgrade.version),
        (_, Phase::Failed { why, is_back: true, .. }) => format!("failed, and runs the binary from before: {why}"),
        (_, Phase::Failed { why, .. }) => format!("failed: {why}"),
        (_, Phase::Skipped { why }) => format!("is left out: {why}"),
    })
}

#[cfg(test)]
mod tests;
