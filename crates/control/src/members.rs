//! Who is in the cluster: a host joins with a token, says anew who it is at each start, and is removed for good.

use crate::failure::Failure;
use crate::rows::{Change, HostTokenRow, MemberRow, Outcome, RemovedHostRow, Row, key};
use crate::start::Fleet;
use crate::{Ctx, dial_back, now_ms};
use dunlin_api::ErrorCode;
use dunlin_cluster::{HostReport, JoinAnswer, JoinRequest, JoinToken, Standing, TokenProof};
use dunlin_model::desired::{HOST_LABELS_MAX, HostRow, Ipv4Prefix, is_host_label};
use dunlin_model::seal::SealingKey;
use dunlin_model::{HostId, Region};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// Blocks that are given to hosts, one after the other: 256 of them, each with 4,094 addresses.
const POOL: Ipv4Prefix = Ipv4Prefix { network: Ipv4Addr::new(10, 208, 0, 0), length: 12 };
const BLOCK_LENGTH: u8 = 20;
/// That of a block's host was removed: nobody who remembers its machines reaches strangers.
const BLOCK_REST_MS: u64 = crate::rows::ADDRESS_REST_MS;
/// Certificates begin an hour ago and facts are judged by clocks, so that clocks that differ by more would show.
const MAX_SKEW_MS: u64 = 60_000;
const MAX_VERSION_BYTES: usize = 64;
/// That nobody has used. More are a mistake.
const MAX_TOKENS: usize = 256;
pub(crate) const TOKEN_LIFETIME_S: u64 = 3600;
/// Somebody has to be there to use it.
pub(crate) const MAX_TOKEN_LIFETIME_S: u64 = 7 * 24 * 3600;
/// Exact enough to say when a certificate of two years ends.
const CERTIFIED_WITHIN_MS: u64 = 24 * 3_600_000;
/// After a host has joined, control certifies its keys in this epoch; new keys begin the next.
const FIRST_EPOCH: u32 = 1;

/// A token to join with, and when it expires. Those that have expired are forgotten on the way.
pub(crate) async fn create_token(ctx: &Ctx, lifetime_s: u64) -> Result<(JoinToken, u64), Failure> {
    fleet(ctx)?;
    let now_ms = now_ms();
    let known = ctx.state.list_keyed::<HostTokenRow>("host_tokens/").await?;
    let (expired, live): (Vec<_>, Vec<_>) = known.into_iter().partition(|(_, row)| row.value.expires_at_ms <= now_ms);
    if live.iter().filter(|(_, row)| row.value.used_by.is_none()).count() >= MAX_TOKENS {
        return Err(Failure::new(ErrorCode::FailedPrecondition, format!("there are {MAX_TOKENS} tokens that no host has used, the most"))
            .hint("use them, or wait until they expire"));
    }
    let ca = ctx.cluster.ca_sha256().map_err(|error| Failure::internal("the cluster's authority cannot be used", &error))?;
    let (token, expires_at_ms) = (JoinToken::generate(ca), now_ms + lifetime_s * 1000);
    let row = HostTokenRow { secret_digest: token.proof().digest(), expires_at_ms, used_by: None };
    let change = Change::default().put(key::host_token(&token.id), &row);
    let change = expired.into_iter().take(MAX_TOKENS / 4).fold(change, |change, (key, _)| change.delete(key));
    ctx.state.commit(change).await?;
    tracing::info!(token = %token.id, "a token to join with was made");
    Ok((token, expires_at_ms))
}

/// Everything is checked, then written in one transaction.
pub(crate) async fn join(ctx: &Ctx, request: JoinRequest) -> Result<JoinAnswer, Failure> {
    fleet(ctx)?;
    let now_ms = now_ms();
    if let Admission::Before(answer) = admission(ctx, &request, now_ms).await? {
        return Ok(*answer);
    }
    // It takes seconds, in which others may join: then all is looked at again.
    dial_back::reached(ctx, &request).await?;
    let _one_at_a_time = ctx.hosts_writer.lock().await;
    let Newcomer { token, row, member, answer } = match admission(ctx, &request, now_ms).await? {
        Admission::Before(answer) => return Ok(*answer),
        Admission::Now(newcomer) => *newcomer,
    };
    let host = request.host;
    let used = HostTokenRow { used_by: Some(host.clone()), ..token.value };
    let change = Change::default()
        .unchanged(key::host_token(&request.token.id), token.modified)
        .absent(key::host(&host))
        .absent(key::removed_host(&host))
        .put(key::host_token(&request.token.id), &used)
        .put(key::host(&host), &row)
        .put(key::member(&host), &member);
    committed(ctx, change).await?;
    tracing::info!(%host, region = %row.region, prefix = %row.prefix, addr = %member.addr, token = %request.token.id, "host joined");
    Ok(JoinAnswer { reached_by: Some(ctx.host_row.id.clone()), ..answer })
}

