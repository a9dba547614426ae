//! Backups of control: desired state and the keys without which it says nothing, in one file that only a key file opens.
//!
//! ```text
//! {"dunlin_backup":1,"host":"w1",..}\n    what it is, for people and for `restore`; authenticated with the rest
//! box                                    JSON, path in the data directory -> base64, under SHA-256(key file, salt)
//! ```
//! Keys never touch the disk in clear outside of the data directory of a control.

use crate::adopt::{RESTORED, RestoredRow};
use crate::keys::{KeyError, load_or_create, private_dir, random, write_private};
use crate::now_ms;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use dunlin_model::seal::{SealError, lock, unlock};
use dunlin_model::{Generation, HostId};
use dunlin_store::{Op, Store, StoreError};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

const FORMAT: u32 = 1;
const STORE: &str = "control/store.db";
const AUTHORITY: &str = "control/cluster/authority.json";
/// All that control has but its store. Every one was made at its first start.
const KEYS: [&str; 5] = ["control/master.key", "control/token.key", AUTHORITY, "ca/ca.key", "ca/ca.pem"];
const MAX_HEAD_BYTES: usize = 4096;

#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error("{} cannot be {verb}", .path.display())]
    Io { path: PathBuf, verb: &'static str, source: std::io::Error },
    #[error("no control has run in {}: it has no {what}", .data.display())]
    NoControl { data: PathBuf, what: &'static str },
    #[error("{} is no backup of control that this version reads: {why}", .path.display())]
    NoBackup { path: PathBuf, why: String },
    #[error("{} does not open with this key file: it is another one, or the backup is damaged", .path.display())]
    CannotOpen { path: PathBuf, source: SealError },
    #[error("{} has control of another cluster: restore into an empty directory, or into that of a host of the backup's cluster", .data.display())]
    OtherCluster { data: PathBuf },
    #[error("the key file cannot be used")]
    Key(#[from] KeyError),
    #[error("desired state cannot be read or written")]
    Store(#[from] StoreError),
}

/// The first line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    dunlin_backup: u32,
    host: HostId,
    generation: Generation,
    at_ms: u64,
    salt: String,
}

/// What was put back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// The host that had control when the backup was made, and when that was.
    pub host: HostId,
    pub at_ms: u64,
    /// From which control goes on: above the backup's, and raised further by what the cluster knows.
    pub generation: Generation,
}

/// A backup of the control of `data`, which may run meanwhile, for whoever has the key file, which is made if there is none.
pub fn write(data: &Path, host: &HostId, key_file: &Path, to: &Path) -> Result<Generation, BackupError> {
    let store = data.join(STORE);
    if !store.exists() {
        return Err(BackupError::NoControl { data: data.to_owned(), what: "store" });
    }
    let mut files = BTreeMap::new();
    for name in KEYS {
        let path = data.join(name);
        let bytes = fs::read(&path).map_err(|source| match source.kind() {
            ErrorKind::NotFound => BackupError::NoControl { data: data.to_owned(), what: name },
            _ => io(&path, "read")(source),
        })?;
        files.insert(name.to_owned(), Zeroizing::new(bytes));
    }
    // Beside the store, which nobody but root reads; secrets in it are sealed.
    let copy = data.join("control/backup.db");
    let generation = Store::copy(&store, &copy)?;
    let bytes = fs::read(&copy).map_err(io(&copy, "read"))?;
    fs::remove_file(&copy).map_err(io(&copy, "removed"))?;
    files.insert(STORE.to_owned(), Zeroizing::new(bytes));

    let key = load_or_create(key_file)?;
    let salt = random::<32>();
    let head = Head { dunlin_backup: FORMAT, host: host.clone(), generation, at_ms: now_ms(), salt: BASE64.encode(salt) };
    let mut head = serde_json::to_vec(&head).expect("plain data");
    head.push(b'\n');
    let files: BTreeMap<String, Zeroizing<String>> =
        files.into_iter().map(|(name, bytes)| (name, Zeroizing::new(BASE64.encode(&*bytes)))).collect();
    let plain: BTreeMap<&str, &str> = files.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
    let plain = Zeroizing::new(serde_json::to_vec(&plain).expect("plain data"));
    let sealed = lock(&key, &salt, &head, &plain);
    write_private(to, &[head, sealed].concat())?;
    Ok(generation)
}

/// Puts a backup into `data`, which no server uses. Its control then waits to hear what the cluster knows beyond it, unless
/// it is `alone`. What was there of desired state is kept beside it.
pub async fn restore(data: &Path, key_file: &Path, from: &Path, alone: bool) -> Result<Restored, BackupError> {
    let no_backup = |why: &str| BackupError::NoBackup { path: from.to_owned(), why: why.to_owned() };
    let bytes = fs::read(from).map_err(io(from, "read"))?;
    let end = bytes.iter().take(MAX_HEAD_BYTES).position(|byte| *byte == b'\n').ok_or_else(|| no_backup("it has no first line"))?;
    let (line, sealed) = bytes.split_at(end + 1);
    let head: Head = serde_json::from_slice(line).map_err(|error| no_backup(&error.to_string()))?;
    if head.dunlin_backup != FORMAT {
        return Err(no_backup(&format!("it is of format {}", head.dunlin_backup)));
    }
    if !key_file.exists() {
        return Err(BackupError::Io { path: key_file.to_owned(), verb: "read", source: ErrorKind::NotFound.into() });
    }
    let key = load_or_create(key_file)?;
    let salt = BASE64.decode(&head.salt).unwrap_or_default();
    let plain = unlock(&key, &salt, line, sealed).map_err(|source| BackupError::CannotOpen { path: from.to_owned(), source })?;
    let files: BTreeMap<String, String> = serde_json::from_slice(&plain).map_err(|error| no_backup(&error.to_string()))?;
    let file = |name: &str| {
        let text = files.get(name).ok_or_else(|| no_backup(&format!("it has no {name}")))?;
        BASE64.decode(text).map(Zeroizing::new).map_err(|_| no_backup(&format!("its {name} is damaged")))
    };
    let theirs = file(AUTHORITY)?;
    if fs::read(data.join(AUTHORITY)).is_ok_and(|own| own != *theirs) {
        return Err(BackupError::OtherCluster { data: data.to_owned() });
    }
    for name in KEYS {
        let path = data.join(name);
        private_dir(path.parent().unwrap_or(data))?;
        write_private(&path, &file(name)?)?;
    }
    let (store, copy) = (data.join(STORE), data.join("control/restoring.db"));
    write_private(&copy, &file(STORE)?)?;
    Store::restore(&copy, &store)?;
    fs::remove_file(&copy).map_err(io(&copy, "removed"))?;
    let opened = Store::open(&store)?;
    let row = RestoredRow { generation: head.generation, at_ms: now_ms(), from: head.host.clone(), alone };
    let json = serde_json::to_vec(&row).expect("plain data");
    opened.txn(vec![], vec![Op::Put(RESTORED.into(), json)]).await?;
    let generation = opened.generation();
    opened.close().await;
    Ok(Restored { host: head.host, at_ms: head.at_ms, generation })
}

fn io(path: &Path, verb: &'static str) -> impl FnOnce(std::io::Error) -> BackupError {
    let path = path.to_owned();
    move |source| BackupError::Io { path, verb, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::Keys;

    async fn control(data: &Path) -> Generation {
        private_dir(data).unwrap();
        Keys::load_or_create(&data.join("control")).unwrap();
        dunlin_cluster::Authority::load_or_create(&data.join("control/cluster"), 0).unwrap();
        private_dir(&data.join("ca")).unwrap();
        ["ca/ca.key", "ca/ca.pem"].iter().for_each(|name| write_private(&data.join(name), b"pem").unwrap());
        let store = Store::open(&data.join(STORE)).unwrap();
        store.txn(vec![], vec![Op::Put("apps/web".into(), b"{}".to_vec())]).await.unwrap();
        let generation = store.generation();
        store.close().await;
        generation
    }

    #[tokio::test]
    async fn what_was_backed_up_is_restored_elsewhere_under_a_higher_incarnation() {
        let dir = tempfile::tempdir().unwrap();
        let (data, elsewhere) = (dir.path().join("a"), dir.path().join("b"));
        let (key, file) = (dir.path().join("backup.key"), dir.path().join("backup"));
        let host: HostId = "w1".parse().unwrap();
        let generation = control(&data).await;
        assert_eq!(write(&data, &host, &key, &file).unwrap(), generation);
        let bytes = fs::read(&file).unwrap();
        let authority = fs::read(data.join(AUTHORITY)).unwrap();
        let master = fs::read(data.join("control/master.key")).unwrap();
        let holds = |part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
        assert!(!holds(&master) && !holds(&authority[..40]) && !holds(b"apps/web") && !holds(BASE64.encode(&master).as_bytes()));

        let restored = restore(&elsewhere, &key, &file, false).await.unwrap();
        assert_eq!((restored.host, restored.generation.incarnation), (host, generation.incarnation + 1));
        for name in KEYS {
            assert_eq!(fs::read(data.join(name)).unwrap(), fs::read(elsewhere.join(name)).unwrap(), "{name}");
        }
        let store = Store::open(&elsewhere.join(STORE)).unwrap();
        assert!(store.get("apps/web").await.unwrap().is_some());
        let row: RestoredRow = serde_json::from_slice(&store.get(RESTORED).await.unwrap().unwrap().value).unwrap();
        assert_eq!((row.generation, row.alone), (generation, false));
        store.close().await;
    }

    #[tokio::test]
    async fn another_key_a_changed_byte_or_another_cluster_restores_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (data, elsewhere) = (dir.path().join("a"), dir.path().join("b"));
        let (key, file) = (dir.path().join("backup.key"), dir.path().join("backup"));
        control(&data).await;
        write(&data, &"w1".parse().unwrap(), &key, &file).unwrap();
        let other = dir.path().join("other.key");
        load_or_create(&other).unwrap();
        assert!(matches!(restore(&elsewhere, &other, &file, false).await, Err(BackupError::CannotOpen { .. })));
        let missing = dir.path().join("missing.key");
        assert!(matches!(restore(&elsewhere, &missing, &file, false).await, Err(BackupError::Io { .. })));
        assert!(!missing.exists());
        let whole = fs::read(&file).unwrap();
        for at in [20, whole.len() / 2, whole.len() - 1] {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            fs::write(&file, changed).unwrap();
            assert!(restore(&elsewhere, &key, &file, false).await.is_err(), "byte {at}");
        }
        assert!(!elsewhere.exists(), "nothing was written");
        fs::write(&file, whole).unwrap();
        control(&elsewhere).await;
        assert!(matches!(restore(&elsewhere, &key, &file, false).await, Err(BackupError::OtherCluster { .. })));
    }
}
