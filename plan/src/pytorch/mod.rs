//! PyTorch files (`.bin`, `.pt`, `.pth`): the tensors of a state dict in the ZIP form that `torch.save` writes, read without running anything.
//!
//! The archive's entries must be stored as they are, so that a tensor is a range of the file. The older form without an archive is refused.

mod pickle;
#[cfg(test)]
mod tests;
mod zip;

use std::{
    collections::{BTreeMap, HashMap},
    io,
};

use self::pickle::{Node, Pickle, Value};
use crate::safetensors;

/// Longest `data.pkl`: names, shapes and places of a hundred thousand tensors.
const MAX_PICKLE: u64 = 32 << 20;
/// The pickled number that the form without an archive begins with.
const LEGACY: [u8; 14] = [0x80, 0x02, 0x8a, 0x0a, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
/// Keys under which a state dict may lie.
const NESTED: [&str; 3] = ["state_dict", "model", "module"];

/// Reads bytes from the place given, filling the buffer.
pub type ReadAt<'a> = dyn FnMut(u64, &mut [u8]) -> io::Result<()> + 'a;

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Unique name.
    pub name: String,
    /// Type by its safetensors name.
    pub dtype: &'static str,
    /// Bytes of an element.
    pub element: u64,
    /// Row-major shape.
    pub shape: Vec<u64>,
    /// Elements from one to the next along each axis.
    pub strides: Vec<u64>,
    /// Byte of the file at which its first element lies.
    pub offset: u64,
    /// Byte of the file at which the pickle names it.
    pub entry_offset: u64,
}

impl Tensor {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Whether its elements follow each other in the file.
    pub fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        self.elements() == 0
            || self.shape.iter().zip(&self.strides).rev().all(|(&extent, &stride)| {
                let fits = extent == 1 || stride == expected;
                expected *= extent;
                fits
            })
    }

    /// Elements of the file from its first to its last one, both counted.
    pub fn span(&self) -> u64 {
        if self.elements() == 0 { 0 } else { 1 + self.shape.iter().zip(&self.strides).map(|(n, stride)| (n - 1) * stride).sum::<u64>() }
    }

    /// The tensor as the other formats list them, its bytes at `offset`.
    pub fn listed(&self, offset: u64) -> safetensors::Tensor {
        safetensors::Tensor {
            name: self.name.clone(),
            dtype: self.dtype.to_owned(),
            shape: self.shape.clone(),
            offset,
            bytes: self.elements() * self.element,
            entry_offset: self.entry_offset,
        }
    }
}

/// A PyTorch file that cannot be used: which field, where, and why.
#[derive(Debug, thiserror::Error)]
#[error("{field} at byte {offset}: {problem}")]
pub struct PytorchError {
    /// The field being read.
    pub field: String,
    /// Byte of the file at which it begins.
    pub offset: u64,
    /// What is wrong with it.
    pub problem: Problem,
    /// Why the bytes could not be read, for [`Problem::Unreadable`].
    #[source]
    pub source: Option<io::Error>,
}

impl PytorchError {
    fn new(field: &str, offset: u64, problem: Problem) -> Self {
        Self { field: field.to_owned(), offset, problem, source: None }
    }

    /// Stable, low-cardinality key for metrics and status conditions.
    pub fn reason(&self) -> &'static str {
        if matches!(self.problem, Problem::Unreadable) { "header_unreadable" } else { "header_invalid" }
    }
}

/// What is wrong with a field of a PyTorch file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum Problem {
    #[error("failed to read the file")]
    Unreadable,
    #[error("the file is in the form before PyTorch 1.6, without an archive; load and save it again with torch.save")]
    Legacy,
    #[error("the file is a TorchScript program, not a state dict")]
    Script,
    #[error("cut off")]
    Truncated,
    #[error("expected UTF-8 text")]
    Utf8,
    #[error("expected {expected}, got {got}")]
    Invalid { expected: String, got: String },
    #[error("expected an entry that is stored as it is, got compression method {method}")]
    Compressed { method: u64 },
    #[error("the entry is encrypted")]
    Encrypted,
    #[error("appears twice, first at byte {first}")]
    Duplicate { first: u64 },
    #[error("lies at bytes {begin}..{end} of a file of {file} bytes")]
    OutOfFile { begin: u64, end: u64, file: u64 },
    #[error("archive entry {name} is missing")]
    Missing { name: String },
    #[error("is {got} bytes long, expected at most {limit}")]
    TooLong { got: u64, limit: u64 },
    #[error("pickle opcode {got:#04x} is not one that a state dict needs")]
    Opcode { got: u8 },
    #[error("the pickle names {name}, which is not one of the names that a state dict needs; nothing of it was run")]
    Global { name: String },
    #[error("elements {first}..{end} of a storage of {elements}")]
    OutOfStorage { first: u64, end: u64, elements: u64 },
    #[error("shape {shape:?} with strides {strides:?} overflows 64 bits")]
    Overflow { shape: Vec<u64>, strides: Vec<u64> },
}

