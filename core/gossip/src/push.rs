//! News travel by push: who hears something for the first time tells four peers in its region and two anywhere, once.
//!
//! Pushes may be lost, dropped or come in any order. What comes too early is held for about a round trip, then the sender
//! is asked; everything else is anti-entropy's.

use crate::beat::Beat;
use crate::catalogue::{Bad, Taken};
use crate::head::{Certificate, Head, Scope};
use crate::id::{Addr, OriginId};
use crate::log::{Cursor, Log, ROW_COST_BYTES};
use crate::message::{Batch, Fork, MAX_BEATS, MAX_CHUNK_BYTES, MAX_DATAGRAM_BYTES, Message, More, Wanted};
use crate::node::{Event, Node};
use crate::planted::planted;
use crate::row::Row;
use crate::transfer::Transfers;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

const PUSH_IN_REGION: usize = 4;
const PUSH_ANYWHERE: usize = 2;
/// Where so few others are to hear it, the writer tells all of them itself. Whoever hears it tells one more that there is
/// something to ask for, in case a message was lost: later than any that was not, and all of that time in one message.
const FEW: usize = 16;
const RELAY_MS: u64 = 20;
/// What does not fit a datagram goes as a message up to here; of more only the head is told, and the rows are asked for.
const MAX_PUSHED_BYTES: usize = 32 << 10;
/// Batches to be sent; the oldest is dropped, because anti-entropy repairs it.
const MAX_QUEUED: usize = 4_096;
/// Datagrams a flush: more would fill socket buffers only to be lost there.
const MAX_DATAGRAMS_A_FLUSH: usize = 512;
const FLUSH_MS: u64 = 1;
/// Room for a version, a kind, a count.
const OVERHEAD_BYTES: usize = 8;
const MAX_HELD: usize = 512;
/// Of one peer: its own oldest goes first.
const MAX_HELD_A_PEER: usize = 128;
/// A want is not repeated to the same peer before.
const ASK_AGAIN_MS: u64 = 1_000;
/// Rows that wait for the rest of their log, of all origins.
const MAX_STAGED_BYTES: usize = 128 << 20;
const STAGE_MS: u64 = 10_000;
/// Of these one peer has half at most, and so many stages: who is greedy is refused, not the others.
const MAX_STAGED_BYTES_A_PEER: usize = MAX_STAGED_BYTES / 2;
const MAX_STAGES_A_PEER: usize = 64;
const MAX_STAGES: usize = 4_096;
/// Parts that answer one want; the next is asked for when the last of these is here.
const PARTS_A_WANT: usize = 4;
/// What one input may make this host send: a small message must not cause a flood.
const MAX_GIVEN_BYTES: usize = 4 << 20;
/// Of a log that is this far behind more is to come than a message holds, perhaps.
const FAR_BEHIND: u64 = 256;
/// What one peer may be asked for within [`ASK_AGAIN_MS`], whatever it says it has.
const MAX_ASKED_A_PEER: usize = 4_096;

#[derive(Default)]
pub(crate) struct Pushes {
    queue: VecDeque<(Addr, Arc<[u8]>)>,
    next_flush_ms: u64,
    /// Logs with news that one more is to hear of, and when.
    relays: BTreeSet<OriginId>,
    relay_at_ms: u64,
    held: Vec<Held>,
    is_trying: bool,
    asked: BTreeMap<Addr, BTreeMap<OriginId, (u64, Cursor)>>,
    /// Of each peer its own: what one of them makes up does not touch what another has sent.
    staged: BTreeMap<(OriginId, Addr), Stage>,
    transfers: Transfers,
    given_bytes: usize,
}

struct Held {
    batch: Batch,
    from: Addr,
    until_ms: u64,
}

/// Parts of a log that is longer than a message.
struct Stage {
    epoch: u32,
    begin: Cursor,
    cursor: Cursor,
    rows: Vec<Row>,
    bytes: usize,
    touched_ms: u64,
}

