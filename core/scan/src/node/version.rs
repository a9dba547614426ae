//! Which Node.js an app asks for.

use super::package::{Lock, Package};
use crate::Evidence;
use crate::tree::Files;

/// Versions that images exist for, the preferred first.
const NODES: &[u32] = &[18, 20, 22, 24, 16];
const DEFAULT_NODE: u32 = 18;
/// Packages that need a newer Node.js from a major version of theirs on, for apps without a lock file that says so.
const NEEDS: &[(&str, u32, u32)] = &[
    ("vite", 7, 20),
    ("next", 16, 20),
    ("nuxt", 4, 20),
    ("@angular/cli", 20, 20),
    ("@angular/core", 20, 20),
    ("@nestjs/core", 11, 20),
    ("react-router", 7, 20),
    ("@react-router/dev", 7, 20),
    ("astro", 5, 20),
];

/// A demand, and where it is made.
struct Demand {
    range: String,
    seen: Evidence,
}

/// The major version for the image. `tables` are the kinds of dependencies that are installed.
pub(crate) fn choose(files: &Files<'_>, package: &Package, lock: &Lock, tables: &[&str], notes: &mut Vec<String>) -> (u32, Option<Evidence>) {
    let demands = demands(package, lock, tables);
    let unmet = |version: u32| demands.iter().find(|demand| !allows(&demand.range, version));
    let engines = package.get("engines").and_then(|engines| engines.get("node")).and_then(|range| range.as_str());
    let pinned = [".nvmrc", ".node-version"].into_iter().find_map(|file| {
        let major = major(files.text(file)?.trim())?;
        Some((major, Evidence::new(file, 1, format!("Node.js {major}"))))
    });
    let (version, seen) = match (pinned, engines) {
        (Some((major, seen)), _) => (major, Some(seen)),
        (None, Some(range)) => {
            let allowed = || NODES.iter().copied().filter(|major| allows(range, *major));
            // An exact release means its major version.
            let exact = || major(range).filter(|major| NODES.contains(major));
            match allowed().find(|version| unmet(*version).is_none()).or(allowed().next()).or_else(exact) {
                Some(major) => (major, Some(package.evidence("node", format!("Node.js {range}")))),
                None => {
                    notes.push(format!("package.json asks for Node.js {range}, which no known version is; {DEFAULT_NODE} is used"));
                    (DEFAULT_NODE, None)
                }
            }
        }
        (None, None) => match NODES.iter().find(|version| unmet(**version).is_none()) {
            Some(version) => (*version, unmet(DEFAULT_NODE).map(|demand| demand.seen.clone())),
            None => (DEFAULT_NODE, None),
        },
    };
    if let Some(demand) = unmet(version) {
        notes.push(format!("{}, which Node.js {version} is not; the build or the app may fail", demand.seen));
    }
    if version != DEFAULT_NODE {
        notes.push(format!("node:{version}-slim must come from a registry; node:{DEFAULT_NODE}-slim can be made here"));
    }
    (version, seen)
}

/// What the app's own dependencies say that they need.
fn demands(package: &Package, lock: &Lock, tables: &[&str]) -> Vec<Demand> {
    let mut demands = Vec::new();
    for (name, wanted) in tables.iter().flat_map(|table| package.table(table)) {
        if let Some(locked) = lock.get(name) {
            demands.extend(locked.node().map(|range| Demand {
                range: range.to_owned(),
                seen: Evidence::new("package-lock.json", None, format!("{name} needs Node.js {range}")),
            }));
            continue;
        }
        let known = NEEDS.iter().find(|(own, from, _)| *own == name && lowest_major(wanted).is_some_and(|major| major >= *from));
        demands.extend(known.map(|(_, from, node)| Demand {
            range: format!(">={node}"),
            seen: package.evidence(name, format!("{name} {from} and later need Node.js {node}")),
        }));
    }
    demands
}

/// The major version of `^7.1.0`, `~7`, `7.x`, `>=7`.
fn lowest_major(range: &str) -> Option<u32> {
    let digits = range.trim().trim_start_matches(['^', '~', '>', '=', 'v', ' ']);
    let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    digits[..end].parse().ok()
}

