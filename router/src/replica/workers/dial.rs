//! A worker's address, and the calls that go there.

use std::{
    io::{self, ErrorKind},
    sync::OnceLock,
    time::Duration,
};

use identity::{Dialer, Identity, Name};
use proto::{bearer::Bearer, worker::worker_client::WorkerClient};
use tokio::time::error::Elapsed;
use tonic::{
    Code, Status,
    service::interceptor::InterceptedService,
    transport::{Channel, Endpoint},
};

use super::{ReplicaError, WorkerAddress, WorkersConnector};

pub(super) type Client = WorkerClient<InterceptedService<Channel, Bearer>>;

/// A worker that does not accept a connection within this time is lost.
const CONNECT: Duration = Duration::from_secs(1);
/// How often a connection is tried out, and how long its other end may take. Heartbeats notice earlier what happens in a session.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(5));
/// Bytes that may be under way on one stream: several rows of logits.
const WINDOW: u32 = 8 << 20;
/// Largest reply: the logits of a few hundred tokens of a large vocabulary are a megabyte each.
const REPLY: usize = 1 << 30;

/// What is said of a worker at whose address the network brings nothing.
const NOWHERE: &str = "nothing answers there";

/// One worker as the router knows it.
pub(super) struct Remote {
    pub(super) stage: usize,
    pub(super) rank: usize,
    pub(super) address: String,
    bearer: Bearer,
    /// Who this router is, and who the worker must be.
    identity: Option<(Identity, Name)>,
    /// Made at the first call; connects again after a broken connection.
    client: OnceLock<Client>,
}

impl Remote {
    pub(super) fn new(replica: &str, (stage, rank): (usize, usize), address: &str, connector: &WorkersConnector) -> Self {
        let identity = connector.identity.clone().and_then(|own| {
            let expected = own.name().worker(replica, stage)?;
            Some((own, expected))
        });
        Self { stage, rank, address: address.to_owned(), bearer: connector.bearer.clone(), identity, client: OnceLock::new() }
    }

    /// For a call.
    pub(super) fn client(&self) -> Result<Client, ReplicaError> {
        if let Some(client) = self.client.get() {
            return Ok(client.clone());
        }
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).map_err(|e| self.lost(format!("not an address: {e}")))?;
        let channel = endpoint
            .connect_timeout(CONNECT)
            .tcp_nodelay(true)
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .http2_keep_alive_interval(KEEPALIVE.0)
            .keep_alive_timeout(KEEPALIVE.1)
            .connect_with_connector_lazy(Dialer::new(self.identity.clone()));
        let client = WorkerClient::with_interceptor(channel, self.bearer.clone());
        let client = client.max_decoding_message_size(REPLY).max_encoding_message_size(usize::MAX);
        Ok(self.client.get_or_init(|| client).clone())
    }

    /// For messages.
    pub(super) fn name(&self) -> String {
        format!("stage {} rank {} at {}", self.stage, self.rank, self.address)
    }

    /// As other workers find it.
    pub(super) fn wire(&self) -> WorkerAddress {
        WorkerAddress { stage: self.stage as u32, rank: self.rank as u32, address: self.address.clone(), ..WorkerAddress::default() }
    }

    pub(super) fn lost(&self, detail: impl Into<String>) -> ReplicaError {
        ReplicaError::Lost { worker: self.name(), detail: detail.into() }
    }

    pub(super) fn protocol(&self, detail: impl Into<String>) -> ReplicaError {
        ReplicaError::Protocol { worker: self.name(), detail: detail.into() }
    }

    /// What a refused or broken call means.
    pub(super) fn refused(&self, status: &Status) -> ReplicaError {
        let failed = |reason: &str| ReplicaError::Failed { worker: self.name(), reason: reason.into(), detail: status.message().into() };
        match status.code() {
            Code::Unauthenticated => failed("unauthenticated"),
            Code::FailedPrecondition => failed("refused"),
            Code::Aborted => failed("busy"),
            _ => self.lost(broken(status)),
        }
    }
}

/// Why a call that broke did, without what is said twice.
///
/// Whether a network says that there is no way or says nothing differs from one attempt to the next (routers limit how often they say it), and
/// whoever reads it would see news where there are none.
fn broken(status: &Status) -> String {
    let mut said = vec![status.message().to_owned()];
    let mut next = std::error::Error::source(status);
    while let Some(cause) = next {
        let kind = cause.downcast_ref::<io::Error>().map(io::Error::kind);
        if cause.is::<Elapsed>() || matches!(kind, Some(ErrorKind::TimedOut | ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable)) {
            return NOWHERE.to_owned();
        }
        said.push(cause.to_string());
        next = cause.source();
    }
    said.retain(|text| !text.is_empty() && text != "transport error");
    said.dedup();
    said.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_cannot_be_reached_is_told_in_the_same_words() {
        let of = |error: io::Error| broken(&Status::from_error(Box::new(error)));
        for kind in [ErrorKind::TimedOut, ErrorKind::HostUnreachable, ErrorKind::NetworkUnreachable] {
            assert_eq!(of(kind.into()), NOWHERE);
        }
        let refused = of(ErrorKind::ConnectionRefused.into());
        assert!(refused.contains("refused") && refused.matches("refused").count() == 1, "{refused}");
        assert_eq!(broken(&Status::unknown("it is down")), "it is down");
    }

    #[tokio::test]
    async fn a_connection_that_is_not_answered_in_time_is_one_of_them() {
        // A full queue of connections that nobody accepts: the next one gets no answer.
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        socket.bind("127.0.0.1:0".parse().expect("an address")).expect("a free port");
        let listener = socket.listen(0).expect("a port");
        let address = listener.local_addr().expect("an address");
        let mut held = Vec::new();
        while let Ok(stream) = tokio::time::timeout(CONNECT / 4, tokio::net::TcpStream::connect(address)).await {
            held.push(stream.expect("a connection"));
        }
        let connector = WorkersConnector::new(None);
        let remote = Remote::new("r", (0, 0), &address.to_string(), &connector);
        let mut client = remote.client().expect("a client");
        let error = client.probe(proto::worker::ProbeRequest::default()).await.expect_err("nobody answers");
        assert_eq!(broken(&error), NOWHERE);
    }
}
