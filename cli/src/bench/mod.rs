//! What the benchmarks share: steps, loading, simulated replicas, names of tests, statistics.

pub(crate) mod engine;
pub(crate) mod load;
pub(crate) mod loading;
pub(crate) mod paced;
pub(crate) mod processor;
pub(crate) mod stats;
pub(crate) mod test;
