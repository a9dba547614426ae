//! Writes what two nodes really say to each other as beginnings for the fuzz targets of gossip: `cargo run --example gossip_seeds`.

use dunlin_gossip::*;
use ed25519_dalek::SigningKey;
use std::collections::VecDeque;
use std::fs;

fn node(name: &str, n: u8, peers: Vec<Peer>) -> (Node, OriginId) {
    let (cluster, key) = (SigningKey::from_bytes(&[1; 32]), SigningKey::from_bytes(&[n; 32]));
    let (name, region) = (Name::new(name).unwrap(), Region::new("fra").unwrap());
    let subject = Subject { name, epoch: 1, key: key.verifying_key(), region, scope: Scope::Region };
    let certificate = Certificate::issue(&cluster, &subject);
    let origin = certificate.id;
    let config = Config { cluster: cluster.verifying_key(), seed: n.into(), peers, membership: true, hold_ms: 50 };
    let addr = Addr::new(format!("10.0.0.{n}:7373")).unwrap();
    (Node::new(config, Identity { certificate, key, addr, life: n.into() }, None, Now { ms: 0, wall_ms: 0 }), origin)
}

fn main() {
    let (first, _) = node("host/w1", 1, vec![]);
    let (second, origin) = node("host/w2", 3, vec![first.me().clone()]);
    let mut nodes = [first, second];
    let mut seen: Vec<(bool, Vec<u8>)> = vec![];
    for ms in (0..8_000).step_by(20) {
        let now = Now { ms, wall_ms: ms };
        let mut work: VecDeque<(usize, Input)> = VecDeque::from([(0, Input::Tick), (1, Input::Tick)]);
        if ms > 5_500 && ms % 500 == 0 {
            let value = (ms % 1_000 == 0).then(|| (Topic::new("shop").unwrap(), b"started".to_vec()));
            let changes = vec![Change { key: Key::new("m1").unwrap(), value, seq: None }];
            work.push_back((1, Input::Publish { origin, schema: 1, changes, at: None }));
        }
        while let Some((at, input)) = work.pop_front() {
            let from = nodes[at].me().addr.clone();
            for output in nodes[at].handle(input, now) {
                let (to, bytes, is_stream) = match output {
                    Output::Datagram { to, bytes } => (to, bytes, false),
                    Output::Stream { to, bytes } => (to, bytes, true),
                    _ => continue,
                };
                if at == 1 {
                    seen.push((is_stream, bytes.clone()));
                }
                let Some(next) = nodes.iter().position(|node| node.me().addr == to) else { continue };
                let from = from.clone();
                work.push_back((next, if is_stream { Input::Stream { from, bytes } } else { Input::Datagram { from, bytes } }));
            }
        }
    }
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/corpus");
    let mut kinds = std::collections::BTreeMap::<u8, usize>::new();
    for (_, bytes) in &seen {
        let count = kinds.entry(bytes[1]).or_default();
        *count += 1;
        if *count <= 3 {
            fs::write(format!("{dir}/gossip_message/said-{}-{count}", bytes[1]), bytes).unwrap();
        }
    }
    let mut story = vec![];
    for (is_stream, bytes) in seen.iter().filter(|(_, bytes)| bytes.len() < 3_000).take(24) {
        story.extend_from_slice(&(bytes.len() as u16).to_le_bytes());
        story.push(if *is_stream { 128 } else { 0 });
        story.extend_from_slice(bytes);
    }
    fs::write(format!("{dir}/gossip_node/story"), story).unwrap();
    let snapshot = nodes[0].snapshot();
    fs::write(format!("{dir}/gossip_snapshot/two-hosts"), &snapshot[..snapshot.len() - 32]).unwrap();
    println!("{kinds:?}");
}
