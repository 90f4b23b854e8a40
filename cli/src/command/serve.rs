//! `skein serve`: an OpenAI-compatible HTTP API and a gRPC API in front of what a manifest describes.

use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, anyhow};
use router::ApiOptions;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::{
    args::{Global, ServeArgs},
    exit::{Failure, Outcome, bad_input},
    local::{deployment, fleet, serving::Serving},
    output,
    stop::Stop,
};

/// Longest that running requests may go on after Ctrl-C; a second Ctrl-C ends them.
const DRAIN: Duration = Duration::from_secs(10);

/// Runs the command until a signal comes, or something fails that cannot be repaired.
pub(crate) async fn serve(global: &Global, args: ServeArgs, stop: &Stop) -> Outcome {
    // Before anything is loaded: a port in use is found at once.
    let http = bind(args.host, args.port, "HTTP", "--port").await?;
    let grpc = bind(args.host, args.grpc_port, "gRPC", "--grpc-port").await?;
    let ends = (address(&http)?, address(&grpc)?);
    let start = async {
        let (draft, context) = (args.generator.draft_model(), args.generator.context());
        let mut planned = deployment::plans(global, &args.target, &args.adapter, draft, &args.placement, context).await?;
        planned.iter_mut().for_each(|planned| planned.look_up(args.generator.prompt_lookup));
        announce(global, &planned);
        Serving::start(global, planned, &args.placement).await
    };
    let serving = stop.or(start).await?;

    let closing = CancellationToken::new();
    let options = ApiOptions { drain: DRAIN, ..ApiOptions::default() };
    // The API answers while weights are loaded; it says that it is not ready.
    let mut api = tokio::spawn(router::serve(serving.edge.clone(), http, grpc, options, closing.clone().cancelled_owned()));
    let outcome = tokio::select! {
        biased;
        () = stop.wait() => Ok(()),
        failure = serving.failed() => Err(failure),
        ended = &mut api => Err(stopped_early(ended)),
        failed = ready(global, &serving, ends) => Err(failed),
    };
    if outcome.is_ok() {
        output::status(global.quiet, "Stopping", "new requests are refused, running ones have 10 s; Ctrl-C again ends them");
    }
    closing.cancel();
    if !api.is_finished() {
        let ended = api.await;
        info!(clean = ended.is_ok_and(|served| served.is_ok()), "API stopped");
    }
    serving.stop().await;
    outcome
}

/// Says that everything answers, once it does; then waits for ever.
async fn ready(global: &Global, serving: &Serving, (http, grpc): (SocketAddr, SocketAddr)) -> Failure {
    let said = match serving.ready(global.quiet).await {
        Ok(()) => output::line(&format!("ready http://{http} grpc http://{grpc}")),
        Err(failure) => Err(failure),
    };
    match said {
        Ok(()) => std::future::pending().await,
        Err(failure) => failure,
    }
}

/// A line for each deployment: what is about to start.
fn announce(global: &Global, planned: &[deployment::Planned]) {
    for deployment in planned {
        output::status(global.quiet, "Starting", &fleet::summary(deployment));
    }
}

/// Why the API ended though nobody told it to.
fn stopped_early(ended: Result<Result<(), router::ServeError>, tokio::task::JoinError>) -> Failure {
    match ended {
        Ok(Ok(())) => anyhow!("the API ended by itself").into(),
        Ok(Err(error)) => Failure::Failed(error.into()),
        Err(error) => Failure::Failed(anyhow::Error::new(error).context("the API broke")),
    }
}

/// Listens on a port.
///
/// # Errors
/// Bad input when the port is in use, may not be used, or the address is not this machine's.
async fn bind(host: IpAddr, port: u16, what: &str, flag: &str) -> Outcome<TcpListener> {
    let address = SocketAddr::new(host, port);
    TcpListener::bind(address).await.map_err(|error| match error.kind() {
        ErrorKind::AddrInUse => bad_input!(
            "port {port} of {host} is in use, so the {what} API cannot listen there; choose another with {flag}, or 0 for a free one"
        ),
        ErrorKind::PermissionDenied => bad_input!("port {port} of {host} may not be used by this user; choose one above 1023 with {flag}"),
        ErrorKind::AddrNotAvailable => bad_input!("{host} is not an address of this machine; choose another with --host"),
        _ => Failure::Failed(anyhow::Error::new(error).context(format!("failed to listen on {address}"))),
    })
}

fn address(listener: &TcpListener) -> Outcome<SocketAddr> {
    Ok(listener.local_addr().context("failed to find out which port is listened on")?)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    #[tokio::test]
    async fn a_port_in_use_is_named() {
        let taken = bind(HERE, 0, "HTTP", "--port").await.unwrap();
        let port = address(&taken).unwrap().port();
        let Err(Failure::Input(error)) = bind(HERE, port, "gRPC", "--grpc-port").await else { panic!("the port was free") };
        let text = error.to_string();
        assert!(text.contains(&port.to_string()) && text.contains("in use") && text.contains("--grpc-port"), "{text}");
    }

    #[tokio::test]
    async fn an_address_of_another_machine_is_refused() {
        // 192.0.2.0/24 is kept for documentation (RFC 5737).
        let other = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
        assert!(matches!(bind(other, 0, "HTTP", "--port").await, Err(Failure::Input(_))));
    }
}
