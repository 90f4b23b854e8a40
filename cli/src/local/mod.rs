//! Replicas on this machine: an engine in this process, or worker processes that this one starts and keeps running.
//!
//! Where a command needs one worker in all, its engine runs in this process, also for `serve`: a second process would add a copy
//! through a socket and protect nothing, because without its only worker the server has nothing to serve. With more than one, each
//! is a process.

mod alarm;
pub(crate) mod deployment;
mod draft;
pub(crate) mod fleet;
pub(crate) mod in_process;
pub(crate) mod loaded;
mod loading;
pub(crate) mod memory;
mod process;
pub(crate) mod restart;
pub(crate) mod serving;
pub(crate) mod threads;
mod workers;
