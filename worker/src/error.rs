//! Why a worker ended.

use std::{io, net::SocketAddr};

use engine::LoadShardError;
use source::SourceError;

/// A worker that could not start, load or go on.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The address cannot be listened on.
    #[error("failed to listen on {address}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The certificate is another process's.
    #[error("the certificate is that of {got}, expected that of a worker of stage {stage} of {replica}")]
    Identity {
        /// The name in it.
        got: String,
        /// Its replica by the specification.
        replica: String,
        /// Its stage by the specification.
        stage: usize,
    },
    /// The address of a router is not one.
    #[error("{address} is not the address of a router, expected http://HOST:PORT")]
    Router {
        /// What was given.
        address: String,
    },
    /// The collective's socket cannot be made.
    #[error("failed to open a socket for the ranks of the stage")]
    Collective(#[source] io::Error),
    /// A thread cannot be started.
    #[error("failed to start the {name} thread")]
    Thread {
        /// What it is for.
        name: &'static str,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The model cannot be opened.
    #[error("failed to open the model at {uri}")]
    Source {
        /// Where it was looked for.
        uri: String,
        /// The source's error.
        #[source]
        source: SourceError,
    },
    /// The shard cannot be loaded.
    #[error("failed to load the shard of stage {stage} rank {rank}")]
    Load {
        /// Its stage.
        stage: usize,
        /// Its rank.
        rank: usize,
        /// The engine's error.
        #[source]
        source: LoadShardError,
    },
    /// The engine thread panicked.
    #[error("the engine thread ended: {detail}")]
    Engine {
        /// What it said.
        detail: String,
    },
    /// The gRPC server failed.
    #[error("the gRPC server failed")]
    Server(#[from] tonic::transport::Error),
}

impl WorkerError {
    /// Stable, low-cardinality key for metrics and status conditions.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Bind { .. } => "PortInUse",
            Self::Identity { .. } => "WrongIdentity",
            Self::Router { .. } => "WrongAddress",
            Self::Collective(_) | Self::Thread { .. } | Self::Engine { .. } | Self::Server(_) => "WorkerFailed",
            Self::Source { source, .. } => source.reason(),
            Self::Load { source, .. } => source.reason(),
        }
    }
}
