//! A process that writes is killed, over and over: on a file system that goes on, and on one that loses
//! whatever was not synced. Everything acknowledged is there afterwards, and nothing is half there.
//!
//! The power losses need root and a loop device.

use dunlin_store::{Event, Store};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const WRITERS: usize = 8;
const KILLS: u64 = 30;
const POWER_LOSSES: u64 = 100;
/// Small, so that a copy is quick; the load's history stays far below it.
const DISK_BYTES: u64 = 64 << 20;
/// A writer that acknowledges nothing for this long is stuck.
const DEADLINE: Duration = Duration::from_secs(30);

/// What each writer was told to be on disk.
type Acknowledged = BTreeMap<usize, u64>;

/// Runs the load until it has acknowledged `lines` writes and a random moment more, then kills it.
fn run_and_kill(store: &Path, lines: usize, moment: Duration, acknowledged: &mut Acknowledged) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_dunlin-store-load"))
        .arg(store)
        .arg(WRITERS.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let out = BufReader::new(child.stdout.take().unwrap());
    let (sender, received) = std::sync::mpsc::channel();
    // The pipe is drained to its end: what the load printed before its death was acknowledged.
    let reader = std::thread::spawn(move || {
        for line in out.lines() {
            sender.send(line.unwrap()).unwrap();
        }
    });
    let mut note = |line: String| {
        let (writer, count) = line.split_once(' ').unwrap_or_else(|| panic!("half a line: {line:?}"));
        acknowledged.insert(writer.parse().unwrap(), count.parse().unwrap());
    };
    for _ in 0..lines {
        match received.recv_timeout(DEADLINE) {
            Ok(line) => note(line),
            Err(error) => {
                kill(&mut child);
                panic!("the load acknowledges nothing: {error}");
            }
        }
    }
    // Not a wait for anything: the kill shall hit any moment of a commit.
    std::thread::sleep(moment);
    kill(&mut child);
    reader.join().unwrap();
    received.into_iter().for_each(&mut note);
}

fn kill(child: &mut Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Random enough to hit different moments; printed by a failing assertion's message with the round.
fn moment(round: u64) -> Duration {
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos();
    Duration::from_micros((u64::from(nanos) / 7 + round * 977) % 12_000)
}

/// Opens what the kill left. `seen` is where a watcher was before it; returns where it is now.
fn check(path: &Path, acknowledged: &Acknowledged, seen: u64, round: u64) -> u64 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let store = Store::open(path).unwrap_or_else(|error| panic!("round {round}: {error}: {error:?}"));
        let newest = store.revision();
        assert!(newest >= seen, "round {round}: revision {newest} is older than {seen}, which was watched");
        let mut now = BTreeMap::new();
        for row in store.range("").await.unwrap().0 {
            let value: u64 = String::from_utf8(row.value).unwrap().parse().unwrap();
            now.insert(row.key, value);
        }
        for (writer, count) in acknowledged {
            let (left, right) = (now.get(&format!("left/{writer}")), now.get(&format!("right/{writer}")));
            assert!(left >= Some(count), "round {round}: writer {writer} was told {count}, found {left:?}");
            assert_eq!(left, right, "round {round}: half a transaction of writer {writer}");
        }
        // The watch goes on where it was: every revision once, both keys in it, counting up by one.
        let mut watch = store.watch("", seen, DEADLINE).await.unwrap();
        let mut counts: BTreeMap<String, u64> = BTreeMap::new();
        for revision in seen + 1..=newest {
            let batch = tokio::time::timeout(DEADLINE, watch.next()).await.expect("an event").unwrap();
            assert_eq!(batch.len(), 2, "round {round}");
            for event in batch {
                assert_eq!(event.revision(), revision, "round {round}: skipped or repeated");
                let Event::Put(row) = event else { panic!("round {round}: nobody deletes") };
                let count: u64 = String::from_utf8(row.value).unwrap().parse().unwrap();
                if let Some(before) = counts.insert(row.key, count) {
                    assert_eq!(count, before + 1, "round {round}");
                }
            }
        }
        for (key, count) in counts {
            assert_eq!(now[&key], count, "round {round}: {key} differs from its last event");
        }
        store.close().await;
        newest
    })
}

#[test]
fn a_killed_process_leaves_everything_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let (mut acknowledged, mut seen) = (Acknowledged::new(), 0);
    for round in 0..KILLS {
        run_and_kill(&path, 20, moment(round), &mut acknowledged);
        seen = check(&path, &acknowledged, seen, round);
    }
    assert_eq!(acknowledged.len(), WRITERS, "every writer wrote");
    assert!(seen >= KILLS * 20);
}

/// A file system in a file, mounted; unmounted and gone at the end, a failing one too.
struct Disk {
    image: PathBuf,
    folder: PathBuf,
}

