//! End-to-end tests on one machine: real processes, fixtures and the reference model.

#![expect(clippy::print_stdout, reason = "tests say what they measured and what they could not compare")]

mod adapters;
mod clients;
mod constrained;
mod convert;
mod draft_models;
mod drafts;
mod encoders;
mod exact;
mod families;
mod fetch;
mod formats;
mod importance;
mod input;
mod instructions;
mod memory;
mod packed;
mod pool;
mod run;
mod runner;
mod split;
mod streams;
mod survival;
mod vectors;
mod weights;