enum Admission {
    /// With this token; its answer may have been lost.
    Before(Box<JoinAnswer>),
    /// Nothing but its address speaks against it.
    Now(Box<Newcomer>),
}

struct Newcomer {
    token: Row<HostTokenRow>,
    row: HostRow,
    member: MemberRow,
    answer: JoinAnswer,
}

async fn admission(ctx: &Ctx, request: &JoinRequest, now_ms: u64) -> Result<Admission, Failure> {
    let token = valid_token(ctx, &request.token, now_ms).await?;
    if let Some(by) = &token.value.used_by {
        return Ok(Admission::Before(Box::new(answered_again(ctx, by, request, now_ms).await?)));
    }
    can_be_honoured(&request.report, now_ms)?;
    is_new(ctx, &request.host).await?;
    let row = HostRow {
        id: request.host.clone(),
        region: request.region.clone(),
        prefix: block(ctx, request.machine_prefix, now_ms).await?,
        public_key: String::new(),
        cpus: 0,
        memory_mb: 0,
        zone: None,
        labels: Default::default(),
        cordoned: false,
        draining: false,
        joined_at_ms: now_ms,
    };
    let (row, report) = (with_report(row, &request.report), &request.report);
    let member = MemberRow {
        epoch: FIRST_EPOCH,
        keys: report.keys.clone(),
        addr: report.addr,
        version: report.version.clone(),
        certified_until_ms: None,
    };
    // Before anything is written: keys that cannot be certified must not use the token up.
    let answer = answer(ctx, &row, &member, now_ms).await?;
    let member = certified(member, &answer);
    Ok(Admission::Now(Box::new(Newcomer { token, row, member, answer })))
}

/// What a member says of itself at a start, and when its certificate is to be renewed. Whoever calls knows that the host
/// itself asks.
pub(crate) async fn renew(ctx: &Ctx, host: &HostId, report: HostReport) -> Result<JoinAnswer, Failure> {
    fleet(ctx)?;
    let _one_at_a_time = ctx.hosts_writer.lock().await;
    let now_ms = now_ms();
    can_be_honoured(&report, now_ms)?;
    is_not_removed(ctx, host).await?;
    let row = ctx.state.get::<HostRow>(&key::host(host)).await?;
    let member = ctx.state.get::<MemberRow>(&key::member(host)).await?;
    let Some((row, member)) = row.zip(member) else {
        if let Some(standing) = report.standing.clone() {
            return taken_back(ctx, host, standing, report, now_ms).await;
        }
        return Err(unknown(host));
    };
    let has_new_keys = member.value.keys != report.keys;
    let epoch = member.value.epoch + u32::from(has_new_keys);
    // The backup from which control was restored may have older keys of it.
    let epoch = report.standing.as_ref().map_or(epoch, |standing| epoch.max(standing.epoch));
    let next_row = with_report(row.value.clone(), &report);
    let certified_until_ms = member.value.certified_until_ms;
    let said = MemberRow { epoch, keys: report.keys, addr: report.addr, version: report.version, certified_until_ms };
    let answer = answer(ctx, &next_row, &said, now_ms).await?;
    let next_member = certified(said.clone(), &answer);
    if next_row != row.value || next_member != member.value {
        let change = Change::default()
            .unchanged(key::host(host), row.modified)
            .unchanged(key::member(host), member.modified)
            .put(key::host(host), &next_row)
            .put(key::member(host), &next_member);
        committed(ctx, change).await?;
    }
    if next_row != row.value || said != member.value {
        tracing::info!(%host, epoch, addr = %said.addr, "host says anew who it is");
    }
    Ok(answer)
}

pub(crate) async fn is_not_removed(ctx: &Ctx, host: &HostId) -> Result<(), Failure> {
    match ctx.state.get::<RemovedHostRow>(&key::removed_host(host)).await? {
        None => Ok(()),
        Some(_) => Err(Failure::new(ErrorCode::Forbidden, format!("host {host} was removed from the cluster"))
            .hint("`dunlin host leave` there, then let it join anew under another id")),
    }
}

pub(crate) fn unknown(host: &HostId) -> Failure {
    Failure::not_found(format!("host {host} is not in the cluster")).hint("let it join: `dunlin host join`")
}

