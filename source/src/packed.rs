//! Matrices of packed integers, read as the block types that hold the same numbers: any rows, from the bytes that hold those.

#[cfg(test)]
mod tests;

use std::ops::Range;

use half::{bf16, f16};
use plan::{
    dtype::DType,
    header::{Packed, PackedPart, Packing, Piece},
    model::ModelFile,
};

use crate::{SourceError, place::Place};

/// Values of a block.
const BLOCK: usize = 32;
/// Where AWQ has the integer of each of eight rows in a word.
const AWQ_ORDER: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// A file that there is not: packed matrices as blocks, one after the other.
#[derive(Debug)]
pub(crate) struct Unpacked {
    pub(crate) file: ModelFile,
    matrices: Vec<Packed>,
}

/// The weight files that there are.
type Weights = [(ModelFile, Place)];

impl Unpacked {
    pub(crate) fn new(file: ModelFile, matrices: Vec<Packed>) -> Self {
        Self { file, matrices }
    }

    /// The matrices that bytes `range` touch, and the rows of each.
    fn touched(&self, range: &Range<u64>) -> impl Iterator<Item = (&Packed, Range<usize>)> {
        let range = range.clone();
        self.matrices.iter().filter_map(move |matrix| {
            let row = matrix.row_bytes();
            let end = matrix.offset + matrix.rows as u64 * row;
            let part = range.start.max(matrix.offset)..range.end.min(end);
            (part.start < part.end)
                .then(|| (matrix, ((part.start - matrix.offset) / row) as usize..(part.end - matrix.offset).div_ceil(row) as usize))
        })
    }

    /// The bytes of the files that there are which hold bytes `range`, with the number of the file.
    pub(crate) fn covering(&self, range: &Range<u64>) -> Vec<(usize, Range<u64>)> {
        let mut all = Vec::new();
        for (matrix, rows) in self.touched(range) {
            let (weights, scales, zeros) = matrix.parts(&rows);
            let order = matrix.order.as_ref().map(whole);
            for (piece, rows, columns) in [Some(weights), Some(scales), zeros, order].into_iter().flatten() {
                all.extend(piece.ranges(rows, columns).into_iter().map(|range| (piece.file, range)));
            }
        }
        all
    }

    /// Reads bytes `range`, which lie within.
    pub(crate) fn read(&self, weights: &Weights, range: &Range<u64>, into: &mut [u8]) -> Result<(), SourceError> {
        for (matrix, rows) in self.touched(range) {
            let blocks = blocks(weights, matrix, &rows)?;
            let begin = matrix.offset + rows.start as u64 * matrix.row_bytes();
            let part = range.start.max(begin)..range.end.min(begin + blocks.len() as u64);
            let from = &blocks[(part.start - begin) as usize..(part.end - begin) as usize];
            into[(part.start - range.start) as usize..(part.end - range.start) as usize].copy_from_slice(from);
        }
        Ok(())
    }
}

fn whole(piece: &Piece) -> PackedPart<'_> {
    (piece, 0..piece.extents[0], 0..piece.extents[1])
}

