//! Who comes by itself: members, and those that want to become one.

use super::dial::host_of;
use super::hello::HELLO;
use super::{CANCELLED, Handler, Link, Links, count};
use crate::stream::{NOT_SERVED, Service, Stream};
use quinn::{Connection, Incoming, RecvStream, SendStream, VarInt};
use std::io;
use std::sync::PoisonError;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Handshakes at once with whoever has not shown yet that its address is its own. All beyond are asked to: a forged address
/// costs one small packet, and takes no place from those that come back.
pub(super) const MAX_UNPROVEN: usize = 64;
/// Handshakes at once with those that have, and with one address: many hosts may have one address outside.
pub(super) const MAX_PROVEN: usize = 192;
pub(super) const MAX_PROVEN_EACH: usize = 64;
/// Connections without a certificate at once, and of one address.
pub(super) const MAX_JOINERS: usize = 64;
pub(super) const MAX_JOINERS_EACH: usize = 32;
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);
/// A relay asks control, which writes the store.
const JOIN_DEADLINE: Duration = Duration::from_secs(60);
/// For the answer to arrive: whoever has it closes.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);
/// What a host does for others may begin so long after its first sign of life.
const STARTS_WITHIN: Duration = Duration::from_secs(3);
const LOOK_FOR_HANDLER: Duration = Duration::from_millis(20);
/// For the byte that says what a stream is for.
const FIRST_BYTE_DEADLINE: Duration = Duration::from_secs(10);

const BUSY: VarInt = VarInt::from_u32(5);
const REFUSED: VarInt = VarInt::from_u32(6);

impl Links {
    pub(super) async fn accept(self) {
        let Ok(endpoint) = self.endpoint() else { return };
        loop {
            let incoming = tokio::select! {
                incoming = endpoint.accept() => incoming,
                () = self.inner.stop.cancelled() => return,
            };
            let Some(incoming) = incoming else { return };
            let places = if incoming.remote_address_validated() { &self.inner.proven } else { &self.inner.unproven };
            let Some(place) = places.take(incoming.remote_address().ip()) else {
                count(&self.inner.counters.refused);
                if incoming.may_retry() { drop(incoming.retry()) } else { incoming.refuse() }
                continue;
            };
            let links = self.clone();
            self.spawn(async move {
                let greeted = tokio::select! {
                    greeted = tokio::time::timeout(HANDSHAKE_DEADLINE, links.greet(incoming)) => greeted,
                    () = links.inner.stop.cancelled() => return,
                };
                drop(place);
                match greeted {
                    Ok(Ok(None)) => count(&links.inner.counters.accepted),
                    Ok(Ok(Some(joiner))) => {
                        let serving = links.clone();
                        links.spawn_service(async move { serving.serve_joiner(joiner).await });
                    }
                    Ok(Err(error)) => {
                        count(&links.inner.counters.refused);
                        tracing::debug!(error = &error as &dyn std::error::Error, "a connection was refused");
                    }
                    Err(_) => count(&links.inner.counters.refused),
                }
            });
        }
    }

    /// A member becomes a link; a connection without a certificate is given back.
    async fn greet(&self, incoming: Incoming) -> io::Result<Option<Connection>> {
        let connection = incoming.accept()?.await?;
        if connection.peer_identity().is_none() {
            return Ok(Some(connection));
        }
        let refuse = |why: &'static str| {
            connection.close(REFUSED, why.as_bytes());
            io::Error::other(why)
        };
        let host = host_of(&connection).ok_or_else(|| refuse("the certificate is not one host's"))?;
        let (send, mut recv) = connection.accept_bi().await?;
        if recv.read_u8().await? != HELLO {
            return Err(refuse("a host says hello first"));
        }
        let theirs = self.inner.hello.exchange_second(send, recv).await?;
        if self.inner.tls.is_removed(&host) {
            return Err(refuse("this host was removed from the cluster")); // between the handshake and now
        }
        if self.table().is_anothers(theirs.addr, &host) {
            return Err(refuse("another host answers at the address that this one says is its own"));
        }
        self.add(connection, host, theirs, None);
        Ok(None)
    }

    /// One stream, to join; nothing else is read of it, and it gets no more.
    async fn serve_joiner(&self, connection: Connection) {
        count(&self.inner.counters.joiners);
        let Some(_place) = self.inner.joiners.take(connection.remote_address().ip()) else {
            return connection.close(BUSY, b"too many hosts join at once: try again");
        };
        let serve = async {
            let begin = async {
                let (send, mut recv) = connection.accept_bi().await?;
                let service = recv.read_u8().await?;
                io::Result::Ok((service, Stream::new(send, recv)))
            };
            let (service, stream) = tokio::time::timeout(FIRST_BYTE_DEADLINE, begin).await.map_err(io::Error::other)??;
            let handler = match Service::from_byte(service) {
                Some(Service::Join) => self.handler_soon(Service::Join).await,
                _ => None,
            };
            match handler {
                Some(handler) => handler(None, stream).await,
                None => stream.refuse(NOT_SERVED),
            }
            io::Result::Ok(())
        };
        tokio::select! {
            _ = tokio::time::timeout(JOIN_DEADLINE, serve) => {} // who was too slow is closed like who was served
            () = self.inner.stop.cancelled() => {}
        }
        let _ = tokio::time::timeout(ANSWER_DEADLINE, connection.closed()).await; // then it is closed from here
        connection.close(CANCELLED, b"a host without a certificate can only join");
    }

    pub(super) async fn receive_streams(&self, link: &Link) {
        while let Ok((send, recv)) = link.connection.accept_bi().await {
            let (links, host) = (self.clone(), link.host.clone());
            self.spawn_service(async move {
                let stop = links.inner.stop.clone();
                tokio::select! {
                    () = links.serve_stream(host, send, recv) => {}
                    () = stop.cancelled() => {}
                }
            });
        }
    }

    async fn serve_stream(&self, host: dunlin_model::HostId, send: SendStream, mut recv: RecvStream) {
        let first = tokio::time::timeout(FIRST_BYTE_DEADLINE, recv.read_u8()).await;
        let mut stream = Stream::new(send, recv);
        let Ok(Ok(byte)) = first else { return };
        let service = Service::from_byte(byte);
        if service == Some(Service::Ping) {
            // Whoever asked waits for the answer, or does not.
            let _ = tokio::time::timeout(FIRST_BYTE_DEADLINE, answer_ping(&mut stream)).await;
            return;
        }
        let handler = match service {
            Some(service) => self.handler_soon(service).await,
            None => None,
        };
        match handler {
            Some(handler) => handler(Some(host), stream).await,
            None => {
                tracing::debug!(%host, byte, "a host asks for what nobody serves here");
                stream.refuse(NOT_SERVED);
            }
        }
    }

    /// A host is heard of a moment before all of it has started: what comes in that moment waits.
    async fn handler_soon(&self, service: Service) -> Option<Handler> {
        let soon = tokio::time::Instant::now() + STARTS_WITHIN;
        loop {
            let found = self.handler(service);
            if found.is_some() || tokio::time::Instant::now() >= soon {
                return found;
            }
            tokio::time::sleep(LOOK_FOR_HANDLER).await;
        }
    }

    fn handler(&self, service: Service) -> Option<Handler> {
        self.inner.handlers.lock().unwrap_or_else(PoisonError::into_inner).get(&service).cloned()
    }
}

async fn answer_ping(stream: &mut Stream) -> io::Result<()> {
    let byte = stream.read_u8().await?;
    stream.write_u8(byte).await?;
    stream.shutdown().await
}
