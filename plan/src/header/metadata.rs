//! Access to GGUF metadata, with errors that name key, place and file.

use super::{HeaderError, MAX_COUNT};
use crate::gguf::{Header, Value};

/// Access to the metadata of one file, with errors that name key and file.
pub(super) struct Meta<'a> {
    pub(super) header: &'a Header,
    pub(super) file: &'a str,
    pub(super) arch: &'a str,
}

impl<'a> Meta<'a> {
    pub(super) fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch)
    }

    /// A key with the place of its value, or the place where it would be.
    pub(super) fn place(&self, key: String) -> String {
        match self.header.entry(&key) {
            Some(entry) => format!("{key} at byte {}", entry.offset),
            None => format!("{key} before byte {}", self.header.data_offset),
        }
    }

    pub(super) fn field(&self, key: String, expected: &str, got: &str) -> HeaderError {
        let field = self.place(key);
        HeaderError::Field { file: self.file.to_owned(), field, expected: expected.to_owned(), got: got.to_owned() }
    }

    pub(super) fn wrong(&self, name: &str, expected: &str, got: &str) -> HeaderError {
        self.field(self.key(name), expected, got)
    }

    pub(super) fn missing(&self, key: &str, expected: &str) -> HeaderError {
        self.field(key.to_owned(), expected, "missing")
    }

    pub(super) fn unsupported(&self, name: &str, expected: &'static str, got: &str) -> HeaderError {
        HeaderError::UnsupportedFeature { file: self.file.to_owned(), field: self.place(self.key(name)), expected, got: got.to_owned() }
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, HeaderError> {
        let Some(value) = self.header.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.field(key.to_owned(), "text", value.kind().name()))
    }

    /// A count; an array of equal counts, one per layer, is the same.
    pub(super) fn count(&self, key: &str) -> Result<Option<u64>, HeaderError> {
        let Some(value) = self.header.get(key) else { return Ok(None) };
        let count = match value {
            Value::Array(array) => {
                let values = array.values.as_deref().unwrap_or_default();
                match values.split_first() {
                    Some((first, rest)) if rest.iter().all(|v| v == first) => first.as_u64(),
                    Some(_) => return Err(self.field(key.to_owned(), "the same in every layer", "different values")),
                    None => None,
                }
            }
            value => value.as_u64(),
        };
        let count = count.filter(|&n| n <= MAX_COUNT);
        count.map(Some).ok_or_else(|| self.field(key.to_owned(), &format!("an integer from 0 to {MAX_COUNT}"), &format!("{value:?}")))
    }

    pub(super) fn arch_count_or_zero(&self, name: &str) -> Result<u64, HeaderError> {
        Ok(self.count(&self.key(name))?.unwrap_or(0))
    }

    /// A count of at least 1.
    pub(super) fn arch_count(&self, name: &str) -> Result<Option<usize>, HeaderError> {
        match self.count(&self.key(name))? {
            Some(0) => Err(self.wrong(name, "at least 1", "0")),
            count => Ok(count.map(|n| n as usize)),
        }
    }

    pub(super) fn required(&self, name: &str) -> Result<usize, HeaderError> {
        self.arch_count(name)?.ok_or_else(|| self.wrong(name, "an integer", "missing"))
    }

    pub(super) fn float(&self, name: &str) -> Result<Option<f64>, HeaderError> {
        let Some(value) = self.header.get(&self.key(name)) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| self.wrong(name, "a float", value.kind().name()))
    }

    pub(super) fn positive(&self, name: &str) -> Result<Option<f64>, HeaderError> {
        match self.float(name)? {
            Some(v) if v.is_finite() && v > 0.0 => Ok(Some(v)),
            Some(v) => Err(self.wrong(name, "a positive number", &v.to_string())),
            None => Ok(None),
        }
    }

    /// A count of at least 1, as a number.
    pub(super) fn positive_count(&self, name: &str) -> Result<Option<f64>, HeaderError> {
        Ok(self.arch_count(name)?.map(|n| n as f64))
    }
}
