//! A way to a service of a cluster: `kubectl port-forward`, for as long as it is needed.

use std::process::Stdio;

use anyhow::{Context, anyhow};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader, copy, sink},
    process::Child,
};
use tokio_util::task::AbortOnDropHandle;

use crate::{kubectl::Kubectl, output};

/// A port of this machine that leads to a service. Ends when dropped.
#[derive(Debug)]
pub(crate) struct Forward {
    /// Base of the service's HTTP API, from here.
    pub(crate) url: String,
    _child: Child,
    /// Reads on, so that kubectl can say what it has to: of each connection, and on standard error what is wrong.
    _reading: AbortOnDropHandle<()>,
}

impl Forward {
    /// Opens a way to the HTTP API of a deployment's service.
    ///
    /// # Errors
    /// If kubectl is missing, or finds no way; its own words are the message.
    pub(crate) async fn open(kubectl: &Kubectl, deployment: &str) -> anyhow::Result<Self> {
        let service = format!("service/{deployment}");
        let mut command = kubectl.command();
        command.args(["port-forward", "--address=127.0.0.1", &service, ":http"]).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(crate::kubectl::missing)?;
        let pipes = (child.stdout.take(), child.stderr.take());
        let (Some(stdout), Some(mut errors)) = pipes else { return Err(anyhow!("kubectl has no output")) };
        let (mut out, mut line) = (BufReader::new(stdout), String::new());
        out.read_line(&mut line).await.context("failed to read what kubectl says")?;
        if let Some(url) = address(&line) {
            let reading = tokio::spawn(async move {
                let mut nowhere = sink();
                let mut lines = BufReader::new(errors).lines();
                let saying = async {
                    while let Ok(Some(line)) = lines.next_line().await {
                        output::note(false, &line);
                    }
                };
                // What cannot be read any more ends with the way itself, which requests notice.
                let _ = tokio::join!(copy(&mut out, &mut nowhere), saying);
            });
            return Ok(Self { url, _child: child, _reading: AbortOnDropHandle::new(reading) });
        }
        let mut said = String::new();
        errors.read_to_string(&mut said).await.context("failed to read what kubectl says")?;
        let said = format!("{line}{said}");
        Err(anyhow!("kubectl: {}", said.trim().trim_start_matches("error: ")).context(format!("there is no way to {service}")))
    }
}

/// The address in a line such as `Forwarding from 127.0.0.1:40001 -> 8080`.
fn address(line: &str) -> Option<String> {
    let (address, _) = line.strip_prefix("Forwarding from ")?.split_once(" -> ")?;
    Some(format!("http://{address}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubectl_says_where() {
        assert_eq!(address("Forwarding from 127.0.0.1:40001 -> 8080\n").as_deref(), Some("http://127.0.0.1:40001"));
        assert_eq!(address("error: services \"m\" not found\n"), None);
        assert_eq!(address(""), None);
    }
}
