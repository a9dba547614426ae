//! One entry of a layer, put together from the tar headers that describe it. Long names and extensions are
//! read here, with limits, because a library that reads them whole reads whatever size they claim.

use super::UnpackError;
use std::io::{self, Read};

/// PATH_MAX of Linux.
const MAX_PATH_BYTES: u64 = 4096;
/// Extension headers hold a few names and attributes.
const MAX_EXTENSION_BYTES: u64 = 1 << 20;
/// Bounds what a layer may attach to one file.
const MAX_XATTRS: usize = 32;

/// What earlier headers said about the next entry.
#[derive(Default)]
pub(super) struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    size: Option<u64>,
    xattrs: Vec<(String, Vec<u8>)>,
}

/// An entry to act on.
pub(super) struct Entry {
    pub kind: tar::EntryType,
    pub path: Vec<u8>,
    pub link: Option<Vec<u8>>,
    pub uid: u32,
    pub gid: u32,
    pub mode: u32,
    /// Seconds and nanoseconds.
    pub mtime: (i64, u32),
    pub xattrs: Vec<(String, Vec<u8>)>,
}

impl Extensions {
    /// Takes the header if it only describes the next entry; otherwise gives the entry itself.
    pub fn take<R: Read>(&mut self, raw: &mut tar::Entry<'_, R>) -> Result<Option<Entry>, UnpackError> {
        let kind = raw.header().entry_type();
        if kind.is_gnu_longname() {
            self.path = Some(until_nul(read_limited(raw, MAX_PATH_BYTES, "a path")?));
        } else if kind.is_gnu_longlink() {
            self.link = Some(until_nul(read_limited(raw, MAX_PATH_BYTES, "the target of a link")?));
        } else if kind.is_pax_local_extensions() {
            let bytes = read_limited(raw, MAX_EXTENSION_BYTES, "an extension header")?;
            self.read_pax(&bytes)?;
        } else if kind.is_pax_global_extensions() {
            read_limited(raw, MAX_EXTENSION_BYTES, "an extension header")?; // comments of git, nothing else
        } else if kind.is_gnu_sparse() {
            return refused("it has a file in GNU's sparse format; archive it without --sparse");
        } else {
            return std::mem::take(self).into_entry(raw.header(), kind).map(Some);
        }
        Ok(None)
    }

    fn into_entry(self, header: &tar::Header, kind: tar::EntryType) -> Result<Entry, UnpackError> {
        let bad = |e: io::Error| UnpackError::Refused(format!("it has an entry whose header cannot be read: {e}"));
        let fields = header.as_old();
        let values = || -> io::Result<_> {
            let uid = or_zero(&fields.uid, || header.uid())?;
            let gid = or_zero(&fields.gid, || header.gid())?;
            let mode = or_zero(&fields.mode, || header.mode().map(u64::from))? as u32;
            let mtime = or_zero(&fields.mtime, || header.mtime())?;
            Ok((uid, gid, mode, mtime, or_zero(&fields.size, || header.entry_size())?))
        };
        let (uid, gid, mode, mtime, size) = values().map_err(bad)?;
        if self.size.is_some_and(|said| said != size) {
            return refused("it has a file of 8 GiB or more; keep such data on a volume");
        }
        let id = |said: Option<u64>, own: u64| {
            // u32::MAX means "unchanged" to the kernel
            let id = u32::try_from(said.unwrap_or(own)).ok().filter(|id| *id != u32::MAX);
            id.ok_or_else(|| UnpackError::Refused("it has a file whose owner is not a user id".into()))
        };
        let path = self.path.unwrap_or_else(|| header.path_bytes().into_owned());
        let link = self.link.or_else(|| header.link_name_bytes().map(|link| link.into_owned()));
        let too_long = |text: &[u8]| text.len() as u64 > MAX_PATH_BYTES || text.contains(&0);
        if too_long(&path) || link.as_deref().is_some_and(too_long) {
            return refused("it has a path of more than 4096 bytes, or with a zero byte in it");
        }
        Ok(Entry {
            kind,
            path,
            link,
            uid: id(self.uid, uid)?,
            gid: id(self.gid, gid)?,
            mode: mode & 0o7777,
            mtime: self.mtime.unwrap_or((i64::try_from(mtime).unwrap_or(0), 0)),
            xattrs: self.xattrs,
        })
    }

    fn read_pax(&mut self, bytes: &[u8]) -> Result<(), UnpackError> {
        let broken = || UnpackError::Refused("it has an extension header that cannot be read".into());
        let mut rest = bytes;
        while !rest.is_empty() {
            // "<length> <key>=<value>\n"
            let space = rest.iter().position(|b| *b == b' ').ok_or_else(broken)?;
            let len: usize = std::str::from_utf8(&rest[..space]).ok().and_then(|n| n.parse().ok()).ok_or_else(broken)?;
            if len <= space + 1 || len > rest.len() || rest[len - 1] != b'\n' {
                return Err(broken());
            }
            let record = &rest[space + 1..len - 1];
            rest = &rest[len..];
            let equals = record.iter().position(|b| *b == b'=').ok_or_else(broken)?;
            let key = std::str::from_utf8(&record[..equals]).map_err(|_| broken())?;
            let value = &record[equals + 1..];
            let number = || std::str::from_utf8(value).ok().and_then(|text| text.parse::<u64>().ok()).ok_or_else(broken);
            match key {
                "path" => self.path = Some(value.to_vec()),
                "linkpath" => self.link = Some(value.to_vec()),
                "uid" => self.uid = Some(number()?),
                "gid" => self.gid = Some(number()?),
                "size" => self.size = Some(number()?),
                "mtime" => self.mtime = Some(time(value).ok_or_else(broken)?),
                _ if key.starts_with("GNU.sparse.") => {
                    return refused("it has a file in GNU's sparse format; archive it without --sparse");
                }
                _ => {
                    if let Some(name) = key.strip_prefix("SCHILY.xattr.").filter(|name| is_kept(name)) {
                        if self.xattrs.len() == MAX_XATTRS {
                            return refused("it has a file with more than 32 extended attributes");
                        }
                        self.xattrs.push((name.to_owned(), value.to_vec()));
                    }
                }
            }
        }
        Ok(())
    }
}

/// An empty field counts as zero, as in other readers of tar: buildah writes its whiteouts so.
fn or_zero(field: &[u8], read: impl FnOnce() -> io::Result<u64>) -> io::Result<u64> {
    if field.iter().all(|byte| matches!(byte, 0 | b' ')) { Ok(0) } else { read() }
}

/// `trusted.` steers overlayfs and labels belong to the host: neither comes from an image.
pub(super) fn is_kept(name: &str) -> bool {
    name == "security.capability" || (name.starts_with("user.") && !name.starts_with("user.overlay."))
}

fn time(value: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(value).ok()?;
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    Some((seconds.parse().ok()?, digits.parse().ok()?))
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|b| *b == 0) {
        bytes.truncate(end);
    }
    bytes
}

fn read_limited<R: Read>(raw: &mut tar::Entry<'_, R>, max_bytes: u64, what: &str) -> Result<Vec<u8>, UnpackError> {
    if raw.size() > max_bytes + 1 {
        return refused(format!("it has {what} of more than {max_bytes} bytes"));
    }
    let mut bytes = Vec::new();
    raw.read_to_end(&mut bytes).map_err(UnpackError::io("read the archive of a layer"))?;
    Ok(bytes)
}

fn refused<T>(why: impl Into<String>) -> Result<T, UnpackError> {
    Err(UnpackError::Refused(why.into()))
}
