//! Routers of a pool over loopback, each in a runtime of its own, on shared simulated replicas.

mod lifecycle;
mod masks;
mod wire;

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use identity::Identity;
use plan::{
    fleet::{FleetDeployment, FleetReplica, FleetRouter, FleetState, ReplicaLimits, RoutingPolicy, ServingSettings},
    shard::{KvDType, KvGeometry, KvGroup},
    step::{Sampling, TokenId},
};
use tokio::{net::TcpListener, runtime::Runtime, time::timeout};

use super::PoolOptions;
use crate::{
    control::FleetStore,
    edge::{Edge, EdgeOptions, FinishReason, Generation, ReplicaLoad, StreamError, StreamEvent, TokenStream},
    replica::{
        Connector, Replica,
        simulated::{CostModel, SimulatedModel, SimulatedReplica},
    },
};

const MODEL: SimulatedModel = SimulatedModel { vocab: 512, labels: 0, period: 0 };
/// Slow enough to look at streams in their midst.
const COST: CostModel = CostModel { step: Duration::from_millis(4), token: Duration::ZERO };
/// What anything but a dead router takes; far more than it should, on a busy machine.
const SOON: Duration = Duration::from_secs(20);
const TOKEN: &str = "pool-secret";
const WORKERS: &str = "worker-secret";
const REPLICAS: usize = 6;

/// The same replicas for every router, as workers are: whoever opens a session waits for the end of the one before.
#[derive(Default)]
struct Shared(Mutex<HashMap<Place, Arc<SimulatedReplica>>>);

/// A replica's name and its workers' addresses.
type Place = (String, Vec<Vec<String>>);

impl Connector for Shared {
    fn replica(&self, spec: &FleetReplica) -> Arc<dyn Replica> {
        let key = (spec.name.clone(), spec.workers.clone());
        let make = || Arc::new(SimulatedReplica::new(MODEL, spec.limits.kv.clone(), 1, COST, Arc::new(crate::grammar::tests::card())));
        self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(key).or_insert_with(make).clone()
    }
}

impl Shared {
    /// Addresses that some router reached the first worker of a replica at.
    fn addresses(&self, replica: &str) -> Vec<String> {
        let made = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        made.keys().filter(|(name, _)| name == replica).map(|(_, workers)| workers[0][0].clone()).collect()
    }
}

fn limits() -> ReplicaLimits {
    let group = |window, blocks| KvGroup { window, layers: vec![0], blocks };
    ReplicaLimits {
        kv: KvGeometry { dtype: KvDType::F32, groups: vec![group(None, 400), group(Some(64), 200)] },
        max_context: 600,
        max_batch_sequences: 16,
        max_batch_tokens: 128,
        prefix_caching: true,
    }
}

fn state(number: u64, routers: &[(&str, SocketAddr)]) -> FleetState {
    let replica = |i: usize| FleetReplica {
        name: format!("tiny-r{i}"),
        revision: "1".to_owned(),
        numerics: "n".to_owned(),
        weight: 1,
        draining: false,
        limits: limits(),
        workers: vec![vec![format!("worker-{i}:7071")]],
        draft: None,
    };
    let deployment = FleetDeployment {
        adapters: Vec::new(),
        name: "tiny".to_owned(),
        model: "tiny".to_owned(),
        aliases: Vec::new(),
        limits: limits(),
        serving: ServingSettings {
            chat_template: None,
            system_prompt: None,
            policy: RoutingPolicy::LeastLoad,
            queue_requests: 64,
            queue_seconds: 30,
            prompt_lookup: 0,
            hold: None,
            stopped: None,
        },
        drivers: String::new(),
        replicas: (0..REPLICAS).map(replica).collect(),
    };
    let routers =
        routers.iter().map(|(name, at)| FleetRouter { name: (*name).to_owned(), address: at.to_string(), pool: String::new() }).collect();
    FleetState { term: 1, number, deployments: vec![deployment], routers }
}

/// One router, which can be killed as a process is: all its tasks and sockets are gone at once.
struct Router {
    runtime: Option<Runtime>,
    edge: Edge,
    store: FleetStore,
}

