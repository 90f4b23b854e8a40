//! Harness of the end-to-end tests: starts the `skein` that was built beside the tests, talks to it, and leaves nothing behind.
//!
//! A failure panics with what the program said; these are tests, and whoever reads the panic must see the cause.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a harness of tests: a failure is the test's failure")]

pub mod client;
pub mod files;
pub mod mirror;
pub mod models;
pub mod parsers;
pub mod process;
pub mod program;
pub mod rewrite;
pub mod server;
pub mod wait;
