//! The backend for processors.

mod forward;
mod input;
mod load;
mod stage;
mod weights;

pub(crate) use stage::Cpu;
