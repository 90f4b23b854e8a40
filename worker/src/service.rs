//! The gRPC service.

use std::{pin::Pin, sync::Arc};

use futures_util::Stream;
use proto::worker::{
    AcquireReply, AcquireRequest, CardChunk, CardRequest, LinkAck, LinkFrame, ProbeReply, ProbeRequest, SessionRequest, worker_server,
};
use tonic::{Request, Response, Status, Streaming};

use crate::{arbiter, card, link, session, state::Worker};

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Serves one worker.
pub(crate) struct Service(pub(crate) Arc<Worker>);

#[tonic::async_trait]
impl worker_server::Worker for Service {
    type SessionStream = session::Replies;

    async fn session(&self, request: Request<Streaming<SessionRequest>>) -> Result<Response<Self::SessionStream>, Status> {
        self.0.bearer.check(&request)?;
        Ok(Response::new(session::start(&self.0, request.into_inner())))
    }

    type LinkStream = Answers<LinkAck>;

    async fn link(&self, request: Request<Streaming<LinkFrame>>) -> Result<Response<Self::LinkStream>, Status> {
        self.0.bearer.check(&request)?;
        let acks = link::accept(self.0.clone(), request.into_inner()).await?;
        Ok(Response::new(Box::pin(acks)))
    }

    async fn probe(&self, request: Request<ProbeRequest>) -> Result<Response<ProbeReply>, Status> {
        self.0.bearer.check(&request)?;
        Ok(Response::new(self.0.probed()))
    }

    async fn acquire(&self, request: Request<AcquireRequest>) -> Result<Response<AcquireReply>, Status> {
        self.0.bearer.check(&request)?;
        arbiter::acquire(&self.0, request.into_inner()).await.map(Response::new)
    }

    type CardStream = Answers<CardChunk>;

    async fn card(&self, request: Request<CardRequest>) -> Result<Response<Self::CardStream>, Status> {
        self.0.bearer.check(&request)?;
        let chunks = card::chunks(&self.0).await?;
        Ok(Response::new(Box::pin(futures_util::stream::iter(chunks.into_iter().map(Ok)))))
    }
}
