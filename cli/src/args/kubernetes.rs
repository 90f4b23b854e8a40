//! Flags of the commands that look at a cluster.

use clap::Args;

/// Which cluster and namespace; `kubectl` finds out what is left out, as it always does.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Cluster")]
pub(crate) struct ClusterArgs {
    /// Namespace [default: that of the current context].
    #[arg(short, long, value_name = "NAME")]
    namespace: Option<String>,
    /// Context of the kubeconfig [default: the current one].
    #[arg(long, value_name = "NAME")]
    context: Option<String>,
    /// The kubeconfig [default: kubectl's].
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<String>,
}

impl ClusterArgs {
    /// The same as flags of `kubectl`.
    pub(crate) fn flags(&self) -> Vec<String> {
        let flags = [("namespace", &self.namespace), ("context", &self.context), ("kubeconfig", &self.kubeconfig)];
        flags.into_iter().filter_map(|(name, value)| Some(format!("--{name}={}", value.as_ref()?))).collect()
    }
}

/// Flags of `skein status`.
#[derive(Clone, Debug, Args)]
pub(crate) struct StatusArgs {
    /// The ModelDeployment [default: all of the namespace].
    #[arg(value_name = "NAME")]
    pub(crate) name: Option<String>,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
}

/// Flags of `skein top`.
#[derive(Clone, Debug, Args)]
pub(crate) struct TopArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
}

/// Flags of `skein logs`.
#[derive(Clone, Debug, Args)]
pub(crate) struct LogsArgs {
    /// The ModelDeployment whose workers are meant; without it, the routers of the namespace.
    #[arg(value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Only this replica.
    #[arg(long, value_name = "N", requires = "name")]
    pub(crate) replica: Option<u32>,
    /// Only this stage.
    #[arg(long, value_name = "N", requires = "name")]
    pub(crate) stage: Option<u32>,
    /// Only this rank.
    #[arg(long, value_name = "N", requires = "name")]
    pub(crate) rank: Option<u32>,
    /// Only the workers of draft models.
    #[arg(long, requires = "name", conflicts_with_all = ["stage", "rank"])]
    pub(crate) draft: bool,
    /// Go on as lines come.
    #[arg(long)]
    pub(crate) follow: bool,
    /// Of the container before its last restart.
    #[arg(long, conflicts_with = "follow")]
    pub(crate) previous: bool,
    /// Last lines of each.
    #[arg(long, default_value_t = 100, value_name = "N")]
    pub(crate) tail: u32,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
}
