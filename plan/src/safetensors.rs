//! Safetensors files: the header, and the index of a model in several files.

#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, fmt, io};

use serde::{
    Deserialize, Serialize,
    de::{MapAccess, Visitor},
};

/// Largest header accepted, as in the reference implementation.
const MAX_HEADER: u64 = 100_000_000;

/// One tensor of a safetensors file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tensor {
    /// Unique name.
    pub name: String,
    /// Element type as written: `F32`, `BF16`, …
    pub dtype: String,
    /// Row-major shape.
    pub shape: Vec<u64>,
    /// First byte of the data in the file.
    pub offset: u64,
    /// Length of the data in bytes.
    pub bytes: u64,
    /// Byte of the file at which the tensor's entry begins.
    pub entry_offset: u64,
}

/// The header of one safetensors file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// Tensors in file order of the header.
    pub tensors: Vec<Tensor>,
    /// The `__metadata__` entry.
    pub metadata: BTreeMap<String, String>,
    /// First byte of tensor data.
    pub data_offset: u64,
}

/// A safetensors header that cannot be used: which field, where, and why.
#[derive(Debug, thiserror::Error)]
#[error("{field} at byte {offset}: {problem}")]
pub struct SafetensorsError {
    /// The field: `header length`, `tensor model.norm.weight data_offsets`, …
    pub field: String,
    /// Byte of the file at which it stands.
    pub offset: u64,
    /// What is wrong with it.
    pub problem: SafetensorsProblem,
    /// Why the bytes could not be read, for [`SafetensorsProblem::Unreadable`].
    #[source]
    pub source: Option<io::Error>,
}

impl SafetensorsError {
    /// Stable, low-cardinality key for metrics and status conditions.
    pub fn reason(&self) -> &'static str {
        match self.problem {
            SafetensorsProblem::Unreadable => "header_unreadable",
            _ => "header_invalid",
        }
    }
}

/// What is wrong with a field of a safetensors header.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum SafetensorsProblem {
    #[error("failed to read the file")]
    Unreadable,
    #[error("needs {needed} bytes, the file has {left} left")]
    Truncated { needed: u64, left: u64 },
    #[error("expected at most {MAX_HEADER} bytes of header, got {got}")]
    TooLong { got: u64 },
    #[error("expected a JSON object of tensors: {message}")]
    Json { message: String },
    #[error("expected one of {known}, got {got}", known = KNOWN)]
    UnknownType { got: String },
    #[error("shape {shape:?} overflows 64 bits")]
    Overflow { shape: Vec<u64> },
    #[error("range {begin}..{end} has another length than shape {shape:?} of {dtype} ({expected} bytes)")]
    Length { begin: u64, end: u64, shape: Vec<u64>, dtype: String, expected: u64 },
    #[error("range {begin}..{end} does not lie in the {data} bytes of data")]
    OutOfFile { begin: u64, end: u64, data: u64 },
    #[error("range begins at {begin}, expected {expected}, the end of tensor {previous}")]
    Gap { begin: u64, expected: u64, previous: String },
}

/// Types of the format, with their bytes per element.
const TYPES: [(&str, u64); 14] = [
    ("F64", 8),
    ("F32", 4),
    ("F16", 2),
    ("BF16", 2),
    ("I64", 8),
    ("I32", 4),
    ("I16", 2),
    ("I8", 1),
    ("U64", 8),
    ("U32", 4),
    ("U16", 2),
    ("U8", 1),
    ("BOOL", 1),
    ("F8_E4M3", 1),
];
/// [`TYPES`] for messages.
const KNOWN: &str = "F64, F32, F16, BF16, I64, I32, I16, I8, U64, U32, U16, U8, BOOL, F8_E4M3, F8_E5M2";

