//! The other side sends too much, nonsense, half of it, or nothing at all.

use super::host::{Host, machine};
use super::{command, dial_pipe, id};
use dunlin_api::remote::{Asker, RemoteHost, serve};
use dunlin_api::{ExecOutput, ExecRequest, ExecStdin, HostApi, LogQuery, Refusal, WaitFor};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

fn frame(kind: u8, content: &[u8]) -> Vec<u8> {
    let mut frame = (content.len() as u32 + 1).to_le_bytes().to_vec();
    frame.push(kind);
    frame.extend_from_slice(content);
    frame
}

async fn read_frame(from: &mut DuplexStream) -> Option<(u8, Vec<u8>)> {
    let length = from.read_u32_le().await.ok()? as usize;
    let kind = from.read_u8().await.ok()?;
    let mut content = vec![0; length - 1];
    from.read_exact(&mut content).await.ok()?;
    Some((kind, content))
}

/// What a host answers to these bytes, and whether it then hangs up.
async fn answered(bytes: &[u8]) -> String {
    let host: Arc<dyn HostApi> = Arc::new(Host::new());
    let (mut here, there) = tokio::io::duplex(1 << 16);
    let served = tokio::spawn(serve(there, host, Asker::Control));
    here.write_all(bytes).await.unwrap();
    let answer = loop {
        match read_frame(&mut here).await {
            Some((5, _)) => {}
            Some((0, json)) => break String::from_utf8(json).unwrap(),
            other => panic!("{other:?}"),
        }
    };
    drop(here);
    served.await.unwrap();
    answer
}

