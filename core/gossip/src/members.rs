//! Who takes part: SWIM by foca, driven from here, so that the simulator drives it too.
//!
//! foca believes every member's word about every other, so it runs only inside connections that both sides have
//! authenticated. A member that is cut off stays alone by foca's rules; saved peers are announced to again and again.

use crate::catalogue::MAX_ORIGINS;
use crate::id::{OriginId, Peer};
use crate::planted::planted;
use crate::rng::Rng;
use crate::wire::{Malformed, Reader, Write};
use bytes::{Buf, BufMut};
use foca::{Config, Foca, Header, Identity, Incarnation, Member, Message, NoCustomBroadcast, Notification, PeriodicParams, Runtime, State, Timer};
use std::collections::{BTreeMap, BTreeSet};
use std::num::{NonZeroU8, NonZeroUsize};
use std::sync::Arc;
use std::time::Duration;

/// Below a datagram's limit by what goes around it.
const MAX_PACKET_BYTES: usize = 1_190;
/// A saved peer that is not a member is announced to this often.
pub(crate) const ANNOUNCE_MS: u64 = 2_000;
/// One time in so many when nobody is missing.
const ANNOUNCE_ANYWAY: usize = 4;
/// Saved for the next start.
pub(crate) const MAX_SAVED_PEERS: usize = 256;
/// Timers that members cause, one or two each. foca's own few (the next probe, the periods) are always kept: each sets the
/// next one, so a lost one would end the finding of the dead for good.
const MAX_TIMERS: usize = 2 * MAX_ORIGINS;

pub(crate) struct Members {
    foca: Foca<Peer, Codec, Rng, NoCustomBroadcast>,
    timers: BTreeMap<(u64, u64), Timer<Peer>>,
    timer: u64,
    /// How many of them are about one member.
    of_members: usize,
    active: BTreeMap<OriginId, Peer>,
    saved: Vec<Peer>,
    /// Gone for good: nobody asks them, waits for them or saves them.
    removed: BTreeSet<OriginId>,
    next_announce_ms: u64,
    others: Arc<Others>,
}

/// Whom there is to talk to: members, or before there are any those that were saved.
#[derive(Default)]
pub(crate) struct Others {
    pub all: Vec<Peer>,
    /// Places in `all` of those in the own region.
    pub near: Vec<usize>,
}

/// What foca wants done.
#[derive(Default)]
pub(crate) struct Wishes {
    pub sends: Vec<(Peer, Vec<u8>)>,
    pub up: Vec<Peer>,
    pub down: Vec<Peer>,
    timers: Vec<(Duration, Timer<Peer>)>,
}

impl Members {
    pub fn new(me: Peer, saved: Vec<Peer>, rng: Rng) -> Self {
        let foca = Foca::new(me, config(), rng, Codec);
        Self { foca, timers: BTreeMap::new(), timer: 0, of_members: 0, active: BTreeMap::new(), saved, removed: BTreeSet::new(), next_announce_ms: 0, others: Arc::default() }
    }

    pub fn active(&self) -> impl Iterator<Item = &Peer> {
        self.active.values()
    }

    pub fn get(&self, id: OriginId) -> Option<&Peer> {
        self.active.get(&id)
    }

    /// Everybody of whom this host knows; those that answered last come first.
    pub fn known(&self) -> Vec<Peer> {
        let me = self.foca.identity().id;
        let others = self.saved.iter().filter(|peer| peer.id != me && !self.active.contains_key(&peer.id));
        self.active.values().chain(others).take(MAX_SAVED_PEERS).cloned().collect()
    }

    #[cfg(test)]
    pub fn put_active(&mut self, peers: Vec<Peer>) {
        let mut wishes = Wishes::default();
        self.foca.apply_many(peers.into_iter().map(Member::alive), false, &mut wishes).expect("they are other members");
        self.grant(wishes, 0);
    }

    pub fn others(&self) -> Arc<Others> {
        self.others.clone()
    }

