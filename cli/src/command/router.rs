//! `skein router`: one router of a pool. It learns its fleet from a control plane, and goes on without it.

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use identity::Identity;
use plan::fleet::FleetState;
use router::{
    ApiOptions,
    control::{Control, ControlError},
    edge::{Edge, EdgeOptions},
    replica::WorkersConnector,
};
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    args::RouterArgs,
    exit::{BadInput, Outcome},
    output,
    stop::Stop,
};

/// Longest that a stream waits for a lost replica: a pod is started again, and has its weights to load.
const RESUME: Duration = Duration::from_secs(120);

/// Runs the command until a signal comes.
pub(crate) async fn router(args: RouterArgs, stop: &Stop) -> Outcome {
    let http = TcpListener::bind(args.http).await.with_context(|| format!("failed to listen on {}", args.http))?;
    let grpc = TcpListener::bind(args.grpc).await.with_context(|| format!("failed to listen on {}", args.grpc))?;
    let identity = args.identity.as_deref().map(Identity::open).transpose().bad_input()?;
    let control = Control::new(args.name, &args.fleet, args.fleet_token, args.state).bad_input()?.with_identity(identity.clone());
    let fleet = watch::Sender::new(restore(&control)?);
    let connector = Arc::new(WorkersConnector::new(args.worker_token).with_identity(identity));
    let edge = Edge::start(fleet.subscribe(), EdgeOptions { connector, resume: RESUME, deadline: None });

    let following = CancellationToken::new();
    let mut states = fleet.subscribe();
    let follow = tokio::spawn(control.follow(edge.clone(), fleet, following.clone()));
    // Without any state every model would be unknown, so nothing is accepted before one is in force.
    let known = async { states.wait_for(|state| state.term > 0).await.map(|_| ()).context("the fleet ended") };
    let first = stop.or(async { known.await.map_err(Into::into) }).await;
    let served = match first {
        Ok(()) => {
            info!(http = %args.http, grpc = %args.grpc, "serving");
            output::line(&format!("ready http://{} grpc http://{}", args.http, args.grpc))?;
            let options = ApiOptions { drain: Duration::from_secs(args.drain_seconds), ..ApiOptions::default() };
            router::serve(edge.clone(), http, grpc, options, stop.wait()).await.context("the API failed").map_err(Into::into)
        }
        Err(failure) => Err(failure),
    };
    following.cancel();
    follow.await.context("the task that follows the control plane broke")?;
    edge.shutdown().await;
    served
}

/// The state in force before the control plane is reached. A damaged file is reported and stands for none: the control plane has the truth.
fn restore(control: &Control) -> Outcome<FleetState> {
    match control.restore() {
        Ok(state) => Ok(state.unwrap_or_default()),
        Err(error @ ControlError::Damaged { .. }) => {
            warn!(error = &error as &dyn std::error::Error, "the kept state is not used");
            Ok(FleetState::default())
        }
        Err(error) => Err(anyhow::Error::new(error).into()),
    }
}
