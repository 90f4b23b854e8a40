//! Names for the contents of KV blocks, and the longest cached prefix of a sequence.
//!
//! A block's hash covers its own ids and, through the previous block's hash, everything before them, the model revision and
//! the adapter. Equal hashes mean equal KV content.

use plan::{
    shard::{BLOCK_TOKENS, KvGroup},
    step::TokenId,
};
use sha2::{Digest, Sha256};

use super::blocks::BlockPool;

/// Content of a whole block and all before it: the first 16 bytes of a SHA-256.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(pub u128);

impl BlockHash {
    /// What the first block's hash continues: who computes (revision, numerics), with which adapter
    /// (its numerics id; empty: none), for whom (salt).
    pub fn root(revision: &[u8], adapter: &str, salt: &[u8]) -> Self {
        let mut state = Sha256::new();
        for part in [revision, adapter.as_bytes(), salt] {
            state.update((part.len() as u64).to_le_bytes());
            state.update(part);
        }
        Self::of(state)
    }

    /// The hash of the block of `ids` (16 of them) that follows this one.
    pub fn next(self, ids: &[TokenId]) -> Self {
        let mut bytes = [0u8; 16 + 4 * BLOCK_TOKENS];
        bytes[..16].copy_from_slice(&self.0.to_le_bytes());
        for (to, id) in bytes[16..].chunks_exact_mut(4).zip(ids) {
            to.copy_from_slice(&id.to_le_bytes());
        }
        let mut state = Sha256::new();
        state.update(bytes);
        Self::of(state)
    }

    /// Hashes of every whole block of `ids`, in order.
    pub fn chain(self, ids: &[TokenId]) -> Vec<Self> {
        let mut last = self;
        ids.chunks_exact(BLOCK_TOKENS)
            .map(|block| {
                last = last.next(block);
                last
            })
            .collect()
    }

    fn of(state: Sha256) -> Self {
        let digest = state.finalize();
        let mut low = [0u8; 16];
        low.copy_from_slice(&digest[..16]);
        Self(u128::from_le_bytes(low))
    }
}

/// First block that a query at `position` or later can read in a group: 0 for full attention.
///
/// A window of `w` tokens covers the query's own position and the `w - 1` before it; one token more is kept, so that the
/// bound holds for implementations that count the window from either side.
pub(super) fn first_needed(group: &KvGroup, position: usize) -> usize {
    group.window.map_or(0, |w| position.saturating_sub(w as usize) / BLOCK_TOKENS)
}

/// The longest reusable prefix in blocks, at most `limit`: all blocks of the full groups below it, and those blocks of the
/// window groups that a query at its end can read.
pub(super) fn longest_hit(groups: &[KvGroup], pools: &[BlockPool], hashes: &[BlockHash], limit: usize) -> usize {
    let mut limit = limit.min(hashes.len());
    for (group, pool) in groups.iter().zip(pools) {
        if group.window.is_none() {
            limit = hashes[..limit].iter().take_while(|h| pool.find(**h).is_some()).count();
        }
    }
    // For each window group, the number of cached blocks in a row that end before block i.
    let runs: Vec<(&KvGroup, Vec<usize>)> = groups
        .iter()
        .zip(pools)
        .filter(|(group, _)| group.window.is_some())
        .map(|(group, pool)| {
            let mut run = Vec::with_capacity(limit + 1);
            run.push(0);
            for hash in &hashes[..limit] {
                let before = run.last().copied().unwrap_or(0);
                run.push(if pool.find(*hash).is_some() { before + 1 } else { 0 });
            }
            (group, run)
        })
        .collect();
    (1..=limit)
        .rev()
        .find(|blocks| runs.iter().all(|(group, run)| run[*blocks] >= blocks - first_needed(group, blocks * BLOCK_TOKENS)))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(window: Option<u32>) -> KvGroup {
        KvGroup { window, layers: vec![0], blocks: 64 }
    }

    fn cache(pool: &mut BlockPool, hashes: &[BlockHash]) {
        for hash in hashes {
            let id = pool.allocate().expect("room");
            pool.register(id, *hash);
            pool.release(id);
        }
    }

    #[test]
    fn hashes_tell_contents_apart() {
        let ids: Vec<TokenId> = (0..40).collect();
        let root = BlockHash::root(b"revision", "", b"");
        let chain = root.chain(&ids);
        assert_eq!(chain.len(), 2, "only whole blocks");
        assert_eq!(root.chain(&ids[..16])[0], chain[0]);
        let mut other = ids.clone();
        other[3] = 99;
        assert_ne!(root.chain(&other)[1], chain[1], "a block's hash covers what is before it");
        assert_ne!(BlockHash::root(b"revision", "a", b"").chain(&ids), chain);
        assert_ne!(BlockHash::root(b"revisio", "", b"n").chain(&ids), chain);
    }

    #[test]
    fn a_window_group_needs_only_the_blocks_that_the_next_query_reads() {
        let groups = [group(None), group(Some(32))];
        let mut pools = [BlockPool::new(64, false), BlockPool::new(64, false)];
        let ids: Vec<TokenId> = (0..160).collect();
        let hashes = BlockHash::root(b"", "", b"").chain(&ids);
        cache(&mut pools[0], &hashes);
        cache(&mut pools[1], &hashes[5..7]);
        // At block 7 (position 112) the window reaches back to position 80: blocks 5 and 6.
        assert_eq!(longest_hit(&groups, &pools, &hashes, 9), 7);
        assert_eq!(longest_hit(&groups, &pools, &hashes, 6), 0, "at block 6 the window needs block 4");
        assert_eq!(longest_hit(&groups[..1], &pools[..1], &hashes, 9), 9);
    }
}
