//! Links between processes: late, lossy, one-way, cut, and sometimes wrong about a byte.

use crate::rng::Rng;
use std::collections::{BTreeMap, BTreeSet};

pub type At = usize;

/// The kind of a membership message on the wire.
const MEMBERS: u8 = 5;

pub struct Message {
    pub from: At,
    pub to: At,
    pub is_stream: bool,
    pub bytes: Vec<u8>,
}

#[derive(Default)]
pub struct Network {
    under_way: BTreeMap<(u64, u64), Message>,
    number: u64,
    /// From, to: nothing comes through.
    cut: BTreeSet<(At, At)>,
    pub calm: bool,
}

impl Network {
    pub fn cut(&mut self, from: At, to: At) {
        self.cut.insert((from, to));
    }

    pub fn heal(&mut self) {
        self.cut.clear();
    }

    pub fn send(&mut self, rng: &mut Rng, now_ms: u64, message: Message, far: bool) {
        let lost = match (self.calm, message.is_stream) {
            (true, _) => 1,
            (false, true) => 3,
            (false, false) => 8,
        };
        if self.cut.contains(&(message.from, message.to)) || rng.percent(lost) {
            return;
        }
        let copies = if !self.calm && rng.percent(5) { 2 } else { 1 };
        for _ in 0..copies {
            let mut delay_ms = if far { rng.between(40, 80) } else { rng.between(1, 4) };
            if !self.calm && rng.percent(10) {
                delay_ms += rng.below(300);
            }
            let mut bytes = message.bytes.clone();
            // Membership has no signatures of its own: it relies on the transport's.
            if !self.calm && rng.percent(2) && bytes.get(1) != Some(&MEMBERS) {
                corrupt(rng, &mut bytes);
            }
            self.number += 1;
            self.under_way.insert((now_ms + delay_ms, self.number), Message { bytes, ..message });
        }
    }

    pub fn next_ms(&self) -> u64 {
        self.under_way.first_key_value().map_or(u64::MAX, |((at, _), _)| *at)
    }

    pub fn arrive(&mut self, now_ms: u64) -> Option<Message> {
        let first = self.under_way.first_entry().filter(|first| first.key().0 <= now_ms)?;
        Some(first.remove())
    }
}

fn corrupt(rng: &mut Rng, bytes: &mut Vec<u8>) {
    let at = rng.below(bytes.len() as u64) as usize;
    match rng.below(3) {
        0 => bytes[at] ^= 1 << rng.below(8),
        1 => bytes.truncate(at),
        _ => bytes.insert(at, rng.draw() as u8),
    }
}
