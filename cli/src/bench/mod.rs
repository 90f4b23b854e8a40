//! What the benchmarks share: names of tests, statistics.

pub(crate) mod engine;
pub(crate) mod load;
pub(crate) mod stats;
pub(crate) mod test;