/// A host that control itself let in, as its certificate shows, and that the backup from which control was restored is too
/// old to have.
async fn taken_back(ctx: &Ctx, host: &HostId, standing: Standing, report: HostReport, now_ms: u64) -> Result<JoinAnswer, Failure> {
    let found = ctx.state.get::<HostRow>(&key::host(host)).await?;
    let prefix = match &found {
        Some(row) => row.value.prefix,
        None => block(ctx, Some(standing.machine_prefix), now_ms).await?,
    };
    let row = HostRow {
        id: host.clone(),
        region: standing.region,
        prefix,
        public_key: String::new(),
        cpus: 0,
        memory_mb: 0,
        zone: None,
        labels: Default::default(),
        cordoned: found.as_ref().is_some_and(|row| row.value.cordoned),
        draining: found.as_ref().is_some_and(|row| row.value.draining),
        joined_at_ms: found.as_ref().map_or(now_ms, |row| row.value.joined_at_ms),
    };
    let row = with_report(row, &report);
    let (epoch, addr) = (standing.epoch, report.addr);
    let member = MemberRow { epoch, keys: report.keys, addr, version: report.version, certified_until_ms: None };
    let answer = answer(ctx, &row, &member, now_ms).await?;
    let member = certified(member, &answer);
    let change = Change::default()
        .if_as_read(key::host(host), found.as_ref())
        .absent(key::member(host))
        .put(key::host(host), &row)
        .put(key::member(host), &member);
    committed(ctx, change).await?;
    tracing::info!(%host, region = %row.region, %prefix, "a host that the backup does not have is taken back");
    Ok(answer)
}

/// Only what a host may say of itself; of what it leaves unsaid, it keeps what it said before. Its region stays: its rights
/// name it, and machines were placed by it.
fn with_report(row: HostRow, report: &HostReport) -> HostRow {
    HostRow {
        public_key: report.sealing_key.clone(),
        cpus: report.cpus,
        memory_mb: report.memory_mb,
        zone: report.zone.clone().or(row.zone),
        labels: if report.labels.is_empty() { row.labels } else { report.labels.clone() },
        ..row
    }
}

pub(crate) fn fleet(ctx: &Ctx) -> Result<&Fleet, Failure> {
    ctx.fleet.as_ref().ok_or_else(|| {
        Failure::new(ErrorCode::FailedPrecondition, "this server is alone: it listens for no other hosts")
            .hint("start it with --cluster ADDR:PORT, for example 0.0.0.0:7373")
    })
}

async fn committed(ctx: &Ctx, change: Change) -> Result<(), Failure> {
    match ctx.state.commit(change).await? {
        Outcome::Committed => Ok(()),
        Outcome::Conflict => Err(Failure::new(ErrorCode::Conflict, "hosts were changed in this moment").hint("try again")),
    }
}

/// An unknown token and a wrong secret are answered alike.
async fn valid_token(ctx: &Ctx, proof: &TokenProof, now_ms: u64) -> Result<Row<HostTokenRow>, Failure> {
    const NEW: &str = "make a new one where control runs: `dunlin host token`";
    let is_id = (1..=64).contains(&proof.id.len()) && proof.id.bytes().all(|b| b.is_ascii_hexdigit());
    let row = if is_id { ctx.state.get::<HostTokenRow>(&key::host_token(&proof.id)).await? } else { None };
    let row = row.filter(|row| proof.has_digest(&row.value.secret_digest));
    let row = row.ok_or_else(|| Failure::new(ErrorCode::Unauthorized, "nobody knows this token").hint(NEW))?;
    if row.value.expires_at_ms <= now_ms {
        return Err(Failure::new(ErrorCode::Unauthorized, format!("the token {} has expired", proof.id)).hint(NEW));
    }
    Ok(row)
}

/// The answer to a host that has joined with this token may have been lost: it gets it again, and nobody else does.
async fn answered_again(ctx: &Ctx, by: &HostId, request: &JoinRequest, now_ms: u64) -> Result<JoinAnswer, Failure> {
    let row = ctx.state.get::<HostRow>(&key::host(by)).await?;
    let member = ctx.state.get::<MemberRow>(&key::member(by)).await?;
    if let Some((row, member)) = row.zip(member)
        && *by == request.host
        && member.value.keys == request.report.keys
    {
        return answer(ctx, &row.value, &member.value, now_ms).await;
    }
    Err(Failure::new(ErrorCode::Unauthorized, format!("the token {} was used by host {by}", request.token.id))
        .hint("a token lets one host join; make another one where control runs: `dunlin host token`"))
}

