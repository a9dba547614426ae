//! package.json and its lock files, as far as they matter.

use crate::Evidence;
use crate::manifest::line_at;
use crate::tree::Files;
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// Lock files of large apps have a few megabytes.
pub(super) const MAX_LOCK: usize = 8 * 1024 * 1024;

/// package.json, as far as it matters.
pub(crate) struct Package {
    text: String,
    root: Map<String, Value>,
}

/// `None` without a package.json, or when it is no JSON object, which is warned about.
pub(crate) fn read_package(files: &Files<'_>, warnings: &mut Vec<String>) -> Option<Package> {
    let text = files.text("package.json")?;
    match serde_json::from_str::<Value>(&text) {
        Ok(Value::Object(root)) => Some(Package { text, root }),
        Ok(_) => {
            warnings.push("package.json:1: expected an object".into());
            None
        }
        Err(error) => {
            warnings.push(format!("package.json:{}: not valid JSON: {error}", error.line()));
            None
        }
    }
}

impl Package {
    pub fn script(&self, name: &str) -> Option<&str> {
        let script = self.root.get("scripts")?.get(name)?.as_str()?.trim();
        (!script.is_empty() && !script.contains('\0')).then_some(script)
    }

    /// Names of scripts, in their order.
    pub fn script_names(&self) -> impl Iterator<Item = &str> {
        self.root.get("scripts").and_then(Value::as_object).into_iter().flatten().map(|(name, _)| name.as_str())
    }

    /// The pairs of a table of texts, for example `dependencies`.
    pub fn table(&self, name: &str) -> impl Iterator<Item = (&str, &str)> {
        let table = self.root.get(name).and_then(Value::as_object).into_iter().flatten();
        table.filter_map(|(name, version)| Some((name.as_str(), version.as_str()?)))
    }

    pub fn get(&self, key: &str) -> Option<&Value> {
        self.root.get(key)
    }

    pub fn text_of(&self, key: &str) -> Option<&str> {
        self.root.get(key).and_then(Value::as_str)
    }

    /// What is there when the app runs.
    pub fn has_dependency(&self, name: &str) -> bool {
        self.table("dependencies").chain(self.table("optionalDependencies")).any(|(own, _)| own == name)
    }

    /// What is there when the app is built.
    pub fn has_any_dependency(&self, name: &str) -> bool {
        self.has_dependency(name) || self.table("devDependencies").any(|(own, _)| own == name)
    }

    /// The line of a key, for evidence: the first place where it is written as one.
    fn line_of(&self, key: &str) -> Option<usize> {
        let quoted = format!("{}", Value::from(key));
        let found = self.text.match_indices(&quoted).find(|(at, _)| self.text[at + quoted.len()..].trim_start().starts_with(':'));
        found.map(|(at, _)| line_at(&self.text, at))
    }

    pub fn evidence(&self, key: &str, what: String) -> Evidence {
        Evidence::new("package.json", self.line_of(key), what)
    }
}

/// npm's lock file, of version 2 or 3.
#[derive(Default, Deserialize)]
pub(crate) struct Lock {
    #[serde(default)]
    packages: BTreeMap<String, Locked>,
}

#[derive(Deserialize)]
pub(crate) struct Locked {
    /// Only what development needs has brought it.
    #[serde(default)]
    pub dev: bool,
    #[serde(default)]
    engines: Value,
    #[serde(default)]
    bin: Value,
}

/// Empty without a lock file that can be read.
pub(crate) fn read_lock(files: &Files<'_>) -> Lock {
    let text = NPM_LOCKS.iter().find_map(|name| files.text_up_to(name, MAX_LOCK));
    text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
}

/// Lock files that npm reads, the preferred first.
pub(crate) const NPM_LOCKS: &[&str] = &["npm-shrinkwrap.json", "package-lock.json"];

impl Lock {
    pub fn get(&self, package: &str) -> Option<&Locked> {
        self.packages.get(&format!("node_modules/{package}"))
    }

    /// The package that brings a program along.
    pub fn provider(&self, program: &str) -> Option<(&str, &Locked)> {
        self.packages.iter().find_map(|(path, locked)| {
            let name = path.strip_prefix("node_modules/").filter(|name| !name.contains("/node_modules/"))?;
            let brings = match &locked.bin {
                Value::Object(programs) => programs.contains_key(program),
                Value::String(_) => name.rsplit('/').next() == Some(program),
                _ => false,
            };
            brings.then_some((name, locked))
        })
    }
}

impl Locked {
    pub fn node(&self) -> Option<&str> {
        self.engines.get("node")?.as_str()
    }
}
