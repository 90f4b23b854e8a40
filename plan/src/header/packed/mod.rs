//! Matrices of packed integers, as GPTQ, AWQ and compressed-tensors store them: where their parts lie, and which block type holds the same
//! numbers.
//!
//! A value is `scale · (q − zero)`, with one scale and one zero point for each group of a row's values. With scales of 16 bits and groups of
//! whole blocks that is a block type's value exactly: 4 bits around 8 are Q4_0, 4 bits around any zero point Q5_0 (`q − zero` takes five),
//! 8 bits around 128 Q8_0.

mod scheme;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, ops::Range};

pub(super) use scheme::Scheme;

use super::{HeaderError, Place};
use crate::{
    dtype::DType,
    model::ModelFile,
    safetensors::{Header, Tensor},
};

/// Values of a block; groups are whole blocks.
const BLOCK: usize = 32;
/// Name of the file that there is not, in which the matrices lie as blocks.
const FILE: &str = "packed matrices, as blocks";

/// How integers are packed, and under which names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// GPTQ: words run along a row's values, rows lie side by side.
    Gptq {
        /// What is added to a stored zero point: 1 in the first version of the format.
        zero_offset: u32,
    },
    /// AWQ: words run over eight rows, in an order of their own; a row's values lie below each other.
    Awq,
    /// compressed-tensors, `pack-quantized`: words run along a row's values, row by row.
    Rows,
    /// compressed-tensors, `int-quantized`: signed bytes, row by row.
    Bytes,
}

impl Packing {
    /// Ends of the names of weights, scales and zero points.
    fn names(self) -> [&'static str; 3] {
        match self {
            Self::Gptq { .. } | Self::Awq => [".qweight", ".scales", ".qzeros"],
            Self::Rows => [".weight_packed", ".weight_scale", ".weight_zero_point"],
            Self::Bytes => [".weight", ".weight_scale", ".weight_zero_point"],
        }
    }
}

/// A part of a packed matrix: rows and columns of words, bytes or floats.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Name of the tensor.
    pub name: String,
    /// Number of the weight file.
    pub file: usize,
    /// First byte in it.
    pub offset: u64,
    /// Rows and columns.
    pub extents: [u64; 2],
    /// Type as written, and its bytes.
    pub dtype: String,
    /// Bytes of an element.
    pub element: u64,
}

impl Piece {
    /// The bytes that hold some rows and columns, in order.
    pub fn ranges(&self, rows: Range<u64>, columns: Range<u64>) -> Vec<Range<u64>> {
        let row = self.extents[1] * self.element;
        let (begin, end) = (columns.start * self.element, columns.end * self.element);
        let (rows, len) =
            if end - begin == row { (rows.start..rows.start + 1, row * (rows.end - rows.start)) } else { (rows, end - begin) };
        rows.map(|r| self.offset + r * row + begin).map(|at| at..at + len).collect()
    }
}

/// A packed matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    /// Name of the matrix where it is not packed.
    pub name: String,
    /// Values of its result.
    pub rows: usize,
    /// Values of its input.
    pub columns: usize,
    /// The block type that holds the same numbers.
    pub dtype: DType,
    /// How it is packed.
    pub packing: Packing,
    /// Bits of an integer.
    pub bits: u32,
    /// Values of a row that share a scale.
    pub group: usize,
    /// Its integers.
    pub weights: Piece,
    /// Its scales.
    pub scales: Piece,
    /// Its zero points, where they are stored.
    pub zeros: Option<Piece>,
    /// The group of each value of a row, where that is stored; they are in order, or the matrix is refused when it is read.
    pub order: Option<Piece>,
    /// First byte of its blocks in the file that there is not.
    pub offset: u64,
}

/// What is read of a piece: these rows and columns of it.
pub type Part<'a> = (&'a Piece, Range<u64>, Range<u64>);

impl Packed {
    /// Integers of a word.
    pub fn per_word(&self) -> usize {
        32 / self.bits as usize
    }

    /// Bytes of a row as blocks.
    pub fn row_bytes(&self) -> u64 {
        self.dtype.row_bytes(self.columns).unwrap_or_default() as u64
    }

    /// What holds rows `rows`: integers, scales, zero points.
    pub fn parts(&self, rows: &Range<usize>) -> (Part<'_>, Part<'_>, Option<Part<'_>>) {
        let plain = rows.start as u64..rows.end as u64;
        // Words that run over rows hold those of neighbours too.
        let words = (rows.start / self.per_word()) as u64..rows.end.div_ceil(self.per_word()) as u64;
        let across = |piece, columns: &Range<u64>| -> Part<'_> { all_rows(piece, columns.clone()) };
        let along = |piece, rows: &Range<u64>| -> Part<'_> { all_columns(piece, rows.clone()) };
        let zeros = self.zeros.as_ref();
        match self.packing {
            Packing::Gptq { .. } => (across(&self.weights, &plain), across(&self.scales, &plain), zeros.map(|z| across(z, &words))),
            Packing::Awq => (across(&self.weights, &words), across(&self.scales, &plain), zeros.map(|z| across(z, &words))),
            Packing::Rows | Packing::Bytes => (along(&self.weights, &plain), along(&self.scales, &plain), zeros.map(|z| along(z, &words))),
        }
    }
}