fn can_be_honoured(report: &HostReport, now_ms: u64) -> Result<(), Failure> {
    let is_labelled = report.labels.iter().all(|(name, value)| is_host_label(name) && is_host_label(value));
    if !is_labelled || report.labels.len() > HOST_LABELS_MAX {
        return Err(Failure::invalid(format!("a host has at most {HOST_LABELS_MAX} labels, KEY=VALUE of 63 visible characters each")));
    }
    if report.cpus == 0 || report.memory_mb == 0 {
        return Err(Failure::invalid("a host without cpus or memory could run nothing"));
    }
    if SealingKey::from_base64(&report.sealing_key).is_err() {
        return Err(Failure::invalid("the key to seal secrets to is not an X25519 public key in base64"));
    }
    if !is_dialled(&report.addr) {
        return Err(Failure::invalid(format!("other hosts cannot reach {}", report.addr))
            .hint("name the host's own address: --advertise ADDR:PORT"));
    }
    if report.version.len() > MAX_VERSION_BYTES || !report.version.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(Failure::invalid(format!("a version has at most {MAX_VERSION_BYTES} visible characters")));
    }
    let skew_ms = now_ms.abs_diff(report.clock_ms);
    if skew_ms > MAX_SKEW_MS {
        let which = if report.clock_ms < now_ms { "behind" } else { "ahead of" };
        return Err(Failure::new(
            ErrorCode::FailedPrecondition,
            format!("the host's clock is {} s {which} that of control; {} s are allowed", skew_ms / 1000, MAX_SKEW_MS / 1000),
        )
        .hint("let both follow the network's time, for example with chrony or systemd-timesyncd"));
    }
    Ok(())
}

fn is_dialled(addr: &SocketAddr) -> bool {
    let is_broadcast = matches!(addr.ip(), IpAddr::V4(ip) if ip.is_broadcast());
    addr.port() != 0 && !addr.ip().is_unspecified() && !addr.ip().is_multicast() && !is_broadcast
}

/// One id means one host for ever: what was said under it is never taken for what another one says.
async fn is_new(ctx: &Ctx, host: &HostId) -> Result<(), Failure> {
    const OTHER: &str = "choose another id with --host-id";
    if let Some(removed) = ctx.state.get::<RemovedHostRow>(&key::removed_host(host)).await? {
        let ago_h = now_ms().saturating_sub(removed.value.removed_at_ms) / 3_600_000;
        let why = format!("duplicate identity: a host {host} was removed {ago_h} hours ago, and its id is never used again");
        return Err(Failure::new(ErrorCode::NameTaken, why).hint(OTHER));
    }
    if ctx.state.get::<HostRow>(&key::host(host)).await?.is_some() {
        let hint = format!("{OTHER}; if this is that host and it has lost its data, `dunlin host remove {host}` first, and choose another id");
        return Err(Failure::new(ErrorCode::NameTaken, format!("duplicate identity: there is a host {host}")).hint(hint));
    }
    Ok(())
}

/// The block that was asked for, or the next free one.
async fn block(ctx: &Ctx, asked: Option<Ipv4Prefix>, now_ms: u64) -> Result<Ipv4Prefix, Failure> {
    let hosts = ctx.state.list::<HostRow>("hosts/").await?;
    let removed = ctx.state.list::<RemovedHostRow>("removed_hosts/").await?;
    let resting = removed.iter().filter(|row| now_ms < row.value.removed_at_ms.saturating_add(BLOCK_REST_MS));
    let taken: Vec<(String, Ipv4Prefix)> = hosts
        .iter()
        .map(|row| (format!("host {}", row.value.id), row.value.prefix))
        .chain(resting.map(|row| ("a host that was removed less than a day ago".to_owned(), row.value.prefix)))
        .collect();
    let Some(asked) = asked else {
        return free_block(&taken).ok_or_else(|| {
            Failure::new(ErrorCode::InsufficientCapacity, format!("all blocks of {POOL} are taken"))
                .hint("give the host a block of its own: --machine-prefix NET/LEN; those of removed hosts are free after a day")
        });
    };
    if !asked.is_for_machines() {
        return Err(Failure::invalid(format!("{asked} cannot be a block of machines' addresses"))
            .hint("a private one of at least a /24, such as 10.202.0.0/16"));
    }
    match taken.iter().find(|(_, prefix)| prefix.overlaps(&asked)) {
        None => Ok(asked),
        Some((whose, prefix)) => Err(Failure::new(ErrorCode::Conflict, format!("{asked} overlaps {prefix}, the block of {whose}"))
            .hint("choose another block, or none: control then gives it one")),
    }
}

