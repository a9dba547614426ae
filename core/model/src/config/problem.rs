//! What can be wrong with a configuration file, and how it is said.

use std::fmt;

/// Most mistakes and problems kept from one file; a file that is not a configuration at all would give thousands.
pub(super) const MAX_REPORTED: usize = 50;
/// Longest key that a nearest known key is looked for; longer ones are not typing errors.
const MAX_COMPARED: usize = 48;

/// A key that has no effect here. A deploy stops at it, by name, unless the user says to go on, or it is a note.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConfigProblem {
    /// It has no effect yet, and the app runs as well without. Files as `fly launch` writes them hold such keys and are
    /// deployed as they are; a deploy says so and goes on.
    Note { key: String, line: usize, why: String },
    /// Fly honours this key (or this value of it); this platform does not yet.
    NotHonoured { key: String, line: usize, why: String },
    /// Nobody knows this key.
    Unknown { key: String, line: usize, nearest: Option<String> },
}

impl ConfigProblem {
    /// The full key, for example `http_service.tls_options`.
    pub fn key(&self) -> &str {
        match self {
            Self::Note { key, .. } | Self::NotHonoured { key, .. } | Self::Unknown { key, .. } => key,
        }
    }

    /// Whether a deploy stops at it unless the user says to go on.
    pub fn stops(&self) -> bool {
        !matches!(self, Self::Note { .. })
    }

    /// The line it is on, from 1.
    pub fn line(&self) -> usize {
        match self {
            Self::Note { line, .. } | Self::NotHonoured { line, .. } | Self::Unknown { line, .. } => *line,
        }
    }
}

impl fmt::Display for ConfigProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Note { key, line, why } => write!(f, "line {line}: {key} has no effect yet: {why}"),
            Self::NotHonoured { key, line, why } => write!(f, "line {line}: {key} is not honoured yet: {why}"),
            Self::Unknown { key, line, nearest: Some(nearest) } => {
                write!(f, "line {line}: {key} is not a known key; did you mean {nearest}?")
            }
            Self::Unknown { key, line, nearest: None } => write!(f, "line {line}: {key} is not a known key"),
        }
    }
}

/// One thing that must be changed before the file can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// From 1.
    pub line: usize,
    /// In characters, from 1.
    pub column: usize,
    /// What is wrong and what is expected.
    pub message: String,
}

/// The file cannot be used. Its text has one `file:line:column: message` line for each mistake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    pub file: String,
    /// Never empty.
    pub mistakes: Vec<Mistake>,
}

impl std::error::Error for ConfigError {}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, mistake) in self.mistakes.iter().enumerate() {
            let newline = if i == 0 { "" } else { "\n" };
            write!(f, "{newline}{}:{}:{}: {}", self.file, mistake.line, mistake.column, mistake.message)?;
        }
        Ok(())
    }
}

/// Line and column, both from 1, of a byte offset.
pub(super) fn position(text: &str, offset: usize) -> (usize, usize) {
    let mut offset = offset.min(text.len());
    while !text.is_char_boundary(offset) {
        offset -= 1;
    }
    let before = &text[..offset];
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

/// The known key that `key` was probably meant to be.
pub(super) fn nearest<'k>(key: &str, known: impl Iterator<Item = &'k str>) -> Option<&'k str> {
    let length = key.chars().count();
    if length > MAX_COMPARED {
        return None;
    }
    let allowed = (length / 3).clamp(1, 4);
    known
        .map(|candidate| (distance(&key.to_ascii_lowercase().replace('-', "_"), &candidate.replace('-', "_")), candidate))
        .filter(|(distance, _)| *distance <= allowed)
        .min()
        .map(|(_, candidate)| candidate)
}

/// Edit distance in which a transposition of neighbours counts as one edit.
fn distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.chars().collect();
    let b: Vec<char> = b.chars().collect();
    let mut rows = vec![vec![0usize; b.len() + 1]; a.len() + 1];
    for (i, row) in rows.iter_mut().enumerate() {
        row[0] = i;
    }
    for (j, cell) in rows[0].iter_mut().enumerate() {
        *cell = j;
    }
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replaced.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = best;
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_nearest_key() {
        let known = ["internal_port", "force_https", "processes"];
        let check = |key: &str, expected: Option<&str>| assert_eq!(nearest(key, known.into_iter()), expected, "{key}");
        check("internal-port", Some("internal_port"));
        check("intrenal_port", Some("internal_port"));
        check("force_http", Some("force_https"));
        check("proceses", Some("processes"));
        check("memory", None);
        check(&"x".repeat(1000), None);
    }

    #[test]
    fn positions_count_characters() {
        assert_eq!(position("a\nbü = 1", 5), (2, 3));
        assert_eq!(position("", 10), (1, 1));
    }
}
