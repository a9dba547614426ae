//! The config facts on disk: kept, found again, checked.

use dunlin_cluster::{Age, Loaded, View, ViewError};
use dunlin_model::{Generation, HostId, MachineId};
use dunlin_view::ConfigState;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

fn config(revision: u64) -> ConfigState {
    let mut config =
        ConfigState { generation: Generation { incarnation: 1, revision }, ..ConfigState::default() };
    let host: HostId = "h1".parse().unwrap();
    config.tombstones.insert(MachineId::from_random([revision as u8; 7]), host);
    config
}

fn open(path: &Path) -> (View, Loaded) {
    View::open(path, 5_000).unwrap()
}

#[test]
fn what_was_published_is_found_by_the_next_process() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("view/snapshot");
    let (view, loaded) = open(&path);
    assert_eq!(loaded, Loaded::Nothing);
    view.publish_config(config(7), 1_000).unwrap();
    view.flush().unwrap();
    // A second process may read it while the first lives on.
    let (second, loaded) = open(&path);
    let generation = Generation { incarnation: 1, revision: 7 };
    assert_eq!(loaded, Loaded::FromDisk { generation, saved_at_ms: 1_000 });
    assert_eq!(*second.current().config, config(7));
    assert_eq!(second.ages(5_000).config, Age::FromDisk { saved_ago_ms: 4_000 });
    second.publish_config(config(6), 5_000).unwrap_err();
    second.publish_config(config(8), 5_000).unwrap();
    assert_eq!(second.ages(5_500).config, Age::Received { ago_ms: 500 });
}

#[test]
fn the_last_handle_writes_what_waits() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snapshot");
    let (view, _) = open(&path);
    view.publish_config(config(3), 1_000).unwrap();
    drop(view.clone());
    drop(view);
    assert!(matches!(open(&path).1, Loaded::FromDisk { generation: Generation { revision: 3, .. }, .. }));
}

#[test]
fn a_stream_of_changes_still_reaches_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snapshot");
    let (view, _) = open(&path);
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut revision = 0;
    // Never quiet, no flush: only the bound makes it write.
    while !path.exists() {
        assert!(Instant::now() < deadline, "nothing was written while changes came");
        revision += 1;
        view.publish_config(config(revision), revision).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn every_damaged_byte_is_noticed_and_the_file_kept_aside() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snapshot");
    let (view, _) = open(&path);
    view.publish_config(config(9), 1_000).unwrap();
    drop(view);
    let good = fs::read(&path).unwrap();
    let mut damaged: Vec<Vec<u8>> = vec![vec![], b"\n".to_vec(), good[..good.len() / 2].to_vec(), [&good[..], b" "].concat()];
    for at in (0..good.len()).step_by(7) {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        damaged.push(bytes);
    }
    for bytes in damaged {
        fs::write(&path, &bytes).unwrap();
        let (view, loaded) = open(&path);
        let Loaded::Quarantined { to, reason } = loaded else { panic!("taken as good: {loaded:?}") };
        assert!(!reason.is_empty());
        assert_eq!(fs::read(&to).unwrap(), bytes);
        assert_eq!(*view.current().config, ConfigState::default());
        assert_eq!(view.ages(5_000).config, Age::Never);
        drop(view);
        fs::remove_file(to).unwrap();
    }
    fs::write(&path, &good).unwrap();
    assert!(matches!(open(&path).1, Loaded::FromDisk { .. }));
}

#[test]
fn a_file_that_cannot_be_written_is_an_error_and_then_made_good() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("view");
    let path = folder.join("snapshot");
    let (view, _) = open(&path);
    fs::remove_dir(&folder).unwrap();
    view.publish_config(config(1), 1).unwrap();
    assert!(matches!(view.flush().unwrap_err(), ViewError::Io { .. }));
    assert_eq!(view.current().config.generation.revision, 1, "readers go on");
    fs::create_dir(&folder).unwrap();
    view.flush().unwrap();
    assert!(path.exists(), "what failed before was written by the next flush");
}
