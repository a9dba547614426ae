//! Very many hosts on a network that works: how fast a change is everywhere, and what it costs.
//!
//! Real nodes, so memory decides what fits: every host holds the global logs (three summaries a region, sixteen shards of
//! config); the hosts of the first region also hold each other's detail, as all would in life. Peers are a fixed sample
//! instead of membership, and signatures, which cost time but no bytes, are not checked.

use super::world::{Host, host};
use crate::rng::Rng;
use dunlin_gossip::planted::{Bug, plant};
use dunlin_gossip::{Addr, Change, Config, Identity, Input, Key, Node, Now, OriginId, Output, Peer, Region, Scope, Topic};
use ed25519_dalek::SigningKey;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::fmt::Write;

const REPORTERS: usize = 3;
const SHARDS: usize = 16;
const PEERS_NEAR: usize = 80;
const PEERS_FAR: usize = 30;
const SETTLE_MS: u64 = 12_000;
const IDLE_MS: u64 = 10_000;
const CHANGES: usize = 20;
/// A wake of that host, as before, is a message without bytes.
const WAKE: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
pub struct Scale {
    pub hosts: usize,
    pub regions: usize,
}

struct Flock {
    scale: Scale,
    nodes: Vec<Node>,
    rng: Rng,
    now_ms: u64,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    messages: BTreeMap<u64, (u32, u32, Vec<u8>)>,
    number: u64,
    wakes: Vec<u64>,
    /// One way between regions.
    far_ms: Vec<u64>,
    /// By kind of message: how many, bytes.
    sent: BTreeMap<u8, (u64, u64)>,
    sent_in_first: u64,
    largest: u64,
    watched: Option<(OriginId, u64)>,
    arrivals: Vec<u64>,
}

pub fn measure(scale: Scale) -> String {
    plant(Some(Bug::TrustHeads));
    let mut out = String::new();
    let before = resident_bytes();
    let (mut flock, hosts) = Flock::new(scale);
    let cluster = SigningKey::from_bytes(&[1; 32]);
    let first = scale.hosts / scale.regions;
    let global: Vec<(usize, Host)> = (0..scale.regions * REPORTERS + SHARDS)
        .map(|n| {
            let at = if n < scale.regions * REPORTERS { n / REPORTERS * first + n % REPORTERS } else { n % first };
            (at, host(&cluster, &format!("global/{n}"), 200, (region(0), Scope::Global)))
        })
        .collect();
    for (at, origin) in &global {
        flock.handle(*at, Input::Own { certificate: origin.certificate.clone().into(), key: origin.key.clone().into() });
    }
    flock.pass(2_000);
    for (n, (at, origin)) in global.iter().enumerate() {
        flock.publish(*at, origin.id, n, 400);
        flock.pass(10);
    }
    for (at, origin) in hosts.iter().enumerate().take(first) {
        flock.publish(at, origin.id, at, 200);
        flock.pass(10);
    }
    flock.pass(SETTLE_MS);
    let held = flock.nodes[0].catalogue().logs().count();
    let memory = (resident_bytes() - before) / scale.hosts as u64;
    let _ = writeln!(out, "{} hosts in {} regions; {held} logs at a host of the first region, {} elsewhere", scale.hosts, scale.regions, flock.nodes[first].catalogue().logs().count());
    let _ = writeln!(out, "memory: {} kB a host on average, {} MB in all", memory / 1000, (resident_bytes() - before) / 1_000_000);

    flock.count_anew();
    flock.pass(IDLE_MS);
    let idle = flock.sent_in_first as f64 / first as f64 / (IDLE_MS as f64 / 1e3);
    let _ = writeln!(out, "idle: {:.1} kB/s sent by a host of the first region ({first} hosts that each beat)", idle / 1e3);
    flock.tell_exchanges("idle", &mut out);

    flock.count_anew();
    let mut global_ms = vec![];
    for change in 0..CHANGES {
        let (at, origin) = &global[flock.rng.below(global.len() as u64) as usize];
        global_ms.extend(flock.watch(*at, origin.id, change, scale.hosts));
    }
    tell("a summary, to all hosts", &mut global_ms, CHANGES * scale.hosts, &mut out);
    let (count, bytes) = flock.sent.get(&1).copied().unwrap_or_default();
    let places = (CHANGES * scale.hosts) as f64;
    let _ = writeln!(out, "push: {:.2} messages, {:.0} bytes a change and host", count as f64 / places, bytes as f64 / places);
    flock.tell_exchanges("with changes", &mut out);

    let mut near_ms = vec![];
    for change in 0..CHANGES {
        let at = flock.rng.below(first as u64) as usize;
        near_ms.extend(flock.watch(at, hosts[at].id, change, first));
    }
    tell("detail, to its region", &mut near_ms, CHANGES * first, &mut out);
    plant(None);
    out
}