impl Pushes {
    fn has_room_to_stage(&self, (id, from): &(OriginId, Addr), bytes: usize) -> bool {
        let (mut all_bytes, mut stages, mut its_bytes) = (bytes, 0, bytes);
        for (_, stage) in self.staged.iter().filter(|((_, of), _)| of == from) {
            (stages, its_bytes) = (stages + 1, its_bytes + stage.bytes);
        }
        all_bytes += self.staged.values().map(|stage| stage.bytes).sum::<usize>();
        let has_place = self.staged.contains_key(&(*id, from.clone())) || (stages < MAX_STAGES_A_PEER && self.staged.len() < MAX_STAGES);
        has_place && its_bytes <= MAX_STAGED_BYTES_A_PEER && all_bytes <= MAX_STAGED_BYTES
    }

    #[cfg(test)]
    pub fn stages(&self) -> usize {
        self.staged.len()
    }
}

impl Node {
    /// Tells some peers, who tell others.
    pub(crate) fn spread(&mut self, batch: Batch, except: Option<&Addr>) {
        let Some(certificate) = self.catalogue.certificate(batch.head.is.id).filter(|_| !planted!(NoPush)).cloned() else { return };
        if certificate.scope == Scope::Region && certificate.region != self.me.region {
            return;
        }
        let few = self.are_few(certificate.scope);
        if few && except.is_some() {
            return self.relay_later(batch.head.is.id);
        }
        let targets = if few { self.unaware(&certificate) } else { self.targets(certificate.scope, except) };
        // What begins a log comes with its certificate: nobody can know it yet.
        let certificate = Some(certificate).filter(|_| batch.after == Cursor::START);
        self.push(targets, Batch { certificate, ..batch }, few);
    }

    fn push(&mut self, targets: Vec<Addr>, batch: Batch, among_few: bool) {
        let most = MAX_DATAGRAM_BYTES - OVERHEAD_BYTES;
        if among_few && batch.length() > most && batch.length() <= MAX_PUSHED_BYTES {
            let message = Message::Push(vec![batch]);
            return targets.into_iter().for_each(|to| self.stream(to, &message));
        }
        let mut bytes = Vec::new();
        if batch.length() > most { bare(None, batch.head).write(&mut bytes) } else { batch.write(&mut bytes) }
        let bytes: Arc<[u8]> = bytes.into();
        for to in targets {
            if self.pushes.queue.len() == MAX_QUEUED {
                self.pushes.queue.pop_front();
                self.counters.dropped_pushes += 1;
            }
            self.pushes.queue.push_back((to, bytes.clone()));
        }
    }

    fn are_few(&self, scope: Scope) -> bool {
        let others = self.members.others();
        let count = if scope == Scope::Global { others.all.len() } else { others.near.len() };
        count <= FEW
    }

    /// Where few are to hear it: whom its writer tells.
    fn unaware(&self, certificate: &Certificate) -> Vec<Addr> {
        let others = self.members.others();
        let in_scope = others.all.iter().filter(|peer| certificate.scope == Scope::Global || peer.region == self.me.region);
        in_scope.map(|peer| peer.addr.clone()).collect()
    }

    fn relay_later(&mut self, id: OriginId) {
        if self.pushes.relays.is_empty() {
            self.pushes.relay_at_ms = self.now_ms + RELAY_MS;
        }
        self.pushes.relays.insert(id);
    }

    /// One other is told which logs have moved on. Its writer's own message is there before, unless it was lost.
    fn relay(&mut self) {
        if self.pushes.relays.is_empty() || self.now_ms < self.pushes.relay_at_ms {
            return;
        }
        let others = self.members.others();
        let anywhere = self.rng.choose(1, others.all.len()).first().copied();
        let nearby = self.rng.choose(1, others.near.len()).first().map(|at| others.near[*at]);
        for id in std::mem::take(&mut self.pushes.relays) {
            let Some(log) = self.catalogue.log(id).filter(|_| self.catalogue.fork(id).is_none()) else { continue };
            let place = if log.certificate.scope == Scope::Global { anywhere } else { nearby };
            let told = bare(None, log.head.clone());
            let peer = place.map(|place| &others.all[place]).filter(|peer| peer.id != id);
            self.push(peer.map(|peer| peer.addr.clone()).into_iter().collect(), told, true);
        }
    }

