//! A node that is sent anything: it keeps its bounds, and never shows a row that no certified writer signed.
//!
//! The input is a row of messages, each after two bytes of length and one that says how it comes.
#![no_main]

use dunlin_gossip::{Addr, Certificate, Config, Identity, Input, Name, Node, Now, Output, Region, Row, Scope, Subject};
use ed25519_dalek::SigningKey;
use libfuzzer_sys::fuzz_target;

const MAX_MESSAGES: usize = 64;

fn node() -> Node {
    let (cluster, key) = (SigningKey::from_bytes(&[1; 32]), SigningKey::from_bytes(&[1; 32]));
    let (name, region) = (Name::new("host/w1").unwrap(), Region::new("fra").unwrap());
    let subject = Subject { name, epoch: 1, key: key.verifying_key(), region, scope: Scope::Region };
    let certificate = Certificate::issue(&cluster, &subject);
    let config = Config { cluster: cluster.verifying_key(), seed: 7, peers: vec![], membership: true, hold_ms: 50 };
    let identity = Identity { certificate, key, addr: Addr::new("10.0.0.1:7373").unwrap(), life: 9 };
    let mut node = Node::new(config, identity, None, Now { ms: 0, wall_ms: 0 });
    node.handle(Input::Tick, Now { ms: 0, wall_ms: 0 });
    node
}

fuzz_target!(|bytes: &[u8]| {
    let mut node = node();
    let mut rest = bytes;
    for n in 0..MAX_MESSAGES as u64 {
        let [low, high, how, after @ ..] = rest else { break };
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(after.len());
        let (message, next) = after.split_at(length);
        rest = next;
        let from = Addr::new(format!("10.0.0.{}:7373", how % 4 + 2)).unwrap();
        let bytes = message.to_vec();
        let input = if how & 128 == 0 { Input::Datagram { from, bytes } } else { Input::Stream { from, bytes } };
        let now = Now { ms: n * 40, wall_ms: n * 40 };
        for output in node.handle(input, now) {
            // The one other writer that the cluster has certified has said this and nothing else: see examples/gossip_seeds.rs.
            if let Output::Changed { rows, .. } = output {
                let is_signed = |row: &Row| row.is_dead() || row.body().is_some_and(|body| body.value == b"started");
                assert!(rows.iter().all(is_signed), "rows that nobody signed were shown");
            }
        }
        node.handle(Input::Tick, now);
    }
    assert!(node.verify().is_empty());
});
