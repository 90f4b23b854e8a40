//! Tests of whole engines on generated models: any chunking, batch, thread, instruction set, rank and stage count gives the same bits.

mod adapter;
mod encoders;
mod invariance;
mod kv;
mod loading;
mod model;
mod naive;
mod observed;
mod reference;
mod rig;
mod sampling;
mod screening;
mod spread;
mod steps;
