//! Drawing one of the likeliest tokens.

use kernels::{
    math::{exp_f32, ln_f64},
    vocab::{self, Candidate, TileSum, Total, VOCAB_TILE},
};
use plan::step::{Sampling, TokenId};

use crate::compute::Compute;

/// Candidates tried first where `top_p` alone says how many are needed.
const FIRST_TRY: usize = 128;

/// Probability of a candidate relative to the likeliest one, at `temperature`.
fn weight(logit: f32, most: f32, temperature: f32) -> f32 {
    exp_f32(((f64::from(logit) - f64::from(most)) / f64::from(temperature)) as f32)
}

/// Draws from the logits of the whole vocabulary; `None` if every one is minus infinity.
pub(super) fn from_all(compute: &Compute, logits: &[f32], s: &Sampling, uniform: f64) -> Option<TokenId> {
    let Compute { pool, isa } = compute;
    let likeliest = |k: usize| vocab::top_k(pool, *isa, logits, 0, k);
    if s.temperature <= 0.0 {
        return from_first(&likeliest(1), s, uniform);
    }
    if (1..logits.len()).contains(&(s.top_k as usize)) {
        return from_first(&likeliest(s.top_k as usize), s, uniform);
    }
    // An infinite factor would make NaN of the likeliest token's difference to itself.
    let factor = (1.0 / s.temperature).min(f32::MAX);
    let mut tiles = vec![TileSum { max: 0.0, sum: 0.0 }; logits.len().div_ceil(VOCAB_TILE)];
    vocab::tile_sums(pool, *isa, logits, factor, &mut tiles);
    let total = Total::of(&tiles, factor);
    if total.max == f32::NEG_INFINITY {
        return None;
    }
    if s.top_p < 1.0 {
        let mut k = FIRST_TRY;
        while k < logits.len() {
            if let Some(id) = from_likeliest(&likeliest(k), Some(total.sum), s, uniform) {
                return Some(id);
            }
            k *= 8;
        }
        return from_first(&likeliest(logits.len()), s, uniform);
    }
    if s.min_p > 0.0 {
        // A little more than what `min_p` keeps: the exact bound is that of `from_likeliest`.
        let least = f64::from(total.max) + f64::from(s.temperature) * (ln_f64(f64::from(s.min_p)) - 0.01);
        let kept = logits.iter().filter(|&&x| f64::from(x) >= least).count();
        return from_first(&likeliest(kept.max(1)), s, uniform);
    }
    let (tile, rest) = total.tile_at(&tiles, uniform)?;
    let rows = &logits[tile * VOCAB_TILE..];
    let row = vocab::row_at(&rows[..rows.len().min(VOCAB_TILE)], factor, rest)?;
    Some((tile * VOCAB_TILE + row) as TokenId)
}

/// Draws from the likeliest tokens, in descending order: the first at temperature 0. `None` if every logit is minus infinity.
pub(super) fn from_first(candidates: &[Candidate], s: &Sampling, uniform: f64) -> Option<TokenId> {
    let possible = candidates.iter().position(|c| c.logit == f32::NEG_INFINITY).unwrap_or(candidates.len());
    let candidates = &candidates[..possible];
    if s.temperature <= 0.0 { candidates.first().map(|c| c.id) } else { from_likeliest(candidates, None, s, uniform) }
}

