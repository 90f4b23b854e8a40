//! Accepting connections, of HTTP and gRPC: who sends a request's head too slowly is let go, and a server that stops lets running
//! requests end and nothing else hold it.

use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::debug;

use super::sent::{Due, Noted};
use super::stopped;
use crate::delays::Delays;
use crate::edge::Edge;

/// Pause after a connection could not be accepted: what is missing then (file descriptors, memory) comes back as others end.
const PAUSE: Duration = Duration::from_millis(100);
/// What a client that speaks HTTP/2 without asking first sends first (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Pause between two looks at a preface that came in part.
const GLANCE: Duration = Duration::from_millis(10);
/// How long a connection without a running request stays open once the server is to stop: for the end of an answer to leave, and for a
/// request that was on its way.
const MOMENT: Duration = Duration::from_millis(300);
/// A connection is kept for this part of a client's patience while a model changes from one pool of routers to another.
const STAY: u32 = 3;

/// What is spoken on a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    /// HTTP/1.1 and HTTP/2.
    Http,
    /// HTTP/2 alone, from the first byte on.
    Grpc,
}

/// Serves `app` on `listener` until `stopping`, then until the requests that run have ended. A connection whose client takes longer than
/// `patience` to send a request's head, from its opening or, over HTTP/1, from the answer before, is closed. While other routers take over a
/// model of `edge`, or give it to this one, no connection is kept for long: its next request is to come to where a service leads by then.
/// What a request's handler says is [`Due`] is counted in `delays` when it is written.
///
/// Dropping this closes every connection.
pub(super) async fn serve(
    (listener, protocol): (TcpListener, Protocol),
    app: Router,
    edge: Edge,
    (patience, delays): (Duration, Arc<Delays>),
    stopping: watch::Receiver<bool>,
) {
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
                let limits = (patience, Arc::clone(&delays));
                connections.spawn(connection((stream, protocol), app.clone(), edge.clone(), limits, stopping.clone()));
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

/// Waits for so much of a connection that its HTTP version is known: until then no limit of the HTTP library holds. True for HTTP/2.
async fn first_bytes(stream: &TcpStream) -> io::Result<bool> {
    let mut seen = [0; PREFACE.len()];
    loop {
        let length = stream.peek(&mut seen).await?;
        if length == 0 || !PREFACE.starts_with(&seen[..length]) {
            return Ok(false);
        }
        if length == PREFACE.len() {
            return Ok(true);
        }
        // A piece of the preface, which comes in one: that more came is not told, as nothing was taken.
        tokio::time::sleep(GLANCE).await;
    }
}

/// Why a connection is not to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Signal {
    /// A model changes to other routers.
    Moves,
    /// The server stops.
    Stops,
}

async fn connection(
    (stream, protocol): (TcpStream, Protocol),
    app: Router,
    edge: Edge,
    (patience, delays): (Duration, Arc<Delays>),
    stopping: watch::Receiver<bool>,
) {
    // A token is a small packet that nothing follows for a while: it must not wait for one.
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%error, "small packets are delayed on a connection");
    }
    let spoke = tokio::select! {
        spoke = tokio::time::timeout(patience, first_bytes(&stream)) => spoke,
        () = stopped(stopping.clone()) => return,
    };
    if !spoke.is_ok_and(|read| read.is_ok_and(|http2| http2 || protocol == Protocol::Http)) {
        return;
    }
    let (running, due) = (Running::default(), Due::new(delays));
    let service = TowerToHyperService::new(app.layer(from_fn_with_state((running.clone(), due.clone()), count)));
    let mut builder = Builder::new(TokioExecutor::new());
    // What is written is short: one buffer costs less than a list of them.
    builder.http1().timer(TokioTimer::new()).header_read_timeout(patience).writev(false);
    builder.http2().timer(TokioTimer::new()).enable_connect_protocol();
    // They are looked at when they are woken alone, and not whenever the connection is.
    let signals: FuturesUnordered<Pin<Box<dyn Future<Output = Signal> + Send>>> = FuturesUnordered::new();
    signals.push(Box::pin(async move {
        edge.moving().await;
        drop(edge);
        tokio::time::sleep(patience / STAY).await;
        Signal::Moves
    }));
    signals.push(Box::pin(async move {
        stopped(stopping).await;
        Signal::Stops
    }));
    // Dropped when it has ended, and with it what a client that is gone had asked for.
    let ended = {
        let mut served = pin!(builder.serve_connection_with_upgrades(TokioIo::new(Noted::new(stream, due)), service));
        let mut signals = pin!(signals);
        let mut stops = false;
        loop {
            tokio::select! {
                ended = served.as_mut() => break ended,
                Some(signal) = signals.next() => stops |= signal == Signal::Stops,
                // Half a head, or a client that does not answer a farewell: nothing that anybody waits for.
                () = running.over(), if stops => return,
            }
            // What runs on it goes on.
            served.as_mut().graceful_shutdown();
        }
    };
    if let Err(error) = ended {
        debug!(error, "a connection ended early");
    }
    // What an upgraded connection carries is no longer the HTTP library's.
    running.none().await;
}

/// How many requests of a connection run.
#[derive(Clone, Debug, Default)]
struct Running(Arc<watch::Sender<usize>>);

impl Running {
    fn begin(&self) -> Begun {
        self.0.send_modify(|requests| *requests += 1);
        Begun(Arc::new(End(self.clone())))
    }

    /// Completes when no request runs.
    async fn none(&self) {
        // The sender lives as long as `self`.
        let _ = self.0.subscribe().wait_for(|requests| *requests == 0).await;
    }

    /// Completes when no request has run for a [`MOMENT`].
    async fn over(&self) {
        loop {
            self.none().await;
            tokio::time::sleep(MOMENT).await;
            if *self.0.borrow() == 0 {
                return;
            }
        }
    }
}

/// A request runs while a clone of this lives; it is among the extensions of the request for what outlives its answer.
#[derive(Clone, Debug)]
pub(super) struct Begun(#[expect(dead_code, reason = "held for its end")] Arc<End>);

#[derive(Debug)]
struct End(Running);

impl Drop for End {
    fn drop(&mut self) {
        self.0.0.send_modify(|requests| *requests -= 1);
    }
}

/// Counts a request until the last byte of its answer is handed over.
async fn count(State((running, due)): State<(Running, Due)>, mut request: Request, next: Next) -> Response {
    // Health and reflection are watched for as long as a client likes; such a stream ends with the server.
    if request.uri().path().starts_with("/grpc.") {
        return next.run(request).await;
    }
    let begun = running.begin();
    request.extensions_mut().insert(begun.clone());
    request.extensions_mut().insert(due);
    next.run(request).await.map(|body| Body::new(Counted { body, _begun: begun }))
}

/// The body of an answer.
struct Counted {
    body: Body,
    _begun: Begun,
}

impl HttpBody for Counted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<http_body::Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}
