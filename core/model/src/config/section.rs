//! A table of the file while it is read: every key that is asked for is known, the rest is reported.

use super::problem::{MAX_REPORTED, nearest, position};
use super::{ConfigProblem, MAX_ENTRIES, Mistake};
use std::ops::Range;
use toml_edit::{Item, TableLike, Value};

/// Collects what is found while the file is read.
pub(super) struct Findings<'t> {
    text: &'t str,
    pub mistakes: Vec<Mistake>,
    pub problems: Vec<ConfigProblem>,
    /// Where process groups are named, to be compared with `[processes]` at the end.
    pub group_uses: Vec<GroupUse>,
}

pub(super) struct GroupUse {
    pub span: Option<Range<usize>>,
    pub key: String,
    pub group: String,
}

impl<'t> Findings<'t> {
    pub fn new(text: &'t str) -> Self {
        Self { text, mistakes: Vec::new(), problems: Vec::new(), group_uses: Vec::new() }
    }

    pub fn mistake(&mut self, span: Option<Range<usize>>, message: String) {
        if self.mistakes.len() < MAX_REPORTED {
            let (line, column) = self.position(span);
            self.mistakes.push(Mistake { line, column, message });
        }
    }

    pub fn not_honoured(&mut self, span: Option<Range<usize>>, key: String, why: &str) {
        let line = self.position(span).0;
        self.problem(ConfigProblem::NotHonoured { key, line, why: why.to_owned() });
    }

    pub fn note(&mut self, span: Option<Range<usize>>, key: String, why: &str) {
        let line = self.position(span).0;
        self.problem(ConfigProblem::Note { key, line, why: why.to_owned() });
    }

    fn unknown(&mut self, span: Option<Range<usize>>, key: String, nearest: Option<String>) {
        let line = self.position(span).0;
        self.problem(ConfigProblem::Unknown { key, line, nearest });
    }

    fn problem(&mut self, problem: ConfigProblem) {
        if self.problems.len() < MAX_REPORTED {
            self.problems.push(problem);
        }
    }

    fn position(&self, span: Option<Range<usize>>) -> (usize, usize) {
        position(self.text, span.map_or(0, |span| span.start))
    }
}

/// Why a value is refused: it is of another type than expected, or this sentence.
pub(super) enum Refused {
    Type,
    Because(String),
}

impl From<String> for Refused {
    fn from(message: String) -> Self {
        Self::Because(message)
    }
}

/// One table of the file.
pub(super) struct Section<'t> {
    table: &'t dyn TableLike,
    /// Full key of the table; empty for the file itself.
    path: String,
    taken: Vec<&'static str>,
    pub span: Option<Range<usize>>,
}

/// One entry of a table whose keys the user chooses.
pub(super) struct Entry<'t> {
    pub name: &'t str,
    pub key: String,
    pub item: &'t Item,
    pub key_span: Option<Range<usize>>,
}

impl<'t> Section<'t> {
    pub fn new(table: &'t dyn TableLike, path: String, span: Option<Range<usize>>) -> Self {
        Self { table, path, taken: Vec::new(), span }
    }

