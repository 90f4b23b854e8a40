//! Replicas on this machine: an engine in this process, or worker processes that this one starts and keeps running.

pub(crate) mod deployment;
pub(crate) mod in_process;
pub(crate) mod loaded;
pub(crate) mod memory;
pub(crate) mod threads;
