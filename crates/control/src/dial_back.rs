//! A host that joins is dialed back, before its token is used and its row written: a host that nobody reaches would be a member
//! to which requests and commands are sent in vain.
//!
//! Control dials, and not the member that was asked. It alone can tell whether the token's secret is right, and nobody without
//! a token has anything dialed; it has to reach the host later; and it need not believe another member.

use crate::failure::Failure;
use crate::members::fleet;
use crate::Ctx;
use dunlin_api::ErrorCode;
use dunlin_cluster::{DialedBack, JoinRequest, NotReached, PublicKeys};
use dunlin_model::HostId;
use futures_util::future::BoxFuture;
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;

/// Dials a host that joins at its address, over UDP and over TCP, and sees whether the one with these keys answers. A few seconds
/// at most.
pub type DialBack = Arc<dyn Fn(SocketAddr, PublicKeys) -> BoxFuture<'static, DialedBack> + Send + Sync>;

/// Each is two small handshakes; many hosts may be set up by one script.
const MAX_AT_ONCE: usize = 16;
/// For its turn: four rounds of dials that all take their whole time.
const TURN_WITHIN: Duration = Duration::from_secs(16);
/// Somebody mends firewalls and tries again; who looks for open ports would want thousands.
const MAX_OF_TOKEN: usize = 8;
const COUNTED_FOR: Duration = Duration::from_secs(600);

/// What is being dialed, and what was. In memory only: another control counts anew.
pub(crate) struct DialBacks {
    turns: Semaphore,
    /// When, by token. As many as there are tokens that are valid and were shown lately.
    of_tokens: Mutex<BTreeMap<String, VecDeque<Instant>>>,
}

impl Default for DialBacks {
    fn default() -> Self {
        Self { turns: Semaphore::new(MAX_AT_ONCE), of_tokens: Mutex::default() }
    }
}

impl DialBacks {
    /// One more by this token; `Err` says how long there may be none.
    fn count(&self, token: &str, now: Instant) -> Result<(), Duration> {
        let mut of_tokens = self.of_tokens.lock().unwrap_or_else(PoisonError::into_inner);
        of_tokens.retain(|_, dials| {
            dials.retain(|at| now.duration_since(*at) < COUNTED_FOR);
            !dials.is_empty()
        });
        let dials = of_tokens.entry(token.to_owned()).or_default();
        match dials.front() {
            Some(first) if dials.len() >= MAX_OF_TOKEN => Err(COUNTED_FOR.saturating_sub(now.duration_since(*first))),
            _ => {
                dials.push_back(now);
                Ok(())
            }
        }
    }
}

/// Whether the host is reached where it says that it is. The caller has found its token good.
pub(crate) async fn reached(ctx: &Ctx, request: &JoinRequest) -> Result<(), Failure> {
    let fleet = fleet(ctx)?;
    if !request.answers {
        let why = format!("the dunlin of host {} (version {}) does not answer when it is dialed back while it joins", request.host, request.report.version);
        return Err(Failure::new(ErrorCode::FailedPrecondition, why).hint("install the dunlin there that the cluster runs: see `dunlin version` on both"));
    }
    ctx.dial_backs.count(&request.token.id, Instant::now()).map_err(|wait| {
        let why = format!("with the token {} hosts were dialed back {MAX_OF_TOKEN} times within {} minutes", request.token.id, COUNTED_FOR.as_secs() / 60);
        Failure::new(ErrorCode::RateLimited, why)
            .hint(format!("wait {} s, or make a new token where control runs: `dunlin host token`", wait.as_secs() + 1))
    })?;
    let busy = || Failure::new(ErrorCode::Unavailable, "too many hosts join at once").hint("try again in a moment; the token is as good as before");
    let turn = tokio::time::timeout(TURN_WITHIN, ctx.dial_backs.turns.acquire()).await.map_err(|_| busy())?.map_err(|_| busy())?;
    let dialed = (fleet.dial_back)(request.report.addr, request.report.keys.clone()).await;
    drop(turn);
    judged(&dialed, &Dial { host: &request.host, addr: request.report.addr, by: &ctx.host_row.id, from: fleet.addr })
}

