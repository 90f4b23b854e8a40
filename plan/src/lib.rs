//! What a deployment is: the manifest, the model's header, and the plan that maps one onto worker processes.
//!
//! This crate parses bytes it is handed and does no I/O. Everything here is plain data that the other crates agree on.

pub mod adapter;
pub mod card;
pub mod dtype;
pub mod fleet;
pub mod generation;
pub mod gguf;
pub mod header;
pub mod manifest;
pub mod model;
pub mod planner;
pub mod predict;
pub mod pytorch;
pub mod safetensors;
#[cfg(test)]
mod samples;
pub mod sentencepiece;
pub mod shard;
pub mod step;
pub mod worker;
