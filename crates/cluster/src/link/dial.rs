//! Reaching a host that there is no connection with: once for all who want it, and not again at once after a failure.

use super::{Expect, LEAVING, Link, Links, Packet, Table, Target, count, transport_to_join};
use crate::authority::{HOSTS_DOMAIN, log_name, tls_name};
use crate::dial_back::NotReached;
use crate::tls::peer_host;
use dunlin_gossip::OriginId;
use dunlin_model::HostId;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection, ConnectionError};
use rustls_pki_types::CertificateDer;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

const DEADLINE: Duration = Duration::from_secs(4);
const FIRST_REST: Duration = Duration::from_millis(200);
const LONGEST_REST: Duration = Duration::from_secs(5);
/// In progress or at rest after a failure; one that rested long enough makes room.
const MAX_DIALS: usize = 4_096;
/// What waits for one connection.
const MAX_PACKETS: usize = 64;
const MAX_WAITERS: usize = 1_024;

type Reached = Result<Arc<Link>, String>;

/// An attempt, or the rest after one that failed.
pub(super) struct Dial {
    rests: Option<(Instant, String)>,
    failures: u32,
    packets: Vec<Packet>,
    waiters: Vec<oneshot::Sender<Reached>>,
}

impl Links {
    /// Whether it waits for the connection now.
    pub(super) fn send_when_dialed(&self, table: &mut Table, target: Target, packet: Packet) -> bool {
        let Ok(dial) = self.dial_of(table, &target) else { return false };
        let has_room = dial.packets.len() < MAX_PACKETS;
        if has_room {
            dial.packets.push(packet);
        }
        has_room
    }

    /// The connection there is, or a new one.
    pub(super) async fn link(&self, target: &Target) -> io::Result<Arc<Link>> {
        let unreachable = |why| io::Error::new(io::ErrorKind::HostUnreachable, format!("{} cannot be reached: {why}", target.addr));
        let reached = {
            let mut table = self.table();
            if let Some(link) = table.find(target) {
                return Ok(link);
            }
            let dial = self.dial_of(&mut table, target).map_err(unreachable)?;
            if dial.waiters.len() >= MAX_WAITERS {
                return Err(unreachable("too many wait for it already".into()));
            }
            let (sender, receiver) = oneshot::channel();
            dial.waiters.push(sender);
            receiver
        };
        let reached = reached.await.unwrap_or_else(|_| Err("this host is shutting down".into()));
        reached.map_err(unreachable)
    }

