//! Accepting HTTP connections: who sends a request's head too slowly is let go, and a server that stops lets running requests end.

use std::io;
use std::pin::pin;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::debug;

use super::stopped;

/// Pause after a connection could not be accepted: what is missing then (file descriptors, memory) comes back as others end.
const PAUSE: Duration = Duration::from_millis(100);
/// What a client that speaks HTTP/2 without asking first sends first (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Pause between two looks at a preface that came in part.
const GLANCE: Duration = Duration::from_millis(10);

/// Serves `app` on `listener` until `stopping`, then until the requests that run have ended. A connection whose client takes longer than
/// `patience` to send a request's head, from its opening or from the answer before, is closed.
///
/// Dropping this closes every connection.
pub(super) async fn serve(listener: TcpListener, app: Router, patience: Duration, stopping: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    let mut stop = pin!(stopped(stopping.clone()));
    loop {
        let accepted = tokio::select! {
            biased;
            () = &mut stop => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                connections.spawn(connection(stream, app.clone(), patience, stopping.clone()));
            }
            Err(error) => {
                debug!(%error, "a connection could not be accepted");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Waits for so much of a connection that its HTTP version is known: until then no limit of the HTTP library holds.
async fn first_bytes(stream: &TcpStream) -> io::Result<()> {
    let mut seen = [0; PREFACE.len()];
    loop {
        let length = stream.peek(&mut seen).await?;
        if length == 0 || length == PREFACE.len() || !PREFACE.starts_with(&seen[..length]) {
            return Ok(());
        }
        // A piece of the preface, which comes in one: that more came is not told, as nothing was taken.
        tokio::time::sleep(GLANCE).await;
    }
}

async fn connection(stream: TcpStream, app: Router, patience: Duration, stopping: watch::Receiver<bool>) {
    // A token is a small packet that nothing follows for a while: it must not wait for one.
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%error, "small packets are delayed on a connection");
    }
    let spoke = tokio::select! {
        spoke = tokio::time::timeout(patience, first_bytes(&stream)) => spoke.is_ok_and(|read| read.is_ok()),
        () = stopped(stopping.clone()) => false,
    };
    if !spoke {
        return;
    }
    let service = TowerToHyperService::new(app);
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(patience);
    builder.http2().timer(TokioTimer::new()).enable_connect_protocol();
    let mut served = pin!(builder.serve_connection_with_upgrades(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = served.as_mut() => ended,
        () = stopped(stopping) => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = ended {
        debug!(error, "a connection ended early");
    }
}