    fn targets(&mut self, scope: Scope, except: Option<&Addr>) -> Vec<Addr> {
        let others = self.members.others();
        let addr = |place: usize| Some(&others.all[place].addr).filter(|addr| Some(*addr) != except).cloned();
        let near = self.rng.choose(PUSH_IN_REGION, others.near.len()).into_iter().filter_map(|at| addr(others.near[at]));
        let mut targets: Vec<Addr> = near.collect();
        let anywhere = match scope {
            Scope::Global => self.rng.choose(PUSH_ANYWHERE, others.all.len()),
            Scope::Region => self.rng.choose(PUSH_ANYWHERE, others.near.len()).into_iter().map(|at| others.near[at]).collect(),
        };
        targets.extend(anywhere.into_iter().filter_map(addr));
        targets.sort_unstable();
        targets.dedup();
        targets
    }

    /// Packs what is queued into datagrams, several batches in each.
    pub(crate) fn flush_pushes(&mut self) {
        self.pushes.given_bytes = 0;
        self.relay();
        if self.pushes.queue.is_empty() || self.now_ms < self.pushes.next_flush_ms {
            return;
        }
        self.pushes.next_flush_ms = self.now_ms + FLUSH_MS;
        let mut open: BTreeMap<Addr, (u64, Vec<u8>)> = BTreeMap::new();
        let mut full = vec![];
        while full.len() + open.len() < MAX_DATAGRAMS_A_FLUSH {
            let Some((to, batch)) = self.pushes.queue.pop_front() else { break };
            let (count, bytes) = open.entry(to.clone()).or_default();
            if bytes.len() + batch.len() > MAX_DATAGRAM_BYTES - OVERHEAD_BYTES {
                full.push((to, std::mem::take(count), std::mem::take(bytes)));
            }
            *count += 1;
            bytes.extend_from_slice(&batch);
        }
        full.extend(open.into_iter().map(|(to, (count, bytes))| (to, count, bytes)));
        for (to, count, bytes) in full {
            self.datagram_of_batches(to, count, &bytes);
        }
    }

    pub(crate) fn pushes_next_ms(&self) -> u64 {
        let flush = if self.pushes.queue.is_empty() { u64::MAX } else { self.pushes.next_flush_ms };
        let relay = if self.pushes.relays.is_empty() { u64::MAX } else { self.pushes.relay_at_ms };
        self.pushes.held.iter().map(|held| held.until_ms).min().unwrap_or(u64::MAX).min(flush).min(relay)
    }

    pub(crate) fn receive_push(&mut self, from: &Addr, batch: Batch) {
        self.receive_batch(from, batch, Route::Push);
    }

    /// A part of a log: whole logs are taken at once, longer ones are put together first.
    pub(crate) fn receive_part(&mut self, from: &Addr, batch: Batch) {
        let (id, epoch, more) = (batch.head.is.id, batch.head.is.epoch, batch.more);
        let now_ms = self.now_ms;
        self.pushes.staged.retain(|_, stage| now_ms.saturating_sub(stage.touched_ms) < STAGE_MS);
        let at = (id, from.clone());
        let goes_on = self.pushes.staged.get(&at).is_some_and(|stage| stage.epoch == epoch && stage.cursor == batch.after);
        if !goes_on && more == More::Last {
            return self.receive_batch(from, batch, Route::Repair);
        }
        if !goes_on && !self.is_worth_a_stage(&batch) {
            // Its rows cannot matter; its head may: unsigned, of no known writer, or one that contradicts another.
            return self.receive_batch(from, Batch { rows: vec![], more: More::Last, ..batch }, Route::Repair);
        }
        let bytes: usize = batch.rows.iter().map(|row| row.length() + ROW_COST_BYTES).sum();
        if !self.pushes.has_room_to_stage(&at, bytes) {
            self.counters.dropped_stages += 1;
            return;
        }
        if !goes_on {
            let begin = batch.after.clone();
            let fresh = Stage { epoch, begin, cursor: Cursor::START, rows: vec![], bytes: 0, touched_ms: now_ms };
            self.pushes.staged.insert(at.clone(), fresh);
        }
        if !goes_on {
            self.note_behind(&batch.head.is);
        }
        let was_asked = self.pushes.asked.get(from).is_some_and(|asked| asked.contains_key(&id));
        if was_asked && !self.pushes.transfers.is_known(id) {
            self.pushes.transfers.asked(id, from, now_ms);
        }
        if !batch.rows.is_empty() {
            self.pushes.transfers.moved(id, from, now_ms);
        }
        let stage = self.pushes.staged.get_mut(&at).expect("it was just put there");
        if let Some(last) = batch.rows.last() {
            stage.cursor = Cursor { seq: last.seq(), key: Some(last.key_of_its_own()) };
        }
        (stage.bytes, stage.touched_ms) = (stage.bytes + bytes, now_ms);
        stage.rows.extend(batch.rows);
        match more {
            More::Follows => {}
            More::Ask => {
                let after = stage.cursor.clone();
                self.pushes.transfers.asked(id, from, now_ms);
                self.ask(from, Wanted { id, epoch, after });
            }
            More::Last => {
                let stage = self.pushes.staged.remove(&at).expect("it is there");
                self.receive_batch(from, Batch { rows: stage.rows, after: stage.begin, ..stage_of(batch.certificate, batch.head) }, Route::Repair);
            }
        }
    }

