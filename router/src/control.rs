//! The control plane as a router of a pool sees it: states come down one stream that the router dials, reports go up on it.
//!
//! The state taken last is kept on a file, so that a router which starts while the control plane is away serves what was served before.

mod store;

use std::{io, path::PathBuf, time::Duration};

use identity::{Dialer, Identity, Name};
use proto::{
    bearer::Bearer,
    convert::{ConvertError, decode_fleet},
    fleet::{self as wire, POOL_HEADER, fleet_client::FleetClient},
};
use tokio::time::{interval, sleep};
use tokio_stream::{StreamExt, wrappers::IntervalStream};
use tokio_util::sync::CancellationToken;
use tonic::{
    Request,
    metadata::{Ascii, MetadataValue},
    transport::{Endpoint, Error as TransportError},
};
use tracing::{info, warn};

pub use self::store::FleetStore;
use crate::edge::{AdapterLoad, DeploymentLoad, Edge};

/// How often load is reported.
const REPORT: Duration = Duration::from_secs(1);
/// First and longest pause between attempts to reach the control plane.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// A control plane that does not accept a connection within this time is away.
const CONNECT: Duration = Duration::from_secs(3);
/// How often a silent connection is tried out, and how long its other end may take.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(5));
/// Largest state: a thousand replicas of a thousand workers each, by their addresses.
const STATE: usize = 64 << 20;

/// Why the control plane cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The address is not one.
    #[error("{endpoint} is not an address of a control plane")]
    Endpoint {
        /// What was given.
        endpoint: String,
        /// Why not.
        source: TransportError,
    },
    /// The deployment is no name.
    #[error("{name:?} is not the name of a deployment")]
    Pool {
        /// What was given.
        name: String,
    },
    /// The kept state cannot be read or written.
    #[error("failed to {action} the kept state {path}")]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The kept state is damaged.
    #[error("{path} is not a fleet state")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: serde_json::Error,
    },
}

