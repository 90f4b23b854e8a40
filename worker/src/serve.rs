//! A worker's life.

use std::{net::SocketAddr, sync::Arc};

use identity::{Incoming, Protocol};
use proto::{bearer::Bearer, worker::worker_server::WorkerServer};
use tokio::{net::TcpListener, runtime::Handle, sync::oneshot, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::transport::{Server, Uri};
use tracing::{debug, info, warn};

use crate::{
    adapters::Adapters,
    announce,
    collective::{Address, Listener, Lobby, Who},
    compute,
    error::WorkerError,
    gate::{Gate, draw},
    heartbeat,
    options::WorkerOptions,
    peer::{KEEPALIVE, WINDOW},
    service::Service,
    state::{Loading, Worker},
};

/// Largest message of an owner: a step with the prompts of a whole batch. Links send a megabyte and a little.
const MESSAGE: usize = 64 << 20;

/// Binds, calls `listening` with the bound address, loads the shard in the background, and serves until `stop`.
///
/// While it loads it answers probes, which say how far it is.
///
/// # Errors
/// If the address cannot be bound, the shard cannot be loaded, or the engine's thread or the server fails.
pub async fn serve(options: WorkerOptions, listening: impl FnOnce(SocketAddr) + Send, stop: CancellationToken) -> Result<(), WorkerError> {
    check_identity(&options)?;
    let routers = options.announce.iter().map(|address| router(address)).collect::<Result<Vec<_>, _>>()?;
    let bind = |source| WorkerError::Bind { address: options.listen, source };
    let listener = TcpListener::bind(options.listen).await.map_err(bind)?;
    let address = listener.local_addr().map_err(bind)?;
    let (spec, incarnation) = (options.spec, draw());
    let ranks = match spec.shard.ranks {
        1 => None,
        _ => Listener::bind(spec.collective, address.ip(), draw()).await.map_err(WorkerError::Collective)?,
    };
    let worker = Arc::new(Worker {
        incarnation,
        deadlines: options.deadlines,
        bearer: Bearer::new(options.token),
        identity: options.identity,
        gate: Gate::new(spec.shard.is_first() && spec.shard.rank == 0),
        lobby: Arc::new(Lobby::default()),
        collective_address: ranks.as_ref().map_or(Address::None, |l| l.address().clone()),
        loading: Loading::default(),
        source: options.source.clone(),
        adapters: Adapters::default(),
        jobs: compute::Jobs::default(),
        tasks: TaskTracker::new(),
        stop: CancellationToken::new(),
        runtime: Handle::current(),
        granting: false.into(),
        spec,
    });
    let mut engine = compute::start(worker.clone(), options.source, options.isa)?;
    let beats = heartbeat::start(worker.clone());
    if !routers.is_empty() {
        worker.tasks.spawn(announce::announce(worker.clone(), routers, address));
    }
    let result = match &beats {
        Ok(_) => run(&worker, listener, ranks, &mut engine, (address, listening), &stop).await,
        Err(_) => Ok(()),
    };
    worker.gate.stop();
    worker.jobs.close();
    worker.stop.cancel();
    let beats = beats?;
    beats.thread().unpark();
    end(&worker, engine, result.is_ok()).await;
    // It sleeps a tenth of a second at most, and was woken.
    if beats.join().is_err() {
        warn!("the heartbeats' thread panicked");
    }
    result
}

/// A certificate must be for the worker that the specification describes.
fn check_identity(options: &WorkerOptions) -> Result<(), WorkerError> {
    let Some(name) = options.identity.as_ref().map(identity::Identity::name) else { return Ok(()) };
    let (replica, stage) = (&options.spec.replica, options.spec.shard.stage);
    if name.worker(replica, stage).as_ref() == Some(&name) {
        return Ok(());
    }
    Err(WorkerError::Identity { got: name.to_string(), replica: replica.clone(), stage })
}

/// The address of a router.
fn router(address: &str) -> Result<Uri, WorkerError> {
    let parsed = address.parse::<Uri>().ok().filter(|uri| uri.scheme_str() == Some("http") && uri.host().is_some() && uri.port().is_some());
    parsed.ok_or_else(|| WorkerError::Router { address: address.to_owned() })
}

/// Serves until `stop`, or until the engine ends.
async fn run(
    worker: &Arc<Worker>,
    listener: TcpListener,
    ranks: Option<Listener>,
    engine: &mut oneshot::Receiver<Result<(), WorkerError>>,
    (address, listening): (SocketAddr, impl FnOnce(SocketAddr) + Send),
    stop: &CancellationToken,
) -> Result<(), WorkerError> {
    let shard = &worker.spec.shard;
    if let Some(ranks) = ranks {
        let who = Who { stage: shard.stage, rank: shard.rank, ranks: shard.ranks, incarnation: worker.incarnation };
        let ranks = ranks.serve(worker.lobby.clone(), who, worker.identity.clone(), worker.deadlines.meet, worker.stop.clone());
        worker.tasks.spawn(ranks);
    }
    let service = WorkerServer::new(Service(worker.clone())).max_decoding_message_size(MESSAGE).max_encoding_message_size(usize::MAX);
    let server = Server::builder()
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .http2_keepalive_interval(Some(KEEPALIVE.0))
        .http2_keepalive_timeout(Some(KEEPALIVE.1))
        .add_service(service)
        .serve_with_incoming_shutdown(
            Incoming::new(listener, worker.identity.clone(), Protocol::Grpc),
            worker.stop.clone().cancelled_owned(),
        );
    tokio::pin!(server);
    listening(address);
    info!(%address, replica = worker.spec.replica, stage = shard.stage, rank = shard.rank, "worker listens");
    let result = tokio::select! {
        () = stop.cancelled() => Ok(()),
        served = &mut server => return served.map_err(WorkerError::from),
        ended = engine => match ended {
            Ok(Ok(())) => Err(WorkerError::Engine { detail: "without a reason".into() }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(WorkerError::Engine { detail: "it panicked".into() }),
        },
    };
    // Sessions say why they end, then the server closes.
    worker.gate.stop();
    worker.stop.cancel();
    match timeout(worker.deadlines.stop, server).await {
        Ok(served) => result.and(served.map_err(WorkerError::from)),
        Err(_) => {
            debug!("connections were cut off");
            result
        }
    }
}

/// Waits for tasks and the engine, as long as the deadline says: a step, or a read from a slow source, cannot be cut short.
async fn end(worker: &Worker, engine: oneshot::Receiver<Result<(), WorkerError>>, engine_runs: bool) {
    worker.tasks.close();
    if timeout(worker.deadlines.stop, worker.tasks.wait()).await.is_err() {
        debug!("tasks were cut off");
    }
    if engine_runs && timeout(worker.deadlines.stop, engine).await.is_err() {
        debug!("a running step was cut off");
    }
}
