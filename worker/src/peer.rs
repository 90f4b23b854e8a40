//! Calls to other workers.

use std::time::Duration;

use identity::Dialer;
use proto::{
    bearer::Bearer,
    worker::{WorkerAddress, worker_client::WorkerClient},
};
use tonic::{
    Status,
    service::interceptor::InterceptedService,
    transport::{Channel, Endpoint},
};

use crate::state::Worker;

/// Bytes that may be under way on one stream: several hidden frames.
pub(crate) const WINDOW: u32 = 8 << 20;
/// How often a connection is tried out, and how long its other end may take.
pub(crate) const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(5));

pub(crate) type Client = WorkerClient<InterceptedService<Channel, Bearer>>;

/// Connects `worker` to another of its replica, of stage `stage`, at `address` (`HOST:PORT`).
pub(crate) async fn dial(worker: &Worker, stage: u32, address: &str, limit: Duration) -> Result<Client, Status> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"));
    let endpoint = endpoint.map_err(|e| Status::invalid_argument(format!("{address} is not an address: {e}")))?;
    let expected = worker.identity.clone().and_then(|own| {
        let name = own.name().worker(&worker.spec.replica, stage as usize)?;
        Some((own, name))
    });
    let channel = endpoint
        .connect_timeout(limit)
        .tcp_nodelay(true)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .http2_keep_alive_interval(KEEPALIVE.0)
        .keep_alive_timeout(KEEPALIVE.1)
        .connect_with_connector(Dialer::new(expected))
        .await
        .map_err(|e| Status::unavailable(crate::failure::chain(&e)))?;
    Ok(WorkerClient::with_interceptor(channel, worker.bearer.clone()))
}

/// `stage 1 rank 0 at 127.0.0.1:4000`, for messages.
pub(crate) fn name(worker: &WorkerAddress) -> String {
    format!("stage {} rank {} at {}", worker.stage, worker.rank, worker.address)
}

/// Whether the workers are those of a whole replica: stages 0 to `stages`, each with ranks from 0, `ranks` of them in stage `stage`.
pub(crate) fn complete(workers: &[WorkerAddress], stages: usize, stage: usize, ranks: usize) -> Result<(), String> {
    let mut names: Vec<(u32, u32)> = workers.iter().map(|w| (w.stage, w.rank)).collect();
    names.sort_unstable();
    let mut counts = vec![0_u32; stages];
    for (s, rank) in names {
        let count = counts.get_mut(s as usize).ok_or_else(|| format!("a worker is of stage {s}, expected less than {stages}"))?;
        if rank != *count {
            return Err(format!("rank {rank} of stage {s} is named where rank {count} was expected"));
        }
        *count += 1;
    }
    if let Some(empty) = counts.iter().position(|c| *c == 0) {
        return Err(format!("stage {empty} has no worker"));
    }
    if counts[stage] as usize != ranks {
        return Err(format!("stage {stage} has {} workers, expected {ranks}", counts[stage]));
    }
    Ok(())
}
