//! Reads a JSON object field by field, so that every refusal names the parameter, its value and what was expected.

use axum::http::StatusCode;
use serde_json::{Map, Value};

use super::error::ApiError;

/// The parameters of a request that were not read yet.
pub(crate) struct Fields(Map<String, Value>);

impl Fields {
    /// Takes the body of a request.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let refuse = |message: String| ApiError::new(StatusCode::BAD_REQUEST, "invalid_json", message);
        match serde_json::from_slice(body).map_err(|e| refuse(format!("the body is not valid JSON: {e}")))? {
            Value::Object(map) => Ok(Self(map)),
            other => Err(refuse(format!("the body is {}, expected a JSON object", kind(&other)))),
        }
    }

    /// The value of `name`; null counts as absent.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.0.shift_remove(name).filter(|v| !v.is_null())
    }

    fn typed<T>(&mut self, name: &str, expected: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        read(&value).map(Some).ok_or_else(|| wrong(name, &value, expected))
    }

    pub(crate) fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        self.typed(name, "a string", |v| v.as_str().map(str::to_owned))
    }

    pub(crate) fn flag(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        self.typed(name, "true or false", Value::as_bool)
    }

    /// An integer between `low` and `high`.
    pub(crate) fn integer(&mut self, name: &str, low: i64, high: i64) -> Result<Option<i64>, ApiError> {
        let expected = if high == i64::MAX { format!("an integer of at least {low}") } else { format!("an integer from {low} to {high}") };
        self.typed(name, &expected, |v| whole(v).filter(|n| (low..=high).contains(n)))
    }

    /// A number for which `valid` holds.
    pub(crate) fn number(&mut self, name: &str, expected: &str, valid: impl Fn(f64) -> bool) -> Result<Option<f32>, ApiError> {
        self.typed(name, expected, |v| v.as_f64().filter(|n| n.is_finite() && valid(*n)).map(|n| n as f32))
    }

    /// Refuses `name` unless it is absent or `accept` holds: a known parameter that is not supported.
    pub(crate) fn only(&mut self, name: &str, expected: &str, accept: impl Fn(&Value) -> bool) -> Result<(), ApiError> {
        match self.take(name) {
            Some(value) if !accept(&value) => {
                let mut error = wrong(name, &value, expected);
                error.code = "unsupported_parameter";
                Err(error)
            }
            _ => Ok(()),
        }
    }

    /// Refuses what was not read.
    pub(crate) fn finish(self) -> Result<(), ApiError> {
        match self.0.into_iter().find(|(_, v)| !v.is_null()) {
            Some((name, _)) => {
                let mut error = ApiError::parameter(&name, format!("parameter {name:?} is not known"));
                error.code = "unknown_parameter";
                Err(error)
            }
            None => Ok(()),
        }
    }
}

impl From<Map<String, Value>> for Fields {
    fn from(map: Map<String, Value>) -> Self {
        Self(map)
    }
}

/// The refusal of `value` for `name`.
pub(crate) fn wrong(name: &str, value: &Value, expected: &str) -> ApiError {
    let mut shown = value.to_string();
    if shown.len() > 80 {
        let end = (0..=77).rev().find(|&i| shown.is_char_boundary(i)).unwrap_or(0);
        shown.truncate(end);
        shown.push_str("...");
    }
    ApiError::parameter(name, format!("{name} is {shown}, expected {expected}"))
}

/// The integer that a number is, also one written like `5.0`.
pub(crate) fn whole(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| value.as_f64().filter(|n| n.fract() == 0.0 && n.abs() < 9e15).map(|n| n as i64))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
