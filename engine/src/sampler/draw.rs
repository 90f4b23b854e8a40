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

/// The inverse of the temperature: an infinite one would make NaN of the likeliest token's difference to itself.
pub(super) fn factor(s: &Sampling) -> f32 {
    (1.0 / s.temperature).min(f32::MAX)
}

/// Whether a draw at a temperature leaves no token out.
pub(super) fn is_plain(s: &Sampling, vocab: usize) -> bool {
    s.temperature > 0.0 && !(1..vocab).contains(&(s.top_k as usize)) && s.top_p >= 1.0 && s.min_p <= 0.0
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
    let factor = factor(s);
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

    /// Probabilities of what settings leave, computed the obvious way in f64.
    fn expected(logits: &[f32], s: &Sampling) -> Vec<f64> {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        if s.top_k > 0 {
            order.truncate(s.top_k as usize);
        }
        let weight = |i: usize| ((f64::from(logits[i]) - f64::from(logits[order[0]])) / f64::from(s.temperature)).exp();
        let total: f64 = order.iter().map(|&i| weight(i)).sum();
        let mut sum = 0.0;
        let kept = order.iter().position(|&i| {
            sum += weight(i);
            sum >= f64::from(s.top_p) * total
        });
        let kept: Vec<usize> =
            order[..kept.map_or(order.len(), |k| k + 1)].iter().copied().filter(|&i| weight(i) >= s.min_p.into()).collect();
        let total: f64 = kept.iter().map(|&i| weight(i)).sum();
        let mut probabilities = vec![0.0; logits.len()];
        kept.iter().for_each(|&i| probabilities[i] = weight(i) / total);
        probabilities
    }

    #[test]
    fn draws_from_a_whole_vocabulary_follow_the_settings() {
        // Three tiles, the last one short; a few likely tokens in each, ties among them, and some that cannot come.
        let mut logits: Vec<f32> = (0..2500).map(|i| (i * 7919 % 2503) as f32 / 250.0 - 5.0).collect();
        logits[100..120].fill(f32::NEG_INFINITY);
        for (i, x) in [(3, 9.0), (1023, 9.0), (1024, 8.5), (2047, 7.0), (2499, 9.5)] {
            logits[i] = x;
        }
        let base = Sampling { temperature: 1.0, ..Sampling::default() };
        let all = [
            base.clone(),
            Sampling { temperature: 0.5, ..base.clone() },
            Sampling { temperature: 2.5, ..base.clone() },
            Sampling { top_k: 4, ..base.clone() },
            Sampling { top_k: 2500, ..base.clone() },
            Sampling { top_p: 0.6, ..base.clone() },
            Sampling { top_p: 0.97, temperature: 2.0, ..base.clone() },
            Sampling { min_p: 0.5, ..base.clone() },
            Sampling { min_p: 1e-3, temperature: 2.0, ..base.clone() },
            Sampling { top_k: 40, top_p: 0.9, min_p: 0.05, ..base },
        ];
        let compute = Compute { pool: std::sync::Arc::new(kernels::Pool::new(1)), isa: kernels::Isa::best() };
        let n = 2000;
        let mut found = Vec::new();
        for (at, s) in all.iter().enumerate() {
            let expected = expected(&logits, s);
            let mut counts = vec![0.0; logits.len()];
            for i in 0..n {
                let id = from_all(&compute, &logits, s, (f64::from(i) + 0.5) / f64::from(n)).expect("a token");
                counts[id as usize] += 1.0 / f64::from(n);
            }
            // Evenly spread numbers hit every token as often as its probability says, but for one draw at each end.
            for (id, (got, want)) in counts.iter().zip(&expected).enumerate() {
                assert!((got - want).abs() <= 1.01 / f64::from(n) + 1e-5, "settings {at}, token {id}: {got}, expected {want}");
            }
            assert!(expected.iter().zip(&counts).all(|(&e, &c)| e > 0.0 || c == 0.0), "settings {at}: a token that was left out came");
            found.push(counts);
        }
        // Control: the settings differ in what they draw, but for a top_k as large as the vocabulary.
        for (i, a) in found.iter().enumerate() {
            for (j, b) in found.iter().enumerate().skip(i + 1) {
                assert_eq!(a == b, (i, j) == (0, 4), "settings {i} and {j}");
            }
        }
    }

    #[test]
    fn extremes_draw_a_token_or_say_that_there_is_none() {
        let compute = Compute { pool: std::sync::Arc::new(kernels::Pool::new(1)), isa: kernels::Isa::best() };
        let none = vec![f32::NEG_INFINITY; 1500];
        let mut one = none.clone();
        one[1400] = -1e30;
        let settings =
            [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (1.0, 3, 1.0, 0.0), (1.0, 0, 0.5, 0.0), (1.0, 0, 1.0, 0.5), (1e-40, 0, 0.9, 0.0)];
        for (temperature, top_k, top_p, min_p) in settings {
            let s = Sampling { temperature, top_k, top_p, min_p, ..Sampling::default() };
            for uniform in [0.0, 0.5, 1.0 - f64::EPSILON / 2.0] {
                assert_eq!(from_all(&compute, &none, &s, uniform), None, "{s:?}");
                assert_eq!(from_all(&compute, &one, &s, uniform), Some(1400), "{s:?}");
            }
        }
        // Equal logits: the lower id at temperature 0, the first and the last at the ends of a draw.
        let flat = vec![2.0; 1500];
        let s = Sampling { temperature: 1.0, ..Sampling::default() };
        assert_eq!(from_all(&compute, &flat, &Sampling::default(), 0.9), Some(0));
        assert_eq!(from_all(&compute, &flat, &s, 0.0), Some(0));
        assert_eq!(from_all(&compute, &flat, &s, 1.0 - f64::EPSILON / 2.0), Some(1499));
    }
}
