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
    let head_dim = header.config.head_dim;
    let mut slices: Vec<TensorSlice> = header
        .tensors
        .iter()
        .filter(|(id, _)| used(id))
        .map(|(id, tensor)| slice(*id, tensor, rows(id.role, tensor, rank, splits, head_dim)))
        .collect();
    slices.sort_by_key(|s| (s.tensor.file, s.bytes.start, s.id));
    slices
}

/// Rows of a tensor that a rank owns.
fn rows(role: Role, tensor: &TensorInfo, rank: usize, splits: &Splits, head_dim: usize) -> Range<usize> {
    let of = |ranges: &[Range<usize>], unit: usize| ranges.get(rank).map_or(0..0, |r| r.start * unit..r.end * unit);
    match role {
        Role::Embedding | Role::Output => of(&splits.vocab, 1),
        Role::Q | Role::QBias => of(&splits.heads, head_dim),
        Role::K | Role::KBias | Role::V | Role::VBias => of(&splits.kv_heads, head_dim),
        Role::O | Role::OBias | Role::Down | Role::DownBias => of(&splits.hidden, 1),
        Role::Gate | Role::GateBias | Role::Up | Role::UpBias => of(&splits.ffn, 1),
        Role::RopeFactors
        | Role::AttnNorm
        | Role::QNorm
        | Role::KNorm
        | Role::PostAttnNorm
        | Role::FfnNorm
        | Role::PostFfnNorm
        | Role::OutputNorm => 0..tensor.shape.first().copied().unwrap_or(0),
    }
}

fn slice(id: TensorId, tensor: &TensorInfo, rows: Range<usize>) -> TensorSlice {
    let row_bytes = tensor.bytes / tensor.shape.first().map_or(1, |&n| n.max(1) as u64);
    let bytes = tensor.offset + rows.start as u64 * row_bytes..tensor.offset + rows.end as u64 * row_bytes;
    TensorSlice { id, tensor: tensor.clone(), rows, bytes }
}
