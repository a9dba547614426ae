//! Copying files into a machine and out of it, by a process of our own that has become the machine's
//! root: in its namespaces, control group and filters, so that a link leads nowhere that the machine's
//! own programs could not go. No program of the image takes part.

use dunlin_model::transfer::{self, Entry, Kind, LENGTH_BYTES, Next, Transfer};
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, open};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Gid, Uid, fchown, linkat};
use std::fs::{self, File, Metadata};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

const BUFFER_BYTES: usize = 64 * 1024;
/// Files of /proc and /sys say that they are empty.
const MAX_UNSIZED_BYTES: u64 = 4 << 20;
/// Directories below directories; more is a loop of somebody's making.
const MAX_DEPTH: usize = 256;
/// Of a file that is not whole yet.
const PRIVATE: Mode = Mode::from_bits_truncate(0o600);

/// Copies between the machine's files and descriptors 0 and 1; what went wrong goes to descriptor 2.
/// Returns the exit code.
pub(crate) fn serve(transfer: &Transfer) -> i32 {
    let done = match transfer {
        Transfer::Get { path } => get(Path::new(path), BufWriter::with_capacity(BUFFER_BYTES, stream(1))),
        Transfer::Put { path } => put(Path::new(path), BufReader::with_capacity(BUFFER_BYTES, stream(0))),
    };
    match done {
        Ok(()) => 0,
        Err(e) => {
            let _ = writeln!(stream(2), "{e}"); // nobody may be there to hear it
            1
        }
    }
}

/// Without the standard library's own buffers, which belong to the supervisor that this was forked from.
fn stream(number: i32) -> impl Read + Write {
    use std::os::fd::FromRawFd;
    // SAFETY: descriptors 0-2 were put there for this process; each is wrapped once and closed by its end.
    unsafe { File::from_raw_fd(number) }
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> io::Error {
    let path = path.display().to_string();
    move |e| io::Error::new(e.kind(), format!("{path}: {e}"))
}

fn get(path: &Path, mut to: impl Write) -> io::Result<()> {
    let meta = fs::metadata(path).map_err(at(path))?;
    // Of `/`, `.` and `..` the real name.
    let real = fs::canonicalize(path).map_err(at(path))?;
    let name = path.file_name().or(real.file_name()).map_or("root".into(), |name| name.to_owned());
    let name = name.to_str().ok_or_else(|| io::Error::other(format!("{}: its name is not UTF-8", path.display())))?;
    send(&real, name, &meta, &mut to, 0)?;
    to.write_all(&transfer::END)?;
    to.flush()
}

fn send(path: &Path, name: &str, meta: &Metadata, to: &mut impl Write, depth: usize) -> io::Result<()> {
    let kind = meta.file_type();
    let entry = |kind, size, target| Entry { path: name.to_owned(), kind, mode: meta.mode() & 0o777, size, target };
    let header = |entry: Entry| transfer::encode(&entry).map_err(io::Error::other);
    if kind.is_symlink() {
        let target = fs::read_link(path).map_err(at(path))?;
        let target = target.to_str().ok_or_else(|| io::Error::other(format!("{}: its target is not UTF-8", path.display())))?;
        return to.write_all(&header(entry(Kind::Link, 0, target.to_owned()))?);
    }
    if kind.is_dir() {
        if depth > MAX_DEPTH {
            return Err(io::Error::other(format!("{}: more than {MAX_DEPTH} directories deep", path.display())));
        }
        to.write_all(&header(entry(Kind::Directory, 0, String::new()))?)?;
        for found in fs::read_dir(path).map_err(at(path))? {
            let found = found.map_err(at(path))?;
            let below = found.path();
            let meta = match found.metadata() {
                Ok(meta) => meta,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue, // removed meanwhile
                Err(e) => return Err(at(&below)(e)),
            };
            let own = found.file_name();
            let own = own.to_str().ok_or_else(|| io::Error::other(format!("{}: its name is not UTF-8", below.display())))?;
            send(&below, &format!("{name}/{own}"), &meta, to, depth + 1)?;
        }
        return Ok(());
    }
    if !kind.is_file() {
        if depth > 0 {
            return Ok(()); // a socket, pipe or device is not content
        }
        let what = if kind.is_socket() { "a socket" } else { "a pipe or device" };
        return Err(io::Error::other(format!("{}: it is {what}, not a file or directory", path.display())));
    }
    // Whatever was put in its place meanwhile: a pipe that nobody writes to must not hold us.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = File::options().read(true).custom_flags(flags).open(path).map_err(at(path))?;
    let size = file.metadata().map_err(at(path))?.len();
    if size == 0 {
        let mut content = Vec::new();
        file.take(MAX_UNSIZED_BYTES).read_to_end(&mut content).map_err(at(path))?;
        to.write_all(&header(entry(Kind::File, content.len() as u64, String::new()))?)?;
        return to.write_all(&content);
    }
    to.write_all(&header(entry(Kind::File, size, String::new()))?)?;
    if io::copy(&mut file.take(size), to)? < size {
        return Err(io::Error::other(format!("{}: it became shorter while it was copied", path.display())));
    }
    Ok(())
}

fn put(path: &Path, mut from: impl Read) -> io::Result<()> {
    let into_directory = fs::metadata(path).is_ok_and(|meta| meta.is_dir());
    if !into_directory && path.as_os_str().as_encoded_bytes().ends_with(b"/") {
        return Err(io::Error::other(format!("{}: there is no such directory", path.display())));
    }
    loop {
        let mut length = [0; LENGTH_BYTES];
        from.read_exact(&mut length).map_err(cut_off)?;
        let Next::Header(length) = transfer::length(length).map_err(io::Error::other)? else { return Ok(()) };
        let mut header = vec![0; length];
        from.read_exact(&mut header).map_err(cut_off)?;
        let entry = transfer::decode(&header).map_err(io::Error::other)?;
        let (first, rest) = entry.path.split_once('/').map_or((entry.path.as_str(), None), |(first, rest)| (first, Some(rest)));
        let mut target = if into_directory { path.join(first) } else { path.to_owned() };
        if let Some(rest) = rest {
            target.push(rest);
        }
        receive(&entry, &target, &mut from).map_err(at(&target))?;
    }
}

fn cut_off(e: io::Error) -> io::Error {
    match e.kind() {
        io::ErrorKind::UnexpectedEof => io::Error::new(e.kind(), "the copy was cut off"),
        _ => e,
    }
}

fn receive(entry: &Entry, target: &Path, from: &mut impl Read) -> io::Result<()> {
    match entry.kind {
        Kind::File => {
            // What a link names is written, as a program in the machine would.
            let target = fs::canonicalize(target).unwrap_or_else(|_| target.to_owned());
            write_file(entry, &target, from)
        }
        Kind::Directory => match fs::create_dir(target) {
            Ok(()) => fs::set_permissions(target, fs::Permissions::from_mode(entry.mode & 0o777 | 0o700)),
            Err(_) if fs::metadata(target).is_ok_and(|meta| meta.is_dir()) => Ok(()),
            Err(e) => Err(e),
        },
        Kind::Link => match symlink(&entry.target, target) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                fs::remove_file(target)?;
                symlink(&entry.target, target)
            }
            made => made,
        },
    }
}

