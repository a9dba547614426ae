//! An app's own Dockerfile: which port it exposes.

use crate::tree::Files;
use crate::{Detected, Evidence, Family, Found};
use std::collections::BTreeMap;

/// Names that are looked for, in this order.
const NAMES: &[&str] = &["Dockerfile", "Containerfile"];
/// Most instructions that are looked at.
const MAX_INSTRUCTIONS: usize = 5000;
/// Longest value that variables are replaced in.
const MAX_EXPANDED: usize = 1024;
/// Most stages, and variables in each.
const MAX_STAGES: usize = 100;
const MAX_VARIABLES: usize = 500;
/// Images that are web servers and expose their port themselves.
const SERVERS: &[(&str, u16)] = &[("nginx", 80), ("httpd", 80), ("caddy", 80), ("nginxinc/nginx-unprivileged", 8080)];
pub(crate) const DEFAULT_MEMORY_MB: u32 = 512;

#[derive(Debug, Default, Clone)]
struct Stage {
    name: String,
    image: String,
    line: usize,
    exposed: Vec<(u16, usize)>,
    volumes: Vec<usize>,
    command: Option<Evidence>,
    variables: BTreeMap<String, String>,
}

pub(crate) fn detect(files: &Files<'_>, warnings: &mut Vec<String>) -> Found {
    let Some((path, text)) = NAMES.iter().find_map(|name| Some((*name, files.text(name)?))) else { return Found::Nothing };
    let stages = stages(path, &text);
    let Some(last) = stages.last() else {
        return Found::rejected(Family::Dockerfile, vec![Evidence::new(path, None, "the file")], "it has no FROM instruction: mend it, or remove it and launch again to have one written");
    };
    let mut evidence = vec![Evidence::new(path, last.line, format!("FROM {}", last.image))];
    let mut notes = Vec::new();
    let server = SERVERS.iter().find(|(name, _)| {
        let bare = last.image.split(['@']).next().unwrap_or_default();
        let bare = bare.rsplit_once(':').map_or(bare, |(name, _)| name);
        bare.trim_start_matches("docker.io/").trim_start_matches("library/") == *name
    });
    let mut env = BTreeMap::new();
    let (port, port_reason) = match (last.exposed.as_slice(), server) {
        ([], Some((name, port))) => (*port, format!("images made from {name} listen there")),
        ([], None) => {
            env.insert("PORT".to_owned(), "8080".to_owned());
            (8080, format!("{path} exposes none, so the app is told 8080 by PORT"))
        }
        (exposed, _) => {
            let (port, line) = exposed.iter().find(|(port, _)| *port == 8080).unwrap_or(&exposed[0]);
            evidence.push(Evidence::new(path, *line, format!("EXPOSE {port}")));
            if exposed.iter().any(|(other, _)| other != port) {
                let all: Vec<String> = exposed.iter().map(|(port, _)| port.to_string()).collect();
                notes.push(format!("{path} exposes ports {}; requests go to {port}", all.join(", ")));
            }
            (*port, format!("{path}:{line} exposes it"))
        }
    };
    for line in &last.volumes {
        warnings.push(format!("{path}:{line}: the volume is not made; what is written there is lost with the machine's version"));
    }
    evidence.extend(last.command.clone());
    Found::App(Box::new(Detected {
        family: Family::Dockerfile,
        name: path.into(),
        port,
        port_reason,
        command: Vec::new(),
        evidence,
        dockerfile_path: Some(path.into()),
        dockerfile: None,
        extra_files: Vec::new(),
        dockerignore: None,
        env,
        other_processes: BTreeMap::new(),
        memory_mb: DEFAULT_MEMORY_MB,
        notes,
        recipe: None,
    }))
}

