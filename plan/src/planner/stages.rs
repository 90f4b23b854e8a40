//! Which layers each stage has, and which stages multiply the vocabulary.

use std::ops::Range;

use super::{PlanError, Spec, Vocabulary, output_role};
use crate::{
    model::{ModelHeader, TensorId},
    shard::VOCAB_TILE,
};

/// Shares of the vocabulary that are tried.
const SHARES: usize = 64;
/// Bytes by which the longest stage must become shorter: what is read while states go to the first stage and its part comes back.
const LEAST_GAIN: u64 = 8 << 20;

/// What the stages have.
pub(super) struct Layout {
    /// Layers of each stage.
    pub(super) ranges: Vec<Range<usize>>,
    /// Tiles of the vocabulary that the first stage multiplies in place of the last.
    pub(super) lent: usize,
}

/// Layers as given, or so that the stage that reads the most bytes per token reads the fewest possible; and the tiles of a table that the first
/// stage holds anyway, where it multiplies some of them.
pub(super) fn layout(spec: &Spec, header: &ModelHeader) -> Result<Layout, PlanError> {
    let layers = header.config.layers.len();
    let given = spec.stage_layers.as_ref().map(|given| given_ranges(given, spec.pipeline, layers)).transpose()?;
    let mut costs = vec![0u64; layers];
    for (id, tensor) in &header.tensors {
        if let Some(cost) = id.layer.and_then(|l| costs.get_mut(l as usize)) {
            *cost += tensor.bytes;
        }
    }
    let head = header.tensors.get(&TensorId { layer: None, role: output_role(header) }).map_or(0, |t| t.bytes);
    let tiles = header.config.vocab.div_ceil(VOCAB_TILE).max(1);
    // Layers, and the bytes of the longest stage.
    let with = |lent: usize| {
        let first = (u128::from(head) * lent as u128 / tiles as u128) as u64;
        let (last, stages) = (head - first, spec.pipeline);
        let ranges = given.clone().unwrap_or_else(|| balance(&costs, (first, last), stages));
        let cost = |(stage, range): (usize, &Range<usize>)| {
            let layers = costs[range.clone()].iter().fold(0u64, |sum, cost| sum.saturating_add(*cost));
            let first = if stage == 0 { first } else { 0 };
            layers.saturating_add(first).saturating_add(if stage + 1 == stages { last } else { 0 })
        };
        let longest = ranges.iter().enumerate().map(cost).max().unwrap_or(0);
        (ranges, longest)
    };
    let (ranges, alone) = with(0);
    let shared = spec.pipeline > 1 && header.config.tied_embeddings && header.config.encoder.is_none();
    match spec.vocabulary {
        Vocabulary::Spread if !shared => return Err(PlanError::Vocabulary { stages: spec.pipeline }),
        Vocabulary::Auto if shared => {}
        Vocabulary::Spread => {}
        Vocabulary::Last | Vocabulary::Auto => return Ok(Layout { ranges, lent: 0 }),
    }
    let mut shares: Vec<usize> = (1..=SHARES).map(|share| (tiles as u128 * share as u128 / SHARES as u128) as usize).collect();
    shares.retain(|&lent| lent > 0);
    shares.dedup();
    let found: Vec<(usize, u64)> = shares.into_iter().map(|lent| (lent, with(lent).1)).collect();
    let least = found.iter().map(|&(_, longest)| longest).min().unwrap_or(alone);
    // Where the longest stage hardly differs, even shares are ready first: both are computed at the same time.
    let even = found.iter().filter(|&&(_, longest)| longest <= least.saturating_add(least / 50));
    let Some(&(lent, longest)) = even.min_by_key(|&&(lent, longest)| (lent.max(tiles - lent), longest)) else {
        return Ok(Layout { ranges, lent: 0 });
    };
    let gain = alone.saturating_sub(longest);
    let gains = gain >= alone / 10 && gain / spec.tensor.max(1) as u64 >= LEAST_GAIN;
    if gains || spec.vocabulary == Vocabulary::Spread { Ok(Layout { ranges: with(lent).0, lent }) } else { Ok(Layout { ranges, lent: 0 }) }
}

/// Layers of each stage, as given.
fn given_ranges(given: &[usize], stages: usize, layers: usize) -> Result<Vec<Range<usize>>, PlanError> {
    let sum = given.iter().try_fold(0usize, |n, &l| n.checked_add(l));
    if given.len() != stages || given.contains(&0) || sum != Some(layers) {
        return Err(PlanError::StageLayers { got: given.to_vec(), stages, layers });
    }
    let mut start = 0;
    let range = |&n: &usize| {
        start += n;
        start - n..start
    };
    Ok(given.iter().map(range).collect())
}

