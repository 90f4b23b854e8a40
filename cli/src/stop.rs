//! Ctrl-C and SIGTERM as a token that futures wait on.

use std::{
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::exit::{Failure, Outcome};

/// Set by the first SIGINT or SIGTERM; the second one ends the process at once.
#[derive(Clone, Debug)]
pub(crate) struct Stop {
    token: CancellationToken,
    diverted: Arc<Diverted>,
}

/// Where Ctrl-C goes while something smaller than the command is to be stopped by it.
type Diverted = Mutex<Option<CancellationToken>>;

/// While this lives, the first Ctrl-C does not stop the command but completes [`Diversion::interrupted`].
#[derive(Debug)]
pub(crate) struct Diversion {
    to: CancellationToken,
    place: Arc<Diverted>,
}

impl Diversion {
    /// Waits for Ctrl-C.
    pub(crate) async fn interrupted(&self) {
        self.to.cancelled().await;
    }
}

impl Drop for Diversion {
    fn drop(&mut self) {
        *lock(&self.place) = None;
    }
}

fn lock(place: &Diverted) -> MutexGuard<'_, Option<CancellationToken>> {
    place.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Stop {
    /// Listens for signals from now on, in a task that lives as long as the runtime.
    ///
    /// # Errors
    /// When the handlers cannot be installed.
    pub(crate) fn listen() -> anyhow::Result<Self> {
        let stop = Self { token: CancellationToken::new(), diverted: Arc::default() };
        let mut interrupt = signal(SignalKind::interrupt()).context("failed to listen for SIGINT")?;
        let mut terminate = signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?;
        let told = stop.clone();
        tokio::spawn(async move {
            loop {
                let interrupted = tokio::select! {
                    _ = interrupt.recv() => true,
                    _ = terminate.recv() => false,
                };
                if interrupted && let Some(to) = lock(&told.diverted).take() {
                    to.cancel();
                    continue;
                }
                if told.token.is_cancelled() {
                    // Workers notice that their pipe closed and exit on their own.
                    std::process::exit(if interrupted { 130 } else { 143 });
                }
                told.token.cancel();
            }
        });
        Ok(stop)
    }

    /// Completes when a signal came.
    pub(crate) async fn wait(&self) {
        self.token.cancelled().await;
    }

    /// Sends Ctrl-C elsewhere for a while.
    pub(crate) fn divert(&self) -> Diversion {
        let to = CancellationToken::new();
        *lock(&self.diverted) = Some(to.clone());
        Diversion { to, place: self.diverted.clone() }
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
