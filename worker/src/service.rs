//! The gRPC service.

use std::{pin::Pin, sync::Arc};

use futures_util::Stream;
use identity::{Name, Peer};
use proto::worker::{
    AcquireReply, AcquireRequest, CardChunk, CardRequest, LinkAck, LinkFrame, ProbeReply, ProbeRequest, SessionRequest, worker_server,
};
use tonic::{Request, Response, Status, Streaming};

use crate::{arbiter, card, link, session, state::Worker};

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Serves one worker.
pub(crate) struct Service(pub(crate) Arc<Worker>);

/// Who makes a call.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Caller {
    Router,
    Worker,
}

impl Service {
    /// Refuses a call that does not carry the token, or, where names are proven, of somebody else than `callers`.
    fn check<T>(&self, request: &Request<T>, callers: &[Caller]) -> Result<(), Status> {
        self.0.bearer.check(request)?;
        let caller = match request.extensions().get::<Peer>() {
            Some(Peer(Some(Name::Router { .. }))) => Caller::Router,
            Some(Peer(Some(Name::Worker { .. }))) => Caller::Worker,
            Some(Peer(None)) if self.0.identity.is_none() => return Ok(()),
            _ => return Err(Status::permission_denied("it is not known who calls")),
        };
        if callers.contains(&caller) { Ok(()) } else { Err(Status::permission_denied("the call is not for processes of this name")) }
    }
}

#[tonic::async_trait]
impl worker_server::Worker for Service {
    type SessionStream = session::Replies;

    async fn session(&self, request: Request<Streaming<SessionRequest>>) -> Result<Response<Self::SessionStream>, Status> {
        self.check(&request, &[Caller::Router])?;
        Ok(Response::new(session::start(&self.0, request.into_inner())))
    }

    type LinkStream = Answers<LinkAck>;

    async fn link(&self, request: Request<Streaming<LinkFrame>>) -> Result<Response<Self::LinkStream>, Status> {
        self.check(&request, &[Caller::Worker])?;
        let acks = link::accept(self.0.clone(), request.into_inner()).await?;
        Ok(Response::new(Box::pin(acks)))
    }

    async fn probe(&self, request: Request<ProbeRequest>) -> Result<Response<ProbeReply>, Status> {
        self.check(&request, &[Caller::Router, Caller::Worker])?;
        Ok(Response::new(self.0.probed()))
    }

    async fn acquire(&self, request: Request<AcquireRequest>) -> Result<Response<AcquireReply>, Status> {
        self.check(&request, &[Caller::Router])?;
        arbiter::acquire(&self.0, request.into_inner()).await.map(Response::new)
    }

    type CardStream = Answers<CardChunk>;

    async fn card(&self, request: Request<CardRequest>) -> Result<Response<Self::CardStream>, Status> {
        self.check(&request, &[Caller::Router])?;
        let chunks = card::chunks(&self.0).await?;
        Ok(Response::new(Box::pin(futures_util::stream::iter(chunks.into_iter().map(Ok)))))
    }
}
