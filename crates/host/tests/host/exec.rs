//! Commands beside a machine's program.

use crate::setup::World;
use bytes::Bytes;
use dunlin_api::{ExecControl, ExecOutput, ExecRequest, ExecSession, ExecStdin, HostApi, Refusal, WindowSize};
use dunlin_model::MachineId;

fn exec(world: &World, id: &MachineId, script: &str, timeout_ms: u64) -> Result<ExecSession, Refusal> {
    let command = ["sh", "-c", script].map(str::to_owned).to_vec();
    world.block_on(world.host().exec(ExecRequest::new(id.clone(), command, timeout_ms)))
}

/// What a script prints.
fn said(world: &World, id: &MachineId, script: &str) -> String {
    let mut session = exec(world, id, script, 60_000).unwrap();
    let mut text = String::new();
    while let Some(output) = world.block_on(session.output.recv()) {
        if let ExecOutput::Stdout(bytes) = output {
            text += &String::from_utf8_lossy(&bytes);
        }
    }
    text
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

pub fn a_reader_that_stalls_keeps_no_thread() {
    let mut world = World::new();
    let id = world.started(1, "sleep 1000", |_| {});
    let mut session = exec(&world, &id, "echo out; echo err >&2; exit 3", 10_000).unwrap();
    let mut all = Vec::new();
    while let Some(output) = world.block_on(session.output.recv()) {
        all.push(output);
    }
    assert_eq!(all.last(), Some(&ExecOutput::Exited(3)));
    assert_eq!(all.len(), 3);
    let before = threads();
    let stalled: Vec<ExecSession> = (0..16).map(|_| exec(&world, &id, "busybox yes", 500).unwrap()).collect();
    assert!(threads() < before + 8, "{before} threads became {}", threads());
    world.until("their commands have ended", || (!said(&world, &id, "busybox ps").contains("yes")).then_some(()));
    drop(stalled);
    let refused = exec(&world, &id, "true", 500).map(drop);
    assert_eq!(refused, Ok(()), "the machine is not full of commands");
}

/// An app may have many machines.
pub fn an_app_takes_no_more_than_half_of_the_sessions() {
    let mut world = World::new();
    let of_web: Vec<MachineId> = (1..=3).map(|n| world.started(n, "sleep 1000", |_| {})).collect();
    let other = world.started(4, "sleep 1000", |spec| spec["app"] = "other".into());
    let long = |id: &MachineId| exec(&world, id, "sleep 1000", 600_000);
    // A supervisor has 32 of them, and each app half of 128.
    let mut held: Vec<ExecSession> = of_web[..2].iter().flat_map(|id| (0..32).map(move |_| id)).map(|id| long(id).unwrap()).collect();
    match long(&of_web[2]).map(drop) {
        Err(Refusal::Busy(why)) => assert!(why.contains("64 commands run in the machines of app web"), "{why}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(said(&world, &other, "echo well"), "well\n");
    held.pop();
    world.until("there is room again", || long(&of_web[2]).ok());
}

pub fn a_refusal_says_why() {
    let mut world = World::new();
    let id = world.created(1, "sleep 1000", |_| {});
    let refused = exec(&world, &id, "true", 500).map(drop).unwrap_err().to_string();
    assert!(refused.contains("is not running"), "{refused}");
    let id = world.started(2, "sleep 1000", |_| {});
    let request = ExecRequest::new(id.clone(), vec!["no-such-program".into()], 500);
    let refused = world.block_on(world.host().exec(request)).map(drop).unwrap_err().to_string();
    assert!(refused.contains("not found in $PATH"), "{refused}");
}

/// What comes until `wanted` is in it.
fn read_until(world: &World, session: &mut ExecSession, wanted: &str) -> String {
    let mut text = String::new();
    while !text.contains(wanted) {
        let output = world.block_on(async { tokio::time::timeout(crate::setup::PATIENCE, session.output.recv()).await });
        match output.expect("output within the time") {
            Some(ExecOutput::Stdout(bytes) | ExecOutput::Stderr(bytes)) => text += &String::from_utf8_lossy(&bytes),
            other => panic!("{other:?} instead of {wanted:?}, after {text:?}"),
        }
    }
    text
}

fn open(world: &World, id: &MachineId, script: &str, tty: Option<WindowSize>) -> ExecSession {
    let command = ["sh", "-c", script].map(str::to_owned).to_vec();
    let request = ExecRequest { tty, stdin: ExecStdin::Open, ..ExecRequest::new(id.clone(), command, 600_000) };
    world.block_on(world.host().exec(request)).unwrap()
}

fn type_in(world: &World, session: &ExecSession, text: &'static str) {
    world.block_on(session.stdin.as_ref().unwrap().send(Bytes::from_static(text.as_bytes()))).unwrap();
}

pub fn a_terminal_is_typed_at_resized_and_hung_up() {
    let mut world = World::new();
    let id = world.started(1, "sleep 1000", |_| {});
    let mut session = open(&world, &id, "exec sh -i", Some(WindowSize { rows: 30, columns: 90 }));
    type_in(&world, &session, "busybox stty size; busybox tty\n");
    let answer = read_until(&world, &mut session, "/dev/pts/");
    assert!(answer.contains("30 90"), "{answer}");
    world.block_on(session.control.send(ExecControl::Resize(WindowSize { rows: 41, columns: 101 }))).unwrap();
    world.until("it has its new size", || {
        type_in(&world, &session, "busybox stty size; echo next\n");
        read_until(&world, &mut session, "\nnext").contains("41 101").then_some(())
    });
    drop(session);
    let trap = "trap 'echo hung > /tmp/up; exit' HUP; echo trapped; while :; do sleep 0.05; done";
    let mut session = open(&world, &id, trap, Some(WindowSize { rows: 30, columns: 90 }));
    read_until(&world, &mut session, "trapped");
    drop(session);
    world.until("the command has heard it", || said(&world, &id, "cat /tmp/up").contains("hung").then_some(()));
    world.until("both are gone", || {
        let left = said(&world, &id, "busybox ps");
        (!left.contains("sh -i") && !left.contains("echo trapped")).then_some(())
    });
    // The end of the input is the key for it, also where the last line has no end.
    for typed in ["line\n", "half a line"] {
        let mut session = open(&world, &id, "cat; echo over", Some(WindowSize { rows: 30, columns: 90 }));
        type_in(&world, &session, typed);
        session.stdin = None;
        read_until(&world, &mut session, "over");
        let mut last = None;
        while let Some(output) = world.block_on(session.output.recv()) {
            last = Some(output);
        }
        assert_eq!(last, Some(ExecOutput::Exited(0)));
    }
}

pub fn input_flows_as_fast_as_it_is_read() {
    let mut world = World::new();
    let id = world.started(1, "sleep 1000", |_| {});
    let mut session = open(&world, &id, "cat", None);
    let stdin = session.stdin.take().unwrap();
    const CHUNK: usize = 32 * 1024;
    const CHUNKS: usize = 512;
    let (sent, received) = world.block_on(async {
        let send = async {
            for _ in 0..CHUNKS {
                stdin.send(Bytes::from_static(&[7; CHUNK])).await.unwrap();
            }
            drop(stdin);
            CHUNKS * CHUNK
        };
        let receive = async {
            let mut received = 0;
            loop {
                match session.output.recv().await {
                    Some(ExecOutput::Stdout(bytes)) => received += bytes.len(),
                    Some(ExecOutput::Exited(0)) => return received,
                    other => panic!("{other:?}"),
                }
            }
        };
        tokio::join!(send, receive)
    });
    assert_eq!(sent, received);
    // One that reads nothing holds its writer, and a signal passes by.
    let session = open(&world, &id, "sleep 777", None);
    let stdin = session.stdin.as_ref().unwrap();
    let chunk = || Bytes::from_static(&[7; CHUNK]);
    world.until("the queue is full", || stdin.try_send(chunk()).is_err().then_some(()));
    world.block_on(session.control.send(ExecControl::Signal("SIGTERM".into()))).unwrap();
    let mut session = session;
    assert_eq!(world.block_on(session.output.recv()), Some(ExecOutput::Exited(128 + 15)));
}

pub fn a_session_without_a_byte_ends() {
    let mut world = World::new();
    let id = world.started(1, "sleep 1000", |_| {});
    let command = ["sleep", "888"].map(str::to_owned).to_vec();
    let request = ExecRequest { idle_ms: 200, stdin: ExecStdin::Open, ..ExecRequest::new(id, command, 600_000) };
    let mut session = world.block_on(world.host().exec(request)).unwrap();
    match world.block_on(session.output.recv()) {
        Some(ExecOutput::Failed(why)) => assert!(why.contains("without a byte"), "{why}"),
        other => panic!("{other:?}"),
    }
}
