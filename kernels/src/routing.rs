//! Which experts a token goes to: the best by a softmax over their scores, or by sigmoids of them, of all or of some groups.

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

/// How experts are chosen.
#[derive(Clone, Copy, Debug)]
pub struct Routing<'a> {
    /// Number of experts.
    pub experts: usize,
    /// Experts of each token.
    pub used: usize,
    /// What scores are made into.
    pub scoring: Scoring<'a>,
    /// The choice is among the experts of some groups.
    pub groups: Option<Groups>,
    /// Weights are divided by their sum.
    pub normalize: bool,
    /// Factor of the weights.
    pub scale: f32,
}

/// What scores are made into.
#[derive(Clone, Copy, Debug)]
pub enum Scoring<'a> {
    /// Their softmax.
    Softmax,
    /// `1 / (1 + e^-x)`; the choice goes by these plus a bias of each expert.
    Sigmoid(&'a [f32]),
}

/// Groups of experts that follow each other, all of the same size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// Number of groups.
    pub count: usize,
    /// Groups of each token.
    pub used: usize,
    /// The score of a group is the sum over so many of its best experts: 1 or 2.
    pub best: usize,
}

/// What is added to the sum of sigmoid weights before they are divided by it, as DeepSeek's models do.
const SUM_EPS: f32 = 1e-20;

/// Chooses experts for each token: `scores` is `[tokens, experts]`, `chosen` becomes `[tokens, used]`, the best first.
///
/// Each expert has a value `p` and one that the choice goes by, `c`; of equal ones the lower expert, or group, comes first. With groups, only
/// experts of the `used` best ones are chosen.
/// - Softmax: with `max` the largest score, `p[e] = e^(score[e] - max)`, `c = p`. A weight is `p / sum`, `sum` running over all experts in
///   16 lanes (lane `c` adds experts `c, c + 16, …` in this order, then lanes are folded 16 → 8 → 4 → 2 → 1).
/// - Sigmoid: `p[e] = 1 / (1 + e^-score[e])`, `c = p + bias`. A weight is `p`.
///
/// With `normalize` a weight is then divided by the sum of the chosen weights, added in the order of choice (and 1e-20, for a sigmoid); at
/// last it is multiplied by `scale`.
///
/// # Panics
/// If `experts` is 0, `used` is not from 1 to `experts`, `scores` is not whole tokens, there are more or fewer biases than experts, or groups
/// are not all of one size of at least `best`, or hold fewer than `used` experts.
pub fn route(isa: Isa, routing: &Routing<'_>, scores: &[f32], chosen: &mut Vec<Choice>) {
    let Routing { experts, used, scoring, groups, normalize, scale } = *routing;
    assert!((1..=experts).contains(&used), "{used} of {experts} experts");
    assert!(scores.len().is_multiple_of(experts), "{} scores are not whole tokens of {experts}", scores.len());
    if let Some(g) = groups {
        let whole = (1..=g.count).contains(&g.used) && experts.is_multiple_of(g.count) && (1..=2).contains(&g.best);
        assert!(whole && experts / g.count >= g.best && g.used * (experts / g.count) >= used, "{g:?} of {experts} experts, {used} used");
    }
    chosen.clear();
    let (mut p, mut by) = (vec![0.0; experts], vec![0.0; experts]);
    for scores in scores.chunks_exact(experts) {
        p.copy_from_slice(scores);
        let (sum, eps) = match scoring {
            Scoring::Softmax => {
                let sum = vectorize(isa, Exponentials(&mut p));
                by.copy_from_slice(&p);
                (sum, 0.0)
            }
            Scoring::Sigmoid(bias) => {
                assert_eq!(bias.len(), experts, "biases of {experts} experts");
                vectorize(isa, Sigmoids(&mut p));
                by.iter_mut().zip(&p).zip(bias).for_each(|((by, p), bias)| *by = p + bias);
                (1.0, SUM_EPS)
            }
        };
        let open = groups.map(|groups| best_groups(groups, &by));
        let size = groups.map_or(experts, |g| experts / g.count);
        let first = chosen.len();
        for _ in 0..used {
            let taken = &chosen[first..];
            let free =
                |e: usize| taken.iter().all(|c| c.expert as usize != e) && open.as_ref().is_none_or(|open| open.contains(&(e / size)));
            let Some(best) = largest(experts, free, |e| by[e]) else { break };
            chosen.push(Choice { expert: best as u32, weight: p[best] / sum });
        }
        if normalize {
            let sum = chosen[first..].iter().fold(0.0, |sum, c| sum + c.weight) + eps;
            chosen[first..].iter_mut().for_each(|c| c.weight /= sum);
        }
        chosen[first..].iter_mut().for_each(|c| c.weight *= scale);
    }
}

