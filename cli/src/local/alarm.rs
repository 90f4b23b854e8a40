//! The first failure that nobody can repair, told to whoever waits for it.

use std::sync::{Mutex, PoisonError};

use tokio_util::sync::CancellationToken;

use crate::exit::Failure;

/// Raised once, heard once.
#[derive(Debug, Default)]
pub(crate) struct Alarm {
    failure: Mutex<Option<Failure>>,
    raised: CancellationToken,
}

impl Alarm {
    /// Raises the alarm; only the first failure is kept.
    pub(crate) fn raise(&self, failure: Failure) {
        let mut held = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.raised.is_cancelled() {
            *held = Some(failure);
            self.raised.cancel();
        }
    }

    /// Waits for the alarm; after it was heard, waits for ever.
    pub(crate) async fn wait(&self) -> Failure {
        self.raised.cancelled().await;
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
        match failure {
            Some(failure) => failure,
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::bad_input;

    #[tokio::test]
    async fn the_first_failure_counts() {
        let alarm = Alarm::default();
        alarm.raise(bad_input!("first"));
        alarm.raise(bad_input!("second"));
        assert!(matches!(alarm.wait().await, Failure::Input(error) if error.to_string() == "first"));
    }
}
