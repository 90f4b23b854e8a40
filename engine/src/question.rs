//! What is needed of a vocabulary product, and what is found in it: by this stage, or by the first, which is asked where the product is spread
//! over both.

use std::ops::Range;

use kernels::vocab::{Candidate, TileSum, VOCAB_TILE};
use plan::step::TokenId;

/// States whose logits are wanted, in a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Question {
    /// The step.
    pub step: u64,
    /// What is needed of each row.
    pub needs: Vec<Need>,
    /// Normed states, `[rows, hidden]`.
    pub states: Vec<f32>,
}

/// What is needed of a row of logits; every rank of the last stage comes to the same answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Need {
    /// All logits.
    pub whole: bool,
    /// The softmax sum.
    pub total: bool,
    /// So many of the likeliest.
    pub top: usize,
    /// Tokens whose logits are needed.
    pub targets: Vec<TokenId>,
    /// Nothing but the targets' logits is needed, not even whether the others are finite.
    pub sparse: bool,
    /// Nothing but this draw from all logits is needed; among ranks of a stage it has exchanges of its own.
    pub draw: Option<Draw>,
}

/// A draw from all logits as they are, at a temperature.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Inverse of the temperature.
    pub factor: f32,
    /// Where it falls, in `0 .. 1` of the softmax sum.
    pub uniform: f64,
}

impl Need {
    /// The same where there are no exchanges for draws: all logits.
    pub(crate) fn without_draw(self) -> Self {
        Self { whole: self.whole || self.draw.is_some(), draw: None, ..self }
    }

    /// Bytes that whoever multiplies `rows` rows of the vocabulary hands over.
    fn bytes(&self, rows: usize) -> usize {
        if self.whole {
            return 4 * rows;
        }
        if self.draw.is_some() {
            return 0;
        }
        let sums = if self.total { 8 * rows.div_ceil(VOCAB_TILE) } else { 4 };
        sums + 8 * self.top.min(rows) + 4 * self.targets.len()
    }
}

/// Bytes of the part of whoever multiplies `rows` of the vocabulary; nobody hands over anything of no rows.
pub fn part_bytes(needs: &[Need], rows: &Range<usize>) -> usize {
    if rows.is_empty() { 0 } else { needs.iter().map(|need| need.bytes(rows.len())).sum() }
}

/// What was found in a row of logits: of the whole vocabulary, or of a part of its rows.
#[derive(Debug, Default)]
pub(crate) struct Row<'a> {
    /// All of them; empty where the rest is enough.
    pub(crate) logits: &'a [f32],
    /// Parts of the softmax sum; none where it is not needed. At the factor of the draw, where there is one.
    pub(crate) tiles: Vec<TileSum>,
    /// Whether a logit is NaN or infinity: the softmax sum is not a number then.
    pub(crate) broken: bool,
    /// The likeliest, in order.
    pub(crate) likeliest: Vec<Candidate>,
    /// Logit of each token of [`Need::targets`]; 0 where that is in another part.
    pub(crate) targets: Vec<f32>,
}

/// Which rows of the vocabulary are multiplied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Of {
    /// All.
    All,
    /// These of a rank's, counted from its first, ascending.
    Rows(Vec<usize>),
    /// Those that may be of so many of the likeliest tokens.
    Likeliest(usize),
}

/// Which of the vocabulary rows `own` these need.
pub(crate) fn wanted(needs: &[Need], own: &Range<usize>) -> Of {
    let top = |need: &Need| {
        let more = need.whole || need.total || need.sparse || need.draw.is_some() || !need.targets.is_empty();
        Some(need.top).filter(|&top| !more && top > 0)
    };
    let likeliest = || needs.iter().map(top).collect::<Option<Vec<_>>>()?.into_iter().max();
    match few_rows(needs, own) {
        Some(rows) => Of::Rows(rows),
        None => likeliest().map_or(Of::All, Of::Likeliest),
    }
}

/// The vocabulary rows of `own` that any of these needs, counted from its first, where none needs more than a few.
fn few_rows(needs: &[Need], own: &Range<usize>) -> Option<Vec<usize>> {
    if needs.is_empty() || !needs.iter().all(|need| need.sparse) {
        return None;
    }
    let ids = needs.iter().flat_map(|need| &need.targets).map(|&id| id as usize).filter(|id| own.contains(id));
    let mut rows: Vec<usize> = ids.map(|id| id - own.start).collect();
    rows.sort_unstable();
    rows.dedup();
    Some(rows)
}
