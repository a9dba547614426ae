//! [`HostApi`](crate::HostApi) of a host elsewhere, over one byte stream a call.
//!
//! ```text
//! control                                    host
//! RemoteHost --dial--> {"v":1,"call":..} -->  serve(stream, host)
//!            <-------- {"ok":..} or {"refused":..}
//!            <-------> frames of input and output, where the call is a session
//! ```
//!
//! Who may dial whom is the transport's to decide, and it says who has: control, which may ask for anything, or a member, which
//! asks for somebody whose proof goes with the call (`right`). Everything that the other side can send is bounded, in bytes and in time. Tested over pipes and TCP (`tests/remote.rs`).

mod call;
mod client;
mod frame;
#[cfg(fuzzing)]
pub mod fuzzing;
mod right;
mod server;
mod session;

pub use client::RemoteHost;
pub use right::{Asker, Bearer, Judge, Right};
pub use server::serve;

use futures_util::future::BoxFuture;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};

/// A stream to another host.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// Opens a stream to the host, for one call.
pub type Dial = Arc<dyn Fn() -> BoxFuture<'static, io::Result<Box<dyn Duplex>>> + Send + Sync>;

/// Of calls and their first answers, as this code speaks them.
const VERSION: u32 = 1;
/// Of a call or an answer: a command line of an exec may be long, and so may a machine's list of processes.
const MAX_CALL_BYTES: usize = 1 << 20;
/// Of one frame of a session. A line of a log has up to 16 KiB, six times as much where every byte is escaped.
const MAX_SESSION_BYTES: usize = 128 * 1024;
/// Of input or output in one frame.
const CHUNK_BYTES: usize = 32 * 1024;

const CONNECT: Duration = Duration::from_secs(2);
/// For the first frame of a call, and for an answer to be taken.
const CALL_WRITTEN: Duration = Duration::from_secs(10);
/// While there is nothing else to say, each side says this often that it is there.
const ALIVE_EVERY: Duration = Duration::from_secs(3);
/// Who is not heard of for this long is gone.
const SILENT: Duration = Duration::from_secs(10);