/// Draws from candidates in descending order: the fewest of them that together have `top_p` of `total`, and of those the ones at least
/// `min_p` times as likely as the first. `total`, relative to the first candidate, is their own sum unless it is given.
///
/// `None` when `total` is given and the candidates do not reach `top_p` of it: more candidates are needed.
pub(super) fn from_likeliest(candidates: &[Candidate], total: Option<f64>, s: &Sampling, uniform: f64) -> Option<TokenId> {
    let &Candidate { id: first, logit: most } = candidates.first()?;
    let weights: Vec<f32> = candidates.iter().map(|c| weight(c.logit, most, s.temperature)).collect();
    let mut kept = weights.len();
    if s.top_p < 1.0 {
        let enough = f64::from(s.top_p) * total.unwrap_or_else(|| weights.iter().copied().map(f64::from).sum());
        let mut sum = 0.0;
        let reached = weights.iter().position(|&w| {
            sum += f64::from(w);
            sum >= enough
        });
        match (reached, total) {
            (Some(last), _) => kept = last + 1,
            (None, Some(_)) => return None,
            // Rounding alone can keep a sum from reaching itself.
            (None, None) => {}
        }
    }
    kept = weights[..kept].iter().position(|&w| w < s.min_p).unwrap_or(kept);
    let aim = uniform * weights[..kept].iter().copied().map(f64::from).sum::<f64>();
    let mut sum = 0.0;
    for (candidate, &w) in candidates[..kept].iter().zip(&weights) {
        sum += f64::from(w);
        if aim < sum {
            return Some(candidate.id);
        }
    }
    // Not reached while `uniform` is below 1, but for an empty set: `min_p` above 1.
    Some(candidates[..kept].last().map_or(first, |c| c.id))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(candidates: &[(TokenId, f32)]) -> Vec<Candidate> {
        candidates.iter().map(|&(id, logit)| Candidate { id, logit }).collect()
    }

    fn settings(top_p: f32, min_p: f32) -> Sampling {
        Sampling { temperature: 1.0, top_p, min_p, ..Sampling::default() }
    }

    /// Every token that some number in [0, 1) draws.
    fn support(candidates: &[Candidate], s: &Sampling) -> Vec<TokenId> {
        let mut ids: Vec<_> = (0..1000).filter_map(|i| from_likeliest(candidates, None, s, f64::from(i) / 1000.0)).collect();
        ids.dedup();
        ids
    }

    #[test]
    fn top_p_and_min_p_keep_what_they_say() {
        // Probabilities 0.5, 0.25, 0.125, 0.125.
        let ln = |p: f64| p.ln() as f32;
        let candidates = list(&[(4, ln(0.5)), (1, ln(0.25)), (2, ln(0.125)), (9, ln(0.125))]);
        assert_eq!(support(&candidates, &settings(1.0, 0.0)), [4, 1, 2, 9]);
        assert_eq!(support(&candidates, &settings(0.74, 0.0)), [4, 1]);
        assert_eq!(support(&candidates, &settings(0.8, 0.0)), [4, 1, 2]);
        assert_eq!(support(&candidates, &settings(0.0, 0.0)), [4]);
        assert_eq!(support(&candidates, &settings(1.0, 0.3)), [4, 1]);
        assert_eq!(support(&candidates, &settings(0.4, 0.3)), [4]);
        assert_eq!(support(&candidates, &settings(1.0, 2.0)), [4]);
        assert!(support(&[], &settings(1.0, 0.0)).is_empty());
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let candidates = list(&[(0, 1.0), (1, 0.0), (2, -1.0)]);
        for temperature in [0.5, 1.0, 2.0] {
            let s = Sampling { temperature, ..settings(1.0, 0.0) };
            let n = 20_000;
            let mut counts = [0; 3];
            for i in 0..n {
                counts[from_likeliest(&candidates, None, &s, f64::from(i) / f64::from(n)).unwrap() as usize] += 1;
            }
            let weights = [1.0, 0.0, -1.0_f64].map(|logit| (logit / f64::from(temperature)).exp());
            for (count, w) in counts.iter().zip(weights) {
                let (got, want) = (f64::from(*count) / f64::from(n), w / weights.iter().sum::<f64>());
                assert!((got - want).abs() < 1e-3, "at temperature {temperature}: {got}, expected {want}");
            }
        }
    }

    #[test]
    fn a_total_that_is_not_reached_asks_for_more() {
        let candidates = list(&[(0, 0.0), (1, 0.0)]);
        assert_eq!(from_likeliest(&candidates, Some(4.0), &settings(0.6, 0.0), 0.0), None);
        assert_eq!(from_likeliest(&candidates, Some(4.0), &settings(0.5, 0.0), 0.6), Some(1));
    }
}
