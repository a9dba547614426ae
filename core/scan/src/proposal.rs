//! What `launch` shows before it does anything, and what it then writes.

use crate::{Evidence, Family, Scan};
use dunlin_model::AppName;
use dunlin_model::config::{self, AppConfig, DEFAULT_GROUP, words};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Longest name that is suggested; longer ones are valid, but nobody types them.
const MAX_SUGGESTED: usize = 40;

/// A file that the proposal writes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileToWrite {
    /// Relative to the app's directory.
    pub path: String,
    pub content: String,
}

/// How the app would be built and run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proposal {
    pub app: AppName,
    /// `None` when an existing configuration says all, and no file was recognised.
    pub family: Option<Family>,
    /// For people, for example `Node.js (express)`.
    pub name: String,
    pub evidence: Vec<Evidence>,
    /// What is written; files that exist are never in it.
    pub files: Vec<FileToWrite>,
    pub vm_size: String,
    pub memory_mb: u32,
    pub port: u16,
    pub port_reason: String,
    pub notes: Vec<String>,
    pub warnings: Vec<String>,
    pub config: AppConfig,
}

/// No family matches. Its text says what was seen and what would help.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unrecognised {
    /// `what was seen: why it does not suffice`, possibly none.
    pub reasons: Vec<String>,
}

impl Unrecognised {
    /// What a person can do next.
    pub const HINT: &'static str = "write a Dockerfile, or a Procfile with a web process beside requirements.txt or package.json; \
        or deploy an existing image with --image";
}

impl std::error::Error for Unrecognised {}

impl fmt::Display for Unrecognised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nothing here is recognised as an app: there is no Dockerfile that can be built, no Flask, FastAPI or Python program, no Node.js app and no site")?;
        self.reasons.iter().try_for_each(|reason| write!(f, "\n  {reason}"))
    }
}

/// Turns what was found into a proposal. An existing configuration is kept as it is and decides where it speaks.
pub fn propose(scan: &Scan, dir_name: &str, existing: Option<AppConfig>) -> Result<Proposal, Unrecognised> {
    let Some(found) = &scan.chosen else {
        // With an image or a Dockerfile of another name, nothing has to be recognised.
        return match existing {
            Some(config) if config.build.image.is_some() || config.build.dockerfile.is_some() => Ok(kept(scan, dir_name, config)),
            _ => Err(Unrecognised { reasons: reasons(scan) }),
        };
    };
    let app = name_of(existing.as_ref(), dir_name);
    let builds_otherwise = existing.as_ref().is_some_and(|config| config.build.image.is_some() || config.build.dockerfile.is_some());
    let wanted_port = existing.as_ref().and_then(configured_port).filter(|port| *port != found.port);
    let port = wanted_port.unwrap_or(found.port);
    let mut files = Vec::new();
    if !builds_otherwise {
        let (dockerfile, extra) = match (&found.recipe, wanted_port) {
            (Some(recipe), Some(port)) => (Some(recipe.dockerfile(port)), recipe.extra_files(port)),
            _ => (found.dockerfile.clone(), found.extra_files.clone()),
        };
        files.extend(dockerfile.map(|content| FileToWrite { path: "Dockerfile".into(), content }));
        files.extend(extra);
        files.extend(found.dockerignore.clone().map(|content| FileToWrite { path: ".dockerignore".into(), content }));
    }
    let mut notes = found.notes.clone();
    let port_reason = match wanted_port {
        None => found.port_reason.clone(),
        Some(_) => {
            if found.recipe.is_none() || found.port_reason.contains(" says ") {
                notes.push(format!("the configuration says port {port}, but {}", found.port_reason));
            }
            "the existing configuration says so".into()
        }
    };
    let config = match existing {
        Some(config) => config,
        None => {
            let config = new_config(&app, found);
            files.push(FileToWrite { path: "dunlin.toml".into(), content: config::render(&config) });
            config
        }
    };
    let guest = config.guest_for(config.default_group());
    Ok(Proposal {
        app,
        family: Some(found.family),
        name: found.name.clone(),
        evidence: found.evidence.clone(),
        files,
        vm_size: size_name(&config),
        memory_mb: guest.memory_mb,
        port,
        port_reason,
        notes,
        warnings: scan.warnings.clone(),
        config,
    })
}

fn new_config(app: &AppName, found: &crate::Detected) -> AppConfig {
    let mut config = AppConfig::default_for(app.clone(), found.port, found.memory_mb);
    config.env = found.env.clone();
    if found.dockerfile_path.as_deref().is_some_and(|path| path != "Dockerfile") {
        config.build.dockerfile = found.dockerfile_path.clone();
    }
    if !found.other_processes.is_empty() {
        config.processes = found.other_processes.clone();
        // An empty command is the image's own.
        let own = if found.command.is_empty() { String::new() } else { words::join(&found.command) };
        config.processes.insert(DEFAULT_GROUP.into(), own);
        if let Some(service) = &mut config.http_service {
            service.processes = vec![DEFAULT_GROUP.into()];
        }
    }
    config
}

/// A proposal that is the configuration and nothing else.
fn kept(scan: &Scan, dir_name: &str, config: AppConfig) -> Proposal {
    let what = config.build.image.clone().or_else(|| config.build.dockerfile.clone()).unwrap_or_default();
    Proposal {
        app: name_of(Some(&config), dir_name),
        family: config.build.dockerfile.is_some().then_some(Family::Dockerfile),
        name: what,
        evidence: Vec::new(),
        files: Vec::new(),
        vm_size: size_name(&config),
        memory_mb: config.guest_for(config.default_group()).memory_mb,
        port: configured_port(&config).unwrap_or(config::DEFAULT_PORT),
        port_reason: "the existing configuration says so".into(),
        notes: Vec::new(),
        warnings: scan.warnings.clone(),
        config,
    }
}

fn configured_port(config: &AppConfig) -> Option<u16> {
    config.http_service.iter().chain(&config.services).map(|service| service.internal_port).next()
}

fn size_name(config: &AppConfig) -> String {
    let size = config.vm.iter().find_map(|vm| vm.size.clone());
    size.unwrap_or_else(|| config::GUEST_SIZES[0].name.to_owned())
}

fn name_of(existing: Option<&AppConfig>, dir_name: &str) -> AppName {
    existing.and_then(|config| config.app.clone()).unwrap_or_else(|| suggest_name(dir_name))
}

fn reasons(scan: &Scan) -> Vec<String> {
    let mut reasons = Vec::new();
    for candidate in &scan.candidates {
        if let Some(why) = &candidate.rejected {
            reasons.push(format!("{}: {why}", candidate.family));
        }
    }
    reasons.extend(scan.warnings.iter().cloned());
    reasons
}

/// A name that is valid, made from a directory's.
pub fn suggest_name(dir_name: &str) -> AppName {
    let mut name = String::new();
    for c in dir_name.chars() {
        if c.is_ascii_alphanumeric() {
            name.push(c.to_ascii_lowercase());
        } else if !name.is_empty() && !name.ends_with('-') {
            name.push('-');
        }
        if name.len() >= MAX_SUGGESTED {
            break;
        }
    }
    match name.trim_matches('-').parse() {
        Ok(name) => name,
        Err(_) => "app".parse().unwrap_or_else(|_| unreachable!("`app` is a valid name")),
    }
}
