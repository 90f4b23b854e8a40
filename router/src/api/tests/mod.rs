//! The API over loopback, in front of a simulated replica with the tokenizer of the llama fixture.

mod constrained;
mod errors;
mod generation;
mod logprobs;
mod requests;
mod service;
mod streams;
mod vectors;
mod wire;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use plan::adapter::AdapterSource;
use plan::card::{CardFile, ModelCard};
use plan::fleet::{FleetAdapter, FleetDeployment, FleetReplica, FleetState, ReplicaLimits, RoutingPolicy, ServingSettings, Stopped};
use plan::shard::{KvDType, KvGeometry, KvGroup};
use plan::step::{Sampling, TokenId};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{ApiOptions, ServeError, serve};
use crate::edge::{Edge, EdgeOptions};
use crate::encode::Tokenizer;
use crate::replica::simulated::{CostModel, Fault, SimulatedConnector, SimulatedModel, SimulatedReplica};

/// Its vocabulary is the fixture's.
const MODEL: SimulatedModel = SimulatedModel { vocab: 512, labels: 0, period: 0 };
const PROMPT: &str = "The capital of France is";
/// End tokens of the fixture.
const ENDS: [TokenId; 2] = [1, 4];
const CONTEXT: usize = 512;

/// A card of the llama fixture; `change` sees each file before it goes in.
fn card(change: impl Fn(&str, &mut Value)) -> ModelCard {
    card_of("llama", &["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"], change)
}

/// A card of these files of a fixture.
fn card_of(fixture: &str, files: &[&str], change: impl Fn(&str, &mut Value)) -> ModelCard {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models").join(fixture);
    let file = |name: &&str| {
        let bytes = std::fs::read(folder.join(name)).expect("a file of the fixture");
        let mut value = serde_json::from_slice(&bytes).expect("JSON");
        change(name, &mut value);
        CardFile { name: (*name).to_owned(), bytes: value.to_string().into_bytes() }
    };
    ModelCard { files: files.iter().map(file).collect() }
}

/// How a [`World`] is built.
struct Setup {
    card: ModelCard,
    model: SimulatedModel,
    /// None: an encoder.
    groups: Vec<KvGroup>,
    cost: CostModel,
    options: ApiOptions,
    replicas: usize,
    queue_requests: usize,
    queue_seconds: u64,
    system_prompt: Option<String>,
    stopped: Option<Stopped>,
}

impl Default for Setup {
    fn default() -> Self {
        let group = |window, blocks| KvGroup { window, layers: vec![0], blocks };
        Self {
            card: card(|_, _| ()),
            model: MODEL,
            groups: vec![group(None, 900), group(Some(64), 600)],
            cost: CostModel::FREE,
            options: ApiOptions { drain: Duration::from_secs(5), ..ApiOptions::default() },
            replicas: 1,
            queue_requests: 64,
            queue_seconds: 30,
            system_prompt: None,
            stopped: None,
        }
    }
}

/// Slow enough to look at streams in their midst.
const SLOW: CostModel = CostModel { step: Duration::from_millis(4), token: Duration::ZERO };

/// A server in front of simulated replicas.
struct World {
    edge: Edge,
    connector: Arc<SimulatedConnector>,
    _fleet: watch::Sender<FleetState>,
    http: SocketAddr,
    grpc: SocketAddr,
    tokenizer: Tokenizer,
    model: SimulatedModel,
    stop: CancellationToken,
    server: JoinHandle<Result<(), ServeError>>,
}

impl World {
    async fn new() -> Self {
        Self::with(Setup::default()).await
    }

    /// A world whose replicas are ready.
    async fn with(setup: Setup) -> Self {
        let replicas = setup.replicas;
        let world = Self::start(setup).await;
        if replicas > 0 {
            assert!(world.edge.wait_ready("tiny").await);
        }
        world
    }

