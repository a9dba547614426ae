//! The config facts on disk: one file, replaced whole, with a checksum in its first line.

use dunlin_model::Generation;
use dunlin_view::ConfigState;
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A burst of changes (a deploy) becomes one file.
const QUIET: Duration = Duration::from_millis(200);
/// However busy it is, the file is never older than this.
const LONGEST: Duration = Duration::from_secs(2);
/// After a failed write, before the next try.
const RETRY: Duration = Duration::from_secs(5);
/// A larger file is not ours: config facts of 100,000 machines stay below.
const MAX_BYTES: u64 = 512 << 20;
const MAGIC: &str = "dunlin-view 1";

/// What was found at the start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Loaded {
    Nothing,
    FromDisk { generation: Generation, saved_at_ms: u64 },
    /// The file was damaged, was moved to `to`, and the view started empty.
    Quarantined { to: PathBuf, reason: String },
}

#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    #[error("the view's snapshot {} cannot be {action}: check the folder's permissions and free space", .path.display())]
    Io { path: PathBuf, action: &'static str, source: std::io::Error },
    #[error("config facts cannot be written as JSON")]
    Encode(#[source] serde_json::Error),
    #[error("the thread that keeps the view's snapshot cannot be started")]
    Thread(#[source] std::io::Error),
}

#[derive(Serialize, Deserialize)]
struct Saved<C> {
    saved_at_ms: u64,
    config: C,
}

pub(crate) fn load(path: &Path, now_ms: u64) -> Result<(Option<ConfigState>, Loaded), ViewError> {
    let failed = |action| move |source| ViewError::Io { path: path.to_owned(), action, source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok((None, Loaded::Nothing)),
        Err(error) => return Err(failed("opened")(error)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed("read"))?;
    match decode(&bytes) {
        Ok(saved) => {
            let loaded =
                Loaded::FromDisk { generation: saved.config.generation, saved_at_ms: saved.saved_at_ms };
            Ok((Some(saved.config), loaded))
        }
        Err(reason) => {
            let mut to = path.as_os_str().to_owned();
            to.push(format!(".damaged-{now_ms}"));
            let to = PathBuf::from(to);
            fs::rename(path, &to).map_err(failed("moved aside although it is damaged"))?;
            tracing::error!(path = %path.display(), kept_as = %to.display(), reason, "the view's snapshot is damaged: starting empty");
            Ok((None, Loaded::Quarantined { to, reason }))
        }
    }
}

fn decode(bytes: &[u8]) -> Result<Saved<ConfigState>, String> {
    if bytes.len() as u64 > MAX_BYTES {
        return Err(format!("it is larger than {MAX_BYTES} bytes"));
    }
    let end = bytes.iter().take(256).position(|byte| *byte == b'\n').ok_or("its first line is missing")?;
    let (head, body) = (&bytes[..end], &bytes[end + 1..]);
    let head = std::str::from_utf8(head).map_err(|_| "its first line is not text")?;
    let expected = head.strip_prefix(MAGIC).ok_or("it does not begin as a snapshot does")?.trim();
    let found = blake3::hash(body).to_hex();
    if expected != found.as_str() {
        return Err("its checksum does not match".into());
    }
    serde_json::from_slice(body).map_err(|error| format!("it cannot be understood: {error}"))
}

fn encode(config: &ConfigState, saved_at_ms: u64) -> Result<Vec<u8>, ViewError> {
    let body = serde_json::to_vec(&Saved { saved_at_ms, config }).map_err(ViewError::Encode)?;
    let mut bytes = format!("{MAGIC} {}\n", blake3::hash(&body).to_hex()).into_bytes();
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

/// Write beside, fsync, rename, fsync the folder: a crash leaves the old file or the new one.
fn write(path: &Path, config: &ConfigState, saved_at_ms: u64) -> Result<(), ViewError> {
    let bytes = encode(config, saved_at_ms)?;
    let beside = path.with_extension("new");
    let failed = |action| move |source| ViewError::Io { path: path.to_owned(), action, source };
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&beside)
        .map_err(failed("created"))?;
    file.write_all(&bytes).map_err(failed("written"))?;
    file.sync_all().map_err(failed("synced"))?;
    fs::rename(&beside, path).map_err(failed("replaced"))?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed("synced"))
}

/// The thread that writes, so that no publisher waits for a disk.
pub(crate) struct Keeper {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    woken: Condvar,
}

#[derive(Default)]
struct State {
    /// The newest config facts that are not on disk, and when they were published.
    waiting: Option<(Arc<ConfigState>, u64)>,
    /// Counts publications; `settled` is the newest one that was written or failed.
    published: u64,
    settled: u64,
    /// The error of the last write, if it failed.
    failed: Option<ViewError>,
    /// Somebody waits in `flush`: write without waiting for quiet.
    hurry: bool,
    closing: bool,
}

impl Keeper {
    pub fn start(path: &Path) -> Result<Self, ViewError> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(|source| ViewError::Io {
                path: path.to_owned(),
                action: "given a folder",
                source,
            })?;
        }
        let shared = Arc::new(Shared { state: Mutex::default(), woken: Condvar::new() });
        let (path, theirs) = (path.to_owned(), Arc::clone(&shared));
        let thread = std::thread::Builder::new()
            .name("view-snapshot".into())
            .spawn(move || keep(&path, &theirs))
            .map_err(ViewError::Thread)?;
        Ok(Self { shared, thread: Some(thread) })
    }

    pub fn save(&self, config: Arc<ConfigState>, now_ms: u64) {
        let mut state = self.shared.lock();
        state.waiting = Some((config, now_ms));
        state.published += 1;
        self.shared.woken.notify_all();
    }

    pub fn flush(&self) -> Result<(), ViewError> {
        let mut state = self.shared.lock();
        let wanted = state.published;
        // A failed write waits for its retry; whoever flushes wants to know now.
        state.hurry = true;
        self.shared.woken.notify_all();
        while state.settled < wanted || state.hurry {
            state = self.shared.woken.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.failed.take().map_or(Ok(()), Err)
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.woken.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that keeps the view's snapshot panicked");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is something to write and it is time to, or until the end.
    fn next(&self) -> Option<(Arc<ConfigState>, u64, u64)> {
        let mut state = self.lock();
        while state.waiting.is_none() && !state.closing {
            if state.hurry {
                state.hurry = false;
                self.woken.notify_all();
            }
            state = self.woken.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let latest = Instant::now() + LONGEST;
        let (mut seen, mut quiet) = (state.published, Instant::now() + QUIET);
        while !state.closing && !state.hurry {
            let now = Instant::now();
            if now >= quiet.min(latest) {
                break;
            }
            let wait = quiet.min(latest) - now;
            state = self.woken.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
            if state.published != seen {
                (seen, quiet) = (state.published, Instant::now() + QUIET);
            }
        }
        let published = state.published;
        state.waiting.take().map(|(config, at_ms)| (config, at_ms, published))
    }

    /// Notes what became of a write; a failed one waits again unless something newer does.
    fn settle(&self, number: u64, config: Arc<ConfigState>, at_ms: u64, result: Result<(), ViewError>) {
        let mut state = self.lock();
        state.settled = number;
        state.failed = result.err();
        state.hurry = false;
        self.woken.notify_all();
        if let Some(error) = &state.failed {
            tracing::error!(error = error as &dyn std::error::Error, "config facts are not on disk, trying again");
            state.waiting.get_or_insert((config, at_ms));
            let until = Instant::now() + RETRY;
            while !state.closing && !state.hurry && Instant::now() < until {
                let wait = until.saturating_duration_since(Instant::now());
                state = self.woken.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }
}

fn keep(path: &Path, shared: &Shared) {
    while let Some((config, at_ms, number)) = shared.next() {
        let result = write(path, &config, at_ms);
        let failed = result.is_err();
        shared.settle(number, config, at_ms, result);
        if failed && shared.lock().closing {
            // It was tried; the file on disk is the older one, and whole.
            return;
        }
    }
}