impl Flock {
    fn new(scale: Scale) -> (Self, Vec<Host>) {
        let cluster = SigningKey::from_bytes(&[1; 32]);
        let a_region = scale.hosts / scale.regions;
        let region_of = |at: usize| (at / a_region).min(scale.regions - 1);
        let regions: Vec<Region> = (0..scale.regions).map(region).collect();
        let hosts: Vec<Host> = (0..scale.hosts)
            .map(|at| host(&cluster, &format!("host/{at}"), 7, (regions[region_of(at)].clone(), Scope::Region)))
            .collect();
        let peers: Vec<Peer> = (0..scale.hosts)
            .map(|at| Peer { id: hosts[at].id, region: regions[region_of(at)].clone(), addr: addr(at), life: 1, started_ms: 0, renewed: 0 })
            .collect();
        let mut rng = Rng::new(7);
        // Median 64 ms one way, as measured between thirty regions: 129 ms there and back.
        let far_ms = (0..scale.regions * scale.regions).map(|_| rng.between(8, 120)).collect();
        let nodes = (0..scale.hosts)
            .map(|at| {
                let near = (0..PEERS_NEAR).map(|_| region_of(at) * a_region + rng.below(a_region as u64) as usize).collect::<Vec<_>>();
                let far = (0..PEERS_FAR).map(|_| rng.below(scale.hosts as u64) as usize).collect::<Vec<_>>();
                let chosen = near.into_iter().chain(far).filter(|other| *other != at).map(|other| peers[other].clone()).collect();
                let config = Config { cluster: cluster.verifying_key(), seed: rng.draw(), peers: chosen, membership: false, hold_ms: 150 };
                let identity = Identity { certificate: hosts[at].certificate.clone(), key: hosts[at].key.clone(), addr: addr(at), life: 1 };
                Node::new(config, identity, None, now(0))
            })
            .collect();
        let flock = Self {
            scale,
            nodes,
            rng,
            now_ms: 0,
            queue: (0..scale.hosts as u64).map(|at| Reverse((at % 200, at))).collect(),
            messages: (0..scale.hosts as u64).map(|at| (at, (at as u32, WAKE, vec![]))).collect(),
            number: scale.hosts as u64,
            wakes: vec![0; scale.hosts],
            far_ms,
            sent: BTreeMap::new(),
            sent_in_first: 0,
            largest: 0,
            watched: None,
            arrivals: vec![],
        };
        (flock, hosts)
    }

    fn handle(&mut self, at: usize, input: Input) {
        let outputs = self.nodes[at].handle(input, now(self.now_ms));
        for output in outputs {
            match output {
                Output::Datagram { to, bytes } | Output::Stream { to, bytes } => self.send(at, &to, bytes),
                Output::Changed { origin, seq, .. } if self.watched.is_some_and(|(of, above)| of == origin && seq > above) => {
                    self.arrivals.push(self.now_ms);
                }
                Output::Changed { .. } | Output::Event(_) => {}
            }
        }
        let wake_ms = self.nodes[at].next_wake_ms();
        if wake_ms < self.wakes[at] || self.wakes[at] <= self.now_ms {
            self.wakes[at] = wake_ms;
            self.put(wake_ms, (at as u32, WAKE, vec![]));
        }
    }

    fn send(&mut self, from: usize, to: &Addr, bytes: Vec<u8>) {
        let to = u32::from_le_bytes(to.as_bytes().try_into().expect("four bytes"));
        let (count, sum) = self.sent.entry(bytes[1]).or_default();
        *count += 1;
        *sum += bytes.len() as u64;
        self.largest = self.largest.max(bytes.len() as u64);
        let a_region = self.scale.hosts / self.scale.regions;
        let of = |at: usize| (at / a_region).min(self.scale.regions - 1);
        if of(from) == 0 {
            self.sent_in_first += bytes.len() as u64;
        }
        let (low, high) = (of(from).min(of(to as usize)), of(from).max(of(to as usize)));
        let delay_ms = if low == high { 1 } else { self.far_ms[low * self.scale.regions + high] };
        self.put(self.now_ms + delay_ms, (to, from as u32, bytes));
    }

