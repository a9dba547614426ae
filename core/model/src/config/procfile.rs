//! `Procfile`: one `name: command` a line, `#` begins a comment line.

use super::{ConfigError, DEFAULT_GROUP, Mistake, words};
use std::collections::BTreeMap;

/// Longest Procfile.
pub const MAX_PROCFILE_BYTES: usize = 64 * 1024;
/// Most processes in one.
pub const MAX_PROCESSES: usize = 64;

/// One line of a Procfile. Its command is a shell's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcfileEntry {
    pub name: String,
    pub command: String,
    pub line: usize,
}

impl ProcfileEntry {
    /// The process group it becomes: `web` is the default group, the others keep their names.
    pub fn group(&self) -> &str {
        if self.name == "web" { DEFAULT_GROUP } else { &self.name }
    }

    /// The command as `[processes]` holds it: put under `sh -c` when only a shell understands it.
    pub fn process_command(&self) -> String {
        words::join(&self.argv())
    }

    /// The words to run.
    pub fn argv(&self) -> Vec<String> {
        match words::split(&self.command) {
            Ok(argv) if !words::needs_shell(&self.command) => argv,
            _ => vec!["sh".into(), "-c".into(), exec_form(&self.command)],
        }
    }
}

/// `exec` in front of a single command lets it replace the shell, so that it gets the stop signal.
fn exec_form(command: &str) -> String {
    let several = command.contains([';', '&', '|', '(', '{', '\n']);
    let first = command.split_whitespace().next().unwrap_or_default();
    let builtin = first.contains('=') || ["exec", "cd", "export", "source", ".", "set", "ulimit", "umask"].contains(&first);
    if several || builtin { command.to_owned() } else { format!("exec {command}") }
}

/// The lines of a Procfile in their order; names are unique.
pub fn parse(text: &str, file_name: &str) -> Result<Vec<ProcfileEntry>, ConfigError> {
    let fail = |line: usize, message: String| ConfigError {
        file: file_name.to_owned(),
        mistakes: vec![Mistake { line, column: 1, message }],
    };
    if text.len() > MAX_PROCFILE_BYTES {
        return Err(fail(1, format!("the file is longer than {MAX_PROCFILE_BYTES} bytes")));
    }
    let mut entries: Vec<ProcfileEntry> = Vec::new();
    for (index, raw) in text.trim_start_matches('\u{feff}').lines().enumerate() {
        let (number, line) = (index + 1, raw.trim());
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (name, command) = line
            .split_once(':')
            .map(|(name, command)| (name.trim(), command.trim()))
            .filter(|(name, command)| valid_group(name) && !command.is_empty())
            .ok_or_else(|| fail(number, "expected `name: command`, the name of letters, digits, - and _".into()))?;
        if command.contains('\0') || command.len() > words::MAX_COMMAND_BYTES {
            return Err(fail(number, format!("the command of {name} is too long or holds a NUL")));
        }
        if let Some(first) = entries.iter().find(|entry| entry.name == name) {
            return Err(fail(number, format!("{name} was given a command on line {} already", first.line)));
        }
        if entries.len() == MAX_PROCESSES {
            return Err(fail(number, format!("more than {MAX_PROCESSES} processes")));
        }
        entries.push(ProcfileEntry { name: name.to_owned(), command: command.to_owned(), line: number });
    }
    Ok(entries)
}

/// `[processes]` of a Procfile. `release` is left out: it is a command of the deploy, not a process.
pub fn processes(entries: &[ProcfileEntry]) -> BTreeMap<String, String> {
    entries
        .iter()
        .filter(|entry| entry.name != "release")
        .map(|entry| (entry.group().to_owned(), entry.process_command()))
        .collect()
}

/// What a process group may be called; it becomes part of keys and host names.
pub(super) fn valid_group(name: &str) -> bool {
    (1..=63).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_processes() {
        let text = "# comment\nweb: gunicorn app:app -b 0.0.0.0:$PORT\n\nworker: python worker.py\nrelease: ./migrate\n";
        let entries = parse(text, "Procfile").unwrap();
        assert_eq!(entries.iter().map(|e| (e.name.as_str(), e.line)).collect::<Vec<_>>(), [("web", 2), ("worker", 4), ("release", 5)]);
        assert_eq!(entries[0].argv(), ["sh", "-c", "exec gunicorn app:app -b 0.0.0.0:$PORT"]);
        assert_eq!(entries[1].argv(), ["python", "worker.py"]);
        let groups = processes(&entries);
        assert_eq!(groups.keys().collect::<Vec<_>>(), ["app", "worker"]);
        assert_eq!(groups["app"], "sh -c 'exec gunicorn app:app -b 0.0.0.0:$PORT'");
    }

    #[test]
    fn shells_with_several_commands_are_not_replaced() {
        let argv = |command: &str| ProcfileEntry { name: "web".into(), command: command.into(), line: 1 }.argv();
        assert_eq!(argv("cd src && python a.py"), ["sh", "-c", "cd src && python a.py"]);
        assert_eq!(argv("A=1 python a.py"), ["sh", "-c", "A=1 python a.py"]);
    }

    #[test]
    fn says_what_is_wrong() {
        let check = |text: &str, expected: &str| assert_eq!(parse(text, "Procfile").unwrap_err().to_string(), expected);
        check("web gunicorn", "Procfile:1:1: expected `name: command`, the name of letters, digits, - and _");
        check("a: b\n\na: c", "Procfile:3:1: a was given a command on line 1 already");
        check(&"x".repeat(MAX_PROCFILE_BYTES + 1), "Procfile:1:1: the file is longer than 65536 bytes");
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "(web|a: ?|\\PC|\n|'|:){0,80}") {
            if let Ok(entries) = parse(&text, "Procfile") {
                processes(&entries);
            }
        }
    }
}