/// Cuts `costs` into `stages` non-empty runs so that the largest sum is least, the first and the last run's including those of `heads`.
///
/// `best[i]` is the least largest sum of the first `i` layers in the stages so far. It grows with `i`, while the sum of the layers
/// after a cut shrinks as the cut moves on, so the best cut is where they cross. One row embedding lookup per token on the first
/// stage costs nothing worth counting.
fn balance(costs: &[u64], heads: (u64, u64), stages: usize) -> Vec<Range<usize>> {
    let n = costs.len();
    let mut sums = vec![0u64; n + 1];
    for (i, cost) in costs.iter().enumerate() {
        sums[i + 1] = sums[i].saturating_add(*cost);
    }
    let mut best: Vec<u64> = sums.iter().map(|sum| sum.saturating_add(heads.0)).collect();
    let mut cuts: Vec<Vec<usize>> = Vec::new();
    for stage in 1..stages {
        let extra = if stage + 1 == stages { heads.1 } else { 0 };
        let mut next = vec![u64::MAX; n + 1];
        let mut cut = vec![0; n + 1];
        for i in stage + 1..=n {
            let after = |j: usize| (sums[i] - sums[j]).saturating_add(extra);
            // Cuts `j` leave at least one layer to each earlier stage and one to this.
            let (mut low, mut high) = (stage, i - 1);
            while low < high {
                let middle = low.midpoint(high);
                if best[middle] >= after(middle) { high = middle } else { low = middle + 1 }
            }
            let before = if low > stage { low - 1 } else { low };
            let j = if best[before].max(after(before)) <= best[low].max(after(low)) { before } else { low };
            (next[i], cut[i]) = (best[j].max(after(j)), j);
        }
        best = next;
        cuts.push(cut);
    }
    let mut ends = vec![n];
    for cut in cuts.iter().rev() {
        let end = ends.last().map_or(0, |&e| cut[e]);
        ends.push(end);
    }
    ends.push(0);
    ends.reverse();
    ends.windows(2).map(|w| w[0]..w[1]).collect()
}

#[cfg(test)]
mod tests {
    use super::balance;

    fn worst(costs: &[u64], heads: (u64, u64), ranges: &[std::ops::Range<usize>]) -> u64 {
        let last = ranges.len() - 1;
        let cost = |(i, r): (usize, &std::ops::Range<usize>)| {
            costs[r.clone()].iter().sum::<u64>() + if i == 0 { heads.0 } else { 0 } + if i == last { heads.1 } else { 0 }
        };
        ranges.iter().enumerate().map(cost).max().unwrap_or(0)
    }

    /// The least largest sum by trying every cut.
    fn exhaustive(costs: &[u64], (first, last): (u64, u64), stages: usize) -> u64 {
        if stages == 1 {
            return costs.iter().sum::<u64>() + first + last;
        }
        (1..=costs.len() + 1 - stages)
            .map(|n| (costs[..n].iter().sum::<u64>() + first).max(exhaustive(&costs[n..], (0, last), stages - 1)))
            .min()
            .unwrap_or(u64::MAX)
    }

    #[test]
    fn balance_is_optimal() {
        let costs: Vec<u64> = (0..9u64).map(|i| (i * 7 + 3) % 11 + 1).collect();
        for heads in [(0, 0), (0, 5), (0, 40), (0, 1000), (20, 20), (7, 3), (1000, 5)] {
            for stages in 2..=costs.len() {
                let ranges = balance(&costs, heads, stages);
                assert_eq!(ranges.len(), stages);
                assert!(ranges.iter().all(|r| !r.is_empty()), "{ranges:?}");
                assert_eq!((ranges[0].start, ranges[stages - 1].end), (0, costs.len()));
                assert!(ranges.windows(2).all(|w| w[0].end == w[1].start));
                assert_eq!(worst(&costs, heads, &ranges), exhaustive(&costs, heads, stages), "heads {heads:?} stages {stages}");
            }
        }
        assert_eq!(balance(&costs, (0, 3), 1).first(), Some(&(0..9)));
    }

    #[test]
    fn even_split_is_worse_where_the_head_is_heavy() {
        let costs = [1u64; 8];
        let ranges = balance(&costs, (0, 4), 2);
        assert_eq!(ranges, [0..6, 6..8]);
        assert!(worst(&costs, (0, 4), &[0..4, 4..8]) > worst(&costs, (0, 4), &ranges));
        assert_eq!(balance(&costs, (2, 2), 2), [0..4, 4..8]);
    }
}
