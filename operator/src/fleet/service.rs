//! The service that routers dial.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::{Stream, StreamExt, stream};
use proto::{
    convert::encode_fleet,
    fleet::{self as wire, fleet_server::Fleet},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, info};

use super::{Hub, Told};

/// Shortest time between two states on one stream: a large fleet that changes all the time is told of in steps.
const PACE: Duration = Duration::from_millis(100);

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
        let states = paced(space.state.subscribe()).map(|state| Ok(encode_fleet(&state.whole())));
        let mut reports = request.into_inner();
        let stop = self.stop.clone();
        let ended = {
            let (stop, closed) = (stop.clone(), space.closed.clone());
            async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = closed.cancelled() => {}
                }
            }
        };
        info!(namespace = space.namespace, own_of = space.own_of, stream, "a router follows");
        self.tasks.spawn(async move {
            loop {
                let next = tokio::select! {
                    () = stop.cancelled() => break,
                    () = space.closed.cancelled() => break,
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
        Ok(Response::new(Box::pin(states.take_until(ended))))
    }
}

/// The present state and those that follow: at once where the last is some time ago, and otherwise the latest when it is.
fn paced(mut states: watch::Receiver<Option<Arc<Told>>>) -> impl Stream<Item = Arc<Told>> {
    states.mark_changed();
    stream::unfold((states, Instant::now()), |(mut states, mut next)| async move {
        loop {
            states.changed().await.ok()?;
            sleep_until(next).await;
            let state = states.borrow_and_update().clone();
            if let Some(state) = state {
                next = Instant::now() + PACE;
                return Some((state, (states, next)));
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_state_is_told_at_once_and_those_that_follow_in_steps() {
        let (sender, receiver) = watch::channel(None);
        let told = |number| Some(Arc::new(Told { term: 1, number, deployments: Vec::new(), routers: Vec::new() }));
        let mut states = Box::pin(paced(receiver));
        let began = Instant::now();
        sender.send_replace(told(1));
        assert_eq!((states.next().await.map(|s| s.number), began.elapsed()), (Some(1), Duration::ZERO));
        sender.send_replace(told(2));
        sender.send_replace(told(3));
        assert_eq!((states.next().await.map(|s| s.number), began.elapsed()), (Some(3), PACE), "the latest, when it is time");
        drop(sender);
        assert!(states.next().await.is_none());
    }
}
