//! What the benchmarks share: steps, loading, names of tests, statistics.

pub(crate) mod engine;
pub(crate) mod load;
pub(crate) mod loading;
pub(crate) mod stats;
pub(crate) mod test;
