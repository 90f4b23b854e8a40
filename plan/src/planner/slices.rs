//! Which bytes of which tensors a rank loads.

use std::ops::Range;

use super::output_role;
use crate::{
    model::{ModelHeader, Role, TensorId},
    shard::{Splits, TensorSlice},
};

/// The slices of rank `rank` of stage `stage` of `stages`, ordered by file and offset: one for every tensor the stage uses, empty ones included,
/// but no experts of other ranks.
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
            Role::Positions | Role::TokenTypes | Role::EmbeddingNorm | Role::EmbeddingNormBias => first,
            Role::Output | Role::OutputNorm | Role::OutputNormBias => last,
            Role::Pooler | Role::PoolerBias | Role::Classifier | Role::ClassifierBias => last,
            _ => true,
        },
    };
    let mut slices: Vec<TensorSlice> = header
        .tensors
        .iter()
        .filter(|(id, _)| used(id))
        .map(|(id, tensor)| TensorSlice::new(*id, tensor, splits.held(&header.config, id.role, rank, first)))
        .filter(|slice| !(slice.is_empty() && slice.id.role.expert().is_some()))
        .collect();
    slices.sort_by_key(|s| (s.tensor.file, s.bytes.start, s.id));
    slices
}
