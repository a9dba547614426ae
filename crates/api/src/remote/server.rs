//! The host's side: one call of one stream.

use super::call::{Answer, Call, fits};
use super::client::now_ms;
use super::right::Asker;
use super::{CALL_WRITTEN, Duplex, MAX_CALL_BYTES, VERSION, frame, right, session};
use crate::host::{ExecSession, HostApi, LogStream, Refusal};
use frame::Frame;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::future::pending;
use std::sync::Arc;
use tokio::io::{AsyncRead, ReadHalf};
use tokio::sync::mpsc;
use tokio::time::timeout;

/// Frames that wait to be written.
const QUEUE: usize = 8;

/// Answers the call that comes over `stream`, and carries its session to the end. The caller's going away ends it.
pub async fn serve(stream: impl Duplex, host: Arc<dyn HostApi>, asker: Asker) {
    let (reader, mut writer) = tokio::io::split(stream);
    let (to_writer, frames) = mpsc::channel(QUEUE);
    let writes = async {
        if frame::write_all(&mut writer, frames).await.is_ok() {
            pending::<()>().await; // the caller reads it, and closes; what nobody takes is the caller's affair
        }
    };
    tokio::select! {
        () = writes => {}
        () = call(reader, to_writer, host, asker) => {}
    }
}

async fn call<S: Duplex>(mut reader: ReadHalf<S>, to_writer: mpsc::Sender<Frame>, host: Arc<dyn HostApi>, asker: Asker) {
    let asked = match timeout(CALL_WRITTEN, frame::read(&mut reader, MAX_CALL_BYTES)).await {
        Ok(Ok(Frame::Json(json))) => read_call(&json),
        Ok(Ok(_)) => Err(Refusal::Invalid("a stream begins with a call".into())),
        Ok(Err(error)) => Err(Refusal::Invalid(format!("the call cannot be read: {error}"))),
        Err(_) => Err(Refusal::Invalid(format!("there was no call within {} s", CALL_WRITTEN.as_secs()))),
    };
    let asked = asked.and_then(|call| right::granted(call, &asker, host.host_id(), now_ms()));
    let done = match asked {
        Err(refusal) => Err(refusal),
        Ok(call) => tokio::select! {
            done = perform(&*host, call) => done,
            () = gone(&mut reader) => return,
        },
    };
    let (answer, then) = match done {
        Ok(Done::Value(value)) => (Ok(value), Then::End),
        Ok(Done::Exec(session)) => (Ok(Value::Null), Then::Exec(session)),
        Ok(Done::Logs(stream)) => (Ok(Value::Null), Then::Logs(stream)),
        Err(refusal) => (Err(refusal), Then::End),
    };
    if to_writer.send(written_down(answer)).await.is_err() {
        return;
    }
    match then {
        Then::End => {
            drop(to_writer);
            // Closed with something unread, TCP would take back what is not read at the other side yet.
            let _ = timeout(CALL_WRITTEN, tokio::io::copy(&mut reader, &mut tokio::io::sink())).await;
        }
        Then::Exec(session) => session::serve_exec(reader, to_writer, session).await,
        Then::Logs(stream) => session::serve_logs(reader, to_writer, stream).await,
    }
}

enum Done {
    Value(Value),
    Exec(ExecSession),
    Logs(LogStream),
}

enum Then {
    End,
    Exec(ExecSession),
    Logs(LogStream),
}

fn read_call(json: &[u8]) -> Result<Call, Refusal> {
    #[derive(Deserialize)]
    struct Version {
        v: u32,
    }
    let Version { v } = frame::parse(json).map_err(|e| Refusal::Invalid(e.to_string()))?;
    if v != VERSION {
        return Err(Refusal::Invalid(format!("this host takes calls of version {VERSION}, not {v}: bring both to the same release")));
    }
    // What it cannot be is said by the reader, with the name of a call that it does not know.
    serde_json::from_slice(json).map_err(|e| Refusal::Invalid(format!("this host does not understand the call: {e}")))
}

/// Returns when the caller has gone, or says what nobody asked it.
async fn gone(reader: &mut (impl AsyncRead + Unpin)) {
    while let Ok(Frame::Alive) = frame::read(reader, MAX_CALL_BYTES).await {}
}

fn written_down(answer: Result<Value, Refusal>) -> Frame {
    let json = serde_json::to_vec(&Answer::of(answer)).unwrap_or_default();
    if !json.is_empty() && fits(&json) {
        return Frame::Json(json.into());
    }
    let too_long = Refusal::Failed(format!("the answer has {} bytes, more than {MAX_CALL_BYTES}", json.len()));
    Frame::json(&Answer::of(Err(too_long))).unwrap_or(Frame::Alive)
}

fn value(answer: impl Serialize) -> Result<Done, Refusal> {
    let value = serde_json::to_value(answer).map_err(|e| Refusal::Failed(format!("the answer cannot be written down: {e}")))?;
    Ok(Done::Value(value))
}

async fn perform(host: &dyn HostApi, call: Call) -> Result<Done, Refusal> {
    match call {
        Call::Reserve(reserve) => value(host.reserve(reserve).await?),
        Call::Command(command) => value(host.command(command).await?),
        Call::Machine(id) => value(host.machine(&id).await?),
        Call::Wait { machine, wait } => value(host.wait(&machine, wait).await?),
        Call::Events(id) => value(host.events(&id).await?),
        Call::Lease(id) => value(host.lease(&id).await?),
        Call::Exec(open) => Ok(Done::Exec(host.exec(open.request()).await?)),
        Call::Logs(query) => Ok(Done::Logs(host.logs(query).await?)),
        Call::Processes(id) => value(host.processes(&id).await?),
        Call::ListenSockets(id) => value(host.listen_sockets(&id).await?),
        Call::CheckAnswer { machine, check } => value(host.check_answer(&machine, &check).await?),
        Call::Volume { volume, size_gb } => value(host.volume(&volume, size_gb).await?),
        Call::VolumeRoom { size_gb } => value(host.volume_room(size_gb).await?),
        Call::VolumeEncryption => value(host.volume_encryption().await?),
        Call::Snapshots(id) => value(host.snapshots(&id).await?),
        Call::Snapshot { volume, snapshot } => value(host.snapshot(&volume, &snapshot).await?),
        Call::Proven { .. } => Err(Refusal::Invalid("a proof is of one call".into())),
    }
}

/// For what must not end a session.
pub(super) async fn and_no_end(work: impl Future<Output = ()>) {
    work.await;
    pending().await
}