/// Why one stream ended.
#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error("the control plane cannot be reached")]
    Connect(#[source] TransportError),
    #[error("the control plane ended the stream: {0}")]
    Status(tonic::Status),
    #[error("the control plane sent a state that is not understood")]
    State(#[source] ConvertError),
    #[error("the control plane closed the stream")]
    Closed,
    #[error("the state is not kept")]
    Kept(#[source] ControlError),
}

/// A router's tie to its control plane.
#[derive(Clone, Debug)]
pub struct Control {
    name: String,
    endpoint: Endpoint,
    bearer: Bearer,
    identity: Option<Identity>,
    /// The deployment whose own router this is.
    pool: Option<MetadataValue<Ascii>>,
}

impl Control {
    /// Follows the control plane at `endpoint` (`http://host:port`) as the router `name`; calls carry `token`.
    ///
    /// # Errors
    /// When `endpoint` is not an address.
    pub fn new(name: String, endpoint: &str, token: Option<String>) -> Result<Self, ControlError> {
        let parsed = Endpoint::from_shared(endpoint.to_owned())
            .map_err(|source| ControlError::Endpoint { endpoint: endpoint.to_owned(), source })?;
        let endpoint = parsed
            .connect_timeout(CONNECT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEPALIVE.0)
            .keep_alive_timeout(KEEPALIVE.1)
            .keep_alive_while_idle(true);
        Ok(Self { name, endpoint, bearer: Bearer::new(token), identity: None, pool: None })
    }

    /// Proves to be `identity`, and has the control plane prove that it is the operator; without one, the connection is plain.
    #[must_use]
    pub fn with_identity(self, identity: Option<Identity>) -> Self {
        Self { identity, ..self }
    }

    /// Follows as a router of the deployment `pool` alone; as one of the namespace's where it is empty.
    ///
    /// # Errors
    /// When that is no name.
    pub fn of_deployment(self, pool: &str) -> Result<Self, ControlError> {
        let named = || pool.parse().map_err(|_| ControlError::Pool { name: pool.to_owned() });
        Ok(Self { pool: if pool.is_empty() { None } else { Some(named()?) }, ..self })
    }

    /// Puts each state that comes into `store`, and reports the load of `edge`, until `stop`. Dials again, with growing pauses, whenever the
    /// stream ends; the state taken last stays in force meanwhile.
    pub async fn follow(self, edge: Edge, store: FleetStore, stop: CancellationToken) {
        let mut pause = BACKOFF.0;
        loop {
            let before = store.number();
            let ended = tokio::select! {
                () = stop.cancelled() => return,
                ended = self.stream(&edge, &store) => ended,
            };
            // A stream that brought something was a good one.
            pause = if store.number() > before { BACKOFF.0 } else { (pause * 2).min(BACKOFF.1) };
            warn_away(&ended, pause);
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep(pause) => {}
            }
        }
    }

    /// One stream, until it ends.
    async fn stream(&self, edge: &Edge, store: &FleetStore) -> StreamError {
        let dialer = Dialer::new(self.identity.clone().map(|own| (own, Name::Operator)));
        let channel = match self.endpoint.connect_with_connector(dialer).await {
            Ok(channel) => channel,
            Err(error) => return StreamError::Connect(error),
        };
        let mut client = FleetClient::with_interceptor(channel, self.bearer.clone()).max_decoding_message_size(STATE);
        let (name, edge, seen) = (self.name.clone(), edge.clone(), store.clone());
        let reports = IntervalStream::new(interval(REPORT)).map(move |_| {
            let (term, number) = seen.number();
            wire::RouterReport { router: name.clone(), term, number, loads: edge.load().iter().map(load).collect() }
        });
        let mut request = Request::new(reports);
        if let Some(pool) = &self.pool {
            request.metadata_mut().insert(POOL_HEADER, pool.clone());
        }
        let mut states = match client.watch(request).await {
            Ok(response) => response.into_inner(),
            Err(status) => return StreamError::Status(status),
        };
        info!("following the control plane");
        loop {
            match states.message().await {
                Ok(Some(state)) => {
                    let taken = decode_fleet(state).map_err(StreamError::State);
                    if let Err(error) = match taken {
                        Ok(state) => store.take(state).await.map(|_| ()).map_err(StreamError::Kept),
                        Err(error) => Err(error),
                    } {
                        return error;
                    }
                }
                Ok(None) => return StreamError::Closed,
                Err(status) => return StreamError::Status(status),
            }
        }
    }
}

fn warn_away(ended: &StreamError, pause: Duration) {
    let error: &dyn std::error::Error = ended;
    warn!(error, pause_ms = pause.as_millis() as u64, "the control plane is away; the last state stays in force");
}

fn adapter(adapter: &AdapterLoad) -> wire::AdapterState {
    let failure = adapter.failure.clone().unwrap_or_default();
    wire::AdapterState { numerics: adapter.numerics.clone(), ready: adapter.ready, failure }
}

fn load(load: &DeploymentLoad) -> wire::DeploymentLoad {
    let replica = |r: &crate::edge::ReplicaLoad| wire::ReplicaState {
        name: r.name.clone(),
        ready: r.ready,
        last_failure: r.last_failure.clone().unwrap_or_default(),
        drives: r.drives,
        sequences: r.sequences as u32,
        adapters: r.adapters.iter().map(adapter).collect(),
        fetched_bytes: r.fetching.done,
        fetch_bytes: r.fetching.total,
        draft: r.draft.as_ref().map(|d| wire::DraftState { ready: d.ready, failure: d.failure.clone().unwrap_or_default() }),
    };
    wire::DeploymentLoad {
        deployment: load.deployment.clone(),
        queued: load.queued as u32,
        running: load.running as u32,
        kv_used: load.kv_used,
        ttft_p90_seconds: load.ttft_p90_seconds.unwrap_or_default(),
        itl_p90_seconds: load.itl_p90_seconds.unwrap_or_default(),
        tokens_per_second: load.tokens_per_second,
        replicas: load.replicas.iter().map(replica).collect(),
        held: load.held as u32,
    }
}

#[cfg(test)]
mod tests;
