//! A command's streams over a WebSocket, `GET /v1/apps/{app}/machines/{id}/exec/stream`.
//!
//! Text messages are JSON: [`ExecAsk`] from the client, whose first is `start`, and [`ExecSay`] from the
//! server, whose last is `exit` or `failed`. Binary messages are a channel's number and its bytes. Either
//! side's going away ends the command.
//!
//! A command that does not read its input must still hear signals, which come behind it. So a client may ask to be told how
//! much was taken (`tell_taken`), and then has no more under way than the window that `started` names.

use crate::error::{ApiError, ErrorBody};
use crate::host::WindowSize;
use bytes::{BufMut, Bytes, BytesMut};
use dunlin_model::transfer::Transfer;
use futures_util::{SinkExt, StreamExt, stream};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use std::io;
use tokio::sync::watch;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{Message, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Utf8Bytes};

pub const STDIN: u8 = 0;
pub const STDOUT: u8 = 1;
pub const STDERR: u8 = 2;
/// Bytes of one binary message, its channel not counted.
pub const CHUNK_BYTES: usize = 32 * 1024;
/// Of any message: a command may be long.
pub const MAX_MESSAGE_BYTES: usize = 128 * 1024;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "type")]
pub enum ExecAsk {
    Start(ExecStart),
    Resize(WindowSize),
    /// A name such as `SIGTERM`, to the command's process group.
    Signal { signal: String },
    /// The input is over.
    StdinEnd,
    /// Say how much of the input was taken, from now on.
    TellTaken,
}

/// What to run: a command, or a transfer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecStart {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transfer: Option<Transfer>,
    /// Added to the machine's environment.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<(String, String)>,
    /// Of the image; empty: the machine's own.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub user: String,
    /// Of a machine with several; empty: `app`, or else the first.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub container: String,
    /// On a terminal of this size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tty: Option<WindowSize>,
    /// Seconds; a day where it is not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "type")]
pub enum ExecSay {
    /// So many bytes of input the server takes in while the command reads nothing. Zero: it does not say what was taken.
    Started {
        #[serde(default)]
        stdin_window: u64,
    },
    /// So many bytes of input, from the beginning, were handed on.
    Taken { bytes: u64 },
    /// Exit code, or 128 + signal.
    Exit { exit_code: i32 },
    Failed(ErrorBody),
}

/// A binary message.
pub fn channel(number: u8, bytes: &[u8]) -> Bytes {
    let mut message = BytesMut::with_capacity(1 + bytes.len());
    message.put_u8(number);
    message.put_slice(bytes);
    message.freeze()
}

/// What the server sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecEvent {
    Stdout(Bytes),
    Stderr(Bytes),
    Say(ExecSay),
}

type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// What the server has said of the input.
#[derive(Debug, Clone, Copy, Default)]
struct Flow {
    window: u64,
    taken: u64,
}

/// The client's sending half.
pub struct ExecInput {
    to: stream::SplitSink<Socket, Message>,
    sent: u64,
    flow: watch::Receiver<Flow>,
}

/// The client's receiving half.
pub struct ExecEvents {
    from: stream::SplitStream<Socket>,
    flow: watch::Sender<Flow>,
}

pub(crate) async fn open(upgraded: Upgraded) -> (ExecInput, ExecEvents) {
    let config = WebSocketConfig::default()
        .max_message_size(Some(MAX_MESSAGE_BYTES))
        .max_frame_size(Some(MAX_MESSAGE_BYTES));
    let socket = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Client, Some(config)).await;
    let (to, from) = socket.split();
    let (said, flow) = watch::channel(Flow::default());
    (ExecInput { to, sent: 0, flow }, ExecEvents { from, flow: said })
}

fn broken(error: Error) -> ApiError {
    match error {
        Error::Io(e) => ApiError::Broken(e),
        other => ApiError::Broken(io::Error::other(other)),
    }
}

impl ExecInput {
    /// After `started`: from here on [`room`](Self::room) waits for a command that does not read, where the server says what
    /// was taken.
    pub async fn keep_to_window(&mut self) -> Result<(), ApiError> {
        if self.flow.borrow().window > 0 { self.ask(&ExecAsk::TellTaken).await } else { Ok(()) }
    }

    /// Returns when a chunk of input may be sent without being in the way of signals that come behind it.
    pub async fn room(&self) {
        let sent = self.sent;
        let has_room = |flow: &Flow| flow.window == 0 || sent.saturating_sub(flow.taken) < flow.window;
        let _ = self.flow.clone().wait_for(has_room).await; // nobody hears the server any more: then sending says so
    }

    pub async fn stdin(&mut self, bytes: &[u8]) -> Result<(), ApiError> {
        for chunk in bytes.chunks(CHUNK_BYTES) {
            self.to.send(Message::Binary(channel(STDIN, chunk))).await.map_err(broken)?;
            self.sent += chunk.len() as u64;
        }
        Ok(())
    }

    pub async fn ask(&mut self, ask: &ExecAsk) -> Result<(), ApiError> {
        let text = serde_json::to_string(ask).map_err(|e| ApiError::BadAnswer(e.to_string()))?;
        self.to.send(Message::Text(Utf8Bytes::from(text))).await.map_err(broken)
    }

    /// Says that somebody is here, while the other half may wait for its reader.
    pub async fn ping(&mut self) -> Result<(), ApiError> {
        self.to.send(Message::Ping(Bytes::new())).await.map_err(broken)
    }
}

impl ExecEvents {
    /// `None` when the server has gone.
    pub async fn next(&mut self) -> Result<Option<ExecEvent>, ApiError> {
        loop {
            match self.from.next().await.transpose().map_err(broken)? {
                None | Some(Message::Close(_)) => return Ok(None),
                Some(Message::Text(text)) => {
                    match serde_json::from_str(&text).map_err(|e| ApiError::BadAnswer(e.to_string()))? {
                        ExecSay::Taken { bytes } => self.flow.send_modify(|flow| flow.taken = bytes),
                        say => {
                            if let ExecSay::Started { stdin_window } = say {
                                self.flow.send_modify(|flow| flow.window = stdin_window);
                            }
                            return Ok(Some(ExecEvent::Say(say)));
                        }
                    }
                }
                Some(Message::Binary(bytes)) => match bytes.first() {
                    Some(&STDOUT) => return Ok(Some(ExecEvent::Stdout(bytes.slice(1..)))),
                    Some(&STDERR) => return Ok(Some(ExecEvent::Stderr(bytes.slice(1..)))),
                    _ => return Err(ApiError::BadAnswer("a message of no channel".into())),
                },
                Some(_) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Clients and servers of releases before know nothing of windows.
    #[test]
    fn what_is_new_is_none_of_the_others_concern() {
        #[derive(Debug, PartialEq, Deserialize)]
        #[serde(rename_all = "snake_case", tag = "type")]
        enum Before {
            Started,
        }
        let started = serde_json::to_string(&ExecSay::Started { stdin_window: 7 }).unwrap();
        assert_eq!(serde_json::from_str::<Before>(&started).unwrap(), Before::Started);
        let started: ExecSay = serde_json::from_str("{\"type\":\"started\"}").unwrap();
        assert_eq!(started, ExecSay::Started { stdin_window: 0 });
    }
}
