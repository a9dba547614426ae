//! Copies of files between here and a machine. What comes from a machine is hostile: it lands below one new
//! name, never follows a link, and is bounded.

use crate::exec::{self, Ended};
use crate::{CliError, Exit, Session, ui};
use bytes::Bytes;
use dunlin_api::exec::{CHUNK_BYTES, ExecStart, STDOUT};
use dunlin_model::transfer::{self, Entry, Kind, LENGTH_BYTES, Next, Transfer};
use dunlin_model::{AppName, MachineId};
use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

const QUEUE: usize = 8;
/// What a machine says of a failed copy.
const MAX_COMPLAINT_BYTES: usize = 16 * 1024;
/// Directories and links are remembered until the end.
const MAX_REMEMBERED: usize = 200_000;
const SHOW_EVERY: Duration = Duration::from_millis(250);

type At<'a> = (&'a AppName, &'a MachineId);

pub async fn get(session: &Session, (app, id): At<'_>, remote: &str, local: Option<&Path>, force: bool) -> Result<Exit, CliError> {
    let name = remote.rsplit('/').find(|part| !part.is_empty() && *part != "." && *part != "..").unwrap_or("root");
    let local = match local {
        Some(local) if local.is_dir() => local.join(name),
        Some(local) => local.to_owned(),
        None => PathBuf::from(name),
    };
    let is_there = fs::symlink_metadata(&local).ok();
    if let Some(there) = &is_there
        && (!force || there.is_dir())
    {
        let hint = if there.is_dir() { "name another, or remove it" } else { "name another, or add --force" };
        return Err(CliError::failed(format!("{} is there already", local.display())).hint(hint));
    }
    let start = ExecStart { transfer: Some(Transfer::Get { path: remote.to_owned() }), ..ExecStart::default() };
    let (input, events) = exec::open(session, app, id, start).await?;
    let (sink, mut chunks) = mpsc::channel::<(u8, Bytes)>(QUEUE);
    let mut incoming = Incoming::new(&local);
    let writer = thread::spawn(move || {
        let mut complaint = Vec::new();
        while let Some((stream, bytes)) = chunks.blocking_recv() {
            if stream == STDOUT {
                incoming.feed(&bytes)?;
            } else {
                complain(&mut complaint, &bytes);
            }
        }
        Ok::<_, io::Error>((incoming, complaint))
    });
    let (_nothing, source) = mpsc::channel(1);
    let ended = exec::follow(input, events, source, sink).await;
    let written = writer.join().map_err(|_| CliError::failed("the copy could not be written"))?;
    let (incoming, complaint) = written.map_err(|e| cannot_write(&local, &e))?;
    finished(ended?, &complaint)?;
    let (files, bytes) = incoming.finish().map_err(|e| cannot_write(&local, &e))?;
    done(session, &local.display().to_string(), files, bytes);
    Ok(Exit::Ok)
}

fn cannot_write(local: &Path, e: &io::Error) -> CliError {
    CliError::failed(format!("{} cannot be written: {e}", local.display())).hint("nothing of the copy is left there")
}

pub async fn put(session: &Session, (app, id): At<'_>, local: &Path, remote: Option<&str>) -> Result<Exit, CliError> {
    let unreadable = |e: io::Error| CliError::failed(format!("{} cannot be read: {e}", local.display())).hint("name a file or directory that is here");
    fs::metadata(local).map_err(unreadable)?;
    let real = fs::canonicalize(local).map_err(unreadable)?;
    let name = local.file_name().or(real.file_name()).and_then(|name| name.to_str());
    let name = name.ok_or_else(|| CliError::usage(format!("{} has no name to copy", local.display())).hint("name a directory by its own name"))?;
    let remote = remote.unwrap_or("/").to_owned();
    let start = ExecStart { transfer: Some(Transfer::Put { path: remote.clone() }), ..ExecStart::default() };
    let (input, events) = exec::open(session, app, id, start).await?;
    let (sender, source) = mpsc::channel(QUEUE);
    let name = name.to_owned();
    let reader = thread::spawn(move || {
        let mut outgoing = Outgoing { to: sender, progress: Progress::new(), files: 0 };
        outgoing.send(&real, &name)?;
        outgoing.chunk(&transfer::END)?;
        Ok::<_, io::Error>((outgoing.files, outgoing.progress.bytes))
    });
    let (sink, mut chunks) = mpsc::channel::<(u8, Bytes)>(QUEUE);
    let complaints = thread::spawn(move || {
        let mut complaint = Vec::new();
        while let Some((_, bytes)) = chunks.blocking_recv() {
            complain(&mut complaint, &bytes);
        }
        complaint
    });
    let ended = exec::follow(input, events, source, sink).await;
    let read = reader.join().map_err(|_| CliError::failed("the files could not be read"))?;
    let complaint = complaints.join().map_err(|_| CliError::failed("the machine's answer could not be read"))?;
    match read {
        // The machine gave up first, and has said why.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {
            finished(ended?, &complaint)?;
            Err(CliError::failed("the machine took no more of the copy"))
        }
        Err(e) => Err(unreadable(e)),
        Ok((files, bytes)) => {
            finished(ended?, &complaint)?;
            done(session, &format!("{id}:{remote}"), files, bytes);
            Ok(Exit::Ok)
        }
    }
}

