//! The end of a session, and the owner's stream, which ends with it.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use futures_util::Stream;
use proto::worker::{SessionReply, session_reply::Message};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::Status;

use crate::failure::{Failure, Reason};

/// Whether a session is over, and why. The first reason stays.
#[derive(Debug, Default)]
pub(crate) struct Ending {
    over: CancellationToken,
    failed: CancellationToken,
    failure: Mutex<Option<Failure>>,
}

impl Ending {
    /// Ends the session; `None` when all steps were answered. Tells whether this was the first end.
    pub(crate) fn end(&self, failure: Option<Failure>) -> bool {
        let failed = failure.is_some();
        {
            // Nothing panics while it is held.
            let mut held = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
            if self.over.is_cancelled() {
                return false;
            }
            *held = failure;
            self.over.cancel();
        }
        if failed {
            self.failed.cancel();
        }
        true
    }

    pub(crate) fn is_over(&self) -> bool {
        self.over.is_cancelled()
    }

    pub(crate) async fn over(&self) {
        self.over.cancelled().await;
    }

    /// Ends only when the session ended by a failure.
    pub(crate) async fn failed(&self) {
        self.failed.cancelled().await;
    }

    pub(crate) fn failure(&self) -> Option<Failure> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What the owner receives: replies and heartbeats, at last the failure, if any.
///
/// After a failure nothing else is said, so that no step is answered in an epoch that is over. When the owner drops its end, the session ends.
pub(crate) struct Replies {
    receive: mpsc::Receiver<SessionReply>,
    over: Pin<Box<WaitForCancellationFutureOwned>>,
    ending: Arc<Ending>,
    done: bool,
}

impl Replies {
    pub(super) fn new(receive: mpsc::Receiver<SessionReply>, ending: Arc<Ending>) -> Self {
        Self { receive, over: Box::pin(ending.over.clone().cancelled_owned()), ending, done: false }
    }
}

impl Stream for Replies {
    type Item = Result<SessionReply, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.done {
            return Poll::Ready(None);
        }
        let over = self.over.as_mut().poll(context).is_ready();
        if over && let Some(failure) = self.ending.failure() {
            self.done = true;
            return Poll::Ready(Some(Ok(SessionReply { message: Some(Message::Failure(failure.encode())) })));
        }
        match self.receive.poll_recv(context) {
            Poll::Ready(Some(reply)) => Poll::Ready(Some(Ok(reply))),
            Poll::Pending if !over => Poll::Pending,
            _ => {
                self.done = true;
                Poll::Ready(None)
            }
        }
    }
}

impl Drop for Replies {
    fn drop(&mut self) {
        self.ending.end(Some(Failure::new(Reason::PeerLost, "the owner dropped its stream")));
    }
}