fn free_block(taken: &[(String, Ipv4Prefix)]) -> Option<Ipv4Prefix> {
    let blocks = 0u32..1 << (BLOCK_LENGTH - POOL.length);
    let at = |n: u32| Ipv4Prefix { network: (u32::from(POOL.network) + (n << (32 - BLOCK_LENGTH))).into(), length: BLOCK_LENGTH };
    blocks.map(at).find(|block| taken.iter().all(|(_, prefix)| !prefix.overlaps(block)))
}

/// With the end of what it was just issued, within a day: a host that starts often makes no row of the store change.
fn certified(member: MemberRow, answer: &JoinAnswer) -> MemberRow {
    let ends_ms = answer.issued.not_after_ms;
    let is_told = member.certified_until_ms.is_some_and(|told_ms| told_ms <= ends_ms && ends_ms - told_ms < CERTIFIED_WITHIN_MS);
    MemberRow { certified_until_ms: if is_told { member.certified_until_ms } else { Some(ends_ms) }, ..member }
}

pub(crate) async fn answer(ctx: &Ctx, row: &HostRow, member: &MemberRow, now_ms: u64) -> Result<JoinAnswer, Failure> {
    let issued = ctx.cluster.issue(&row.id, &row.region, member.epoch, &member.keys, now_ms);
    Ok(JoinAnswer {
        issued: issued.map_err(|error| Failure::invalid(format!("the host's keys cannot be certified: {error}")))?,
        region: row.region.clone(),
        epoch: member.epoch,
        domain: ctx.domain.clone(),
        machine_prefix: row.prefix,
        control: ctx.host_row.id.clone(),
        peers: peers(ctx, &row.id, &row.region).await?,
        reached_by: None,
    })
}

/// Where to begin: control's host, and some others, those of the host's own region first.
async fn peers(ctx: &Ctx, of: &HostId, region: &Region) -> Result<Vec<(HostId, SocketAddr)>, Failure> {
    const MOST: usize = 16;
    let hosts = ctx.state.list::<HostRow>("hosts/").await?;
    let is_near = |id: &HostId| hosts.iter().any(|row| row.value.id == *id && row.value.region == *region);
    let mut others: Vec<(HostId, SocketAddr)> = addresses(ctx).await?.into_iter().filter(|(id, _)| id != of).collect();
    others.sort_by_key(|(id, _)| (*id != ctx.host_row.id, !is_near(id), id.clone()));
    others.truncate(MOST);
    Ok(others)
}

/// Of all hosts that joined, and of this one.
pub(crate) async fn addresses(ctx: &Ctx) -> Result<Vec<(HostId, SocketAddr)>, Failure> {
    let own = ctx.fleet.as_ref().map(|fleet| (ctx.host_row.id.clone(), fleet.addr)).filter(|(_, addr)| is_dialled(addr));
    let rows = ctx.state.list_keyed::<MemberRow>("members/").await?;
    let members = rows.into_iter().filter_map(|(key, row)| Some((key.strip_prefix("members/")?.parse().ok()?, row.value.addr)));
    Ok(own.into_iter().chain(members).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_free_block_overlaps_nobodys() {
        let block = |network: &str, length| (String::new(), Ipv4Prefix { network: network.parse().unwrap(), length });
        let check = |taken: &[(String, Ipv4Prefix)], expected: Option<&str>| {
            assert_eq!(free_block(taken).map(|block| block.to_string()).as_deref(), expected, "{taken:?}");
        };
        check(&[block("10.201.0.0", 16)], Some("10.208.0.0/20"));
        check(&[block("10.208.0.0", 20)], Some("10.208.16.0/20"));
        check(&[block("10.208.0.0", 16), block("10.209.0.0", 24)], Some("10.209.16.0/20"));
        check(&[block("10.208.0.0", 13), block("10.216.0.0", 13)], None);
    }

    #[test]
    fn only_what_others_can_dial_is_an_address() {
        for (text, expected) in [
            ("10.0.0.1:7373", true),
            ("[fd00::1]:7373", true),
            ("127.0.0.1:7373", true), // several servers on one computer
            ("0.0.0.0:7373", false),
            ("10.0.0.1:0", false),
            ("[::]:7373", false),
            ("224.0.0.1:7373", false),
            ("255.255.255.255:1", false),
        ] {
            assert_eq!(is_dialled(&text.parse().unwrap()), expected, "{text}");
        }
    }
}
