//! The arbiter: grants epochs of its replica, one at a time.

use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::future::try_join_all;
use proto::{
    convert::{decode_epoch, encode_epoch},
    worker::{AcquireReply, AcquireRequest, ProbeReply, ProbeRequest, WorkerAddress},
};
use tokio::time::timeout;
use tonic::Status;
use tracing::info;

use crate::{peer, state::Worker};

/// One grant at a time.
struct Turn<'a>(&'a AtomicBool);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Grants an epoch above all that the workers of `request` have seen.
///
/// `failed_precondition`: this is no arbiter, or the request does not name its replica. `aborted`: someone else drives it, or asks at this
/// moment; try again. `unavailable`: a worker did not answer, or still loads.
pub(crate) async fn acquire(worker: &Worker, request: AcquireRequest) -> Result<AcquireReply, Status> {
    let shard = &worker.spec.shard;
    if !shard.is_first() || shard.rank != 0 {
        let at = format!("stage {} rank {}", shard.stage, shard.rank);
        return Err(Status::failed_precondition(format!("epochs are granted by stage 0 rank 0, this is {at}")));
    }
    peer::complete(&request.workers, shard.stages, shard.stage, shard.ranks).map_err(Status::failed_precondition)?;
    if worker.granting.swap(true, Ordering::Acquire) {
        return Err(Status::aborted("another epoch is being granted"));
    }
    let _turn = Turn(&worker.granting);
    let busy = |busy: crate::gate::Busy| Status::aborted(busy.to_string());
    worker.gate.grantable(request.handover).map_err(busy)?;
    let probes = try_join_all(request.workers.iter().map(|w| probe(worker, w))).await?;
    let mut highest = 0;
    let mut workers = Vec::with_capacity(probes.len());
    for (asked, (probe, incarnation)) in request.workers.iter().zip(probes) {
        if !probe.loaded {
            return Err(Status::unavailable(format!("{} has not loaded its weights", peer::name(asked))));
        }
        let epoch = decode_epoch(probe.highest, "probe.highest").map_err(|e| Status::failed_precondition(e.to_string()))?;
        highest = highest.max(epoch.number);
        workers.push(WorkerAddress { collective_address: probe.collective_address, incarnation, ..asked.clone() });
    }
    let own = workers.iter().find(|w| (w.stage, w.rank) == (0, 0));
    if own.is_none_or(|w| w.incarnation != worker.incarnation) {
        return Err(Status::failed_precondition("the address of stage 0 rank 0 is another process's"));
    }
    let epoch = worker.gate.grant(highest, request.handover).map_err(busy)?;
    info!(%epoch, router = request.router, handover = request.handover, "epoch granted");
    Ok(AcquireReply { epoch: Some(encode_epoch(epoch)), workers })
}

/// Asks a worker who it is; it must be the one that was named.
async fn probe(worker: &Worker, named: &WorkerAddress) -> Result<(ProbeReply, u64), Status> {
    let limit = worker.deadlines.probe;
    let answer = timeout(limit, async {
        let mut client = peer::dial(worker, named.stage, &named.address, limit).await?;
        client.probe(ProbeRequest {}).await
    });
    let unanswered = |why: &str| Status::unavailable(format!("{} did not answer the probe: {why}", peer::name(named)));
    let reply = answer.await.map_err(|_| unanswered("it took too long"))?.map_err(|s| unanswered(s.message()))?.into_inner();
    let Some(identity) = reply.identity.clone() else { return Err(Status::failed_precondition("a probe was answered without identity")) };
    if (identity.replica.as_str(), identity.stage, identity.rank) != (worker.spec.replica.as_str(), named.stage, named.rank) {
        return Err(Status::failed_precondition(format!(
            "{} answered as stage {} rank {} of {}, expected a worker of {}",
            peer::name(named),
            identity.stage,
            identity.rank,
            identity.replica,
            worker.spec.replica
        )));
    }
    Ok((reply, identity.incarnation))
}
