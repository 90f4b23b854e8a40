//! How long a deployment rests after something failed: longer each time the same thing fails again.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// First and longest pause.
pub(crate) type Bounds = (Duration, Duration);

/// The last failure of each deployment, by uid.
#[derive(Debug, Default)]
pub(crate) struct Setbacks(Mutex<HashMap<String, Setback>>);

#[derive(Debug)]
struct Setback {
    what: String,
    pause: Duration,
    until: Instant,
}

impl Setbacks {
    /// How long to rest after `what` failed. Only a try after the whole pause makes the next one longer: other things than the end of a
    /// pause make one try as well. Another failure is news, such as of a Secret that was corrected in part, and begins anew.
    pub(crate) fn pause(&self, uid: &str, what: &str, (first, longest): Bounds) -> Duration {
        let now = Instant::now();
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let pause = match all.get(uid) {
            Some(last) if last.what == what && now < last.until => return last.until - now,
            Some(last) if last.what == what => (last.pause * 2).min(longest),
            _ => first,
        };
        all.insert(uid.to_owned(), Setback { what: what.to_owned(), pause, until: now + pause });
        pause
    }

    /// Nothing fails any more.
    pub(crate) fn end(&self, uid: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = (Duration::from_secs(5), Duration::from_secs(120));

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_with_each_whole_pause_and_begin_anew_with_another_failure() {
        let setbacks = Setbacks::default();
        let mut pauses = Vec::new();
        for _ in 0..7 {
            let pause = setbacks.pause("a", "not found", BOUNDS);
            pauses.push(pause.as_secs());
            // Tries in between change nothing.
            tokio::time::advance(pause / 2).await;
            assert_eq!(setbacks.pause("a", "not found", BOUNDS), pause - pause / 2);
            tokio::time::advance(pause - pause / 2).await;
        }
        assert_eq!(pauses, [5, 10, 20, 40, 80, 120, 120]);
        assert_eq!(setbacks.pause("a", "unauthorized", BOUNDS).as_secs(), 5);
        assert_eq!(setbacks.pause("b", "not found", BOUNDS).as_secs(), 5);
        tokio::time::advance(BOUNDS.0).await;
        assert_eq!(setbacks.pause("a", "unauthorized", BOUNDS).as_secs(), 10);
        setbacks.end("a");
        assert_eq!(setbacks.pause("a", "unauthorized", BOUNDS).as_secs(), 5);
    }
}
