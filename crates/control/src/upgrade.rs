//! A new binary for the fleet: the row `upgrade` says how far it is, and the planner how it goes on.
//!
//! The loop looks at the hosts whose turn it is, asks the planner, makes the answer durable, and then tells hosts. All of it may
//! be done twice, so that a `kill -9`, or the upgrade of control's own host, loses nothing: the next control goes on from the
//! row. Two upgrades never run at once, since there is one row.

use crate::failure::{Failure, chain};
use crate::operate::{Answer, Ask, Install, NoAnswer, Sending};
use crate::rows::{Change, Outcome, Row, key};
use crate::{Ctx, now_ms};
use dunlin_api::ErrorCode;
use dunlin_model::HostId;
use dunlin_model::desired::{HostRow, MachineRow};
use dunlin_planner::upgrade::{self as planner, MAX_BAKE_MS, MAX_PARALLEL, MIN_BAKE_MS, Order, Phase, Seen, Sent, Turn};
pub use dunlin_planner::upgrade::{Answered, INSTALLED_WITHIN_MS, Line, Look, MachineLook, SENT_WITHIN_MS, State, Trial, Upgrade};
use dunlin_view::Freshness;
use futures_util::future::join_all;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

const LOOK_EVERY: Duration = Duration::from_secs(1);
/// While there is no upgrade; a new one rings.
const IDLE: Duration = Duration::from_secs(30);

/// What an operator asks for.
pub(crate) struct Wanted {
    pub canary: Option<HostId>,
    pub parallel: u32,
    pub bake_ms: u64,
}

/// Where binaries lie until they are replaced by the next.
pub(crate) fn binaries(ctx: &Ctx) -> PathBuf {
    ctx.data_dir.join("control/upgrades")
}

pub(crate) async fn load(ctx: &Ctx) -> Result<Option<Row<Upgrade>>, Failure> {
    ctx.state.get::<Upgrade>(key::UPGRADE).await
}

/// What keeps a binary from being taken at all is said before it is sent.
pub(crate) async fn may_start(ctx: &Ctx, wanted: &Wanted) -> Result<(), Failure> {
    if !(1..=MAX_PARALLEL).contains(&wanted.parallel) {
        return Err(Failure::invalid(format!("between 1 and {MAX_PARALLEL} hosts can be upgraded at once")));
    }
    if !(MIN_BAKE_MS..=MAX_BAKE_MS).contains(&wanted.bake_ms) {
        return Err(Failure::invalid(format!("a host is watched for {} s at least and for a day at most", MIN_BAKE_MS / 1000)));
    }
    if let Some(canary) = &wanted.canary {
        if ctx.state.get::<HostRow>(&key::host(canary)).await?.is_none() {
            return Err(Failure::not_found(format!("there is no host {canary}")).hint("`dunlin host list` shows all"));
        }
        // Without it another would be the first, and the one that was chosen would prove nothing.
        let is_up = *canary == ctx.host_row.id || ctx.fleet.as_ref().is_some_and(|fleet| (fleet.is_up)(canary));
        if !is_up {
            return Err(Failure::new(ErrorCode::FailedPrecondition, format!("host {canary}, the canary, does not answer"))
                .hint("choose another one with --canary; `dunlin host list` shows which are up"));
        }
    }
    match load(ctx).await? {
        Some(row) if row.value.state == State::Running => Err(runs(&row.value)),
        _ => Ok(()),
    }
}

fn runs(upgrade: &Upgrade) -> Failure {
    Failure::new(ErrorCode::Conflict, format!("an upgrade to {} is under way", upgrade.version))
        .hint("`dunlin cluster upgrade status` shows it, `dunlin cluster upgrade abort` ends it")
}

