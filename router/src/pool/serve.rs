//! What other routers and workers call.

use std::{pin::Pin, sync::Arc};

use futures_util::{Stream, StreamExt};
use identity::{Incoming, Name, Peer, Protocol};
use proto::{
    convert::encode_fleet,
    fleet::FleetState,
    pool::{
        AnnounceReply, Announcement, EdgeMessage, OwnerMessage, StateRequest,
        pool_server::{Pool as Called, PoolServer},
    },
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, transport::Server};
use tracing::error;

use super::{EVENTS, Pool, announced::AnnounceError, convert, dial::MESSAGE, guest};
use crate::fleet::View;

/// Serves until the pool is stopped.
pub(super) async fn serve(pool: Arc<Pool>, listener: TcpListener, view: watch::Receiver<Arc<View>>) {
    let (stop, service_identity) = (pool.stop.clone(), pool.identity.clone());
    let service = PoolServer::new(Service { pool, view }).max_decoding_message_size(MESSAGE).max_encoding_message_size(usize::MAX);
    let incoming = Incoming::new(listener, service_identity, Protocol::Grpc);
    let serving = Server::builder().add_service(service).serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned());
    // Connections that are idle at the stop are not waited for.
    let served = tokio::select! {
        served = serving => served,
        () = async { stop.cancelled().await; tokio::task::yield_now().await } => return,
    };
    if let Err(failure) = served {
        error!(error = &failure as &dyn std::error::Error, "the pool's server failed: other routers cannot reach this one");
    }
}

struct Service {
    pool: Arc<Pool>,
    view: watch::Receiver<Arc<View>>,
}

impl Service {
    /// Refuses a caller that does not prove to be who it must be, where names are proven.
    fn check_name<T>(&self, request: &Request<T>, expected: impl Fn(&Name) -> bool) -> Result<(), Status> {
        match request.extensions().get::<Peer>() {
            _ if self.pool.identity.is_none() => Ok(()),
            Some(Peer(Some(name))) if expected(name) => Ok(()),
            Some(Peer(Some(name))) => Err(Status::permission_denied(format!("this is not for {name}"))),
            _ => Err(Status::permission_denied("it is not known who calls")),
        }
    }
}

fn is_router(name: &Name) -> bool {
    matches!(name, Name::Router { .. })
}

#[tonic::async_trait]
impl Called for Service {
    type JoinStream = Pin<Box<dyn Stream<Item = Result<OwnerMessage, Status>> + Send>>;

    async fn join(&self, request: Request<Streaming<EdgeMessage>>) -> Result<Response<Self::JoinStream>, Status> {
        self.pool.bearer.check(&request)?;
        self.check_name(&request, is_router)?;
        let (outgoing, messages) = mpsc::channel(EVENTS);
        let broken = self.pool.stop.child_token();
        let task = guest::serve(self.pool.clone(), self.view.clone(), request.into_inner(), outgoing, broken.clone());
        self.pool.tasks.spawn(task);
        Ok(Response::new(Box::pin(ReceiverStream::new(messages).take_until(broken.cancelled_owned()))))
    }

    async fn state(&self, request: Request<StateRequest>) -> Result<Response<FleetState>, Status> {
        self.pool.bearer.check(&request)?;
        self.check_name(&request, is_router)?;
        let state = self.pool.store.current();
        if state.term == 0 {
            return Err(Status::unavailable("this router has no fleet state itself"));
        }
        Ok(Response::new(encode_fleet(&state)))
    }

    async fn announce(&self, request: Request<Announcement>) -> Result<Response<AnnounceReply>, Status> {
        self.pool.workers.check(&request)?;
        let said = request.get_ref();
        let own =
            |name: &Name| matches!(name, Name::Worker { replica, stage, .. } if (replica, *stage) == (&said.replica, said.stage as usize));
        self.check_name(&request, own)?;
        let taken = self.pool.announce(convert::decode_announcement(request.into_inner()), false);
        taken.map(|()| Response::new(AnnounceReply {})).map_err(|error| match error {
            AnnounceError::Replica(_) => Status::not_found(error.to_string()),
            _ => Status::failed_precondition(error.to_string()),
        })
    }
}
