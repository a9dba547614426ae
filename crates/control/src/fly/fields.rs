//! An object whose fields are taken one by one, so that what nobody took can be named.

use crate::failure::Failure;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

pub(crate) struct Fields {
    path: String,
    map: Map<String, Value>,
}

impl Fields {
    /// `path` is what refusals call the object; empty for a whole body.
    pub fn of(path: &str, value: Value) -> Result<Self, Failure> {
        match value {
            Value::Object(map) => Ok(Self { path: path.to_owned(), map }),
            _ if path.is_empty() => Err(Failure::invalid("the body must be a JSON object")),
            _ => Err(Failure::invalid(format!("{path} must be an object"))),
        }
    }

    pub fn path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// The field as it is; `None` if it is missing or `null`.
    pub fn raw(&mut self, name: &str) -> Option<Value> {
        #[cfg(test)]
        asked::note(self.path(name));
        self.map.remove(name).filter(|value| !value.is_null())
    }

    /// Whether the field has this text; it stays.
    pub fn is(&self, name: &str, text: &str) -> bool {
        self.map.get(name).and_then(Value::as_str) == Some(text)
    }

    pub fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, Failure> {
        let Some(value) = self.raw(name) else { return Ok(None) };
        let value = serde_json::from_value(value);
        value.map(Some).map_err(|error| self.wrong(name, &error.to_string()))
    }

    /// A text without NUL; an empty one says nothing.
    pub fn text(&mut self, name: &str) -> Result<Option<String>, Failure> {
        let text = self.take::<String>(name)?.filter(|text| !text.is_empty());
        match text {
            Some(text) if text.contains('\0') => Err(self.wrong(name, "it has a NUL character")),
            text => Ok(text),
        }
    }

    /// Texts without NUL; an empty list says nothing.
    pub fn texts(&mut self, name: &str) -> Result<Option<Vec<String>>, Failure> {
        let texts = self.take::<Vec<String>>(name)?.filter(|texts| !texts.is_empty());
        match texts {
            Some(texts) if texts.iter().any(|text| text.contains('\0')) => Err(self.wrong(name, "it has a NUL character")),
            texts => Ok(texts),
        }
    }

    pub fn number(&mut self, name: &str, range: std::ops::RangeInclusive<u32>) -> Result<Option<u32>, Failure> {
        match self.take::<u32>(name)? {
            Some(number) if !range.contains(&number) => {
                Err(self.wrong(name, &format!("{number} is not from {} to {}", range.start(), range.end())))
            }
            number => Ok(number),
        }
    }

    /// Milliseconds of a duration as Go has them: a text such as `1m30s`, or nanoseconds.
    pub fn duration_ms(&mut self, name: &str, longest_ms: u64) -> Result<Option<u64>, Failure> {
        let Some(value) = self.raw(name) else { return Ok(None) };
        let ms = match &value {
            Value::String(text) => dunlin_model::config::units::parse_duration_ms(text),
            Value::Number(nanoseconds) => nanoseconds.as_u64().map(|nanoseconds| nanoseconds / 1_000_000),
            _ => None,
        };
        match ms {
            Some(ms) if ms <= longest_ms => Ok(Some(ms)),
            Some(ms) => Err(self.wrong(name, &format!("{ms} ms are more than {longest_ms} ms"))),
            None => Err(self.wrong(name, "use a duration such as \"10s\", or nanoseconds")),
        }
    }

    pub fn object(&mut self, name: &str) -> Result<Option<Fields>, Failure> {
        let path = self.path(name);
        self.raw(name).map(|value| Fields::of(&path, value)).transpose()
    }

    pub fn objects(&mut self, name: &str, most: usize) -> Result<Vec<Fields>, Failure> {
        let path = self.path(name);
        let Some(values) = self.take::<Vec<Value>>(name)? else { return Ok(vec![]) };
        if values.len() > most {
            return Err(self.wrong(name, &format!("{} are more than the {most} that are taken", values.len())));
        }
        values.into_iter().enumerate().map(|(n, value)| Fields::of(&format!("{path}[{n}]"), value)).collect()
    }

    /// All fields that are left, by name.
    pub fn entries(self) -> impl Iterator<Item = (String, Value)> {
        self.map.into_iter()
    }

    /// Refuses a field that is known and cannot be honoured, unless it says nothing.
    pub fn not_honoured(&mut self, name: &str, why: &str) -> Result<(), Failure> {
        match self.raw(name) {
            Some(value) if !says_nothing(&value) => Err(self.wrong(name, why).hint("leave it out")),
            _ => Ok(()),
        }
    }

    pub fn wrong(&self, name: &str, why: &str) -> Failure {
        Failure::invalid(format!("{} cannot be used: {why}", self.path(name)))
    }

    /// Refuses what nobody took.
    pub fn finish(self) -> Result<(), Failure> {
        match self.map.iter().find(|(_, value)| !value.is_null()) {
            Some((name, _)) => Err(Failure::invalid(format!("{} is not known here", self.path(name)))
                .hint("leave it out; nothing is dropped silently")),
            None => Ok(()),
        }
    }
}

fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(map) => map.values().all(says_nothing),
        Value::Bool(true) => false,
    }
}

/// Which fields were asked for, so that the description of bodies can be held against it.
#[cfg(test)]
pub(crate) mod asked {
    use std::cell::RefCell;
    use std::collections::BTreeSet;

    thread_local! {
        static ASKED: RefCell<BTreeSet<String>> = RefCell::default();
    }

    pub(super) fn note(path: String) {
        ASKED.with_borrow_mut(|asked| asked.insert(path));
    }

    /// The paths of all fields that `read` asks for.
    pub(crate) fn asked_for(read: impl FnOnce()) -> BTreeSet<String> {
        ASKED.take();
        read();
        ASKED.take()
    }
}
