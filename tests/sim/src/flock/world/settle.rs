//! The last trouble is over: what must be true then, and what an hour of quiet must look like.

use super::{CONTROLS, HOSTS, World, topic};
use crate::flock::checks::equal;
use dunlin_gossip::{Certificate, Change, Input, Key, OriginId, Scope, Subject};
use std::collections::BTreeSet;

/// Members find each other again, older lives are probed, logs converge.
const CALM_MS: u64 = 60_000;
/// A change is in the whole region by push, not by the next comparison.
const PUSH_MS: u64 = 40;
const DEAD_MS: u64 = 30_000;
/// By so much the clock of the dead may have been ahead of a reader's.
const REPLAY_MARGIN_MS: u64 = 180_000;
/// More than a chain of beats.
const FAST_MS: i64 = 1_200_000;

impl World {
    pub fn settle(&mut self) {
        self.tell(|| "the trouble is over".into());
        self.network.heal();
        self.network.calm = true;
        self.healed_at_ms = self.now_ms;
        for at in 0..self.processes.len() {
            if self.processes[at].node.is_none() && !self.processes[at].silenced {
                self.restart(at);
            }
        }
        self.pass(CALM_MS);
        self.one_speaks();
        self.end_quarantine();
        // By now both control processes say the newest revision.
        for control in CONTROLS {
            self.processes[control].published_revision = 0;
            self.publish_store_at(control);
        }
        self.pass(20_000);
        let checks = [Self::converged, Self::members_agree, Self::pushed, Self::subscription_ends, Self::the_dead_grow_old, Self::config_outlives_a_fast_clock];
        for check in checks {
            if self.checks.broken.is_none() {
                check(self);
            }
        }
    }

    /// Of one identity at most one process speaks; the others know that they are duplicates.
    fn one_speaks(&mut self) {
        for host in 0..HOSTS {
            let id = self.hosts[host].id;
            // Of a quarantined identity nobody takes anything any more, whoever speaks.
            if self.processes.iter().any(|process| process.node.as_ref().is_some_and(|node| node.catalogue().fork(id).is_some())) {
                continue;
            }
            let speaks = |at: &usize| self.processes[*at].host == host && self.processes[*at].node.as_ref().is_some_and(|node| node.speaks());
            let speaking: Vec<usize> = (0..self.processes.len()).filter(speaks).collect();
            if speaking.len() != 1 {
                self.checks.fail(|| format!("of host {host} the processes {speaking:?} speak; there should be one"));
            }
        }
    }

    /// Whoever holds a quarantined log knows that it is; then the cluster certifies a new epoch, and the host goes on.
    fn end_quarantine(&mut self) {
        for host in 0..HOSTS {
            let id = self.hosts[host].id;
            let up: Vec<usize> = (0..self.processes.len()).filter(|at| self.processes[*at].is_up()).collect();
            let knows = |at: &&usize| self.processes[**at].node.as_ref().is_some_and(|node| node.catalogue().fork(id).is_some());
            let near = |at: &&usize| self.processes[**at].host % 2 == host % 2;
            let in_region = up.iter().filter(near).filter(knows).count();
            if in_region == 0 && !(self.forked && self.checks.in_two_hands.len() == 1 && self.checks.in_two_hands.contains(&id) && self.contradicted(id)) {
                continue;
            }
            if in_region != up.iter().filter(near).count() {
                self.checks.fail(|| format!("host {host} contradicted itself, and {in_region} of its region know"));
            }
            let speaks = |at: &usize| self.processes[*at].host == host && self.processes[*at].node.as_ref().is_some_and(|node| node.speaks());
            let Some(at) = (0..self.processes.len()).find(speaks) else { continue };
            let old = &self.hosts[host].certificate;
            let subject = Subject { name: old.name.clone(), epoch: old.epoch + 1, key: old.key, region: old.region.clone(), scope: Scope::Region };
            let certificate = Certificate::issue(&self.cluster, &subject);
            self.hosts[host].certificate = certificate.clone();
            let certificate = Box::new(certificate);
            self.tell(|| format!("host {host} gets epoch {}", subject.epoch));
            let key = Box::new(self.hosts[host].key.clone());
            self.handle(at, Input::Own { certificate, key });
            self.publish_all(at);
        }
    }

    /// Some reader was given the second head while it held the first.
    fn contradicted(&self, id: OriginId) -> bool {
        let host = self.hosts.iter().position(|host| host.id == id).expect("it is one of them");
        let near = self.processes.iter().filter(|process| process.host % 2 == host % 2);
        let logs = near.filter_map(|process| process.node.as_ref()?.catalogue().log(id));
        let digests: BTreeSet<([u8; 32], u64)> = logs.map(|log| (log.head.is.digest, log.head.is.seq)).collect();
        digests.iter().any(|(digest, seq)| digests.iter().any(|(other, at)| at == seq && other != digest))
    }

