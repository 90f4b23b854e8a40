//! Adapters on real workers, driven by the router: loaded and unloaded while sequences run, without another session.

use std::{path::PathBuf, sync::Arc, time::Duration};

use plan::{
    adapter::AdapterSource,
    fleet::{FleetAdapter, FleetDeployment, FleetState, RoutingPolicy, ServingSettings},
    planner,
    step::{Sampling, TokenId},
    worker::CollectiveKind,
};
use proto::worker::{LoadAdapter, UnloadAdapter, session_reply, session_request::Message};
use router::{
    edge::{Edge, EdgeOptions, Generation, StreamError, StreamEvent, SubmitError, TokenStream},
    replica::WorkersConnector,
};
use serde_json::Value;
use source::{Source, SourceOptions};
use tokio::{sync::watch, time::timeout};

use crate::fleet::{LONG, Running, TOKEN, Talk, acquire, fleet, hello, model, plan, start};

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models").join(name)
}

/// Prompt and greedy continuation by the reference implementation.
fn expected(name: &str) -> (Vec<TokenId>, Vec<TokenId>) {
    let text = std::fs::read_to_string(fixture(name).join("expected.json")).expect("expected.json");
    let json: Value = serde_json::from_str(&text).expect("JSON");
    let ids = |field: &str| json[field].as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as TokenId).collect();
    (ids("input_ids"), ids("greedy_ids"))
}

fn adapter(name: &str) -> FleetAdapter {
    let uri = fixture(&format!("llama-lora-{name}")).to_string_lossy().into_owned();
    let config = plan(1, 1).config;
    let header = Source::open_adapter(&uri, SourceOptions::default()).and_then(|s| s.adapter_header(&config)).expect("the fixture");
    FleetAdapter { name: name.to_owned(), source: AdapterSource::new(&uri, None, &header) }
}

struct World {
    workers: Vec<Running>,
    edge: Edge,
    state: watch::Sender<FleetState>,
}

impl World {
    async fn start(pipeline: usize, tensor: usize) -> Self {
        let workers = start(&plan(pipeline, tensor), CollectiveKind::Unix).await;
        let serving = ServingSettings {
            chat_template: None,
            system_prompt: None,
            policy: RoutingPolicy::LeastLoad,
            queue_requests: 64,
            queue_seconds: 60,
            prompt_lookup: 0,
            hold: None,
            stopped: None,
        };
        let deployment = FleetDeployment {
            name: "llama".into(),
            model: "llama".into(),
            aliases: Vec::new(),
            drivers: String::new(),
            limits: planner::limits(&plan(1, 1), false),
            serving,
            replicas: vec![fleet(&workers)],
            adapters: Vec::new(),
        };
        let state = watch::Sender::new(FleetState { term: 1, number: 1, deployments: vec![deployment], routers: Vec::new() });
        let connector = Arc::new(WorkersConnector::new(Some(TOKEN.to_owned())));
        let edge = Edge::start(state.subscribe(), EdgeOptions { connector, resume: LONG, deadline: None });
        assert!(edge.wait_complete("llama").await);
        Self { workers, edge, state }
    }

