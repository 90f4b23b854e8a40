//! Flags and environment, parsed once; nothing else in this crate reads either.

use std::net::SocketAddr;

use clap::{ArgAction, Parser, ValueEnum, value_parser};

use crate::stop::Place;

/// Whether internal connections prove names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Tls {
    /// By certificates that the operator issues and replaces.
    #[value(name = "Auto")]
    Auto,
    /// Not: tokens, in clear text.
    #[value(name = "Disabled")]
    Disabled,
}

/// Reconciles `ModelDeployment` resources into routers and workers.
#[derive(Clone, Debug, Parser)]
#[command(name = "skein-operator", version, max_term_width = 120)]
pub struct Args {
    /// Image of routers and workers; its entry point is `skein`.
    #[arg(long, env = "SKEIN_IMAGE", value_name = "IMAGE", default_value_if("print_crd", "true", ""))]
    pub image: String,
    /// When the image is pulled.
    #[arg(long, env = "SKEIN_IMAGE_PULL_POLICY", value_name = "POLICY", default_value = "IfNotPresent", value_parser = ["Always", "IfNotPresent", "Never"])]
    pub image_pull_policy: String,
    /// Where routers find this operator, as http://host:port.
    #[arg(long, env = "SKEIN_FLEET_ADDRESS", value_name = "URL", default_value_if("print_crd", "true", ""))]
    pub fleet_address: String,
    /// Base URL of hf:// sources, for this operator and for workers [default: the public hub].
    #[arg(long, env = "HF_ENDPOINT", value_name = "URL")]
    pub hf_endpoint: Option<String>,
    /// Folder of nodes that file: sources may be read from, in namespaces that enforce Pod Security `privileged`; may be given several times [default: none].
    #[arg(long = "host-path", value_name = "FOLDER")]
    pub host_paths: Vec<String>,
    /// Folder of nodes for caches of policy NodeLocal, in namespaces that enforce Pod Security `privileged` [default: none].
    #[arg(long, env = "SKEIN_NODE_CACHE", value_name = "FOLDER")]
    pub node_cache: Option<String>,
    /// The one namespace to look after [default: all].
    #[arg(long, env = "SKEIN_WATCH_NAMESPACE", value_name = "NAMESPACE")]
    pub watch_namespace: Option<String>,
    /// Namespace of this operator: that of its lease, and the one that routers' networks let it in from.
    #[arg(long, env = "POD_NAMESPACE", value_name = "NAMESPACE", default_value = "skein-system")]
    pub namespace: String,
    /// Name of this process in the lease [default: a random one].
    #[arg(long, env = "POD_NAME", value_name = "NAME")]
    pub identity: Option<String>,
    /// Address that routers dial.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:7070")]
    pub fleet_listen: SocketAddr,
    /// Address of health and metrics.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:8080")]
    pub http_listen: SocketAddr,
    /// CPU that each worker asks for.
    #[arg(long, env = "SKEIN_WORKER_CPU", value_name = "QUANTITY", default_value = "100m")]
    pub worker_cpu: String,
    /// Routers of each namespace.
    #[arg(long, env = "SKEIN_POOL_SIZE", value_name = "N", default_value_t = 2, value_parser = value_parser!(u32).range(1..=64))]
    pub pool_size: u32,
    /// CPU that each router asks for.
    #[arg(long, env = "SKEIN_ROUTER_CPU", value_name = "QUANTITY", default_value = "100m")]
    pub router_cpu: String,
    /// Memory that each router asks for.
    #[arg(long, env = "SKEIN_ROUTER_MEMORY", value_name = "QUANTITY", default_value = "256Mi")]
    pub router_memory: String,
    /// Whether internal connections are encrypted, and each end proves its name: by certificates that this operator issues, or not.
    #[arg(long, env = "SKEIN_TLS", value_name = "MODE", value_enum, default_value_t = Tls::Auto)]
    pub tls: Tls,
    /// How long a certificate is valid.
    #[arg(long, env = "SKEIN_CERTIFICATE_SECONDS", value_name = "SECONDS", default_value_t = 72 * 3600, value_parser = value_parser!(u64).range(120..))]
    pub certificate_seconds: u64,
    /// After how long it is replaced.
    #[arg(long, env = "SKEIN_CERTIFICATE_RENEW_SECONDS", value_name = "SECONDS", default_value_t = 12 * 3600, value_parser = value_parser!(u64).range(10..))]
    pub certificate_renew_seconds: u64,
    /// After how long another authority signs.
    #[arg(long, env = "SKEIN_AUTHORITY_SECONDS", value_name = "SECONDS", default_value_t = 30 * 24 * 3600, value_parser = value_parser!(u64).range(10..))]
    pub authority_seconds: u64,
    /// How long a new authority is trusted before it signs: what a Secret takes to reach every process.
    #[arg(long, env = "SKEIN_AUTHORITY_SETTLE_SECONDS", value_name = "SECONDS", default_value_t = 600, value_parser = value_parser!(u64).range(5..))]
    pub authority_settle_seconds: u64,
    /// For tests: where to end with exit code 86, once.
    #[arg(long, env = "SKEIN_STOP_AT", value_name = "PLACE", hide = true)]
    pub stop_at: Option<Place>,
    /// Log filter, such as `info,operator=debug`.
    #[arg(long, env = "RUST_LOG", value_name = "FILTER", default_value = "info,kube=warn,tower=warn,hyper=warn")]
    pub log: String,
    /// JSON log lines.
    #[arg(long, action = ArgAction::SetTrue)]
    pub log_json: bool,
    /// Print the CustomResourceDefinition and exit.
    #[arg(long, exclusive = true)]
    pub print_crd: bool,
}
