//! Tests on a real one-node Kubernetes cluster, which `cargo xtask test` brings up and takes down around them.
//!
//! They run inside the cluster's network. `cargo xtask cluster up`, then `cargo xtask cluster exec -- cargo test -p e2e --test cluster -- --ignored NAME`
//! runs one again and again on a cluster that stays.

#![expect(clippy::print_stdout, reason = "tests say what they measured")]

mod adapters;
mod answers;
mod apply;
mod chart;
mod dedicated;
mod deletion;
mod drafts;
mod encoders;
mod hpa;
mod identity;
mod kubernetes;
mod load;
mod many;
mod models;
mod nodes;
mod plugin;
mod pool;
mod refusals;
mod rollout;
mod scale;
mod survival;
mod weights;
