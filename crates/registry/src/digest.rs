//! Names that come from outside: digests, repositories, tags. Parsed once, here.

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::fmt;
use std::str::FromStr;

/// The distribution specification's limit for a host name and a repository together.
const MAX_REPO_BYTES: usize = 200;
const MAX_TAG_BYTES: usize = 128;
const PREFIX: &str = "sha256:";

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidName(pub(crate) String);

/// `sha256:` and 64 lowercase hexadecimal digits.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl Digest {
    pub fn of(bytes: &[u8]) -> Self {
        Self::from_hasher(Sha256::new_with_prefix(bytes))
    }

    /// Of all that the hasher was given.
    pub fn from_hasher(hasher: Sha256) -> Self {
        let mut text = String::with_capacity(PREFIX.len() + 64);
        text.push_str(PREFIX);
        for byte in hasher.finalize() {
            use fmt::Write;
            let _ = write!(text, "{byte:02x}"); // writing to a String does not fail
        }
        Self(text)
    }

    pub fn hex(&self) -> &str {
        &self.0[PREFIX.len()..]
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// From the name of a file that this crate wrote.
    pub(crate) fn from_hex(hex: &str) -> Option<Self> {
        format!("{PREFIX}{hex}").parse().ok()
    }
}

impl FromStr for Digest {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let hex = text.strip_prefix(PREFIX).unwrap_or_default();
        let is_hex = hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if hex.len() != 64 || !is_hex {
            let shown: String = text.chars().take(100).collect();
            return Err(InvalidName(format!("{shown:?} is not a digest: it is sha256: and 64 hexadecimal digits")));
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for Digest {
    type Error = InvalidName;
    fn try_from(text: String) -> Result<Self, InvalidName> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name of a repository: lowercase words joined by `.`, `_`, `__` or dashes, separated by `/`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Repo(String);

impl Repo {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// One path component; `+` cannot be part of a name.
    pub(crate) fn file_name(&self) -> String {
        self.0.replace('/', "+")
    }
}

impl FromStr for Repo {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let fits = !text.is_empty() && text.len() <= MAX_REPO_BYTES;
        if fits && text.split('/').all(is_path_component) {
            return Ok(Self(text.to_owned()));
        }
        let shown: String = text.chars().take(100).collect();
        Err(InvalidName(format!("{shown:?} is not a repository name: lowercase letters, digits, `.`, `_`, `-` between `/`")))
    }
}

impl fmt::Display for Repo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn is_path_component(text: &str) -> bool {
    let is_word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else { return false };
    if !is_word(*first) || !is_word(*last) {
        return false;
    }
    bytes.split(|b| is_word(*b)).all(|separator| {
        matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|b| *b == b'-')
    })
}

/// Whether `text` is the name of a tag.
pub fn is_tag(text: &str) -> bool {
    let first_is_word = text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_');
    let rest = text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'));
    first_is_word && rest && text.len() <= MAX_TAG_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_the_specification_pass() {
        let repo = |text: &str, expected: bool| assert_eq!(text.parse::<Repo>().is_ok(), expected, "{text}");
        for good in ["web", "library/python", "a.b_c__d--e/f9", "0"] {
            repo(good, true);
        }
        for bad in ["", "/", "a/", "/a", "A", "a..b", "a___b", "-a", "a-", "../a", "a/../b", "a+b", "a b", "a\n"] {
            repo(bad, false);
        }
        repo(&"a".repeat(MAX_REPO_BYTES + 1), false);
        let tag = |text: &str, expected: bool| assert_eq!(is_tag(text), expected, "{text}");
        tag("3.11-slim", true);
        tag("_x", true);
        for bad in ["", ".", "..", ".a", "-a", "a/b", "a b"] {
            tag(bad, false);
        }
        tag(&"a".repeat(MAX_TAG_BYTES + 1), false);
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::of(b"").as_str(), empty);
        assert!(empty.parse::<Digest>().is_ok());
        assert!(empty.to_uppercase().parse::<Digest>().is_err());
        assert!("sha256:/../".parse::<Digest>().is_err());
    }
}
