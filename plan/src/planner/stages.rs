//! Which layers each stage has.

use std::ops::Range;

use super::{PlanError, Spec, output_role};
use crate::model::{ModelHeader, TensorId};

/// Layer ranges of the stages: as given, or so that the stage that reads the most bytes per token reads the fewest possible.
pub(super) fn layer_ranges(spec: &Spec, header: &ModelHeader) -> Result<Vec<Range<usize>>, PlanError> {
    let layers = header.config.layers.len();
    if let Some(given) = &spec.stage_layers {
        let sum = given.iter().try_fold(0usize, |n, &l| n.checked_add(l));
        if given.len() != spec.pipeline || given.contains(&0) || sum != Some(layers) {
            return Err(PlanError::StageLayers { got: given.clone(), stages: spec.pipeline, layers });
        }
        let mut start = 0;
        let range = |&n: &usize| {
            start += n;
            start - n..start
        };
        return Ok(given.iter().map(range).collect());
    }
    let mut costs = vec![0u64; layers];
    for (id, tensor) in &header.tensors {
        if let Some(cost) = id.layer.and_then(|l| costs.get_mut(l as usize)) {
            *cost += tensor.bytes;
        }
    }
    let head = header.tensors.get(&TensorId { layer: None, role: output_role(header) }).map_or(0, |t| t.bytes);
    Ok(balance(&costs, head, spec.pipeline))
}

/// Cuts `costs` into `stages` non-empty runs so that the largest sum is least, the last run's including `head`.
///
/// `best[i]` is the least largest sum of the first `i` layers in the stages so far. It grows with `i`, while the sum of the layers
/// after a cut shrinks as the cut moves on, so the best cut is where they cross. One row embedding lookup per token on the first
/// stage costs nothing worth counting.
fn balance(costs: &[u64], head: u64, stages: usize) -> Vec<Range<usize>> {
    let n = costs.len();
    let mut sums = vec![0u64; n + 1];
    for (i, cost) in costs.iter().enumerate() {
        sums[i + 1] = sums[i].saturating_add(*cost);
    }
    let mut best = sums.clone();
    let mut cuts: Vec<Vec<usize>> = Vec::new();
    for stage in 1..stages {
        let extra = if stage + 1 == stages { head } else { 0 };
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

    fn worst(costs: &[u64], head: u64, ranges: &[std::ops::Range<usize>]) -> u64 {
        let last = ranges.len() - 1;
        let cost = |(i, r): (usize, &std::ops::Range<usize>)| costs[r.clone()].iter().sum::<u64>() + if i == last { head } else { 0 };
        ranges.iter().enumerate().map(cost).max().unwrap_or(0)
    }

    /// The least largest sum by trying every cut.
    fn exhaustive(costs: &[u64], head: u64, stages: usize) -> u64 {
        if stages == 1 {
            return costs.iter().sum::<u64>() + head;
        }
        (1..=costs.len() + 1 - stages)
            .map(|n| costs[..n].iter().sum::<u64>().max(exhaustive(&costs[n..], head, stages - 1)))
            .min()
            .unwrap_or(u64::MAX)
    }

    #[test]
    fn balance_is_optimal() {
        let costs: Vec<u64> = (0..9u64).map(|i| (i * 7 + 3) % 11 + 1).collect();
        for head in [0, 5, 40, 1000] {
            for stages in 1..=costs.len() {
                let ranges = balance(&costs, head, stages);
                assert_eq!(ranges.len(), stages);
                assert!(ranges.iter().all(|r| !r.is_empty()), "{ranges:?}");
                assert_eq!((ranges[0].start, ranges[stages - 1].end), (0, costs.len()));
                assert!(ranges.windows(2).all(|w| w[0].end == w[1].start));
                assert_eq!(worst(&costs, head, &ranges), exhaustive(&costs, head, stages), "head {head} stages {stages}");
            }
        }
    }

    #[test]
    fn even_split_is_worse_where_the_head_is_heavy() {
        let costs = [1u64; 8];
        let ranges = balance(&costs, 4, 2);
        assert_eq!(ranges, [0..6, 6..8]);
        assert!(worst(&costs, 4, &[0..4, 4..8]) > worst(&costs, 4, &ranges));
    }
}
