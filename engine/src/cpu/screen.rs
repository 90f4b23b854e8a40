//! The vocabulary product where no more than the likeliest tokens are wanted: a copy in 4 bits says which rows may be theirs, and those alone are
//! multiplied exactly.
//!
//! A step of one sequence reads every weight, and the vocabulary is often most of them; the copy is half of 8 bits. That the likeliest tokens of
//! the product are among many likeliest of the copy is known from trials alone (`docs/adr/0039-screening.md`), so a model is screened only
//! where that was asked for, and some products are compared with the whole.

use kernels::{
    Matrix, WeightType, convert_matrix,
    vocab::{Candidate, Found, Wanted, merge_top_k},
};
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
    /// Rows of it, from its first, and the token of that.
    pub(super) rows: (usize, u32),
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

    /// Of each token `count` of the likeliest.
    pub(super) fn product(
        &self,
        compute: &Compute,
        inputs: &mut Inputs,
        of: Screened<'_>,
        count: usize,
        timings: &mut Timings,
    ) -> Vec<Found> {
        let Screened { states, tokens, matrix: (id, matrix), rows } = of;
        let mut likeliest = |matrix: &Matrix, top: usize| {
            let wanted = vec![Wanted { top, ..Wanted::default() }; tokens];
            inputs.vocabulary(compute, states, (id, matrix), rows, &wanted, &mut [])
        };
        let ids = |found: &[Found]| found.iter().flat_map(|found| &found.likeliest).map(|candidate| candidate.id).collect::<Vec<_>>();
        let mut candidates = ids(&likeliest(&self.0, CANDIDATES.max(CANDIDATES_EACH * count)));
        candidates.sort_unstable();
        candidates.dedup();
        timings.screened += 1;
        if timings.screened.is_multiple_of(CHECKED) {
            let found = likeliest(matrix, count);
            timings.screens_checked += 1;
            timings.screens_missed += u64::from(ids(&found).iter().any(|id| candidates.binary_search(id).is_err()));
            return found;
        }
        let only: Vec<usize> = candidates.iter().map(|id| (id - rows.1) as usize).collect();
        let logits = inputs.multiply_rows(compute, states, tokens, (id, matrix), &only);
        let of_token = |logits: &[f32]| {
            let all = candidates.iter().zip(logits).map(|(&id, &logit)| Candidate { id, logit });
            Found {
                tiles: Vec::new(),
                bounded: logits.iter().all(|&logit| logit < f32::INFINITY),
                likeliest: merge_top_k([all.collect()], count),
                logits: Vec::new(),
            }
        };
        logits.chunks_exact(candidates.len()).map(of_token).collect()
    }
}