    /// A world whose replicas may not be ready yet.
    async fn start(setup: Setup) -> Self {
        let limits = ReplicaLimits {
            kv: KvGeometry { dtype: KvDType::F32, groups: setup.groups },
            max_context: CONTEXT,
            max_batch_sequences: 64,
            max_batch_tokens: 128,
            prefix_caching: true,
        };
        let replica = |i: usize| FleetReplica {
            name: format!("r{i}"),
            revision: "1".to_owned(),
            numerics: "n".to_owned(),
            weight: 1,
            draining: false,
            limits: limits.clone(),
            workers: vec![vec!["a".to_owned()], vec!["b".to_owned()]],
            draft: None,
        };
        let deployment = FleetDeployment {
            adapters: vec![FleetAdapter {
                name: "poet".to_owned(),
                source: AdapterSource { uri: "file:/poet".to_owned(), digest: None, numerics: "numerics of poet".to_owned() },
            }],
            name: "tiny-deployment".to_owned(),
            model: "tiny".to_owned(),
            aliases: vec!["org/small".to_owned()],
            drivers: String::new(),
            replicas: (0..setup.replicas).map(replica).collect(),
            limits,
            serving: ServingSettings {
                chat_template: None,
                system_prompt: setup.system_prompt,
                policy: RoutingPolicy::PrefixAware,
                queue_requests: setup.queue_requests,
                queue_seconds: setup.queue_seconds,
                prompt_lookup: 0,
                hold: None,
                stopped: setup.stopped,
            },
        };
        let tokenizer = Tokenizer::from_card(&setup.card).expect("a tokenizer");
        let connector = Arc::new(SimulatedConnector::new(setup.model, 2, setup.cost, Arc::new(setup.card)));
        let (fleet, receiver) = watch::channel(FleetState { term: 1, number: 1, deployments: vec![deployment], routers: Vec::new() });
        let options = EdgeOptions { connector: connector.clone(), resume: Duration::from_secs(10), deadline: None };
        let edge = Edge::start(receiver, options);
        let listen = || TcpListener::bind("127.0.0.1:0");
        let (http, grpc) = (listen().await.expect("a port"), listen().await.expect("a port"));
        let address = |l: &TcpListener| l.local_addr().expect("it is bound");
        let (http_at, grpc_at) = (address(&http), address(&grpc));
        let stop = CancellationToken::new();
        let shutdown = stop.clone().cancelled_owned();
        let server = tokio::spawn(serve(edge.clone(), http, grpc, setup.options, shutdown));
        Self { edge, connector, _fleet: fleet, http: http_at, grpc: grpc_at, tokenizer, model: setup.model, stop, server }
    }

    fn replica(&self) -> Arc<SimulatedReplica> {
        self.connector.get("r0").expect("a replica")
    }

    fn ids(&self, text: &str) -> Vec<TokenId> {
        self.tokenizer.encode_prompt(text, true).expect("encodes")
    }

    /// The text of tokens, decoded in one piece.
    fn text(&self, ids: &[TokenId]) -> String {
        let text = ids.iter().filter(|id| !self.tokenizer.is_control(**id)).flat_map(|id| self.tokenizer.piece(*id)).copied();
        String::from_utf8_lossy(&text.collect::<Vec<u8>>()).into_owned()
    }

    /// What the model alone draws after [`PROMPT`].
    fn solo(&self, sampling: &Sampling, most: usize, ends: &[TokenId]) -> Vec<TokenId> {
        MODEL.solo(&self.ids(PROMPT), sampling, most, ends)
    }

    async fn get(&self, path: &str) -> Reply {
        exchange(self.http, &format!("GET {path} HTTP/1.1\r\nhost: skein\r\nconnection: close\r\n\r\n"), b"").await
    }

    async fn post(&self, path: &str, body: &Value) -> Reply {
        exchange(self.http, &head(path, body.to_string().len()), body.to_string().as_bytes()).await
    }

    /// The first choices of `/v1/completions` after [`PROMPT`], greedy, with more parameters.
    async fn complete(&self, more: Value) -> Value {
        self.post("/v1/completions", &request(more)).await.ok()
    }

