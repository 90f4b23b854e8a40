//! Harness: workers of a small model as tasks of this process, and clients that speak to them by hand.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use identity::{Dialer, Identity};
use kernels::Isa;
use plan::{
    fleet::FleetReplica,
    planner::{self, Capacity, Origin, Spec, Vocabulary},
    shard::ExecutionPlan,
    worker::{CollectiveKind, Epoch, WorkerSpec},
};
use proto::{
    bearer::Bearer,
    convert::{decode_epoch, encode_epoch},
    worker::{
        AcquireRequest, Failure, Hello, ProbeReply, ProbeRequest, SessionReply, SessionRequest, WorkerAddress, session_reply,
        session_request::Message, worker_client::WorkerClient,
    },
};
use source::{Source, SourceOptions};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::{Instant, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{
    Status, Streaming,
    service::interceptor::InterceptedService,
    transport::{Channel, Endpoint},
};
use worker::{Deadlines, WorkerError, WorkerOptions};

/// Nothing in these tests takes this long unless it hangs.
pub(crate) const LONG: Duration = Duration::from_secs(60);
pub(crate) const TOKEN: &str = "a token";

pub(crate) type Client = WorkerClient<InterceptedService<Channel, Bearer>>;

/// The fixture model.
pub(crate) fn model() -> String {
    fixture("llama")
}

/// A fixture whose embedding table is its vocabulary matrix.
pub(crate) fn tied() -> String {
    fixture("gemma3")
}

fn fixture(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models").join(name);
    path.to_string_lossy().into_owned()
}

pub(crate) fn plan(pipeline: usize, tensor: usize) -> ExecutionPlan {
    plan_of(&model(), pipeline, tensor, Vocabulary::Auto)
}

pub(crate) fn plan_of(model: &str, pipeline: usize, tensor: usize, vocabulary: Vocabulary) -> ExecutionPlan {
    let header = Source::open(model, SourceOptions::default()).and_then(|s| s.header()).expect("the fixture's header");
    let (max_batch_sequences, max_batch_tokens) = (4, 64);
    let spec = Spec { pipeline, tensor, vocabulary, max_context: Some(128), max_batch_sequences, max_batch_tokens, ..Spec::default() };
    planner::plan(&spec, &header, &Capacity { memory_bytes: None }).expect("a plan")
}

/// One worker.
pub(crate) struct Running {
    pub(crate) spec: WorkerSpec,
    pub(crate) address: SocketAddr,
    deadlines: Deadlines,
    identity: Option<Identity>,
    stop: CancellationToken,
    task: JoinHandle<Result<(), WorkerError>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Running {
    pub(crate) async fn start(spec: WorkerSpec, listen: SocketAddr, deadlines: Deadlines) -> Self {
        Self::start_as(spec, listen, deadlines, None).await
    }

    pub(crate) async fn start_as(spec: WorkerSpec, listen: SocketAddr, deadlines: Deadlines, identity: Option<Identity>) -> Self {
        Self::start_with(spec, listen, deadlines, identity, Vec::new()).await
    }

    /// One that says to `routers` where it is.
    pub(crate) async fn start_announced(spec: WorkerSpec, listen: SocketAddr, routers: Vec<String>) -> Self {
        Self::start_with(spec, listen, Deadlines::default(), None, routers).await
    }

    async fn start_with(
        spec: WorkerSpec,
        listen: SocketAddr,
        deadlines: Deadlines,
        identity: Option<Identity>,
        announce: Vec<String>,
    ) -> Self {
        let stop = CancellationToken::new();
        let (listening, bound) = oneshot::channel();
        let isa = Isa::named("auto").expect("an instruction set");
        let mut options = WorkerOptions::new(spec.clone(), listen, Some(TOKEN.into()), isa, SourceOptions::default());
        options.deadlines = deadlines;
        options.identity = identity.clone();
        options.announce = announce;
        let serve = worker::serve(options, move |at| listening.send(at).expect("a listener"), stop.clone());
        let mut task = tokio::spawn(serve);
        let Ok(address) = timeout(LONG, bound).await.expect("a worker that binds") else {
            panic!("the worker ended: {:?}", (&mut task).await);
        };
        let mut running = Self { spec, address, deadlines, identity, stop, task };
        running.until_loaded().await;
        running
    }

    async fn until_loaded(&mut self) {
        let begun = Instant::now();
        loop {
            // A worker may call itself.
            let dialer = Dialer::new(self.identity.clone().map(|own| (own.clone(), own.name())));
            let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).expect("an address");
            let answer = match endpoint.connect_with_connector(dialer).await {
                Ok(channel) => WorkerClient::with_interceptor(channel, Bearer::new(Some(TOKEN.into()))).probe(ProbeRequest {}).await.ok(),
                Err(_) => None,
            };
            match answer {
                Some(probe) if probe.get_ref().loaded => return,
                Some(_) => assert!(begun.elapsed() < LONG, "the worker does not load"),
                None => panic!("the worker ended: {:?}", (&mut self.task).await),
            }
        }
    }

    pub(crate) async fn client(&self) -> Client {
        client(self.address, Some(TOKEN)).await
    }

    pub(crate) async fn probe(&self) -> ProbeReply {
        self.client().await.probe(ProbeRequest {}).await.expect("an answer to a probe").into_inner()
    }

    /// Stops it and waits for its end.
    pub(crate) async fn stop(mut self) {
        self.stop.cancel();
        timeout(LONG, &mut self.task).await.expect("a worker that stops").expect("no panic").expect("a clean end");
    }

    /// Stops it and starts another in its place, at the same address.
    pub(crate) async fn restart(self) -> Self {
        let (spec, address, deadlines, identity) = (self.spec.clone(), self.address, self.deadlines, self.identity.clone());
        self.stop().await;
        Self::start_as(spec, address, deadlines, identity).await
    }

    pub(crate) fn named(&self) -> WorkerAddress {
        WorkerAddress {
            stage: self.spec.shard.stage as u32,
            rank: self.spec.shard.rank as u32,
            address: self.address.to_string(),
            ..WorkerAddress::default()
        }
    }
}

/// Every worker of a plan, stage by stage and rank by rank.
pub(crate) fn specs(plan: &ExecutionPlan, collective: CollectiveKind) -> Vec<WorkerSpec> {
    specs_of(&model(), plan, collective)
}

fn specs_of(model: &str, plan: &ExecutionPlan, collective: CollectiveKind) -> Vec<WorkerSpec> {
    planner::worker_specs(plan, &Origin { replica: "fixture-r0", uri: model, digest: None }, 1, collective)
}

/// Starts every worker of a plan.
pub(crate) async fn start(plan: &ExecutionPlan, collective: CollectiveKind) -> Vec<Running> {
    start_with(plan, collective, Deadlines::default()).await
}

pub(crate) async fn start_with(plan: &ExecutionPlan, collective: CollectiveKind, deadlines: Deadlines) -> Vec<Running> {
    start_all(specs(plan, collective), deadlines).await
}

/// The same of another model.
pub(crate) async fn start_of(model: &str, plan: &ExecutionPlan, collective: CollectiveKind) -> Vec<Running> {
    start_all(specs_of(model, plan, collective), Deadlines::default()).await
}

async fn start_all(specs: Vec<WorkerSpec>, deadlines: Deadlines) -> Vec<Running> {
    let mut workers = Vec::new();
    for spec in specs {
        workers.push(Running::start(spec, own_address(), deadlines).await);
    }
    workers
}

/// A loopback address that nobody else binds or calls from, so that a worker which restarts finds its port as it left it. Where there is but
/// one such address, that.
pub(crate) fn own_address() -> SocketAddr {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    if cfg!(not(target_os = "linux")) {
        return SocketAddr::from(([127, 0, 0, 1], 0));
    }
    let [_, _, third, fourth] = (std::process::id() << 8 | NEXT.fetch_add(1, Ordering::Relaxed) & 0xff).to_be_bytes();
    SocketAddr::from(([127, 100, third, fourth], 0))
}

/// The replica as the fleet state has it.
pub(crate) fn fleet(workers: &[Running]) -> FleetReplica {
    let mut stages: Vec<Vec<String>> = Vec::new();
    for worker in workers {
        stages.resize(stages.len().max(worker.spec.shard.stage + 1), Vec::new());
        stages[worker.spec.shard.stage].push(worker.address.to_string());
    }
    FleetReplica {
        name: "fixture-r0".into(),
        revision: String::new(),
        numerics: String::new(),
        weight: 1,
        draining: false,
        limits: planner::limits(&plan(1, 1), false),
        workers: stages,
        draft: None,
    }
}

pub(crate) async fn client(address: SocketAddr, token: Option<&str>) -> Client {
    let channel = Endpoint::from_shared(format!("http://{address}")).expect("an address").connect().await.expect("a worker that listens");
    WorkerClient::with_interceptor(channel, Bearer::new(token.map(str::to_owned)))
}

/// An epoch, granted for these workers.
pub(crate) struct Grant {
    pub(crate) epoch: Epoch,
    pub(crate) workers: Vec<WorkerAddress>,
}

pub(crate) async fn acquire_for(workers: &[Running], named: Vec<WorkerAddress>, handover: bool) -> Result<Grant, Status> {
    let request = AcquireRequest { router: "a test".into(), workers: named, handover };
    let reply = workers[0].client().await.acquire(request).await?.into_inner();
    Ok(Grant { epoch: decode_epoch(reply.epoch, "epoch").expect("an epoch"), workers: reply.workers })
}

pub(crate) async fn acquire(workers: &[Running]) -> Result<Grant, Status> {
    acquire_for(workers, workers.iter().map(Running::named).collect(), false).await
}

/// A session with one worker, spoken by hand.
pub(crate) struct Talk {
    pub(crate) requests: mpsc::Sender<SessionRequest>,
    pub(crate) replies: Streaming<SessionReply>,
}

impl Talk {
    /// Says hello as `grant` has it.
    pub(crate) async fn begin(worker: &Running, grant: &Grant) -> Self {
        Self::begin_with(worker, hello(worker, grant)).await
    }

    pub(crate) async fn begin_with(worker: &Running, hello: Hello) -> Self {
        let (requests, outgoing) = mpsc::channel(16);
        requests.try_send(SessionRequest { message: Some(Message::Hello(hello)) }).expect("room");
        let replies = worker.client().await.session(ReceiverStream::new(outgoing)).await.expect("a stream").into_inner();
        Self { requests, replies }
    }

    pub(crate) async fn say(&self, message: Message) {
        self.requests.send(SessionRequest { message: Some(message) }).await.expect("a session");
    }

    /// The next message that is no heartbeat; nothing at the end of the stream.
    pub(crate) async fn next(&mut self) -> Option<session_reply::Message> {
        loop {
            let message = timeout(LONG, self.replies.message()).await.expect("an answer").expect("no broken stream")?;
            match message.message.expect("a message") {
                session_reply::Message::Heartbeat(_) => {}
                other => return Some(other),
            }
        }
    }

    pub(crate) async fn welcomed(&mut self) -> Epoch {
        match self.next().await {
            Some(session_reply::Message::Welcome(welcome)) => decode_epoch(welcome.epoch, "epoch").expect("an epoch"),
            other => panic!("{other:?} came, expected a welcome"),
        }
    }

    /// The failure that ends the session.
    pub(crate) async fn failure(&mut self) -> Failure {
        match self.next().await {
            Some(session_reply::Message::Failure(failure)) => {
                assert_eq!(self.next().await, None, "something came after the failure");
                failure
            }
            other => panic!("{other:?} came, expected a failure"),
        }
    }
}

/// A hello to `worker` as granted.
pub(crate) fn hello(worker: &Running, grant: &Grant) -> Hello {
    let named = worker.named();
    let own = grant.workers.iter().find(|w| (w.stage, w.rank) == (named.stage, named.rank)).expect("the worker is granted");
    Hello {
        version_min: 1,
        version_max: 1,
        epoch: Some(encode_epoch(grant.epoch)),
        incarnation: own.incarnation,
        workers: grant.workers.clone(),
    }
}
