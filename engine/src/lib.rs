//! One rank's computation: weights, layers, KV cache, sampler.
//!
//! Synchronous, one owner thread plus its compute pool; no network, clock or environment.

mod backend;
mod batch;
pub mod collective;
mod columns;
mod compute;
mod cpu;
mod engine;
mod error;
mod fit;
mod masks;
mod pooling;
mod progress;
mod question;
mod ranks;
mod reader;
mod sampler;
mod sequences;
mod timings;
mod validate;

pub use columns::{ColumnSquares, Observed};
pub use cpu::Adapter;
pub use engine::{Engine, EngineOptions, StageOutput};
pub use error::{InvalidStep, LoadShardError, StepError};
pub use masks::{MaskSource, NoMasks};
pub use progress::Progress;
pub use question::{Draw, Need, Question, part_bytes};
pub use reader::WeightReader;
pub use timings::Timings;