/// Some rows of a matrix as blocks.
fn blocks(weights: &Weights, matrix: &Packed, rows: &Range<usize>) -> Result<Vec<u8>, SourceError> {
    let (integers, scales, zeros) = matrix.parts(rows);
    if let Some(order) = &matrix.order {
        in_order(weights, matrix, order)?;
    }
    let reader = Reader {
        matrix,
        first: rows.start,
        integers: fetch(weights, integers.clone())?,
        width: (integers.2.end - integers.2.start) as usize,
        scales: fetch(weights, scales.clone())?,
        scale_width: (scales.2.end - scales.2.start) as usize,
        zero_width: zeros.as_ref().map_or(0, |z| (z.2.end - z.2.start) as usize),
        zeros: zeros.map(|zeros| fetch(weights, zeros)).transpose()?,
    };
    let fail = |piece: &Piece, problem: String| SourceError::Packed {
        name: piece.name.clone(),
        place: weights.get(piece.file).map_or_else(String::new, |(file, _)| file.name.clone()),
        offset: piece.offset,
        problem,
    };
    let mut out = Vec::with_capacity(rows.len() * matrix.row_bytes() as usize);
    let mut row = vec![0; matrix.columns];
    for r in rows.clone() {
        reader.row(r, &mut row);
        for (g, values) in row.chunks_exact(matrix.group).enumerate() {
            let scale = reader.scale(r, g).map_err(|problem| fail(&matrix.scales, format!("row {r}, group {g}: {problem}")))?;
            let zero = reader.zero(r, g);
            let middle = 1 << (matrix.bits - 1);
            if zero != middle && matrix.dtype != DType::Q5_0 {
                let problem =
                    format!("the zero point of row {r}, group {g} is {zero}, expected {middle}: config.json says that they are symmetric");
                return Err(fail(matrix.zeros.as_ref().unwrap_or(&matrix.weights), problem));
            }
            values.as_chunks::<BLOCK>().0.iter().for_each(|values| push_block(matrix.dtype, scale, zero, values, &mut out));
        }
    }
    Ok(out)
}

/// Appends a block of the values `scale · (q − zero)`.
fn push_block(dtype: DType, scale: u16, zero: u32, values: &[u8; BLOCK], out: &mut Vec<u8>) {
    out.extend(scale.to_le_bytes());
    let (low, high) = values.split_at(BLOCK / 2);
    match dtype {
        DType::Q8_0 => out.extend(values.iter().map(|q| q.wrapping_sub(128))),
        DType::Q5_0 => {
            // Of 0 to 15 less 0 to 16; the block type's own zero point is 16.
            let five = |q: &u8| (u32::from(*q) + 16 - zero) as u8;
            let fifth = values.iter().enumerate().fold(0_u32, |bits, (i, q)| bits | u32::from(five(q) >> 4) << i);
            out.extend(fifth.to_le_bytes());
            out.extend(low.iter().zip(high).map(|(a, b)| five(a) & 15 | five(b) << 4));
        }
        _ => out.extend(low.iter().zip(high).map(|(a, b)| a | b << 4)),
    }
}

/// Checks that values lie in the order of their groups.
fn in_order(weights: &Weights, matrix: &Packed, order: &Piece) -> Result<(), SourceError> {
    let groups = fetch(weights, whole(order))?;
    let wrong = groups.as_chunks().0.iter().enumerate().find(|&(i, g)| u32::from_le_bytes(*g) as usize != i / matrix.group);
    let Some((i, group)) = wrong else { return Ok(()) };
    let (got, expected) = (u32::from_le_bytes(*group), i / matrix.group);
    Err(SourceError::Packed {
        name: order.name.clone(),
        place: weights.get(order.file).map_or_else(String::new, |(file, _)| file.name.clone()),
        offset: order.offset + 4 * i as u64,
        problem: format!("value {i} is of group {got}, expected {expected}: groups in the order of activations are not supported"),
    })
}

/// The bytes of a part, without what lies between.
fn fetch(weights: &Weights, (piece, rows, columns): PackedPart<'_>) -> Result<Vec<u8>, SourceError> {
    let (_, place) = weights.get(piece.file).ok_or(SourceError::FileIndex { index: piece.file, files: weights.len() })?;
    let ranges = piece.ranges(rows, columns);
    let mut bytes = vec![0; ranges.iter().map(|range| range.end - range.start).sum::<u64>() as usize];
    // One request instead of one for each row; only what is kept on disk is counted.
    let hull = match (place, &ranges[..]) {
        (Place::Remote { .. }, [first, .., last]) => {
            let mut hull = vec![0; (last.end - first.start) as usize];
            place.read(&(first.start..last.end), &mut hull)?;
            Some((first.start, hull))
        }
        _ => None,
    };
    let mut left = &mut bytes[..];
    for range in &ranges {
        let (into, more) = left.split_at_mut((range.end - range.start) as usize);
        match &hull {
            Some((start, hull)) => into.copy_from_slice(&hull[(range.start - start) as usize..(range.end - start) as usize]),
            None => place.read(range, into)?,
        }
        left = more;
    }
    Ok(bytes)
}