/// `len` bytes from `offset` on.
fn read_at(read: &mut ReadAt<'_>, field: &str, offset: u64, len: u64) -> Result<Vec<u8>, PytorchError> {
    let mut bytes = vec![0; usize::try_from(len).map_err(|_| PytorchError::new(field, offset, Problem::Truncated))?];
    read(offset, &mut bytes).map_err(|e| PytorchError { source: Some(e), ..PytorchError::new(field, offset, Problem::Unreadable) })?;
    Ok(bytes)
}

/// Whether a file that begins with `magic` is one of PyTorch's, in either form.
pub fn is_pytorch(magic: &[u8]) -> bool {
    magic.starts_with(b"PK\x03\x04") || magic.starts_with(&LEGACY[..magic.len().clamp(4, LEGACY.len())])
}

/// Reads the list of tensors of a PyTorch file of `file_bytes` bytes, in the order of the state dict.
///
/// # Errors
/// Names the field, its byte offset, and what was expected.
pub fn read(read: &mut ReadAt<'_>, file_bytes: u64) -> Result<Vec<Tensor>, PytorchError> {
    let magic = read_at(read, "magic", 0, file_bytes.min(14))?;
    if magic == LEGACY {
        return Err(PytorchError::new("magic", 0, Problem::Legacy));
    }
    if !magic.starts_with(b"PK\x03\x04") {
        let got = format!("{:02x?}", &magic[..magic.len().min(4)]);
        return Err(PytorchError::new("magic", 0, Problem::Invalid { expected: "a ZIP archive".into(), got }));
    }
    let directory = zip::directory(read, file_bytes)?;
    let missing = |name: &str| PytorchError::new("archive directory", 0, Problem::Missing { name: name.to_owned() });
    let mut roots = directory.iter().filter_map(|(name, entry)| Some((name.strip_suffix("/data.pkl")?, entry)));
    let (root, _) = roots.next().ok_or_else(|| missing("…/data.pkl"))?;
    if let Some((other, entry)) = roots.next() {
        let (expected, got) = ("one data.pkl".to_owned(), format!("{root}/data.pkl and {other}/data.pkl"));
        return Err(PytorchError::new("archive directory", entry.listed_at, Problem::Invalid { expected, got }));
    }
    if let Some(entry) = directory.get(&format!("{root}/constants.pkl")) {
        return Err(PytorchError::new("archive directory", entry.listed_at, Problem::Script));
    }
    let entry = |read: &mut ReadAt<'_>, name: &str| {
        let name = format!("{root}/{name}");
        let entry = directory.get(&name).ok_or_else(|| missing(&name))?;
        zip::data(read, &name, entry, file_bytes)
    };
    if directory.contains_key(&format!("{root}/byteorder")) {
        let range = entry(read, "byteorder")?;
        let order = read_at(read, "byteorder", range.start, (range.end - range.start).min(16))?;
        if order != b"little" {
            let got = String::from_utf8_lossy(&order).into_owned();
            return Err(PytorchError::new("byteorder", range.start, Problem::Invalid { expected: "little".into(), got }));
        }
    }
    let range = entry(read, "data.pkl")?;
    let bytes = range.end - range.start;
    if bytes > MAX_PICKLE {
        return Err(PytorchError::new("data.pkl", range.start, Problem::TooLong { got: bytes, limit: MAX_PICKLE }));
    }
    let bytes = read_at(read, "data.pkl", range.start, bytes)?;
    let pickle = pickle::read(&bytes, range.start)?;
    let mut places: BTreeMap<&str, std::ops::Range<u64>> = BTreeMap::new();
    let mut tensors = Vec::new();
    for (name, tensor, at) in state_dict(&pickle, range.start)? {
        let key = pickle.storages[pickle.tensors[tensor].storage].key;
        let place = match places.get(key) {
            Some(place) => place.clone(),
            None => {
                let place = entry(read, &format!("data/{key}"))?;
                places.insert(key, place.clone());
                place
            }
        };
        tensors.push(placed(&pickle, name, tensor, range.start + at as u64, &place)?);
    }
    apart(&places)?;
    Ok(tensors)
}