/// The stages of a Dockerfile; a stage made from another one begins with what that one had.
fn stages(path: &str, text: &str) -> Vec<Stage> {
    let mut stages: Vec<Stage> = Vec::new();
    let mut global = BTreeMap::new();
    for (line, instruction, rest) in instructions(text) {
        if instruction == "FROM" && stages.len() == MAX_STAGES {
            break;
        }
        match (instruction.as_str(), stages.last_mut()) {
            ("ARG" | "ENV", Some(stage)) if stage.variables.len() >= MAX_VARIABLES => {}
            ("FROM", _) => {
                let mut words = rest.split_whitespace().filter(|word| !word.starts_with("--"));
                let Some(image) = words.next().map(|image| expand(image, &global)) else { continue };
                let name = match (words.next(), words.next()) {
                    (Some(word), Some(name)) if word.eq_ignore_ascii_case("as") => name.to_ascii_lowercase(),
                    _ => String::new(),
                };
                let base = stages.iter().find(|stage| !stage.name.is_empty() && stage.name == image.to_ascii_lowercase());
                stages.push(match base {
                    Some(base) => Stage { name, line, ..base.clone() },
                    None => Stage { name, image, line, ..Stage::default() },
                });
            }
            ("ARG", None) if global.len() < MAX_VARIABLES => global.extend(argument(&rest, &global)),
            ("ARG", Some(stage)) => match argument(&rest, &stage.variables) {
                Some((name, value)) => drop(stage.variables.insert(name, value)),
                // Without a value, the one from before the first FROM.
                None => {
                    let name = rest.trim().to_owned();
                    if let Some(value) = global.get(&name) {
                        stage.variables.insert(name, value.clone());
                    }
                }
            },
            ("ENV", Some(stage)) => {
                for (name, value) in assignments(&rest) {
                    let value = expand(&value, &stage.variables);
                    stage.variables.insert(name, value);
                }
            }
            ("EXPOSE", Some(stage)) => {
                let ports = expand(&rest, &stage.variables);
                stage.exposed.extend(ports.split_whitespace().filter_map(exposed_port).map(|port| (port, line)));
            }
            ("VOLUME", Some(stage)) => stage.volumes.push(line),
            ("CMD" | "ENTRYPOINT", Some(stage)) => {
                let shown: String = rest.chars().take(120).collect();
                stage.command = Some(Evidence::new(path, line, format!("{instruction} {shown}")));
            }
            _ => {}
        }
    }
    stages
}

/// Instructions in upper case with their arguments on one line; comments and here-documents are left out.
fn instructions(text: &str) -> Vec<(usize, String, String)> {
    let escape = if text.lines().take_while(|line| line.starts_with('#')).any(|line| line.replace(' ', "").eq_ignore_ascii_case("#escape=`")) {
        '`'
    } else {
        '\\'
    };
    let mut found = Vec::new();
    let mut joined: Option<(usize, String)> = None;
    let mut heredoc: Option<String> = None;
    for (index, raw) in text.lines().enumerate() {
        if let Some(end) = &heredoc {
            if raw.trim() == end {
                heredoc = None;
            }
            continue;
        }
        let line = raw.trim();
        if line.starts_with('#') || (line.is_empty() && joined.is_none()) {
            continue;
        }
        let (start, so_far) = joined.take().unwrap_or((index + 1, String::new()));
        if let Some(begun) = line.strip_suffix(escape) {
            joined = Some((start, so_far + begun + " "));
            continue;
        }
        let whole = so_far + line;
        let (instruction, rest) = whole.split_once(char::is_whitespace).unwrap_or((&whole, ""));
        let instruction = instruction.to_ascii_uppercase();
        if matches!(instruction.as_str(), "RUN" | "COPY" | "ADD") {
            heredoc = heredoc_end(rest);
        }
        found.push((start, instruction, rest.trim().to_owned()));
        if found.len() == MAX_INSTRUCTIONS {
            break;
        }
    }
    found
}

/// The word that ends the here-document which the line begins, if it does.
fn heredoc_end(rest: &str) -> Option<String> {
    let (_, after) = rest.split_once("<<")?;
    let word = after.trim_start_matches('-').trim_start_matches(['"', '\'']);
    let end = word.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(word.len());
    (end > 0).then(|| word[..end].to_owned())
}

/// `NAME=default` of an ARG.
fn argument(rest: &str, variables: &BTreeMap<String, String>) -> Option<(String, String)> {
    let (name, value) = rest.split_once('=')?;
    Some((name.trim().to_owned(), expand(value.trim().trim_matches(['"', '\'']), variables)))
}

