//! Which blocks a replica has cached, and how that changed, for whoever was told before.

use std::collections::{HashSet, VecDeque};

use crate::scheduler::{BlockHash, PrefixChange};

/// Changes remembered: those of a few seconds. Who is further behind is told everything.
const LOG: usize = 16_384;

/// What is cached. Changes are numbered from 1.
#[derive(Debug)]
pub(crate) struct Prefixes {
    cached: HashSet<BlockHash>,
    log: VecDeque<PrefixChange>,
    /// Number of the first change in `log`.
    first: u64,
}

/// How a prefix cache changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PrefixDelta {
    /// What was known before does not count.
    pub(crate) reset: bool,
    pub(crate) added: Vec<BlockHash>,
    pub(crate) removed: Vec<BlockHash>,
}

impl PrefixDelta {
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl Default for Prefixes {
    fn default() -> Self {
        Self { cached: HashSet::new(), log: VecDeque::new(), first: 1 }
    }
}

impl Prefixes {
    /// How many of the hashes are cached, up to the first that is not.
    pub(crate) fn cached(&self, hashes: &[BlockHash]) -> usize {
        hashes.iter().take_while(|h| self.cached.contains(h)).count()
    }

    pub(crate) fn apply(&mut self, changes: Vec<PrefixChange>) {
        for change in changes {
            match change {
                PrefixChange::Added(hash) => self.cached.insert(hash),
                PrefixChange::Removed(hash) => self.cached.remove(&hash),
            };
            if self.log.len() == LOG {
                self.log.pop_front();
                self.first += 1;
            }
            self.log.push_back(change);
        }
    }

    /// The session is over.
    pub(crate) fn clear(&mut self) {
        self.first += self.log.len() as u64 + 1;
        self.log.clear();
        self.cached.clear();
    }

    /// What changed since `cursor` (0: nothing is known), and the cursor for the next time.
    pub(crate) fn since(&self, cursor: u64) -> (PrefixDelta, u64) {
        let next = self.first + self.log.len() as u64;
        if cursor < self.first {
            return (PrefixDelta { reset: true, added: self.cached.iter().copied().collect(), removed: Vec::new() }, next);
        }
        let mut delta = PrefixDelta::default();
        // A block that came and went again is in both lists; what counts is how it is now.
        let touched: HashSet<BlockHash> = self.log.iter().skip((cursor - self.first) as usize).map(hash).collect();
        for hash in touched {
            if self.cached.contains(&hash) { &mut delta.added } else { &mut delta.removed }.push(hash);
        }
        (delta, next)
    }

    /// Takes over what another process's cache became.
    pub(crate) fn follow(&mut self, delta: PrefixDelta) {
        if delta.reset {
            self.cached.clear();
        }
        self.cached.extend(delta.added);
        for hash in &delta.removed {
            self.cached.remove(hash);
        }
    }
}

fn hash(change: &PrefixChange) -> BlockHash {
    match change {
        PrefixChange::Added(hash) | PrefixChange::Removed(hash) => *hash,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_follower_ends_where_the_cache_is_however_late_it_asks() {
        let (add, remove) = (|n| PrefixChange::Added(BlockHash(n)), |n| PrefixChange::Removed(BlockHash(n)));
        let (mut cache, mut follower, mut cursor) = (Prefixes::default(), Prefixes::default(), 0);
        let mut follow = |cache: &Prefixes, reset: bool| {
            let (delta, next) = cache.since(cursor);
            assert_eq!(delta.reset, reset);
            follower.follow(delta);
            cursor = next;
            assert_eq!(follower.cached, cache.cached);
            assert!(cache.since(cursor).0.is_empty());
        };
        cache.apply(vec![add(1), add(2)]);
        follow(&cache, true);
        cache.apply(vec![remove(1), add(3), remove(3), add(1), remove(2)]);
        follow(&cache, false);
        cache.clear();
        cache.apply(vec![add(7)]);
        follow(&cache, true);
        cache.apply((0..LOG as u128 + 1).map(add).collect());
        follow(&cache, true);
    }
}
