//! `.dockerignore`, and what looks like a secret.

use crate::ignore::Ignore;
use crate::tree::Files;
use crate::{Detected, Family};

/// Names of files that hold secrets more often than not.
const SECRETS: &[&str] = &[
    "**/.env",
    "**/.env.*",
    "**/*.env",
    "**/.envrc",
    "**/*.pem",
    "**/*.key",
    "**/*.p12",
    "**/*.pfx",
    "**/*.jks",
    "**/*.keystore",
    "**/id_rsa*",
    "**/id_dsa*",
    "**/id_ecdsa*",
    "**/id_ed25519*",
    "**/.ssh",
    "**/.aws",
    "**/.kube",
    "**/.npmrc",
    "**/.pypirc",
    "**/.netrc",
    "**/.git-credentials",
    "**/credentials.json",
    "**/*-credentials.json",
    "**/*_credentials.json",
    "**/client_secret*.json",
    "**/*service-account*.json",
    "**/*service_account*.json",
    "**/*serviceaccount*.json",
    "**/*firebase-adminsdk*.json",
    "**/.streamlit/secrets.toml",
    "**/*.tfstate",
    "**/*.tfvars",
];
/// Examples of them do not.
const NO_SECRETS: &[&str] = &[
    "!**/.env.example", "!**/.env.sample", "!**/.env.template", "!**/example.env", "!**/sample.env", "!**/template.env",
];
/// Files of a database. An app may need the one that it comes with; a site publishes it.
const DATABASES: &[&str] = &["**/*.sqlite", "**/*.sqlite3", "**/*.db"];
/// A virtual environment by a name that is also one for settings: its parts, not the directory.
const ENV: &str = "env/bin\nenv/include\nenv/lib/python3*\nenv/lib64\nenv/pyvenv.cfg\n";
/// Most JSON files that are looked into, and the longest: keys of service accounts have 3 KiB.
const MAX_JSON_FILES: usize = 100;
const MAX_JSON: usize = 16 * 1024;
/// Settings of npm that are secrets, or lead to files of this computer.
const NPM_SECRETS: &[&str] = &["_auth", "_authToken", "_password", "key", "keyfile", "cert", "certfile", "cafile"];

/// The `.dockerignore` to write, unless the app has one.
pub(crate) fn dockerignore(files: &Files<'_>, family: Family) -> Option<String> {
    if files.has(".dockerignore") {
        return None;
    }
    let mut out = String::from("# Written by `dunlin launch`: what stays out of the build, and so out of the image.\n");
    out.push_str(".git\n.gitignore\n.github\n.dunlin\n.dockerignore\nDockerfile\ndunlin.toml\nfly.toml\n\n# Secrets: use `dunlin secrets set`.\n");
    let mut line = |text: &str| {
        out.push_str(text);
        out.push('\n');
    };
    SECRETS.iter().chain(NO_SECRETS).for_each(|pattern| line(pattern));
    keys(files).iter().for_each(|path| line(&escaped(path)));
    if npmrc(files) == Npmrc::Plain {
        line("# It has settings and no secret.\n!.npmrc");
    }
    match family {
        Family::Flask | Family::FastApi | Family::Python => {
            out.push_str("\n# Made by tools, made again in the build.\n**/__pycache__\n**/*.pyc\n.venv\nvenv\n");
            out.push_str(ENV);
            out.push_str(".pytest_cache\n.mypy_cache\n.tox\n**/node_modules\n");
        }
        Family::Node => out.push_str("\n# Made by tools, made again in the build.\n**/node_modules\n.next\n.cache\ncoverage\n*.log\n"),
        Family::Static => {
            out.push_str("\n**/node_modules\n**/.DS_Store\n");
            DATABASES.iter().for_each(|pattern| out.push_str(&format!("{pattern}\n")));
        }
        Family::Dockerfile => {}
    }
    Some(out)
}

/// What an app's .npmrc is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Npmrc {
    None,
    /// Settings that an installation needs and anybody may see.
    Plain,
    Secret,
}

pub(crate) fn npmrc(files: &Files<'_>) -> Npmrc {
    let Some(text) = files.text(".npmrc").filter(|_| files.is_sent(".npmrc")) else { return Npmrc::None };
    let secret = text.lines().any(|line| {
        let (key, value) = line.split_once('=').unwrap_or((line, ""));
        // `//registry.example.org/:_authToken=...`
        let name = key.trim().rsplit(':').next().unwrap_or_default();
        NPM_SECRETS.contains(&name) || value.contains("${")
    });
    if secret { Npmrc::Secret } else { Npmrc::Plain }
}

/// JSON files that hold a private key, whatever they are called.
fn keys(files: &Files<'_>) -> Vec<String> {
    let json = files.paths().filter(|path| path.ends_with(".json") && !path.ends_with("package.json")).take(MAX_JSON_FILES);
    json.filter(|path| {
        files.text_up_to(path, MAX_JSON).is_some_and(|text| text.contains("\"private_key\"") && text.contains("-----BEGIN"))
    })
    .map(str::to_owned)
    .collect()
}

/// A path as a pattern that means it alone.
fn escaped(path: &str) -> String {
    path.chars().flat_map(|c| if "*?[]\\!#".contains(c) { vec!['\\', c] } else { vec![c] }).collect()
}

/// Names files that look like secrets and would, or will not, be part of the image.
pub(crate) fn note_secrets(files: &Files<'_>, app: &mut Detected) {
    const MOST_NAMED: usize = 5;
    let secret = Ignore::parse(&[SECRETS.join("\n"), NO_SECRETS.join("\n")].join("\n"));
    let own = files.text(".dockerignore").or_else(|| app.dockerignore.clone()).unwrap_or_default();
    let own = Ignore::parse(&own);
    let keys = keys(files);
    let is_secret = |path: &&str| (secret.is_ignored(path) || keys.iter().any(|key| key == path)) && !(*path == ".npmrc" && npmrc(files) == Npmrc::Plain);
    let (out, inside): (Vec<&str>, Vec<&str>) = files.paths().filter(is_secret).partition(|path| own.is_ignored(path));
    let named = |paths: &[&str]| paths.iter().take(MOST_NAMED).copied().collect::<Vec<_>>().join(", ");
    if !inside.is_empty() {
        app.notes.push(format!("{} may hold secrets and will be in the build; name them in .dockerignore and use `dunlin secrets set`", named(&inside)));
    }
    if !out.is_empty() {
        app.notes.push(format!("{} stays out of the image (.dockerignore); what the app needs of it goes into `dunlin secrets set`", named(&out)));
    }
    let databases = Ignore::parse(&DATABASES.join("\n"));
    let databases: Vec<&str> = files.paths().filter(|path| databases.is_ignored(path) && !own.is_ignored(path)).collect();
    if !databases.is_empty() {
        app.notes.push(format!(
            "{} will be in the image, and what the app writes there is lost with each release; name it in .dockerignore if it holds what people entered",
            named(&databases)
        ));
    }
}