    /// Whether the head is one that this host would take once it has all the rows: only that is worth memory.
    fn is_worth_a_stage(&mut self, batch: &Batch) -> bool {
        let (id, head) = (batch.head.is.id, &batch.head);
        if let Some(certificate) = batch.certificate.as_ref()
            && (certificate.id != id || !self.wants_origin(certificate) || !self.catalogue.admit(certificate.clone()))
        {
            return false;
        }
        let Some(certificate) = self.catalogue.certificate(id) else { return false };
        let held = self.catalogue.log(id).filter(|log| log.head.is.epoch == head.is.epoch);
        let is_newer = held.is_none_or(|log| log.head.at() < head.at()) && self.catalogue.fork(id).is_none();
        is_newer && self.wants_origin(certificate) && head.verify(certificate)
    }

    fn receive_batch(&mut self, from: &Addr, batch: Batch, route: Route) {
        let id = batch.head.is.id;
        if self.writes_alone(id) {
            return self.receive_own(from, batch);
        }
        let certificate = self.catalogue.certificate(id).or(batch.certificate.as_ref());
        if certificate.is_some_and(|certificate| !self.wants_origin(certificate)) {
            return;
        }
        if let Some(fork) = self.catalogue.fork(id).filter(|fork| fork.certificate.epoch == batch.head.is.epoch) {
            // Whoever still tells it has lost the evidence.
            let fork = fork.clone();
            return self.show_fork(from, fork);
        }
        let copy = batch.clone();
        match self.catalogue.take(batch, self.receipt(route == Route::Repair)) {
            Taken::Changed { id, rows, whole } => {
                self.syncs.reached(id, (copy.head.is.epoch, copy.head.is.seq));
                self.pushes.asked.values_mut().for_each(|asked| drop(asked.remove(&id)));
                self.pushes.transfers.ended(id);
                self.changed(id, whole, rows);
                if route == Route::Push {
                    self.spread(copy, Some(from));
                }
                self.notify_subscribers(id);
                self.try_held(id);
            }
            Taken::Renewed { .. } if route == Route::Push => self.spread(copy, Some(from)),
            Taken::Renewed { .. } => {}
            Taken::Known => self.show_reached(from, &copy.head),
            taken @ (Taken::Gap { .. } | Taken::Stranger { .. }) if route == Route::Push => {
                if matches!(taken, Taken::Gap { .. }) {
                    self.note_behind(&copy.head.is);
                    self.ask_for_bare(from, &copy);
                }
                self.hold(from, copy);
            }
            Taken::Gap { .. } if is_bare(&copy) => self.ask_for_bare(from, &copy),
            Taken::Gap { id } | Taken::Stranger { id } => {
                self.want(from, Wanted { id, epoch: copy.head.is.epoch, after: Cursor::START });
            }
            Taken::Forked(fork) => self.tell_fork(&fork, Some(from)),
            Taken::Bad { why, .. } => match why {
                Bad::Certificate => self.counters.bad_certificates += 1,
                Bad::Signature => self.counters.bad_signatures += 1,
                Bad::Rows => {
                    self.counters.bad_rows += 1;
                    self.note_behind(&copy.head.is);
                    // Either they lie, or what is held here is not what they build on: the whole tells.
                    if copy.after != Cursor::START {
                        self.want(from, Wanted { id, epoch: copy.head.is.epoch, after: Cursor::START });
                    }
                }
                Bad::TooBig => self.counters.too_big += 1,
            },
        }
    }

