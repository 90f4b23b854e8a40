//! The cluster, asked through `kubectl`: it has the credentials, the proxies and the plugins for logging in.

use std::process::{ExitStatus, Stdio};

use anyhow::{Context, anyhow};
use serde_json::Value;
use tokio::process::Command;

use crate::{args::ClusterArgs, exit::Outcome};

/// `kubectl` with the flags that choose cluster and namespace.
#[derive(Debug)]
pub(crate) struct Kubectl {
    flags: Vec<String>,
}

impl Kubectl {
    pub(crate) fn new(cluster: &ClusterArgs) -> Self {
        Self { flags: cluster.flags() }
    }

    /// What `get` prints of `what`, as JSON.
    ///
    /// # Errors
    /// If kubectl is missing or fails; its own words are the message.
    pub(crate) async fn get(&self, what: &[&str]) -> Outcome<Value> {
        let text = self.output(&[&["get", "--output=json"], what].concat()).await?;
        Ok(serde_json::from_str(&text).context("kubectl printed something other than JSON")?)
    }

    /// The body of a GET at `path` of the API server.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub(crate) async fn raw(&self, path: &str) -> Outcome<String> {
        self.output(&["get", "--raw", path]).await
    }

    /// Runs it with this process's own output.
    ///
    /// # Errors
    /// If kubectl is missing or fails; it has said why.
    pub(crate) async fn pass(&self, args: &[String]) -> Outcome {
        let mut command = self.command();
        let status = command.args(args).status().await.map_err(missing)?;
        checked(status, "")
    }

    async fn output(&self, args: &[&str]) -> Outcome<String> {
        let done = self.command().args(args).output().await.map_err(missing)?;
        checked(done.status, String::from_utf8_lossy(&done.stderr).trim())?;
        Ok(String::from_utf8(done.stdout).context("kubectl printed something other than UTF-8")?)
    }

    /// `kubectl` with those flags, for what is run beside this process; it ends when dropped.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new("kubectl");
        // An interrupted command leaves none behind.
        command.args(&self.flags).stdin(Stdio::null()).kill_on_drop(true);
        command
    }
}

/// Why kubectl did not start.
pub(crate) fn missing(error: std::io::Error) -> anyhow::Error {
    anyhow::Error::new(error).context("failed to start kubectl, by which clusters are asked; it has to be in PATH")
}

fn checked(status: ExitStatus, said: &str) -> Outcome {
    if status.success() {
        return Ok(());
    }
    let said = said.strip_prefix("error: ").unwrap_or(said);
    Err(if said.is_empty() { anyhow!("kubectl failed: {status}") } else { anyhow!("kubectl: {said}") }.into())
}