fn element_bytes(dtype: &str) -> Option<u64> {
    if dtype == "F8_E5M2" { Some(1) } else { TYPES.iter().find(|t| t.0 == dtype).map(|t| t.1) }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

#[derive(Default)]
struct RawHeader {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, RawTensor)>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut header = RawHeader::default();
                let mut seen = std::collections::HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !seen.insert(name.clone()) {
                        return Err(serde::de::Error::custom(format!("{name} appears twice")));
                    }
                    if name == "__metadata__" {
                        header.metadata = map.next_value::<UniqueTexts>()?.0;
                    } else {
                        let tensor = map.next_value()?;
                        header.tensors.push((name, tensor));
                    }
                }
                Ok(header)
            }
        }
        from.deserialize_map(Entries)
    }
}

/// An object of texts in which no key appears twice.
struct UniqueTexts(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for UniqueTexts {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Texts;
        impl<'de> Visitor<'de> for Texts {
            type Value = UniqueTexts;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of texts")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<UniqueTexts, A::Error> {
                let mut texts = BTreeMap::new();
                while let Some((name, text)) = map.next_entry::<String, String>()? {
                    if texts.contains_key(&name) {
                        return Err(serde::de::Error::custom(format!("{name} appears twice")));
                    }
                    texts.insert(name, text);
                }
                Ok(UniqueTexts(texts))
            }
        }
        from.deserialize_map(Texts)
    }
}

/// Reads the header of a safetensors file of `file_bytes` bytes from its beginning.
///
/// Data must be contiguous in the order of offsets and fill the file, as the format asks.
///
/// # Errors
/// Names the field, its byte offset, and what was expected.
pub fn read(input: &mut dyn io::Read, file_bytes: u64) -> Result<Header, SafetensorsError> {
    let fail = |field: &str, offset, problem| SafetensorsError { field: field.to_owned(), offset, problem, source: None };
    if file_bytes < 8 {
        return Err(fail("header length", 0, SafetensorsProblem::Truncated { needed: 8, left: file_bytes }));
    }
    let unreadable = |field: &str, offset, e| SafetensorsError { source: Some(e), ..fail(field, offset, SafetensorsProblem::Unreadable) };
    let mut len = [0; 8];
    input.read_exact(&mut len).map_err(|e| unreadable("header length", 0, e))?;
    let len = u64::from_le_bytes(len);
    if len > file_bytes - 8 {
        return Err(fail("header length", 0, SafetensorsProblem::Truncated { needed: len, left: file_bytes - 8 }));
    }
    if len > MAX_HEADER {
        return Err(fail("header length", 0, SafetensorsProblem::TooLong { got: len }));
    }
    let mut json = vec![0; len as usize];
    input.read_exact(&mut json).map_err(|e| unreadable("header", 8, e))?;
    let raw: RawHeader = serde_json::from_slice(&json).map_err(|e| {
        let offset = 8 + position(&json, e.line(), e.column());
        fail("header", offset, SafetensorsProblem::Json { message: without_position(&e) })
    })?;
    let data_offset = 8 + len;
    let tensors = check(&raw.tensors, data_offset, file_bytes - data_offset, &json)?;
    Ok(Header { tensors, metadata: raw.metadata, data_offset })
}

