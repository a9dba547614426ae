//! This host when what was once issued for it is of no use any more: it proves its key to control, through any member, and is
//! certified anew. See [`ReturnRequest`].

use anyhow::{Context, bail};
use dunlin_api::ErrorBody;
use dunlin_cluster::{Issued, JoinAnswer, Member, RemovalNotice, ReturnChallenge, ReturnRequest, join};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::net::SocketAddr;
use std::path::Path;

const DAY_MS: u64 = 24 * 3_600_000;

/// By the first that answers, beginning with control itself if it is known where that is.
pub async fn certified_anew(member: &Member, control: Option<SocketAddr>) -> anyhow::Result<Issued> {
    let others = member.peers.iter().filter(|(host, _)| *host != member.host).map(|(_, addr)| *addr);
    let mut asked: Vec<SocketAddr> = Vec::new();
    let mut failed: Vec<String> = Vec::new();
    for addr in control.into_iter().chain(others) {
        if asked.contains(&addr) {
            continue;
        }
        asked.push(addr);
        match certified_by(member, addr).await {
            Ok(issued) => return Ok(issued),
            Err(error) => failed.push(format!("{addr}: {error:#}")),
        }
    }
    match failed.is_empty() {
        true => bail!("no address of another host is known\n  hint: let this host join anew under another id: `dunlin host leave`, `dunlin host join`"),
        false => bail!("control does not certify this host anew: {}", failed.join("; ")),
    }
}

async fn certified_by(member: &Member, addr: SocketAddr) -> anyhow::Result<Issued> {
    let ca = member.ca_sha256()?;
    let challenge: ReturnChallenge = asked(addr, ca, &ReturnRequest::to_be_challenged(&member.host)).await?;
    let answer: JoinAnswer = asked(addr, ca, &ReturnRequest::proving(member, &challenge)?).await?;
    Ok(answer.issued)
}

async fn asked<T: DeserializeOwned>(addr: SocketAddr, ca_sha256: [u8; 32], request: &ReturnRequest) -> anyhow::Result<T> {
    let answer = join(addr, ca_sha256, &serde_json::to_vec(request)?).await.map_err(|error| match error {
        dunlin_cluster::JoinError::OtherCluster { source, .. } => anyhow::Error::new(source)
            .context("it is not a host of this cluster with a certificate that is valid by this host's clock; see that the clock is right"),
        other => other.into(),
    })?;
    let value: Value = serde_json::from_slice(&answer).context("the answer could not be read")?;
    if value.get("error").is_some() {
        let refused: ErrorBody = serde_json::from_value(value).context("the refusal could not be read")?;
        bail!("{}{}", refused.error, refused.hint.map_or(String::new(), |hint| format!(" ({hint})")));
    }
    serde_json::from_value(value).context("the answer could not be read; is the dunlin there as new as this one? see `dunlin version`")
}

/// What control says of this host's removal, if it does; whether that is to be believed is the caller's. Asked are control, and two
/// others that relay it.
pub async fn removal(member: &Member, control: Option<SocketAddr>) -> Option<RemovalNotice> {
    let others = member.peers.iter().filter(|(host, _)| *host != member.host && *host != member.control).map(|(_, addr)| *addr);
    let request = serde_json::to_vec(&ReturnRequest::to_be_challenged(&member.host)).ok()?;
    for addr in control.into_iter().chain(others.take(2)) {
        match join(addr, member.ca_sha256().ok()?, &request).await {
            Ok(answer) => match (serde_json::from_slice(&answer), serde_json::from_slice::<ReturnChallenge>(&answer)) {
                (Ok(notice), _) => return Some(notice),
                (_, Ok(_)) => return None, // who was not removed is challenged; nothing comes of that
                _ => tracing::debug!(%addr, "it is not said whether this host was removed"),
            },
            Err(error) => tracing::debug!(%addr, %error, "cannot be asked whether this host was removed"),
        }
    }
    None
}

/// What was issued before there was a log of machines is completed before this host takes part, once.
pub async fn with_all_logs(member: Member, dir: &Path) -> anyhow::Result<Member> {
    if !member.lacks_logs() {
        return Ok(member);
    }
    let control = member.peers.iter().find(|(host, _)| *host == member.control).map(|(_, addr)| *addr);
    let issued = certified_anew(&member, control).await.context(
        "this host joined before there were logs of machines, and has no right to write its own; it asks for that at each start, and its \
         machines run on meanwhile",
    )?;
    let member = member.with_logs_of(&issued)?;
    member.save(dir)?;
    tracing::info!("this host may write the log of its machines now");
    Ok(member)
}

pub fn tell_that_it_was_removed(host: &dunlin_model::HostId) {
    tracing::error!(
        %host,
        "this host was removed from its cluster, as control has signed: its machines are destroyed, the files of volumes stay, and nobody speaks to \
         it. Stop its server, `dunlin host leave --yes`, and let it join anew under another id if it is to come back"
    );
}

/// At the first failure, and each hour; what is tried every few seconds says nothing new.
pub fn tell_that_it_ended(ended_ms_ago: u64, error: &anyhow::Error) {
    tracing::error!(
        days = ended_ms_ago / DAY_MS, error = format!("{error:#}"),
        "this host's certificate has ended, and the other hosts refuse this one: until control has certified it anew, for which it asks every \
         few seconds, its machines run on and nobody elsewhere reaches them, it hears of no change, and exclusive machines that wait for a word stay as they are"
    );
}