    fn look_around(&mut self) {
        let members = self.foca.iter_members().filter(|member| !self.removed.contains(&member.id().id));
        self.active = members.map(|member| (member.id().id, member.id().clone())).collect();
        let all: Vec<Peer> = if self.active.is_empty() { self.known() } else { self.active.values().cloned().collect() };
        let region = &self.foca.identity().region;
        let near = (0..all.len()).filter(|at| all[*at].region == *region).collect();
        self.others = Arc::new(Others { all, near });
    }

    pub fn remove(&mut self, id: OriginId) {
        self.removed.insert(id);
        self.saved.retain(|peer| peer.id != id);
        self.look_around();
    }

    pub fn save(&mut self, peers: Vec<Peer>) {
        for peer in peers.into_iter().filter(|peer| !self.removed.contains(&peer.id)).collect::<Vec<_>>() {
            if self.saved.len() < MAX_SAVED_PEERS && !self.saved.iter().any(|saved| saved.addr == peer.addr) {
                self.saved.push(peer);
            }
        }
        self.look_around();
    }

    pub fn receive(&mut self, bytes: &[u8], now_ms: u64) -> (Wishes, bool) {
        let mut wishes = Wishes::default();
        let is_full = self.active.len() + self.of_members >= MAX_ORIGINS;
        let known = if is_full { self.without_strangers(bytes) } else { Some(bytes.to_vec()) };
        let understood = known.is_some_and(|bytes| self.foca.handle_data(&bytes, &mut wishes).is_ok());
        (self.grant(wishes, now_ms), understood)
    }

    /// What a packet says about members that are known already. foca bounds its list by nothing, and any member may name more.
    fn without_strangers(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        let mut left = bytes;
        let header = foca::Codec::decode_header(&mut Codec, &mut left).ok()?;
        let mut out = bytes[..bytes.len() - left.len()].to_vec();
        if !self.active.contains_key(&header.src.id) {
            return None;
        }
        if left.len() < 2 {
            return Some(out);
        }
        let (mut count, mut members) = (0u16, vec![]);
        for _ in 0..left.get_u16() {
            let before = left;
            let member = foca::Codec::decode_member(&mut Codec, &mut left).ok()?;
            if self.active.contains_key(&member.id().id) || *member.id() == *self.foca.identity() {
                members.extend_from_slice(&before[..before.len() - left.len()]);
                count += 1;
            }
        }
        out.put_u16(count);
        out.extend_from_slice(&members);
        Some(out)
    }

    /// Runs what is due; announces to a saved peer that is not a member.
    pub fn tick(&mut self, now_ms: u64, rng: &mut Rng) -> Wishes {
        let mut wishes = Wishes::default();
        while let Some(first) = self.timers.first_entry().filter(|first| first.key().0 <= now_ms) {
            // An error here says that a timer was overtaken; foca goes on by itself.
            let timer = first.remove();
            self.of_members -= usize::from(is_of_member(&timer));
            let _ = self.foca.handle_timer(timer, &mut wishes);
            self.schedule(&mut wishes, now_ms);
        }
        if now_ms >= self.next_announce_ms && !(planted!(NeverAnnounceAgain) && self.next_announce_ms > 0) {
            self.next_announce_ms = now_ms + rng.around(ANNOUNCE_MS);
            let me = self.foca.identity().id;
            let others = || self.saved.iter().filter(|peer| peer.id != me);
            let missing: Vec<&Peer> = others().filter(|peer| !self.active.contains_key(&peer.id)).collect();
            // Now and then anybody: they may have lost this host though it has not lost them.
            let among = if missing.is_empty() && rng.below(ANNOUNCE_ANYWAY) == 0 { others().collect() } else { missing };
            if let Some(peer) = among.get(rng.below(among.len())) {
                let peer = (*peer).clone();
                let _ = self.foca.announce(peer, &mut wishes);
            }
        }
        self.grant(wishes, now_ms)
    }

    pub fn leave(&mut self, now_ms: u64) -> Wishes {
        let mut wishes = Wishes::default();
        let _ = self.foca.leave_cluster(&mut wishes);
        self.grant(wishes, now_ms)
    }