/// Some rows of a matrix, as they are packed.
struct Reader<'a> {
    matrix: &'a Packed,
    first: usize,
    integers: Vec<u8>,
    /// Words, or bytes, of a row of `integers`.
    width: usize,
    scales: Vec<u8>,
    scale_width: usize,
    zeros: Option<Vec<u8>>,
    zero_width: usize,
}

/// Word `index` of some bytes.
fn word(bytes: &[u8], index: usize) -> u32 {
    bytes.as_chunks().0.get(index).map_or(0, |word| u32::from_le_bytes(*word))
}

impl Reader<'_> {
    /// The integers of row `r`, counted from 0.
    fn row(&self, r: usize, into: &mut [u8]) {
        let (here, per, bits) = (r - self.first, self.matrix.per_word(), self.matrix.bits);
        let mask = (1_u32 << bits) - 1;
        let spread = |words: &dyn Fn(usize) -> u32, into: &mut [u8]| {
            for (i, values) in into.chunks_mut(per).enumerate() {
                let word = words(i);
                values.iter_mut().enumerate().for_each(|(j, value)| *value = (word >> (bits as usize * j) & mask) as u8);
            }
        };
        match self.matrix.packing {
            Packing::Gptq { .. } => spread(&|i| word(&self.integers, i * self.width + here), into),
            Packing::Rows => spread(&|i| word(&self.integers, here * self.width + i), into),
            Packing::Awq => {
                let (column, shift) = (r / per - self.first / per, bits as usize * AWQ_ORDER[r % per]);
                into.iter_mut().enumerate().for_each(|(i, v)| *v = (word(&self.integers, i * self.width + column) >> shift & mask) as u8);
            }
            Packing::Bytes => {
                let bytes = &self.integers[here * self.width..][..self.width];
                into.iter_mut().zip(bytes).for_each(|(value, byte)| *value = byte.wrapping_add(128));
            }
        }
    }

    /// The scale of a group, as the bits of a 16-bit float.
    fn scale(&self, r: usize, group: usize) -> Result<u16, String> {
        let here = r - self.first;
        let index = match self.matrix.packing {
            Packing::Gptq { .. } | Packing::Awq => group * self.scale_width + here,
            Packing::Rows | Packing::Bytes => here * self.scale_width + group,
        };
        let bytes = self.scales.as_chunks().0.get(index).copied().unwrap_or_default();
        let (value, near) = match self.matrix.scales.dtype.as_str() {
            "F16" => (f16::from_le_bytes(bytes).to_f32(), f16::from_le_bytes(bytes)),
            _ => (bf16::from_le_bytes(bytes).to_f32(), f16::from_f32(bf16::from_le_bytes(bytes).to_f32())),
        };
        if !value.is_finite() || near.to_f32() != value {
            return Err(format!("the scale {value:e} is not one of 16 bits (F16), which the blocks have"));
        }
        Ok(near.to_bits())
    }

    /// The zero point of a group.
    fn zero(&self, r: usize, group: usize) -> u32 {
        let (per, bits) = (self.matrix.per_word(), self.matrix.bits as usize);
        let Some(zeros) = &self.zeros else { return 1 << (bits - 1) };
        let (mask, column) = ((1_u32 << bits) - 1, r / per - self.first / per);
        match self.matrix.packing {
            Packing::Gptq { zero_offset } => (word(zeros, group * self.zero_width + column) >> (bits * (r % per)) & mask) + zero_offset,
            Packing::Awq => word(zeros, group * self.zero_width + column) >> (bits * AWQ_ORDER[r % per]) & mask,
            Packing::Rows | Packing::Bytes => word(zeros, column * self.zero_width + group) >> (bits * (r % per)) & mask,
        }
    }
}
