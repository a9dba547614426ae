//! How results, progress and errors look.

use crate::{CliError, printed};
use serde::Serialize;
use std::borrow::Cow;
use std::io::{IsTerminal, Write};
use std::time::Instant;

/// Prints a value as JSON.
pub fn print_json(value: &impl Serialize) {
    let text = serde_json::to_string_pretty(value).expect("wire types are plain data");
    // A reader that went away (`| head`) is no error of ours.
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Prints a line of data. Programs and the people who name things choose much of it: see [`printed::safe`].
pub fn print_line(line: &str) {
    let mut out = std::io::stdout();
    let line = for_person(line, out.is_terminal());
    let _ = writeln!(out, "{line}");
}

/// Prints rows under a heading, columns as wide as their longest cell.
pub fn print_table(heading: &[&str], rows: &[Vec<String>]) {
    let mut widths: Vec<usize> = heading.iter().map(|cell| cell.len()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: Vec<&str>| {
        let padded: Vec<String> = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        print_line(padded.join("  ").trim_end());
    };
    line(heading.to_vec());
    for row in rows {
        line(row.iter().map(String::as_str).collect());
    }
}

/// `error:`, causes, `hint:`, the request id. With `--json` one object on standard error.
pub fn print_error(error: &CliError, json: bool) {
    let mut err = std::io::stderr().lock();
    if json {
        let value = serde_json::json!({
            "error": error.message, "causes": error.causes, "hint": error.hint,
            "request_id": error.request_id, "exit_code": error.exit as u8,
        });
        let _ = writeln!(err, "{value}");
        return;
    }
    let is_terminal = err.is_terminal();
    let shown = |text: &str| text.lines().map(|line| for_person(line, is_terminal)).collect::<Vec<_>>().join("\n");
    let _ = writeln!(err, "{} {}", paint("31;1", "error:"), shown(&error.message));
    for cause in &error.causes {
        let _ = writeln!(err, "  {}", shown(cause));
    }
    if let Some(hint) = &error.hint {
        let _ = writeln!(err, "{} {hint}", paint("36;1", "hint:"));
    }
    if let Some(id) = &error.request_id {
        let _ = writeln!(err, "request id: {id}");
    }
}

/// Steps of long work on standard error, each with the time since the start.
pub struct Progress {
    started: Instant,
}

impl Progress {
    #[allow(clippy::new_without_default, reason = "starting a clock is not a default")]
    pub fn new() -> Self {
        Self { started: Instant::now() }
    }

    pub fn step(&self, message: &str) {
        let seconds = self.started.elapsed().as_secs_f64();
        eprintln!("{} {message}", paint("1", &format!("[{seconds:6.1}s]")));
    }

    pub fn detail(&self, line: &str) {
        eprintln!("          {}", for_person(line, std::io::stderr().is_terminal()));
    }
}

/// Asks once; anything but yes is no. Without a terminal nobody can answer.
pub fn confirm(question: &str) -> Result<bool, CliError> {
    if !std::io::stdin().is_terminal() {
        return Err(CliError::usage("this needs a yes, and there is no terminal to ask at").hint("add --yes"));
    }
    eprint!("{question} [y/N] ");
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).map_err(|e| CliError::failed(format!("no answer could be read: {e}")))?;
    Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}

fn for_person(line: &str, is_terminal: bool) -> Cow<'_, str> {
    if is_terminal { printed::safe(line) } else { line.into() }
}

fn paint(code: &str, text: &str) -> String {
    if std::io::stderr().is_terminal() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}
