//! A tensor's values, read in pieces, in the order, form and type in which another file has them.

use std::ops::Range;

use anyhow::Context;
use kernels::{Pool, convert_rows, dequantize_rows};
use plan::{
    dtype::DType,
    header::{Made, Part},
    model::{ModelHeader, TensorInfo},
};
use source::Source;

use super::{resolve, weight_type};
use crate::{
    exit::{BadInput, Outcome},
    importance::Importance,
};

/// Most bytes read at a time, unless one head of rows is longer.
const PIECE: usize = 16 << 20;

/// Reads tensors.
pub(super) struct Rows<'a> {
    pub(super) source: &'a Source,
    pub(super) header: &'a ModelHeader,
    pub(super) pool: Pool,
    pub(super) importance: Option<&'a Importance>,
}

impl Rows<'_> {
    /// Hands the bytes of `made` in type `to` to `out`, in order.
    pub(super) fn stream(&self, made: &Made, to: DType, out: &mut dyn FnMut(&[u8]) -> Outcome) -> Outcome {
        if !made.columns {
            return made.parts.iter().try_for_each(|part| self.part(made, part, to, out));
        }
        // Columns of all parts lie side by side, so each part is needed whole.
        let (element, rows) = (to.block_bytes(), made.shape[1]);
        let mut whole = Vec::with_capacity(made.shape[0] * rows * element);
        for part in &made.parts {
            self.part(made, part, to, &mut |bytes| {
                whole.extend_from_slice(bytes);
                Ok(())
            })?;
        }
        let width = made.shape[0] * element;
        let mut turned = Vec::with_capacity(PIECE.min(whole.len()));
        for column in 0..made.shape[0] {
            turned.extend(whole.chunks_exact(width).flat_map(|row| &row[column * element..(column + 1) * element]));
            if turned.len() >= PIECE {
                out(&turned)?;
                turned.clear();
            }
        }
        out(&turned)
    }

    /// Hands the rows of one part to `out`.
    fn part(&self, made: &Made, part: &Part, to: DType, out: &mut dyn FnMut(&[u8]) -> Outcome) -> Outcome {
        let Some(tensor) = self.header.tensors.get(&part.id) else {
            let values = resolve::divisors(self.header, part.id.role);
            let values = values.with_context(|| format!("tensor {} has no source", made.name))?;
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            return self.converted(made, part, (DType::F32, to), 1, &bytes, out);
        };
        let (rows, k) = (tensor.shape[0], tensor.shape.get(1).copied().unwrap_or(1));
        let stored = tensor.stored_type();
        let row = stored.row_bytes(k).filter(|&b| b > 0).with_context(|| format!("rows of tensor {} are not whole blocks", tensor.name))?;
        // Rows change places within a head.
        let head = part.turn.map_or(1, |turn| turn.head_dim);
        let piece = (PIECE / row / head).max(1) * head;
        let mut bytes = Vec::new();
        for first in (0..rows).step_by(piece) {
            let range = first..rows.min(first + piece);
            self.read(tensor, (range.clone(), k, row), &mut bytes)?;
            if let Some(turn) = part.turn {
                let turned = range.clone().flat_map(|to| &bytes[(turn.source(to) - first) * row..][..row]).copied().collect();
                bytes = turned;
            }
            if part.add != 0.0 {
                let mut values = dequantize_rows(weight_type(stored)?, k, &bytes);
                values.iter_mut().for_each(|v| *v += part.add);
                let sums: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                self.converted(made, part, (DType::F32, to), k, &sums, out)?;
            } else {
                self.converted(made, part, (stored, to), k, &bytes, out)?;
            }
        }
        Ok(())
    }

    fn converted(
        &self,
        made: &Made,
        part: &Part,
        (from, to): (DType, DType),
        k: usize,
        bytes: &[u8],
        out: &mut dyn FnMut(&[u8]) -> Outcome,
    ) -> Outcome {
        if from == to {
            return out(bytes);
        }
        let importance = self.importance.and_then(|given| given.columns.get(&part.id)).map(Vec::as_slice);
        let rows = convert_rows(&self.pool, (weight_type(from)?, weight_type(to)?), k, bytes, importance);
        out(&rows.with_context(|| format!("tensor {} cannot be converted", made.name)).bad_input()?)
    }

    /// Some rows of a tensor, row by row.
    fn read(&self, tensor: &TensorInfo, (rows, k, row): (Range<usize>, usize, usize), into: &mut Vec<u8>) -> Outcome {
        let Some(stride) = tensor.column_stride else {
            into.resize(rows.len() * row, 0);
            let start = tensor.offset + (rows.start * row) as u64;
            return self.source.read(tensor.file, start..start + into.len() as u64, into).bad_input();
        };
        let element = tensor.stored_type().block_bytes();
        let part = rows.len() * element;
        let mut columns = vec![0; part * k];
        let start = tensor.offset + (rows.start * element) as u64;
        for (column, bytes) in (0_u64..).zip(columns.chunks_exact_mut(part)) {
            let start = start + column * stride;
            self.source.read(tensor.file, start..start + part as u64, bytes).bad_input()?;
        }
        into.clear();
        for at in 0..rows.len() {
            into.extend(columns.chunks_exact(part).flat_map(|column| &column[at * element..(at + 1) * element]));
        }
        Ok(())
    }
}