    pub fn next_wake_ms(&self) -> u64 {
        let timer = self.timers.first_key_value().map_or(u64::MAX, |((at, _), _)| *at);
        timer.min(self.next_announce_ms)
    }

    fn grant(&mut self, mut wishes: Wishes, now_ms: u64) -> Wishes {
        self.schedule(&mut wishes, now_ms);
        for peer in wishes.up.iter().filter(|peer| !self.removed.contains(&peer.id)) {
            let has_room = self.saved.len() < MAX_SAVED_PEERS;
            match self.saved.iter_mut().find(|saved| saved.id == peer.id) {
                Some(saved) => *saved = peer.clone(),
                None if has_room => self.saved.push(peer.clone()),
                None => {}
            }
        }
        if !(wishes.up.is_empty() && wishes.down.is_empty()) {
            self.look_around();
        }
        wishes
    }

    fn schedule(&mut self, wishes: &mut Wishes, now_ms: u64) {
        for (after, timer) in wishes.timers.drain(..) {
            let of_member = is_of_member(&timer);
            if !of_member || self.of_members < MAX_TIMERS {
                self.of_members += usize::from(of_member);
                self.timer += 1;
                self.timers.insert((now_ms + after.as_millis() as u64, self.timer), timer);
            }
        }
    }
}

fn is_of_member(timer: &Timer<Peer>) -> bool {
    matches!(timer, Timer::RemoveDown(_) | Timer::ChangeSuspectToDown { .. })
}

fn config() -> Config {
    let some = |count| NonZeroUsize::new(count).expect("more than none");
    Config {
        probe_period: Duration::from_millis(1_000),
        probe_rtt: Duration::from_millis(500),
        num_indirect_probes: some(3),
        max_transmissions: NonZeroU8::new(12).expect("more than none"),
        // With the probe before it a dead member is found within ten seconds.
        suspect_to_down_after: Duration::from_millis(4_000),
        remove_down_after: Duration::from_secs(600).into(),
        max_packet_size: some(MAX_PACKET_BYTES),
        notify_down_members: true,
        periodic_announce: Some(PeriodicParams { frequency: Duration::from_secs(30), num_members: some(1) }),
        periodic_announce_to_down_members: Some(PeriodicParams { frequency: Duration::from_secs(10), num_members: some(1) }),
        periodic_gossip: Some(PeriodicParams { frequency: Duration::from_millis(500), num_members: some(3) }),
    }
}

impl Identity for Peer {
    type Addr = OriginId;

    fn renew(&self) -> Option<Self> {
        Some(Self { renewed: self.renewed.checked_add(1)?, ..self.clone() })
    }

    fn addr(&self) -> OriginId {
        self.id
    }

    fn win_addr_conflict(&self, other: &Self) -> bool {
        (order_ms(self), self.life) > (order_ms(other), other.life)
    }
}

/// Later starts win. A clock that was lost with its disk may say that this start came before the last: each renewal
/// doubles what is added, so a living process soon stands above any dead life of its own.
fn order_ms(peer: &Peer) -> u64 {
    let added_ms = if peer.renewed == 0 { 0 } else { 1_000 << peer.renewed.min(40) };
    peer.started_ms.saturating_add(added_ms).saturating_add(peer.renewed.into())
}

impl Runtime<Peer> for Wishes {
    fn notify(&mut self, notification: Notification<'_, Peer>) {
        match notification {
            Notification::MemberUp(peer) => self.up.push(peer.clone()),
            Notification::MemberDown(peer) => self.down.push(peer.clone()),
            Notification::Rename(before, after) => {
                self.down.push(before.clone());
                self.up.push(after.clone());
            }
            Notification::Active | Notification::Idle | Notification::Defunct | Notification::Rejoin(_) => {}
        }
    }

    fn send_to(&mut self, to: Peer, data: &[u8]) {
        self.sends.push((to, data.to_vec()));
    }

    fn submit_after(&mut self, timer: Timer<Peer>, after: Duration) {
        self.timers.push((after, timer));
    }
}

/// foca's packets in our own bounded encoding.
struct Codec;