impl Disk {
    fn mount(image: &Path, folder: &Path) -> Self {
        std::fs::create_dir_all(folder).unwrap();
        // The journal commits when somebody syncs and not by itself, so that a copy is of one moment.
        run(Command::new("mount").args(["-o", "loop,commit=600"]).arg(image).arg(folder));
        Self { image: image.to_owned(), folder: folder.to_owned() }
    }

    /// What the disk holds now, without what the kernel has not written to it: a loss of power.
    fn copy_to(&self, copy: &Path) {
        let source = run(Command::new("findmnt").args(["-n", "-o", "SOURCE"]).arg(&self.folder));
        let device = source.trim().trim_start_matches("/dev/").to_owned();
        let stat = || std::fs::read_to_string(format!("/sys/block/{device}/stat")).unwrap();
        let deadline = Instant::now() + DEADLINE;
        loop {
            let before = stat();
            run(Command::new("cp").arg("--sparse=always").arg(&self.image).arg(copy));
            let in_flight = before.split_whitespace().nth(8) != Some("0");
            // Written to meanwhile: a mixture of two moments, which no power loss leaves.
            if !in_flight && stat() == before {
                return;
            }
            assert!(Instant::now() < deadline, "the disk does not come to rest");
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let done = Command::new("umount").arg(&self.folder).status();
        if !done.is_ok_and(|status| status.success()) && !std::thread::panicking() {
            panic!("{} stays mounted", self.folder.display());
        }
    }
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn make_disk(image: &Path, bytes: u64) {
    std::fs::File::create(image).unwrap().set_len(bytes).unwrap();
    let mut mkfs = Command::new("mkfs.ext4");
    // All of it now, or a kernel thread goes on writing to the disk after the mount.
    run(mkfs.args(["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"]).arg(image));
}

#[test]
fn a_power_loss_leaves_everything_acknowledged() {
    // In memory where possible: the file system in it is what loses its cache.
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    let (image, copy) = (folder.path().join("disk"), folder.path().join("copy"));
    make_disk(&image, DISK_BYTES);
    let disk = Disk::mount(&image, &folder.path().join("mounted"));
    let path = disk.folder.join("store.db");
    let (mut acknowledged, mut seen) = (Acknowledged::new(), 0);
    for round in 0..POWER_LOSSES {
        run_and_kill(&path, 20, moment(round), &mut acknowledged);
        disk.copy_to(&copy);
        let lost = Disk::mount(&copy, &folder.path().join("after"));
        seen = check(&lost.folder.join("store.db"), &acknowledged, seen, round);
    }
    assert_eq!(acknowledged.len(), WRITERS, "every writer wrote");
    assert!(seen >= POWER_LOSSES * 20);
}

/// That the copies above do lose what nobody synced: otherwise that test could not fail.
#[test]
fn a_power_loss_does_lose_what_was_not_synced() {
    let folder = tempfile::tempdir().unwrap();
    let (image, copy) = (folder.path().join("disk"), folder.path().join("copy"));
    make_disk(&image, DISK_BYTES);
    let disk = Disk::mount(&image, &folder.path().join("mounted"));
    std::fs::write(disk.folder.join("unsynced"), "x").unwrap();
    let synced = std::fs::File::create(disk.folder.join("kept")).unwrap();
    synced.sync_all().unwrap();
    std::fs::write(disk.folder.join("kept"), "unsynced").unwrap();
    disk.copy_to(&copy);
    let lost = Disk::mount(&copy, &folder.path().join("after"));
    assert_eq!(std::fs::read(lost.folder.join("kept")).unwrap(), b"", "its content was not synced");
}

#[test]
fn a_full_disk_is_said_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk");
    make_disk(&image, 16 << 20);
    let disk = Disk::mount(&image, &folder.path().join("mounted"));
    let (path, ballast) = (disk.folder.join("store.db"), disk.folder.join("ballast"));
    std::fs::write(&ballast, vec![1; 4 << 20]).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        use dunlin_store::{Op, StoreError};
        let put = |n: u32| vec![Op::Put(format!("k/{n:05}"), vec![7; 100_000])];
        let store = Store::open(&path).unwrap();
        let mut kept = 0;
        let full = loop {
            match store.txn(vec![], put(kept)).await {
                Ok(_) => kept += 1,
                Err(error) => break error,
            }
            assert!(kept < 1_000, "the disk takes everything");
        };
        assert!(matches!(full, StoreError::Full), "{full:?}");
        let keys = async |store: &Store| store.range("k/").await.unwrap().0.len() as u32;
        assert!(kept > 5);
        assert_eq!(keys(&store).await, kept, "reads go on, with what was acknowledged and nothing else");
        // The same process writes again as soon as there is room.
        std::fs::remove_file(&ballast).unwrap();
        store.txn(vec![], put(kept)).await.unwrap();
        assert_eq!(store.revision(), u64::from(kept) + 1, "a failed write takes no revision");
        store.close().await;
        let store = Store::open(&path).unwrap();
        assert_eq!(keys(&store).await, kept + 1);
        store.close().await;
    });
}
