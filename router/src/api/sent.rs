//! How long tokens take from the arrival of a worker's reply to the write to the client's socket.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use crate::delays::Delays;

/// Tokens that a connection is about to write: when each of them arrived.
#[derive(Clone, Debug)]
pub(super) struct Due(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    arrivals: Mutex<Vec<Instant>>,
    delays: Arc<Delays>,
}

impl Due {
    /// For a new connection.
    pub(super) fn new(delays: Arc<Delays>) -> Self {
        Self(Arc::new(Inner { arrivals: Mutex::default(), delays }))
    }

    /// A token that arrived then is handed to the connection.
    pub(super) fn add(&self, arrived: Instant) {
        self.0.arrivals.lock().unwrap_or_else(PoisonError::into_inner).push(arrived);
    }

    /// The connection wrote.
    fn written(&self) {
        let mut arrivals = self.0.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        if !arrivals.is_empty() {
            let now = Instant::now();
            arrivals.drain(..).for_each(|arrived| self.0.delays.observe(now.saturating_duration_since(arrived)));
        }
    }
}

/// A connection that says when it wrote.
pub(super) struct Noted<T> {
    stream: T,
    due: Due,
}

impl<T> Noted<T> {
    pub(super) fn new(stream: T, due: Due) -> Self {
        Self { stream, due }
    }

    fn note(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if matches!(written, Poll::Ready(Ok(bytes)) if bytes > 0) {
            self.due.written();
        }
        written
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Noted<T> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Noted<T> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.note(written)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, context: &mut Context<'_>, parts: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, parts);
        self.note(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_token_is_counted_by_the_write_that_follows_it() {
        let delays = Arc::new(Delays::default());
        let due = Due::new(Arc::clone(&delays));
        let (here, _there) = tokio::io::duplex(4);
        let mut stream = Noted::new(here, due.clone());
        stream.write_all(b"ab").await.expect("there is room");
        assert_eq!(delays.counted().count(), 0, "nothing was due");
        due.add(Instant::now());
        tokio::time::advance(Duration::from_millis(5)).await;
        due.add(Instant::now());
        tokio::time::advance(Duration::from_millis(2)).await;
        stream.write_all(b"cd").await.expect("there is room");
        let counted = delays.counted();
        assert_eq!(counted.count(), 2);
        assert!((counted.seconds() - 0.009).abs() < 1e-9, "{counted:?}");
        // A client that does not read: the token waits.
        due.add(Instant::now());
        assert!(tokio::time::timeout(Duration::from_secs(1), stream.write_all(b"e")).await.is_err());
        assert_eq!(delays.counted(), counted);
    }
}