impl foca::Codec<Peer> for Codec {
    type Error = Malformed;

    fn encode_header(&mut self, header: &Header<Peer>, buf: impl BufMut) -> Result<(), Malformed> {
        let mut out = Vec::new();
        header.src.write(&mut out);
        out.number(header.src_incarnation.into());
        header.dst.write(&mut out);
        let (kind, other, number) = match &header.message {
            Message::Ping(number) => (0, None, *number),
            Message::Ack(number) => (1, None, *number),
            Message::PingReq { target, probe_number } => (2, Some(target), *probe_number),
            Message::IndirectPing { origin, probe_number } => (3, Some(origin), *probe_number),
            Message::IndirectAck { target, probe_number } => (4, Some(target), *probe_number),
            Message::ForwardedAck { origin, probe_number } => (5, Some(origin), *probe_number),
            Message::Announce => (6, None, 0),
            Message::Feed => (7, None, 0),
            Message::Gossip => (8, None, 0),
            Message::Broadcast => (9, None, 0),
            Message::TurnUndead => (10, None, 0),
        };
        out.extend_from_slice(&[kind, number]);
        if let Some(other) = other {
            other.write(&mut out);
        }
        put(&out, buf)
    }

    fn decode_header(&mut self, buf: impl Buf) -> Result<Header<Peer>, Malformed> {
        decode(buf, |r| {
            let src = Peer::read(r)?;
            let src_incarnation = incarnation(r)?;
            let dst = Peer::read(r)?;
            let (kind, number) = (r.byte("a kind")?, r.byte("a probe")?);
            let message = match kind {
                0 => Message::Ping(number),
                1 => Message::Ack(number),
                2 => Message::PingReq { target: Peer::read(r)?, probe_number: number },
                3 => Message::IndirectPing { origin: Peer::read(r)?, probe_number: number },
                4 => Message::IndirectAck { target: Peer::read(r)?, probe_number: number },
                5 => Message::ForwardedAck { origin: Peer::read(r)?, probe_number: number },
                6 => Message::Announce,
                7 => Message::Feed,
                8 => Message::Gossip,
                9 => Message::Broadcast,
                10 => Message::TurnUndead,
                _ => return Err(Malformed { what: "a kind of membership message" }),
            };
            Ok(Header { src, src_incarnation, dst, message })
        })
    }

    fn encode_member(&mut self, member: &Member<Peer>, buf: impl BufMut) -> Result<(), Malformed> {
        let mut out = Vec::new();
        member.id().write(&mut out);
        out.number(member.incarnation().into());
        out.push(match member.state() {
            State::Alive => 0,
            State::Suspect => 1,
            State::Down => 2,
        });
        put(&out, buf)
    }

    fn decode_member(&mut self, buf: impl Buf) -> Result<Member<Peer>, Malformed> {
        decode(buf, |r| {
            let (peer, incarnation) = (Peer::read(r)?, incarnation(r)?);
            let state = match r.byte("a state")? {
                0 => State::Alive,
                1 => State::Suspect,
                2 => State::Down,
                _ => return Err(Malformed { what: "a member's state" }),
            };
            Ok(Member::new(peer, incarnation, state))
        })
    }
}

fn incarnation(r: &mut Reader<'_>) -> Result<Incarnation, Malformed> {
    Incarnation::try_from(r.number("an incarnation")?).map_err(|_| Malformed { what: "an incarnation" })
}

fn put(bytes: &[u8], mut buf: impl BufMut) -> Result<(), Malformed> {
    if buf.remaining_mut() < bytes.len() {
        return Err(Malformed { what: "a packet" });
    }
    buf.put_slice(bytes);
    Ok(())
}

fn decode<T>(mut buf: impl Buf, read: impl FnOnce(&mut Reader<'_>) -> Result<T, Malformed>) -> Result<T, Malformed> {
    let mut reader = Reader::new(buf.chunk());
    let value = read(&mut reader)?;
    let used = buf.chunk().len() - reader.remaining();
    buf.advance(used);
    Ok(value)
}

#[cfg(test)]
mod tests;
