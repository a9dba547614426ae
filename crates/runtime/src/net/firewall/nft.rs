//! Runs `nft`. The program and the kernel agree on the format of rules; we would have to follow both.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Deserialize;

use super::super::{NetError, Result, io_error};

/// The superuser's directories are not in everybody's PATH, and a daemon should not depend on one.
const DIRECTORIES: [&str; 5] = ["/usr/sbin", "/sbin", "/usr/bin", "/usr/local/sbin", "/bin"];
/// Characters of nft's complaint that go into an error.
const COMPLAINT_MAX: usize = 1000;

#[derive(Debug, Clone)]
pub(super) struct Nft(PathBuf);

/// A chain as `nft -j list chains` has it. Only base chains have hook and policy.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Chain {
    pub(super) family: String,
    pub(super) table: String,
    pub(super) name: String,
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    pub(super) hook: Option<String>,
    pub(super) policy: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Rule {
    pub(super) chain: String,
    pub(super) handle: u64,
    pub(super) comment: Option<String>,
}

/// Every object of nft's listing is a map with one key.
#[derive(Debug, Deserialize)]
struct Listing {
    nftables: Vec<Object>,
}

#[derive(Debug, Deserialize)]
struct Object {
    chain: Option<Chain>,
    rule: Option<Rule>,
}

/// Where a program of the superuser is.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    DIRECTORIES.iter().map(|dir| Path::new(dir).join(name)).find(|path| path.is_file())
}

impl Nft {
    pub(super) fn find() -> Result<Self> {
        find_program("nft").map(Nft).ok_or(NetError::NoNft("nft"))
    }

    /// Runs a script as one transaction, in the network namespace of the calling thread.
    pub(super) fn run(&self, what: &'static str, script: &str) -> Result<()> {
        self.call(what, &["-f", "-"], script).map(|_| ())
    }

    pub(super) fn chains(&self) -> Result<Vec<Chain>> {
        Ok(self.list("list the chains", &["-j", "list", "chains"])?.into_iter().filter_map(|object| object.chain).collect())
    }

    pub(super) fn rules(&self, chain: &Chain) -> Result<Vec<Rule>> {
        let listed =
            self.list("list a chain", &["-j", "-a", "list", "chain", &chain.family, &chain.table, &chain.name])?;
        Ok(listed.into_iter().filter_map(|object| object.rule).collect())
    }

    /// All rules of a table that is there.
    pub(super) fn rules_of_table(&self, table: &str) -> Result<Vec<Rule>> {
        let listed = self.list("list the machines' table", &["-j", "-a", "list", "table", "inet", table])?;
        Ok(listed.into_iter().filter_map(|object| object.rule).collect())
    }

    fn list(&self, what: &'static str, arguments: &[&str]) -> Result<Vec<Object>> {
        let output = self.call(what, arguments, "")?;
        if output.trim().is_empty() {
            return Ok(Vec::new());
        }
        let listing: Listing = serde_json::from_str(&output).map_err(|error| NetError::Nft { what, output: error.to_string() })?;
        Ok(listing.nftables)
    }

    fn call(&self, what: &'static str, arguments: &[&str], input: &str) -> Result<String> {
        let mut child = Command::new(&self.0)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(io_error(format!("run {}", self.0.display())))?;
        let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()));
        let output = child.wait_with_output().map_err(io_error(format!("wait for {}", self.0.display())))?;
        if !output.status.success() {
            let complaint = String::from_utf8_lossy(&output.stderr).chars().take(COMPLAINT_MAX).collect();
            return Err(NetError::Nft { what, output: complaint });
        }
        written.map_err(io_error(format!("write to {}", self.0.display())))?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}