/// Checks that no storage lies on another.
fn apart(places: &BTreeMap<&str, std::ops::Range<u64>>) -> Result<(), PytorchError> {
    let mut order: Vec<_> = places.iter().collect();
    order.sort_by_key(|(_, place)| (place.start, place.end));
    for pair in order.windows(2) {
        if pair[0].1.end > pair[1].1.start {
            let (expected, got) = (format!("data after that of data/{}", pair[0].0), "data that overlaps it".to_owned());
            return Err(PytorchError::new(
                &format!("archive entry data/{}", pair[1].0),
                pair[1].1.start,
                Problem::Invalid { expected, got },
            ));
        }
    }
    Ok(())
}

/// The tensors of the state dict: name, number, and the byte of the pickle at which it was set.
fn state_dict<'p>(pickle: &'p Pickle<'_>, base: u64) -> Result<Vec<(&'p str, usize, usize)>, PytorchError> {
    let invalid = |got: String| {
        let expected = "a dict of tensors, or one under state_dict, model or module".to_owned();
        PytorchError::new("data.pkl", base, Problem::Invalid { expected, got })
    };
    let dict = |value: Value<'_>| match value {
        Value::Node(n) => match &pickle.nodes[n] {
            Node::Dict(entries) => Some(entries),
            _ => None,
        },
        _ => None,
    };
    let mut entries = dict(pickle.root).ok_or_else(|| invalid("another value".into()))?;
    if !entries.iter().any(|e| matches!(e.1, Value::Tensor(_))) {
        let nested = NESTED.iter().find_map(|key| entries.iter().find(|e| e.0 == Value::Text(key)).and_then(|e| dict(e.1)));
        entries = nested.ok_or_else(|| invalid(format!("a dict of {} other values", entries.len())))?;
    }
    let mut seen = HashMap::new();
    let mut tensors = Vec::new();
    for (key, value, at) in entries {
        let Value::Tensor(tensor) = value else { continue };
        let Value::Text(name) = key else { return Err(invalid("a tensor whose key is not text".into())) };
        if let Some(first) = seen.insert(*name, *at) {
            let field = format!("tensor {name}");
            return Err(PytorchError::new(&field, base + *at as u64, Problem::Duplicate { first: base + first as u64 }));
        }
        tensors.push((*name, *tensor, *at));
    }
    Ok(tensors)
}

/// Gives a tensor its place in the file, checked against its storage.
fn placed(pickle: &Pickle<'_>, name: &str, tensor: usize, entry_offset: u64, place: &std::ops::Range<u64>) -> Result<Tensor, PytorchError> {
    let view = &pickle.tensors[tensor];
    let storage = &pickle.storages[view.storage];
    let fail = |problem| PytorchError::new(&format!("tensor {name}"), entry_offset, problem);
    let overflow = || fail(Problem::Overflow { shape: view.shape.clone(), strides: view.strides.clone() });
    let elements = view.shape.iter().try_fold(1_u64, |n, &extent| n.checked_mul(extent)).ok_or_else(overflow)?;
    let bytes = elements.checked_mul(storage.element).filter(|&n| n <= i64::MAX as u64).ok_or_else(overflow)?;
    let reach = |(&extent, &stride): (&u64, &u64)| extent.saturating_sub(1).checked_mul(stride);
    let last = view.shape.iter().zip(&view.strides).map(reach).try_fold(view.first, |sum, n| sum.checked_add(n?)).ok_or_else(overflow)?;
    let end = if elements == 0 { view.first } else { last.checked_add(1).ok_or_else(overflow)? };
    let held = (place.end - place.start) / storage.element;
    if end > storage.elements || storage.elements > held {
        return Err(fail(Problem::OutOfStorage { first: view.first, end, elements: storage.elements.min(held) }));
    }
    // What is read of a view is at most what it covers; a view that repeats elements could claim any size.
    if bytes > 0 && elements > end - view.first {
        return Err(fail(Problem::Invalid {
            expected: "a tensor that repeats no element".into(),
            got: format!("strides {:?}", view.strides),
        }));
    }
    Ok(Tensor {
        name: name.to_owned(),
        dtype: storage.dtype,
        element: storage.element,
        shape: view.shape.clone(),
        strides: view.strides.clone(),
        offset: place.start + view.first * storage.element,
        entry_offset,
    })
}