    /// The full key of `name` in this table.
    pub fn key(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// Where the value of `name` is, or its key.
    pub fn span_of(&self, name: &str) -> Option<Range<usize>> {
        self.table.get(name).and_then(Item::span).or_else(|| self.key_span(name))
    }

    fn key_span(&self, name: &str) -> Option<Range<usize>> {
        self.table.get_key_value(name).and_then(|(key, _)| key.span()).or_else(|| self.span.clone())
    }

    fn take(&mut self, name: &'static str) -> Option<&'t Item> {
        self.taken.push(name);
        self.table.get(name).filter(|item| !item.is_none())
    }

    /// The value of `name` as `read` understands it; `expected` is said when it is of another type.
    pub fn read<T>(
        &mut self,
        findings: &mut Findings<'_>,
        name: &'static str,
        expected: &str,
        read: impl FnOnce(&'t Value) -> Result<T, Refused>,
    ) -> Option<T> {
        let item = self.take(name)?;
        let key = self.key(name);
        let span = self.span_of(name);
        read_item(findings, item, &key, span, expected, read)
    }

    /// The table `name`.
    pub fn section(&mut self, findings: &mut Findings<'_>, name: &'static str) -> Option<Section<'t>> {
        let item = self.take(name)?;
        let span = self.key_span(name);
        match item.as_table_like() {
            Some(table) => Some(Section::new(table, self.key(name), span)),
            None => {
                findings.mistake(span, format!("{} must be a table, found {}", self.key(name), describe(item)));
                None
            }
        }
    }

    /// The tables of `[[name]]`; one `[name]` counts as a list of one.
    pub fn sections(&mut self, findings: &mut Findings<'_>, name: &'static str) -> Vec<Section<'t>> {
        let Some(item) = self.take(name) else { return Vec::new() };
        let (key, span) = (self.key(name), self.key_span(name));
        let mut sections = Vec::new();
        if let Some(table) = item.as_table_like() {
            sections.push(Section::new(table, key.clone(), span.clone()));
        } else if let Some(tables) = item.as_array_of_tables() {
            for (i, table) in tables.iter().enumerate().take(MAX_ENTRIES + 1) {
                sections.push(Section::new(table, format!("{key}[{i}]"), table.span().or_else(|| span.clone())));
            }
        } else if let Some(array) = item.as_array() {
            for (i, value) in array.iter().enumerate().take(MAX_ENTRIES + 1) {
                match value.as_inline_table() {
                    Some(table) => sections.push(Section::new(table, format!("{key}[{i}]"), value.span())),
                    None => findings.mistake(value.span(), format!("{key}[{i}] must be a table, found {}", describe_value(value))),
                }
            }
        } else {
            findings.mistake(span.clone(), format!("{key} must be a list of tables, found {}", describe(item)));
        }
        if sections.len() > MAX_ENTRIES {
            findings.mistake(span, format!("{key} has more than {MAX_ENTRIES} entries"));
            sections.truncate(MAX_ENTRIES);
        }
        sections
    }

    /// All entries of a table whose keys are the user's.
    pub fn entries(self, findings: &mut Findings<'_>) -> Vec<Entry<'t>> {
        if self.table.len() > MAX_ENTRIES {
            findings.mistake(self.span.clone(), format!("{} has more than {MAX_ENTRIES} entries", self.path));
        }
        self.table
            .iter()
            .take(MAX_ENTRIES)
            .map(|(name, item)| Entry { name, key: self.key(name), item, key_span: self.key_span(name) })
            .collect()
    }

    /// Reports what was not asked for: `later` lists keys that exist and are not honoured yet, with the reason.
    pub fn finish(self, findings: &mut Findings<'_>, later: &[(&'static str, &str)]) {
        for (name, item) in self.table.iter() {
            if self.taken.contains(&name) || item.is_none() {
                continue;
            }
            let (key, span) = (self.key(name), self.key_span(name));
            match later.iter().find(|(known, _)| *known == name) {
                Some((_, why)) => findings.not_honoured(span, key, why),
                None => {
                    let known = self.taken.iter().copied().chain(later.iter().map(|(known, _)| *known));
                    let nearest = nearest(name, known).map(|near| self.key(near)).or_else(|| elsewhere(name));
                    let nearest = nearest.map(|near| if self.path.is_empty() { near } else { shorten(&near, &self.path) });
                    findings.unknown(span, key, nearest);
                }
            }
        }
    }
}

/// A suggestion in the same table is named without the table.
fn shorten(near: &str, path: &str) -> String {
    near.strip_prefix(path).and_then(|rest| rest.strip_prefix('.')).unwrap_or(near).to_owned()
}

/// The right place of keys that are often written into the wrong table.
fn elsewhere(name: &str) -> Option<String> {
    let table = match name {
        "internal_port" | "force_https" | "auto_stop_machines" | "auto_start_machines" | "min_machines_running"
        | "max_machines_running"
        | "concurrency" => "http_service",
        "dockerfile" | "image" | "ignorefile" | "build-target" | "args" => "build",
        "strategy" | "max_unavailable" | "wait_timeout" | "release_command" => "deploy",
        "memory" | "cpus" | "cpu_kind" | "size" => "vm",
        "soft_limit" | "hard_limit" => "http_service.concurrency",
        "app" | "primary_region" | "kill_signal" | "kill_timeout" => return Some(format!("{name} at the top of the file")),
        _ => return None,
    };
    Some(format!("{table}.{name}"))
}

