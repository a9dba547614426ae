//! The edge: it takes connections, ends TLS, finds the machine for each request, asks that machine's host
//! for admission, and forwards.
//!
//! ```text
//! accept -> TLS -> head -> Table::route -> LastHop::admit -> copy bodies -> counters -> access log
//! ```
//!
//! One current-thread runtime per core; a connection, the upstream connections that it uses and their pool
//! stay on that core, and only limits are shared. The read path is `serve.rs`, from top to bottom: `request`
//! makes the machine's head of the client's, `exchange` moves it and the bodies, `reply` is the head on its way
//! back, `http1` and `http2` are the client's two protocols. HTTP/1 is spoken by code of our own on both sides:
//! it rewrites a head in one pass and one buffer, and the edge itself answers what it refuses.
//!
//! Any host can be an edge. Where the machine is on another one, the request goes over mutual TLS to the last hop there
//! (`hop` has what the two say to each other), which admits and forwards it with the same code (`last_hop`).
//!
//! It lives from the view alone: it never opens the store, never asks control, and never forwards a byte that the
//! machine's host did not admit. IO enters through the listening sockets handed in, and leaves to machine addresses
//! and to the unix sockets of internal hosts. Tested over loopback with real upstream servers (`tests/`); what a
//! request costs is measured by `examples/edge.rs` under `cargo xtask bench proxy`.
#![forbid(unsafe_code)]

mod access;
mod answer;
mod buffer;
mod choose;
mod doors;
mod downstream;
mod exchange;
mod fields;
mod framing;
#[cfg(fuzzing)]
pub mod fuzzing;
mod hop;
mod http1;
mod http2;
mod io;
mod last_hop;
mod limits;
mod listen;
mod log;
mod metrics;
mod queue;
mod random;
mod reply;
mod request;
mod routes;
mod serve;
mod time;
mod tls;
mod upstream;
mod wake;

pub use hop::Fleet;
pub use limits::Limits;
pub use listen::{Drained, InternalHost, Proxy, ProxyConfig, StartError};
pub use log::{AccessLog, LogFormat};
pub use metrics::ProxyMetrics;
pub use routes::{Elsewhere, Routes, Rtt};
pub use tls::{CertError, CertSource, CertStore};