/// The pairs of `ENV A=1 B="x y"`, or the one of `ENV A rest`.
fn assignments(rest: &str) -> Vec<(String, String)> {
    let Ok(words) = dunlin_model::config::words::split(rest) else { return Vec::new() };
    if words.first().is_some_and(|word| word.contains('=')) {
        words.iter().filter_map(|word| word.split_once('=')).map(|(n, v)| (n.to_owned(), v.to_owned())).collect()
    } else {
        words.split_first().map(|(name, value)| (name.clone(), value.join(" "))).into_iter().collect()
    }
}

/// `$NAME`, `${NAME}` and `${NAME:-default}` replaced; unknown ones become nothing, as in a build.
fn expand(text: &str, variables: &BTreeMap<String, String>) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let (name, default, after) = if let Some(braced) = rest.strip_prefix('{') {
            let Some((inner, after)) = braced.split_once('}') else { break };
            let (name, default) = inner.split_once(":-").unwrap_or((inner, ""));
            (name, default, after)
        } else {
            let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(rest.len());
            (&rest[..end], "", &rest[end..])
        };
        out.push_str(variables.get(name).filter(|value| !value.is_empty()).map_or(default, String::as_str));
        rest = after;
        if out.len() > MAX_EXPANDED {
            return String::new(); // variables that double each other
        }
    }
    out.push_str(rest);
    out
}

/// The port of `8080`, `8080/tcp` or `8000-8010`; `None` for udp.
fn exposed_port(word: &str) -> Option<u16> {
    let (port, protocol) = word.split_once('/').unwrap_or((word, "tcp"));
    let first = port.split('-').next()?.trim_matches(['"', '\'']);
    if protocol.eq_ignore_ascii_case("tcp") { first.parse().ok().filter(|port| *port > 0) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_the_last_stage() {
        let check = |text: &str, image: &str, exposed: &[u16]| {
            let stages = stages("Dockerfile", text);
            let last = stages.last().unwrap();
            let ports: Vec<u16> = last.exposed.iter().map(|(port, _)| *port).collect();
            assert_eq!((last.image.as_str(), ports.as_slice()), (image, exposed), "{text}");
        };
        check("FROM a\nEXPOSE 80 81/tcp 53/udp\n", "a", &[80, 81]);
        check("FROM a AS build\nEXPOSE 1\nFROM b\nEXPOSE 2\n", "b", &[2]);
        check("FROM a AS Base\nEXPOSE 1\nFROM base\n", "a", &[1]);
        check("ARG TAG=3\nARG P=9000\nFROM --platform=linux/amd64 a:${TAG}\nARG P\nEXPOSE $P\n", "a:3", &[9000]);
        check("FROM a\nENV PORT=3000 X=\"a b\"\nEXPOSE ${PORT}\n", "a", &[3000]);
        check("FROM a\nENV PORT 3001\nexpose \\\n  # comment\n  ${PORT:-1} \\\n 3002\n", "a", &[3001, 3002]);
        check("FROM a\nEXPOSE ${NONE:-4000}\n", "a", &[4000]);
        check("FROM a\nRUN <<EOF\nEXPOSE 1\nFROM x\nEOF\nEXPOSE 2\n", "a", &[2]);
        check("# EXPOSE 9\nFROM a\n#EXPOSE 9\nRUN echo EXPOSE 9\n", "a", &[]);
        assert!(stages("Dockerfile", "RUN x\n# FROM y\n").is_empty());
    }

    #[test]
    fn doubling_variables_are_bounded() {
        let doubling: String = (1..60).map(|i| format!("ENV A{i}=${{A{0}}}${{A{0}}}\n", i - 1)).collect();
        stages("Dockerfile", &format!("FROM a\nENV A0=xxxxxxxx\n{doubling}EXPOSE $A59\n"));
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "(FROM |ARG |ENV |EXPOSE |RUN |<<E|\\$|\\{|\\}|:-|=|\\\\|\n|a|1|#|\\PC){0,60}") {
            stages("Dockerfile", &text);
        }
    }
}
