//! GGUF files: the header (metadata and tensor table), the tokenizer in it, and a writer of small files.
//!
//! The layout is ggml's `docs/gguf.md`, versions 2 and 3, little-endian: magic, version, counts, metadata, tensor table, padding, tensor data.

mod read;
#[cfg(test)]
mod tests;
mod tokenizer;
mod types;
mod write;

pub use read::{Keep, read};
pub use tokenizer::{CHARSMAP, HUGGINGFACE_KEY, TokenType, Tokenizer};
pub use types::{GgmlType, Kind};
pub use write::{ALIGNMENT, Writer};

use std::io;

use serde::{Deserialize, Serialize};

/// A metadata value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "named after the format's own types")]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Box<Array>),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// A metadata array.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Array {
    /// Type of every element; never [`Kind::Array`].
    pub kind: Kind,
    /// Number of elements.
    pub len: u64,
    /// The elements, unless the array was skipped.
    pub values: Option<Vec<Value>>,
}

impl Value {
    /// The value's type.
    pub fn kind(&self) -> Kind {
        match self {
            Self::U8(_) => Kind::U8,
            Self::I8(_) => Kind::I8,
            Self::U16(_) => Kind::U16,
            Self::I16(_) => Kind::I16,
            Self::U32(_) => Kind::U32,
            Self::I32(_) => Kind::I32,
            Self::F32(_) => Kind::F32,
            Self::Bool(_) => Kind::Bool,
            Self::String(_) => Kind::String,
            Self::Array(_) => Kind::Array,
            Self::U64(_) => Kind::U64,
            Self::I64(_) => Kind::I64,
            Self::F64(_) => Kind::F64,
        }
    }

    /// The value as a count, when it is a non-negative integer of any width.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::U8(v) => Some((*v).into()),
            Self::U16(v) => Some((*v).into()),
            Self::U32(v) => Some((*v).into()),
            Self::U64(v) => Some(*v),
            Self::I8(v) => u64::try_from(*v).ok(),
            Self::I16(v) => u64::try_from(*v).ok(),
            Self::I32(v) => u64::try_from(*v).ok(),
            Self::I64(v) => u64::try_from(*v).ok(),
            _ => None,
        }
    }

    /// The value as a float, when it is one.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Self::F32(v) => Some((*v).into()),
            Self::F64(v) => Some(*v),
            _ => None,
        }
    }

    /// The value as a truth value, when it is one.
    pub fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(v) = self { Some(*v) } else { None }
    }

    /// The value as text, when it is text.
    pub fn as_str(&self) -> Option<&str> {
        if let Self::String(v) = self { Some(v) } else { None }
    }

    /// The value as an array, when it is one.
    pub fn as_array(&self) -> Option<&Array> {
        if let Self::Array(v) = self { Some(v) } else { None }
    }
}

/// One metadata entry.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Unique key.
    pub key: String,
    /// Its value.
    pub value: Value,
    /// Byte of the file at which the value begins.
    pub offset: u64,
}

/// One entry of the tensor table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tensor {
    /// Unique name.
    pub name: String,
    /// Extents, fastest-varying first: `[in, out]` for a matrix.
    pub dims: Vec<u64>,
    /// Element type.
    pub kind: GgmlType,
    /// First byte of the data in the file.
    pub offset: u64,
    /// Length of the data in bytes.
    pub bytes: u64,
    /// Byte of the file at which the table entry begins.
    pub entry_offset: u64,
}

/// Everything before the tensor data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// Version of the layout: 2 or 3.
    pub version: u32,
    /// Alignment of tensor data in bytes.
    pub alignment: u64,
    /// Metadata in file order.
    pub metadata: Vec<Entry>,
    /// Tensor table in file order.
    pub tensors: Vec<Tensor>,
    /// First byte of tensor data.
    pub data_offset: u64,
}

impl Header {
    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entry(key).map(|e| &e.value)
    }

    /// The entry of `key`.
    pub fn entry(&self, key: &str) -> Option<&Entry> {
        self.metadata.iter().find(|e| e.key == key)
    }
}

/// A GGUF header that cannot be used: which field, where, and why.
#[derive(Debug, thiserror::Error)]
#[error("{field} at byte {offset}: {problem}")]
pub struct GgufError {
    /// The field being read: `magic`, `metadata key general.name`, `tensor blk.0.attn_q.weight offset`, …
    pub field: String,
    /// Byte of the file at which the field begins.
    pub offset: u64,
    /// What is wrong with it.
    pub problem: GgufProblem,
    /// Why the bytes could not be read, for [`GgufProblem::Unreadable`].
    #[source]
    pub source: Option<io::Error>,
}

impl GgufError {
    /// Stable, low-cardinality key for metrics and status conditions.
    pub fn reason(&self) -> &'static str {
        match self.problem {
            GgufProblem::Unreadable => "header_unreadable",
            GgufProblem::UnknownTensorType { .. } => "tensor_type_unknown",
            _ => "header_invalid",
        }
    }
}

/// What is wrong with a field of a GGUF header.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum GgufProblem {
    #[error("failed to read the file")]
    Unreadable,
    #[error("expected the bytes \"GGUF\", got {got:02x?}")]
    Magic { got: [u8; 4] },
    #[error("expected version 2 or 3, got {got}")]
    Version { got: u32 },
    #[error("the file is big-endian (version {got:#010x}), expected little-endian")]
    ByteOrder { got: u32 },
    #[error("needs {needed} bytes, the file has {left} left")]
    Truncated { needed: u64, left: u64 },
    #[error("count {count} needs at least {needed} bytes, the file has {left} left")]
    Count { count: u64, needed: u64, left: u64 },
    #[error("expected UTF-8 text")]
    Utf8,
    #[error("expected at most {limit} bytes of text, got {got}")]
    TooLong { limit: u64, got: u64 },
    #[error("expected a name, got empty text")]
    Empty,
    #[error("expected a value type from 0 to 12, got {got}")]
    UnknownKind { got: u32 },
    #[error("expected an array of plain values, got an array of arrays")]
    Nested,
    #[error("expected 0 or 1, got {got}")]
    Bool { got: u8 },
    #[error("appears twice, first at byte {first}")]
    Duplicate { first: u64 },
    #[error("expected {expected}, got {got}")]
    Invalid { expected: &'static str, got: String },
    #[error("tensor type id {got} is unknown")]
    UnknownTensorType { got: u32 },
    #[error("extents {dims:?} overflow 64 bits")]
    Overflow { dims: Vec<u64> },
    #[error("rows of {row} values are not whole blocks of {block} ({kind})")]
    Block { row: u64, block: u64, kind: &'static str },
    #[error("offset {got} is not a multiple of the alignment {alignment}")]
    Misaligned { got: u64, alignment: u64 },
    #[error("data lies at bytes {begin}..{end} of a file of {file} bytes")]
    OutOfFile { begin: u64, end: u64, file: u64 },
    #[error("data at bytes {begin}..{end} overlaps that of tensor {other}")]
    Overlap { begin: u64, end: u64, other: String },
}
