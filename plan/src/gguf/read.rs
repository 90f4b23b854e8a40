//! Reads a GGUF header as a stream, checking every count and length against what is left of the file before it allocates.

use std::{collections::HashMap, io::Read};

use super::{Array, Entry, GgmlType, GgufError, GgufProblem, Header, Kind, Tensor, Value};

/// Alignment when `general.alignment` is absent.
const DEFAULT_ALIGNMENT: u64 = 32;
/// Most extents of a tensor.
const MAX_DIMS: u32 = 4;
/// Longest tensor name in bytes; the format allows 63, some writers more.
const MAX_NAME: u64 = 255;
/// Longest metadata key in bytes, by the format.
const MAX_KEY: u64 = 65_535;
/// Arrays up to this length are kept by [`Keep::Short`]: per-layer values, not vocabularies.
const SHORT_ARRAY: u64 = 4096;
/// Fewest bytes of a metadata entry: key length, one byte of key, type, one byte of value.
const MIN_ENTRY: u64 = 8 + 1 + 4 + 1;
/// Fewest bytes of a tensor's entry: name length, one byte of name, extents' count, type, offset.
const MIN_TENSOR: u64 = 8 + 1 + 4 + 4 + 8;

/// Which arrays are kept in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep<'a> {
    /// Those of at most 4096 elements; vocabularies are skipped.
    Short,
    /// Short ones, and those under these keys.
    Keys(&'a [&'a str]),
}

impl Keep<'_> {
    fn keeps(self, key: &str, len: u64) -> bool {
        len <= SHORT_ARRAY || matches!(self, Self::Keys(keys) if keys.contains(&key))
    }
}

/// Reads the header of a GGUF file of `file_bytes` bytes from its beginning.
///
/// With `check_data`, every tensor must lie whole within `file_bytes`; without it (for a header cut off before the data) only
/// alignment, extents and overlaps are checked.
///
/// # Errors
/// Names the field, its byte offset, and what was expected.
pub fn read(input: &mut dyn Read, file_bytes: u64, keep: Keep<'_>, check_data: bool) -> Result<Header, GgufError> {
    let mut r = Reader { input, offset: 0, len: file_bytes };
    let version = r.preamble()?;
    let tensor_count = r.count("tensor count", MIN_TENSOR)?;
    let entry_count = r.count("metadata count", MIN_ENTRY)?;
    let metadata = r.metadata(entry_count, keep)?;
    let alignment = alignment(&metadata)?;
    let mut tensors = r.tensors(tensor_count)?;
    let data_offset = match r.offset.checked_next_multiple_of(alignment) {
        Some(offset) if tensors.is_empty() || !check_data || offset <= file_bytes => offset,
        _ => return Err(r.fail("padding before the tensor data", GgufProblem::Truncated { needed: alignment, left: r.left() })),
    };
    place(&mut tensors, data_offset, alignment, check_data.then_some(file_bytes))?;
    Ok(Header { version, alignment, metadata, tensors, data_offset })
}

/// The value of `general.alignment`.
fn alignment(metadata: &[Entry]) -> Result<u64, GgufError> {
    let Some(entry) = metadata.iter().find(|e| e.key == "general.alignment") else { return Ok(DEFAULT_ALIGNMENT) };
    match entry.value {
        Value::U32(v) if v.is_power_of_two() && v <= 1 << 20 => Ok(v.into()),
        ref other => Err(GgufError {
            field: "metadata general.alignment".to_owned(),
            offset: entry.offset,
            problem: GgufProblem::Invalid { expected: "a power of two up to 1048576 as u32", got: format!("{other:?}") },
            source: None,
        }),
    }
}

