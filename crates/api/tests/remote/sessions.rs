//! Commands and logs over the network, which are to be like those in the process.

use super::host::{Host, machine};
use super::{both, dial_pipe, id, over_pipe};
use bytes::Bytes;
use dunlin_api::remote::{Asker, RemoteHost, serve};
use dunlin_api::{ExecControl, ExecOutput, ExecRequest, ExecSession, ExecStdin, HostApi, LogQuery, Refusal, WindowSize};
use std::sync::Arc;

fn exec(command: &str) -> ExecRequest {
    ExecRequest { stdin: ExecStdin::Open, ..ExecRequest::new(machine(), vec![command.into()], 10_000) }
}

/// Everything up to its end: standard output, how often something came, and the end.
async fn rest(session: &mut ExecSession) -> (Vec<u8>, ExecOutput) {
    let mut all = Vec::new();
    loop {
        match session.output.recv().await.expect("an end") {
            ExecOutput::Stdout(bytes) => all.extend_from_slice(&bytes),
            ExecOutput::Stderr(_) => {}
            last => return (all, last),
        }
    }
}

#[tokio::test]
async fn what_is_typed_comes_back_whole_and_in_order() {
    let host = Arc::new(Host::new());
    for remote in both(&host).await {
        let mut session = remote.exec(exec("echo")).await.unwrap();
        let sent: Vec<u8> = (0..5_000_000u32).flat_map(|n| (n as u8 ^ (n >> 8) as u8).to_le_bytes()).collect();
        let stdin = session.stdin.take().unwrap();
        let typed = Bytes::from(sent.clone());
        tokio::spawn(async move {
            for at in (0..typed.len()).step_by(100_000) {
                stdin.send(typed.slice(at..at + 100_000)).await.unwrap();
            }
        });
        let (all, last) = rest(&mut session).await;
        assert_eq!(last, ExecOutput::Exited(7));
        assert!(all == sent, "{} bytes of {}", all.len(), sent.len());
        assert!(session.output.recv().await.is_none());
    }
}