fn complain(complaint: &mut Vec<u8>, bytes: &[u8]) {
    let room = MAX_COMPLAINT_BYTES.saturating_sub(complaint.len());
    complaint.extend_from_slice(&bytes[..bytes.len().min(room)]);
}

fn finished(ended: Ended, complaint: &[u8]) -> Result<(), CliError> {
    match ended {
        Ended::Exited(0) => Ok(()),
        Ended::Exited(_) | Ended::NotRead => {
            let said = String::from_utf8_lossy(complaint);
            let said: String = said.trim().chars().filter(|c| !c.is_control()).collect();
            Err(CliError::failed(if said.is_empty() { "the copy was ended".to_owned() } else { said })
                .hint("paths are those of the machine: `dunlin ssh console` shows them"))
        }
        Ended::Left(code) => {
            exec::exit(code);
            Ok(())
        }
    }
}

fn done(session: &Session, what: &str, files: u64, bytes: u64) {
    if session.json {
        ui::print_json(&serde_json::json!({ "copied": what, "files": files, "bytes": bytes }));
    } else {
        let s = if files == 1 { "" } else { "s" };
        ui::print_line(&format!("copied {what}: {files} file{s}, {bytes} bytes"));
    }
}

/// Shown where somebody looks.
struct Progress {
    bytes: u64,
    shown: Instant,
    is_shown: bool,
}

impl Progress {
    fn new() -> Self {
        Self { bytes: 0, shown: Instant::now(), is_shown: io::stderr().is_terminal() }
    }

