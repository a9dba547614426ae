//! A host elsewhere: over a pipe in memory and over TCP, with a good and with a bad other side.

mod hostile;
mod host;
mod right;
mod sessions;

use dunlin_api::remote::{Asker, Dial, Duplex, RemoteHost, serve};
use dunlin_api::{BuilderRequest, Command, CommandKind, HostApi, LogQuery, Refusal, Reserve, Source, VolumeEncryption, WaitFor};
use dunlin_model::{Guest, HostId, MachineId, MachineState};
use host::{Host, fact, lease, machine, process, snapshot, socket, volume};
use std::io;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::net::{TcpListener, TcpStream};

pub fn id() -> HostId {
    "h2".parse().unwrap()
}

/// Each stream is a new pipe, and `other` is at its other end.
pub fn dial_pipe<F>(other: impl Fn(tokio::io::DuplexStream) -> F + Send + Sync + 'static) -> Dial
where
    F: Future<Output = ()> + Send + 'static,
{
    Arc::new(move || {
        let (here, there) = tokio::io::duplex(8 * 1024);
        tokio::spawn(other(there));
        Box::pin(async { Ok(Box::new(here) as Box<dyn Duplex>) })
    })
}

pub fn over_pipe(host: &Arc<Host>) -> RemoteHost {
    let host = Arc::clone(host);
    RemoteHost::new(id(), dial_pipe(move |there| serve(there, host.clone() as Arc<dyn HostApi>, Asker::Control)))
}

pub async fn over_tcp(host: &Arc<Host>) -> RemoteHost {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let host = Arc::clone(host);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream, host.clone() as Arc<dyn HostApi>, Asker::Control));
        }
    });
    let dial: Dial = Arc::new(move || {
        Box::pin(async move { Ok(Box::new(TcpStream::connect(address).await?) as Box<dyn Duplex>) })
    });
    RemoteHost::new(id(), dial)
}

pub async fn both(host: &Arc<Host>) -> [RemoteHost; 2] {
    [over_pipe(host), over_tcp(host).await]
}

pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
}

pub fn command(id: &str, machine: MachineId) -> Command {
    Command {
        id: id.parse().unwrap(),
        machine,
        deadline_ms: now_ms() + 15_000,
        generation: None,
        plan: None,
        expected_version: None,
        nonce: Some("n".into()),
        source: Source::User,
        request_id: None,
        kind: CommandKind::Stop { signal: Some("SIGINT".into()), timeout_ms: Some(5) },
    }
}

#[tokio::test]
async fn every_call_arrives_and_its_answer_comes_back() {
    let host = Arc::new(Host::new());
    for remote in both(&host).await {
        assert_eq!(remote.host_id(), &id());
        remote.reserve(Reserve { machine: machine(), guest: Guest::default(), ttl_ms: 30_000 }).await.unwrap();
        let sent = command("user.1", machine());
        assert_eq!(remote.command(sent.clone()).await.unwrap().lease, Some(lease()));
        assert_eq!(host.commands.lock().unwrap().pop(), Some(sent));
        assert_eq!(remote.machine(&machine()).await.unwrap(), fact());
        let (states, version) = (vec![MachineState::Started], Some(fact().version));
        let wait = WaitFor { states, version, after_event: Some(4), timeout_ms: 10 };
        assert_eq!(remote.wait(&machine(), wait).await.unwrap(), fact());
        assert_eq!(remote.events(&machine()).await.unwrap(), []);
        assert_eq!(remote.lease(&machine()).await.unwrap(), Some(lease()));
        assert_eq!(remote.processes(&machine()).await.unwrap(), [process()]);
        assert_eq!(remote.listen_sockets(&machine()).await.unwrap(), [socket()]);
        assert_eq!(remote.check_answer(&machine(), "http").await.unwrap(), "out of order");
        assert!(remote.volume(&volume(), 3).await.unwrap().needs_restart);
        assert!(matches!(remote.volume_encryption().await.unwrap(), VolumeEncryption::Lacking { .. }));
        assert_eq!(remote.snapshots(&volume()).await.unwrap(), [snapshot()]);
        assert_eq!(remote.snapshot(&volume(), &snapshot().id).await.unwrap(), snapshot());
        let (machine, volume, snapshot) = (machine(), volume(), snapshot().id);
        let expected = [
            format!("reserve {machine} 256 30000"),
            format!("machine {machine}"),
            format!("wait {machine} [Started] {:?} Some(4)", Some(fact().version)),
            format!("events {machine}"),
            format!("lease {machine}"),
            format!("processes {machine}"),
            format!("sockets {machine}"),
            format!("check {machine} http"),
            format!("volume {volume} 3"),
            format!("snapshots {volume}"),
            format!("snapshot {volume} {snapshot}"),
        ];
        assert_eq!(std::mem::take(&mut *host.asked.lock().unwrap()), expected);
    }
}

#[tokio::test]
async fn a_refusal_comes_back_as_it_is() {
    let host = Arc::new(Host::new());
    for remote in both(&host).await {
        let other = MachineId::from_random([9; 7]);
        let refusal = remote.command(command("user.1", other.clone())).await.unwrap_err();
        assert_eq!(refusal, Refusal::NoSuchMachine(other));
        let why = "500 GiB are too many".into();
        assert_eq!(remote.volume_room(500).await, Err(Refusal::InsufficientCapacity { host: id(), why }));
        let long = remote.check_answer(&machine(), "long").await.unwrap_err();
        assert!(matches!(&long, Refusal::Failed(why) if why.contains("more than 1048576")), "{long}");
    }
}

#[tokio::test]
async fn nothing_is_built_elsewhere() {
    let remote = over_pipe(&Arc::new(Host::new()));
    let request = BuilderRequest {
        org: "personal".parse().unwrap(),
        app: "web".parse().unwrap(),
        context: "/nowhere".into(),
        registry_socket: "/nowhere".into(),
        command: vec![],
        env: vec![],
        files: vec![],
        timeout_ms: 1,
    };
    let Err(refusal) = remote.run_builder(request).await else { panic!("it was taken") };
    assert!(refusal.to_string().contains("builds run on the host where control is"), "{refusal}");
}

#[tokio::test]
async fn a_host_that_nobody_can_dial_is_said_to_be_unreachable() {
    let dial: Dial = Arc::new(|| Box::pin(async { Err(io::Error::other("no route to it")) }));
    let remote = RemoteHost::new(id(), dial);
    let refusal = remote.machine(&machine()).await.unwrap_err();
    assert_eq!(refusal, Refusal::Unreachable { host: id(), why: "no route to it".into() });
    assert!(remote.logs(LogQuery::default()).await.is_err());
}
