//! How files travel into a machine and out of it: entries one after another, each a header and as many
//! bytes as it says, then an end. A copy without its end was cut off.

use serde::{Deserialize, Serialize};

/// Longest header: two paths of Linux and the rest.
pub const MAX_HEADER_BYTES: usize = 64 * 1024;
/// Before each header, its length, big-endian; zero is the end.
pub const LENGTH_BYTES: usize = 4;

/// Which way, and where in the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transfer {
    /// Out of the machine: a file, or a directory with all below it.
    Get { path: String },
    /// Into the machine. Into a directory that is there, otherwise by this name.
    Put { path: String },
}

/// One file. Its content, `size` bytes, follows the header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Relative; the first part is the name of what is copied.
    pub path: String,
    pub kind: Kind,
    pub mode: u32,
    pub size: u64,
    /// Of a link.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub target: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    File,
    Directory,
    Link,
}

/// What follows a length that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    Header(usize),
    End,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    #[error("the header of a file has {0} bytes, more than {MAX_HEADER_BYTES}")]
    TooLong(usize),
    #[error("the header of a file cannot be read: {0}")]
    Header(String),
    #[error("the path {0:?} leads out of what is copied")]
    Path(String),
}

/// The frame of a header.
pub fn encode(entry: &Entry) -> Result<Vec<u8>, TransferError> {
    let json = serde_json::to_vec(entry).map_err(|e| TransferError::Header(e.to_string()))?;
    if json.len() > MAX_HEADER_BYTES {
        return Err(TransferError::TooLong(json.len()));
    }
    let mut frame = (json.len() as u32).to_be_bytes().to_vec();
    frame.extend(json);
    Ok(frame)
}

pub const END: [u8; LENGTH_BYTES] = [0; LENGTH_BYTES];

pub fn length(bytes: [u8; LENGTH_BYTES]) -> Result<Next, TransferError> {
    match u32::from_be_bytes(bytes) as usize {
        0 => Ok(Next::End),
        length if length > MAX_HEADER_BYTES => Err(TransferError::TooLong(length)),
        length => Ok(Next::Header(length)),
    }
}

/// The header itself. Its path stays below where it is copied to.
pub fn decode(header: &[u8]) -> Result<Entry, TransferError> {
    let entry: Entry = serde_json::from_slice(header).map_err(|e| TransferError::Header(e.to_string()))?;
    let fine = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
    if !entry.path.split('/').all(fine) || entry.target.contains('\0') {
        return Err(TransferError::Path(entry.path));
    }
    match entry.kind {
        Kind::File => Ok(entry),
        _ => Ok(Entry { size: 0, ..entry }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(path: &str, fine: bool) {
        let entry = Entry { path: path.into(), kind: Kind::File, mode: 0o644, size: 3, target: String::new() };
        let frame = encode(&entry).unwrap();
        let (head, header) = frame.split_at(LENGTH_BYTES);
        assert_eq!(length(head.try_into().unwrap()), Ok(Next::Header(header.len())));
        assert_eq!(decode(header).ok(), fine.then_some(entry), "{path}");
    }

    #[test]
    fn a_path_stays_where_it_is_copied_to() {
        check("a", true);
        check("a/b c/..d", true);
        for path in ["", "/a", "a/", "a//b", "../a", "a/..", "a/./b", "a/\0"] {
            check(path, false);
        }
    }

    #[test]
    fn lengths_are_bounded() {
        assert_eq!(length(END), Ok(Next::End));
        assert_eq!(length([255; 4]), Err(TransferError::TooLong(u32::MAX as usize)));
        let entry = Entry { path: "x".repeat(MAX_HEADER_BYTES), kind: Kind::Link, mode: 0, size: 0, target: String::new() };
        assert!(encode(&entry).is_err());
    }
}
