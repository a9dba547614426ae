//! Images from host to host: real stores, streams in the process, and hosts that break off, lie or have gone.

mod common;

use common::*;
use dunlin_model::HostId;
use dunlin_registry::peer::{Dial, Duplex, FetchError, Peers, serve};
use dunlin_registry::{ContentStore, Digest, Images};
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const STREAM_BYTES: usize = 64 << 10;
const LARGE: usize = 5 << 20;

/// What a host does with a stream.
#[derive(Clone)]
enum Does {
    Serve(ContentStore),
    /// Serves, and is gone after so many bytes of an answer.
    BreakAfter(ContentStore, u64),
    /// Says this size for everything, and sends so many bytes of something else, after so many right ones.
    Lie { says: u64, right: Vec<u8>, wrong: usize },
    /// Serves a blob's first bytes at once, and from there on so many each second.
    Trickle { of: ContentStore, at_once: u64, a_second: usize },
    /// Cannot be reached.
    Gone,
}

struct World {
    dir: TempDir,
    ours: ContentStore,
    hosts: Arc<Mutex<BTreeMap<HostId, Does>>>,
    /// (host, digest and offset asked for)
    asked: Arc<Mutex<Vec<(String, String, u64)>>>,
    dialled: Arc<AtomicUsize>,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ours = ContentStore::open(dir.path().join("ours")).unwrap();
        Self { dir, ours, hosts: Arc::default(), asked: Arc::default(), dialled: Arc::default() }
    }

    fn store(&self, name: &str) -> ContentStore {
        ContentStore::open(self.dir.path().join(name)).unwrap()
    }

    fn host(&self, name: &str, does: Does) {
        self.hosts.lock().unwrap().insert(name.parse().unwrap(), does);
    }

    fn peers(&self, order: &[&str]) -> Peers {
        let order: Vec<HostId> = order.iter().map(|name| name.parse().unwrap()).collect();
        let (hosts, asked, dialled) = (self.hosts.clone(), self.asked.clone(), self.dialled.clone());
        let dial: Dial = Arc::new(move |host| {
            dialled.fetch_add(1, Ordering::Relaxed);
            let (does, asked, host) = (hosts.lock().unwrap()[host].clone(), asked.clone(), host.to_string());
            Box::pin(async move {
                let (near, far) = tokio::io::duplex(STREAM_BYTES);
                if matches!(does, Does::Gone) {
                    return Err(io::ErrorKind::ConnectionRefused.into());
                }
                tokio::spawn(behave(does, far, asked, host));
                Ok(Box::new(near) as Box<dyn Duplex>)
            })
        });
        Peers::new(dial, move || order.clone())
    }

    fn blob_path(&self, store: &str, digest: &Digest) -> PathBuf {
        self.dir.path().join(store).join("blobs").join(&digest.hex()[..2]).join(digest.hex())
    }

    fn has(&self, digest: &Digest) -> bool {
        self.blob_path("ours", digest).exists()
    }

    fn offsets(&self, host: &str, digest: &Digest) -> Vec<u64> {
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|(by, what, _)| by == host && what == digest.as_str()).map(|(_, _, offset)| *offset).collect()
    }
}

/// Reads the request itself, to remember it, and answers as the host does.
async fn behave(does: Does, stream: tokio::io::DuplexStream, asked: Arc<Mutex<Vec<(String, String, u64)>>>, host: String) {
    let a_second = if let Does::Trickle { a_second, .. } = does { a_second } else { 0 };
    let left = answer(does, stream, asked, host).await;
    let Some((mut rest, mut stream)) = left.filter(|_| a_second > 0) else { return };
    let mut bytes = vec![0; a_second];
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let read = rest.read(&mut bytes).await.unwrap_or(0);
        if read == 0 || stream.write_all(&bytes[..read]).await.is_err() {
            return; // all of it, or the other has had enough
        }
    }
}

