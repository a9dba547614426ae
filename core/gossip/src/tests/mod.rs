//! What only the inside can show: limits that a stranger cannot reach in a fast test, and what is kept between messages.

mod ages;
mod greed;
mod lives;
mod logs;
mod pushes;
mod regions;

use crate::*;
use ed25519_dalek::SigningKey;

pub struct Writer {
    pub certificate: Certificate,
    pub key: SigningKey,
}

pub fn cluster() -> SigningKey {
    SigningKey::from_bytes(&[1; 32])
}

pub fn writer(name: &str, epoch: u32, (region, scope): (&str, Scope)) -> Writer {
    let key = SigningKey::from_bytes(blake3::hash(name.as_bytes()).as_bytes());
    let (name, region) = (Name::new(name).unwrap(), Region::new(region).unwrap());
    let subject = Subject { name, epoch, key: key.verifying_key(), region, scope };
    Writer { certificate: Certificate::issue(&cluster(), &subject), key }
}

pub fn row(key: &str, seq: u64, value: &[u8]) -> Row {
    Row::live(Key::new(key).unwrap(), seq, &Topic::new("shop").unwrap(), value).unwrap()
}

pub const RECEIPT: Receipt = Receipt { now_ms: 1, clock_ms: 1_000, fetched: false };

pub fn addr(name: &str) -> Addr {
    Addr::new(name).unwrap()
}

/// A node of `fra` that speaks, because it knows nobody.
pub fn node() -> Node {
    let mut node = node_of(vec![], None);
    node.handle(Input::Tick, at(0));
    node
}

pub fn node_of(peers: Vec<Peer>, snapshot: Option<Snapshot>) -> Node {
    let Writer { certificate, key } = writer("host/me", 1, ("fra", Scope::Region));
    let config = Config { cluster: cluster().verifying_key(), seed: 1, peers, membership: true, hold_ms: 50 };
    Node::new(config, Identity { certificate, key, addr: addr("me"), life: 1 }, snapshot, at(0))
}

pub fn peer(name: &str) -> Peer {
    let certificate = writer(name, 1, ("fra", Scope::Region)).certificate;
    Peer { id: certificate.id, region: certificate.region, addr: addr(name), life: 5, started_ms: 1, renewed: 0 }
}

/// The wall's clock begins at one second, which is what heads are signed at here.
pub fn at(ms: u64) -> Now {
    Now { ms, wall_ms: 1_000 + ms }
}

pub fn stream(from: &str, message: &Message) -> Input {
    Input::Stream { from: addr(from), bytes: message.encode() }
}

/// What is sent to `to`.
pub fn sent(outputs: &[Output], to: &str) -> Vec<Message> {
    let bytes = outputs.iter().filter_map(|output| match output {
        Output::Stream { to: at, bytes } | Output::Datagram { to: at, bytes } if *at == addr(to) => Some(bytes),
        _ => None,
    });
    bytes.filter_map(|bytes| Message::decode(bytes).unwrap()).collect()
}

impl Writer {
    pub fn head(&self, seq: u64, rows: &[Row]) -> Head {
        self.head_at(seq, 1_000, rows)
    }

    pub fn head_at(&self, seq: u64, time_ms: u64, rows: &[Row]) -> Head {
        let mut lanes = LtHash::default();
        rows.iter().for_each(|row| lanes.add(row.raw()));
        let chain = (time_ms / CHAIN_MS) as u32;
        let (id, epoch) = (self.certificate.id, self.certificate.epoch);
        let is = Statement { id, epoch, seq, floor: 0, digest: lanes.digest(), schema: 1, time_ms, life: 9, chain, anchor: [0; 16] };
        Head::sign(&self.key, is)
    }

    /// The last of `rows`, which are the whole, on top of what was before it.
    pub fn step(&self, rows: &[Row]) -> Batch {
        let [before @ .., last] = rows else { panic!("a step has a row") };
        let after = Cursor::after(before.last().map_or(0, Row::seq));
        Batch { after, rows: vec![last.clone()], ..self.whole(last.seq(), rows) }
    }

    /// The whole of the log.
    pub fn whole(&self, seq: u64, rows: &[Row]) -> Batch {
        let (certificate, head) = (Some(self.certificate.clone()), self.head(seq, rows));
        Batch { certificate, head, after: Cursor::START, rows: rows.to_vec(), more: More::Last }
    }
}
