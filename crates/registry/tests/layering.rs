//! Layers on layers, as a machine sees them: mounted with overlayfs (as root).

mod common;

use common::*;
use dunlin_registry::{ContentStore, Digest, ImageRecord, Images, UnpackError};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tar::EntryType::{self, Directory, Link, Regular, Symlink};

type Entries<'a> = &'a [(&'a str, EntryType, &'a str, u32)];

struct World {
    dir: tempfile::TempDir,
    store: ContentStore,
    images: Images,
}

fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let store = ContentStore::open(dir.path().join("registry")).unwrap();
    let images = Images::open(dir.path().join("images"), store.clone()).unwrap();
    World { dir, store, images }
}

impl World {
    fn image(&self, layers: &[Entries<'_>]) -> Digest {
        let layers: Vec<_> = layers.iter().map(|entries| archive(entries)).map(|plain| (gzip(&plain), Digest::of(&plain))).collect();
        image(&self.store, "web", &layers, None)
    }

    async fn record(&self, layers: &[Entries<'_>]) -> Result<ImageRecord, UnpackError> {
        self.images.ensure(&self.image(layers)).await
    }

    async fn mounted(&self, layers: &[Entries<'_>]) -> Mounted {
        Mounted::of(self.dir.path(), &self.record(layers).await.unwrap().layers)
    }
}

/// What a machine would see; unmounted with the test.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn of(dir: &Path, layers: &[PathBuf]) -> Self {
        let at = tempfile::tempdir_in(dir).unwrap();
        // overlayfs wants two lower layers or an upper one
        let empty = dir.join("empty");
        fs::create_dir_all(&empty).unwrap();
        let highest_first = layers.iter().rev().chain([&empty]).map(|path| path.to_str().unwrap());
        let lower = format!("lowerdir={}", highest_first.collect::<Vec<_>>().join(":"));
        let mounted = Command::new("mount").args(["-t", "overlay", "-o", &lower, "overlay"]).arg(at.path()).status().unwrap();
        assert!(mounted.success());
        Self(at)
    }

    fn at(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn names(&self, path: &str) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.at(path)).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// (mode, owner)
    fn looks(&self, path: &str) -> (u32, u32) {
        let metadata = fs::symlink_metadata(self.at(path)).unwrap();
        (metadata.mode() & 0o7777, metadata.uid())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

const OWNER: u32 = 12; // of all that `archive` makes

#[tokio::test(flavor = "multi_thread")]
async fn folders_that_a_layer_does_not_list_are_those_below_it() {
    let world = world();
    let base: Entries<'_> = &[
        ("usr/", Directory, "", 0o755),
        ("usr/lib/", Directory, "", 0o711),
        ("lib", Symlink, "usr/lib", 0o777),
        ("run/", Directory, "", 0o755),
        ("var/", Directory, "", 0o755),
        ("var/run", Symlink, "/run", 0o777),
        ("var/up", Symlink, "../../../usr", 0o777),
        ("tmp/", Directory, "", 0o1777),
        ("etc/", Directory, "", 0o750),
    ];
    let top: Entries<'_> = &[
        ("lib/x.so", Regular, "x", 0o644),
        ("var/run/pid", Regular, "1", 0o644),
        ("var/up/share/doc", Regular, "d", 0o644),
        ("tmp/file", Regular, "t", 0o644),
        ("etc/deep/conf", Regular, "c", 0o644),
    ];
    let seen = world.mounted(&[base, top]).await;
    assert_eq!(fs::read_link(seen.at("lib")).unwrap(), PathBuf::from("usr/lib"));
    assert_eq!((text(&seen.at("usr/lib/x.so")), seen.looks("usr/lib")), ("x".into(), (0o711, OWNER)));
    assert_eq!((text(&seen.at("run/pid")), text(&seen.at("usr/share/doc"))), ("1".into(), "d".into()));
    assert_eq!(fs::read_link(seen.at("var/run")).unwrap(), PathBuf::from("/run"));
    assert_eq!((seen.looks("tmp"), seen.looks("etc"), seen.looks("etc/deep")), ((0o1777, OWNER), (0o750, OWNER), (0o755, 0)));
    assert_eq!(fs::metadata(seen.at("etc")).unwrap().mtime(), 1_600_000_000);

    // The same layer on another one, on none, and on one that says the same in two layers.
    let plain = world.mounted(&[&[("lib/", Directory, "", 0o700)], top]).await;
    assert_eq!((plain.looks("lib"), text(&plain.at("lib/x.so")), plain.looks("tmp")), ((0o700, OWNER), "x".into(), (0o755, 0)));
    let alone = world.mounted(&[top]).await;
    assert_eq!((alone.looks("lib"), text(&alone.at("lib/x.so"))), ((0o755, 0), "x".into()));
    let again = world.record(&[base, top]).await.unwrap();
    assert_eq!(again, world.record(&[base, top]).await.unwrap());
    let names = |record: &ImageRecord| record.layers.iter().map(|path| path.file_name().unwrap().to_owned()).collect::<Vec<_>>();
    assert!(again.layers[0].ends_with(Digest::of(&archive(base)).hex()), "a layer that lists its folders is shared");
    assert!(names(&again)[1].to_str().unwrap().starts_with("on-"));

    // Collection knows both kinds.
    let keep = [world.image(&[base, top])];
    drop((seen, plain, alone));
    assert_eq!(world.images.gc_older_than(&keep, Duration::ZERO).await.unwrap(), 3);
    assert!(again.layers.iter().all(|layer| layer.is_dir()));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_layer_between_removed_or_replaced_is_not_taken_over() {
    let world = world();
    let base: Entries<'_> = &[("a/", Directory, "", 0o700), ("a/old", Regular, "o", 0o644), ("b", Symlink, "a", 0o777), ("c/", Directory, "", 0o700), ("c/old", Regular, "o", 0o644)];
    let between: Entries<'_> = &[(".wh.a", Regular, "", 0), ("b/", Directory, "", 0o711), ("c/", Directory, "", 0o710), ("c/.wh..wh..opq", Regular, "", 0)];
    let top: Entries<'_> = &[("a/new", Regular, "n", 0o644), ("b/new", Regular, "n", 0o644), ("c/old/new", Regular, "n", 0o644)];
    let seen = world.mounted(&[base, between, top]).await;
    assert_eq!((seen.names("a"), seen.looks("a")), (vec!["new".to_owned()], (0o755, 0)));
    assert_eq!((seen.names("b"), seen.looks("b")), (vec!["new".to_owned()], (0o711, OWNER)));
    assert_eq!((seen.names("c/old"), seen.looks("c"), seen.looks("c/old")), (vec!["new".to_owned()], (0o710, OWNER), (0o755, 0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn hard_links_reach_the_layers_below() {
    let world = world();
    let base: Entries<'_> = &[
        ("bin/", Directory, "", 0o755),
        ("bin/busybox", Regular, "program", 0o4755),
        ("sbin", Symlink, "bin", 0o777),
        ("bin/soft", Symlink, "busybox", 0o777),
        ("gone", Regular, "g", 0o644),
    ];
    let top: Entries<'_> = &[("bin/sh", Link, "bin/busybox", 0o644), ("ls", Link, "sbin/busybox", 0o644), ("so", Link, "bin/soft", 0o777)];
    let record = world.record(&[base, top]).await.unwrap();
    let seen = Mounted::of(world.dir.path(), &record.layers);
    let sh = fs::metadata(seen.at("bin/sh")).unwrap();
    assert_eq!((text(&seen.at("bin/sh")), sh.mode() & 0o7777, sh.uid(), sh.mtime()), ("program".into(), 0o4755, OWNER, 1_600_000_000));
    let inode = |path: &str| fs::metadata(record.layers[1].join(path)).unwrap().ino();
    assert_eq!((inode("bin/sh"), inode("ls")), (inode("bin/busybox"), inode("bin/busybox")));
    assert_eq!(fs::read_link(seen.at("so")).unwrap(), PathBuf::from("busybox"));

    for wrong in [[("x", Link, "nowhere", 0o644)], [("x", Link, "bin", 0o644)]] {
        let error = world.record(&[base, &wrong]).await.unwrap_err().to_string();
        assert!(error.contains("means no file"), "{error}");
    }
    let error = world.record(&[base, &[(".wh.gone", Regular, "", 0), ("x", Link, "gone", 0o644)]]).await.unwrap_err().to_string();
    assert!(error.contains("means no file"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn removed_folders_do_not_come_back() {
    let world = world();
    let base: Entries<'_> = &[("d/", Directory, "", 0o700), ("d/old", Regular, "o", 0o644), ("keep", Regular, "k", 0o644)];
    let folder = ("d/", Directory, "", 0o711);
    let new = ("d/new", Regular, "n", 0o644);
    let whiteout = (".wh.d", Regular, "", 0);
    let opaque = ("d/.wh..wh..opq", Regular, "", 0);
    let orders: &[Entries<'_>] = &[
        &[whiteout, folder, new],
        &[folder, new, whiteout],
        &[folder, whiteout, new],
        &[whiteout, new],
        &[new, whiteout],
        &[folder, opaque, new],
        &[folder, new, opaque],
        &[("d", Symlink, "keep", 0o777), folder, new],
        &[("d", Regular, "file", 0o644), folder, new],
    ];
    for top in orders {
        let seen = world.mounted(&[base, top]).await;
        assert_eq!((seen.names(""), seen.names("d")), (vec!["d".to_owned(), "keep".to_owned()], vec!["new".to_owned()]), "{top:?}");
    }
    let seen = world.mounted(&[base, &[whiteout]]).await;
    assert_eq!(seen.names(""), ["keep"]);
    // and neither does anything of an image whose root was begun anew
    let seen = world.mounted(&[base, &[(".wh..wh..opq", Regular, "", 0), ("n", Regular, "n", 0o644)]]).await;
    assert_eq!(seen.names(""), ["n"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn links_below_lead_nowhere_else() {
    let world = world();
    let outside = world.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    let out = outside.to_str().unwrap();
    let deep = format!("{}{out}", "../".repeat(20));
    for target in [out, &deep] {
        let base: Entries<'_> = &[("way", Symlink, target, 0o777)];
        let _ = world.record(&[base, &[("way/evil", Regular, "x", 0o644)]]).await;
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "{target}");
    }
    let round: Entries<'_> = &[("a", Symlink, "b", 0o777), ("b", Symlink, "a", 0o777)];
    assert!(world.record(&[round, &[("a/f", Regular, "x", 0o644)]]).await.is_err());
}