    fn publish_all(&mut self, at: usize) {
        let changes = self.processes[at].facts.iter();
        let changes = changes.map(|(key, value)| Change { key: key.clone(), value: Some((topic(), value.clone())), seq: None }).collect();
        let origin = self.hosts[self.processes[at].host].id;
        self.handle(at, Input::Publish { origin, schema: 1, changes, at: None });
    }

    /// Everybody has what each writer has, and that is what its owner wants. Nothing was lost because a row was missing.
    fn converged(&mut self) {
        for writer in 0..self.processes.len() {
            let Some(node) = self.processes[writer].node.as_ref().filter(|node| node.speaks()) else { continue };
            let host = self.processes[writer].host;
            let id = self.hosts[host].id;
            let Some(truth) = node.catalogue().log(id) else {
                return self.checks.fail(|| format!("process {writer} speaks and has published nothing"));
            };
            let live: Vec<(&[u8], Vec<u8>)> =
                truth.rows().filter(|row| !row.is_dead()).map(|row| (row.key(), row.body().map(|body| body.value.to_vec()).unwrap_or_default())).collect();
            let wanted: Vec<(&[u8], Vec<u8>)> = self.processes[writer].facts.iter().map(|(key, value)| (key.as_bytes(), value.clone())).collect();
            if live != wanted {
                return self.checks.fail(|| format!("host {host} has {} facts and publishes {} rows", wanted.len(), live.len()));
            }
            let readers = (0..self.processes.len()).filter(|at| self.processes[*at].is_up() && self.processes[*at].host % 2 == host % 2);
            let wrong = |at: &usize| {
                let catalogue = self.processes[*at].node.as_ref().map(|node| node.catalogue());
                !catalogue.and_then(|catalogue| catalogue.log(id)).is_some_and(|log| equal(log, truth))
            };
            if let Some(reader) = readers.into_iter().find(wrong) {
                let has = self.processes[reader].node.as_ref().and_then(|node| node.status(id));
                let truth = truth.head.at();
                return self.checks.fail(|| format!("process {reader} has {has:?} of host {host}, which is at {truth:?}"));
            }
        }
        self.config_converged();
    }

    /// Config is one for all, whoever published it.
    fn config_converged(&mut self) {
        if self.store.revision == 0 {
            return;
        }
        for at in 0..self.processes.len() {
            let Some(node) = self.processes[at].node.as_ref().filter(|_| !self.processes[at].silenced) else { continue };
            let log = node.catalogue().log(self.config.id);
            let rows = log.map(|log| log.rows().map(|row| (row.key_of_its_own(), row.seq())).collect::<Vec<_>>()).unwrap_or_default();
            let wanted: Vec<(Key, u64)> = self.store.rows.iter().map(|(key, (_, revision))| (key.clone(), *revision)).collect();
            let seq = log.map(|log| log.head.is.seq);
            if seq != Some(self.store.revision) || rows != wanted {
                let revision = self.store.revision;
                return self.checks.fail(|| format!("process {at} has config at {seq:?}, the store is at {revision}"));
            }
            if let Some(unsound) = node.verify().first() {
                return self.checks.fail(|| format!("process {at}: {unsound:?} is not what its head signs"));
            }
        }
    }

    /// Everybody is everybody's member.
    fn members_agree(&mut self) {
        for at in 0..self.processes.len() {
            let Some(node) = self.processes[at].node.as_ref().filter(|node| node.speaks()) else { continue };
            let members = node.members().count();
            if members != HOSTS - 1 {
                self.checks.fail(|| format!("process {at} knows {members} members, {} should answer", HOSTS - 1));
            }
        }
    }

    /// A change is everywhere in its region long before anybody compares; most of the time, since a push may be lost.
    fn pushed(&mut self) {
        let mut late = 0;
        for round in 0..6 {
            let at = round % HOSTS;
            let host = self.processes[at].host;
            if !self.processes[at].is_up() {
                continue;
            }
            self.change(at);
            self.pass(PUSH_MS);
            let id = self.hosts[host].id;
            let seq = |at: usize| self.processes[at].node.as_ref().and_then(|node| node.catalogue().log(id)).map(|log| log.head.is.seq);
            let readers = (0..HOSTS).filter(|reader| reader % 2 == host % 2 && self.processes[*reader].is_up());
            late += usize::from(readers.into_iter().any(|reader| seq(reader) != seq(at)));
        }
        if late > 3 {
            self.checks.fail(|| format!("{late} of 6 changes were not in their region within {PUSH_MS} ms"));
        }
    }