    // ---- forks

    pub(crate) fn receive_fork(&mut self, from: &Addr, fork: Fork) {
        if !self.wants_origin(&fork.certificate) {
            return;
        }
        match self.catalogue.take_fork(fork.clone()) {
            Ok(true) => self.tell_fork(&fork, Some(from)),
            Ok(false) => {}
            Err(_) => self.counters.bad_signatures += 1,
        }
    }

    /// The evidence goes where the origin's rows would go, so that all quarantine.
    pub(crate) fn tell_fork(&mut self, fork: &Fork, except: Option<&Addr>) {
        let is = &fork.heads[0].is;
        self.event(Event::Forked { origin: is.id, epoch: is.epoch, seq: is.seq });
        let certificate = &fork.certificate;
        let to = if certificate.scope == Scope::Global || certificate.region == self.me.region {
            self.targets(certificate.scope, except)
        } else {
            // Found by a reader far away: its region has to know.
            let others = self.members.others();
            let there: Vec<&Addr> = others.all.iter().filter(|peer| peer.region == certificate.region).map(|peer| &peer.addr).collect();
            self.rng.choose(PUSH_IN_REGION, there.len()).into_iter().map(|at| there[at].clone()).collect()
        };
        for to in to {
            self.stream(to, &Message::Fork(Box::new(fork.clone())));
        }
    }

    fn show_fork(&mut self, to: &Addr, fork: Fork) {
        let now_ms = self.now_ms;
        let shown = self.pushes.asked.entry(to.clone()).or_default().entry(fork.certificate.id).or_insert((0, Cursor::START));
        if shown.0 + ASK_AGAIN_MS <= now_ms || shown.0 == 0 {
            shown.0 = now_ms;
            self.stream(to.clone(), &Message::Fork(Box::new(fork)));
        }
    }

    /// Of a log whose rows are to be fetched again only the head is left here. If it is its writer that goes on below that, in
    /// a life that has heard of no other, it must see it, or nobody who was that far ever takes its rows.
    fn show_reached(&mut self, to: &Addr, told: &Head) {
        let reached = self.catalogue.reached(told.is.id).filter(|head| head.is.epoch == told.is.epoch && head.at() > told.at());
        if let Some(head) = reached.cloned() {
            let certificate = self.catalogue.certificate(head.is.id).cloned();
            self.stream(to.clone(), &Message::Batches(vec![bare(certificate, head)]));
        }
    }

    // ---- too early

    /// A head without its rows waits for nothing that is still on its way: the first who tells it is asked at once.
    fn ask_for_bare(&mut self, from: &Addr, batch: &Batch) {
        let is = &batch.head.is;
        let soon_ms = self.now_ms.saturating_sub(self.config.hold_ms);
        let is_asked = self.pushes.asked.values().any(|asked| asked.get(&is.id).is_some_and(|(at_ms, _)| *at_ms > soon_ms));
        if is_bare(batch) && !is_asked {
            let seq = self.catalogue.log(is.id).filter(|log| log.head.is.epoch == is.epoch).map_or(0, |log| log.head.is.seq);
            let after = if is.floor > seq { Cursor::START } else { Cursor::after(seq) };
            self.want(from, Wanted { id: is.id, epoch: is.epoch, after });
        }
    }

    fn hold(&mut self, from: &Addr, batch: Batch) {
        // What waits is as short as a datagram, whoever sends it how: of more only the head is kept.
        let after = Cursor::after(batch.head.is.seq);
        let batch = if batch.length() > MAX_DATAGRAM_BYTES { Batch { rows: vec![], after, ..batch } } else { batch };
        let held = &self.pushes.held;
        let of_it = held.iter().filter(|held| held.from == *from).count();
        let oldest = held.iter().position(|held| of_it < MAX_HELD_A_PEER || held.from == *from);
        if let Some(oldest) = oldest.filter(|_| of_it >= MAX_HELD_A_PEER || held.len() >= MAX_HELD) {
            self.pushes.held.remove(oldest);
            self.counters.dropped_held += 1;
        }
        let until_ms = self.now_ms + self.config.hold_ms;
        self.pushes.held.push(Held { batch, from: from.clone(), until_ms });
    }

