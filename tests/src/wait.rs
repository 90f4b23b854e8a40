//! Waiting for a condition, never for a time.

use std::{
    thread,
    time::{Duration, Instant},
};

/// How often a condition that cannot wake its waiter is looked at.
const PERIOD: Duration = Duration::from_millis(5);

/// Looks at `condition` until it gives a value.
///
/// # Panics
/// If it gives none within `limit`; the message names `what`.
pub fn until<T>(limit: Duration, what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(began.elapsed() < limit, "waited {limit:?} for {what}");
        thread::park_timeout(PERIOD);
    }
}
