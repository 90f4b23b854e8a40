//! End-to-end tests on one machine: real processes, fixtures and the reference model.

mod clients;
mod exact;
mod input;
mod instructions;
mod runner;
mod split;
mod streams;
mod survival;
mod weights;
