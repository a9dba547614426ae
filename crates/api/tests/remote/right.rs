//! A member's calls: each is judged by the proof that comes with it.

use super::host::{Host, machine};
use super::{command, dial_pipe, id};
use dunlin_api::remote::{Asker, Bearer, Judge, RemoteHost, serve};
use dunlin_api::{CommandKind, ExecRequest, HostApi, LogQuery, Refusal, Source};
use dunlin_model::proof::Proof;
use dunlin_model::token::{Capability, Verb};
use ed25519_dalek::SigningKey;
use std::sync::Arc;

fn key() -> SigningKey {
    SigningKey::from_bytes(&[1; 32])
}

fn token(verbs: &[Verb]) -> String {
    Capability { id: "t1".into(), org: "personal".parse().unwrap(), apps: None, verbs: verbs.to_vec(), expires_at_ms: u64::MAX }.sign(&key())
}

/// Takes what the token allows, whatever the app.
fn judge() -> Judge {
    Arc::new(|proof, call, right| {
        let forbidden = |why: String| Refusal::Forbidden(why);
        let capability = proof.verify(&key().verifying_key(), call, 0).map_err(|error| forbidden(error.to_string()))?;
        if capability.verbs.contains(&right.verb) { Ok(()) } else { Err(forbidden(format!("no {:?}", right.verb))) }
    })
}

/// Host `h2` as a member reaches it that calls it `named`, and shows what `bearer` makes.
fn reached(host: &Arc<Host>, named: &str, bearer: Option<Bearer>) -> RemoteHost {
    let host = Arc::clone(host);
    let dial = dial_pipe(move |there| serve(there, host.clone() as Arc<dyn HostApi>, Asker::Member(judge())));
    match bearer {
        Some(bearer) => RemoteHost::asked_for(bearer, named.parse().unwrap(), dial),
        None => RemoteHost::new(named.parse().unwrap(), dial),
    }
}

fn shows(token: String) -> Option<Bearer> {
    Some(Arc::new(move |call| Proof::of(&token, &key().verifying_key(), call)))
}

#[track_caller]
fn is_forbidden<T>(answer: Result<T, Refusal>) {
    assert!(matches!(answer.as_ref().err(), Some(Refusal::Forbidden(_))), "{:?}", answer.err());
}

#[tokio::test]
async fn a_member_asks_for_what_its_callers_token_allows() {
    let host = Arc::new(Host::new());
    let all = reached(&host, id().as_str(), shows(token(&[Verb::Read, Verb::Deploy, Verb::Exec])));
    all.machine(&machine()).await.unwrap();
    all.command(command("c1", machine())).await.unwrap();
    drop(all.exec(ExecRequest::new(machine(), vec!["ls".into()], 1_000)).await.unwrap());
    drop(all.logs(LogQuery { app: Some("web".parse().unwrap()), ..LogQuery::default() }).await.unwrap());

    let reads = reached(&host, id().as_str(), shows(token(&[Verb::Read])));
    reads.machine(&machine()).await.unwrap();
    is_forbidden(reads.command(command("c2", machine())).await);
    is_forbidden(reads.exec(ExecRequest::new(machine(), vec!["ls".into()], 1_000)).await.map(drop));
}

#[tokio::test]
async fn nothing_is_a_members_own_right() {
    let host = Arc::new(Host::new());
    let bare = reached(&host, id().as_str(), None);
    is_forbidden(bare.machine(&machine()).await);
    is_forbidden(bare.command(command("c1", machine())).await);
    let all = reached(&host, id().as_str(), shows(token(&[Verb::Read, Verb::Deploy, Verb::Exec, Verb::Admin])));
    is_forbidden(all.volume_room(1).await);
    is_forbidden(all.logs(LogQuery::default()).await.map(drop));
    // Whoever speaks for somebody is neither a plan nor the platform.
    let mut as_plan = command("c2", machine());
    (as_plan.source, as_plan.kind) = (Source::Plan, CommandKind::Start);
    is_forbidden(all.command(as_plan).await);
}

#[tokio::test]
async fn a_proof_is_for_one_host_and_one_call() {
    let host = Arc::new(Host::new());
    // Made for another host, and brought here by it.
    let elsewhere = reached(&host, "h9", shows(token(&[Verb::Read])));
    is_forbidden(elsewhere.machine(&machine()).await);
    let stolen = Proof::of(&token(&[Verb::Read, Verb::Deploy]), &key().verifying_key(), b"another call").unwrap();
    let thief = reached(&host, id().as_str(), Some(Arc::new(move |_| Ok(stolen.clone()))));
    is_forbidden(thief.command(command("c1", machine())).await);
    let foreign = Capability { verbs: vec![Verb::Read], ..Capability::verify(&token(&[]), &key().verifying_key(), 0).unwrap() };
    let foreign = foreign.sign(&SigningKey::from_bytes(&[2; 32]));
    is_forbidden(reached(&host, id().as_str(), shows(foreign)).machine(&machine()).await);
}
