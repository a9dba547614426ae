//! Files that a machine finds in its root file system when it starts.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Files of one machine.
pub const MAX_FILES: usize = 64;
/// Base64 of all files of a machine together: its spec is one value of the store, which holds 256 KiB.
pub const MAX_INLINE_BYTES: usize = 128 * 1024;
const MAX_PATH_BYTES: usize = 1024;
/// Longest name of a secret.
const MAX_SECRET_NAME: usize = 255;
/// Directories that are made by the platform at every start: what is written there would not be seen.
const MADE: &[&str] = &["/proc", "/sys", "/dev", "/.fly"];
/// Files that the platform writes at every start.
const WRITTEN: &[&str] = &["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"];

/// One file: its content is here, or is the value of a secret.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineFile {
    /// Where the machine finds it: an absolute path.
    pub guest_path: String,
    /// Base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raw_value: Option<String>,
    /// The secret whose value is the content, in base64 too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_name: Option<String>,
    /// Permission bits; `None` = readable by all, written by root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<u32>,
}

impl MachineFile {
    /// Opens base64 as it stands in a file or a secret: blanks and newlines do not matter.
    pub fn decode(text: &str) -> Option<Vec<u8>> {
        let text: String = text.chars().filter(|c| !c.is_ascii_whitespace()).collect();
        BASE64.decode(text).ok()
    }

    pub fn encode(content: &[u8]) -> String {
        BASE64.encode(content)
    }
}

/// Whether a machine may have these files; says which one it may not have, and why.
pub fn check_files(files: &[MachineFile]) -> Result<(), String> {
    if files.len() > MAX_FILES {
        return Err(format!("files has more than {MAX_FILES} entries"));
    }
    let inline: usize = files.iter().filter_map(|file| file.raw_value.as_ref()).map(String::len).sum();
    if inline > MAX_INLINE_BYTES {
        return Err(format!(
            "files hold {inline} bytes of base64, more than the {MAX_INLINE_BYTES} that go with a machine; put large files into the image"
        ));
    }
    let mut paths = BTreeSet::new();
    for (nth, file) in files.iter().enumerate() {
        check_path(&file.guest_path).map_err(|why| format!("files[{nth}].guest_path {why}"))?;
        if !paths.insert(file.guest_path.as_str()) {
            return Err(format!("files[{nth}].guest_path is there twice: {}", file.guest_path));
        }
        match (&file.raw_value, &file.secret_name) {
            (Some(text), None) if MachineFile::decode(text).is_none() => {
                return Err(format!("files[{nth}].raw_value is not base64"));
            }
            (None, Some(name)) if !is_secret_name(name) => {
                return Err(format!("files[{nth}].secret_name cannot be the name of a secret"));
            }
            (Some(_), None) | (None, Some(_)) => {}
            _ => return Err(format!("files[{nth}] needs one of raw_value and secret_name")),
        }
        if file.mode.is_some_and(|mode| mode > 0o777) {
            return Err(format!("files[{nth}].mode has more than permission bits (at most 511, octal 777)"));
        }
    }
    Ok(())
}

fn check_path(path: &str) -> Result<(), String> {
    let plain = |part: &str| !part.is_empty() && part != "." && part != "..";
    let is_path = path.len() <= MAX_PATH_BYTES
        && path.strip_prefix('/').is_some_and(|rest| rest.split('/').all(plain))
        && !path.chars().any(char::is_control);
    if !is_path {
        return Err(format!("must be an absolute path without . and .., of at most {MAX_PATH_BYTES} bytes"));
    }
    let below = |dir: &&&str| path == **dir || path.strip_prefix(**dir).is_some_and(|rest| rest.starts_with('/'));
    if let Some(dir) = MADE.iter().find(below) {
        return Err(format!("is in {dir}, which the platform makes at every start"));
    }
    if WRITTEN.contains(&path) {
        return Err(format!("is {path}, which the platform writes at every start"));
    }
    Ok(())
}

pub(crate) fn is_secret_name(name: &str) -> bool {
    let fits = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    !name.is_empty() && name.len() <= MAX_SECRET_NAME && name.bytes().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str) -> MachineFile {
        MachineFile { guest_path: path.into(), raw_value: Some("aGk=".into()), ..MachineFile::default() }
    }

    fn check(files: &[MachineFile], expected: &str) {
        match check_files(files) {
            Ok(()) => assert_eq!(expected, "", "{files:?}"),
            Err(said) => assert!(!expected.is_empty() && said.contains(expected), "{said}"),
        }
    }

    #[test]
    fn only_files_that_can_be_written_are_taken() {
        check(&[file("/etc/app.conf"), MachineFile { mode: Some(0o600), ..file("/a") }], "");
        for path in ["", "a", "/", "//a", "/a/../b", "/a/./b", "/a/", "/a\nb", &format!("/{}", "x".repeat(2000))] {
            check(&[file(path)], "must be an absolute path");
        }
        for path in ["/proc/self/mem", "/dev", "/sys/x", "/.fly/api"] {
            check(&[file(path)], "makes at every start");
        }
        check(&[file("/processes")], "");
        check(&[file("/etc/hosts")], "writes at every start");
        check(&[file("/a"), file("/a")], "twice");
        check(&[MachineFile { raw_value: Some("?".into()), ..file("/a") }], "not base64");
        check(&[MachineFile { raw_value: None, ..file("/a") }], "needs one of");
        check(&[MachineFile { secret_name: Some("KEY".into()), ..file("/a") }], "needs one of");
        check(&[MachineFile { raw_value: None, secret_name: Some("a b".into()), ..file("/a") }], "cannot be the name");
        check(&[MachineFile { mode: Some(0o4755), ..file("/a") }], "mode");
        check(&[MachineFile { raw_value: Some("a".repeat(MAX_INLINE_BYTES + 4)), ..file("/a") }], "more than the");
        let many: Vec<MachineFile> = (0..=MAX_FILES).map(|n| file(&format!("/{n}"))).collect();
        check(&many, "more than 64");
    }

    #[test]
    fn base64_may_be_wrapped() {
        assert_eq!(MachineFile::decode("aG\nk=\n"), Some(b"hi".to_vec()));
        assert_eq!(MachineFile::encode(b"hi"), "aGk=");
        assert_eq!(MachineFile::decode("a"), None);
    }
}