/// The content goes to a file without a name, which the kernel removes with this process, and gets its
/// name once it is whole. One that replaces another keeps that one's owner and mode.
fn write_file(entry: &Entry, target: &Path, from: &mut impl Read) -> io::Result<()> {
    let before = match fs::symlink_metadata(target) {
        Ok(meta) if meta.is_dir() => return Err(io::Error::other("there is a directory of this name")),
        Ok(meta) => Some(meta),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(e) => return Err(e),
    };
    let dir = match target.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let beside = dir.join(format!(".{}.dunlin-{}", target.file_name().unwrap_or_default().to_string_lossy(), std::process::id()));
    let (mut file, has_name) = match open(dir, OFlag::O_TMPFILE | OFlag::O_WRONLY | OFlag::O_CLOEXEC, PRIVATE) {
        Ok(file) => (File::from(file), false),
        // overlayfs of older kernels: a kill leaves the file there, what else goes wrong does not.
        Err(nix::errno::Errno::EOPNOTSUPP) => {
            let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
            (File::from(open(&beside, flags, PRIVATE)?), true)
        }
        Err(e) => return Err(e.into()),
    };
    let written = fill(entry, &mut file, before.as_ref(), from);
    let named = written.and_then(|()| match has_name {
        true => file.sync_all().and_then(|()| fs::rename(&beside, target)),
        false => give_name(&file, &beside, target, before.is_some()),
    });
    named.inspect_err(|_| {
        let _ = fs::remove_file(&beside); // the first error is the one to tell
    })
}

/// Content, owner and mode.
fn fill(entry: &Entry, file: &mut File, before: Option<&Metadata>, from: &mut impl Read) -> io::Result<()> {
    if io::copy(&mut from.by_ref().take(entry.size), file)? < entry.size {
        return Err(cut_off(io::ErrorKind::UnexpectedEof.into()));
    }
    if let Some(before) = before {
        fchown(file.as_fd(), Some(Uid::from_raw(before.uid())), Some(Gid::from_raw(before.gid())))?;
    }
    let mode = before.map_or(entry.mode, Metadata::mode);
    Ok(fchmod(file.as_fd(), Mode::from_bits_truncate(mode & 0o777))?)
}

fn give_name(file: &File, beside: &Path, target: &Path, replaces: bool) -> io::Result<()> {
    let nameless = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let name = |target: &Path| linkat(AT_FDCWD, &nameless, AT_FDCWD, target, AtFlags::AT_SYMLINK_FOLLOW);
    if !replaces {
        match name(target) {
            Err(nix::errno::Errno::EEXIST) => {} // made meanwhile: replaced, as one that was there
            named => return Ok(named?),
        }
    }
    file.sync_all()?; // or a crash could leave neither the old content nor the new
    name(beside)?;
    fs::rename(beside, target)
}
