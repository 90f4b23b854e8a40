//! The vocabulary product where no more than the likeliest tokens are wanted: a copy in 4 bits says which rows may be theirs, and those alone are
//! multiplied exactly.
//!
//! A step of one sequence reads every weight, and the vocabulary is often most of them; the copy is half of 8 bits. That the likeliest tokens of
//! the product are among many likeliest of the copy is known from trials alone (`docs/adr/0039-screening.md`), so a model is screened only
//! where that was asked for, and some products are compared with the whole.

use kernels::{Matrix, WeightType, convert_matrix, vocab};
use plan::{model::TensorId, shard};

use super::{
    input::Inputs,
    weights::{Weights, weight_type},
};
use crate::{LoadShardError, compute::Compute, timings::Timings};

/// Most of the likeliest tokens that are looked for in this way.
const MOST: usize = 40;
/// Rows of each token that are multiplied exactly: at least so many, and so many for each of the likeliest that is wanted.
const CANDIDATES: usize = 256;
const CANDIDATES_EACH: usize = 32;
/// Most tokens at once: with more, products take longer than reading does, and the copy saves nothing.
const TOKENS: usize = 3;
/// One of so many products is compared with the whole.
const CHECKED: u64 = 256;

/// The copy.
#[derive(Debug)]
pub(super) struct Screen(Matrix);

/// What is multiplied.
#[derive(Clone, Copy)]
pub(super) struct Screened<'a> {
    /// `[tokens, hidden]`.
    pub(super) states: &'a [f32],
    pub(super) tokens: usize,
    /// The vocabulary.
    pub(super) matrix: (TensorId, &'a Matrix),
    /// Rows of it, from its first.
    pub(super) rows: usize,
}

impl Screen {
    /// Of the first `rows` rows of the vocabulary.
    pub(super) fn of(weights: &Weights, rows: usize, compute: &Compute) -> Result<Option<Self>, LoadShardError> {
        let Some((id, matrix)) = weights.vocabulary() else { return Ok(None) };
        let to: WeightType = weight_type(shard::SCREEN);
        let copy = convert_matrix(&compute.pool, compute.isa, matrix, 0..rows, to);
        let failed = |error: kernels::ConvertError| LoadShardError::Pack { name: format!("{:?}", id.role), detail: error.to_string() };
        copy.map(|copy| Some(Self(copy))).map_err(failed)
    }

    /// Whether products of so many tokens are screened, where so many of the likeliest are wanted.
    pub(super) fn takes(tokens: usize, count: usize) -> bool {
        tokens <= TOKENS && count <= MOST
    }

    /// Fills `logits`, `[tokens, rows]`: of each token `count` of the likeliest, and others; the rest is minus infinity.
    pub(super) fn product(
        &self,
        compute: &Compute,
        inputs: &mut Inputs,
        of: Screened<'_>,
        count: usize,
        logits: &mut [f32],
        timings: &mut Timings,
    ) {
        let Screened { states, tokens, matrix: (id, matrix), rows } = of;
        inputs.multiply_first(compute, states, tokens, (id, &self.0), rows, logits);
        let likeliest = |logits: &[f32], count: usize| {
            let found = logits.chunks_exact(rows).flat_map(|logits| vocab::top_k(&compute.pool, compute.isa, logits, 0, count));
            found.map(|candidate| candidate.id as usize).collect::<Vec<_>>()
        };
        let mut candidates = likeliest(logits, CANDIDATES.max(CANDIDATES_EACH * count));
        candidates.sort_unstable();
        candidates.dedup();
        timings.screened += 1;
        if timings.screened.is_multiple_of(CHECKED) {
            inputs.multiply_first(compute, states, tokens, (id, matrix), rows, logits);
            let lacks = likeliest(logits, count).iter().any(|row| candidates.binary_search(row).is_err());
            timings.screens_checked += 1;
            timings.screens_missed += u64::from(lacks);
            return;
        }
        logits.fill(f32::NEG_INFINITY);
        inputs.multiply_rows(compute, states, tokens, (id, matrix), (&candidates, rows), logits);
    }
}
