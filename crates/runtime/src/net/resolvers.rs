//! The host's name servers, as a machine can reach them.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use super::{NetError, Result, io_error};

const MAIN: &str = "/etc/resolv.conf";
/// Where systemd-resolved keeps the true servers while the main file names its own loopback address.
const BEHIND_RESOLVED: &str = "/run/systemd/resolve/resolv.conf";
/// As many as the C library reads.
const SERVERS_MAX: usize = 3;
const SEARCH_MAX: usize = 6;
/// A longer resolv.conf is not one.
const FILE_MAX_BYTES: usize = 64 * 1024;

/// What goes into a machine's resolv.conf, and what its firewall lets through on port 53.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolvers {
    pub servers: Vec<Ipv4Addr>,
    pub search: Vec<String>,
    /// The host's file that these were read from.
    pub source: PathBuf,
}

impl Resolvers {
    pub fn resolv_conf(&self) -> String {
        let mut text = String::new();
        if !self.search.is_empty() {
            text.push_str(&format!("search {}\n", self.search.join(" ")));
        }
        for server in &self.servers {
            text.push_str(&format!("nameserver {server}\n"));
        }
        text
    }
}

/// The host's IPv4 resolvers that are not its own loopback: from resolv.conf, or else from systemd-resolved's file.
pub fn resolvers() -> Result<Resolvers> {
    first_usable(&[Path::new(MAIN), Path::new(BEHIND_RESOLVED)])
}

fn first_usable(files: &[&Path]) -> Result<Resolvers> {
    for file in files {
        let text = match std::fs::read_to_string(file) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(io_error(format!("read {}", file.display()))(error)),
        };
        if text.len() > FILE_MAX_BYTES {
            return Err(NetError::Invalid(format!("{} is longer than {FILE_MAX_BYTES} bytes", file.display())));
        }
        let (servers, search) = parse(&text);
        if !servers.is_empty() {
            return Ok(Resolvers { servers, search, source: (*file).to_owned() });
        }
    }
    Err(NetError::Invalid(format!(
        "no name server that machines can reach: {MAIN} and {BEHIND_RESOLVED} name no IPv4 server besides loopback; \
         add one there, for example: nameserver 9.9.9.9"
    )))
}

fn parse(text: &str) -> (Vec<Ipv4Addr>, Vec<String>) {
    let mut servers = Vec::new();
    let mut search = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => {
                // A machine has no IPv6, and the host's loopback is its own.
                if let Some(Ok(IpAddr::V4(addr))) = words.next().map(str::parse)
                    && !addr.is_loopback()
                    && !addr.is_unspecified()
                    && !servers.contains(&addr)
                    && servers.len() < SERVERS_MAX
                {
                    servers.push(addr);
                }
            }
            // The last of these lines counts.
            Some("search" | "domain") => {
                search = words.filter(|word| is_domain(word)).take(SEARCH_MAX).map(str::to_owned).collect();
            }
            _ => {}
        }
    }
    (servers, search)
}

fn is_domain(word: &str) -> bool {
    word.len() <= 253 && word.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, servers: &[&str], search: &[&str]) {
        let (found, found_search) = parse(text);
        let found: Vec<String> = found.iter().map(ToString::to_string).collect();
        assert_eq!(found, servers);
        assert_eq!(found_search, search);
    }

    #[test]
    fn only_servers_that_a_machine_reaches_are_taken() {
        check("# x\nnameserver 10.0.0.2\nnameserver 10.0.0.2\nsearch a.example b.example\n", &["10.0.0.2"], &["a.example", "b.example"]);
        check("nameserver 127.0.0.53\noptions edns0\n", &[], &[]);
        check("nameserver 2001:db8::1\nnameserver 1.1.1.1\n", &["1.1.1.1"], &[]);
        check("nameserver 1.1.1.1\nnameserver 1.1.1.2\nnameserver 1.1.1.3\nnameserver 1.1.1.4", &["1.1.1.1", "1.1.1.2", "1.1.1.3"], &[]);
        check("nameserver\nnameserver what\ndomain x$(y)\n", &[], &[]);
    }

    #[test]
    fn the_file_behind_resolved_is_the_second_choice() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (main, behind) = (dir.path().join("main"), dir.path().join("behind"));
        std::fs::write(&main, "nameserver 127.0.0.53\n").expect("write");
        let error = first_usable(&[&main, &behind]).expect_err("no usable server");
        assert!(error.to_string().contains("no name server"), "{error}");
        std::fs::write(&behind, "nameserver 192.168.1.1\nsearch lan\n").expect("write");
        let found = first_usable(&[&main, &behind]).expect("usable");
        assert_eq!(found.source, behind);
        assert_eq!(found.resolv_conf(), "search lan\nnameserver 192.168.1.1\n");
    }
}
