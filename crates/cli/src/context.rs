//! The build context: the source directory as a tar stream, less what `.dockerignore` names.

use crate::CliError;
use bytes::Bytes;
use dunlin_scan::ignore::Ignore;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::mpsc;

/// More is a mistake (a forgotten `node_modules`), and would take minutes to send.
const MAX_FILES: usize = 200_000;
const MAX_BYTES: u64 = 2 << 30;
const CHUNK_BYTES: usize = 256 * 1024;
/// Chunks that wait for the network.
const QUEUE: usize = 8;
/// Never part of a context unless `.dockerignore` is silent about them and they are asked for: history
/// and our own state.
const ALWAYS_IGNORED: &[&str] = &[".git", ".dunlin"];

/// A context that is being sent.
pub struct Context {
    pub files: usize,
    pub bytes: u64,
    pub body: Body,
    pub read_error: ReadError,
}

/// Why a file could not be read while the context was sent: the connection only says that it broke.
#[derive(Clone, Default)]
pub struct ReadError(Arc<Mutex<Option<String>>>);

impl ReadError {
    pub fn take(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn set(&self, error: &io::Error) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
    }
}

type Body = std::pin::Pin<Box<dyn futures_util::Stream<Item = io::Result<Bytes>> + Send + Sync>>;

/// Lists the files now, so that mistakes are said before anything is sent, and streams them as tar.
pub fn stream(root: &Path, ignorefile: Option<&str>, dockerfile: Option<&str>) -> Result<Context, CliError> {
    let ignore = load_ignore(root, ignorefile, dockerfile)?;
    let keep = dockerfile.unwrap_or("Dockerfile");
    let (mut files, mut bytes) = (Vec::new(), 0);
    walk(root, Path::new(""), &ignore, keep, &mut files, &mut bytes)?;
    files.sort();
    let count = files.len();
    let (sender, receiver) = mpsc::channel(QUEUE);
    let root = root.to_owned();
    let read_error = ReadError::default();
    let told = read_error.clone();
    tokio::task::spawn_blocking(move || {
        if let Err(error) = write_tar(&root, &files, &sender) {
            if error.kind() != io::ErrorKind::BrokenPipe {
                told.set(&error);
            }
            let _ = sender.blocking_send(Err(error)); // the request ended first, and says why itself
        }
    });
    let body = futures_util::stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|chunk| (chunk, receiver))
    });
    Ok(Context { files: count, bytes, body: Box::pin(body), read_error })
}

fn load_ignore(root: &Path, ignorefile: Option<&str>, dockerfile: Option<&str>) -> Result<Ignore, CliError> {
    let beside_dockerfile = format!("{}.dockerignore", dockerfile.unwrap_or("Dockerfile"));
    let candidates = match ignorefile {
        Some(name) => vec![name.to_owned()],
        None => vec![beside_dockerfile, ".dockerignore".to_owned()],
    };
    for name in &candidates {
        match fs::read_to_string(root.join(name)) {
            Ok(text) => return Ok(Ignore::parse(&text)),
            Err(e) if e.kind() == io::ErrorKind::NotFound && ignorefile.is_none() => {}
            Err(e) => return Err(CliError::usage(format!("{name} cannot be read: {e}"))),
        }
    }
    Ok(Ignore::parse(""))
}

fn walk(
    root: &Path,
    dir: &Path,
    ignore: &Ignore,
    keep: &str,
    files: &mut Vec<PathBuf>,
    bytes: &mut u64,
) -> Result<(), CliError> {
    let unreadable = |path: &Path, e: io::Error| {
        CliError::failed(format!("{} cannot be read: {e}", path.display()))
            .hint("mend its permissions, or name it in .dockerignore")
    };
    let listing = fs::read_dir(root.join(dir)).map_err(|e| unreadable(&root.join(dir), e))?;
    for entry in listing {
        let entry = entry.map_err(|e| unreadable(&root.join(dir), e))?;
        let path = dir.join(entry.file_name());
        let Some(text) = path.to_str() else {
            return Err(CliError::failed(format!("{} is not UTF-8", path.display())).hint("rename it"));
        };
        if dir.as_os_str().is_empty() && ALWAYS_IGNORED.contains(&text) {
            continue;
        }
        let kind = entry.file_type().map_err(|e| unreadable(&path, e))?;
        let ignored = text != keep && ignore.is_ignored(text);
        if kind.is_dir() {
            // A later `!pattern` may bring back something below an ignored directory.
            if !ignored || ignore.may_include_below(text) {
                if !ignored {
                    files.push(path.clone());
                }
                walk(root, &path, ignore, keep, files, bytes)?;
            }
        } else if !ignored && (kind.is_file() || kind.is_symlink()) {
            *bytes += entry.metadata().map_err(|e| unreadable(&path, e))?.len();
            files.push(path);
        }
        if files.len() > MAX_FILES || *bytes > MAX_BYTES {
            return Err(CliError::failed(format!(
                "the build context has more than {MAX_FILES} files or {} GiB",
                MAX_BYTES >> 30
            ))
            .hint("name what the build does not need in .dockerignore, for example node_modules or data"));
        }
    }
    Ok(())
}

fn write_tar(root: &Path, files: &[PathBuf], sender: &mpsc::Sender<io::Result<Bytes>>) -> io::Result<()> {
    let mut archive = tar::Builder::new(Chunks { sender, pending: Vec::with_capacity(CHUNK_BYTES) });
    archive.follow_symlinks(false);
    archive.mode(tar::HeaderMode::Complete);
    for path in files {
        archive.append_path_with_name(root.join(path), path).map_err(|e| {
            io::Error::new(e.kind(), format!("{}: {e}", path.display()))
        })?;
    }
    archive.into_inner()?.flush()
}

/// A writer whose chunks are the request's body.
struct Chunks<'a> {
    sender: &'a mpsc::Sender<io::Result<Bytes>>,
    pending: Vec<u8>,
}

impl Write for Chunks<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.pending.extend_from_slice(bytes);
        if self.pending.len() >= CHUNK_BYTES {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let chunk = Bytes::from(std::mem::take(&mut self.pending));
        self.sender.blocking_send(Ok(chunk)).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::StreamExt;

    async fn names(root: &Path) -> Vec<String> {
        let mut context = stream(root, None, None).unwrap();
        let mut bytes = Vec::new();
        while let Some(chunk) = context.body.next().await {
            bytes.extend_from_slice(&chunk.unwrap());
        }
        let mut archive = tar::Archive::new(&bytes[..]);
        let entries = archive.entries().unwrap();
        entries.map(|entry| entry.unwrap().path().unwrap().display().to_string()).collect()
    }

    #[tokio::test]
    async fn what_is_ignored_is_not_sent_and_the_dockerfile_always_is() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [
            (".dockerignore", "*.log\nsecret\nDockerfile\nsub\n!sub/keep\n"),
            ("Dockerfile", "FROM x"),
            ("app.py", ""),
            ("x.log", ""),
            ("secret", ""),
            ("sub/keep", ""),
            ("sub/drop", ""),
            (".git/config", ""),
        ] {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let names = names(dir.path()).await;
        for kept in ["Dockerfile", "app.py", "sub/keep", ".dockerignore"] {
            assert!(names.iter().any(|name| name == kept), "{kept} in {names:?}");
        }
        for dropped in ["x.log", "secret", "sub/drop", ".git/config"] {
            assert!(!names.iter().any(|name| name == dropped), "{dropped} in {names:?}");
        }
    }
}