/// The binary lies at `path` and has this digest.
pub(crate) async fn start(ctx: &Ctx, wanted: &Wanted, sha256: String, bytes: u64, path: &Path) -> Result<Upgrade, Failure> {
    let version = match (ctx.operate)(ctx.host_row.id.clone(), Ask::Version { path: path.to_owned() }, None).await {
        Ok(Answer::Version(version)) => version,
        Ok(_) => return Err(Failure::new(ErrorCode::Internal, "this server did not say what the binary is")),
        Err(error) => return Err(Failure::invalid(format!("control's host does not take the binary: {error}"))),
    };
    may_start(ctx, wanted).await?;
    let found = load(ctx).await?;
    let mut machines: BTreeMap<HostId, usize> =
        ctx.state.list::<HostRow>("hosts/").await?.into_iter().map(|row| (row.value.id, 0)).collect();
    for row in ctx.state.list::<MachineRow>("machines/").await? {
        machines.entry(row.value.host).and_modify(|count| *count += 1);
    }
    let control = ctx.host_row.id.clone();
    let order = planner::order(&machines, &control, wanted.canary.as_ref());
    let now_ms = now_ms();
    let mut upgrade = Upgrade {
        id: new_id(),
        sha256,
        bytes,
        version: version.clone(),
        parallel: wanted.parallel,
        bake_ms: wanted.bake_ms,
        control,
        started_at_ms: now_ms,
        state: State::Running,
        aborted: false,
        hosts: order.into_iter().map(|host| Turn { host, phase: Phase::Waiting }).collect(),
        story_dropped: 0,
        story: vec![],
    };
    let canary = upgrade.hosts.first().map(|turn| turn.host.to_string()).unwrap_or_default();
    upgrade.tell(now_ms, format!("{} hosts are to run {version}; {canary} is the canary", upgrade.hosts.len()));
    tracing::info!(upgrade = %upgrade.id, %version, sha256 = %upgrade.sha256, %canary, "an upgrade of the fleet begins");
    let dir = binaries(ctx);
    place(&dir, path, &upgrade.sha256).map_err(|error| Failure::internal("the binary cannot be stored", &error))?;
    save(ctx, found.as_ref(), &upgrade).await?;
    if let Err(error) = forget_others(&dir, &upgrade.sha256) {
        tracing::warn!(%error, dir = %dir.display(), "binaries of earlier upgrades were not removed; the next upgrade removes them");
    }
    Ok(upgrade)
}

/// It stands under its digest, where hosts get it from.
fn place(dir: &Path, path: &Path, sha256: &str) -> std::io::Result<()> {
    std::fs::rename(path, dir.join(sha256))?;
    std::fs::File::open(dir)?.sync_all()
}

/// Those of upgrades before are not needed any more once this one is in the store.
fn forget_others(dir: &Path, sha256: &str) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let is_other = entry.file_name() != sha256 && entry.path().extension().is_none();
        if is_other {
            std::fs::remove_file(entry.path())?;
        }
    }
    std::fs::File::open(dir)?.sync_all()
}

pub(crate) async fn resume(ctx: &Ctx) -> Result<Upgrade, Failure> {
    let binaries = binaries(ctx);
    change(ctx, |upgrade| match upgrade.state {
        State::Running => Err(runs(upgrade)),
        // Binaries are in no backup, and the order of turns has another host last.
        _ if upgrade.control != ctx.host_row.id || !binaries.join(&upgrade.sha256).is_file() => Err(Failure::new(
            ErrorCode::FailedPrecondition,
            format!("control was on host {} when this upgrade began, and its binary is not here", upgrade.control),
        )
        .hint("start it again: `dunlin cluster upgrade --binary FILE` with the same binary leaves hosts that have it as they are")),
        State::Stopped { .. } | State::Done => {
            upgrade.resume(new_id(), now_ms());
            Ok(())
        }
    })
    .await
}

/// After a restore. The hosts' keepers end what was under way by themselves; to go on from a state of then would be to judge hosts by
/// what they were before others, or a later upgrade, had to do with them.
pub(crate) async fn halt_restored(ctx: &Ctx) -> Result<(), Failure> {
    let Some(row) = load(ctx).await?.filter(|row| row.value.state == State::Running) else { return Ok(()) };
    let mut upgrade = row.value.clone();
    upgrade.halt(
        "control was restored from a backup that was made while this upgrade ran, and how far it came after that is not known here. Start it again: \
         `dunlin cluster upgrade --binary FILE` with the same binary leaves hosts that have it as they are",
        now_ms(),
    );
    let (id, version) = (&upgrade.id, &upgrade.version);
    tracing::warn!(upgrade = %id, %version, "the upgrade of the backup does not go on; start it again with `dunlin cluster upgrade --binary FILE`");
    save(ctx, Some(&row), &upgrade).await
}

pub(crate) async fn abort(ctx: &Ctx) -> Result<Upgrade, Failure> {
    change(ctx, |upgrade| match upgrade.state {
        State::Running => {
            upgrade.abort(now_ms());
            Ok(())
        }
        _ => Err(Failure::new(ErrorCode::FailedPrecondition, "the upgrade has ended already")
            .hint("`dunlin cluster upgrade --binary` with the binary from before takes hosts back to it")),
    })
    .await
}

