//! The backend for processors.

mod experts;
mod feed_forward;
mod forward;
mod input;
mod load;
mod stage;
mod weights;

pub(crate) use stage::Cpu;
