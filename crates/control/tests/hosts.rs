//! Hosts join with a token, are cordoned and drained, and are removed for good.

mod world;

use axum::http::Method;
use dunlin_cluster::{
    Authority, DialedBack, HostReport, JoinAnswer, JoinRequest, JoinToken, MAX_JOIN_REQUEST_BYTES, Member, MemberKeys, NotReached, RemovalNotice,
    ReturnChallenge, ReturnRequest,
};
use dunlin_model::desired::{HostRow, Ipv4Prefix};
use dunlin_model::seal::OpeningKey;
use dunlin_model::HostId;
use serde_json::{Value, json};
use std::path::Path;
use world::{Answer, World, now_ms};

fn block(text: &str) -> Ipv4Prefix {
    let (network, length) = text.split_once('/').unwrap();
    Ipv4Prefix { network: network.parse().unwrap(), length: length.parse().unwrap() }
}

/// The key that opens what is sealed to a host that joins.
fn sealing(id: &str) -> OpeningKey {
    OpeningKey::from_bytes([id.as_bytes()[id.len() - 1]; 32])
}

async fn token(world: &World) -> JoinToken {
    let made = world.post("/v1/hosts/tokens", json!({})).await;
    assert_eq!(made.status, 201, "{}", made.text);
    made.json()["token"].as_str().unwrap().parse().unwrap()
}

fn report(id: &str, keys: &MemberKeys) -> HostReport {
    HostReport {
        zone: None,
        labels: [("disk".to_owned(), "nvme".to_owned())].into(),
        cpus: 4,
        memory_mb: 8192,
        sealing_key: sealing(id).sealing_key().to_base64(),
        keys: keys.public().unwrap(),
        addr: format!("10.0.0.{}:7373", id.as_bytes()[id.len() - 1]).parse().unwrap(),
        version: "0.1.0".into(),
        clock_ms: now_ms(),
        standing: None,
    }
}

fn request(token: &JoinToken, id: &str, keys: &MemberKeys) -> JoinRequest {
    let (host, region) = (id.parse().unwrap(), "local".parse().unwrap());
    JoinRequest { token: token.proof(), host, region, machine_prefix: None, report: report(id, keys), answers: true }
}

async fn join(world: &World, request: &JoinRequest) -> Result<JoinAnswer, Value> {
    answered(world.control.enrolment().join(&serde_json::to_vec(request).unwrap()).await)
}

async fn renew(world: &World, id: &str, report: &HostReport) -> Result<JoinAnswer, Value> {
    answered(world.control.enrolment().renew(&id.parse().unwrap(), &serde_json::to_vec(report).unwrap()).await)
}

fn answered(bytes: Vec<u8>) -> Result<JoinAnswer, Value> {
    let value: Value = serde_json::from_slice(&bytes).unwrap();
    if value.get("error").is_some() { Err(value) } else { Ok(serde_json::from_value(value).unwrap()) }
}

fn refused(answer: Result<JoinAnswer, Value>, code: &str, says: &str) {
    let Err(error) = answer else { panic!("it was let in, and not refused with {code}") };
    assert_eq!(error["status"], code, "{error}");
    assert!(error["error"].as_str().unwrap().contains(says), "{error}");
    assert!(code == "bad_request" || error["hint"].as_str().is_some_and(|hint| !hint.is_empty()), "{error}");
}

/// A host that has joined.
async fn joined(world: &World, id: &str) -> JoinAnswer {
    join(world, &request(&token(world).await, id, &MemberKeys::generate().unwrap())).await.unwrap_or_else(|error| panic!("{error}"))
}

