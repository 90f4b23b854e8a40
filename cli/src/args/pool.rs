//! Flags of `skein router`, which the operator starts in a pod.

use std::{net::SocketAddr, path::PathBuf};

use clap::{ArgAction, Args};

/// Flags of `skein router`.
#[derive(Clone, Debug, Args)]
pub(crate) struct RouterArgs {
    /// Name of this router in its pool.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: String,
    /// Deployment whose own router this is [default: one of the namespace's].
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub(crate) deployment: String,
    /// Control plane that tells the fleet and takes reports, as http://host:port.
    #[arg(long, value_name = "URL")]
    pub(crate) fleet: String,
    /// Address of the HTTP API.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:8080")]
    pub(crate) http: SocketAddr,
    /// Address of the gRPC API.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:8081")]
    pub(crate) grpc: SocketAddr,
    /// Address where the other routers of the pool, and workers that announce themselves, reach this one.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:7072")]
    pub(crate) pool: SocketAddr,
    /// Router to ask for the fleet state while none is known and the control plane is away, as http://host:port; may be repeated.
    #[arg(long, value_name = "URL", action = ArgAction::Append)]
    pub(crate) peer: Vec<String>,
    /// File that keeps the last fleet state.
    #[arg(long, value_name = "FILE")]
    pub(crate) state: Option<PathBuf>,
    /// Seconds that running requests may go on once this router is told to stop.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub(crate) drain_seconds: u64,
    /// Folder of this router's certificate (tls.crt, tls.key) and of the authorities it trusts (ca.crt): internal connections are encrypted, and
    /// each end proves its name.
    #[arg(long, value_name = "DIR")]
    pub(crate) identity: Option<PathBuf>,
    /// Token for calls to the control plane.
    #[arg(long, env = "SKEIN_FLEET_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    pub(crate) fleet_token: Option<String>,
    /// Token for calls among the routers of the pool; without it, and without --identity, this router is a pool of its own.
    #[arg(long, env = "SKEIN_POOL_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    pub(crate) pool_token: Option<String>,
    /// Token for calls to workers, and of their announcements.
    #[arg(long, env = "SKEIN_WORKER_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    pub(crate) worker_token: Option<String>,
}
