//! How the ranks of a stage meet and exchange slices: shared memory, unix sockets or TCP, behind one trait.
//!
//! The ranks of an epoch meet with [`join()`]; each waits for all others, so that a collective exists on every rank or on none. Each wait of an
//! exchange has a deadline, and [`Interrupt`] ends a wait from another thread. Peers of another epoch are refused when they meet.

mod address;
mod frame;
mod join;
mod listen;
mod lobby;
mod shared;
mod sockets;
mod stream;
mod unjoined;

pub use address::Address;
pub use join::{Group, JoinError, Joined, Peer, Waits, join};
pub use listen::{Listener, Who};
pub use lobby::Lobby;
pub(crate) use unjoined::Unjoined;

/// Ends the waits of a collective from another thread: its exchanges fail from then on.
pub trait Interrupt: Send + Sync {
    /// Does so; calls after the first change nothing.
    fn interrupt(&self);
}