    fn add(&mut self, bytes: usize, name: &str) {
        self.bytes += bytes as u64;
        if self.is_shown && self.shown.elapsed() >= SHOW_EVERY {
            self.shown = Instant::now();
            let name: String = name.chars().filter(|c| !c.is_control()).take(60).collect();
            eprint!("\r\x1b[K{:.1} MiB  {name}", self.bytes as f64 / (1 << 20) as f64);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.is_shown {
            eprint!("\r\x1b[K");
        }
    }
}

/// Files of ours on their way.
struct Outgoing {
    to: mpsc::Sender<Vec<u8>>,
    progress: Progress,
    files: u64,
}

impl Outgoing {
    fn chunk(&self, bytes: &[u8]) -> io::Result<()> {
        self.to.blocking_send(bytes.to_vec()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn header(&self, entry: &Entry) -> io::Result<()> {
        self.chunk(&transfer::encode(entry).map_err(io::Error::other)?)
    }

    fn send(&mut self, path: &Path, name: &str) -> io::Result<()> {
        let meta = fs::symlink_metadata(path)?;
        let entry = |kind, size, target| Entry { path: name.to_owned(), kind, mode: mode(&meta), size, target };
        let not_utf8 = || io::Error::other(format!("{}: a name is not UTF-8", path.display()));
        if meta.is_symlink() {
            let target = fs::read_link(path)?;
            return self.header(&entry(Kind::Link, 0, target.to_str().ok_or_else(not_utf8)?.to_owned()));
        }
        if meta.is_dir() {
            self.header(&entry(Kind::Directory, 0, String::new()))?;
            for found in fs::read_dir(path)? {
                let found = found?;
                let own = found.file_name();
                self.send(&found.path(), &format!("{name}/{}", own.to_str().ok_or_else(not_utf8)?))?;
            }
            return Ok(());
        }
        if !meta.is_file() {
            return Ok(()); // a socket, pipe or device is not content
        }
        let mut file = File::open(path)?;
        let size = file.metadata()?.len();
        self.header(&entry(Kind::File, size, String::new()))?;
        let (mut left, mut chunk) = (size, vec![0; CHUNK_BYTES]);
        while left > 0 {
            let wanted = chunk.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let read = file.read(&mut chunk[..wanted])?;
            if read == 0 {
                return Err(io::Error::other("it became shorter while it was copied"));
            }
            self.chunk(&chunk[..read])?;
            self.progress.add(read, name);
            left -= read as u64;
        }
        self.files += 1;
        Ok(())
    }
}

#[cfg(unix)]
fn mode(meta: &fs::Metadata) -> u32 {
    std::os::unix::fs::MetadataExt::mode(meta) & 0o777
}

#[cfg(not(unix))]
fn mode(meta: &fs::Metadata) -> u32 {
    if meta.is_dir() { 0o755 } else { 0o644 }
}

/// Files of a machine, put together beside where they are to be; removed unless they come to their end.
struct Incoming {
    local: PathBuf,
    beside: PathBuf,
    state: State,
    pending: Vec<u8>,
    directories: HashSet<PathBuf>,
    /// Made at the end, so that nothing is written through one.
    links: Vec<(PathBuf, String)>,
    progress: Progress,
    files: u64,
    kept: bool,
}

enum State {
    Length,
    Header(usize),
    Content(File, u64, String),
    End,
}

impl Incoming {
    fn new(local: &Path) -> Self {
        let name = local.file_name().unwrap_or_default().to_string_lossy();
        let beside = local.with_file_name(format!(".{name}.dunlin-{}", std::process::id()));
        Self {
            local: local.to_owned(),
            beside,
            state: State::Length,
            pending: vec![],
            directories: HashSet::new(),
            links: vec![],
            progress: Progress::new(),
            files: 0,
            kept: false,
        }
    }

    fn feed(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match &mut self.state {
                State::Length => {
                    if let Some(length) = take(&mut self.pending, &mut bytes, LENGTH_BYTES) {
                        let length = length.try_into().map_err(|_| io::ErrorKind::InvalidData)?;
                        self.state = match transfer::length(length).map_err(io::Error::other)? {
                            Next::Header(length) => State::Header(length),
                            Next::End => State::End,
                        };
                    }
                }
                State::Header(length) => {
                    let length = *length;
                    if let Some(header) = take(&mut self.pending, &mut bytes, length) {
                        let entry = transfer::decode(&header).map_err(io::Error::other)?;
                        self.state = self.begin(entry)?;
                    }
                }
                State::Content(file, left, name) => {
                    let now = bytes.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                    file.write_all(&bytes[..now])?;
                    self.progress.add(now, name);
                    *left -= now as u64;
                    bytes = &bytes[now..];
                    if *left == 0 {
                        self.state = State::Length;
                    }
                }
                State::End => return Err(io::Error::other("the machine sends more than it said")),
            }
        }
        Ok(())
    }

    fn begin(&mut self, entry: Entry) -> io::Result<State> {
        let path = match entry.path.split_once('/') {
            None => self.beside.clone(),
            Some((_, rest)) => self.beside.join(rest),
        };
        // Only into what this copy itself has made.
        if entry.path.contains('/') && !path.parent().is_some_and(|parent| self.directories.contains(parent)) {
            return Err(io::Error::other(format!("{:?} is in no directory of the copy", entry.path)));
        }
        if self.directories.len() + self.links.len() >= MAX_REMEMBERED {
            return Err(io::Error::other(format!("it has more than {MAX_REMEMBERED} directories and links")));
        }
        match entry.kind {
            Kind::Directory => {
                fs::create_dir(&path)?;
                self.directories.insert(path);
            }
            Kind::Link => self.links.push((path, entry.target)),
            Kind::File => {
                let file = create(&path, entry.mode)?;
                self.files += 1;
                if entry.size > 0 {
                    return Ok(State::Content(file, entry.size, entry.path));
                }
            }
        }
        Ok(State::Length)
    }

    /// Gives the copy its name; returns how many files and bytes it has.
    fn finish(mut self) -> io::Result<(u64, u64)> {
        if !matches!(self.state, State::End) {
            return Err(io::Error::other("the copy was cut off"));
        }
        for (path, target) in &self.links {
            link(target, path)?;
        }
        fs::rename(&self.beside, &self.local)?;
        self.kept = true;
        Ok((self.files, self.progress.bytes))
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.kept {
            // One of them, or neither if nothing came.
            let _ = fs::remove_file(&self.beside);
            let _ = fs::remove_dir_all(&self.beside);
        }
    }
}

/// `length` bytes, once they have come.
fn take(pending: &mut Vec<u8>, bytes: &mut &[u8], length: usize) -> Option<Vec<u8>> {
    let now = bytes.len().min(length - pending.len());
    pending.extend_from_slice(&bytes[..now]);
    *bytes = &bytes[now..];
    (pending.len() == length).then(|| std::mem::take(pending))
}

#[cfg(unix)]
fn create(path: &Path, mode: u32) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    File::options().write(true).create_new(true).mode(mode & 0o777).open(path)
}

#[cfg(not(unix))]
fn create(path: &Path, _mode: u32) -> io::Result<File> {
    File::options().write(true).create_new(true).open(path)
}

#[cfg(unix)]
fn link(target: &str, path: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, path)
}