/// What is left of the answer, and where it goes.
async fn answer(
    does: Does,
    mut stream: tokio::io::DuplexStream,
    asked: Arc<Mutex<Vec<(String, String, u64)>>>,
    host: String,
) -> Option<(tokio::io::DuplexStream, tokio::io::DuplexStream)> {
    let len = stream.read_u32_le().await.unwrap();
    let mut request = vec![0; len as usize];
    stream.read_exact(&mut request).await.unwrap();
    let parsed: serde_json::Value = serde_json::from_slice(&request).unwrap();
    let (digest, offset) = (parsed["digest"].as_str().unwrap().to_owned(), parsed["offset"].as_u64().unwrap());
    asked.lock().unwrap().push((host, digest, offset));
    let (store, limit) = match does {
        Does::Serve(store) => (store, u64::MAX),
        Does::BreakAfter(store, limit) => (store, limit),
        Does::Trickle { of, at_once, .. } => (of, at_once.saturating_sub(offset)),
        Does::Lie { says, right, wrong } => {
            let head = format!(r#"{{"size":{says}}}"#);
            stream.write_u32_le(head.len() as u32).await.unwrap();
            stream.write_all(head.as_bytes()).await.unwrap();
            let _ = stream.write_all(&right).await; // it may have enough
            let _ = stream.write_all(&vec![b'x'; wrong]).await;
            return None;
        }
        Does::Gone => unreachable!("it is not reached"),
    };
    let (mut near, far) = tokio::io::duplex(STREAM_BYTES);
    tokio::spawn(serve(far, "asker".parse().unwrap(), store));
    near.write_u32_le(len).await.unwrap();
    near.write_all(&request).await.unwrap();
    let head = near.read_u32_le().await.unwrap();
    let _ = stream.write_u32_le(head).await; // as above
    let mut begins = near.take(u64::from(head).saturating_add(limit));
    let _ = tokio::io::copy(&mut begins, &mut stream).await;
    Some((begins.into_inner(), stream))
}

/// A layer of bytes that do not compress, so that it is large on the way too.
fn large_image(store: &ContentStore) -> (Digest, Digest, Vec<u8>) {
    let mut state = 1_u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        b'a' + (state >> 60) as u8
    })
    .take(LARGE)
    .collect();
    let plain = archive(&[("noise", tar::EntryType::Regular, std::str::from_utf8(&noise).unwrap(), 0o644)]);
    let layer = Digest::of(&plain);
    (image(store, "web", &[(plain.clone(), layer.clone())], None), layer, plain)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_host_lacks_comes_from_the_nearest_that_has_it() {
    let world = World::new();
    let (empty, full) = (world.store("empty"), world.store("full"));
    let (digest, layer, _) = large_image(&full);
    world.host("near", Does::Serve(empty));
    world.host("far", Does::Serve(full));
    let images = Images::open(world.dir.path().join("images"), world.ours.clone()).unwrap();
    images.fetch_from(world.peers(&["near", "far"]));
    let record = images.ensure(&digest).await.unwrap();
    assert_eq!(std::fs::metadata(record.layers[0].join("noise")).unwrap().len(), LARGE as u64);
    assert_eq!((world.offsets("near", &layer), world.offsets("far", &layer)), (vec![0], vec![0]));

    // Nobody is asked for what is here, and what is damaged comes again.
    let before = world.dialled.load(Ordering::Relaxed);
    images.ensure(&digest).await.unwrap();
    assert_eq!(world.dialled.load(Ordering::Relaxed), before);
    std::fs::write(world.blob_path("ours", &digest), "something else").unwrap();
    images.ensure(&digest).await.unwrap();
    assert!(world.ours.has_manifest(&repo("web"), &digest).is_ok_and(|has| !has), "no repository sees what a host fetched");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_stream_is_gone_on_with_also_by_another_host() {
    let world = World::new();
    let full = world.store("full");
    let (digest, layer, _) = large_image(&full);
    let half = 3 << 20;
    world.host("breaks", Does::BreakAfter(full.clone(), half));
    world.host("whole", Does::Serve(full));
    world.peers(&["breaks", "whole"]).fetch_image(&world.ours, &digest).await.unwrap();
    assert!(world.has(&layer));
    assert_eq!((world.offsets("breaks", &layer), world.offsets("whole", &layer)), (vec![0], vec![half]));
}

/// A fetch that was given up leaves what it had, and the next one begins there.
#[tokio::test(flavor = "multi_thread")]
async fn the_next_fetch_goes_on_where_the_last_one_ended() {
    let world = World::new();
    let full = world.store("full");
    let (digest, layer, _) = large_image(&full);
    let half = 3 << 20;
    world.host("one", Does::BreakAfter(full.clone(), half));
    let (peers, ours) = (world.peers(&["one"]), world.ours.clone());
    let wanted = digest.clone();
    let fetch = tokio::spawn(async move { peers.fetch_image(&ours, &wanted).await });
    let partial = world.dir.path().join("ours/partial").join(layer.hex());
    while std::fs::metadata(&partial).map_or(0, |file| file.len()) < half {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    fetch.abort();
    assert!(fetch.await.unwrap_err().is_cancelled() && !world.has(&layer));
    world.host("two", Does::Serve(full));
    world.peers(&["two"]).fetch_image(&world.ours, &digest).await.unwrap();
    assert!(world.has(&layer));
    assert_eq!(world.offsets("two", &layer), [half]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_lies_is_passed_over() {
    let world = World::new();
    let full = world.store("full");
    let (digest, layer, plain) = large_image(&full);
    // The manifest, the configuration and the layer: of another size, and of the right size with other bytes.
    let manifest_bytes = std::fs::metadata(world.blob_path("full", &digest)).unwrap().len();
    world.host("liar", Does::Lie { says: manifest_bytes, right: vec![], wrong: manifest_bytes as usize });
    world.host("layer-liar", Does::Lie { says: plain.len() as u64, right: plain[..4 << 20].to_vec(), wrong: plain.len() });
    world.host("whole", Does::Serve(full));
    world.peers(&["liar", "layer-liar", "whole"]).fetch_image(&world.ours, &digest).await.unwrap();
    assert!(world.has(&digest) && world.has(&layer));
    assert_eq!(world.offsets("whole", &layer), [0], "nothing of the liar's bytes was kept");
}

/// The liar sends a part and is gone: the one who completes it is not blamed for that part.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_blamed_for_the_bytes_of_another() {
    let world = World::new();
    let full = world.store("full");
    let (digest, layer, plain) = large_image(&full);
    world.host("liar", Does::Lie { says: plain.len() as u64, right: vec![], wrong: 2 << 20 });
    world.host("whole", Does::Serve(full));
    world.peers(&["liar", "whole"]).fetch_image(&world.ours, &digest).await.unwrap();
    assert!(world.has(&layer));
    assert_eq!(world.offsets("whole", &layer), [2 << 20, 0], "once for the rest, once for all of it");
}

/// More than the manifest names is neither read nor written.
#[tokio::test(flavor = "multi_thread")]
async fn a_lie_about_a_size_costs_nothing() {
    let world = World::new();
    let full = world.store("full");
    let (digest, layer, plain) = large_image(&full);
    let has = Does::Serve(full);
    world.host("liar", has.clone());
    world.peers(&["liar"]).fetch_image(&world.ours, &digest).await.unwrap();
    std::fs::remove_file(world.blob_path("ours", &layer)).unwrap();
    world.host("liar", Does::Lie { says: 1 << 40, right: vec![], wrong: 1 << 20 });
    let error = world.peers(&["liar"]).fetch_image(&world.ours, &digest).await.unwrap_err();
    assert!(matches!(&error, FetchError::Nowhere { digest, .. } if *digest == layer), "{error}");
    let text = error.to_string();
    assert!(text.contains(layer.as_str()) && text.contains("liar has 1099511627776 bytes"), "{text}");
    let partial = world.dir.path().join("ours/partial").join(layer.hex());
    assert_eq!(std::fs::metadata(&partial).map_or(0, |file| file.len()), 0);
    // A manifest has no size that another names: its own bound holds.
    std::fs::remove_file(world.blob_path("ours", &digest)).unwrap();
    let error = world.peers(&["liar"]).fetch_image(&world.ours, &digest).await.unwrap_err();
    assert!(matches!(&error, FetchError::Nowhere { digest: of, .. } if *of == digest), "{error}");
    // One that sends more than it said is read no further.
    world.host("liar", Does::Lie { says: plain.len() as u64, right: plain, wrong: 1 << 20 });
    world.host("whole", has);
    world.peers(&["whole"]).fetch_image(&world.ours, &small_image(&world.store("full"), "web", None)).await.unwrap();
    std::fs::copy(world.blob_path("full", &digest), world.blob_path("ours", &digest)).unwrap();
    world.peers(&["liar"]).fetch_image(&world.ours, &digest).await.unwrap();
    assert!(world.has(&layer));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_no_host_has_is_told_with_the_hosts_that_were_asked() {
    let world = World::new();
    for name in ["w1", "w2"] {
        world.host(name, Does::Serve(world.store(name)));
    }
    let digest = Digest::of(b"nothing");
    let images = Images::open(world.dir.path().join("images"), world.ours.clone()).unwrap();
    images.fetch_from(world.peers(&["w2", "w1"]));
    let text = images.ensure(&digest).await.unwrap_err().to_string();
    let told = format!("no host has {digest}: w2 does not have it, w1 does not have it; push");
    assert!(text.starts_with(&told), "{text}");
}

/// A host that cannot be reached may be restarting: it is asked again, and for so long only.
#[tokio::test(start_paused = true)]
async fn a_host_that_is_away_is_waited_for() {
    let world = World::new();
    let full = world.store("full");
    let digest = small_image(&full, "web", None);
    world.host("away", Does::Gone);
    let (peers, hosts, dialled) = (world.peers(&["away"]), world.hosts.clone(), world.dialled.clone());
    let comes_back = tokio::spawn(async move {
        while dialled.load(Ordering::Relaxed) < 5 {
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        }
        hosts.lock().unwrap().insert("away".parse().unwrap(), Does::Serve(full));
    });
    peers.fetch_image(&world.ours, &digest).await.unwrap();
    comes_back.await.unwrap();
    world.host("away", Does::Gone);
    let error = peers.fetch_image(&world.ours, &Digest::of(b"nothing")).await.unwrap_err().to_string();
    assert!(error.contains("away cannot be reached (connection refused)"), "{error}");
}

/// It gives a byte each second for ever, so no silence ends it: the next host goes on where it is left.
#[tokio::test(start_paused = true)]
async fn a_host_that_trickles_is_left_for_the_next_one() {
    let world = World::new();
    let full = world.store("full");
    let (digest, layer, _) = large_image(&full);
    let half = 3 << 20;
    world.host("slow", Does::Trickle { of: full.clone(), at_once: half, a_second: 1 });
    world.host("lacks", Does::Serve(world.store("lacks")));
    world.host("whole", Does::Serve(full.clone()));
    let (peers, began) = (world.peers(&["slow", "lacks", "whole"]), tokio::time::Instant::now());
    peers.fetch_image(&world.ours, &digest).await.unwrap();
    assert!(world.has(&layer) && began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
    let [begun] = world.offsets("whole", &layer)[..] else { panic!("it is asked once: {:?}", world.offsets("whole", &layer)) };
    assert!((half..half + 60).contains(&begun), "it goes on where the other was left, at {begun}");
    // For some minutes it is asked last, for other blobs too.
    let next = small_image(&full, "web", None);
    let asked = |host: &str, digest: &Digest| world.offsets(host, digest).len();
    peers.fetch_image(&world.ours, &next).await.unwrap();
    assert_eq!((asked("slow", &next), asked("whole", &next)), (0, 1));
    std::fs::remove_file(world.blob_path("ours", &next)).unwrap();
    tokio::time::advance(Duration::from_secs(301)).await;
    peers.fetch_image(&world.ours, &next).await.unwrap();
    assert_eq!((asked("slow", &next), asked("whole", &next)), (1, 1));
}

/// The only one that has it is stayed with as long as it gives anything worth while, and the error says what it gave.
#[tokio::test(start_paused = true)]
async fn the_only_host_that_has_it_may_be_slow_but_not_endless() {
    let world = World::new();
    let full = world.store("full");
    let (digest, layer, _) = large_image(&full);
    world.host("slow", Does::Trickle { of: full.clone(), at_once: 1 << 20, a_second: 12 << 10 });
    world.host("lacks", Does::Serve(world.store("lacks")));
    world.host("away", Does::Gone);
    world.peers(&["slow", "lacks", "away"]).fetch_image(&world.ours, &digest).await.unwrap();
    assert!(world.has(&layer));
    assert!(world.offsets("slow", &layer).len() <= 4, "others are asked every few minutes only: {:?}", world.offsets("slow", &layer));

    std::fs::remove_file(world.blob_path("ours", &layer)).unwrap();
    world.host("slow", Does::Trickle { of: full.clone(), at_once: 1 << 20, a_second: 1 });
    let began = tokio::time::Instant::now();
    let error = world.peers(&["slow", "lacks"]).fetch_image(&world.ours, &digest).await.unwrap_err();
    assert!(matches!(&error, FetchError::Slow { digest, .. } if *digest == layer), "{error}");
    let text = error.to_string();
    assert!(text.contains("comes too slowly") && text.contains("bytes in half a minute") && text.contains("lacks does not have it"), "{text}");
    assert!(began.elapsed() < Duration::from_secs(180), "{:?}", began.elapsed());
    // What came is not lost.
    world.host("whole", Does::Serve(full));
    world.peers(&["whole"]).fetch_image(&world.ours, &digest).await.unwrap();
    assert!(world.offsets("whole", &layer)[0] >= 1 << 20);
}

/// Both are slow: the faster one ends it.
#[tokio::test(start_paused = true)]
async fn of_slow_hosts_the_fastest_is_stayed_with() {
    let world = World::new();
    let full = world.store("full");
    let (digest, layer, _) = large_image(&full);
    world.host("slower", Does::Trickle { of: full.clone(), at_once: 4 << 20, a_second: 100 });
    world.host("slow", Does::Trickle { of: full, at_once: 4 << 20, a_second: 10 << 10 });
    let began = tokio::time::Instant::now();
    world.peers(&["slower", "slow"]).fetch_image(&world.ours, &digest).await.unwrap();
    assert!(world.has(&layer) && began.elapsed() < Duration::from_secs(600), "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn many_that_want_the_same_fetch_it_once() {
    let world = World::new();
    let full = world.store("full");
    let (digest, layer, _) = large_image(&full);
    world.host("one", Does::Serve(full));
    let peers = world.peers(&["one"]);
    let fetches = (0..8).map(|_| peers.fetch_image(&world.ours, &digest));
    for fetched in futures_util::future::join_all(fetches).await {
        fetched.unwrap();
    }
    assert_eq!((world.offsets("one", &digest), world.offsets("one", &layer)), (vec![0], vec![0]));
}

/// An index brings this computer's image and no other; the host's grace keeps what nobody names yet.
#[tokio::test(flavor = "multi_thread")]
async fn of_an_index_this_computers_image_comes() {
    let world = World::new();
    let full = world.store("full");
    let own = small_image(&full, "web", None);
    let plain = archive(&[("other", tar::EntryType::Regular, "other", 0o644)]);
    let other = image(&full, "web", &[(plain.clone(), Digest::of(&plain))], None);
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let entry = |digest: &Digest, architecture: &str| {
        let size = std::fs::metadata(world.blob_path("full", digest)).unwrap().len();
        serde_json::json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": size,
            "platform": {"os": "linux", "architecture": architecture}})
    };
    let media_type = "application/vnd.oci.image.index.v1+json";
    let index = serde_json::json!({"schemaVersion": 2, "mediaType": media_type,
        "manifests": [entry(&other, "riscv64"), entry(&own, architecture)]});
    let index = full.put_manifest(&repo("web"), media_type, index.to_string().as_bytes(), None).unwrap();
    world.host("one", Does::Serve(full));
    let images = Images::open(world.dir.path().join("images"), world.ours.clone()).unwrap();
    images.fetch_from(world.peers(&["one"]));
    assert_eq!(text(&images.ensure(&index).await.unwrap().layers[0].join("etc/motd")), "hello");
    assert!(world.has(&index) && world.has(&own) && !world.has(&other));
    assert_eq!(world.ours.gc(&[]).unwrap().blobs_removed, 0);
    assert_eq!(world.ours.gc_older_than(&[index], std::time::Duration::ZERO).unwrap().blobs_removed, 0);
    assert!(world.ours.gc_older_than(&[], std::time::Duration::ZERO).unwrap().blobs_removed > 0);
}

/// What a stranger to the protocol sends is bounded, and answered if it can be.
#[tokio::test(flavor = "multi_thread")]
async fn requests_are_bounded() {
    let world = World::new();
    let ask = async |len: u32, request: &str| {
        let (mut near, far) = tokio::io::duplex(STREAM_BYTES);
        let served = tokio::spawn(serve(far, "stranger".parse().unwrap(), world.ours.clone()));
        near.write_u32_le(len).await.unwrap();
        near.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        near.read_to_end(&mut answer).await.unwrap();
        served.await.unwrap();
        String::from_utf8_lossy(answer.get(4..).unwrap_or_default()).into_owned()
    };
    assert_eq!(ask(1 << 20, "").await, "");
    assert_eq!(ask(2, "{}").await, "");
    let digest = Digest::of(b"nothing");
    let request = |v: u32| format!(r#"{{"v":{v},"digest":"{digest}","offset":0}}"#);
    assert_eq!(ask(request(1).len() as u32, &request(1)).await, format!(r#"{{"missing":"{digest}"}}"#));
    assert!(ask(request(2).len() as u32, &request(2)).await.contains("refused"));
}

/// Asks for the blob, and gives back the stream once the answer has begun, and its size.
async fn begun(store: &ContentStore, peer: &str, digest: &Digest) -> (tokio::io::DuplexStream, u64) {
    let (mut near, far) = tokio::io::duplex(STREAM_BYTES);
    tokio::spawn(serve(far, peer.parse().unwrap(), store.clone()));
    let request = format!(r#"{{"v":1,"digest":"{digest}","offset":0}}"#);
    near.write_u32_le(request.len() as u32).await.unwrap();
    near.write_all(request.as_bytes()).await.unwrap();
    let mut head = vec![0; near.read_u32_le().await.unwrap() as usize];
    near.read_exact(&mut head).await.unwrap();
    let head: serde_json::Value = serde_json::from_slice(&head).unwrap();
    (near, head["size"].as_u64().unwrap())
}

/// The largest blob of an image: more than a stream holds.
fn large_blob(world: &World) -> Digest {
    let (digest, _, _) = large_image(&world.ours);
    let manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(world.blob_path("ours", &digest)).unwrap()).unwrap();
    manifest["layers"][0]["digest"].as_str().unwrap().parse().unwrap()
}

/// One that takes nothing of all that it asks for kept every other from being served.
#[tokio::test(flavor = "multi_thread")]
async fn one_host_does_not_hold_every_turn() {
    let world = World::new();
    let digest = large_blob(&world);
    let mut held = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let (store, digest) = (world.ours.clone(), digest.clone());
        held.spawn(async move {
            let begun = begun(&store, "greedy", &digest).await;
            std::future::pending::<()>().await;
            drop(begun);
        });
    }
    tokio::time::sleep(Duration::from_millis(300)).await; // all of them have asked
    for _ in 0..4 {
        let (stream, size) = tokio::time::timeout(Duration::from_secs(15), begun(&world.ours, "other", &digest)).await.unwrap();
        let mut got = Vec::new();
        stream.take(size).read_to_end(&mut got).await.unwrap();
        assert_eq!((got.len() as u64, Digest::of(&got)), (size, digest.clone()));
    }
}

/// Takes 9 kB each second, and says how much came until the end.
async fn trickle((mut stream, _): (tokio::io::DuplexStream, u64)) -> u64 {
    let (mut bytes, mut all) = (vec![0; 9_000], 0);
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        match stream.read(&mut bytes).await {
            Ok(0) | Err(_) => return all,
            Ok(count) => all += count as u64,
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_taker_loses_its_turn_only_while_others_wait() {
    let world = World::new();
    let digest = large_blob(&world);
    let alone = begun(&world.ours, "a", &digest).await;
    let size = alone.1;
    assert_eq!(trickle(alone).await, size, "nobody waits: it is served to the end");
    let mut slow = tokio::task::JoinSet::new();
    for n in 0..16 {
        let begun = begun(&world.ours, ["a", "b", "c", "d"][n / 4], &digest).await;
        slow.spawn(trickle(begun));
    }
    let (stream, size) = tokio::time::timeout(Duration::from_secs(20), begun(&world.ours, "e", &digest)).await.expect("a head in time");
    let mut got = Vec::new();
    stream.take(size).read_to_end(&mut got).await.unwrap();
    assert_eq!(Digest::of(&got), digest);
    let ended = slow.join_next().await.unwrap().unwrap();
    assert!(ended < size, "{ended} of {size}");
}