    /// The events of the same, streamed.
    async fn stream(&self, more: Value) -> Vec<Value> {
        let mut body = request(more);
        body["stream"] = true.into();
        self.post("/v1/completions", &body).await.events()
    }

    /// Waits until no sequence runs or waits.
    async fn wait_idle(&self) {
        until("an idle replica", || self.edge.load().iter().all(|l| l.running == 0 && l.queued == 0)).await;
    }
}

/// A completion request with `more` in it.
fn request(more: Value) -> Value {
    let mut body = json!({"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "temperature": 0});
    for (name, value) in more.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body
}

/// A chat request with `more` in it.
fn chat(more: Value) -> Value {
    let mut body = request(more);
    body.as_object_mut().expect("an object").remove("prompt");
    if body.get("messages").is_none() {
        body["messages"] = json!([{"role": "user", "content": "Hello"}]);
    }
    body
}

fn head(path: &str, length: usize) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: skein\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    )
}

/// The joined text of choice `index` in the chunks of a stream of completions.
fn joined(events: &[Value], index: usize) -> String {
    let choices = events.iter().flat_map(|e| e["choices"].as_array().into_iter().flatten());
    choices.filter(|c| c["index"] == index).map(|c| c["text"].as_str().expect("text")).collect()
}

/// Looks at `condition` until it holds.
async fn until(what: &str, condition: impl Fn() -> bool) {
    let looking = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(10), looking).await.is_ok(), "waited for {what}");
}

/// An HTTP answer.
#[derive(Debug)]
struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Reply {
    fn parse(bytes: &[u8]) -> Self {
        let split = bytes.windows(4).position(|w| w == b"\r\n\r\n").expect("the end of the head");
        let text = std::str::from_utf8(&bytes[..split]).expect("ASCII");
        let mut lines = text.split("\r\n");
        let status = lines.next().and_then(|l| l.split(' ').nth(1)?.parse().ok()).expect("a status");
        let header = |l: &str| l.split_once(": ").map(|(n, v)| (n.to_ascii_lowercase(), v.to_owned())).expect("a header");
        let mut reply = Self { status, headers: lines.map(header).collect(), body: bytes[split + 4..].to_vec() };
        if reply.header("transfer-encoding") == Some("chunked") {
            reply.body = dechunk(&reply.body);
        }
        reply
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }

    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("UTF-8")
    }

    /// The JSON of an answer that is none of an error.
    fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text());
        self.json()
    }

    /// The error object of an answer that has this status.
    fn error(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.text());
        let error = self.json()["error"].clone();
        for name in ["message", "type", "param", "code"] {
            assert!(error.get(name).is_some(), "no {name} in {error}");
        }
        error
    }

    /// The events of a stream that ended well, without the `[DONE]` they end with.
    fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.text());
        assert_eq!(self.header("content-type"), Some("text/event-stream; charset=utf-8"));
        let mut data: Vec<&str> = self.text().split("\n\n").filter_map(|e| e.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"));
        data.into_iter().map(|d| serde_json::from_str(d).expect("JSON")).collect()
    }
}

fn dechunk(mut bytes: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        let line = bytes.windows(2).position(|w| w == b"\r\n").expect("a chunk's length");
        let length = usize::from_str_radix(std::str::from_utf8(&bytes[..line]).expect("ASCII"), 16).expect("a number");
        if length == 0 {
            return body;
        }
        body.extend_from_slice(&bytes[line + 2..line + 2 + length]);
        bytes = &bytes[line + 2 + length + 2..];
    }
}

/// Sends a request and reads until the server closes the connection.
async fn exchange(address: SocketAddr, head: &str, body: &[u8]) -> Reply {
    let mut stream = TcpStream::connect(address).await.expect("a server");
    stream.write_all(head.as_bytes()).await.expect("it reads");
    stream.write_all(body).await.expect("it reads");
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.expect("it answers");
    Reply::parse(&bytes)
}
