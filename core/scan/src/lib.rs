//! Recognises what an app is from its files alone, and proposes how to build and run it.
//!
//! [`scan`] reads manifests and entry files through a [`Tree`] and answers with every candidate, the
//! chosen one and the evidence for it; [`propose`] turns that into files to write, a size and a port.
//! [`ignore::Ignore`] is `.dockerignore`, for whoever collects a build context.
//!
//! Never does IO itself, never runs anything of the app, and is bounded whatever the files hold.
//! Manifests are parsed, not searched: a name in a comment or inside another name is no evidence.
//! Tested with trees in memory: golden files for each family, apps that must not match, and property
//! tests that no file makes a parser panic.
//!
//! ```
//! let tree = dunlin_scan::MemoryTree::new([
//!     ("requirements.txt", "flask==3.0\n"),
//!     ("app.py", "from flask import Flask\napp = Flask(__name__)\n"),
//! ]);
//! let scan = dunlin_scan::scan(&tree);
//! let chosen = scan.chosen.as_ref().unwrap();
//! assert_eq!(chosen.family, dunlin_scan::Family::Flask);
//! assert_eq!(chosen.evidence[1].to_string(), "app.py:2: app = Flask(...)");
//! ```
#![forbid(unsafe_code)]

mod dockerfile;
mod generate;
pub mod ignore;
mod javascript;
mod manifest;
mod native;
mod node;
mod procfile;
mod proposal;
mod python;
mod python_port;
mod python_source;
mod python_version;
mod requirements;
mod static_site;
#[cfg(test)]
mod tests;
mod tree;

pub use proposal::{FileToWrite, Proposal, Unrecognised, propose, suggest_name};
pub use tree::{MAX_FILES, MemoryTree, Tree, is_foreign};

use serde::{Deserialize, Serialize};
use std::fmt;
use tree::Files;

/// What kind of app it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    Dockerfile,
    Flask,
    FastApi,
    Python,
    Node,
    Static,
}

impl Family {
    /// As people write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dockerfile => "Dockerfile",
            Self::Flask => "Flask",
            Self::FastApi => "FastAPI",
            Self::Python => "Python",
            Self::Node => "Node.js",
            Self::Static => "static site",
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Something seen in a file that a conclusion rests on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    pub file: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<usize>,
    pub what: String,
}

impl Evidence {
    pub(crate) fn new(file: impl Into<String>, line: impl Into<Option<usize>>, what: impl Into<String>) -> Self {
        Self { file: file.into(), line: line.into(), what: what.into() }
    }
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}: {}", self.file, self.what),
            None => write!(f, "{}: {}", self.file, self.what),
        }
    }
}

/// A family that the files point to, chosen or not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    pub family: Family,
    pub evidence: Vec<Evidence>,
    /// Why it is not the answer; `None` for the chosen one and for those that come after it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rejected: Option<String>,
}

/// The recognised app.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detected {
    pub family: Family,
    /// What to call it, for example `Flask` or `Node.js (express)`.
    pub name: String,
    /// The port that it listens on (or is told to listen on, by `PORT`).
    pub port: u16,
    pub port_reason: String,
    /// The words of the start command; empty when the image decides (a Dockerfile of the app's own).
    pub command: Vec<String>,
    pub evidence: Vec<Evidence>,
    /// Path of the app's own Dockerfile.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dockerfile_path: Option<String>,
    /// Text of the Dockerfile to write; `None` when the app has its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dockerfile: Option<String>,
    /// Further files that the Dockerfile needs.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub extra_files: Vec<FileToWrite>,
    /// Text of the `.dockerignore` to write; `None` when the app has one, or its own Dockerfile.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dockerignore: Option<String>,
    /// Environment for the configuration.
    #[serde(skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    pub env: std::collections::BTreeMap<String, String>,
    /// Process groups other than the one that serves requests, from a Procfile.
    #[serde(skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    pub other_processes: std::collections::BTreeMap<String, String>,
    pub memory_mb: u32,
    /// What a person should know before saying yes.
    pub notes: Vec<String>,
    /// What the Dockerfile was made from, to make it again for another port.
    #[serde(skip)]
    pub(crate) recipe: Option<generate::Recipe>,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scan {
    /// In order of preference.
    pub candidates: Vec<Candidate>,
    pub chosen: Option<Detected>,
    pub warnings: Vec<String>,
}

/// A detector's answer: nothing of its kind, something that does not suffice, or the app.
pub(crate) enum Found {
    Nothing,
    Rejected(Candidate),
    App(Box<Detected>),
}

impl Found {
    pub(crate) fn rejected(family: Family, evidence: Vec<Evidence>, why: impl Into<String>) -> Self {
        Self::Rejected(Candidate { family, evidence, rejected: Some(why.into()) })
    }
}

/// Finds out what the app is. The first family that has everything it needs is chosen, in the order
/// Dockerfile, Python (Flask, FastAPI, plain), Node.js (a server, or a site that its tools build), static site.
pub fn scan(tree: &dyn Tree) -> Scan {
    let files = Files::of(tree);
    let mut warnings = files.warnings.clone();
    let mut found = vec![dockerfile::detect(&files, &mut warnings)];
    // Whoever has a Dockerfile means it; one that was proposed in its place could not be written over it.
    if let Some(Found::Rejected(candidate)) = found.pop_if(|found| matches!(found, Found::Rejected(_))) {
        return Scan { candidates: vec![candidate], chosen: None, warnings };
    }
    let procfile = procfile::read(&files, &mut warnings);
    let package = node::read_package(&files, &mut warnings);
    found.extend(python::detect(&files, procfile.as_ref(), &mut warnings));
    found.push(node::detect(&files, package.as_ref(), procfile.as_ref()));
    let site = static_site::detect(&files, package.as_ref(), &found);
    found.push(site);
    let (mut candidates, mut chosen) = (Vec::new(), None::<Box<Detected>>);
    for found in found {
        match found {
            Found::Nothing => {}
            Found::Rejected(candidate) => candidates.push(candidate),
            Found::App(app) => {
                candidates.push(Candidate { family: app.family, evidence: app.evidence.clone(), rejected: None });
                match &chosen {
                    None => chosen = Some(app),
                    // Python and Node.js side by side is a question; templates or assets beside either are not.
                    Some(first) if first.family != Family::Dockerfile && app.family == Family::Node => warnings.push(format!(
                        "it also looks like {}; {} was chosen because it comes first. Write a Dockerfile to decide otherwise",
                        app.name, first.name
                    )),
                    Some(_) => {}
                }
            }
        }
    }
    if let (Some(app), Some(procfile)) = (&mut chosen, &procfile) {
        procfile.add_to(app, &mut warnings);
    }
    if let Some(app) = &mut chosen {
        generate::note_secrets(&files, app);
    }
    Scan { candidates, chosen: chosen.map(|app| *app), warnings }
}
