//! A host whose certificate has ended is certified anew when it proves that it has the key that control knows of it; see
//! [`ReturnRequest`]. One that was removed is told so, with the cluster's signature: nobody else speaks to it.

use crate::failure::Failure;
use crate::members::{answer, fleet, is_not_removed, unknown};
use crate::rows::{MemberRow, RemovedHostRow, key};
use crate::{Ctx, now_ms};
use dunlin_api::ErrorCode;
use dunlin_cluster::{JoinAnswer, RemovalNotice, ReturnChallenge, ReturnRequest};
use dunlin_model::HostId;
use dunlin_model::desired::HostRow;
use serde::Serialize;

/// There and back through a member that relays it.
const ANSWERED_WITHIN_MS: u64 = 60_000;
const KEY_CONTEXT: &str = "dunlin control 1 challenges";

/// Challenges are not kept: what this process alone can have made, for that host and in this minute, is one. Anybody may ask for
/// some, and costs no memory.
pub(crate) struct Challenges([u8; 32]);

impl Default for Challenges {
    fn default() -> Self {
        Self(crate::keys::random())
    }
}

impl Challenges {
    fn make(&self, host: &HostId, at_ms: u64) -> String {
        format!("{at_ms}.{}", self.code(host, at_ms).to_hex())
    }

    fn is_fresh(&self, challenge: &str, host: &HostId, now_ms: u64) -> bool {
        let Some((at_ms, code)) = challenge.split_once('.') else { return false };
        let Ok(at_ms) = at_ms.parse::<u64>() else { return false };
        // blake3 compares in constant time.
        let is_own = blake3::Hash::from_hex(code).is_ok_and(|code| code == self.code(host, at_ms));
        is_own && now_ms.abs_diff(at_ms) <= ANSWERED_WITHIN_MS
    }

    fn code(&self, host: &HostId, at_ms: u64) -> blake3::Hash {
        let key = blake3::derive_key(KEY_CONTEXT, &self.0);
        blake3::keyed_hash(&key, format!("{at_ms} {host}").as_bytes())
    }
}

#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum Returned {
    Removed(RemovalNotice),
    Challenged(ReturnChallenge),
    Certified(Box<JoinAnswer>),
}

/// Nothing is written: the host says anew who it is as soon as it is heard, as after each start.
pub(crate) async fn returning(ctx: &Ctx, request: ReturnRequest) -> Result<Returned, Failure> {
    fleet(ctx)?;
    let (host, now_ms) = (&request.returning, now_ms());
    if request.proof.is_none() && ctx.state.get::<RemovedHostRow>(&key::removed_host(host)).await?.is_some() {
        return Ok(Returned::Removed(ctx.cluster.removal_notice(host)));
    }
    is_not_removed(ctx, host).await?;
    let row = ctx.state.get::<HostRow>(&key::host(host)).await?;
    let member = ctx.state.get::<MemberRow>(&key::member(host)).await?;
    let (row, member) = row.zip(member).ok_or_else(|| unknown(host))?;
    let Some(proof) = &request.proof else {
        return Ok(Returned::Challenged(ReturnChallenge { challenge: ctx.challenges.make(host, now_ms) }));
    };
    if !ctx.challenges.is_fresh(&proof.challenge, host, now_ms) {
        let why = format!("what host {host} has signed is not what control asked for within the last {} s", ANSWERED_WITHIN_MS / 1000);
        return Err(Failure::new(ErrorCode::Unauthorized, why).hint("it asks again by itself; if that goes on, see that the way to control is quicker"));
    }
    let ca = ctx.cluster.ca_sha256().map_err(|error| Failure::internal("the cluster's authority cannot be used", &error))?;
    if !proof.is_by(host, &member.value.keys, &ca) {
        let why = format!("who asks as host {host} has not the key that control knows of it");
        return Err(Failure::new(ErrorCode::Unauthorized, why)
            .hint(format!("if that is the host and its keys are lost, `dunlin host remove {host}` and let it join anew under another id")));
    }
    let answer = answer(ctx, &row.value, &member.value, now_ms).await?;
    tracing::info!(%host, "a host that had no valid certificate has proved its key and is certified anew");
    Ok(Returned::Certified(Box::new(answer)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_challenge_is_this_processs_for_one_host_and_one_minute() {
        let (challenges, others) = (Challenges::default(), Challenges::default());
        let (h2, h3): (HostId, HostId) = ("h2".parse().unwrap(), "h3".parse().unwrap());
        let made = challenges.make(&h2, 1_000_000);
        assert!(challenges.is_fresh(&made, &h2, 1_000_000) && challenges.is_fresh(&made, &h2, 1_000_000 + ANSWERED_WITHIN_MS));
        assert!(!challenges.is_fresh(&made, &h2, 1_000_001 + ANSWERED_WITHIN_MS), "too late");
        assert!(!challenges.is_fresh(&made, &h3, 1_000_000), "another host's");
        assert!(!others.is_fresh(&made, &h2, 1_000_000), "another process's");
        let later = made.replacen("1000000", "1000001", 1);
        for bad in ["", ".", "x", "1.", "1.zz", &later, &format!("{made}0"), "99999999999999999999.00"] {
            assert!(!challenges.is_fresh(bad, &h2, 1_000_000), "{bad}");
        }
    }
}
