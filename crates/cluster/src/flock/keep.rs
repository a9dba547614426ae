//! What gossip knows, on disk: `<data>/cluster/flock.snapshot`, whole or not there. It has its own checksum and signatures.

use dunlin_gossip::{Node, Snapshot};
use ed25519_dalek::VerifyingKey;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::Instant;

const FILE: &str = "flock.snapshot";
/// A cold start goes back by so much at most, which the others make up for.
const EVERY: Duration = Duration::from_secs(15);
/// A larger file is not ours: 10,000 hosts hold some 400 MB.
const MAX_BYTES: u64 = 2 << 30;

pub(crate) struct Keep {
    path: PathBuf,
    due: Instant,
    /// The change of the catalogue that was last saved.
    saved: Option<u64>,
    writing: Option<JoinHandle<()>>,
}

/// What there is. A damaged file is put aside, and the start is from nothing: the others know it all.
pub(crate) fn load(dir: &Path, cluster: VerifyingKey) -> io::Result<Option<Snapshot>> {
    let path = dir.join(FILE);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes)?;
    match Snapshot::decode(cluster, &bytes) {
        Ok(snapshot) => {
            if snapshot.refused > 0 {
                tracing::warn!(logs = snapshot.refused, "some of what was saved of the cluster does not verify, and is fetched again");
            }
            Ok(Some(snapshot))
        }
        Err(error) => {
            let aside = path.with_extension("snapshot.damaged");
            fs::rename(&path, &aside)?;
            tracing::error!(%error, kept_as = %aside.display(), "what was saved of the cluster is damaged: starting without it");
            Ok(None)
        }
    }
}

/// The host leaves: what it heard is of no use elsewhere.
pub(crate) fn forget(dir: &Path) -> io::Result<()> {
    match fs::remove_file(dir.join(FILE)) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

impl Keep {
    pub fn new(dir: &Path) -> Self {
        Self { path: dir.join(FILE), due: Instant::now() + Duration::from_secs(1), saved: None, writing: None }
    }

    pub fn save_if_due(&mut self, node: &Node) {
        let change = node.catalogue().change();
        let is_writing = self.writing.as_ref().is_some_and(|writing| !writing.is_finished());
        if Instant::now() < self.due || self.saved == Some(change) || is_writing {
            return;
        }
        self.due = Instant::now() + EVERY;
        self.saved = Some(change);
        let (path, bytes) = (self.path.clone(), node.snapshot());
        self.writing = Some(tokio::task::spawn_blocking(move || write_or_say(&path, &bytes)));
    }

    pub async fn save_now(mut self, node: &Node) {
        if let Some(writing) = self.writing.take() {
            let _ = writing.await; // it has said what failed
        }
        let (path, bytes) = (self.path.clone(), node.snapshot());
        let _ = tokio::task::spawn_blocking(move || write_or_say(&path, &bytes)).await; // likewise
    }
}

fn write_or_say(path: &Path, bytes: &[u8]) {
    if let Err(error) = write(path, bytes) {
        tracing::error!(%error, path = %path.display(), "what is known of the cluster is not on disk: check the folder's permissions and free space");
    }
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let partial = path.with_extension("partial");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&partial)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&partial, path)?;
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}
