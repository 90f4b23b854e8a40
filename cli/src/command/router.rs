//! `skein router`: one router of a pool. It learns its fleet from a control plane, and goes on without it.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::Context;
use identity::Identity;
use plan::fleet::FleetState;
use router::{
    ApiOptions,
    control::{Control, ControlError, FleetStore},
    edge::{Edge, EdgeOptions},
    pool::PoolOptions,
    replica::WorkersConnector,
};
use tokio::net::TcpListener;
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
    let control = Control::new(args.name.clone(), &args.fleet, args.fleet_token).bad_input()?.with_identity(identity.clone());
    let control = control.of_deployment(&args.deployment).bad_input()?;
    let store = FleetStore::new(restore(args.state.as_deref())?, args.state);
    let connector = Arc::new(WorkersConnector::new(args.worker_token.clone()).with_identity(identity.clone()));
    let options = EdgeOptions { connector, resume: RESUME, deadline: None };
    let edge = if args.pool_token.is_some() || identity.is_some() {
        let listener = TcpListener::bind(args.pool).await.with_context(|| format!("failed to listen on {}", args.pool))?;
        let (token, worker_token) = (args.pool_token, args.worker_token);
        let pool = PoolOptions { name: args.name, pool: args.deployment, listener, token, worker_token, identity, seeds: args.peer };
        Edge::join(&store, options, pool)
    } else {
        // Whoever reaches the pool's port may run sequences, so it is open to those alone that can show who they are.
        info!("no pool token and no identity: this router is a pool of its own");
        Edge::start(store.subscribe(), options)
    };

    let following = CancellationToken::new();
    let mut states = store.subscribe();
    let follow = tokio::spawn(control.follow(edge.clone(), store, following.clone()));
    // Without any state every model would be unknown, so nothing is accepted before one is in force.
    let known = async { states.wait_for(|state| state.term > 0).await.map(|_| ()).context("the fleet ended") };
    let first = stop.or(async { known.await.map_err(Into::into) }).await;
    let served = match first {
        Ok(()) => {
            info!(http = %args.http, grpc = %args.grpc, "serving");
            output::line(&format!("ready http://{} grpc http://{}", args.http, args.grpc))?;
            let options = ApiOptions { drain: Duration::from_secs(args.drain_seconds), ..ApiOptions::default() };
            // The others drive its replicas from then on, while its own clients' streams go on.
            let leave = async {
                stop.wait().await;
                edge.leave();
            };
            router::serve(edge.clone(), http, grpc, options, leave).await.context("the API failed").map_err(Into::into)
        }
        Err(failure) => Err(failure),
    };
    following.cancel();
    follow.await.context("the task that follows the control plane broke")?;
    edge.shutdown().await;
    served
}

/// The state in force before the control plane is reached. A damaged file is reported and stands for none: the control plane has the truth.
fn restore(kept: Option<&Path>) -> Outcome<FleetState> {
    match kept.map_or(Ok(None), FleetStore::read) {
        Ok(state) => Ok(state.unwrap_or_default()),
        Err(error @ ControlError::Damaged { .. }) => {
            warn!(error = &error as &dyn std::error::Error, "the kept state is not used");
            Ok(FleetState::default())
        }
        Err(error) => Err(anyhow::Error::new(error).into()),
    }
}
