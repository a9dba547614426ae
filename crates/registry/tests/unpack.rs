//! Layers, good and hostile, on a real file system (as root: owners, whiteouts, capabilities).

mod common;

use common::*;
use dunlin_registry::{ContentStore, Digest, Images, UnpackError};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;
use std::time::Duration;
use tar::EntryType::{Block, Char, Directory, Link, Regular, Symlink};

struct World {
    dir: PathBuf,
    store: ContentStore,
    images: Images,
    _dir: tempfile::TempDir,
}

fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let store = ContentStore::open(dir.path().join("registry")).unwrap();
    let images = Images::open(dir.path().join("images"), store.clone()).unwrap();
    World { dir: dir.path().to_owned(), _dir: dir, store, images }
}

impl World {
    async fn unpack(&self, blob: Vec<u8>, plain: &[u8]) -> Result<PathBuf, UnpackError> {
        let digest = image(&self.store, "web", &[(blob, Digest::of(plain))], None);
        let record = self.images.ensure(&digest).await?;
        Ok(record.layers[0].clone())
    }

    async fn refused(&self, plain: &[u8], why: &str) {
        let error = self.unpack(plain.to_vec(), plain).await.unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
        assert_eq!(fs::read_dir(self.dir.join("images/tmp")).unwrap().count(), 0, "something stayed");
        assert_eq!(fs::read_dir(self.dir.join("images/layers")).unwrap().count(), 0, "it was taken");
    }
}

#[tokio::test]
async fn a_layer_becomes_what_it_says() {
    let world = world();
    let mut builder = tar::Builder::new(Vec::new());
    add(&mut builder, "./", Directory, "", 0o755);
    add(&mut builder, "bin/", Directory, "", 0o1777);
    add(&mut builder, "bin/su", Regular, "root", 0o4755);
    add(&mut builder, "bin/again", Link, "bin/su", 0o644);
    add(&mut builder, "bin/soft", Symlink, "/etc/passwd", 0o777);
    let xattrs = [("SCHILY.xattr.user.note", &b"kept"[..]), ("SCHILY.xattr.trusted.overlay.redirect", &b"/etc"[..])];
    builder.append_pax_extensions(xattrs).unwrap();
    add(&mut builder, "noted", Regular, "x", 0o600);
    add(&mut builder, "gone/", Directory, "", 0o755);
    add(&mut builder, "gone/.wh.file", Regular, "", 0);
    add(&mut builder, "fresh/", Directory, "", 0o755);
    // As buildah writes it: owner, mode and time are not zeroes but nothing at all.
    let mut opaque = tar::Header::new_ustar();
    opaque.set_path("fresh/.wh..wh..opq").unwrap();
    opaque.set_size(0);
    opaque.set_cksum();
    builder.append(&opaque, &[][..]).unwrap();
    add(&mut builder, "dev/null", Char, "", 0o666);
    add(&mut builder, "dev/sda", Block, "", 0o666);
    let plain = builder.into_inner().unwrap();

    let zstd = zstd::encode_all(&plain[..], 1).unwrap();
    for (name, blob) in [("gzip", gzip(&plain)), ("zstd", zstd), ("plain", plain.clone())] {
        let world = self::world();
        let layer = world.unpack(blob, &plain).await.unwrap_or_else(|e| panic!("{name}: {e}"));
        let su = fs::metadata(layer.join("bin/su")).unwrap();
        assert_eq!((su.uid(), su.gid(), su.mode() & 0o7777, su.mtime(), su.nlink()), (12, 34, 0o4755, 1_600_000_000, 2));
        let bin = fs::metadata(layer.join("bin")).unwrap();
        assert_eq!((bin.mode() & 0o7777, bin.mtime()), (0o1777, 1_600_000_000));
        assert_eq!(fs::metadata(layer.join("bin/again")).unwrap().ino(), su.ino());
        assert_eq!(fs::read_link(layer.join("bin/soft")).unwrap(), PathBuf::from("/etc/passwd"));
        let gone = fs::symlink_metadata(layer.join("gone/file")).unwrap();
        assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
        assert!(!layer.join("dev/null").exists() && !layer.join("dev/sda").exists());
        let attribute = |path: &str, name: &str| {
            let mut value = [0; 64];
            let len = rustix::fs::lgetxattr(layer.join(path), name, &mut value[..]).ok()?;
            Some(value[..len].to_vec())
        };
        assert_eq!(attribute("fresh", "trusted.overlay.opaque").as_deref(), Some(&b"y"[..]));
        assert_eq!(attribute("noted", "user.note").as_deref(), Some(&b"kept"[..]));
        assert_eq!(attribute("noted", "trusted.overlay.redirect"), None);
    }
    assert_eq!(fs::metadata(world.dir.join("images")).unwrap().mode() & 0o777, 0o700);
}