#[cfg(not(unix))]
fn link(_target: &str, path: &Path) -> io::Result<()> {
    Err(io::Error::other(format!("{}: links cannot be made on this system", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, kind: Kind, content: &str, target: &str) -> Vec<u8> {
        let entry = Entry { path: path.into(), kind, mode: 0o640, size: content.len() as u64, target: target.into() };
        let mut bytes = transfer::encode(&entry).unwrap();
        bytes.extend_from_slice(content.as_bytes());
        bytes
    }

    /// Whole, or byte by byte, it is the same; a failure leaves nothing.
    fn check(entries: &[Vec<u8>], end: &[u8], expected: Result<(u64, u64), &str>) -> tempfile::TempDir {
        let stream: Vec<u8> = entries.concat().into_iter().chain(end.iter().copied()).collect();
        let mut last = None;
        for step in [1, 7, stream.len()] {
            let dir = tempfile::tempdir().unwrap();
            let mut incoming = Incoming::new(&dir.path().join("copy"));
            let fed = stream.chunks(step).try_for_each(|chunk| incoming.feed(chunk));
            let got = match fed {
                Ok(()) => incoming.finish(),
                Err(e) => {
                    drop(incoming);
                    Err(e)
                }
            };
            let left = fs::read_dir(dir.path()).unwrap().count();
            match (expected, got) {
                (Ok(expected), got) => assert_eq!((got.unwrap(), left), (expected, 1)),
                (Err(expected), got) => {
                    let error = got.unwrap_err().to_string();
                    assert!(error.contains(expected) && left == 0, "{error}, {left} left");
                }
            }
            last = Some(dir);
        }
        last.unwrap()
    }

    #[test]
    fn what_comes_lands_below_one_name() {
        let tree = [
            entry("d", Kind::Directory, "", ""),
            entry("d/a", Kind::File, "abc", ""),
            entry("d/sub", Kind::Directory, "", ""),
            entry("d/sub/empty", Kind::File, "", ""),
            entry("d/out", Kind::Link, "", "/etc"),
        ];
        let dir = check(&tree, &transfer::END, Ok((2, 3)));
        assert_eq!(fs::read_to_string(dir.path().join("copy/a")).unwrap(), "abc");
        assert_eq!(fs::read_link(dir.path().join("copy/out")).unwrap(), Path::new("/etc"));
        check(&[entry("f", Kind::File, "x", "")], &transfer::END, Ok((1, 1)));
    }

    #[test]
    fn a_hostile_machine_writes_nowhere_else() {
        let root = || entry("d", Kind::Directory, "", "");
        let link = || entry("d/l", Kind::Link, "", "/tmp");
        check(&[root(), link(), entry("d/l/x", Kind::File, "x", "")], &transfer::END, Err("no directory of the copy"));
        check(&[root(), link(), entry("d/l/x", Kind::Link, "", "y")], &transfer::END, Err("no directory of the copy"));
        check(&[root(), entry("d/../x", Kind::File, "x", "")], &transfer::END, Err("leads out"));
        check(&[entry("l", Kind::Link, "", "/tmp"), entry("l/x", Kind::File, "x", "")], &transfer::END, Err("no directory"));
        check(&[root(), entry("d/a", Kind::File, "x", ""), entry("d/a", Kind::File, "y", "")], &transfer::END, Err("exists"));
        check(&[root(), entry("d/a", Kind::File, "abc", "")], b"", Err("cut off"));
        check(&[root()], &[0, 0, 0, 0, 1], Err("more than it said"));
        check(&[root()], &[255; 4], Err("header"));
    }
}
