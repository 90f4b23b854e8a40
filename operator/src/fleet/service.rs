//! The service that routers dial.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use futures_util::{Stream, StreamExt};
use proto::{
    convert::encode_fleet,
    fleet::{self as wire, fleet_server::Fleet},
};
use tokio_stream::wrappers::WatchStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, info};

use super::Hub;

/// Serves states, takes reports.
#[derive(Clone, Debug)]
pub struct FleetService {
    hub: Arc<Hub>,
    streams: Arc<AtomicU64>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl FleetService {
    /// Streams end at `stop`; their tasks are `tasks`.
    pub fn new(hub: Arc<Hub>, tasks: TaskTracker, stop: CancellationToken) -> Self {
        Self { hub, streams: Arc::default(), tasks, stop }
    }
}

#[tonic::async_trait]
impl Fleet for FleetService {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<wire::FleetState, Status>> + Send>>;

    async fn watch(&self, request: Request<Streaming<wire::RouterReport>>) -> Result<Response<Self::WatchStream>, Status> {
        let hub = self.hub.clone();
        let space = hub.admit(&request).ok_or_else(|| Status::unauthenticated("the call is from no namespace's router"))?;
        let stream = self.streams.fetch_add(1, Ordering::Relaxed);
        let states = WatchStream::new(space.state.subscribe());
        let states = states.filter_map(|state| async move { state.map(|state| Ok(encode_fleet(&state))) });
        let mut reports = request.into_inner();
        let stop = self.stop.clone();
        info!(namespace = space.namespace, stream, "a router follows");
        self.tasks.spawn(async move {
            loop {
                let next = tokio::select! {
                    () = stop.cancelled() => break,
                    next = reports.message() => next,
                };
                match next {
                    Ok(Some(report)) => {
                        let changed = space.report(stream, report);
                        hub.wake(&space.namespace, changed).await;
                    }
                    Ok(None) => break,
                    Err(status) => {
                        debug!(%status, stream, "a router's stream broke");
                        break;
                    }
                }
            }
            info!(namespace = space.namespace, stream, "a router left");
            let changed = space.leave(stream);
            hub.wake(&space.namespace, changed).await;
        });
        Ok(Response::new(Box::pin(states.take_until(self.stop.clone().cancelled_owned()))))
    }
}
