//! `skein bench router`: what the router alone takes, in front of replicas without weights.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use plan::{
    fleet::{FleetDeployment, FleetReplica, FleetState, ReplicaLimits, RoutingPolicy, ServingSettings},
    shard::{BLOCK_TOKENS, KvDType, KvGeometry, KvGroup},
};
use router::{
    ApiOptions,
    delays::{Counted, Delays},
    edge::{Edge, EdgeOptions},
    replica::simulated::{CostModel, SimulatedModel},
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::Serialize;
use tokio::{
    net::TcpListener,
    runtime::Runtime,
    sync::{Notify, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use super::bench_load::{Percentiles, percentiles, print_clients, prompts};
use crate::{
    args::{BenchRouterArgs, Global},
    bench::{
        load::{Endpoint, Timed},
        paced::PacedConnector,
        processor::Threads,
    },
    exit::{BadInput, Outcome, bad_input},
    local::threads,
    model::Model,
    output::{self, Unit},
};

/// Name of the router's threads, and of the clients'.
const ROUTER: &str = "router";
const CLIENTS: &str = "clients";
/// The model's name in requests.
const SERVED: &str = "simulated";
/// Tokens of a prompt for which there is room on every replica; longer ones are taken, but not so many at once.
const PROMPT: usize = 512;
/// Longest prompt.
const LONGEST: usize = 8192;
/// Most tokens in a step, beside one for each sequence.
const CHUNK: usize = 2048;
/// Open files beside connections: listeners, event queues, the model's files.
const FILES: u64 = 256;
/// Longest that one request may take.
const PATIENCE: Duration = Duration::from_secs(600);

/// The result, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Measured {
    streams: usize,
    replicas: usize,
    /// Streams that a replica decodes together.
    batch: usize,
    step_time_us: u64,
    token_time_us: u64,
    max_tokens: u32,
    /// Threads of the router.
    threads: usize,
    requests: usize,
    errors: usize,
    /// The first error, if there was one.
    first_error: Option<String>,
    seconds: f64,
    requests_per_second: f64,
    /// New tokens of all requests per second.
    output_tokens_per_second: f64,
    prompt_tokens: u64,
    completion_tokens: u64,
    /// From the arrival of a worker's reply to the write of its token to the client's socket, in microseconds, while every stream was there.
    token_delay_us: Option<TokenDelay>,
    /// What the router's threads used of processors; none where the system does not say.
    router: Option<Processor>,
    /// What the clients' threads used of processors, in seconds.
    clients_s: Option<f64>,
    ttft_ms: Option<Percentiles>,
    itl_ms: Option<Percentiles>,
    request_ms: Option<Percentiles>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct TokenDelay {
    p50: f64,
    p90: f64,
    p99: f64,
    max: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Processor {
    seconds: f64,
    /// Processors busy on average.
    cores: f64,
    /// All of it, divided by tokens, and by requests.
    token_us: f64,
    request_us: f64,
    /// Processors for a thousand such requests a second.
    cores_per_1000_requests_per_second: f64,
}

/// What happened.
struct Run {
    seconds: f64,
    timed: Vec<Timed>,
    errors: Vec<String>,
    /// While every stream was there.
    delays: Counted,
    router: Option<Duration>,
    clients: Option<Duration>,
}

/// Runs the command. Fails when a request failed: what is left would be another load.
pub(crate) async fn bench(global: &Global, args: BenchRouterArgs) -> Outcome {
    let streams = args.streams.get();
    let requests = args.requests.map_or(3 * streams, Into::into);
    if requests < 2 * streams {
        return Err(bad_input!("{requests} requests are too few for {streams} streams, expected at least two for each"));
    }
    make_room_for_files(streams)?;
    let prompts = prompts(args.prompts.as_deref())?;
    let model = Model::open(global, &args.model).await?;
    model.must_generate("bench router")?;
    let threads = args.threads.map_or_else(threads::available, Into::into);
    let served = Served::start(&model, &args, threads).await?;
    let endpoint = Endpoint::new(&served.url, None, PATIENCE, args.max_tokens, 0.0)?;
    // The tokenizer is made with the first request.
    endpoint.complete(SERVED, &prompts[0]).await.context("a first request failed")?;

    let bar = output::bar(global.quiet, "Requesting", requests as u64, Unit::Items);
    let clients = Clients::start()?;
    let load = Load { endpoint, prompts, streams, requests, ramp: ramp(&args), bar: bar.clone() };
    let threads_before = Threads::look();
    let started = Instant::now();
    let (results, delays) = clients.ask(load, &served.delays).await?;
    let seconds = started.elapsed().as_secs_f64();
    let threads_after = Threads::look();
    bar.finish_and_clear();
    served.stop().await;

    let (mut timed, mut errors) = (Vec::new(), Vec::new());
    for result in results {
        match result {
            Ok(times) => timed.push(times),
            Err(error) => errors.push(format!("{error:#}")),
        }
    }
    let used = |name| threads_after.used_since(&threads_before, name);
    let measured = report(&args, threads, Run { seconds, timed, errors, delays, router: used(ROUTER), clients: used(CLIENTS) });
    if args.json {
        output::json(&measured)?
    } else {
        print(&measured)?
    }
    match measured.first_error {
        Some(error) => Err(anyhow::anyhow!("{} of {requests} requests failed, the first with: {error}", measured.errors).into()),
        None => Ok(()),
    }
}

/// Two ends of each connection are in this process: raises the limit of open files where that is allowed.
///
/// # Errors
/// Bad input when it is not.
fn make_room_for_files(streams: usize) -> Outcome {
    let needed = 2 * streams as u64 + FILES;
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|most| most >= needed) {
        return Ok(());
    }
    if limit.maximum.is_some_and(|most| most < needed) {
        let most = limit.maximum.unwrap_or_default();
        return Err(bad_input!("{streams} streams need {needed} open files, and this process may have {most} (ulimit -Hn)"));
    }
    let raised = setrlimit(Resource::Nofile, Rlimit { current: Some(needed), ..limit });
    Ok(raised.with_context(|| format!("failed to raise the limit of open files to {needed}"))?)
}

/// A router in front of simulated replicas, on threads of its own.
struct Served {
    url: String,
    delays: Arc<Delays>,
    stop: CancellationToken,
    runtime: Runtime,
    ended: tokio::task::JoinHandle<anyhow::Result<()>>,
}

impl Served {
    async fn start(model: &Model, args: &BenchRouterArgs, threads: usize) -> Outcome<Self> {
        let (card, vocab) =
            (model.card().await?, u32::try_from(model.header.config.vocab).context("the vocabulary has too many pieces").bad_input()?);
        let connector = Arc::new(PacedConnector {
            model: SimulatedModel { vocab, labels: 0, period: 0 },
            cost: CostModel { step: Duration::from_micros(args.step_time), token: Duration::from_micros(args.token_time) },
            card,
        });
        // Text is encoded on threads of the same name, which are not to end, with what they used, before they are looked at.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(threads)
            .thread_name(ROUTER)
            .thread_keep_alive(PATIENCE)
            .enable_all()
            .build()
            .context("failed to start the router's threads")?;
        let (delays, stop) = (Arc::<Delays>::default(), CancellationToken::new());
        let options = ApiOptions { delays: delays.clone(), ..ApiOptions::default() };
        let (fleet, stopped) = (state(args), stop.clone());
        let (tell, told) = tokio::sync::oneshot::channel();
        let ended = runtime.spawn(async move {
            let (_fleet, receiver) = watch::channel(fleet);
            let edge = Edge::start(receiver, EdgeOptions { connector, resume: PATIENCE, deadline: None });
            let listen = || TcpListener::bind(("127.0.0.1", 0));
            let (http, grpc) = (listen().await.context("failed to listen")?, listen().await.context("failed to listen")?);
            let address = http.local_addr().context("failed to find out which port is listened on")?;
            edge.wait_complete(SERVED).await;
            // Whoever waits for it has ended otherwise.
            let _ = tell.send(address);
            let served = router::serve(edge.clone(), http, grpc, options, stopped.cancelled_owned()).await;
            edge.shutdown().await;
            Ok(served?)
        });
        match told.await {
            Ok(address) => Ok(Self { url: format!("http://{address}"), delays, stop, runtime, ended }),
            Err(_) => {
                let why = ended.await;
                runtime.shutdown_background();
                Err(why.context("the router broke")?.err().unwrap_or_else(|| anyhow::anyhow!("the router ended by itself")).into())
            }
        }
    }

    /// Ends the server and its threads.
    async fn stop(self) {
        self.stop.cancel();
        if let Ok(Err(error)) | Err(error) = self.ended.await.map_err(anyhow::Error::from) {
            tracing::warn!(error = format!("{error:#}"), "the router did not end well");
        }
        self.runtime.shutdown_background();
    }
}

/// As many replicas as the streams fill, with room for every stream at once.
fn state(args: &BenchRouterArgs) -> FleetState {
    let (streams, batch) = (args.streams.get(), args.batch.get());
    let replicas = streams.div_ceil(batch);
    // Streams are not spread quite evenly while they come and go.
    let sequences = 2 * batch;
    let answer = args.max_tokens as usize;
    let blocks = (sequences * (PROMPT + answer).div_ceil(BLOCK_TOKENS)).max((LONGEST + answer).div_ceil(BLOCK_TOKENS));
    let limits = ReplicaLimits {
        kv: KvGeometry { dtype: KvDType::F16, groups: vec![KvGroup { window: None, layers: vec![0], blocks }] },
        max_context: LONGEST + answer,
        max_batch_sequences: sequences,
        max_batch_tokens: CHUNK + sequences,
        prefix_caching: true,
    };
    let replica = |number: usize| FleetReplica {
        name: format!("{SERVED}-{number}"),
        revision: "1".to_owned(),
        numerics: SERVED.to_owned(),
        weight: 1,
        draining: false,
        limits: limits.clone(),
        workers: vec![vec![String::new()]],
        draft: None,
    };
    let deployment = FleetDeployment {
        name: SERVED.to_owned(),
        model: SERVED.to_owned(),
        aliases: Vec::new(),
        drivers: String::new(),
        replicas: (0..replicas).map(replica).collect(),
        limits: limits.clone(),
        serving: ServingSettings {
            chat_template: None,
            system_prompt: None,
            policy: RoutingPolicy::LeastLoad,
            queue_requests: streams,
            queue_seconds: PATIENCE.as_secs(),
            prompt_lookup: 0,
            hold: None,
            stopped: None,
        },
        adapters: Vec::new(),
    };
    FleetState { term: 1, number: 1, deployments: vec![deployment], routers: Vec::new() }
}

/// What clients ask, and when.
struct Load {
    endpoint: Endpoint,
    prompts: Vec<String>,
    streams: usize,
    requests: usize,
    /// The streams begin spread over so much time.
    ramp: Duration,
    bar: indicatif::ProgressBar,
}

/// The time of one request where every batch is full: streams that begin spread over it end spread too, and replicas are not in step.
fn ramp(args: &BenchRouterArgs) -> Duration {
    let batch = args.batch.min(args.streams).get() as u64;
    Duration::from_micros((args.step_time + batch * args.token_time) * u64::from(args.max_tokens))
}

/// Clients on threads of their own, which leave a processor to the router where both want it.
struct Clients(Option<Runtime>);

impl Clients {
    fn start() -> Outcome<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(threads::available())
            .thread_name(CLIENTS)
            .on_thread_start(step_back)
            .enable_all()
            .build()
            .context("failed to start the clients' threads")?;
        Ok(Self(Some(runtime)))
    }

    /// Streams completions, as many at once as there are streams; and the delays from when the last stream had begun to when the first found
    /// nothing more to ask.
    async fn ask(&self, load: Load, delays: &Delays) -> anyhow::Result<(Vec<anyhow::Result<Timed>>, Counted)> {
        let Load { endpoint, prompts, streams, requests, ramp, bar } = load;
        let Some(runtime) = &self.0 else { bail!("the clients' threads have ended") };
        let (next, prompts, exhausted) = (Arc::new(AtomicUsize::new(0)), Arc::new(prompts), Arc::new(Notify::new()));
        let mut clients = JoinSet::new();
        for client in 0..streams.min(requests) {
            let (endpoint, prompts, next, bar, exhausted) =
                (endpoint.clone(), prompts.clone(), next.clone(), bar.clone(), exhausted.clone());
            let pause = ramp.mul_f64(client as f64 / streams as f64);
            let client = async move {
                let mut results = Vec::new();
                tokio::time::sleep(pause).await;
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= requests {
                        exhausted.notify_one();
                        return results;
                    }
                    results.push(endpoint.complete(SERVED, &prompts[number % prompts.len()]).await);
                    bar.inc(1);
                }
            };
            clients.spawn_on(client, runtime.handle());
        }
        let window = async {
            tokio::time::sleep(ramp).await;
            let before = delays.counted();
            exhausted.notified().await;
            delays.counted().since(&before)
        };
        let all = async {
            let mut all = Vec::with_capacity(requests);
            while let Some(results) = clients.join_next().await {
                all.extend(results.context("a client broke")?);
            }
            Ok(all)
        };
        tokio::try_join!(all, async { Ok(window.await) })
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// Gives this thread the least weight. Where it cannot be, clients take more from the router than others would, which shows as its delay.
fn step_back() {
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::setpriority_process(None, 19) {
        tracing::debug!(%error, "a client's thread keeps its priority");
    }
}

/// Folds all requests into one result.
fn report(args: &BenchRouterArgs, threads: usize, run: Run) -> Measured {
    let Run { seconds, timed, errors, delays, router, clients } = run;
    let (streams, batch) = (args.streams.get(), args.batch.get());
    let millis = |values: Vec<f64>| percentiles(&values, 1e3);
    let completion_tokens: u64 = timed.iter().map(|t| t.completion_tokens).sum();
    Measured {
        streams,
        replicas: streams.div_ceil(batch),
        batch,
        step_time_us: args.step_time,
        token_time_us: args.token_time,
        max_tokens: args.max_tokens,
        threads,
        requests: timed.len() + errors.len(),
        errors: errors.len(),
        first_error: errors.first().cloned(),
        seconds,
        requests_per_second: timed.len() as f64 / seconds,
        output_tokens_per_second: completion_tokens as f64 / seconds,
        prompt_tokens: timed.iter().map(|t| t.prompt_tokens).sum(),
        completion_tokens,
        token_delay_us: token_delay(&delays),
        router: router.filter(|_| !timed.is_empty()).map(|used| processor(used.as_secs_f64(), seconds, completion_tokens, timed.len())),
        clients_s: clients.map(|used| used.as_secs_f64()),
        ttft_ms: millis(timed.iter().map(|t| t.first).collect()),
        itl_ms: millis(timed.iter().flat_map(|t| t.gaps.iter().copied()).collect()),
        request_ms: millis(timed.iter().map(|t| t.total).collect()),
    }
}

fn token_delay(delays: &Counted) -> Option<TokenDelay> {
    let at = |share| delays.quantile(share).map(|delay| delay.as_nanos() as f64 / 1e3);
    Some(TokenDelay { p50: at(0.5)?, p90: at(0.9)?, p99: at(0.99)?, max: at(1.0)? })
}

fn processor(used: f64, seconds: f64, tokens: u64, requests: usize) -> Processor {
    let request_us = used * 1e6 / requests as f64;
    Processor {
        seconds: used,
        cores: used / seconds,
        token_us: used * 1e6 / tokens.max(1) as f64,
        request_us,
        // A thousand requests a second are a thousand times that each second.
        cores_per_1000_requests_per_second: request_us * 1e3 / 1e6,
    }
}

/// The result for a person.
fn print(measured: &Measured) -> Outcome {
    let Measured { streams, replicas, batch, threads, requests, errors, seconds, .. } = measured;
    output::line(&format!("{streams} streams on {replicas} simulated replicas of {batch}, {threads} router threads"))?;
    output::line(&format!("{requests} requests of {} tokens, {errors} errors, {seconds:.1} s", measured.max_tokens))?;
    let (tokens, rate) = (measured.output_tokens_per_second, measured.requests_per_second);
    output::line(&format!("throughput      {tokens:.1} tok/s, {rate:.2} requests/s"))?;
    if let Some(TokenDelay { p50, p90, p99, max }) = measured.token_delay_us {
        output::line(&format!(
            "router, a token p50 {p50:.0} us, p90 {p90:.0} us, p99 {p99:.0} us, at most {max:.0} us from reply to socket"
        ))?;
    }
    match &measured.router {
        Some(Processor { cores, token_us, request_us, cores_per_1000_requests_per_second: per_1000, .. }) => {
            output::line(&format!("router, cores   {cores:.2}: {token_us:.1} us a token, {request_us:.0} us a request"))?;
            output::line(&format!("                {per_1000:.2} cores for 1000 such requests/s"))?;
        }
        None => output::line("router, cores   this system does not say what threads use")?,
    }
    let rows =
        [("first token", &measured.ttft_ms, "ms"), ("between tokens", &measured.itl_ms, "ms"), ("request", &measured.request_ms, "ms")];
    print_clients(&rows, measured.first_error.as_deref())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_divided_by_tokens_and_requests() {
        let used = processor(2.0, 4.0, 100_000, 500);
        assert_eq!((used.cores, used.token_us, used.request_us), (0.5, 20.0, 4000.0));
        // 500 requests in 4 s take half a core, so a thousand in one second take eight times that.
        assert_eq!(used.cores_per_1000_requests_per_second, 4.0);
    }

    #[test]
    fn streams_begin_over_the_time_of_a_request() {
        let args = crate::args::bench_router(&[
            "--streams",
            "64",
            "--batch",
            "16",
            "--max-tokens",
            "10",
            "--step-time",
            "5000",
            "--token-time",
            "50",
        ]);
        assert_eq!(ramp(&args), Duration::from_micros(58_000));
        // A replica of 200 that has 64.
        let args =
            crate::args::bench_router(&["--streams", "64", "--batch", "200", "--max-tokens", "1", "--step-time", "0", "--token-time", "1"]);
        assert_eq!((ramp(&args), state(&args).deployments[0].replicas.len()), (Duration::from_micros(64), 1));
    }

    #[test]
    fn delays_are_in_microseconds() {
        let delays = Delays::default();
        [10, 20, 30, 4000].into_iter().for_each(|us| delays.observe(Duration::from_micros(us)));
        assert_eq!(token_delay(&delays.counted()), Some(TokenDelay { p50: 20.0, p90: 4000.0, p99: 4000.0, max: 4000.0 }));
        assert_eq!(token_delay(&Delays::default().counted()), None);
    }

    #[test]
    fn files_beyond_what_is_allowed_are_bad_input() {
        let Err(crate::exit::Failure::Input(error)) = make_room_for_files(usize::MAX / 4) else {
            panic!("as many files as there are numbers")
        };
        assert!(error.to_string().contains("ulimit"), "{error}");
    }
}
