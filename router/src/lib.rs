//! The router: HTTP and gRPC API, tokenizer, scheduler, token streams. Knows nothing of Kubernetes or of weights.

pub mod api;
pub mod control;
pub mod decode;
pub mod delays;
pub mod edge;
pub mod encode;
mod fleet;
pub mod grammar;
pub mod pool;
pub mod replica;
pub mod scheduler;

pub use api::{ApiOptions, ServeError, serve};