pub(super) fn major(version: &str) -> Option<u32> {
    let digits = version.trim().trim_start_matches('v');
    let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    digits[..end].parse().ok().filter(|major| (4..1000).contains(major))
}

/// Whether a range like `>=16 <21 || ^22` allows some release of that major version.
fn allows(range: &str, wanted: u32) -> bool {
    range.split("||").any(|all| {
        let spaced = all.replace(" - ", " <=");
        let mut parts: Vec<String> = Vec::new();
        for part in spaced.split_whitespace() {
            // `>= 16` is one clause.
            match parts.last_mut() {
                Some(last) if last.ends_with(['<', '>', '=', '^', '~']) => last.push_str(part),
                _ => parts.push(part.to_owned()),
            }
        }
        // `16 - 20` has become `16 <=20`: the first is a lower bound.
        if all.contains(" - ") && let Some(first) = parts.first_mut() {
            first.insert_str(0, ">=");
        }
        parts.iter().all(|part| {
            let end = part.find(|c: char| c.is_ascii_digit() || c == 'v').unwrap_or(part.len());
            let (operator, version) = part.split_at(end);
            satisfies(operator, &numbers(version), release(wanted))
        })
    })
}

/// The release that the image has. Debian stays at one of 18; of the others the newest is meant.
fn release(major: u32) -> [u32; 3] {
    if major == 18 { [18, 20, 4] } else { [major, u32::MAX, u32::MAX] }
}

/// The numbers of `v20.11.1`, `20.x`, `20`: up to three.
fn numbers(version: &str) -> Vec<u32> {
    version.trim_start_matches('v').split(['.', '-', '+']).map_while(|part| part.parse().ok()).take(3).collect()
}

fn satisfies(operator: &str, given: &[u32], here: [u32; 3]) -> bool {
    let [major, ..] = given else { return true }; // `*`, `latest`
    let mut floor = [0; 3];
    floor[..given.len()].copy_from_slice(given);
    let begins = &here[..given.len()];
    match operator {
        ">=" => here >= floor,
        ">" => begins > given,
        "<" => here < floor,
        "<=" => begins <= given,
        // Images are named by their major version: `~20.1` gets a later 20.
        "^" | "~" => here[0] == *major && here >= floor,
        _ if given.len() == 3 => here == floor,
        _ => here[0] == *major,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ranges_of_node() {
        let check = |range: &str, expected: Option<u32>| assert_eq!(NODES.iter().find(|m| allows(range, **m)).copied(), expected, "{range}");
        check(">=16", Some(18));
        check(">= 20.0.0", Some(20));
        check("^20.1.0", Some(20));
        check("22.x", Some(22));
        check(">=18 <19", Some(18));
        check("<18.0.0", Some(16));
        check("16 || >=22", Some(22));
        check("20 - 22", Some(20));
        check("*", Some(18));
        check(">18", Some(20));
        check("14", None);
        assert_eq!(major("v20.11.1"), Some(20));
        assert_eq!(major("lts/iron"), None);
    }

    #[test]
    fn ranges_of_packages() {
        assert_eq!(lowest_major("^7.1.0"), Some(7));
        assert_eq!(lowest_major(">= 16.x"), Some(16));
        assert_eq!(lowest_major("latest"), None);
        assert!(allows("^20.19.0 || >=22.12.0", 20) && !allows("^20.19.0 || >=22.12.0", 18));
        assert!(allows("^18.18.0 || >= 20.9.0", 18));
        assert!(!allows("18.20.8 || ^20.3.0 || >=22.0.0", 18) && allows(">=18.20.4", 18) && !allows("^18.20.5", 18));
        assert!(allows("~20.1", 20) && allows("<=18", 18) && !allows("<18.20", 18) && allows(">=0.10", 18));
    }

    proptest! {
        #[test]
        fn any_text_is_survived(range in "([<>=^~|x*. 0-9-]|\\PC){0,30}") {
            allows(&range, 18);
            lowest_major(&range);
        }
    }
}