fn all_rows(piece: &Piece, columns: Range<u64>) -> Part<'_> {
    (piece, 0..piece.extents[0], columns)
}

fn all_columns(piece: &Piece, rows: Range<u64>) -> Part<'_> {
    (piece, rows, 0..piece.extents[1])
}

/// Takes the packed matrices of safetensors files out of their lists; a file that there is not, behind them, lists them as blocks.
///
/// # Errors
/// When `config.json` describes packing that block types do not hold exactly, or a part is missing or of another type or shape.
pub fn take_packed(config_json: &[u8], parts: &mut Vec<(ModelFile, Header)>) -> Result<Vec<Packed>, HeaderError> {
    let Some(scheme) = Scheme::of(config_json)? else { return Ok(Vec::new()) };
    let finder = Finder { scheme, parts };
    let packed = finder.all()?;
    let mut used: Vec<&str> =
        packed.iter().flat_map(|m| [&m.weights, &m.scales].into_iter().chain(&m.zeros).chain(&m.order)).map(|p| p.name.as_str()).collect();
    let shapes: Vec<String> = packed.iter().map(|m| format!("{}_shape", m.name)).collect();
    used.extend(shapes.iter().map(String::as_str));
    used.sort_unstable();
    let entries: BTreeMap<&str, u64> =
        finder.parts.iter().flat_map(|(_, h)| &h.tensors).map(|t| (t.name.as_str(), t.entry_offset)).collect();
    let list = packed.iter().map(|m| Tensor {
        name: m.name.clone(),
        dtype: format!("{:?}", m.dtype),
        shape: vec![m.rows as u64, m.columns as u64],
        offset: m.offset,
        bytes: m.rows as u64 * m.row_bytes(),
        entry_offset: entries.get(m.weights.name.as_str()).copied().unwrap_or_default(),
    });
    let header = Header { tensors: list.collect(), ..Header::default() };
    let bytes = header.tensors.last().map_or(0, |t| t.offset + t.bytes);
    for (_, header) in parts.iter_mut() {
        header.tensors.retain(|t| used.binary_search(&t.name.as_str()).is_err());
    }
    if !packed.is_empty() {
        parts.push((ModelFile { name: FILE.to_owned(), bytes }, header));
    }
    Ok(packed)
}

/// Finds packed matrices in lists of tensors.
struct Finder<'a> {
    scheme: Scheme,
    parts: &'a [(ModelFile, Header)],
}

impl<'a> Finder<'a> {
    fn all(&self) -> Result<Vec<Packed>, HeaderError> {
        let tensors = || self.parts.iter().enumerate().flat_map(|(file, (_, header))| header.tensors.iter().map(move |t| (file, t)));
        let mut by_name: BTreeMap<&str, (usize, &Tensor)> = BTreeMap::new();
        for (file, tensor) in tensors() {
            if let Some(first) = by_name.insert(&tensor.name, (file, tensor)) {
                let (place, again) = (self.place(first), self.place((file, tensor)));
                return Err(HeaderError::DuplicateTensor { name: tensor.name.clone(), place, again });
            }
        }
        let [weights, ..] = self.scheme.packing.names();
        let bytes = self.scheme.packing == Packing::Bytes;
        let mut packed: Vec<Packed> = Vec::new();
        for found in tensors().filter(|(_, t)| t.name.ends_with(weights) && (!bytes || t.dtype == "I8")) {
            let stem = found.1.name.strip_suffix(weights).unwrap_or_default();
            let offset = packed.last().map_or(0, |m: &Packed| m.offset + m.rows as u64 * m.row_bytes());
            packed.push(self.matrix(stem, found, &by_name, offset)?);
        }
        Ok(packed)
    }

    fn place(&self, (file, tensor): (usize, &Tensor)) -> Place {
        Place { file: self.parts[file].0.name.clone(), offset: tensor.entry_offset }
    }

