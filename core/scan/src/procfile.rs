//! What an app's `Procfile` says, for every family.

use crate::tree::Files;
use crate::{Detected, Evidence, Family};
use dunlin_model::config::procfile::{self, ProcfileEntry};

pub(crate) struct Procfile {
    entries: Vec<ProcfileEntry>,
}

pub(crate) fn read(files: &Files<'_>, warnings: &mut Vec<String>) -> Option<Procfile> {
    let text = files.text("Procfile")?;
    match procfile::parse(&text, "Procfile") {
        Ok(entries) => Some(Procfile { entries }),
        Err(error) => {
            warnings.push(error.to_string());
            None
        }
    }
}

impl Procfile {
    /// The process that serves requests.
    pub fn web(&self) -> Option<&ProcfileEntry> {
        self.entries.iter().find(|entry| entry.name == "web")
    }

    pub fn web_evidence(&self) -> Option<Evidence> {
        self.web().map(|web| Evidence::new("Procfile", web.line, format!("web: {}", web.command)))
    }

    /// The other processes become groups of their own, which nothing routes to.
    pub fn add_to(&self, app: &mut Detected, warnings: &mut Vec<String>) {
        if let Some(release) = self.entries.iter().find(|entry| entry.name == "release") {
            warnings.push(format!("Procfile:{}: the release command is not run yet; run it with `dunlin machine exec`", release.line));
        }
        if app.family == Family::Dockerfile && self.web().is_some() {
            warnings.push("Procfile: the web process is not used, because the Dockerfile says what runs".into());
        }
        if app.family != Family::Static {
            let others = self.entries.iter().filter(|entry| entry.name != "web" && entry.name != "release");
            app.other_processes = others.map(|entry| (entry.group().to_owned(), entry.process_command())).collect();
        }
    }
}
