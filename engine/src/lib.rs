//! One rank's computation: weights, layers, KV cache, sampler.
//!
//! Synchronous, one owner thread plus its compute pool; no network, clock or environment.

pub mod collective;
mod engine;
mod error;
mod masks;
mod progress;
mod reader;
mod timings;

pub use engine::{Engine, EngineOptions, StageOutput};
pub use error::{InvalidStep, LoadShardError, StepError};
pub use masks::{MaskSource, NoMasks};
pub use progress::Progress;
pub use reader::WeightReader;
pub use timings::Timings;