#[tokio::test]
async fn a_bad_call_is_refused_with_a_reason() {
    let check = async |bytes: Vec<u8>, expected: &str| {
        let answer = answered(&bytes).await;
        assert!(answer.contains(r#"{"refused":{"refusal":{"Invalid":"#) && answer.contains(expected), "{answer}");
    };
    check(u32::MAX.to_le_bytes().to_vec(), "a frame of 4294967295 bytes; they have 1 to 1048576").await;
    check(vec![0; 4], "a frame of 0 bytes").await;
    check(frame(9, b"{}"), "a frame of kind 9").await;
    check(frame(1, b"input"), "a stream begins with a call").await;
    check(frame(0, b"\xff\xfe nonsense"), "cannot be read").await;
    check(frame(0, b"[]"), "cannot be read").await;
    check(frame(0, br#"{"v":2,"call":"machine","args":"x"}"#), "takes calls of version 1, not 2").await;
    check(frame(0, br#"{"v":1,"call":"explode","args":{}}"#), "unknown variant `explode`").await;
    check(frame(0, br#"{"v":1,"call":"machine","args":{"x":1}}"#), "does not understand the call").await;
    check(frame(0, &[b"[".repeat(100_000), b"]".repeat(100_000)].concat()), "cannot be read").await;
}

#[tokio::test]
async fn a_call_that_is_cut_off_is_no_call() {
    let host = Arc::new(Host::new());
    let whole = frame(0, format!(r#"{{"v":1,"call":"machine","args":"{}"}}"#, machine()).as_bytes());
    for cut in 0..whole.len() {
        let (mut here, there) = tokio::io::duplex(1 << 16);
        let served = tokio::spawn(serve(there, host.clone() as Arc<dyn HostApi>, Asker::Control));
        here.write_all(&whole[..cut]).await.unwrap();
        drop(here);
        served.await.unwrap();
    }
    assert!(host.asked.lock().unwrap().is_empty(), "nothing was done");
}

#[tokio::test(start_paused = true)]
async fn a_call_that_never_ends_is_not_waited_for() {
    let answer = answered(&frame(0, br#"{"v":1}"#)[..6]).await;
    assert!(answer.contains("there was no call within 10 s"), "{answer}");
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_takes_no_answer_holds_nothing() {
    let host: Arc<dyn HostApi> = Arc::new(Host::new());
    let (mut here, there) = tokio::io::duplex(64);
    let served = tokio::spawn(serve(there, host, Asker::Control));
    let call = frame(0, format!(r#"{{"v":1,"call":"machine","args":"{}"}}"#, machine()).as_bytes());
    here.write_all(&call).await.unwrap();
    served.await.unwrap();
    drop(here);
}

#[tokio::test]
async fn a_caller_that_goes_ends_its_wait() {
    let host = Arc::new(Host::new());
    let (mut here, there) = tokio::io::duplex(1 << 16);
    let served = tokio::spawn(serve(there, host.clone() as Arc<dyn HostApi>, Asker::Control));
    let wait = format!(
        r#"{{"v":1,"call":"wait","args":{{"machine":"{}","wait":{{"states":[],"version":null,"after_event":null,"timeout_ms":60000}}}}}}"#,
        machine()
    );
    here.write_all(&frame(0, wait.as_bytes())).await.unwrap();
    while host.asked.lock().unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
    drop(here);
    served.await.unwrap();
}

/// A session's caller breaks the rules: the command is ended.
#[tokio::test]
async fn a_caller_that_sends_more_than_it_may_is_left() {
    let too_much = frame(1, &[0; 100]).repeat(100);
    let never_sent = frame(4, b"");
    let after_the_end = [frame(0, br#""stdin_end""#), frame(1, b"more")].concat();
    let too_long = (1u32 << 20).to_le_bytes().to_vec();
    for bad in [too_much, never_sent, after_the_end, too_long, frame(2, b"output"), frame(0, br#"{"exited":0}"#)] {
        let host = Arc::new(Host::new());
        let (mut here, there) = tokio::io::duplex(1 << 16);
        let served = tokio::spawn(serve(there, host.clone() as Arc<dyn HostApi>, Asker::Control));
        let open = format!(
            r#"{{"v":1,"call":"exec","args":{{"machine":"{}","program":{{"command":["deaf"]}},"env":[],"user":"","container":"","tty":null,"timeout_ms":10000,"idle_ms":10000}}}}"#,
            machine()
        );
        here.write_all(&frame(0, open.as_bytes())).await.unwrap();
        assert_eq!(read_frame(&mut here).await.unwrap().1, br#"{"ok":null}"#);
        here.write_all(&bad).await.unwrap();
        served.await.unwrap();
        host.has_ended(1).await;
    }
}

/// A host that reads a call and then sends this.
fn lying(bytes: Vec<u8>) -> RemoteHost {
    RemoteHost::new(id(), dial_pipe(move |mut there| {
        let bytes = bytes.clone();
        async move {
            read_frame(&mut there).await;
            let _ = there.write_all(&bytes).await;
        }
    }))
}

#[tokio::test]
async fn an_answer_that_cannot_be_read_is_none() {
    let bad = [
        vec![],
        b"HTTP/1.1 400 Bad Request\r\n".to_vec(),
        u32::MAX.to_le_bytes().to_vec(),
        frame(2, b"output"),
        frame(0, b"nonsense"),
        frame(0, br#"{"ok":{"id":1}}"#),
        frame(0, br#"{"ok":null}"#)[..9].to_vec(),
    ];
    for bytes in bad {
        let refusal = lying(bytes).machine(&machine()).await.unwrap_err();
        assert!(matches!(refusal, Refusal::Unreachable { .. }), "{refusal}");
    }
    // A refusal of a later release is told by its text.
    let newer = frame(0, br#"{"refused":{"refusal":{"Tired":{"since":3}},"said":"the host is tired"}}"#);
    assert_eq!(lying(newer).machine(&machine()).await, Err(Refusal::Failed("the host is tired".into())));
}

#[tokio::test]
async fn a_session_that_turns_into_nonsense_ends_with_a_reason() {
    let ok = frame(0, br#"{"ok":null}"#);
    let bad = [frame(2, &[0; 10]).repeat(1000), frame(1, b"input"), frame(4, b""), b"garbage garbage".to_vec(), frame(0, br#""lines_end""#)];
    for bad in bad {
        let remote = lying([ok.clone(), bad].concat());
        let request = ExecRequest { stdin: ExecStdin::Open, ..ExecRequest::new(machine(), vec!["x".into()], 10_000) };
        let mut session = remote.exec(request).await.unwrap();
        let mut last = None;
        while let Some(output) = session.output.recv().await {
            last = Some(output);
        }
        assert!(matches!(&last, Some(ExecOutput::Failed(_))), "{last:?}");
    }
    for bad in [frame(2, b"output"), frame(0, b"{}"), frame(0, br#"{"exited":0}"#)] {
        let mut logs = lying([ok.clone(), bad].concat()).logs(LogQuery::default()).await.unwrap();
        assert_eq!(logs.lines.recv().await, None);
        assert!(logs.broken.get().is_some());
    }
}

#[tokio::test(start_paused = true)]
async fn a_host_that_never_answers_is_unreachable_in_time() {
    // It says that it is there, and nothing else.
    let remote = RemoteHost::new(id(), dial_pipe(|mut there| async move {
        while there.write_all(&frame(5, b"")).await.is_ok() {
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        }
    }));
    let refusal = remote.machine(&machine()).await.unwrap_err();
    assert_eq!(refusal, Refusal::Unreachable { host: id(), why: "no answer within 5 s".into() });
    let wait = WaitFor { states: vec![], version: None, after_event: None, timeout_ms: u64::MAX };
    let refusal = remote.wait(&machine(), wait).await.unwrap_err();
    assert_eq!(refusal, Refusal::Unreachable { host: id(), why: "no answer within 65 s".into() });
    let never: RemoteHost = RemoteHost::new(id(), Arc::new(|| Box::pin(std::future::pending())));
    let refusal = never.machine(&machine()).await.unwrap_err();
    assert_eq!(refusal, Refusal::Unreachable { host: id(), why: "no connection within 2 s".into() });
}

#[tokio::test]
async fn a_command_whose_answer_is_lost_is_sent_once_more_by_its_id() {
    let host = Arc::new(Host::new());
    let dialled = Arc::new(AtomicUsize::new(0));
    let (served, counted) = (host.clone(), dialled.clone());
    let remote = RemoteHost::new(id(), dial_pipe(move |there| {
        let (host, n) = (served.clone() as Arc<dyn HostApi>, counted.fetch_add(1, Ordering::SeqCst));
        async move {
            if n > 0 {
                return serve(there, host, Asker::Control).await;
            }
            // It is done, and the answer is lost.
            let (mut inner, outer) = tokio::io::duplex(1 << 16);
            let mut there = there;
            let (kind, call) = read_frame(&mut there).await.unwrap();
            tokio::spawn(serve(outer, host, Asker::Control));
            inner.write_all(&frame(kind, &call)).await.unwrap();
            read_frame(&mut inner).await;
        }
    }));
    remote.command(command("user.once", machine())).await.unwrap();
    let ids: Vec<_> = host.commands.lock().unwrap().iter().map(|command| command.id.to_string()).collect();
    assert_eq!(ids, ["user.once", "user.once"]);

    // What is run is not run twice.
    let dials = Arc::new(Mutex::new(0));
    let counted = dials.clone();
    let remote = RemoteHost::new(id(), dial_pipe(move |mut there| {
        *counted.lock().unwrap() += 1;
        async move { drop(read_frame(&mut there).await) }
    }));
    assert!(remote.exec(ExecRequest::new(machine(), vec!["x".into()], 10_000)).await.is_err());
    assert_eq!(*dials.lock().unwrap(), 1);
    assert!(remote.command(command("user.twice", machine())).await.is_err());
    assert_eq!(*dials.lock().unwrap(), 3, "and not more often than twice");
}