/// The value of an item as `read` understands it.
pub(super) fn read_item<'t, T>(
    findings: &mut Findings<'_>,
    item: &'t Item,
    key: &str,
    span: Option<Range<usize>>,
    expected: &str,
    read: impl FnOnce(&'t Value) -> Result<T, Refused>,
) -> Option<T> {
    let refused = match item.as_value() {
        Some(value) => match read(value) {
            Ok(value) => return Some(value),
            Err(refused) => refused,
        },
        None => Refused::Type,
    };
    let message = match refused {
        Refused::Type => format!("{key} must be {expected}, found {}", describe(item)),
        Refused::Because(why) => format!("{key}: {why}"),
    };
    findings.mistake(span, message);
    None
}

pub(super) fn describe(item: &Item) -> String {
    match item {
        Item::Value(value) => describe_value(value),
        Item::Table(_) => "a table".into(),
        Item::ArrayOfTables(_) => "a list of tables".into(),
        Item::None => "nothing".into(),
    }
}

fn describe_value(value: &Value) -> String {
    match value {
        Value::String(text) => format!("the text {:?}", text.value().chars().take(60).collect::<String>()),
        Value::Integer(number) => format!("the number {}", number.value()),
        Value::Float(number) => format!("the number {}", number.value()),
        Value::Boolean(truth) => truth.value().to_string(),
        Value::Datetime(_) => "a date".into(),
        Value::Array(_) => "a list".into(),
        Value::InlineTable(_) => "a table".into(),
    }
}

/// Readers of single values, for [`Section::read`].
pub(super) mod value {
    use super::{MAX_ENTRIES, Refused};
    use crate::config::units;
    use std::ops::RangeInclusive;
    use toml_edit::Value;

    /// Longest string anywhere in the file.
    pub const MAX_TEXT: usize = 32 * 1024;

    pub fn text(value: &Value) -> Result<String, Refused> {
        let text = value.as_str().ok_or(Refused::Type)?;
        if text.contains('\0') || text.len() > MAX_TEXT {
            return Err(Refused::Because(format!("text must be without NUL and at most {MAX_TEXT} bytes")));
        }
        Ok(text.to_owned())
    }

    pub fn filled(value: &Value) -> Result<String, Refused> {
        let text = text(value)?;
        if text.trim().is_empty() { Err(Refused::Because("it is empty".into())) } else { Ok(text) }
    }

    /// Text; numbers and truth values are taken as they are written (environment, build arguments).
    pub fn text_or_scalar(value: &Value) -> Result<String, Refused> {
        match value {
            Value::Integer(number) => Ok(number.value().to_string()),
            Value::Float(number) => Ok(number.value().to_string()),
            Value::Boolean(truth) => Ok(truth.value().to_string()),
            other => text(other),
        }
    }

    pub fn truth(value: &Value) -> Result<bool, Refused> {
        value.as_bool().ok_or(Refused::Type)
    }

    pub fn number(range: RangeInclusive<u32>) -> impl Fn(&Value) -> Result<u32, Refused> {
        move |value| {
            let number = value.as_integer().ok_or(Refused::Type)?;
            u32::try_from(number).ok().filter(|number| range.contains(number)).ok_or(Refused::Type)
        }
    }

    pub fn port(value: &Value) -> Result<u16, Refused> {
        let number = value.as_integer().ok_or(Refused::Type)?;
        u16::try_from(number).ok().filter(|port| *port != 0).ok_or(Refused::Type)
    }

    /// A duration text, or a bare number of `bare_unit_ms`.
    pub fn duration_ms(bare_unit_ms: u64) -> impl Fn(&Value) -> Result<u64, Refused> {
        move |value| match value {
            Value::String(text) => units::parse_duration_ms(text.value()).ok_or(Refused::Type),
            Value::Integer(number) => u64::try_from(*number.value())
                .ok()
                .and_then(|number| units::parse_duration_ms(&format!("{}ms", number.checked_mul(bare_unit_ms)?)))
                .ok_or(Refused::Type),
            _ => Err(Refused::Type),
        }
    }

    pub fn one_of<T: Copy>(choices: &'static [(&'static str, T)]) -> impl Fn(&Value) -> Result<T, Refused> {
        move |value| {
            let text = value.as_str().ok_or(Refused::Type)?;
            choices.iter().find(|(name, _)| *name == text).map(|(_, choice)| *choice).ok_or(Refused::Type)
        }
    }

    pub fn texts(value: &Value) -> Result<Vec<String>, Refused> {
        let array = value.as_array().ok_or(Refused::Type)?;
        if array.len() > MAX_ENTRIES {
            return Err(Refused::Because(format!("more than {MAX_ENTRIES} entries")));
        }
        array.iter().map(text).collect()
    }
}