    /// Sets the adapters; returns when the edge knows of them.
    async fn set(&self, adapters: &[FleetAdapter]) {
        self.state.send_modify(|state| {
            state.number += 1;
            state.deployments[0].adapters = adapters.to_vec();
        });
        let wanted: Vec<&str> = adapters.iter().map(|a| a.name.as_str()).collect();
        let known = async {
            while self.edge.models()[0].adapters != wanted {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(LONG, known).await.expect("a state that comes into force");
    }

    fn submit(&self, model: &str, prompt: &[TokenId], most: u32) -> Result<TokenStream, SubmitError> {
        let generation = Generation {
            prompt: prompt.into(),
            sampling: Sampling::default(),
            max_tokens: most,
            end_ids: Arc::new([]),
            score_prompt: None,
            constraint: None,
        };
        self.edge.submit(model, generation)
    }

    async fn epochs(&self) -> Vec<u64> {
        let mut epochs = Vec::new();
        for worker in &self.workers {
            epochs.push(worker.probe().await.highest.expect("an epoch").number);
        }
        epochs
    }

    async fn stop(self) {
        self.edge.shutdown().await;
        for worker in self.workers {
            worker.stop().await;
        }
    }
}

/// The next tokens of a stream, at most `most`, and how it failed, if it did.
async fn tokens(stream: &mut TokenStream, most: usize) -> (Vec<TokenId>, Option<StreamError>) {
    let mut tokens = Vec::new();
    while tokens.len() < most {
        match timeout(LONG, stream.next()).await.expect("an event") {
            Some(StreamEvent::Token { id, .. }) => tokens.push(id),
            Some(StreamEvent::Prompt { .. }) => {}
            Some(StreamEvent::Failed(error)) => return (tokens, Some(error)),
            Some(StreamEvent::Finished(_)) | None => break,
        }
    }
    (tokens, None)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adapters_are_loaded_and_unloaded_while_workers_run() {
    for (pipeline, tensor) in [(2, 1), (1, 2)] {
        let world = World::start(pipeline, tensor).await;
        let ((prompt, bare), (_, of_a), (_, of_b)) = (expected("llama"), expected("llama-lora-a"), expected("llama-lora-b"));
        assert!(bare != of_a && of_a != of_b && bare != of_b, "the adapters hardly differ");
        let epochs = world.epochs().await;
        assert!(matches!(world.submit("llama:a", &prompt, 24), Err(SubmitError::UnknownAdapter { .. })));
        world.set(&[adapter("a")]).await;
        let mut long = world.submit("llama:a", &prompt, 100).expect("admitted");
        assert_eq!(tokens(&mut long, 2).await.0, of_a[..2]);
        world.set(&[adapter("a"), adapter("b")]).await;
        // All in one batch.
        let mut streams: Vec<_> = ["llama", "llama:a", "llama:b", "llama:b", "llama:a", "llama"]
            .map(|name| (name, world.submit(name, &prompt, 24).expect("admitted")))
            .into_iter()
            .collect();
        for (name, stream) in &mut streams {
            let (got, error) = tokens(stream, 25).await;
            assert!(error.is_none(), "{error:?}");
            let expected =
                [("llama", &bare), ("llama:a", &of_a), ("llama:b", &of_b)].into_iter().find(|(n, _)| n == name).expect("a name").1;
            assert_eq!(got, *expected, "{name} of {pipeline} × {tensor}");
        }
        // One is let go: its running sequence goes on, and no other begins.
        world.set(&[adapter("b")]).await;
        let refused = world.submit("llama:a", &prompt, 24).map(|_| ()).expect_err("it is gone");
        assert_eq!(refused.to_string(), "model llama has no adapter a; served are llama:b");
        let (rest, error) = tokens(&mut long, 200).await;
        assert!(error.is_none(), "{error:?}");
        assert_eq!((&rest[..22], rest.len()), (&of_a[2..], 98));
        let mut again = world.submit("llama:b", &prompt, 24).expect("admitted");
        assert_eq!(tokens(&mut again, 25).await.0, of_b);
        assert_eq!(world.epochs().await, epochs, "one session served all of it");
        world.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_worker_has_its_adapters_again() {
    let mut world = World::start(2, 1).await;
    let ((prompt, _), (_, of_a)) = (expected("llama"), expected("llama-lora-a"));
    world.set(&[adapter("a")]).await;
    let mut stream = world.submit("llama:a", &prompt, 24).expect("admitted");
    let (first, _) = tokens(&mut stream, 3).await;
    let last = world.workers.pop().expect("a worker");
    world.workers.push(last.restart().await);
    let (rest, error) = tokens(&mut stream, 25).await;
    assert!(error.is_none(), "{error:?}");
    assert_eq!([first, rest].concat(), of_a);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adapters_that_are_none_fail_by_name_and_nothing_else_does() {
    let world = World::start(1, 2).await;
    let (prompt, bare) = expected("llama");
    let mut missing = adapter("a");
    missing.source.uri = "/nowhere/adapter".into();
    let mut other = adapter("b");
    other.source.numerics = "0".repeat(32);
    for (adapter, said) in [(missing, "does not exist"), (other, "not the one that was planned")] {
        let name = format!("llama:{}", adapter.name);
        world.set(&[adapter]).await;
        let mut stream = world.submit(&name, &prompt, 24).expect("admitted");
        let (_, error) = tokens(&mut stream, 25).await;
        let text = error.expect("a failure").to_string();
        assert!(text.contains("cannot be loaded") && text.contains(said), "{text}");
        let mut stream = world.submit("llama", &prompt, 24).expect("admitted");
        assert_eq!(tokens(&mut stream, 25).await.0, bare);
    }
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_of_the_first_version_have_no_adapters() {
    let workers = start(&plan(1, 1), CollectiveKind::Unix).await;
    let AdapterSource { uri, digest, numerics } = adapter("a").source;
    let load = |slot| Message::LoadAdapter(LoadAdapter { slot, uri: uri.clone(), digest: digest.clone(), numerics: numerics.clone() });
    let begin = async |version_max| {
        let grant = acquire(&workers).await.expect("a free replica");
        let mut talk = Talk::begin_with(&workers[0], proto::worker::Hello { version_max, ..hello(&workers[0], &grant) }).await;
        talk.welcomed().await;
        talk
    };
    let mut old = begin(1).await;
    old.say(load(1)).await;
    let failure = old.failure().await;
    assert_eq!((failure.reason.as_str(), failure.detail.as_str()), ("protocol", "an adapter came in a session of version 1"));
    let mut new = begin(2).await;
    new.say(load(1)).await;
    match new.next().await {
        Some(session_reply::Message::Adapter(reply)) => assert_eq!((reply.slot, reply.failure.as_str()), (1, "")),
        other => panic!("{other:?} came, expected word of the adapter"),
    }
    new.say(Message::UnloadAdapter(UnloadAdapter { slot: 1 })).await;
    new.say(load(0)).await;
    assert!(new.failure().await.detail.contains("slot is 0"));
    assert_eq!(model(), fixture("llama").to_string_lossy());
}
