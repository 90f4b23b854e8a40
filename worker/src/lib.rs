//! The worker process around one engine: serves a router's sessions, passes hidden states and tokens on, joins the ranks of its stage.
//!
//! The engine has a thread of its own, and so have the heartbeats; everything else is input and output on the caller's runtime. A session is
//! one epoch: it begins with the router's hello and ends as a whole, on the first lost peer, missed deadline or broken stream. Its sequences
//! end with it; the weights stay.

mod adapters;
mod announce;
mod arbiter;
mod card;
pub mod collective;
mod compute;
mod error;
mod failure;
mod gate;
mod heartbeat;
mod link;
mod options;
mod peer;
mod serve;
mod service;
mod session;
mod state;

pub use adapters::{AdapterError, load_adapter};
pub use error::WorkerError;
pub use failure::Reason;
pub use options::{Deadlines, WorkerOptions};
pub use serve::serve;