#[tokio::test]
async fn input_that_is_there_from_the_start_arrives() {
    let host = Arc::new(Host::new());
    for remote in both(&host).await {
        let whole = Bytes::from(vec![5; 3_000_000]);
        let request = ExecRequest {
            stdin: ExecStdin::Whole(whole.clone()),
            tty: Some(WindowSize { rows: 24, columns: 80 }),
            env: vec![("A".into(), "b".into())],
            user: "web".into(),
            ..exec("echo")
        };
        let mut session = remote.exec(request).await.unwrap();
        assert!(session.stdin.is_none());
        let (all, last) = rest(&mut session).await;
        assert_eq!((all == whole, last), (true, ExecOutput::Exited(7)));
        let asked = host.asked.lock().unwrap().pop().unwrap();
        assert_eq!(asked, r#"exec ["echo"] [("A", "b")] Some(WindowSize { rows: 24, columns: 80 }) web"#);
    }
}

#[tokio::test]
async fn a_command_that_does_not_read_hears_signals_all_the_same() {
    let host = Arc::new(Host::new());
    for remote in both(&host).await {
        let mut session = remote.exec(exec("deaf")).await.unwrap();
        let stdin = session.stdin.take().unwrap();
        // Until nothing more is taken: all queues on the way are full.
        let full = tokio::spawn(async move { while stdin.send(vec![0; 50_000].into()).await.is_ok() {} });
        for n in 0..100u16 {
            let control = ExecControl::Resize(WindowSize { rows: n, columns: 1 });
            session.control.send(control.clone()).await.unwrap();
            assert_eq!(session.output.recv().await, Some(ExecOutput::Stderr(format!("{control:?}").into())));
        }
        session.control.send(ExecControl::Signal("SIGTERM".into())).await.unwrap();
        assert_eq!(session.output.recv().await, Some(ExecOutput::Stderr(r#"Signal("SIGTERM")"#.into())));
        drop(session.output);
        full.await.unwrap();
    }
}

#[tokio::test]
async fn a_caller_that_goes_ends_the_command() {
    let host = Arc::new(Host::new());
    let mut sessions = 0;
    for remote in both(&host).await {
        for command in ["wait", "endless", "deaf"] {
            let mut session = remote.exec(exec(command)).await.unwrap();
            if command == "endless" {
                session.output.recv().await.unwrap();
            }
            // Input and control are still held: it is the output that counts.
            drop(session.output);
            sessions += 1;
            host.has_ended(sessions).await;
        }
    }
}

/// A stream that can be cut off between both sides.
async fn cut(there: tokio::io::DuplexStream, host: Arc<dyn HostApi>, mut cut: tokio::sync::watch::Receiver<bool>) {
    tokio::select! {
        () = serve(there, host, Asker::Control) => {}
        _ = cut.wait_for(|cut| *cut) => {}
    }
}

#[tokio::test]
async fn a_host_that_is_lost_ends_a_session_with_a_reason() {
    let host = Arc::new(Host::new());
    let (scissors, watched) = tokio::sync::watch::channel(false);
    let served = Arc::clone(&host);
    let remote = RemoteHost::new(id(), dial_pipe(move |there| cut(there, served.clone(), watched.clone())));
    let mut session = remote.exec(exec("wait")).await.unwrap();
    let mut logs = remote.logs(LogQuery { follow: true, ..LogQuery::default() }).await.unwrap();
    for _ in 0..3 {
        logs.lines.recv().await.unwrap();
    }
    scissors.send_replace(true);
    let (_, last) = rest(&mut session).await;
    let ExecOutput::Failed(why) = last else { panic!("{last:?}") };
    assert!(why.starts_with("host h2 was lost while the command ran"), "{why}");
    assert_eq!(logs.lines.recv().await, None);
    assert!(matches!(logs.broken.get(), Some(Refusal::Unreachable { .. })));
    host.has_ended(2).await;
}

#[tokio::test(start_paused = true)]
async fn a_host_that_falls_silent_is_lost_and_one_that_only_has_nothing_to_say_is_not() {
    let host = Arc::new(Host::new());
    let remote = over_pipe(&host);
    let mut session = remote.exec(exec("wait")).await.unwrap();
    let hour = tokio::time::Duration::from_secs(3600);
    assert!(tokio::time::timeout(hour, session.output.recv()).await.is_err(), "it still runs");
    drop(session.stdin.take());
    assert_eq!(session.output.recv().await, Some(ExecOutput::Exited(7)));

    // It takes the call, answers, and is never heard of again; its side of the pipe stays open.
    let silent = RemoteHost::new(id(), dial_pipe(|mut there| async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let answer = br#"{"ok":null}"#;
        there.write_u32_le(answer.len() as u32 + 1).await.unwrap();
        there.write_u8(0).await.unwrap();
        there.write_all(answer).await.unwrap();
        let mut sink = Vec::new();
        let _ = there.read_to_end(&mut sink).await;
    }));
    let mut session = silent.exec(exec("wait")).await.unwrap();
    let (_, last) = rest(&mut session).await;
    assert!(matches!(&last, ExecOutput::Failed(why) if why.contains("nothing was heard of it for 10 s")), "{last:?}");
}

#[tokio::test]
async fn lines_come_in_order_and_end() {
    let host = Arc::new(Host::new());
    for remote in both(&host).await {
        let mut logs = remote.logs(LogQuery { tail: Some(2_000), ..LogQuery::default() }).await.unwrap();
        for n in 0..2_000 {
            let line = logs.lines.recv().await.unwrap();
            assert_eq!(line.at_ms, n);
            assert_eq!(line.line.len(), if n == 1 { 16 * 1024 } else { format!("line {n}").len() });
        }
        assert!(logs.lines.recv().await.is_none());
        assert_eq!(logs.broken.get(), None);
    }
}

#[tokio::test]
async fn a_follower_that_goes_ends_the_stream() {
    let host = Arc::new(Host::new());
    for (n, remote) in both(&host).await.into_iter().enumerate() {
        let mut logs = remote.logs(LogQuery { follow: true, ..LogQuery::default() }).await.unwrap();
        logs.lines.recv().await.unwrap();
        drop(logs);
        host.has_ended(n + 1).await;
    }
}