impl Router {
    fn start(name: &str, listener: TcpListener, connector: &Arc<Shared>, state: FleetState, seeds: Vec<String>) -> Self {
        Self::start_as(name, listener, connector, state, (seeds, None, ""))
    }

    /// One that asks `seeds` for a state, proves to be `identity`, and is one of the deployment `own`.
    fn start_as(
        name: &str,
        listener: TcpListener,
        connector: &Arc<Shared>,
        state: FleetState,
        (seeds, identity, own): (Vec<String>, Option<Identity>, &str),
    ) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let listener = listener.into_std().expect("a socket");
        let store = FleetStore::new(state, None);
        let edge = {
            let _inside = runtime.enter();
            let pool = PoolOptions {
                name: name.to_owned(),
                pool: own.to_owned(),
                listener: TcpListener::from_std(listener).expect("a socket"),
                token: Some(TOKEN.to_owned()),
                worker_token: Some(WORKERS.to_owned()),
                identity,
                seeds,
            };
            let options = EdgeOptions { connector: connector.clone(), resume: SOON, deadline: None };
            Edge::join(&store, options, pool)
        };
        Self { runtime: Some(runtime), edge, store }
    }

    fn kill(&mut self) {
        self.runtime.take().expect("alive").shutdown_background();
    }

    fn replicas(&self) -> Vec<ReplicaLoad> {
        self.edge.load().into_iter().flat_map(|load| load.replicas).collect()
    }

    /// Replicas that this router drives and has proven.
    fn drives(&self) -> Vec<String> {
        self.replicas().into_iter().filter(|r| r.drives && r.ready).map(|r| r.name).collect()
    }

    fn is_complete(&self) -> bool {
        self.edge.load().first().is_some_and(|load| load.replicas.len() == REPLICAS && load.replicas.iter().all(|r| r.ready))
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Waits for what comes over sockets in real time.
async fn until(what: &str, condition: impl Fn() -> bool) {
    let poll = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(5));
        while !condition() {
            ticks.tick().await;
        }
    };
    timeout(SOON, poll).await.unwrap_or_else(|_| panic!("waited for {what}"));
}

async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("a bound listener");
    (listener, address)
}

/// Two routers that share the replicas, each of which can reach them all.
async fn pair() -> (Arc<Shared>, Router, Router) {
    let connector = Arc::new(Shared::default());
    let ((one, one_at), (two, two_at)) = (listener().await, listener().await);
    let state = state(1, &[("router-0", one_at), ("router-1", two_at)]);
    let first = Router::start("router-0", one, &connector, state.clone(), Vec::new());
    let second = Router::start("router-1", two, &connector, state, Vec::new());
    until("every replica at both routers", || first.is_complete() && second.is_complete()).await;
    (connector, first, second)
}

fn generation(seed: u64, max_tokens: u32) -> Generation {
    Generation {
        prompt: (0..20u32).map(|i| (i * 3 + seed as u32) % MODEL.vocab).collect(),
        sampling: Sampling { temperature: 0.8, seed, ..Sampling::default() },
        max_tokens,
        end_ids: Arc::new([]),
        score_prompt: None,
        constraint: None,
    }
}

fn solo(g: &Generation) -> Vec<TokenId> {
    MODEL.solo(&g.prompt, &g.sampling, g.max_tokens as usize, &g.end_ids)
}

async fn head(stream: &mut TokenStream, count: usize) -> Vec<TokenId> {
    let mut tokens = Vec::new();
    while tokens.len() < count {
        match timeout(SOON, stream.next()).await.expect("in time") {
            Some(StreamEvent::Token { id, .. }) => tokens.push(id),
            Some(StreamEvent::Prompt { .. }) => {}
            other => panic!("expected a token, got {other:?}"),
        }
    }
    tokens
}

async fn rest(mut stream: TokenStream) -> (Vec<TokenId>, Result<FinishReason, StreamError>) {
    let mut tokens = Vec::new();
    loop {
        match timeout(SOON, stream.next()).await.expect("in time").expect("an end comes before the stream is over") {
            StreamEvent::Token { id, .. } => tokens.push(id),
            StreamEvent::Prompt { .. } => {}
            StreamEvent::Finished(reason) => return (tokens, Ok(reason)),
            StreamEvent::Failed(error) => return (tokens, Err(error)),
        }
    }
}