    /// A log has moved on: what waited for that is taken in its order, the rest goes on waiting.
    fn try_held(&mut self, id: OriginId) {
        if self.pushes.is_trying {
            return; // taking one comes back here: the loop below goes on with the others
        }
        let (mut of_it, others): (Vec<Held>, Vec<Held>) =
            std::mem::take(&mut self.pushes.held).into_iter().partition(|held| held.batch.head.is.id == id);
        self.pushes.held = others;
        of_it.sort_by_key(|held| (held.batch.head.is.epoch, held.batch.head.is.seq));
        self.pushes.is_trying = true;
        for held in of_it {
            let at = self.catalogue.log(id).map_or((0, 0), |log| (log.head.is.epoch, log.head.is.seq));
            let is = &held.batch.head.is;
            if held.batch.after.seq <= at.1 && (is.epoch, is.seq) > at {
                self.receive_batch(&held.from, held.batch, Route::Push);
            } else if (is.epoch, is.seq) > at {
                self.pushes.held.push(held);
            }
        }
        self.pushes.is_trying = false;
    }

    pub(crate) fn tick_held(&mut self) {
        let now_ms = self.now_ms;
        let held = std::mem::take(&mut self.pushes.held);
        let (due, mut others): (Vec<Held>, Vec<Held>) = held.into_iter().partition(|held| held.until_ms <= now_ms);
        let (waiting, due): (Vec<Held>, Vec<Held>) = due.into_iter().partition(|held| self.is_fetching(held.batch.head.is.id));
        others.extend(waiting.into_iter().map(|held| Held { until_ms: now_ms + self.config.hold_ms, ..held }));
        self.pushes.held = others;
        for held in due {
            let is = &held.batch.head.is;
            let log = self.catalogue.log(is.id).filter(|log| log.head.is.epoch == is.epoch);
            let seq = log.map_or(0, |log| log.head.is.seq);
            if seq < is.seq {
                let after = if is.floor > seq { Cursor::START } else { Cursor::after(seq) };
                self.want(&held.from, Wanted { id: is.id, epoch: is.epoch, after });
            }
        }
        self.pushes.transfers.forget(now_ms);
        self.pushes.asked.retain(|_, asked| {
            asked.retain(|_, (at, _)| now_ms.saturating_sub(*at) < ASK_AGAIN_MS);
            !asked.is_empty()
        });
    }

    // ---- asking and giving

    /// A peer was asked for much of the log, and it comes.
    pub(crate) fn is_fetching(&self, id: OriginId) -> bool {
        self.pushes.transfers.is_on_its_way(id, self.now_ms)
    }

    /// What a peer lacks and has not asked for: of more than a message holds only the head, so that it asks, and asks one.
    pub(crate) fn offer(&mut self, to: &Addr, wanted: Wanted) {
        let log = self.catalogue.log(wanted.id).filter(|_| self.catalogue.fork(wanted.id).is_none());
        match log.filter(|log| log.rows_after(&begin_of(log, &wanted), MAX_CHUNK_BYTES).1.is_some()) {
            None => self.give(to, wanted),
            Some(log) => {
                let told = bare(Some(log.certificate.clone()), log.head.clone());
                self.stream(to.clone(), &Message::Batches(vec![told]));
            }
        }
    }

    pub(crate) fn want(&mut self, from: &Addr, wanted: Wanted) {
        if self.is_fetching(wanted.id) {
            return;
        }
        let staged = self.pushes.staged.get(&(wanted.id, from.clone())).filter(|stage| stage.epoch == wanted.epoch && !stage.rows.is_empty());
        let wanted = staged.map_or(wanted.clone(), |stage| Wanted { after: stage.cursor.clone(), ..wanted });
        self.ask(from, wanted);
    }

    fn ask(&mut self, from: &Addr, wanted: Wanted) {
        let (id, now_ms) = (wanted.id, self.now_ms);
        let of_it = self.pushes.asked.entry(from.clone()).or_default();
        if of_it.len() >= MAX_ASKED_A_PEER && !of_it.contains_key(&id) {
            return;
        }
        let asked = of_it.entry(id).or_insert((0, Cursor { seq: u64::MAX, key: None }));
        if asked.1 == wanted.after && asked.0 + ASK_AGAIN_MS > now_ms {
            return;
        }
        *asked = (now_ms, wanted.after.clone());
        if self.pushes.transfers.is_known(id) || self.is_far_behind(id) {
            self.pushes.transfers.asked(id, from, now_ms);
        }
        let wants = self.wants.entry(from.clone()).or_default();
        if wants.len() < crate::message::MAX_ENTRIES {
            wants.push(wanted);
        }
    }

