//! Which Python an app asks for.

use crate::Evidence;
use crate::manifest::Manifest;
use crate::tree::Files;

/// Versions that images exist for, the preferred first.
const PYTHONS: &[u32] = &[11, 12, 13, 10, 14, 9];
pub(crate) const DEFAULT_PYTHON: &str = "3.11";

/// Python's version for the image, and what says so; the default when nothing does.
pub(crate) fn choose(files: &Files<'_>, manifest: Option<&Manifest>, notes: &mut Vec<String>) -> (String, Option<Evidence>) {
    for file in [".python-version", "runtime.txt"] {
        let Some(text) = files.text(file) else { continue };
        let line = text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#')).unwrap_or_default();
        let version = line.strip_prefix("python-").unwrap_or(line);
        match version_pair(version) {
            Some((3, minor)) if minor > 0 => {
                return (format!("3.{minor}"), Some(Evidence::new(file, 1, format!("Python {version}"))));
            }
            _ => notes.push(format!("{file} names {:?}, which is no version of Python 3; {DEFAULT_PYTHON} is used", line.chars().take(40).collect::<String>())),
        }
    }
    let Some(requires) = manifest.and_then(|manifest| manifest.requires_python.clone()) else {
        return (DEFAULT_PYTHON.into(), None);
    };
    let chosen = PYTHONS.iter().find(|minor| {
        requires.what.split("||").any(|all| all.split([',', ' ']).filter(|part| !part.is_empty()).all(|part| allows(part, **minor)))
    });
    match chosen {
        Some(minor) => {
            let evidence = Evidence { what: format!("Python {}", requires.what), ..requires };
            (format!("3.{minor}"), Some(evidence))
        }
        None => {
            notes.push(format!("{} asks for Python {}, which no known version is; {DEFAULT_PYTHON} is used", requires.file, requires.what));
            (DEFAULT_PYTHON.into(), None)
        }
    }
}

/// Whether one clause of a version specifier allows some 3.`minor`.
fn allows(clause: &str, minor: u32) -> bool {
    let end = clause.find(|c: char| c.is_ascii_digit() || c == '*').unwrap_or(clause.len());
    let (operator, version) = clause.split_at(end);
    let Some(wanted) = version_pair(version) else { return true };
    let has_patch = version.split('.').nth(2).is_some_and(|patch| patch.parse::<u32>().is_ok_and(|patch| patch > 0));
    let parts = version.split('.').count();
    let here = (3, minor);
    match operator.trim() {
        ">=" => here >= wanted,
        ">" => here > wanted || (has_patch && here == wanted),
        "<" => here < wanted || (has_patch && here == wanted),
        "<=" => here <= wanted,
        "!=" => has_patch || here != wanted,
        "~=" | "~" if parts > 2 || operator == "~" => here == wanted,
        "~=" | "^" => here >= wanted && wanted.0 == 3,
        _ if version.starts_with("3.*") || parts == 1 => wanted.0 == 3,
        _ => here == wanted,
    }
}

pub(crate) fn version_pair(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.trim().trim_start_matches('v').split('.');
    let major = parts.next()?.trim().parse().ok()?;
    let minor = parts.next().and_then(|part| part.trim().parse().ok()).unwrap_or(0);
    Some((major, minor))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryTree;
    use crate::manifest::Installer;
    use proptest::prelude::*;

    #[test]
    fn versions_of_python() {
        let check = |requires: &str, expected: &str| {
            let mut manifest = Manifest::new(Installer::Project, "p");
            manifest.requires_python = Some(Evidence::new("p", None, requires));
            let tree = MemoryTree::default();
            assert_eq!(choose(&Files::of(&tree), Some(&manifest), &mut Vec::new()).0, expected, "{requires}");
        };
        check(">=3.8", "3.11");
        check(">=3.12,<4", "3.12");
        check("<3.11", "3.10");
        check("~=3.10.2", "3.10");
        check("==3.13.*", "3.13");
        check("^3.12", "3.12");
        check("~3.12", "3.12");
        check(">=3.11.4", "3.11");
        check("!=3.11.*", "3.12");
        check("<3", "3.11");
        let tree = MemoryTree::new([(".python-version", "3.12.4\n"), ("runtime.txt", "python-3.9\n")]);
        assert_eq!(choose(&Files::of(&tree), None, &mut Vec::new()).0, "3.12");
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "([<>=^~!*,. 0-9|-]|\\PC){0,40}") {
            allows(&text, 11);
            version_pair(&text);
        }
    }
}