/// Turns relative offsets into file offsets and checks where the data lies.
fn place(tensors: &mut [Tensor], data_offset: u64, alignment: u64, file_bytes: Option<u64>) -> Result<(), GgufError> {
    let fail =
        |t: &Tensor, problem| GgufError { field: format!("tensor {} offset", t.name), offset: t.entry_offset, problem, source: None };
    for t in tensors.iter_mut() {
        if !t.offset.is_multiple_of(alignment) {
            return Err(fail(t, GgufProblem::Misaligned { got: t.offset, alignment }));
        }
        let begin = data_offset.checked_add(t.offset);
        let end = begin.and_then(|b| b.checked_add(t.bytes));
        let (Some(begin), Some(end)) = (begin, end) else { return Err(fail(t, GgufProblem::Overflow { dims: t.dims.clone() })) };
        if let Some(file) = file_bytes.filter(|&f| end > f) {
            return Err(fail(t, GgufProblem::OutOfFile { begin, end, file }));
        }
        t.offset = begin;
    }
    let mut order: Vec<&Tensor> = tensors.iter().collect();
    order.sort_by_key(|t| (t.offset, t.bytes));
    for pair in order.windows(2) {
        let (first, second) = (pair[0], pair[1]);
        if first.offset + first.bytes > second.offset {
            let problem = GgufProblem::Overlap { begin: second.offset, end: second.offset + second.bytes, other: first.name.clone() };
            return Err(fail(second, problem));
        }
    }
    Ok(())
}

/// Bytes of a tensor, from its extents and type.
fn tensor_bytes(dims: &[u64], kind: GgmlType) -> Result<u64, GgufProblem> {
    let row = dims.first().copied().unwrap_or(1);
    if !row.is_multiple_of(kind.block_len) {
        return Err(GgufProblem::Block { row, block: kind.block_len, kind: kind.name });
    }
    let elements = dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
    let bytes = elements.and_then(|n| (n / kind.block_len).checked_mul(kind.block_bytes));
    // The values must be countable in memory too, whatever the width of a pointer.
    bytes.filter(|&b| b <= i64::MAX as u64).ok_or_else(|| GgufProblem::Overflow { dims: dims.to_vec() })
}

/// A stream with the offset of the next byte and the length of the whole file.
struct Reader<'a> {
    input: &'a mut dyn Read,
    offset: u64,
    len: u64,
}

