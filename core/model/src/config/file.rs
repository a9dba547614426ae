//! Reading and resolving `[[files]]`.

use super::parse::{inner_path, read_groups};
use super::section::{Findings, Refused, Section, value};
use super::{AppConfig, MAX_ENTRIES};
use crate::files::{MAX_INLINE_BYTES, MachineFile, check_files, is_secret_name};
use serde::{Deserialize, Serialize};

/// A file that machines of some process groups (of all, when it names none) find when they start. Exactly one of
/// `local_path`, `raw_value` and `secret_name` is there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FileEntry {
    pub guest_path: String,
    /// Relative to the app's directory. Only in a file: the client puts the content into `raw_value`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub local_path: Option<String>,
    /// Base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub raw_value: Option<String>,
    /// The secret whose value is the content, in base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_name: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub processes: Vec<String>,
}

impl FileEntry {
    fn file(&self) -> MachineFile {
        MachineFile {
            guest_path: self.guest_path.clone(),
            raw_value: self.raw_value.clone(),
            secret_name: self.secret_name.clone(),
            mode: None,
        }
    }
}

impl AppConfig {
    /// Files of the group's machines.
    pub fn files_for(&self, group: &str) -> Vec<MachineFile> {
        let of_group = |entry: &&FileEntry| entry.processes.is_empty() || entry.processes.iter().any(|name| name == group);
        self.files.iter().filter(of_group).map(FileEntry::file).collect()
    }
}

pub(super) fn read_file<'t>(f: &mut Findings<'t>, mut section: Section<'t>) -> Option<FileEntry> {
    let entry = FileEntry {
        guest_path: section.read(f, "guest_path", "an absolute path", value::filled).unwrap_or_default(),
        local_path: section.read(f, "local_path", "a path", inner_path),
        raw_value: section.read(f, "raw_value", "base64", |value| {
            let text = value.as_str().ok_or(Refused::Type)?;
            if text.len() > MAX_INLINE_BYTES {
                return Err(Refused::Because(format!("more than {MAX_INLINE_BYTES} bytes")));
            }
            Ok(text.to_owned())
        }),
        secret_name: section.read(f, "secret_name", "the name of a secret", |value| {
            let name = value.as_str().ok_or(Refused::Type)?;
            if is_secret_name(name) { Ok(name.to_owned()) } else { Err(Refused::Type) }
        }),
        processes: read_groups(f, &mut section),
    };
    let sources = [&entry.local_path, &entry.raw_value, &entry.secret_name].into_iter().flatten().count();
    let mistake = if sources != 1 {
        Some(format!("{} needs exactly one of local_path, raw_value and secret_name", section.key("").trim_end_matches('.')))
    } else {
        // What the client will put in place of the path is not there yet.
        let raw_value = if entry.local_path.is_some() { Some(String::new()) } else { entry.raw_value.clone() };
        check_files(&[MachineFile { raw_value, ..entry.file() }]).err().map(|why| format!("[[files]]: {}", why.replacen("files[0].", "", 1)))
    };
    match mistake {
        Some(mistake) => {
            f.mistake(section.span.clone(), mistake);
            section.finish(f, &[]);
            None
        }
        None => {
            section.finish(f, &[]);
            Some(entry)
        }
    }
}

/// What is wrong with the files of a config that did not come from a file; nothing, if nothing is.
pub(super) fn invalid(config: &AppConfig) -> Vec<String> {
    let mut mistakes: Vec<String> = Vec::new();
    if config.files.len() > MAX_ENTRIES {
        return vec![format!("files has more than {MAX_ENTRIES} entries")];
    }
    if config.files.iter().any(|entry| entry.local_path.is_some()) {
        mistakes.push("files: local_path is read by the client, which sends the content as raw_value".into());
        return mistakes;
    }
    for group in config.process_groups() {
        mistakes.extend(check_files(&config.files_for(group)).err());
    }
    mistakes.dedup();
    mistakes
}