    fn put(&mut self, at_ms: u64, message: (u32, u32, Vec<u8>)) {
        self.number += 1;
        self.queue.push(Reverse((at_ms, self.number)));
        self.messages.insert(self.number, message);
    }

    fn pass(&mut self, ms: u64) {
        let until_ms = self.now_ms + ms;
        while let Some(Reverse((at_ms, number))) = self.queue.peek().copied().filter(|first| first.0.0 <= until_ms) {
            self.queue.pop();
            self.now_ms = at_ms.max(self.now_ms);
            let (to, from, bytes) = self.messages.remove(&number).expect("it is in the queue");
            match from {
                WAKE if self.nodes[to as usize].next_wake_ms() > self.now_ms && self.now_ms > 200 => {
                    // Something came in between and set another time.
                    let wake_ms = self.nodes[to as usize].next_wake_ms();
                    if self.wakes[to as usize] <= self.now_ms {
                        self.wakes[to as usize] = wake_ms;
                        self.put(wake_ms, (to, WAKE, vec![]));
                    }
                }
                WAKE => self.handle(to as usize, Input::Tick),
                from => self.handle(to as usize, Input::Datagram { from: addr(from as usize), bytes }),
            }
        }
        self.now_ms = until_ms;
    }

    fn publish(&mut self, at: usize, origin: OriginId, value: usize, bytes: usize) {
        let value = format!("{value}:{}", "x".repeat(bytes)).into_bytes();
        let change = Change { key: Key::new("m1").expect("short"), value: Some((Topic::new("shop").expect("short"), value)), seq: None };
        self.handle(at, Input::Publish { origin, schema: 1, changes: vec![change], at: None });
    }

    /// How long after its publication each of `hosts` has a change.
    fn watch(&mut self, at: usize, origin: OriginId, value: usize, hosts: usize) -> Vec<u64> {
        let seq = self.nodes[at].catalogue().log(origin).map_or(0, |log| log.head.is.seq);
        self.watched = Some((origin, seq));
        self.arrivals.clear();
        let began_ms = self.now_ms;
        self.publish(at, origin, value, 200);
        while self.arrivals.len() < hosts && self.now_ms < began_ms + 5_000 {
            self.pass(50);
        }
        self.pass(100);
        self.arrivals.iter().map(|at_ms| at_ms - began_ms).collect()
    }

    fn count_anew(&mut self) {
        self.sent.clear();
        (self.sent_in_first, self.largest) = (0, 0);
    }

    fn tell_exchanges(&self, when: &str, out: &mut String) {
        let kinds = [2, 3, 6, 7, 8, 9];
        let bytes: u64 = kinds.iter().filter_map(|kind| self.sent.get(kind)).map(|(_, bytes)| bytes).sum();
        let exchanges = self.sent.get(&2).map_or(0, |(count, _)| *count);
        let _ = writeln!(out, "exchanges, {when}: {} bytes each on average; the largest message had {} bytes", bytes / exchanges.max(1), self.largest);
    }
}

fn tell(what: &str, times_ms: &mut [u64], expected: usize, out: &mut String) {
    times_ms.sort_unstable();
    let at = |part: f64| times_ms.get(((times_ms.len() as f64 - 1.0) * part) as usize).copied().unwrap_or_default();
    let share = times_ms.len() as f64 * 100.0 / expected as f64;
    let _ = writeln!(out, "{what}: p50 {} ms, p99 {} ms, max {} ms; {share:.2} % had it within 5 s", at(0.5), at(0.99), at(1.0));
}

fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    text.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or_default() * 4096
}

fn now(ms: u64) -> Now {
    Now { ms, wall_ms: 1_790_000_000_000 + ms }
}

fn region(at: usize) -> Region {
    Region::new(format!("r{at}")).expect("short")
}

fn addr(at: usize) -> Addr {
    Addr::new((at as u32).to_le_bytes()).expect("short")
}