/// Checks every tensor against its shape, the others, and the file.
fn check(raw: &[(String, RawTensor)], data_offset: u64, data: u64, json: &[u8]) -> Result<Vec<Tensor>, SafetensorsError> {
    let mut tensors = Vec::new();
    let mut entry = 0;
    for (name, RawTensor { dtype, shape, data_offsets: [begin, end] }) in raw {
        entry = key_position(json, entry, name);
        let entry_offset = 8 + entry as u64;
        let at = |name: &str, what: &str, problem| fail_at(entry_offset, name, what, problem);
        let Some(element) = element_bytes(dtype) else {
            return Err(at(name, "dtype", SafetensorsProblem::UnknownType { got: dtype.clone() }));
        };
        let expected = shape.iter().try_fold(element, |n, &d| n.checked_mul(d));
        let Some(expected) = expected.filter(|&n| n <= i64::MAX as u64) else {
            return Err(at(name, "shape", SafetensorsProblem::Overflow { shape: shape.clone() }));
        };
        if begin > end || *end > data {
            return Err(at(name, "data_offsets", SafetensorsProblem::OutOfFile { begin: *begin, end: *end, data }));
        }
        if end - begin != expected {
            let problem = SafetensorsProblem::Length { begin: *begin, end: *end, shape: shape.clone(), dtype: dtype.clone(), expected };
            return Err(at(name, "data_offsets", problem));
        }
        let offset = data_offset + begin;
        tensors.push(Tensor { name: name.clone(), dtype: dtype.clone(), shape: shape.clone(), offset, bytes: expected, entry_offset });
    }
    let mut order: Vec<&Tensor> = tensors.iter().collect();
    order.sort_by_key(|t| (t.offset, t.bytes));
    let (mut expected, mut previous) = (data_offset, "the header");
    for t in order {
        if t.offset != expected {
            let problem =
                SafetensorsProblem::Gap { begin: t.offset - data_offset, expected: expected - data_offset, previous: previous.to_owned() };
            return Err(fail_at(t.entry_offset, &t.name, "data_offsets", problem));
        }
        (expected, previous) = (t.offset + t.bytes, &t.name);
    }
    if expected != data_offset + data {
        let problem = SafetensorsProblem::OutOfFile { begin: expected - data_offset, end: data, data: expected - data_offset };
        return Err(SafetensorsError { field: "data after the last tensor".to_owned(), offset: expected, problem, source: None });
    }
    Ok(tensors)
}

/// Byte of `json` at a line and column counted from 1.
fn position(json: &[u8], line: usize, column: usize) -> u64 {
    let start: usize = json.split_inclusive(|&b| b == b'\n').take(line.saturating_sub(1)).map(<[u8]>::len).sum();
    (start + column.saturating_sub(1)).min(json.len()) as u64
}

fn fail_at(offset: u64, name: &str, what: &str, problem: SafetensorsProblem) -> SafetensorsError {
    SafetensorsError { field: format!("tensor {name} {what}"), offset, problem, source: None }
}

/// Byte of `json` at which the key `name` stands, at or after byte `from`; `from` where it is written with escapes of another form.
fn key_position(json: &[u8], from: usize, name: &str) -> usize {
    let Ok(quoted) = serde_json::to_vec(name) else { return from };
    json[from..].windows(quoted.len()).position(|w| w == quoted).map_or(from, |at| from + at)
}

fn without_position(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split(" at line ").next().unwrap_or_default().to_owned()
}

/// The index of a model in several safetensors files: which tensor is in which file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    /// File of each tensor.
    pub weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Parses `model.safetensors.index.json`.
    ///
    /// # Errors
    /// When it is not JSON of that form, or names a file outside the model's folder.
    pub fn parse(json: &[u8]) -> Result<Self, SafetensorsError> {
        #[derive(Deserialize)]
        struct Raw {
            weight_map: UniqueTexts,
        }
        let fail = |offset, message| SafetensorsError {
            field: "model.safetensors.index.json".to_owned(),
            offset,
            problem: SafetensorsProblem::Json { message },
            source: None,
        };
        let raw: Raw = serde_json::from_slice(json).map_err(|e| fail(position(json, e.line(), e.column()), without_position(&e)))?;
        let weight_map = raw.weight_map.0;
        if let Some((tensor, file)) = weight_map.iter().find(|(_, f)| f.is_empty() || f.contains(['/', '\\', '\0']) || f.starts_with('.')) {
            return Err(fail(key_position(json, 0, tensor) as u64, format!("tensor {tensor} lies in {file:?}, expected a file name")));
        }
        Ok(Self { weight_map })
    }

    /// The files, each once, ascending.
    pub fn files(&self) -> Vec<String> {
        let mut files: Vec<String> = self.weight_map.values().cloned().collect();
        files.sort();
        files.dedup();
        files
    }
}