#[tokio::test]
async fn nothing_leads_out_of_a_layer() {
    let world = world();
    let outside = world.dir.join("outside");
    fs::create_dir(&outside).unwrap();
    world.refused(&archive(&[("../outside/a", Regular, "x", 0o644)]), "leads out").await;
    world.refused(&archive(&[("a/../../outside/a", Regular, "x", 0o644)]), "leads out").await;
    fs::write(outside.join("secret"), "s").unwrap();
    world.refused(&archive(&[("a", Link, "../outside/secret", 0o644)]), "leads out").await;
    world.refused(&archive(&[("a", Link, "nowhere", 0o644)]), "means no file").await;

    // A link out of the layer means a place in it: the layer's root is its `/`.
    let out = outside.to_str().unwrap().to_owned();
    let deep = format!("{}{out}", "../".repeat(40));
    for target in [&out, &deep] {
        let world = self::world();
        let plain = archive(&[("way", Symlink, target, 0o777), ("way/evil", Regular, "x", 0o644)]);
        // the folder that the link means does not exist in there: refused, or made inside
        let _ = world.unpack(plain.clone(), &plain).await;
        assert!(!outside.join("evil").exists(), "{target}");
    }
    // A file that replaces a link does not write through it.
    let secret = outside.join("secret");
    let plain = archive(&[("f", Symlink, secret.to_str().unwrap(), 0o777), ("f", Regular, "new", 0o644)]);
    let layer = world.unpack(plain.clone(), &plain).await.unwrap();
    assert_eq!((text(&layer.join("f")), text(&secret)), ("new".into(), "s".into()));
    // An absolute path is one in the layer.
    let plain = archive(&[("/abs/file", Regular, "in", 0o644)]);
    let layer = world.unpack(plain.clone(), &plain).await.unwrap();
    assert_eq!(text(&layer.join("abs/file")), "in");
}

#[tokio::test]
async fn bombs_and_broken_layers_are_refused() {
    let world = world();
    let zeros = vec![0_u8; 300 << 20];
    let mut header = tar::Header::new_ustar();
    header.set_path("zeros").unwrap();
    header.set_size(zeros.len() as u64);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_cksum();
    let mut builder = tar::Builder::new(Vec::new());
    builder.append(&header, &zeros[..]).unwrap();
    let plain = builder.into_inner().unwrap();
    let error = world.unpack(zstd::encode_all(&plain[..], 1).unwrap(), &plain).await.unwrap_err().to_string();
    assert!(error.contains("decompression bomb"), "{error}");
    assert_eq!(fs::read_dir(world.dir.join("images/tmp")).unwrap().count(), 0);

    // a name that claims to be a gigabyte is refused before it is read
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::GNULongName);
    header.set_size(1 << 30);
    header.set_cksum();
    world.refused(header.as_bytes(), "a path of more than").await;

    // names of folders: 20,000 times 4,000 bytes, a hundredth of that on the way; always the same, to be quick
    let mut builder = tar::Builder::new(Vec::new());
    let long = vec![b'd'; 240];
    let path = vec![long; 16].join(&b'/');
    for _ in 0..20_000 {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::GNULongName);
        header.set_size(path.len() as u64);
        header.set_cksum();
        builder.append(&header, &path[..]).unwrap();
        add(&mut builder, "short/", Directory, "", 0o755);
    }
    let plain = builder.into_inner().unwrap();
    let error = world.unpack(gzip(&plain), &plain).await.unwrap_err().to_string();
    assert!(error.contains("names of its folders"), "{error}");

    let good = archive(&[("a", Regular, "x", 0o644)]);
    let error = world.unpack(good.clone(), b"something else").await.unwrap_err();
    assert!(matches!(error, UnpackError::Digest { .. }), "{error}");
    let mut cut = gzip(&archive(&[("a", Regular, &"x".repeat(10_000), 0o644)]));
    cut.truncate(cut.len() / 2);
    let error = world.unpack(cut, &good).await.unwrap_err().to_string();
    assert!(error.contains("broken"), "{error}");
    let mut sparse = tar::Header::new_gnu();
    sparse.set_entry_type(tar::EntryType::GNUSparse);
    sparse.set_size(0);
    sparse.set_cksum();
    world.refused(sparse.as_bytes(), "sparse").await;
}

