//! The files of an app, as the caller lists and reads them.

use crate::ignore::Ignore;
use std::collections::{BTreeMap, BTreeSet};

/// Most files that are looked at; a source tree without its dependencies is far smaller.
pub const MAX_FILES: usize = 20_000;
/// Longest manifest or source file that is read.
pub(crate) const MAX_READ: usize = 1024 * 1024;
/// Longest path that is looked at.
const MAX_PATH: usize = 1024;
/// Directories that hold other people's code or a tool's state, at any depth.
const FOREIGN: &[&str] = &[
    ".git", ".hg", ".svn", ".dunlin", "node_modules", "bower_components", "venv", ".venv", "env", "__pycache__", ".tox", ".nox",
    ".mypy_cache", ".pytest_cache", "site-packages", ".next", ".nuxt", ".cache", "vendor", "target", ".idea", ".vscode",
];

/// Whether a directory of that name holds what is not the app's own source; there is no need to list it.
pub fn is_foreign(dir_name: &str) -> bool {
    FOREIGN.contains(&dir_name)
}

/// Where an app's files are. Paths are relative, separated by `/`.
pub trait Tree {
    /// The regular files, at most [`MAX_FILES`] of them; directories such as `.git` may be left out.
    fn list(&self) -> Vec<String>;
    /// The whole file; `None` when it is missing, not a regular file, or longer than `limit` bytes.
    fn read(&self, path: &str, limit: usize) -> Option<Vec<u8>>;
}

/// A tree in memory, for tests and for sources that come over the network.
#[derive(Debug, Clone, Default)]
pub struct MemoryTree(BTreeMap<String, Vec<u8>>);

impl MemoryTree {
    pub fn new<P: Into<String>, C: Into<Vec<u8>>>(files: impl IntoIterator<Item = (P, C)>) -> Self {
        Self(files.into_iter().map(|(path, content)| (path.into(), content.into())).collect())
    }
}

impl Tree for MemoryTree {
    fn list(&self) -> Vec<String> {
        self.0.keys().take(MAX_FILES).cloned().collect()
    }

    fn read(&self, path: &str, limit: usize) -> Option<Vec<u8>> {
        self.0.get(path).filter(|content| content.len() <= limit).cloned()
    }
}

/// The tree as detectors see it: only the app's own files, text on request.
pub(crate) struct Files<'t> {
    tree: &'t dyn Tree,
    paths: BTreeSet<String>,
    /// The app's own .dockerignore.
    ignored: Ignore,
    pub warnings: Vec<String>,
}

impl<'t> Files<'t> {
    pub fn of(tree: &'t dyn Tree) -> Self {
        let listed = tree.list();
        let mut warnings = Vec::new();
        if listed.len() >= MAX_FILES {
            warnings.push(format!("there are more than {MAX_FILES} files; only the first were looked at"));
        }
        let own = |path: &String| {
            let mut parts = path.split('/').collect::<Vec<_>>();
            parts.pop();
            path.len() <= MAX_PATH && !parts.iter().any(|part| is_foreign(part) || *part == ".." || part.is_empty())
        };
        let paths = listed.into_iter().take(MAX_FILES).filter(own).collect();
        let mut files = Self { tree, paths, ignored: Ignore::default(), warnings };
        files.ignored = files.text(".dockerignore").map(|text| Ignore::parse(&text)).unwrap_or_default();
        files
    }

    /// Whether a build gets the file: it is there, and the app's own .dockerignore does not leave it out.
    pub fn is_sent(&self, path: &str) -> bool {
        self.has(path) && !self.ignored.is_ignored(path)
    }

    pub fn has(&self, path: &str) -> bool {
        self.paths.contains(path)
    }

    /// All paths, sorted.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.paths.iter().map(String::as_str)
    }

    /// The file's text, without a byte order mark; bytes that are not UTF-8 become U+FFFD.
    pub fn text(&self, path: &str) -> Option<String> {
        self.text_up_to(path, MAX_READ)
    }

    /// Likewise, for a file that may be longer than what people write.
    pub fn text_up_to(&self, path: &str, limit: usize) -> Option<String> {
        if !self.has(path) {
            return None;
        }
        let bytes = self.tree.read(path, limit)?;
        let text = String::from_utf8_lossy(&bytes);
        Some(text.trim_start_matches('\u{feff}').to_owned())
    }
}
