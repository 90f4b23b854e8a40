//! Streams through an edge over simulated replicas, in virtual time.

mod adapters;
mod drafts;
mod hold;
mod masks;

use std::{sync::Arc, time::Duration};

use plan::{
    card::ModelCard,
    fleet::{FleetDeployment, FleetReplica, FleetState, ReplicaLimits, RoutingPolicy, ServingSettings},
    shard::{KvDType, KvGeometry, KvGroup},
    step::{OutputValue, Sampling, TokenId, Want, WantKind},
};
use tokio::sync::watch;

use super::*;
use crate::replica::simulated::{CostModel, Fault, SimulatedConnector, SimulatedModel};

const MODEL: SimulatedModel = SimulatedModel { vocab: 211, labels: 0, period: 0 };
const COST: CostModel = CostModel { step: Duration::from_millis(5), token: Duration::from_micros(50) };

struct World {
    edge: Edge,
    fleet: watch::Sender<FleetState>,
    connector: Arc<SimulatedConnector>,
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

fn replica(name: &str) -> FleetReplica {
    FleetReplica {
        name: name.to_owned(),
        revision: "1".to_owned(),
        numerics: "n".to_owned(),
        weight: 1,
        draining: false,
        limits: limits(),
        workers: vec![vec!["a".to_owned()], vec!["b".to_owned()]],
        draft: None,
    }
}

fn state(replicas: &[FleetReplica]) -> FleetState {
    let deployment = FleetDeployment {
        adapters: Vec::new(),
        name: "tiny".to_owned(),
        model: "tiny-model".to_owned(),
        aliases: vec!["small".to_owned()],
        limits: limits(),
        serving: ServingSettings {
            chat_template: None,
            system_prompt: None,
            policy: RoutingPolicy::PrefixAware,
            queue_requests: 64,
            queue_seconds: 30,
            prompt_lookup: 0,
            hold: None,
            stopped: None,
        },
        drivers: String::new(),
        replicas: replicas.to_vec(),
    };
    FleetState { term: 1, number: 1, deployments: vec![deployment], routers: Vec::new() }
}

fn world(state: FleetState) -> World {
    world_of(MODEL, state)
}

fn world_of(model: SimulatedModel, state: FleetState) -> World {
    world_by(SimulatedConnector::new(model, 2, COST, Arc::new(ModelCard::default())), state)
}

fn world_by(connector: SimulatedConnector, state: FleetState) -> World {
    let connector = Arc::new(connector);
    let (fleet, receiver) = watch::channel(state);
    let options = EdgeOptions { connector: connector.clone(), resume: Duration::from_secs(10), deadline: None };
    World { edge: Edge::start(receiver, options), fleet, connector }
}

impl World {
    /// Changes the state and numbers it one higher.
    fn update(&self, change: impl FnOnce(&mut FleetState)) {
        self.fleet.send_modify(|state| {
            state.number += 1;
            change(state);
        });
    }
}

fn generation(seed: u64, len: usize, max_tokens: u32) -> Generation {
    Generation {
        prompt: (0..len as u32).map(|i| (i * 3 + seed as u32) % MODEL.vocab).collect(),
        sampling: Sampling { temperature: 0.8, seed, ..Sampling::default() },
        max_tokens,
        end_ids: Arc::new([7]),
        score_prompt: None,
        constraint: None,
    }
}

fn solo(g: &Generation) -> Vec<TokenId> {
    MODEL.solo(&g.prompt, &g.sampling, g.max_tokens as usize, &g.end_ids)
}

/// Everything a stream says: its tokens, and how it ended.
async fn collect(mut stream: TokenStream) -> (Vec<TokenId>, Result<FinishReason, StreamError>) {
    let (mut tokens, mut prompts) = (Vec::new(), 0);
    loop {
        match stream.next().await.expect("an end comes before the stream is over") {
            StreamEvent::Prompt { .. } => prompts += 1,
            StreamEvent::Token { id, .. } => tokens.push(id),
            StreamEvent::Finished(reason) => {
                assert_eq!(prompts, 1, "the prompt is reported once");
                assert!(stream.next().await.is_none());
                return (tokens, Ok(reason));
            }
            StreamEvent::Failed(error) => return (tokens, Err(error)),
        }
    }
}

async fn next_tokens(stream: &mut TokenStream, count: usize) -> Vec<TokenId> {
    let mut tokens = Vec::new();
    while tokens.len() < count {
        match stream.next().await {
            Some(StreamEvent::Token { id, .. }) => tokens.push(id),
            Some(StreamEvent::Prompt { .. }) => {}
            other => panic!("expected a token, got {other:?}"),
        }
    }
    tokens
}

#[tokio::test(start_paused = true)]
async fn streams_give_solo_tokens_and_statuses_say_so() {
    let world = world(state(&[replica("r0")]));
    assert!(!world.edge.ready("tiny-model"));
    let generations: Vec<Generation> = (0..20).map(|i| generation(i, 5 + 9 * i as usize, 40)).collect();
    let streams: Vec<TokenStream> = generations.iter().map(|g| world.edge.submit("small", g.clone()).expect("admitted")).collect();
    for (stream, generation) in streams.into_iter().zip(&generations) {
        let expected = solo(generation);
        let (tokens, end) = collect(stream).await;
        assert_eq!(tokens, expected);
        let reason = if expected.last() == Some(&7) { FinishReason::Stop } else { FinishReason::Length };
        assert_eq!(end.expect("it finished"), reason);
    }
    assert!(world.edge.wait_ready("tiny-model").await);
    let load = &world.edge.load()[0];
    assert_eq!(load.tokens_total, generations.iter().map(|g| solo(g).len() as u64).sum::<u64>());
    assert!(load.ttft_p90_seconds.is_some() && load.itl_p90_seconds.is_some());
    assert_eq!((load.queued, load.running), (0, 0));
    assert_eq!(world.edge.models()[0].ready_replicas, 1);
    world.edge.shutdown().await;
    assert!(!world.edge.ready("tiny-model"));
}

#[tokio::test(start_paused = true)]
async fn refusals_name_what_is_wrong() {
    let world = world(state(&[replica("r0")]));
    let submit = |model: &str, g: Generation| world.edge.submit(model, g).map(|_| ());
    assert!(matches!(submit("other", generation(1, 5, 5)), Err(SubmitError::UnknownModel(name)) if name == "other"));
    assert!(matches!(submit("small", generation(1, 601, 5)), Err(SubmitError::TooLong { prompt: 601, context: 600 })));
    world.update(|state| state.deployments[0].serving.queue_requests = 3);
    world.edge.inner_view_changed().await;
    let held: Vec<_> = (0..3).map(|i| world.edge.submit("small", generation(i, 5, 5)).expect("room")).collect();
    match submit("small", generation(9, 5, 5)) {
        Err(SubmitError::QueueFull { queued: 3, retry_after_seconds }) => assert!(retry_after_seconds > 0),
        other => panic!("expected a full queue, got {other:?}"),
    }
    drop(held);
    world.update(|state| state.deployments[0].replicas.clear());
    world.edge.inner_view_changed().await;
    assert!(matches!(submit("small", generation(1, 5, 5)), Err(SubmitError::NotReady(_))));
}

#[tokio::test(start_paused = true)]
async fn a_lost_replica_loses_no_token_whenever_it_goes() {
    for at in 2..40 {
        let world = world(state(&[replica("r0")]));
        assert!(world.edge.wait_ready("small").await);
        let lost = world.connector.get("r0").expect("made");
        lost.set_fault(Fault::LoseAtStep(at));
        let generations: Vec<Generation> = (0..8).map(|i| generation(i, 3 + 21 * i as usize, 30)).collect();
        let streams: Vec<_> = generations.iter().map(|g| world.edge.submit("small", g.clone()).expect("admitted")).collect();
        for (stream, generation) in streams.into_iter().zip(&generations) {
            let (tokens, end) = collect(stream).await;
            assert_eq!(tokens, solo(generation), "lost at step {at}");
            assert!(end.is_ok());
        }
        let load = &world.edge.load()[0];
        assert_eq!(load.replicas[0].failures_total, 1, "lost at step {at}");
        world.edge.shutdown().await;
    }
}

#[tokio::test(start_paused = true)]
async fn streams_move_to_another_replica_with_equal_numerics() {
    let mut other = replica("r2");
    other.numerics = "m".to_owned();
    let world = world(state(&[replica("r0"), replica("r1"), other]));
    for name in ["r0", "r1", "r2"] {
        world.edge.wait_replica(name).await;
    }
    let generations: Vec<Generation> = (0..12).map(|i| Generation { end_ids: Arc::new([]), ..generation(i, 20, 60) }).collect();
    let mut streams: Vec<_> = generations.iter().map(|g| world.edge.submit("small", g.clone()).expect("admitted")).collect();
    let mut heads = Vec::new();
    for stream in &mut streams {
        heads.push(next_tokens(stream, 5).await);
    }
    for name in ["r0", "r1", "r2"] {
        assert!(world.edge.load()[0].replicas.iter().any(|r| r.name == name && r.running == 4), "evenly spread");
    }
    world.connector.get("r0").expect("made").set_fault(Fault::Down);
    world.connector.get("r2").expect("made").set_fault(Fault::Down);
    let mut stranded = 0;
    for ((stream, head), generation) in streams.into_iter().zip(heads).zip(&generations) {
        let (tail, end) = collect_rest(stream).await;
        let expected = solo(generation);
        if let Err(error) = end {
            assert!(matches!(error, StreamError::NoReplica(_)), "{error}");
            stranded += 1;
        } else {
            assert_eq!([head, tail].concat(), expected);
        }
    }
    assert_eq!(stranded, 4, "nothing with the numerics of r2 is left");
}

async fn collect_rest(mut stream: TokenStream) -> (Vec<TokenId>, Result<FinishReason, StreamError>) {
    let mut tokens = Vec::new();
    loop {
        match stream.next().await.expect("an end comes before the stream is over") {
            StreamEvent::Token { id, .. } => tokens.push(id),
            StreamEvent::Finished(reason) => return (tokens, Ok(reason)),
            StreamEvent::Failed(error) => return (tokens, Err(error)),
            StreamEvent::Prompt { .. } => panic!("the prompt is reported once"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn draining_moves_streams_and_takes_no_new_ones() {
    let world = world(state(&[replica("r0")]));
    world.edge.wait_replica("r0").await;
    let generation = Generation { end_ids: Arc::new([]), ..generation(1, 20, 100) };
    let mut stream = world.edge.submit("small", generation.clone()).expect("admitted");
    let head = next_tokens(&mut stream, 10).await;
    world.update(|state| {
        state.deployments[0].replicas[0].draining = true;
        state.deployments[0].replicas.push(replica("r1"));
    });
    world.edge.wait_replica("r1").await;
    let (tail, end) = collect_rest(stream).await;
    assert!(end.is_ok());
    assert_eq!([head, tail].concat(), solo(&generation));
    let load = &world.edge.load()[0];
    assert_eq!(load.resumed_total, 1);
    assert_eq!(load.replicas[0].failures_total, 0, "a drain is no failure");
    let steps = world.connector.get("r0").expect("made").steps();
    collect(world.edge.submit("small", generation).expect("admitted")).await.1.expect("it finishes");
    assert_eq!(world.connector.get("r0").expect("made").steps(), steps);
}

#[tokio::test(start_paused = true)]
async fn dropping_a_stream_cancels_it() {
    let world = world(state(&[replica("r0")]));
    let mut stream = world.edge.submit("small", Generation { end_ids: Arc::new([]), ..generation(1, 20, 500) }).expect("admitted");
    next_tokens(&mut stream, 3).await;
    let replica = world.connector.get("r0").expect("made");
    let before = replica.steps();
    drop(stream);
    let other = Generation { end_ids: Arc::new([]), ..generation(2, 20, 20) };
    collect(world.edge.submit("small", other).expect("admitted")).await.1.expect("it finishes");
    assert_eq!(world.edge.load()[0].running, 0);
    assert!(replica.steps() < before + 40, "nobody goes on with the dropped one");
}

#[tokio::test(start_paused = true)]
async fn waiting_ends_at_the_deadline() {
    let world = world(state(&[replica("r0")]));
    world.connector.get("r0").expect("made").set_fault(Fault::Down);
    let stream = world.edge.submit("small", generation(1, 5, 5)).expect("held");
    let (tokens, end) = collect(stream).await;
    assert!(tokens.is_empty());
    assert!(matches!(end, Err(StreamError::Queue(30))), "{end:?}");
    assert_eq!(world.edge.load()[0].queued, 0);
    assert_eq!(world.edge.load()[0].replicas[0].last_failure.as_deref(), Some("worker simulated is gone: it is down"));
}

/// How long a replica that had `fault` for a while takes to serve once that is over.
async fn ready_after(fault: Fault) -> Duration {
    let world = world(state(&[replica("r0")]));
    world.edge.wait_replica("r0").await;
    let made = world.connector.get("r0").expect("made");
    made.set_fault(fault);
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert!(!world.edge.ready("small"));
    made.set_fault(Fault::None);
    let ended = tokio::time::Instant::now();
    world.edge.wait_replica("r0").await;
    ended.elapsed()
}

#[tokio::test(start_paused = true)]
async fn a_replica_serves_as_soon_as_it_has_loaded() {
    assert!(ready_after(Fault::Loading).await < Duration::from_millis(150));
    // Control: one that is down is asked less and less often.
    assert!(ready_after(Fault::Down).await > Duration::from_millis(300));
}

#[tokio::test(start_paused = true)]
async fn prefix_aware_routing_goes_where_the_prefix_is() {
    let world = world(state(&[replica("r0"), replica("r1"), replica("r2")]));
    for name in ["r0", "r1", "r2"] {
        world.edge.wait_replica(name).await;
    }
    let (mut cached, mut total) = (0, 0);
    for i in 0..24u64 {
        let mut g = generation(i % 3, 200, 4);
        g.prompt = g.prompt.iter().copied().chain([i as u32]).collect();
        let mut stream = world.edge.submit("small", g.clone()).expect("admitted");
        while let Some(event) = stream.next().await {
            if let StreamEvent::Prompt { cached_tokens, .. } = event
                && i >= 3
            {
                cached += cached_tokens as usize;
                total += g.prompt.len();
            }
        }
    }
    assert!(cached as f64 / total as f64 > 0.9, "{cached} of {total}");
}

#[tokio::test(start_paused = true)]
async fn an_older_state_is_ignored_and_stopping_ends_streams() {
    let world = world(state(&[replica("r0")]));
    world.edge.wait_replica("r0").await;
    world.fleet.send_replace(FleetState { term: 0, number: 9, ..FleetState::default() });
    tokio::task::yield_now().await;
    let mut stream = world.edge.submit("small", Generation { end_ids: Arc::new([]), ..generation(1, 5, 500) }).expect("still there");
    next_tokens(&mut stream, 2).await;
    world.edge.shutdown().await;
    let (_, end) = collect_rest(stream).await;
    assert!(matches!(end, Err(StreamError::Stopping | StreamError::NoReplica(_))), "{end:?}");
}

#[tokio::test(start_paused = true)]
async fn evaluations_answer_their_wants_in_order_even_when_the_replica_is_lost() {
    let world = world(state(&[replica("r0")]));
    world.edge.wait_replica("r0").await;
    let ids: Arc<[TokenId]> = (0..40).collect();
    let mut wants: Vec<Want> = (0..39).map(|i| Want { offset: i, kind: WantKind::Score { target: ids[i as usize + 1], top: 0 } }).collect();
    wants.push(Want { offset: 39, kind: WantKind::Logits });
    let evaluation = Evaluation { ids: ids.clone(), wants, chunk: None, greedy: 6, greedy_logits: true };
    let whole = world.edge.evaluate("small", evaluation.clone()).await.expect("it runs");
    assert_eq!(whole.len(), 40 + 2 * 6);
    let tokens: Vec<TokenId> = whole
        .iter()
        .filter_map(|o| match o.value {
            OutputValue::Token { id, .. } => Some(id),
            _ => None,
        })
        .collect();
    assert_eq!(tokens, MODEL.solo(&ids, &Sampling::default(), 6, &[]));
    for at in [3, 6, 9] {
        world.edge.wait_replica("r0").await;
        world.connector.get("r0").expect("made").set_fault(Fault::LoseAtStep(at));
        let chunked = Evaluation { chunk: Some(7), ..evaluation.clone() };
        assert_eq!(world.edge.evaluate("small", chunked).await.expect("it runs"), whole);
    }
    let wrong = Evaluation { wants: vec![Want { offset: 40, kind: WantKind::Logits }], ..evaluation };
    assert!(matches!(world.edge.evaluate("small", wrong).await, Err(EvaluateError::Invalid(_))));
}