#[tokio::test]
async fn layers_are_shared_kept_and_collected() {
    let world = world();
    let base = archive(&[("a", Regular, "1", 0o644)]);
    let top = archive(&[("b", Regular, "2", 0o644)]);
    let layer = |plain: &Vec<u8>| (gzip(plain), Digest::of(plain));
    let one = image(&world.store, "web", &[layer(&base)], None);
    let two = image(&world.store, "web", &[layer(&base), layer(&top)], None);
    let (first, second) = tokio::join!(world.images.ensure(&one), world.images.ensure(&two));
    let (first, second) = (first.unwrap(), second.unwrap());
    assert_eq!(first.layers[0], second.layers[0]);
    assert_eq!(text(&second.layers[1].join("b")), "2");
    assert_eq!((second.config.user.as_str(), &second.config.entrypoint[..]), ("12:34", &["/run".to_owned()][..]));
    assert_eq!((second.config.stop_signal.as_deref(), &second.config.exposed_ports[..]), (Some("SIGINT"), &["8080/tcp".to_owned()][..]));

    // what a crash left is gone after the next start, what was whole is still there
    fs::create_dir(world.dir.join("images/tmp/half")).unwrap();
    let images = Images::open(world.dir.join("images"), world.store.clone()).unwrap();
    assert!(!world.dir.join("images/tmp/half").exists());
    assert_eq!(images.ensure(&two).await.unwrap(), second);
    // what was asked for lately stays: its machine may not be known yet
    let keep = std::slice::from_ref(&one);
    assert_eq!(images.gc(keep).await.unwrap(), 0);
    assert_eq!(images.gc_older_than(keep, Duration::ZERO).await.unwrap(), 1);
    assert!(first.layers[0].exists() && !second.layers[1].exists());
}

/// The collector reads from a disk that does not answer, and machines start all the same.
#[tokio::test(flavor = "multi_thread")]
async fn machines_start_while_layers_are_collected() {
    let world = world();
    let digest = small_image(&world.store, "web", Some("v1"));
    let plain = archive(&[("s", Regular, "slow", 0o644)]);
    let slow = image(&world.store, "web", &[(plain.clone(), Digest::of(&plain))], None);
    let blob = world.store.dir().join("blobs").join(&slow.hex()[..2]).join(slow.hex());
    fs::remove_file(&blob).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &blob, rustix::fs::FileType::Fifo, rustix::fs::Mode::from_raw_mode(0o600), 0).unwrap();

    let images = world.images.clone();
    let collecting = tokio::spawn(async move { images.gc(&[slow]).await });
    // opening for writing ends when the collector has opened it for reading
    let (path, opened) = (blob.clone(), fs::OpenOptions::new().write(true).to_owned());
    let writer = tokio::task::spawn_blocking(move || opened.open(path).unwrap()).await.unwrap();
    let started = tokio::time::timeout(Duration::from_secs(60), world.images.ensure(&digest)).await;
    assert_eq!(text(&started.expect("it waits for the collector").unwrap().layers[0].join("etc/motd")), "hello");
    drop(writer);
    assert!(collecting.await.unwrap().is_err());
}