async fn delete(world: &World, path: &str) -> Answer {
    world.call(Method::DELETE, path, &[], None).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_joins_once_with_a_token_and_gets_its_answer_again() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    let (token, keys) = (token(&world).await, MemberKeys::generate().unwrap());
    let authority = Authority::load_or_create(&data.path().join("control/cluster"), now_ms()).unwrap();
    assert_eq!(token.ca_sha256, authority.ca_sha256().unwrap(), "the token names this cluster");
    let first = join(&world, &request(&token, "h2", &keys)).await.unwrap();
    assert_eq!((first.epoch, first.domain.as_str(), first.control.as_str()), (1, "localhost", "h1"));
    assert_eq!(first.machine_prefix, block("10.208.0.0/20"));
    assert_eq!(first.peers, [("h1".parse().unwrap(), "10.0.0.1:7373".parse().unwrap())]);
    assert_eq!(first.issued.ca_pem, authority.ca_pem());
    // The answer was lost.
    let again = join(&world, &request(&token, "h2", &keys)).await.unwrap();
    assert_eq!((again.epoch, again.machine_prefix), (1, first.machine_prefix));
    assert_eq!(again.issued.log_certificate, first.issued.log_certificate);
    // Somebody else, by name or by keys.
    let others = MemberKeys::generate().unwrap();
    refused(join(&world, &request(&token, "h2", &others)).await, "unauthorized", "was used by host h2");
    refused(join(&world, &request(&token, "h3", &keys)).await, "unauthorized", "was used by host h2");
    assert_eq!(joined(&world, "h3").await.peers.len(), 2, "h1 and h2");
    assert_eq!(joined(&world, "h4").await.machine_prefix, block("10.208.32.0/20"));
    let hosts = world.get("/v1/hosts").await.json();
    let ids: Vec<_> = hosts.as_array().unwrap().iter().map(|host| host["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["h1", "h2", "h3", "h4"]);
    assert_eq!((&hosts[0]["is_control"], &hosts[0]["state"]), (&json!(true), &json!("up")));
    assert_eq!((&hosts[1]["machine_prefix"], &hosts[1]["labels"]["disk"]), (&json!("10.208.0.0/20"), &json!("nvme")));
    // All of it is in the store.
    world.control.shutdown().await;
    let world = World::start(data.path()).await;
    assert_eq!(world.get("/v1/hosts").await.json().as_array().unwrap().len(), 4);
    refused(join(&world, &request(&token, "h5", &keys)).await, "unauthorized", "was used by host h2");
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_with_a_join_is_said_and_uses_no_token_up() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    joined(&world, "h2").await;
    let (token, keys) = (token(&world).await, MemberKeys::generate().unwrap());
    let check = async |change: &dyn Fn(&mut JoinRequest), code: &str, says: &str| {
        let mut asked = request(&token, "h3", &keys);
        change(&mut asked);
        refused(join(&world, &asked).await, code, says);
    };
    check(&|asked| asked.host = "h2".parse().unwrap(), "name_taken", "duplicate identity: there is a host h2").await;
    check(&|asked| asked.host = "h1".parse().unwrap(), "name_taken", "duplicate identity").await;
    check(&|asked| asked.machine_prefix = Some(block("10.201.0.0/16")), "conflict", "overlaps 10.201.0.0/24, the block of host h1").await;
    check(&|asked| asked.machine_prefix = Some(block("10.208.0.0/12")), "conflict", "the block of host h2").await;
    check(&|asked| asked.machine_prefix = Some(block("8.8.8.0/24")), "invalid", "cannot be a block").await;
    check(&|asked| asked.report.addr = "0.0.0.0:7373".parse().unwrap(), "invalid", "cannot reach 0.0.0.0:7373").await;
    check(&|asked| asked.report.clock_ms -= 3_600_000, "failed_precondition", "3600 s behind that of control").await;
    for (change, says) in [
        (&(|asked: &mut JoinRequest| asked.report.memory_mb = 0) as &dyn Fn(&mut JoinRequest), "without cpus or memory"),
        (&|asked| asked.report.sealing_key = "none".into(), "X25519"),
        (&|asked| asked.report.keys.tls = "none".into(), "cannot be certified"),
        (&|asked| drop(asked.report.labels.insert("a b".into(), "c".into())), "labels"),
        (&|asked| asked.report.version = "x".repeat(65), "version"),
    ] {
        let mut asked = request(&token, "h3", &keys);
        change(&mut asked);
        let error = join(&world, &asked).await.err().expect(says);
        assert!(error["status"] == "invalid" && error["error"].as_str().unwrap().contains(says), "{error}");
    }
    let enrolment = world.control.enrolment();
    refused(answered(enrolment.join(b"{").await), "bad_request", "cannot be read");
    let long = vec![b' '; MAX_JOIN_REQUEST_BYTES + 1];
    assert_eq!(answered(enrolment.join(&long).await).err().unwrap()["status"], "too_large");
    join(&world, &request(&token, "h3", &keys)).await.unwrap_or_else(|error| panic!("the token is as good as before: {error}"));
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_nobody_reaches_is_not_let_in_and_its_token_stays_good() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    let dials = world.others.dials.clone();
    let dialed = || std::mem::take(&mut *dials.dialed.lock().unwrap());
    let (good, keys) = (token(&world).await, MemberKeys::generate().unwrap());
    let asked = request(&good, "h2", &keys);
    let late = || Err(NotReached::Unanswered("no answer within 4 s".into()));
    for (shows, says) in [
        (DialedBack { udp: late(), tcp: Ok(()) }, "is not reached at 10.0.0.50:7373 over UDP (no answer within 4 s); host h1"),
        (DialedBack { udp: Ok(()), tcp: Err(NotReached::ByAnother) }, "is not reached at 10.0.0.50:7373 over TCP (something else"),
    ] {
        *dials.shows.lock().unwrap() = shows;
        refused(join(&world, &asked).await, "failed_precondition", says);
        assert_eq!(dialed(), [asked.report.addr], "that address, once");
        assert_eq!(world.get("/v1/hosts").await.json().as_array().unwrap().len(), 1, "it has no row");
    }
    *dials.shows.lock().unwrap() = DialedBack { udp: Ok(()), tcp: Ok(()) };
    // Nobody is dialed for whoever has no token, or asks for what cannot be.
    let mut wrong = request(&good, "h2", &keys);
    wrong.token = JoinToken::generate([0; 32]).proof();
    refused(join(&world, &wrong).await, "unauthorized", "nobody knows this token");
    refused(join(&world, &request(&good, "h1", &keys)).await, "name_taken", "duplicate identity");
    let old = JoinRequest { answers: false, ..asked.clone() };
    refused(join(&world, &old).await, "failed_precondition", "version 0.1.0) does not answer when it is dialed back");
    assert_eq!(dialed(), []);
    let answer = join(&world, &asked).await.unwrap();
    assert_eq!((answer.reached_by, dialed()), (Some("h1".parse().unwrap()), vec![asked.report.addr]));
    // The answer was lost: it is in, wherever its packets go by now.
    *dials.shows.lock().unwrap() = DialedBack { udp: late(), tcp: late() };
    let again = join(&world, &asked).await.unwrap();
    assert_eq!((again.machine_prefix, again.reached_by, dialed()), (answer.machine_prefix, None, vec![]));
    // A few times by one token, and another has its own.
    let second = token(&world).await;
    for _ in 0..8 {
        refused(join(&world, &request(&second, "h3", &keys)).await, "failed_precondition", "over UDP (no answer within 4 s) and over TCP");
    }
    refused(join(&world, &request(&second, "h3", &keys)).await, "rate_limited", "8 times within 10 minutes");
    assert_eq!(dialed().len(), 8);
    *dials.shows.lock().unwrap() = DialedBack { udp: Ok(()), tcp: Ok(()) };
    joined(&world, "h3").await;
    world.control.shutdown().await;
}

/// Somebody whose packets are dropped holds nobody up, and what others took meanwhile is not given twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_one_is_dialed_back_others_join() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    let dials = world.others.dials.clone();
    let (slow_token, keys) = (token(&world).await, MemberKeys::generate().unwrap());
    let slow = request(&slow_token, "h2", &keys);
    dials.holds.send_replace(Some(slow.report.addr));
    let meanwhile = async {
        world.eventually("it is dialed", async || dials.dialed.lock().unwrap().contains(&slow.report.addr)).await;
        let answer = joined(&world, "h3").await;
        dials.holds.send_replace(None);
        answer
    };
    // The second is the same host, impatient.
    let (first, second, other) = tokio::join!(join(&world, &slow), join(&world, &slow), meanwhile);
    let (first, second) = (first.unwrap(), second.unwrap());
    assert_eq!(first.machine_prefix, second.machine_prefix, "one host");
    assert_eq!((other.machine_prefix, first.machine_prefix), (block("10.208.0.0/20"), block("10.208.16.0/20")));
    assert_eq!(world.get("/v1/hosts").await.json().as_array().unwrap().len(), 3);
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_are_known_by_their_secret_and_expire() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    let (good, keys) = (token(&world).await, MemberKeys::generate().unwrap());
    let parts: Vec<String> = good.reveal().split('.').map(str::to_owned).collect();
    let with = |id: &str, secret: &str| format!("dnj1.{id}.{secret}.{}", parts[3]).parse::<JoinToken>().unwrap();
    let unknown = "0".repeat(16);
    for bad in [with(&parts[1], &"0".repeat(64)), with(&unknown, &parts[2])] {
        refused(join(&world, &request(&bad, "h2", &keys)).await, "unauthorized", "nobody knows this token");
    }
    let short = world.post("/v1/hosts/tokens", json!({ "ttl_s": 1 })).await.json();
    let expired: JoinToken = short["token"].as_str().unwrap().parse().unwrap();
    world.eventually("a second is over", async || now_ms() >= short["expires_at_ms"].as_u64().unwrap()).await;
    refused(join(&world, &request(&expired, "h2", &keys)).await, "unauthorized", "has expired");
    for ttl_s in [json!(0), json!(7 * 24 * 3600 + 1)] {
        assert_eq!(world.post("/v1/hosts/tokens", json!({ "ttl_s": ttl_s })).await.status, 422, "{ttl_s}");
    }
    // The secret itself is nowhere on the disk.
    world.control.shutdown().await;
    let stored: Vec<u8> = std::fs::read_dir(data.path().join("control")).unwrap().flat_map(|file| {
        let path = file.unwrap().path();
        if path.is_file() { std::fs::read(path).unwrap() } else { vec![] }
    }).collect();
    assert!(stored.windows(parts[1].len()).any(|window| window == parts[1].as_bytes()));
    assert!(!stored.windows(parts[2].len()).any(|window| window == parts[2].as_bytes()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_renews_what_it_is_until_it_is_removed_for_good() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    let (token, keys) = (token(&world).await, MemberKeys::generate().unwrap());
    let first = join(&world, &request(&token, "h2", &keys)).await.unwrap();
    let moved = HostReport { memory_mb: 4096, addr: "10.9.9.9:7373".parse().unwrap(), ..report("h2", &keys) };
    let same_keys = renew(&world, "h2", &moved).await.unwrap();
    assert_eq!((same_keys.epoch, same_keys.machine_prefix), (1, first.machine_prefix));
    assert_eq!(same_keys.issued.log_certificate, first.issued.log_certificate);
    let shown = world.get("/v1/hosts/h2").await.json()["host"].clone();
    assert_eq!((&shown["addr"], &shown["memory_mb"]), (&json!("10.9.9.9:7373"), &json!(4096)));
    assert!(world.control.addresses().await.unwrap().contains(&("h2".parse().unwrap(), "10.9.9.9:7373".parse().unwrap())));
    let new_keys = report("h2", &MemberKeys::generate().unwrap());
    assert_eq!(renew(&world, "h2", &new_keys).await.unwrap().epoch, 2, "other keys, another epoch");
    assert_eq!(renew(&world, "h2", &new_keys).await.unwrap().epoch, 2);
    refused(renew(&world, "h3", &report("h3", &keys)).await, "not_found", "host h3 is not in the cluster");
    refused(renew(&world, "h1", &report("h1", &keys)).await, "not_found", "host h1 is not in the cluster");

    assert_eq!(delete(&world, "/v1/hosts/h1").await.status, 412, "control runs there");
    assert_eq!(delete(&world, "/v1/hosts/h9").await.status, 404);
    let removed = delete(&world, "/v1/hosts/h2").await;
    assert_eq!((removed.status.as_u16(), removed.json()), (200, json!({ "id": "h2", "machines": 0, "volumes": 0 })));
    assert_eq!(world.get("/v1/hosts/h2").await.status, 404);
    refused(renew(&world, "h2", &new_keys).await, "forbidden", "was removed");
    let others = MemberKeys::generate().unwrap();
    refused(join(&world, &request(&self::token(&world).await, "h2", &others)).await, "name_taken", "its id is never used again");
    refused(join(&world, &request(&token, "h2", &keys)).await, "unauthorized", "was used by host h2");
    assert_eq!(joined(&world, "h3").await.machine_prefix, block("10.208.16.0/20"), "the block of h2 rests");
    let gone: HostId = "h2".parse().unwrap();
    world.eventually("all know that it is removed", async || world.view.current().config.removed_hosts.contains(&gone)).await;
    world.control.shutdown().await;
    // Nor does control's own host take the name.
    let store = dunlin_store::Store::open(&data.path().join("control/store.db")).unwrap();
    let row = json!({ "removed_at_ms": 1, "prefix": { "network": "10.208.0.0", "length": 20 } });
    store.txn(vec![], vec![dunlin_store::Op::Put("removed_hosts/h1".into(), row.to_string().into())]).await.unwrap();
    store.close().await;
    assert!(World::try_start(data.path(), None).await.is_err());
}

/// It was off for longer than its certificate lives, and comes as somebody without one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_without_a_valid_certificate_proves_its_key_and_is_certified_anew() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    let keys = MemberKeys::generate().unwrap();
    let first = join(&world, &request(&token(&world).await, "h2", &keys)).await.unwrap();
    let member = first.clone().member("h2".parse().unwrap(), keys.clone());
    let asked = async |request: &ReturnRequest| world.control.enrolment().join(&serde_json::to_vec(request).unwrap()).await;
    let challenge = async |host: &str| -> Result<ReturnChallenge, Value> {
        let answer: Value = serde_json::from_slice(&asked(&ReturnRequest::to_be_challenged(&host.parse().unwrap())).await).unwrap();
        if answer.get("error").is_some() { Err(answer) } else { Ok(serde_json::from_value(answer).unwrap()) }
    };
    let proves = async |member: &Member, challenge: &ReturnChallenge| answered(asked(&ReturnRequest::proving(member, challenge).unwrap()).await);
    let good = challenge("h2").await.unwrap();
    let again = proves(&member, &good).await.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!((again.epoch, again.machine_prefix, again.issued.log_certificate.clone()), (1, first.machine_prefix, first.issued.log_certificate.clone()));
    assert!(member.with_logs_of(&again.issued).is_ok());
    // Nobody else, and nothing that control did not ask for.
    let thief = first.member("h2".parse().unwrap(), MemberKeys::generate().unwrap());
    refused(proves(&thief, &good).await, "unauthorized", "has not the key that control knows of it");
    refused(proves(&member, &ReturnChallenge { challenge: "1.00".into() }).await, "unauthorized", "is not what control asked for");
    joined(&world, "h3").await;
    refused(proves(&member, &challenge("h3").await.unwrap()).await, "unauthorized", "is not what control asked for");
    assert_eq!(challenge("h9").await.unwrap_err()["status"], "not_found");
    // What it had is known, so that whoever looks why it is away sees it.
    let ends_at_ms = world.get("/v1/hosts/h2").await.json()["host"]["certificate_ends_at_ms"].as_u64().unwrap();
    assert!(ends_at_ms > now_ms() && ends_at_ms <= again.issued.not_after_ms, "{ends_at_ms}");
    assert_eq!(delete(&world, "/v1/hosts/h2").await.status, 200);
    refused(proves(&member, &good).await, "forbidden", "was removed from the cluster");
    let told = asked(&ReturnRequest::to_be_challenged(&member.host)).await;
    assert!(serde_json::from_slice::<RemovalNotice>(&told).unwrap().is_for(&member), "its removal is signed");
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_member_can_serve_tls_and_open_its_secrets_and_a_removed_one_has_an_old_key() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    world.post("/v1/apps/web/secrets", json!({ "values": { "KEY": "value" }, "stage": true })).await;
    let key_of = |id: &str, key: &OpeningKey| {
        let config = world.view.current().config.clone();
        let certificate = config.certificates.front()?.clone();
        let sealed = certificate.sealed.get(&id.parse().unwrap())?;
        Some(key.open(&format!("certificate/{}", certificate.names[0]), sealed).unwrap().to_vec())
    };
    world.eventually("the first host has the key", async || key_of("h1", &world::host_key()).is_some()).await;
    joined(&world, "h2").await;
    world.eventually("a host that joins later has it, too", async || key_of("h2", &sealing("h2")).is_some()).await;
    let shared = key_of("h1", &world::host_key()).unwrap();
    assert_eq!(key_of("h2", &sealing("h2")).unwrap(), shared);
    assert!(String::from_utf8(shared.clone()).unwrap().contains("PRIVATE KEY"));
    assert_eq!(delete(&world, "/v1/hosts/h2").await.status, 200);
    world.eventually("what the removed host knows is of no use", async || {
        key_of("h1", &world::host_key()).is_some_and(|key| key != shared) && key_of("h2", &sealing("h2")).is_none()
    })
    .await;
    // Once, and not again.
    let renewed = key_of("h1", &world::host_key()).unwrap();
    joined(&world, "h3").await;
    world.eventually("the next one has it", async || key_of("h3", &sealing("h3")).is_some()).await;
    assert_eq!(key_of("h3", &sealing("h3")).unwrap(), renewed);
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cordon_is_kept_over_a_restart_and_taken_back() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    joined(&world, "h2").await;
    let state = async |world: &World, id: &str| world.get(&format!("/v1/hosts/{id}")).await.json()["host"]["state"].clone();
    for id in ["h1", "h2"] {
        for _ in 0..2 {
            let answer = world.post(&format!("/v1/hosts/{id}/cordon"), json!({})).await;
            assert_eq!((answer.status.as_u16(), &answer.json()["host"]["state"]), (200, &json!("cordoned")));
        }
    }
    assert_eq!(world.post("/v1/hosts/h2/drain", json!({})).await.json()["host"]["state"], "draining");
    assert_eq!(world.post("/v1/hosts/h2/cordon", json!({})).await.json()["host"]["state"], "draining", "the drain goes on");
    assert_eq!(world.post("/v1/hosts/h9/cordon", json!({})).await.status, 404);
    world.control.shutdown().await;
    let world = World::start(data.path()).await;
    assert_eq!((state(&world, "h1").await, state(&world, "h2").await), (json!("cordoned"), json!("draining")));
    // What a host says at its start is not the operator's word.
    let row: HostRow = {
        let known = world.get("/v1/hosts/h2").await.json();
        assert_eq!(known["host"]["cordoned"], true);
        world::host_row()
    };
    assert!(!row.cordoned);
    for id in ["h1", "h2"] {
        let answer = world.post(&format!("/v1/hosts/{id}/uncordon"), json!({})).await.json();
        assert_eq!((&answer["host"]["state"], &answer["host"]["draining"]), (&json!("up"), &json!(false)));
    }
    world.control.shutdown().await;
}

/// What h1 has, h2 has from now on. Nothing runs meanwhile.
async fn as_if_on_h2(data: &Path) {
    let store = dunlin_store::Store::open(&data.join("control/store.db")).unwrap();
    let (machines, _) = store.range("machines/").await.unwrap();
    for row in machines {
        let mut machine: Value = serde_json::from_slice(&row.value).unwrap();
        machine["host"] = json!("h2");
        store.txn(vec![], vec![dunlin_store::Op::Put(row.key, machine.to_string().into())]).await.unwrap();
    }
    store.close().await;
    let journal = std::fs::read_to_string(data.join("small-host-h1.json")).unwrap();
    std::fs::write(data.join("small-host-h1.json"), journal.replace(r#""host":"h1""#, r#""host":"h2""#)).unwrap();
}

/// (machines of the app, how many of them are on h2)
fn placed(world: &World, app: &str) -> (usize, usize) {
    let config = world.view.current().config.clone();
    let of_app: Vec<_> = config.machines.values().filter(|machine| machine.spec.app.as_str() == app).collect();
    (of_app.len(), of_app.iter().filter(|machine| machine.host.as_str() == "h2").count())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_moves_what_can_move_without_a_gap_and_says_what_stays() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    assert!(world.deploy("web", 'a', "good").await.ended.is_some());
    world.post("/v1/apps/web/scale", json!({ "app": 2 })).await;
    world.follow("web", 2).await;
    world.create_app("tool").await;
    let config = json!({ "image": format!("tool@sha256:{}", "a".repeat(64)), "guest": { "memory_mb": 256 } });
    let made = world.post("/v1/apps/tool/machines", json!({ "config": config })).await.json();
    let by_hand = made["id"].as_str().unwrap().to_owned();
    joined(&world, "h2").await;
    world.control.shutdown().await;
    as_if_on_h2(data.path()).await;

    let world = World::start_for_all_hosts(data.path()).await;
    world.eventually("all is well on h2", async || placed(&world, "web") == (2, 2) && world.host.healthy() >= 2).await;
    world.host.lowest_healthy.store(usize::MAX, std::sync::atomic::Ordering::SeqCst);
    let begun = world.post("/v1/hosts/h2/drain", json!({})).await.json();
    assert_eq!((&begun["host"]["state"], &begun["moving"]), (&json!("draining"), &json!(2)));
    world.eventually("the release's machines are elsewhere", async || placed(&world, "web") == (2, 0)).await;
    assert!(world.host.lowest_healthy.load(std::sync::atomic::Ordering::SeqCst) >= 2, "each had its successor first");
    let ended = world.get("/v1/hosts/h2").await.json();
    assert_eq!((&ended["moving"], ended["machines"].as_array().unwrap().len()), (&json!(0), 1));
    assert_eq!(ended["machines"][0]["id"], json!(by_hand));
    let stays = ended["machines"][0]["stays"].as_str().unwrap();
    assert!(stays.contains("made by hand") && stays.contains(&by_hand), "{stays}");

    let refused = delete(&world, "/v1/hosts/h2").await;
    assert_eq!(refused.status, 412);
    let error = refused.json();
    assert_eq!(error["error"], "host h2 has 1 machines and 0 volumes");
    assert!(error["hint"].as_str().unwrap().contains("--force"));
    let forced = delete(&world, "/v1/hosts/h2?force=true").await;
    // Here nobody ends machines for it.
    assert_eq!(forced.json(), json!({ "id": "h2", "machines": 1, "volumes": 0, "not_heard_of": 1 }));
    let gone = world.get(&format!("/v1/apps/tool/machines/{by_hand}")).await.json();
    assert_eq!(gone["state"], "destroyed", "{gone}");
    assert_eq!(world.get("/v1/hosts/h2").await.status, 404);
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cluster_is_asked_through_what_the_binary_lends() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    for (path, expected) in [("/v1/cluster/status", "Status"), ("/v1/cluster/verify", "Verify")] {
        assert_eq!(world.get(path).await.json(), json!({ "asked": expected }));
    }
    world.control.shutdown().await;
}
