//! Which bytes of which tensors a rank loads.

use std::ops::Range;

use super::output_role;
use crate::{
    model::{ModelHeader, Role, TensorId, TensorInfo},
    shard::{Splits, TensorSlice},
};

/// The slices of rank `rank` of stage `stage` of `stages`, ordered by file and offset: one for every tensor the stage uses, empty ones included.
pub(super) fn slices(
    header: &ModelHeader,
    layers: &Range<usize>,
    (stage, stages): (usize, usize),
    rank: usize,
    splits: &Splits,
) -> Vec<TensorSlice> {
    let (first, last) = (stage == 0, stage + 1 == stages);
    let output = output_role(header);
    let used = |id: &TensorId| match id.layer {
        Some(layer) => layers.contains(&(layer as usize)),
        None => match id.role {
            Role::Embedding => first || (last && output == Role::Embedding),
            Role::Output | Role::OutputNorm => last,
            _ => true,
        },
    };
    let mut slices: Vec<TensorSlice> = header
        .tensors
        .iter()
        .filter(|(id, _)| used(id))
        .map(|(id, tensor)| slice(*id, tensor, splits.rows(&header.config, id.role, rank)))
        .collect();
    slices.sort_by_key(|s| (s.tensor.file, s.bytes.start, s.id));
    slices
}

fn slice(id: TensorId, tensor: &TensorInfo, rows: Range<usize>) -> TensorSlice {
    let row_bytes = tensor.bytes / tensor.shape.first().map_or(1, |&n| n.max(1) as u64);
    let bytes = tensor.offset + rows.start as u64 * row_bytes..tensor.offset + rows.end as u64 * row_bytes;
    TensorSlice { id, tensor: tensor.clone(), rows, bytes }
}
