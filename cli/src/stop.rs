//! Ctrl-C and SIGTERM as a token that futures wait on.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::exit::{Failure, Outcome};

/// Set by the first SIGINT or SIGTERM; the second one ends the process at once.
#[derive(Clone, Debug)]
pub(crate) struct Stop {
    token: CancellationToken,
    interrupted: Arc<AtomicBool>,
}

impl Stop {
    /// Listens for signals from now on, in a task that lives as long as the runtime.
    ///
    /// # Errors
    /// When the handlers cannot be installed.
    pub(crate) fn listen() -> anyhow::Result<Self> {
        let stop = Self { token: CancellationToken::new(), interrupted: Arc::new(AtomicBool::new(false)) };
        let mut interrupt = signal(SignalKind::interrupt()).context("failed to listen for SIGINT")?;
        let mut terminate = signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?;
        let told = stop.clone();
        tokio::spawn(async move {
            loop {
                let interrupted = tokio::select! {
                    _ = interrupt.recv() => true,
                    _ = terminate.recv() => false,
                };
                if told.token.is_cancelled() {
                    // Workers notice that their pipe closed and exit on their own.
                    std::process::exit(if interrupted { 130 } else { 143 });
                }
                told.interrupted.store(interrupted, Ordering::Relaxed);
                told.token.cancel();
            }
        });
        Ok(stop)
    }

    /// Completes when a signal came.
    pub(crate) async fn wait(&self) {
        self.token.cancelled().await;
    }

    /// Whether a signal came.
    pub(crate) fn is_set(&self) -> bool {
        self.token.is_cancelled()
    }

    /// What a command that stopped cleanly returns: Ctrl-C is exit code 130, SIGTERM is success.
    pub(crate) fn outcome(&self) -> Outcome {
        if self.is_set() && self.interrupted.load(Ordering::Relaxed) { Err(Failure::Interrupted) } else { Ok(()) }
    }

    /// Runs `work` until it is done or a signal comes, whichever is first.
    pub(crate) async fn or<T>(&self, work: impl Future<Output = Outcome<T>>) -> Outcome<T> {
        tokio::select! {
            biased;
            () = self.wait() => Err(Failure::Interrupted),
            done = work => done,
        }
    }
}