struct Dial<'a> {
    host: &'a HostId,
    addr: SocketAddr,
    by: &'a HostId,
    from: SocketAddr,
}

fn judged(dialed: &DialedBack, dial: &Dial<'_>) -> Result<(), Failure> {
    let both = [("UDP", &dialed.udp), ("TCP", &dialed.tcp)];
    let failed: Vec<(&str, &NotReached)> = both.iter().filter_map(|(over, found)| Some((*over, found.as_ref().err()?))).collect();
    if failed.is_empty() {
        return Ok(());
    }
    let Dial { host, addr, by, from } = dial;
    let whys: Vec<String> = failed.iter().map(|(over, why)| format!("over {over} ({why})")).collect();
    let ports: Vec<String> = failed.iter().map(|(over, _)| format!("{}/{}", addr.port(), over.to_lowercase())).collect();
    let ports = ports.join(" and ");
    let hint = match failed.iter().any(|(_, why)| **why == NotReached::ByAnother) {
        true => format!("give the address at which others reach this host with --advertise ADDR:PORT, or have {ports} passed on to it"),
        false => format!(
            "let {ports} in, in this host's firewall and in those before it, or give the address at which others reach it with \
             --advertise ADDR:PORT"
        ),
    };
    let why = format!("host {host} is not reached at {addr} {}; host {by}, where control runs, tried it from {}", whys.join(" and "), from.ip());
    Err(Failure::new(ErrorCode::FailedPrecondition, why).hint(format!("{hint}; the token is as good as before")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_has_few_dials_and_they_are_forgotten() {
        let (dials, start) = (DialBacks::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        for n in 0..MAX_OF_TOKEN {
            assert_eq!(dials.count("a", at(n as u64)), Ok(()));
        }
        assert_eq!(dials.count("a", at(100)), Err(Duration::from_secs(500)));
        assert_eq!(dials.count("b", at(100)), Ok(()), "another token's");
        assert_eq!(dials.count("a", at(600)), Ok(()), "the first is forgotten");
        assert_eq!(dials.count("a", at(600)), Err(Duration::from_secs(1)), "and no more");
        assert_eq!(dials.count("c", at(5_000)), Ok(()));
        assert_eq!(dials.of_tokens.lock().unwrap().len(), 1, "tokens of long ago");
    }

    #[test]
    fn what_failed_is_said_and_what_did_not_is_not() {
        let (host, by) = ("h2".parse().unwrap(), "h1".parse().unwrap());
        let dial = Dial { host: &host, addr: "10.0.0.2:7000".parse().unwrap(), by: &by, from: "10.0.0.1:7373".parse().unwrap() };
        let check = |udp: Result<(), NotReached>, tcp: Result<(), NotReached>, says: &[&str], not: &[&str]| {
            let failure = judged(&DialedBack { udp, tcp }, &dial).unwrap_err();
            assert_eq!(failure.code, ErrorCode::FailedPrecondition);
            let all = format!("{failure} {}", failure.hint.as_deref().unwrap());
            says.iter().for_each(|text| assert!(all.contains(text), "no {text}: {all}"));
            not.iter().for_each(|text| assert!(!all.contains(text), "{text}: {all}"));
        };
        let late = || Err(NotReached::Unanswered("no answer within 4 s".into()));
        let always = ["h2 is not reached at 10.0.0.2:7000", "host h1, where control runs, tried it from 10.0.0.1", "--advertise", "token is as good"];
        let with = |more: &[&'static str]| [&always, more].concat();
        check(late(), Ok(()), &with(&["over UDP (no answer within 4 s);", "let 7000/udp in"]), &["TCP", "tcp"]);
        check(Ok(()), late(), &with(&["over TCP (no answer within 4 s);", "let 7000/tcp in"]), &["UDP", "udp"]);
        check(late(), late(), &with(&["over UDP (no answer within 4 s) and over TCP", "let 7000/udp and 7000/tcp in"]), &[]);
        check(Err(NotReached::ByAnother), Ok(()), &with(&["over UDP (something else than this host answers)", "have 7000/udp passed on"]), &["firewall"]);
        assert_eq!(judged(&DialedBack { udp: Ok(()), tcp: Ok(()) }, &dial), Ok(()));
    }
}