    /// By a head that its writer has signed.
    fn is_far_behind(&self, id: OriginId) -> bool {
        let log = self.catalogue.log(id).map(|log| (log.head.is.epoch, log.head.is.seq));
        let lag = |epoch, seq: u64| log.filter(|(held, _)| *held == epoch).map_or(seq, |(_, held)| seq.saturating_sub(held));
        self.syncs.behind(id).is_some_and(|behind| lag(behind.epoch, behind.seq) > FAR_BEHIND)
    }

    pub(crate) fn give(&mut self, to: &Addr, wanted: Wanted) {
        if let Some(fork) = self.catalogue.fork(wanted.id) {
            let fork = fork.clone();
            return self.stream(to.clone(), &Message::Fork(Box::new(fork)));
        }
        let Some(log) = self.catalogue.log(wanted.id) else { return };
        let mut after = begin_of(log, &wanted);
        let certificate = log.certificate.clone();
        if self.pushes.given_bytes > MAX_GIVEN_BYTES {
            return; // it asks again
        }
        for part in 1..=PARTS_A_WANT {
            let Some(log) = self.catalogue.log(wanted.id) else { return };
            let (rows, next) = log.rows_after(&after, MAX_CHUNK_BYTES - 1_024);
            let more = match next {
                None => More::Last,
                Some(_) if part == PARTS_A_WANT => More::Ask,
                Some(_) => More::Follows,
            };
            let batch = Batch { certificate: Some(certificate.clone()), head: log.head.clone(), after, rows, more };
            self.pushes.given_bytes += batch.length();
            self.gives.entry(to.clone()).or_default().push(batch);
            let Some(next) = next else { return };
            after = next;
        }
    }

    /// As many batches in a message as a chunk holds.
    pub(crate) fn send_batches(&mut self, to: Addr, batches: Vec<Batch>) {
        let given = batches.iter().filter(|batch| batch.more == More::Last);
        let heard: Vec<Beat> = given.filter_map(|batch| self.beat_of(batch.head.is.id)).collect();
        let (mut chunk, mut bytes) = (vec![], 0);
        for batch in batches {
            let length = batch.length();
            if bytes + length > MAX_CHUNK_BYTES && !chunk.is_empty() {
                self.stream(to.clone(), &Message::Batches(std::mem::take(&mut chunk)));
                bytes = 0;
            }
            bytes += length;
            chunk.push(batch);
        }
        self.stream(to.clone(), &Message::Batches(chunk));
        for heard in heard.chunks(MAX_BEATS) {
            self.stream(to.clone(), &Message::Heard(heard.to_vec()));
        }
    }

    fn datagram_of_batches(&mut self, to: Addr, count: u64, batches: &[u8]) {
        let mut bytes = Message::push_prefix(count);
        bytes.extend_from_slice(batches);
        self.output(crate::Output::Datagram { to, bytes });
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Route {
    /// To be told to others.
    Push,
    /// Asked for, or found by comparing.
    Repair,
}

/// A head without its rows says that there is something to ask for.
fn bare(certificate: Option<Certificate>, head: Head) -> Batch {
    Batch { after: Cursor::after(head.is.seq), ..stage_of(certificate, head) }
}

fn is_bare(batch: &Batch) -> bool {
    batch.rows.is_empty() && batch.after == Cursor::after(batch.head.is.seq)
}

/// Where what is given begins: who is below the floor, or in another epoch, gets the whole.
fn begin_of(log: &Log, wanted: &Wanted) -> Cursor {
    let is_below = wanted.after.key.is_none() && wanted.after.seq < log.head.is.floor;
    if log.head.is.epoch != wanted.epoch || is_below { Cursor::START } else { wanted.after.clone() }
}

fn stage_of(certificate: Option<crate::Certificate>, head: crate::Head) -> Batch {
    Batch { certificate, head, after: Cursor::START, rows: vec![], more: More::Last }
}