impl Reader<'_> {
    fn left(&self) -> u64 {
        self.len.saturating_sub(self.offset)
    }

    fn fail(&self, field: &str, problem: GgufProblem) -> GgufError {
        GgufError { field: field.to_owned(), offset: self.offset, problem, source: None }
    }

    fn fill(&mut self, field: &str, into: &mut [u8]) -> Result<(), GgufError> {
        let needed = into.len() as u64;
        if needed > self.left() {
            return Err(self.fail(field, GgufProblem::Truncated { needed, left: self.left() }));
        }
        self.input.read_exact(into).map_err(|e| GgufError { source: Some(e), ..self.fail(field, GgufProblem::Unreadable) })?;
        self.offset += needed;
        Ok(())
    }

    fn array<const N: usize>(&mut self, field: &str) -> Result<[u8; N], GgufError> {
        let mut bytes = [0; N];
        self.fill(field, &mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self, field: &str) -> Result<u32, GgufError> {
        self.array(field).map(u32::from_le_bytes)
    }

    fn u64(&mut self, field: &str) -> Result<u64, GgufError> {
        self.array(field).map(u64::from_le_bytes)
    }

    /// A count of things that take at least `min_bytes` each, checked against what is left of the file.
    fn count(&mut self, field: &str, min_bytes: u64) -> Result<u64, GgufError> {
        let start = self.offset;
        let count = self.u64(field)?;
        let needed = count.saturating_mul(min_bytes);
        if needed > self.left() {
            let problem = GgufProblem::Count { count, needed, left: self.left() };
            return Err(GgufError { offset: start, ..self.fail(field, problem) });
        }
        Ok(count)
    }

    fn text(&mut self, field: &str, limit: u64) -> Result<String, GgufError> {
        let start = self.offset;
        let len = self.count(field, 1)?;
        if len > limit {
            return Err(GgufError { offset: start, ..self.fail(field, GgufProblem::TooLong { limit, got: len }) });
        }
        let at = |problem| GgufError { field: field.to_owned(), offset: start, problem, source: None };
        let len = usize::try_from(len).map_err(|_| at(GgufProblem::TooLong { limit: usize::MAX as u64, got: len }))?;
        // The length is one of bytes that the file is known to have; read in pieces in case it is not true.
        let mut bytes = Vec::new();
        while bytes.len() < len {
            let have = bytes.len();
            bytes.resize(len.min(have + (1 << 20)), 0);
            self.fill(field, &mut bytes[have..])?;
        }
        String::from_utf8(bytes).map_err(|_| at(GgufProblem::Utf8))
    }

    fn skip(&mut self, field: &str, mut bytes: u64) -> Result<(), GgufError> {
        if bytes > self.left() {
            return Err(self.fail(field, GgufProblem::Truncated { needed: bytes, left: self.left() }));
        }
        let mut piece = [0; 4096];
        while bytes > 0 {
            let n = bytes.min(piece.len() as u64) as usize;
            self.fill(field, &mut piece[..n])?;
            bytes -= n as u64;
        }
        Ok(())
    }

    /// Magic and version.
    fn preamble(&mut self) -> Result<u32, GgufError> {
        let magic: [u8; 4] = self.array("magic")?;
        if &magic != b"GGUF" {
            return Err(GgufError { offset: 0, ..self.fail("magic", GgufProblem::Magic { got: magic }) });
        }
        let start = self.offset;
        match self.u32("version")? {
            version @ (2 | 3) => Ok(version),
            got if got & 0xffff == 0 && got != 0 => {
                Err(GgufError { offset: start, ..self.fail("version", GgufProblem::ByteOrder { got }) })
            }
            got => Err(GgufError { offset: start, ..self.fail("version", GgufProblem::Version { got }) }),
        }
    }

    fn metadata(&mut self, count: u64, keep: Keep<'_>) -> Result<Vec<Entry>, GgufError> {
        let mut entries = Vec::new();
        let mut seen: HashMap<String, u64> = HashMap::new();
        for i in 0..count {
            let start = self.offset;
            let key = self.text(&format!("key of metadata entry {i}"), MAX_KEY)?;
            let at = |problem| GgufError { field: format!("metadata key {key:?}"), offset: start, problem, source: None };
            if key.is_empty() {
                return Err(at(GgufProblem::Empty));
            }
            if let Some(&first) = seen.get(&key) {
                return Err(at(GgufProblem::Duplicate { first }));
            }
            seen.insert(key.clone(), start);
            let field = format!("metadata {key}");
            let kind = self.kind(&format!("type of {field}"))?;
            let offset = self.offset;
            let value = match kind {
                Kind::Array => self.array_value(&key, &field, keep)?,
                kind => self.value(&field, kind)?,
            };
            entries.push(Entry { key, value, offset });
        }
        Ok(entries)
    }

    fn kind(&mut self, field: &str) -> Result<Kind, GgufError> {
        let start = self.offset;
        let id = self.u32(field)?;
        Kind::from_id(id).ok_or_else(|| GgufError { offset: start, ..self.fail(field, GgufProblem::UnknownKind { got: id }) })
    }

    fn array_value(&mut self, key: &str, field: &str, keep: Keep<'_>) -> Result<Value, GgufError> {
        let start = self.offset;
        let kind = self.kind(&format!("element type of {field}"))?;
        if kind == Kind::Array {
            return Err(GgufError { offset: start, ..self.fail(field, GgufProblem::Nested) });
        }
        let len = self.count(&format!("length of {field}"), kind.min_bytes())?;
        let values = if keep.keeps(key, len) {
            let mut values = Vec::new();
            for _ in 0..len {
                values.push(self.value(field, kind)?);
            }
            Some(values)
        } else {
            if kind == Kind::String {
                for _ in 0..len {
                    let bytes = self.count(field, 1)?;
                    self.skip(field, bytes)?;
                }
            } else {
                self.skip(field, len * kind.min_bytes())?;
            }
            None
        };
        Ok(Value::Array(Box::new(Array { kind, len, values })))
    }

    /// A value of any type but an array.
    fn value(&mut self, field: &str, kind: Kind) -> Result<Value, GgufError> {
        Ok(match kind {
            Kind::U8 => Value::U8(u8::from_le_bytes(self.array(field)?)),
            Kind::I8 => Value::I8(i8::from_le_bytes(self.array(field)?)),
            Kind::U16 => Value::U16(u16::from_le_bytes(self.array(field)?)),
            Kind::I16 => Value::I16(i16::from_le_bytes(self.array(field)?)),
            Kind::U32 => Value::U32(self.u32(field)?),
            Kind::I32 => Value::I32(i32::from_le_bytes(self.array(field)?)),
            Kind::F32 => Value::F32(f32::from_le_bytes(self.array(field)?)),
            Kind::U64 => Value::U64(self.u64(field)?),
            Kind::I64 => Value::I64(i64::from_le_bytes(self.array(field)?)),
            Kind::F64 => Value::F64(f64::from_le_bytes(self.array(field)?)),
            Kind::String => Value::String(self.text(field, u64::MAX)?),
            Kind::Bool => {
                let start = self.offset;
                match self.array(field)? {
                    [0] => Value::Bool(false),
                    [1] => Value::Bool(true),
                    [got] => return Err(GgufError { offset: start, ..self.fail(field, GgufProblem::Bool { got }) }),
                }
            }
            Kind::Array => return Err(self.fail(field, GgufProblem::Nested)),
        })
    }

    /// The tensor table; offsets are still relative to the data.
    fn tensors(&mut self, count: u64) -> Result<Vec<Tensor>, GgufError> {
        let mut tensors = Vec::new();
        let mut seen: HashMap<String, u64> = HashMap::new();
        for i in 0..count {
            let entry_offset = self.offset;
            let name = self.text(&format!("name of tensor {i}"), MAX_NAME)?;
            let at = |problem, what: &str, offset| GgufError { field: format!("tensor {name:?} {what}"), offset, problem, source: None };
            if name.is_empty() {
                return Err(at(GgufProblem::Empty, "name", entry_offset));
            }
            if let Some(&first) = seen.get(&name) {
                return Err(at(GgufProblem::Duplicate { first }, "name", entry_offset));
            }
            seen.insert(name.clone(), entry_offset);
            let start = self.offset;
            let rank = self.u32(&format!("tensor {name} extents"))?;
            if rank > MAX_DIMS {
                return Err(at(GgufProblem::Invalid { expected: "at most 4 extents", got: rank.to_string() }, "extents", start));
            }
            let mut dims = Vec::new();
            for _ in 0..rank {
                dims.push(self.u64(&format!("tensor {name} extents"))?);
            }
            if dims.contains(&0) {
                let got = format!("{dims:?}");
                return Err(at(GgufProblem::Invalid { expected: "extents of at least 1", got }, "extents", start));
            }
            let type_offset = self.offset;
            let id = self.u32(&format!("tensor {name} type"))?;
            let Some(kind) = GgmlType::from_id(id) else {
                return Err(at(GgufProblem::UnknownTensorType { got: id }, "type", type_offset));
            };
            let bytes = tensor_bytes(&dims, kind).map_err(|problem| at(problem, "extents", start))?;
            let offset = self.u64(&format!("tensor {name} offset"))?;
            tensors.push(Tensor { name, dims, kind, offset, bytes, entry_offset });
        }
        Ok(tensors)
    }
}