    /// The attempt that is in progress, begun if need be; why not, while it rests.
    fn dial_of<'a>(&self, table: &'a mut Table, target: &Target) -> Result<&'a mut Dial, String> {
        let now = Instant::now();
        if table.dials.len() >= MAX_DIALS && !table.dials.contains_key(target) {
            table.dials.retain(|_, dial| dial.rests.as_ref().is_none_or(|(until, _)| *until > now));
            if table.dials.len() >= MAX_DIALS {
                return Err("too many hosts are being reached at once".into());
            }
        }
        let fresh = || Dial { rests: Some((now, String::new())), failures: 0, packets: vec![], waiters: vec![] };
        let dial = table.dials.entry(target.clone()).or_insert_with(fresh);
        match &dial.rests {
            Some((until, why)) if *until > now => return Err(why.clone()),
            Some(_) => {
                dial.rests = None;
                self.spawn(self.clone().dial(target.clone()));
            }
            None => {}
        }
        Ok(dial)
    }

    async fn dial(self, target: Target) {
        count(&self.inner.counters.dials);
        let reached = tokio::select! {
            reached = tokio::time::timeout(DEADLINE, self.reach(&target)) => reached,
            () = self.inner.stop.cancelled() => return,
        };
        match reached {
            Ok(Ok(link)) => {
                let Some(dial) = self.table().dials.remove(&target) else { return };
                let lost = dial.packets.into_iter().filter_map(|packet| (!link.send(packet)).then_some(()));
                lost.for_each(|()| count(&self.inner.counters.dropped_out));
                dial.waiters.into_iter().for_each(|waiter| drop(waiter.send(Ok(link.clone()))));
            }
            Ok(Err(error)) => self.failed(&target, error.to_string()),
            Err(_) => self.failed(&target, format!("no answer within {DEADLINE:?}")),
        }
    }

    fn failed(&self, target: &Target, why: String) {
        count(&self.inner.counters.dials_failed);
        tracing::debug!(addr = %target.addr, expect = ?target.expect, why, "a host cannot be reached");
        let mut table = self.table();
        // It may have come by itself meanwhile.
        let link = table.find(target);
        let Some(dial) = table.dials.get_mut(target) else { return };
        let rest = FIRST_REST * 2_u32.pow(dial.failures.min(8));
        dial.rests = Some((Instant::now() + rest.min(LONGEST_REST), why.clone()));
        dial.failures += 1;
        let (packets, waiters) = (std::mem::take(&mut dial.packets), std::mem::take(&mut dial.waiters));
        if link.is_some() {
            table.dials.remove(target);
        }
        drop(table);
        let reached: Reached = link.ok_or(why);
        for packet in packets {
            if !reached.as_ref().is_ok_and(|link| link.send(packet)) {
                count(&self.inner.counters.dropped_out);
            }
        }
        waiters.into_iter().for_each(|waiter| drop(waiter.send(reached.clone())));
    }

    async fn reach(&self, target: &Target) -> io::Result<Arc<Link>> {
        let (config, name) = match &target.expect {
            Expect::Host(host) => (self.inner.dial_named.clone(), tls_name(host)),
            Expect::Writer(_) | Expect::AnyHost => (self.inner.dial_any.clone(), HOSTS_DOMAIN.to_owned()),
        };
        let connecting = self.endpoint()?.connect_with(config, target.addr, &name).map_err(io::Error::other)?;
        let connection = connecting.await?;
        let host = host_of(&connection).ok_or_else(|| io::Error::other("it shows no certificate of a host"))?;
        if !target.expect.admits(&host, OriginId::of(&log_name(&host))) {
            connection.close(super::CANCELLED, b"another host was looked for");
            return Err(io::Error::other(format!("host {host} answers there, another was looked for")));
        }
        let (send, recv) = connection.open_bi().await?;
        let theirs = self.inner.hello.exchange_first(send, recv).await?;
        if theirs.process == self.inner.hello.process {
            return Err(io::Error::other("it is this process itself"));
        }
        Ok(self.add(connection, host, theirs, Some(target.addr)))
    }

    /// Dials a host that is no member yet, from the address from which members are dialed. Nothing is said: a handshake with which
    /// `tls` is content is all, and no link comes of it. The caller has a deadline.
    pub async fn reach_joining(&self, addr: SocketAddr, tls: rustls::ClientConfig) -> Result<(), NotReached> {
        let fails = |error: &dyn std::error::Error| NotReached::Unanswered(error.to_string());
        let crypto = QuicClientConfig::try_from(tls).map_err(|error| fails(&error))?;
        let mut config = ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::new(transport_to_join()));
        let endpoint = self.endpoint().map_err(|error| fails(&error))?;
        let connecting = {
            let _here = self.inner.at.own.enter(); // QUIC's own task of the connection is where this is called
            endpoint.connect_with(config, addr, HOSTS_DOMAIN).map_err(|error| fails(&error))?
        };
        match connecting.await {
            Ok(connection) => {
                connection.close(LEAVING, b"reached");
                Ok(())
            }
            Err(error @ (ConnectionError::TimedOut | ConnectionError::LocallyClosed | ConnectionError::CidsExhausted)) => Err(fails(&error)),
            Err(error) => {
                tracing::debug!(%addr, %error, "what answers over UDP is not the host that joins");
                Err(NotReached::ByAnother)
            }
        }
    }
}

/// The host whose certificate the other side has shown, and TLS has verified.
pub(super) fn host_of(connection: &Connection) -> Option<HostId> {
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    peer_host(&chain)
}
