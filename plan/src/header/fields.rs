//! Access to a JSON file of settings, with errors that name field and file.

use serde_json::{Map, Value};

use super::{HeaderError, MAX_COUNT};

/// Name of a model's file, for messages.
pub(super) const FILE: &str = "config.json";

/// Access to a JSON object's fields, with errors that name them.
pub(super) struct Fields<'a> {
    /// Name of the file, for messages.
    pub(super) file: &'static str,
    pub(super) map: &'a Map<String, Value>,
    pub(super) path: String,
}

impl<'a> Fields<'a> {
    pub(super) fn name(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }

    /// The field, unless it is absent or null.
    pub(super) fn present(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|v| !v.is_null())
    }

    pub(super) fn wrong(&self, name: &str, expected: &str, got: &Value) -> HeaderError {
        let mut got = got.to_string();
        if let Some((end, _)) = got.char_indices().nth(100) {
            got.truncate(end);
            got.push('…');
        }
        HeaderError::Field { file: self.file.to_owned(), field: self.name(name), expected: expected.to_owned(), got }
    }

    pub(super) fn missing(&self, name: &str, expected: &str) -> HeaderError {
        HeaderError::Field { file: self.file.to_owned(), field: self.name(name), expected: expected.to_owned(), got: "missing".to_owned() }
    }

    pub(super) fn unsupported(&self, name: &str, expected: &'static str, got: &str) -> HeaderError {
        HeaderError::UnsupportedFeature { file: self.file.to_owned(), field: self.name(name), expected, got: got.to_owned() }
    }

    pub(super) fn object(&self, name: &str) -> Result<Option<Self>, HeaderError> {
        match self.present(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self { file: self.file, map, path: format!("{}{name}.", self.path) })),
            Some(other) => Err(self.wrong(name, "an object", other)),
        }
    }

    pub(super) fn text(&self, name: &str) -> Result<Option<&'a str>, HeaderError> {
        let Some(value) = self.present(name) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(name, "text", value))
    }

    pub(super) fn flag(&self, name: &str) -> Result<Option<bool>, HeaderError> {
        let Some(value) = self.present(name) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong(name, "true or false", value))
    }

    pub(super) fn count(&self, name: &str) -> Result<Option<usize>, HeaderError> {
        let Some(value) = self.present(name) else { return Ok(None) };
        let count = value.as_u64().filter(|n| (1..=MAX_COUNT).contains(n));
        count.map(|n| Some(n as usize)).ok_or_else(|| self.wrong(name, &format!("an integer from 1 to {MAX_COUNT}"), value))
    }

    /// A count that may be 0.
    pub(super) fn number(&self, name: &str) -> Result<Option<usize>, HeaderError> {
        let Some(value) = self.present(name) else { return Ok(None) };
        let number = value.as_u64().filter(|n| *n <= MAX_COUNT);
        number.map(|n| Some(n as usize)).ok_or_else(|| self.wrong(name, &format!("an integer from 0 to {MAX_COUNT}"), value))
    }

    pub(super) fn required(&self, name: &str) -> Result<usize, HeaderError> {
        self.count(name)?.ok_or_else(|| self.missing(name, "an integer"))
    }

    pub(super) fn positive(&self, name: &str) -> Result<Option<f64>, HeaderError> {
        let Some(value) = self.present(name) else { return Ok(None) };
        let number = value.as_f64().filter(|n| n.is_finite() && *n > 0.0);
        number.map(Some).ok_or_else(|| self.wrong(name, "a positive number", value))
    }

    /// A list of `len` positive numbers.
    pub(super) fn positives(&self, name: &str, len: usize) -> Result<Vec<f32>, HeaderError> {
        let expected = format!("{len} positive numbers");
        let Some(value) = self.present(name) else { return Err(self.missing(name, &expected)) };
        let number = |v: &Value| v.as_f64().map(|n| n as f32).filter(|n| n.is_finite() && *n > 0.0);
        let list: Option<Vec<f32>> = value.as_array().and_then(|list| list.iter().map(number).collect());
        list.filter(|list| list.len() == len).ok_or_else(|| self.wrong(name, &expected, value))
    }

    /// A list of numbers from 0; empty where it is absent.
    pub(super) fn indices(&self, name: &str) -> Result<Vec<usize>, HeaderError> {
        let Some(value) = self.present(name) else { return Ok(Vec::new()) };
        let index = |v: &Value| v.as_u64().map(|n| n as usize);
        let list: Option<Vec<usize>> = value.as_array().and_then(|list| list.iter().map(index).collect());
        list.ok_or_else(|| self.wrong(name, "a list of integers", value))
    }
}