async fn change(ctx: &Ctx, with: impl FnOnce(&mut Upgrade) -> Result<(), Failure>) -> Result<Upgrade, Failure> {
    let row = load(ctx).await?.ok_or_else(none)?;
    let mut upgrade = row.value.clone();
    with(&mut upgrade)?;
    save(ctx, Some(&row), &upgrade).await?;
    Ok(upgrade)
}

pub(crate) fn none() -> Failure {
    Failure::not_found("the fleet was never upgraded").hint("`dunlin cluster upgrade --binary FILE` begins it")
}

async fn save(ctx: &Ctx, read: Option<&Row<Upgrade>>, upgrade: &Upgrade) -> Result<(), Failure> {
    let change = Change::default().if_as_read(key::UPGRADE.into(), read).put(key::UPGRADE.into(), upgrade);
    match ctx.state.commit(change).await? {
        Outcome::Committed => {
            ctx.upgrades.notify_one();
            Ok(())
        }
        Outcome::Conflict => Err(Failure::new(ErrorCode::Conflict, "the upgrade went on in this moment").hint("try again")),
    }
}

fn new_id() -> String {
    crate::keys::random::<8>().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What hosts said to an order to install, until the planner has heard of it.
type Refusals = Arc<Mutex<BTreeMap<HostId, String>>>;

pub(crate) async fn run(ctx: Arc<Ctx>, stop: CancellationToken) {
    let (mut told, refusals) = (Told::default(), Refusals::default());
    loop {
        let pause = match go_on(&ctx, &mut told, &refusals).await {
            Ok(true) => LOOK_EVERY,
            Ok(false) => IDLE,
            Err(failure) => {
                tracing::error!(error = %chain(&failure), "the upgrade of the fleet does not go on; it is tried again");
                LOOK_EVERY
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = ctx.upgrades.notified() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Hosts that are just being told something; each hears one thing at a time.
#[derive(Default)]
struct Told {
    busy: Arc<Mutex<BTreeSet<HostId>>>,
    tasks: JoinSet<()>,
    /// Since when hosts whose turn it is cannot begin. A moment of that leaves nobody out.
    unfit_since_ms: BTreeMap<HostId, u64>,
    /// Who is to take the binary, of the upgrade with this id, and how far it is on its way there.
    sends: BTreeMap<HostId, (String, Option<Sending>, Sent)>,
}

impl Told {
    /// Where the binary moves is seen here: hosts of before do not say it.
    fn note_sent(&mut self, upgrade: &Upgrade, seen: &mut BTreeMap<HostId, Seen>, now_ms: u64) {
        self.forget_sends(upgrade);
        for turn in upgrade.hosts.iter().filter(|turn| is_installing(turn)) {
            let begins = || (upgrade.id.clone(), None, Sent { bytes: None, at_ms: now_ms });
            let (_, sending, sent) = self.sends.entry(turn.host.clone()).or_insert_with(begins);
            let bytes = sending.as_ref().map(Sending::sent);
            if bytes != sent.bytes {
                *sent = Sent { bytes, at_ms: now_ms };
            }
            if let Some(seen) = seen.get_mut(&turn.host) {
                seen.sent = Some(*sent);
            }
        }
    }

    /// Whoever is not to have the binary any more is not sent the rest.
    fn forget_sends(&mut self, upgrade: &Upgrade) {
        let installing: BTreeSet<&HostId> = upgrade.hosts.iter().filter(|turn| is_installing(turn)).map(|turn| &turn.host).collect();
        self.sends.retain(|host, (id, sending, _)| {
            let stays = *id == upgrade.id && installing.contains(host);
            if let Some(sending) = sending.as_ref().filter(|_| !stays) {
                sending.stop.cancel();
            }
            stays
        });
    }

    /// Hosts that wait for their turn and were not fit for it for a moment only are not seen.
    fn patiently(&mut self, upgrade: &Upgrade, mut seen: BTreeMap<HostId, Seen>, now_ms: u64) -> BTreeMap<HostId, Seen> {
        for turn in &upgrade.hosts {
            let is_unfit = seen.get(&turn.host).is_some_and(|seen| seen.look.is_none() || !seen.heard);
            if turn.phase != Phase::Waiting || !is_unfit {
                self.unfit_since_ms.remove(&turn.host);
                continue;
            }
            let since_ms = *self.unfit_since_ms.entry(turn.host.clone()).or_insert(now_ms);
            if now_ms < since_ms + planner::ANSWERS_WITHIN_MS {
                seen.remove(&turn.host);
            }
        }
        seen
    }
}

fn is_installing(turn: &Turn) -> bool {
    matches!(turn.phase, Phase::Installing { .. })
}

/// Whether there is an upgrade that runs.
async fn go_on(ctx: &Arc<Ctx>, told: &mut Told, refusals: &Refusals) -> Result<bool, Failure> {
    let Some(row) = load(ctx).await?.filter(|row| row.value.state == State::Running) else { return Ok(false) };
    let mut seen = look(ctx, &planner::watched(&row.value), refusals).await?;
    let now_ms = now_ms();
    told.note_sent(&row.value, &mut seen, now_ms);
    let seen = told.patiently(&row.value, seen, now_ms);
    let next = planner::advance(&row.value, &seen, now_ms);
    if next != row.value {
        match save(ctx, Some(&row), &next).await {
            Ok(()) => report(&row.value, &next),
            // An operator was faster: the next round sees what they want.
            Err(failure) if failure.code == ErrorCode::Conflict => return Ok(true),
            Err(failure) => return Err(failure),
        }
    }
    told.forget_sends(&next);
    while told.tasks.try_join_next().is_some() {}
    for order in planner::orders(&next, &seen) {
        tell(ctx, told, refusals, &next, order);
    }
    Ok(true)
}

fn report(before: &Upgrade, after: &Upgrade) {
    let known = before.story_dropped as usize + before.story.len();
    for line in after.story.iter().skip(known.saturating_sub(after.story_dropped as usize)) {
        tracing::info!(upgrade = %after.id, "{}", line.text);
    }
    if let State::Stopped { why } = &after.state {
        tracing::error!(upgrade = %after.id, why, "the upgrade of the fleet has stopped");
    }
}

async fn look(ctx: &Ctx, hosts: &[HostId], refusals: &Refusals) -> Result<BTreeMap<HostId, Seen>, Failure> {
    let looks = join_all(hosts.iter().map(|host| (ctx.operate)(host.clone(), Ask::Look, None))).await;
    let rows = ctx.state.list::<MachineRow>("machines/").await?;
    let view = ctx.view.current();
    let mut refused = std::mem::take(&mut *refusals.lock().unwrap_or_else(PoisonError::into_inner));
    let seen = hosts.iter().zip(looks).map(|(host, look)| {
        let (look, why_not) = match look {
            Ok(Answer::Look(look)) => (Some(*look), None),
            Ok(_) => (None, Some("its answer is not understood".to_owned())),
            Err(error) => (None, Some(error.to_string())),
        };
        let is_here = *host == ctx.host_row.id;
        let seen = Seen {
            look,
            heard: is_here || view.heard.get(host) == Some(&Freshness::Fresh),
            assigned: rows.iter().filter(|row| row.value.host == *host).map(|row| row.value.id.clone()).collect(),
            refused: refused.remove(host),
            why_silent: why_not,
            sent: None,
        };
        (host.clone(), seen)
    });
    Ok(seen.collect())
}

fn tell(ctx: &Arc<Ctx>, told: &mut Told, refusals: &Refusals, upgrade: &Upgrade, order: Order) {
    let id = upgrade.id.clone();
    let (host, ask, sending) = match order {
        Order::Keep { host } => (host, Ask::Keep { upgrade: id }, None),
        Order::GoBack { host, why } => (host, Ask::GoBack { upgrade: id, why }, None),
        Order::Install { host, word_within_s } => {
            let install = Install { upgrade: id, sha256: upgrade.sha256.clone(), bytes: upgrade.bytes, word_within_s };
            (host, Ask::Install(install), Some(Sending::new(binaries(ctx).join(&upgrade.sha256))))
        }
    };
    if !told.busy.lock().unwrap_or_else(PoisonError::into_inner).insert(host.clone()) {
        return;
    }
    if let Some(sending) = &sending {
        let begins = Sent { bytes: None, at_ms: now_ms() };
        told.sends.entry(host.clone()).or_insert_with(|| (upgrade.id.clone(), None, begins)).1 = Some(sending.clone());
    }
    let (busy, refusals, operate) = (told.busy.clone(), refusals.clone(), ctx.operate.clone());
    told.tasks.spawn(async move {
        let is_install = matches!(ask, Ask::Install(_));
        match operate(host.clone(), ask, sending).await {
            Err(NoAnswer::Refused(why)) if is_install => {
                refusals.lock().unwrap_or_else(PoisonError::into_inner).insert(host.clone(), why);
            }
            // It is told again; for how long, the planner knows.
            Err(error) => tracing::debug!(%host, %error, "a host did not hear what it is to do with a binary"),
            Ok(_) => {}
        }
        busy.lock().unwrap_or_else(PoisonError::into_inner).remove(&host);
    });
}
