//! Which experts a token goes to: a softmax over their scores, and the best of them.

use crate::{
    Isa,
    math::exp,
    simd::{Kernel, LANES, Simd, vectorize},
};

/// An expert that a token was given to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The expert.
    pub expert: u32,
    /// Factor of its output.
    pub weight: f32,
}

/// Chooses `used` of `experts` experts for each token: `scores` is `[tokens, experts]`, `chosen` becomes `[tokens, used]`, the best first.
///
/// With `max` the largest score, `p[e] = e^(score[e] - max)`. The choice goes by `p`; of equal ones the lower expert comes first. A weight is
/// `p / sum`, `sum` running over all experts in 16 lanes (lane `c` adds experts `c, c + 16, …` in this order, then lanes are folded 16 → 8 → 4
/// → 2 → 1); with `normalize` it is then divided by the sum of the chosen weights, added in the order of choice.
///
/// # Panics
/// If `experts` is 0, `used` is not from 1 to `experts`, or `scores` is not whole tokens.
pub fn route(isa: Isa, scores: &[f32], experts: usize, used: usize, normalize: bool, chosen: &mut Vec<Choice>) {
    assert!((1..=experts).contains(&used), "{used} of {experts} experts");
    assert!(scores.len().is_multiple_of(experts), "{} scores are not whole tokens of {experts}", scores.len());
    chosen.clear();
    let mut p = vec![0.0; experts];
    for scores in scores.chunks_exact(experts) {
        p.copy_from_slice(scores);
        let sum = vectorize(isa, Exponentials(&mut p));
        let first = chosen.len();
        for _ in 0..used {
            let taken = &chosen[first..];
            let free = |e: &usize| taken.iter().all(|c| c.expert as usize != *e);
            let mut best = None;
            for e in (0..experts).filter(free) {
                if best.is_none_or(|b: usize| p[e] > p[b]) {
                    best = Some(e);
                }
            }
            let Some(best) = best else { break };
            chosen.push(Choice { expert: best as u32, weight: p[best] / sum });
        }
        if normalize {
            let sum = chosen[first..].iter().fold(0.0, |sum, c| sum + c.weight);
            chosen[first..].iter_mut().for_each(|c| c.weight /= sum);
        }
    }
}

/// Replaces scores by `e^(score - max)` and returns their sum.
struct Exponentials<'a>(&'a mut [f32]);

impl Kernel for Exponentials<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let max = self.0.iter().fold(f32::NEG_INFINITY, |max, &x| if x > max { x } else { max });
        let (chunks, tail) = self.0.as_chunks_mut::<LANES>();
        let max = s.splat(max);
        let mut sum = s.splat(0.0);
        for chunk in chunks {
            let p = exp(s, s.sub(s.load(chunk), max));
            s.store(chunk, p);
            sum = s.add(sum, p);
        }
        if !tail.is_empty() {
            let p = s.keep(exp(s, s.sub(s.load_part(tail), max)), s.splat(0.0), 0, tail.len());
            s.store_part(tail, p);
            sum = s.add(sum, p);
        }
        s.fold_add(sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;

    #[test]
    fn every_isa_gives_the_specified_choice() {
        for experts in [1, 4, 8, 16, 17, 60, 128] {
            let mut scores = noise(5, 9 * experts);
            scores.iter_mut().for_each(|x| *x *= 6.0);
            for used in [1, experts.div_ceil(4), experts] {
                for normalize in [false, true] {
                    let run = |isa, scores: &[f32]| {
                        let mut chosen = Vec::new();
                        route(isa, scores, experts, used, normalize, &mut chosen);
                        chosen
                    };
                    let spec = run(Isa::Scalar, &scores);
                    assert_eq!(spec.len(), 9 * used);
                    for isa in Isa::available() {
                        assert_eq!(run(isa, &scores), spec, "{isa}, {used} of {experts}");
                        assert_eq!(run(isa, &scores[3 * experts..4 * experts]), spec[3 * used..4 * used], "{isa}: one token alone");
                    }
                    for (scores, chosen) in scores.chunks(experts).zip(spec.chunks(used)) {
                        let p: Vec<f64> = scores.iter().map(|&x| f64::from(x).exp()).collect();
                        let mut order: Vec<usize> = (0..experts).collect();
                        order.sort_by(|&a, &b| p[b].total_cmp(&p[a]));
                        assert!(chosen.iter().zip(&order).all(|(c, &e)| c.expert as usize == e), "{chosen:?}");
                        let all: f64 = if normalize { order[..used].iter().map(|&e| p[e]).sum() } else { p.iter().sum() };
                        assert!(chosen.iter().all(|c| (f64::from(c.weight) - p[c.expert as usize] / all).abs() < 1e-6), "{chosen:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn of_equal_experts_the_lower_comes_first() {
        let mut chosen = Vec::new();
        route(Isa::best(), &[1.0, 3.0, 3.0, 1.0, 3.0], 5, 4, true, &mut chosen);
        assert_eq!(chosen.iter().map(|c| c.expert).collect::<Vec<_>>(), [1, 2, 4, 0]);
        assert_eq!(chosen[0].weight, chosen[2].weight);
        assert!(chosen[3].weight < chosen[0].weight);
    }
}
