//! How the machine's cores are shared among local workers.

use std::{num::NonZeroUsize, thread};

/// Cores this process may use: affinity and cgroup quota (v1 and v2) count; at least 1.
pub(crate) fn available() -> usize {
    thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

/// Threads of each of `workers` workers that share `threads`: as even as possible, at least 1.
pub(crate) fn share(threads: usize, workers: usize) -> Vec<usize> {
    (0..workers).map(|worker| (threads / workers + usize::from(worker < threads % workers)).max(1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_worker_has_a_thread() {
        assert_eq!(share(2, 4), [1, 1, 1, 1]);
        assert_eq!(share(7, 3), [3, 2, 2]);
        assert_eq!(share(4, 1), [4]);
    }
}