/// The groups of which experts may be chosen.
fn best_groups(groups: Groups, by: &[f32]) -> Vec<usize> {
    let size = by.len() / groups.count;
    let scores: Vec<f32> = by
        .chunks_exact(size)
        .map(|group| {
            let best = largest(size, |_| true, |e| group[e]).unwrap_or(0);
            match groups.best {
                1 => group[best],
                _ => group[best] + largest(size, |e| e != best, |e| group[e]).map_or(0.0, |second| group[second]),
            }
        })
        .collect();
    let mut open = Vec::with_capacity(groups.used);
    for _ in 0..groups.used {
        open.extend(largest(groups.count, |g| !open.contains(&g), |g| scores[g]));
    }
    open
}

/// Which of the numbers below `count` that are `free` has the largest value; of equal ones the lower.
fn largest(count: usize, free: impl Fn(usize) -> bool, value: impl Fn(usize) -> f32) -> Option<usize> {
    let mut best = None;
    for at in (0..count).filter(|&at| free(at)) {
        if best.is_none_or(|best: usize| value(at) > value(best)) {
            best = Some(at);
        }
    }
    best
}

/// Replaces scores by `1 / (1 + e^-score)`.
struct Sigmoids<'a>(&'a mut [f32]);

impl Kernel for Sigmoids<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (chunks, tail) = self.0.as_chunks_mut::<LANES>();
        for chunk in chunks {
            let p = sigmoid(s, s.load(chunk));
            s.store(chunk, p);
        }
        if !tail.is_empty() {
            let p = sigmoid(s, s.load_part(tail));
            s.store_part(tail, p);
        }
    }
}

