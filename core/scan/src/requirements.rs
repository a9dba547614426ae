//! Lines of requirements files, and what PEP 508 says they mean.

use crate::Evidence;
use crate::manifest::Dependency;
use crate::python_version::version_pair;

pub(crate) enum Line {
    Include(String),
    Requirement(String),
    /// A file or directory of the app's own that pip reads: `-e .`, `./lib`, `--find-links wheels`.
    Local(String),
}

/// The meaningful lines of a requirements file, with their numbers: backslashes join, ` #` begins a comment.
pub(crate) fn requirement_lines(text: &str) -> Vec<(usize, Line)> {
    let mut found = Vec::new();
    let mut joined: Option<(usize, String)> = None;
    for (index, raw) in text.lines().enumerate() {
        let (start, so_far) = joined.take().unwrap_or((index + 1, String::new()));
        if let Some(begun) = raw.strip_suffix('\\') {
            joined = Some((start, so_far + begun));
            continue;
        }
        found.extend(requirement_line(&(so_far + raw)).map(|line| (start, line)));
    }
    if let Some((start, text)) = joined {
        found.extend(requirement_line(&text).map(|line| (start, line)));
    }
    found
}

fn requirement_line(text: &str) -> Option<Line> {
    let comment = text.find(" #").or_else(|| text.find("\t#")).unwrap_or(text.len());
    let text = text[..comment].trim();
    if text.is_empty() || text.starts_with('#') {
        return None;
    }
    if !text.starts_with('-') {
        // `--hash=...` and other options of one requirement.
        let text = text.split(" --").next().unwrap_or_default().trim();
        return Some(requirement(text));
    }
    let (option, value) = text.split_once(['=', ' ']).unwrap_or((text, ""));
    let include = match option {
        "-r" | "--requirement" | "-c" | "--constraint" => value.trim(),
        // `-rother.txt`, as pip takes it too.
        _ if (text.starts_with("-r") || text.starts_with("-c")) && !text.starts_with("--") => text[2..].trim(),
        "-e" | "--editable" => return Some(requirement(value.trim())),
        "-f" | "--find-links" if !value.contains("://") => return Some(Line::Local(value.trim().to_owned())),
        _ => return None,
    };
    // Constraints name versions of what others ask for; their names are no dependencies, but pip reads the file.
    (!include.is_empty() && !include.contains("://")).then(|| Line::Include(include.trim_matches('"').to_owned()))
}

fn requirement(text: &str) -> Line {
    // `lib @ ./lib`, `lib @ file:lib`
    let place = text.split_once(" @ ").map_or(text, |(_, place)| place.trim());
    let of_this_tree = place.starts_with(['.', '/']) || place.starts_with("file:");
    let archive = !place.contains("://") && [".whl", ".zip", ".tar.gz"].iter().any(|ending| place.ends_with(ending));
    if of_this_tree || archive { Line::Local(place.to_owned()) } else { Line::Requirement(text.to_owned()) }
}

/// Whether pip fetches it with git: `git+https://...`, also behind a name.
pub(crate) fn is_from_git(text: &str) -> bool {
    let place = text.split_once('@').filter(|(name, _)| !name.contains(':')).map_or(text, |(_, place)| place);
    place.trim_start().starts_with("git+")
}

/// `name` relative to the directory of `from`, if it stays inside.
pub(crate) fn inside(from: &str, name: &str) -> Option<String> {
    let mut parts: Vec<&str> = from.split('/').collect();
    parts.pop();
    for part in name.split('/') {
        match part {
            "" if parts.is_empty() && name.starts_with('/') => return None,
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

/// One PEP 508 requirement; `None` when it is none, or its marker says that it is not for here.
pub(crate) fn dependency(text: &str, file: &str, line: Option<usize>) -> Option<Dependency> {
    // `git+https://example.org/x#egg=name` says its name at the end.
    let text = match text.split_once("#egg=").filter(|_| is_from_git(text)) {
        Some((_, name)) => name.split('&').next().unwrap_or_default().trim(),
        None => text.trim(),
    };
    let (text, marker) = text.split_once(';').unwrap_or((text, ""));
    if !marker.trim().is_empty() && !marker_applies(marker) {
        return None;
    }
    let end = text.find(|c: char| !(c.is_ascii_alphanumeric() || "._-".contains(c))).unwrap_or(text.len());
    let (name, rest) = text.split_at(end);
    let rest = rest.trim_start();
    let known_rest = rest.is_empty() || rest.starts_with(['[', '=', '<', '>', '!', '~', '@', '(']);
    if name.is_empty() || !name.starts_with(|c: char| c.is_ascii_alphanumeric()) || !known_rest {
        return None; // a path, a URL, or something that pip would refuse
    }
    let extras = rest.strip_prefix('[').and_then(|rest| rest.split_once(']')).map_or(Vec::new(), |(extras, _)| {
        extras.split(',').map(|extra| normalize(extra.trim())).collect()
    });
    let what = format!("depends on {}", name);
    Some(Dependency { name: normalize(name), extras, evidence: Evidence::new(file, line, what) })
}

/// PEP 503: lower case, runs of `-_.` become one `-`.
pub(crate) fn normalize(name: &str) -> String {
    let mut normalized = String::with_capacity(name.len());
    for c in name.chars() {
        if matches!(c, '-' | '_' | '.') {
            if !normalized.ends_with('-') {
                normalized.push('-');
            }
        } else {
            normalized.push(c.to_ascii_lowercase());
        }
    }
    normalized
}

/// Whether an environment marker holds on Linux with CPython 3. `and` binds closer than `or`; what is not
/// understood holds, so that a dependency is rather seen than overlooked.
fn marker_applies(marker: &str) -> bool {
    let plain = marker.replace(['(', ')'], " ");
    plain.split(" or ").any(|all| all.split(" and ").all(comparison_holds))
}

fn comparison_holds(text: &str) -> bool {
    const OPERATORS: &[&str] = &["===", "==", "!=", "<=", ">=", "~=", "<", ">", " not in ", " in "];
    let Some((operator, at)) = OPERATORS.iter().filter_map(|o| text.find(o).map(|at| (*o, at))).min_by_key(|(o, at)| (*at, usize::MAX - o.len()))
    else {
        return true;
    };
    let unquote = |text: &str| text.trim().trim_matches(['"', '\'']).to_owned();
    let (left, right) = (unquote(&text[..at]), unquote(&text[at + operator.len()..]));
    let here = match left.as_str() {
        "sys_platform" => "linux",
        "platform_system" => "Linux",
        "os_name" => "posix",
        "implementation_name" => "cpython",
        "platform_python_implementation" => "CPython",
        "extra" => return false,
        "python_version" | "python_full_version" => {
            // Versions in use are 3.9 and later: only what is about older ones is decided here.
            return !matches!((operator, version_pair(&right)), ("<" | "<=" | "==", Some(old)) if old < (3, 9));
        }
        _ => return true,
    };
    match operator {
        "==" | "===" => here == right,
        "!=" => here != right,
        " in " => right.contains(here),
        " not in " => !right.contains(here),
        _ => true,
    }
}
