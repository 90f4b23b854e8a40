//! The likeliest tokens.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use super::VOCAB_TILE;
use crate::{
    Isa, Pool,
    simd::{Kernel, LANES, Simd, vectorize},
};

/// A row of the vocabulary and its logit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Row.
    pub id: u32,
    /// Its logit.
    pub logit: f32,
}

impl Candidate {
    /// Which of two comes first: the larger logit, at a tie (0 and -0 are one) the lower id. NaN comes last, as minus infinity does.
    pub fn order(&self, other: &Self) -> Ordering {
        let value = |x: f32| if x.is_nan() { f32::NEG_INFINITY } else { x + 0.0 };
        value(other.logit).total_cmp(&value(self.logit)).then(self.id.cmp(&other.id))
    }
}

/// The `k` first of `logits` by [`Candidate::order`], in that order; the id of `logits[0]` is `first_id`. Fewer if there are not so many.
pub fn top_k(pool: &Pool, isa: Isa, logits: &[f32], first_id: u32, k: usize) -> Vec<Candidate> {
    let mut parts: Vec<(usize, &[f32], Vec<Candidate>)> = (0..pool.threads())
        .map(|part| crate::split(logits.len(), pool.threads(), part, VOCAB_TILE))
        .map(|rows| (rows.start, &logits[rows], Vec::new()))
        .collect();
    pool.for_each(&mut parts, |(first, logits, found)| {
        let mut likeliest = Likeliest::new(k);
        likeliest.look(isa, logits, first_id + *first as u32);
        *found = likeliest.found();
    });
    merge_top_k(parts.into_iter().map(|(.., found)| found), k)
}

/// The first of `logits` by [`Candidate::order`]; `None` of none.
pub fn argmax(pool: &Pool, isa: Isa, logits: &[f32], first_id: u32) -> Option<Candidate> {
    top_k(pool, isa, logits, first_id, 1).pop()
}

/// The `k` first of several lists by [`Candidate::order`], in that order.
pub fn merge_top_k(lists: impl IntoIterator<Item = Vec<Candidate>>, k: usize) -> Vec<Candidate> {
    let mut all: Vec<Candidate> = lists.into_iter().flatten().collect();
    all.sort_unstable_by(Candidate::order);
    all.truncate(k);
    all
}

/// A candidate in a heap, the last one on top.
#[derive(Clone, Copy, Debug)]
struct Kept(Candidate);

impl Ord for Kept {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.order(&other.0)
    }
}
impl PartialOrd for Kept {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Kept {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for Kept {}

/// The first by [`Candidate::order`] of logits that come in any order of their rows.
#[derive(Debug)]
pub(super) struct Likeliest {
    most: usize,
    kept: BinaryHeap<Kept>,
}

impl Likeliest {
    /// The first `most`.
    pub(super) fn new(most: usize) -> Self {
        Self { most, kept: BinaryHeap::new() }
    }

    /// Looks at `logits`, whose first is of row `first_id`.
    pub(super) fn look(&mut self, isa: Isa, logits: &[f32], first_id: u32) {
        if self.most > 0 {
            vectorize(isa, Look { of: self, logits, first_id });
        }
    }

    /// Those that were found, in their order.
    pub(super) fn found(self) -> Vec<Candidate> {
        self.kept.into_sorted_vec().into_iter().map(|Kept(candidate)| candidate).collect()
    }

    /// What a logit of a row from `id` on has to be above, to come before the last of those kept; minus infinity, NaN where every logit may.
    fn bar(&self, id: u32) -> f32 {
        match self.kept.peek() {
            Some(Kept(last)) if last.logit > f32::NEG_INFINITY => {
                // Of equal logits the lower row comes first.
                if id > last.id { last.logit } else { last.logit.next_down() }
            }
            _ => f32::NAN,
        }
    }

    fn insert(&mut self, candidate: Candidate) {
        if self.kept.len() < self.most {
            self.kept.push(Kept(candidate));
        } else if let Some(mut last) = self.kept.peek_mut()
            && candidate.order(&last.0).is_lt()
        {
            *last = Kept(candidate);
        }
    }
}

struct Look<'a> {
    of: &'a mut Likeliest,
    logits: &'a [f32],
    first_id: u32,
}

impl Kernel for Look<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { of, logits, first_id } = self;
        let candidate = |i: usize| Candidate { id: first_id + i as u32, logit: logits[i] };
        let begin = (of.most - of.kept.len()).min(logits.len());
        for i in 0..begin {
            of.insert(candidate(i));
        }
        let mut bar = of.bar(first_id + begin as u32);
        let (chunks, tail) = logits[begin..].as_chunks::<LANES>();
        for (n, chunk) in chunks.iter().enumerate() {
            let mut above = if bar.is_nan() { u16::MAX } else { s.above(s.load(chunk), s.splat(bar)) };
            while above != 0 {
                let i = begin + n * LANES + above.trailing_zeros() as usize;
                of.insert(candidate(i));
                bar = of.bar(first_id + i as u32 + 1);
                above &= above - 1;
            }
        }
        for i in logits.len() - tail.len()..logits.len() {
            of.insert(candidate(i));
        }
    }
}