#[inline(always)]
fn sigmoid<S: Simd>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), x))))
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

    fn softmax(experts: usize, used: usize, normalize: bool) -> Routing<'static> {
        Routing { experts, used, scoring: Scoring::Softmax, groups: None, normalize, scale: 1.0 }
    }

    fn run(isa: Isa, routing: &Routing<'_>, scores: &[f32]) -> Vec<Choice> {
        let mut chosen = Vec::new();
        route(isa, routing, scores, &mut chosen);
        chosen
    }

    /// The choice for one token as a textbook has it, in f64: experts and weights.
    fn textbook(routing: &Routing<'_>, scores: &[f32]) -> Vec<(usize, f64)> {
        let Routing { experts, used, scoring, groups, normalize, scale } = *routing;
        let raw = scores.iter().map(|&x| f64::from(x));
        let (p, by): (Vec<f64>, Vec<f64>) = match scoring {
            Scoring::Softmax => {
                let e: Vec<f64> = raw.map(f64::exp).collect();
                let p: Vec<f64> = e.iter().map(|x| x / e.iter().sum::<f64>()).collect();
                (p.clone(), p)
            }
            Scoring::Sigmoid(bias) => {
                raw.zip(bias).map(|(x, &b)| (1.0 / (1.0 + (-x).exp()), b)).map(|(p, b)| (p, p + f64::from(b))).unzip()
            }
        };
        let mut order: Vec<usize> = (0..experts).collect();
        if let Some(g) = groups {
            let size = experts / g.count;
            let score = |group: usize| {
                let mut of: Vec<f64> = by[group * size..(group + 1) * size].to_vec();
                of.sort_by(|a, b| b.total_cmp(a));
                of[..g.best].iter().sum::<f64>()
            };
            let mut ranked: Vec<usize> = (0..g.count).collect();
            ranked.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
            order.retain(|e| ranked[..g.used].contains(&(e / size)));
        }
        order.sort_by(|&a, &b| by[b].total_cmp(&by[a]));
        order.truncate(used);
        let sum: f64 = if normalize { order.iter().map(|&e| p[e]).sum() } else { 1.0 };
        order.into_iter().map(|e| (e, p[e] / sum * f64::from(scale))).collect()
    }

    /// Every instruction set gives the same bits, alone as among others, and the textbook's choice.
    fn as_specified(routing: &Routing<'_>, scores: &[f32]) {
        let (experts, used) = (routing.experts, routing.used);
        let spec = run(Isa::Scalar, routing, scores);
        assert_eq!(spec.len(), scores.len() / experts * used);
        for isa in Isa::available() {
            assert_eq!(run(isa, routing, scores), spec, "{isa}, {routing:?}");
            assert_eq!(run(isa, routing, &scores[3 * experts..4 * experts]), spec[3 * used..4 * used], "{isa}: one token alone");
        }
        for (scores, chosen) in scores.chunks(experts).zip(spec.chunks(used)) {
            for (c, (expert, weight)) in chosen.iter().zip(textbook(routing, scores)) {
                assert!(c.expert as usize == expert && (f64::from(c.weight) - weight).abs() < 1e-5, "{routing:?}: {chosen:?}");
            }
        }
    }

    fn scores(experts: usize) -> Vec<f32> {
        noise(5, 9 * experts).into_iter().map(|x| 6.0 * x).collect()
    }

    #[test]
    fn every_isa_gives_the_specified_choice() {
        for experts in [1_usize, 4, 8, 16, 17, 60, 128] {
            for used in [1, experts.div_ceil(4), experts] {
                for normalize in [false, true] {
                    as_specified(&softmax(experts, used, normalize), &scores(experts));
                    let bias = noise(8, experts);
                    let sigmoid = Routing { scoring: Scoring::Sigmoid(&bias), scale: 2.5, ..softmax(experts, used, normalize) };
                    as_specified(&sigmoid, &scores(experts));
                }
            }
        }
    }

    #[test]
    fn experts_come_from_the_best_groups_alone() {
        for (experts, count) in [(8, 2), (8, 4), (12, 3), (60, 5), (128, 8)] {
            let bias = noise(8, experts);
            for (used_groups, best) in [(1, 1), (2, 1), (1, 2), (2, 2)] {
                let groups = Some(Groups { count, used: used_groups, best });
                let used = (used_groups * experts / count).min(5);
                for scoring in [Scoring::Softmax, Scoring::Sigmoid(&bias)] {
                    let routing = Routing { groups, scoring, ..softmax(experts, used, false) };
                    as_specified(&routing, &scores(experts));
                    // Control: without groups other experts are chosen somewhere.
                    let all = run(Isa::best(), &Routing { groups: None, ..routing }, &scores(experts));
                    assert!(
                        used == 1 && best == 1 || used_groups == count || all != run(Isa::best(), &routing, &scores(experts)),
                        "{routing:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_bias_changes_the_choice_and_no_weight() {
        let scores = [2.0, 1.0, 0.0, -1.0];
        let with = |bias: [f32; 4]| run(Isa::best(), &Routing { scoring: Scoring::Sigmoid(&bias), ..softmax(4, 2, false) }, &scores);
        let (plain, biased) = (with([0.0; 4]), with([0.0, -1.0, 0.0, 3.0]));
        assert_eq!(plain.iter().map(|c| c.expert).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(biased.iter().map(|c| c.expert).collect::<Vec<_>>(), [3, 0]);
        assert_eq!(biased[1].weight, plain[0].weight);
        assert!(biased[0].weight < plain[1].weight);
    }

    #[test]
    fn of_equal_experts_the_lower_comes_first() {
        let chosen = run(Isa::best(), &softmax(5, 4, true), &[1.0, 3.0, 3.0, 1.0, 3.0]);
        assert_eq!(chosen.iter().map(|c| c.expert).collect::<Vec<_>>(), [1, 2, 4, 0]);
        assert_eq!(chosen[0].weight, chosen[2].weight);
        assert!(chosen[3].weight < chosen[0].weight);
        // Of equal groups too.
        let groups = Some(Groups { count: 3, used: 2, best: 2 });
        let chosen = run(Isa::best(), &Routing { groups, ..softmax(6, 3, true) }, &[1.0, 2.0, 2.0, 1.0, 1.0, 2.0]);
        assert_eq!(chosen.iter().map(|c| c.expert).collect::<Vec<_>>(), [1, 2, 0]);
    }
}
