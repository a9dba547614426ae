//! The edge over loopback: real sockets, real upstream servers, a last hop that lives in the test.

mod fleet;
mod forward;
mod http1;
mod http2;
mod limits;
mod retry;
mod setup;
mod tls;
