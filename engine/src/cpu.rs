//! The backend for processors.

mod adapter;
mod experts;
mod feed_forward;
mod forward;
mod input;
mod load;
mod project;
mod screen;
mod stage;
mod vocabulary;
mod weights;

pub(crate) use adapter::Adapted;
pub use adapter::Adapter;
pub(crate) use stage::Cpu;
