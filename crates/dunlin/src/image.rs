//! `dunlin image bootstrap`: base images made from Debian packages.

use clap::Subcommand;
use dunlin_registry::{ContentStore, Kind, bootstrap};
use std::io::IsTerminal;
use std::path::Path;
use std::time::Instant;

#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Make base images from Debian packages under their usual names, for builds without another registry
    Bootstrap {
        /// debian, python or node
        #[arg(required = true)]
        kinds: Vec<Kind>,
    },
}

pub fn run(command: ImageCommand, data_dir: &Path, json: bool) -> anyhow::Result<()> {
    let ImageCommand::Bootstrap { kinds } = command;
    if !rustix::process::geteuid().is_root() {
        anyhow::bail!("making a base image needs root: it unpacks packages as their owners; run it with sudo");
    }
    let store = ContentStore::open(crate::server::registry_dir(data_dir))?;
    let work = data_dir.join("bootstrap");
    for kind in kinds {
        let mut progress = Progress { kind, began: Instant::now(), is_terminal: std::io::stderr().is_terminal() };
        bootstrap(kind, &store, &work, |line| progress.show(line))?;
        progress.end();
        if json {
            println!("{}", serde_json::json!({ "kind": kind.to_string(), "references": kind.references() }));
        } else {
            kind.references().iter().for_each(|reference| println!("docker.io/{reference}"));
        }
    }
    Ok(())
}

/// Steps of ours stay; what the package tools say (hundreds of lines) passes by on a terminal's last line,
/// and comes with the error if they fail.
struct Progress {
    kind: Kind,
    began: Instant,
    is_terminal: bool,
}

impl Progress {
    fn show(&mut self, line: &str) {
        let seconds = self.began.elapsed().as_secs_f64();
        let is_step = Kind::ALL.iter().any(|kind| line.starts_with(&format!("{kind}: ")));
        if is_step {
            self.end();
            eprintln!("[{seconds:6.1}s] {line}");
        } else if self.is_terminal {
            let short: String = line.chars().filter(|c| !c.is_control()).take(70).collect();
            eprint!("\r\x1b[K[{seconds:6.1}s] {}: {short}", self.kind);
        }
    }

    fn end(&self) {
        if self.is_terminal {
            eprint!("\r\x1b[K");
        }
    }
}
