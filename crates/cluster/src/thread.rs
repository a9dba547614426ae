//! A thread of its own for what hosts tell each other.
//!
//! A datagram passes through some tasks, of QUIC and of gossip, each for some microseconds. On the runtime of all others each of
//! these steps may wake another thread, which costs more than the step, and waits behind whatever an app does. What others ask
//! of this host is done on the runtime of whoever started the cluster.

use std::io;
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// Ends when this is dropped.
pub(crate) struct Thread {
    handle: Handle,
    _ends: oneshot::Sender<()>,
}

impl Thread {
    pub fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (ends, ended) = oneshot::channel::<()>();
        std::thread::Builder::new().name("dunlin-cluster".into()).spawn(move || drop(runtime.block_on(ended)))?;
        Ok(Self { handle, _ends: ends })
    }

    pub fn handle(&self) -> &Handle {
        &self.handle
    }
}
