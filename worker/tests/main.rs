//! Workers on loopback: epochs, collectives, and replicas driven by the router.

mod adapters;
mod announce;
mod arbiter;
mod collectives;
mod epochs;
mod fleet;
mod identities;
mod owner;
mod replica;
mod watch;