    /// Detail of another region is current while it is used, and gone after ten idle minutes.
    fn subscription_ends(&mut self) {
        let Some((at, region, topic)) = self.subscribed.clone().filter(|(at, ..)| *at != super::LIAR && self.processes[*at].is_up()) else { return };
        self.handle(at, Input::Use { region: region.clone(), topic });
        self.pass(8_000);
        for host in 0..HOSTS {
            let id = self.hosts[host].id;
            let writer = (0..self.processes.len()).find(|at| self.processes[*at].host == host && self.processes[*at].is_up());
            let Some(writer) = writer.filter(|_| self.hosts[host].certificate.region == region) else { continue };
            let log = |at: usize| self.processes[at].node.as_ref().and_then(|node| node.catalogue().log(id));
            let (Some(truth), held) = (log(writer), log(at)) else { continue };
            if !truth.is_empty() && truth.rows().any(|row| !row.is_dead()) && !held.is_some_and(|held| equal(held, truth)) {
                self.checks.fail(|| format!("process {at} subscribed to {region} and does not have host {host} as it is"));
            }
        }
        if !self.rng.percent(10) && self.bug != Some(dunlin_gossip::planted::Bug::SubscribeForEver) {
            return; // ten minutes are long
        }
        self.pass(dunlin_gossip::IDLE_MS + 10_000);
        let held = self.processes[at].node.as_ref().map_or(0, |node| node.catalogue().of_region(&region).count());
        if held > 0 {
            self.checks.fail(|| format!("process {at} still holds {held} logs of {region}, ten minutes after it used them"));
        }
    }

    /// The age of what a dead host wrote says so, whatever is repeated to whom; the living stay fresh.
    fn the_dead_grow_old(&mut self) {
        let victim = 2 + self.rng.below(HOSTS as u64 - 2) as usize;
        let host = self.processes[victim].host;
        self.tell(|| format!("process {victim} is ended for good"));
        for at in 0..self.processes.len() {
            if self.processes[at].host == host {
                self.processes[at].node = None;
            }
        }
        self.restarts.clear();
        // Whoever starts only now and fetches what the dead has left is not told that it lives. While the liar repeats what it
        // once said, that is so after the time that a replay may have.
        let lies_on = self.rng.percent(10);
        self.pass(if lies_on { dunlin_gossip::MAX_SKEW_MS + REPLAY_MARGIN_MS } else { DEAD_MS / 2 });
        self.liar.rests = !lies_on;
        let starts = |at: &usize| self.processes[*at].is_up() && *at != super::LIAR && !self.checks.in_two_hands.contains(&self.hosts[self.processes[*at].host].id);
        let readers: Vec<usize> = (0..HOSTS).filter(|at| at % 2 == host % 2).filter(starts).collect();
        if let Some(reader) = self.rng.pick(&readers) {
            self.keep_snapshot(reader);
            self.processes[reader].node = None;
            let kept = self.processes[reader].disk.len() - 1;
            let snapshot = self.rng.percent(50).then_some(kept);
            self.start(reader, snapshot);
        }
        self.pass(DEAD_MS / 2);
        for at in 0..self.processes.len() {
            let Some(node) = self.processes[at].node.as_ref().filter(|_| !self.processes[at].silenced) else { continue };
            for other in (0..HOSTS).filter(|other| other % 2 == self.processes[at].host % 2) {
                let age_ms = node.status(self.hosts[other].id).and_then(|status| status.age_ms);
                let is_fresh = age_ms.is_some_and(|age_ms| age_ms < DEAD_MS - 10_000);
                if is_fresh == (other == host) {
                    return self.checks.fail(|| format!("process {at} says that host {other} is {age_ms:?} ms old; host {host} has been dead for {DEAD_MS}"));
                }
            }
            if node.members().any(|peer| peer.id == self.hosts[host].id) {
                self.checks.fail(|| format!("process {at} still calls the dead host {host} a member"));
            }
        }
    }

    /// The control process whose clock is ahead signs config and dies; the other one goes on beating for it.
    fn config_outlives_a_fast_clock(&mut self) {
        let [fast, other] = CONTROLS;
        if !self.processes[fast].is_up() || !self.processes[other].is_up() {
            return;
        }
        self.processes[fast].skew_ms += FAST_MS;
        self.change_store();
        self.publish_store_at(fast);
        self.pass(5_000);
        self.publish_store_at(other);
        self.tell(|| format!("process {fast}, whose clock is ahead, is ended for good"));
        self.processes[fast].node = None;
        self.pass(DEAD_MS);
        for at in 0..self.processes.len() {
            let Some(node) = self.processes[at].node.as_ref().filter(|_| self.processes[at].is_up()) else { continue };
            let age_ms = node.status(self.config.id).and_then(|status| status.age_ms);
            if age_ms.is_none_or(|age_ms| age_ms > DEAD_MS - 10_000) {
                return self.checks.fail(|| format!("process {at} says that config is {age_ms:?} ms old, though process {other} publishes it"));
            }
        }
    }
}