    fn matrix(
        &self,
        stem: &str,
        found: (usize, &'a Tensor),
        all: &BTreeMap<&str, (usize, &'a Tensor)>,
        offset: u64,
    ) -> Result<Packed, HeaderError> {
        let Scheme { packing, bits, group, symmetric } = self.scheme;
        let [_, scales, zeros] = packing.names();
        let per_word = 32 / u64::from(bits);
        let extents = <[u64; 2]>::try_from(&found.1.shape[..]).ok().filter(|extents| !extents.contains(&0));
        let Some([height, width]) = extents else {
            let (place, got) = (self.place(found), found.1.shape.clone());
            return Err(HeaderError::Shape { name: found.1.name.clone(), place, got, expected: vec![1, 1] });
        };
        // Lengths of files bound both, so that nothing overflows.
        let (rows, columns) = match packing {
            Packing::Gptq { .. } => (width, height * per_word),
            Packing::Awq => (width * per_word, height),
            Packing::Rows => (height, width * per_word),
            Packing::Bytes => (height, width),
        };
        let group = group.map_or(columns, |group| group as u64);
        let wrong = |expected: String, got: String| HeaderError::Field {
            file: self.place(found).file,
            field: format!("tensor {} at byte {}", found.1.name, found.1.entry_offset),
            expected,
            got,
        };
        if group == 0 || group % BLOCK as u64 != 0 || columns % group != 0 {
            let got = format!("of {columns} values in groups of {group}");
            return Err(wrong(format!("of rows of whole groups, and groups of whole blocks of {BLOCK} values"), got));
        }
        if rows % per_word != 0 && !matches!(packing, Packing::Bytes) {
            return Err(wrong(format!("of a multiple of {per_word} rows"), format!("of {rows} rows")));
        }
        let groups = columns / group;
        let piece = |end: &str, types: &'static [&'static str], kinds: &'static str, extents: [u64; 2]| {
            let name = format!("{stem}{end}");
            let Some(&(file, tensor)) = all.get(name.as_str()) else { return Err((name, extents)) };
            Ok(self.piece((file, tensor), types, kinds, extents))
        };
        let need = |found: Result<Result<Piece, HeaderError>, (String, [u64; 2])>| {
            found.unwrap_or_else(|(name, extents)| {
                let place = self.place(found_in(all, stem)).file;
                Err(HeaderError::MissingTensor { name, place, shape: extents.map(|n| n as usize).to_vec() })
            })
        };
        const WORDS: &[&str] = &["I32"];
        const HALVES: &[&str] = &["F16", "BF16"];
        let (integers, kind): (&'static [&'static str], _) = if packing == Packing::Bytes { (&["I8"], "I8") } else { (WORDS, "I32") };
        let weights = self.piece(found, integers, kind, [height, width])?;
        let down = matches!(packing, Packing::Gptq { .. } | Packing::Awq);
        let scales = need(piece(scales, HALVES, "F16 or BF16", if down { [groups, rows] } else { [rows, groups] }))?;
        // Where they are not stored, what is symmetric has them in its middle.
        let zeros = match piece(zeros, WORDS, "I32", if down { [groups, rows / per_word] } else { [rows / per_word, groups] }) {
            Err(_) if symmetric && !down => None,
            _ if packing == Packing::Bytes => None,
            found => Some(need(found)?),
        };
        let order = match packing {
            Packing::Gptq { .. } => piece(".g_idx", WORDS, "I32", [1, columns]).ok().transpose()?,
            _ => None,
        };
        let dtype = match (bits, symmetric) {
            (8, _) => DType::Q8_0,
            (_, true) => DType::Q4_0,
            (_, false) => DType::Q5_0,
        };
        let (rows, columns, group) = (rows as usize, columns as usize, group as usize);
        let name = format!("{stem}.weight");
        Ok(Packed { name, rows, columns, dtype, packing, bits, group, weights, scales, zeros, order, offset })
    }

    /// A tensor as a part of a matrix; a vector is a row, or a column where one is expected.
    fn piece(&self, found: (usize, &Tensor), types: &[&str], kinds: &'static str, extents: [u64; 2]) -> Result<Piece, HeaderError> {
        let (file, tensor) = found;
        if !types.contains(&tensor.dtype.as_str()) {
            let place = self.place(found);
            return Err(HeaderError::TensorType { name: tensor.name.clone(), place, got: tensor.dtype.clone(), expected: kinds });
        }
        let flat = extents.contains(&1) && tensor.shape == [extents[0] * extents[1]];
        if tensor.shape != extents && !flat {
            let expected = extents.map(|n| n as usize).to_vec();
            return Err(HeaderError::Shape { name: tensor.name.clone(), place: self.place(found), got: tensor.shape.clone(), expected });
        }
        let element = tensor.bytes / (extents[0] * extents[1]).max(1);
        Ok(Piece { name: tensor.name.clone(), file, offset: tensor.offset, extents, dtype: tensor.dtype.clone(), element })
    }
}

/// Any tensor of the matrix `stem`, for messages.
fn found_in<'a>(all: &BTreeMap<&str, (usize, &'a Tensor)>, stem: &str) -> (usize, &'a Tensor) {
    let (_, &found) = all.range(stem..).next().unwrap_or_else(|| unreachable!("the matrix {stem} has a tensor"));
    found
}
