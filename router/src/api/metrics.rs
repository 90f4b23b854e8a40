//! Prometheus metrics: vLLM's names, so that existing dashboards and pickers work, and Skein's own.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use plan::shard::BLOCK_TOKENS;
use tokio::time::Instant;

use super::parameters::Parameters;
use crate::delays::Delays;
use crate::edge::{DeploymentLoad, Edge, ReplicaLoad};

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Named {
    model_name: String,
    /// Index of an engine behind one model name in vLLM; the router shows its replicas as one.
    engine: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Finished {
    model_name: String,
    engine: &'static str,
    finished_reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Answered {
    route: &'static str,
    status: u16,
}

type Histograms = Family<Named, Histogram, fn() -> Histogram>;

const TTFT: [f64; 22] =
    [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0];
const E2E: [f64; 21] =
    [0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0];
const ITL: [f64; 18] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0];
const TOKENS: [f64; 17] =
    [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 20_000.0, 50_000.0, 100_000.0, 200_000.0];
const CHOICES: [f64; 6] = [1.0, 2.0, 5.0, 10.0, 20.0, 128.0];

/// From a thread's turn to what nobody should see.
const DELAYS: [f64; 19] = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0];

/// The value of `engine` labels.
const ENGINE: &str = "0";

fn histograms(make: fn() -> Histogram) -> Histograms {
    Family::new_with_constructor(make)
}

/// All metrics of the API.
pub(crate) struct Metrics {
    registry: Mutex<Registry>,
    ttft: Histograms,
    itl: Histograms,
    per_token: Histograms,
    e2e: Histograms,
    queue: Histograms,
    prefill: Histograms,
    decode: Histograms,
    inference: Histograms,
    prompt_tokens: Histograms,
    generation_tokens: Histograms,
    longest: Histograms,
    most_tokens: Histograms,
    choices: Histograms,
    finished: Family<Finished, Counter>,
    answered: Family<Answered, Counter>,
    disconnected: Counter<u64, AtomicU64>,
}

impl Metrics {
    /// Registers everything; loads are read from `edge` whenever metrics are asked for.
    pub(crate) fn new(edge: Edge, delays: Arc<Delays>) -> Self {
        let metrics = Self {
            registry: Mutex::default(),
            ttft: histograms(|| Histogram::new(TTFT)),
            itl: histograms(|| Histogram::new(ITL)),
            per_token: histograms(|| Histogram::new(ITL)),
            e2e: histograms(|| Histogram::new(E2E)),
            queue: histograms(|| Histogram::new(E2E)),
            prefill: histograms(|| Histogram::new(E2E)),
            decode: histograms(|| Histogram::new(E2E)),
            inference: histograms(|| Histogram::new(E2E)),
            prompt_tokens: histograms(|| Histogram::new(TOKENS)),
            generation_tokens: histograms(|| Histogram::new(TOKENS)),
            longest: histograms(|| Histogram::new(TOKENS)),
            most_tokens: histograms(|| Histogram::new(TOKENS)),
            choices: histograms(|| Histogram::new(CHOICES)),
            finished: Family::default(),
            answered: Family::default(),
            disconnected: Counter::default(),
        };
        let mut r = Registry::default();
        let times = [
            ("vllm:time_to_first_token", "Arrival to first token", &metrics.ttft),
            ("vllm:inter_token_latency", "Time between tokens of a stream", &metrics.itl),
            ("vllm:time_per_output_token", "Older name of vllm:inter_token_latency_seconds", &metrics.itl),
            ("vllm:request_time_per_output_token", "Mean time per token of a stream after its first", &metrics.per_token),
            ("vllm:e2e_request_latency", "Arrival to last token", &metrics.e2e),
            ("vllm:request_queue_time", "Arrival to the first batch", &metrics.queue),
            ("vllm:request_prefill_time", "First batch to first token", &metrics.prefill),
            ("vllm:request_decode_time", "First to last token", &metrics.decode),
            ("vllm:request_inference_time", "First batch to last token", &metrics.inference),
        ];
        for (name, help, family) in times {
            r.register_with_unit(name, help, Unit::Seconds, family.clone());
        }
        let counts = [
            ("vllm:request_prompt_tokens", "Prompt tokens of a request", &metrics.prompt_tokens),
            ("vllm:request_generation_tokens", "Tokens generated for a choice", &metrics.generation_tokens),
            ("vllm:request_max_num_generation_tokens", "Tokens of a request's longest choice", &metrics.longest),
            ("vllm:request_params_max_tokens", "max_tokens of requests that set it", &metrics.most_tokens),
            ("vllm:request_params_n", "Choices asked for", &metrics.choices),
        ];
        for (name, help, family) in counts {
            r.register(name, help, family.clone());
        }
        r.register("vllm:request_success", "Choices that ended, by reason", metrics.finished.clone());
        r.register("skein_http_answers", "HTTP answers by route and status", metrics.answered.clone());
        r.register("skein_disconnected_requests", "Requests whose client went away before the end", metrics.disconnected.clone());
        r.register_collector(Box::new(Loads(edge)));
        r.register_collector(Box::new(TokenDelays(delays)));
        *metrics.registry.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = r;
        metrics
    }

    /// The text exposition.
    pub(crate) fn encode(&self) -> Result<String, std::fmt::Error> {
        let mut out = String::new();
        text::encode(&mut out, &self.registry.lock().unwrap_or_else(std::sync::PoisonError::into_inner))?;
        Ok(out)
    }

    pub(super) fn submitted(&self, model: &str, parameters: &Parameters, prompt_tokens: u64) {
        let named = named(model);
        self.prompt_tokens.get_or_create(&named).observe(prompt_tokens as f64);
        self.choices.get_or_create(&named).observe(parameters.n as f64);
        if let Some(most) = parameters.max_tokens {
            self.most_tokens.get_or_create(&named).observe(f64::from(most));
        }
    }

    /// A request to an encoder, with texts of so many tokens in all.
    pub(super) fn submitted_texts(&self, model: &str, tokens: u64) {
        self.prompt_tokens.get_or_create(&named(model)).observe(tokens as f64);
    }

    pub(super) fn answered(&self, route: &'static str, status: u16) {
        self.answered.get_or_create(&Answered { route, status }).inc();
    }

    pub(super) fn disconnected(&self) {
        self.disconnected.inc();
    }

    /// Histograms of one model's tokens.
    pub(super) fn tokens(&self, model: &str) -> TokenTimes {
        let named = named(model);
        TokenTimes { first: self.ttft.get_or_create(&named).clone(), between: self.itl.get_or_create(&named).clone() }
    }

    /// A choice ended now.
    pub(super) fn finished(&self, model: &str, finished_reason: &'static str, times: &Timeline) {
        let Timeline { arrived, started, first, last, tokens } = *times;
        let named = named(model);
        self.finished.get_or_create(&Finished { model_name: model.to_owned(), engine: ENGINE, finished_reason }).inc();
        let observe = |family: &Histograms, seconds: f64| family.get_or_create(&named).observe(seconds);
        observe(&self.e2e, arrived.elapsed().as_secs_f64());
        let Some(started) = started else { return };
        observe(&self.queue, (started - arrived).as_secs_f64());
        let (Some(first), Some(last)) = (first, last) else { return };
        observe(&self.prefill, (first - started).as_secs_f64());
        observe(&self.inference, (last - started).as_secs_f64());
        let decoding = (last - first).as_secs_f64();
        observe(&self.decode, decoding);
        observe(&self.generation_tokens, f64::from(tokens));
        if tokens > 1 {
            observe(&self.per_token, decoding / f64::from(tokens - 1));
        }
    }

    /// Every choice of a request ended, the longest with this many tokens.
    pub(super) fn longest(&self, model: &str, tokens: u32) {
        self.longest.get_or_create(&named(model)).observe(f64::from(tokens));
    }
}

/// When things happened to a choice.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timeline {
    pub(super) arrived: Instant,
    /// It entered a batch.
    pub(super) started: Option<Instant>,
    pub(super) first: Option<Instant>,
    pub(super) last: Option<Instant>,
    /// Tokens emitted.
    pub(super) tokens: u32,
}

impl Timeline {
    /// Of a choice to which nothing has happened yet.
    pub(super) fn new(arrived: Instant) -> Self {
        Self { arrived, started: None, first: None, last: None, tokens: 0 }
    }
}

/// Where the times of one model's tokens go; no lookup per token.
pub(super) struct TokenTimes {
    pub(super) first: Histogram,
    pub(super) between: Histogram,
}

fn named(model: &str) -> Named {
    Named { model_name: model.to_owned(), engine: ENGINE }
}

/// Gauges and counters that the scheduler keeps.
struct Loads(Edge);

impl std::fmt::Debug for Loads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Loads")
    }
}

impl Collector for Loads {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        use MetricType::{Counter, Gauge, Histogram};
        let loads = self.0.load();
        let models = self.0.models();
        type Read = fn(&DeploymentLoad) -> f64;
        let gauges: [(&str, &str, Read); 5] = [
            ("vllm:num_requests_running", "Sequences in batches", |l| l.running as f64),
            ("vllm:num_requests_waiting", "Sequences waiting", |l| l.queued as f64),
            ("vllm:kv_cache_usage_perc", "Fraction of KV blocks in use, 0 to 1", |l| f64::from(l.kv_used)),
            ("vllm:gpu_cache_usage_perc", "Older name of vllm:kv_cache_usage_perc", |l| f64::from(l.kv_used)),
            ("skein_tokens_per_second", "Tokens emitted per second over the last 10 s", |l| f64::from(l.tokens_per_second)),
        ];
        for (name, help, read) in gauges {
            let mut family = encoder.encode_descriptor(name, help, None, Gauge)?;
            for load in &loads {
                ConstGauge::new(read(load)).encode(family.encode_family(&named(&load.model))?)?;
            }
        }
        type Count = fn(&DeploymentLoad) -> u64;
        let counters: [(&str, &str, Count); 13] = [
            ("vllm:prompt_tokens", "Prompt tokens processed or found in the cache", |l| l.prompt_tokens_total),
            ("vllm:generation_tokens", "Tokens emitted", |l| l.tokens_total),
            ("vllm:num_preemptions", "Sequences put back into the queue because blocks ran out", |l| l.preemptions_total),
            ("vllm:spec_decode_num_drafts", "Times that drafts of a sequence were verified", |l| l.drafts_total),
            ("vllm:spec_decode_num_draft_tokens", "Tokens in drafts", |l| l.draft_tokens_total),
            ("vllm:spec_decode_num_accepted_tokens", "Drafted tokens that were what was drawn", |l| l.accepted_tokens_total),
            ("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache", |l| l.prefix_query_tokens_total),
            ("vllm:prefix_cache_hits", "Tokens found in the prefix cache", |l| l.prefix_hit_tokens_total),
            ("vllm:gpu_prefix_cache_queries", "Older name of vllm:prefix_cache_queries", |l| l.prefix_query_tokens_total),
            ("vllm:gpu_prefix_cache_hits", "Older name of vllm:prefix_cache_hits", |l| l.prefix_hit_tokens_total),
            ("skein_resumed_streams", "Streams that went on after their replica was lost or drained", |l| l.resumed_total),
            ("skein_draft_failures", "Times that a draft model was lost; streams went on without it", |l| l.draft_failures_total),
            ("skein_refused_requests", "Requests refused because the queue was full", |l| l.refused_total),
        ];
        for (name, help, read) in counters {
            let mut family = encoder.encode_descriptor(name, help, None, Counter)?;
            for load in &loads {
                ConstCounter::new(read(load)).encode(family.encode_family(&named(&load.model))?)?;
            }
        }
        let mut family = encoder.encode_descriptor("vllm:iteration_tokens_total", "Tokens in a step", None, Histogram)?;
        for load in &loads {
            let sizes = &load.step_sizes;
            let buckets: Vec<(f64, u64)> = sizes.buckets().collect();
            family.encode_family(&named(&load.model))?.encode_histogram::<Named>(sizes.tokens as f64, sizes.steps(), &buckets, None)?;
        }
        let mut family = encoder.encode_descriptor("vllm:cache_config_info", "Shape of a replica's KV cache", None, Gauge)?;
        for model in &models {
            let blocks = model.limits.kv.groups.iter().map(|g| g.blocks).max().unwrap_or(0);
            let labels = [
                ("model_name", model.name.clone()),
                ("engine", ENGINE.to_owned()),
                ("block_size", BLOCK_TOKENS.to_string()),
                ("num_gpu_blocks", blocks.to_string()),
            ];
            ConstGauge::new(1_i64).encode(family.encode_family(&labels)?)?;
        }
        let mut family = encoder.encode_descriptor("skein_replicas", "Replicas of a model, and those ready", None, Gauge)?;
        for model in &models {
            for (state, n) in [("all", model.replicas), ("ready", model.ready_replicas)] {
                let labels = [("model_name", model.name.as_str()), ("state", state)];
                ConstGauge::new(n as i64).encode(family.encode_family(&labels)?)?;
            }
        }
        encode_replicas(&mut encoder, &loads)
    }
}

/// The router's own part of a token's time.
#[derive(Debug)]
struct TokenDelays(Arc<Delays>);

impl Collector for TokenDelays {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let help = "From the arrival of a worker's reply to the write of its token to the client's socket";
        let mut family = encoder.encode_descriptor("skein_token_delay", help, Some(&Unit::Seconds), MetricType::Histogram)?;
        let counted = self.0.counted();
        let buckets: Vec<(f64, u64)> = counted.buckets(&DELAYS).collect();
        family.encode_histogram::<NoLabelSet>(counted.seconds(), counted.count(), &buckets, None)
    }
}

/// Replica by replica. What a replica's owner knows is said by that router alone, so that sums over routers are right; what clients see is
/// said by the router whose clients they are.
fn encode_replicas(encoder: &mut DescriptorEncoder<'_>, loads: &[DeploymentLoad]) -> Result<(), std::fmt::Error> {
    type Read = fn(&ReplicaLoad) -> Option<f64>;
    let gauges: [(&str, &str, Read); 7] = [
        ("skein_replica_ready", "Whether a token came out of a replica's last stage", |r| Some(f64::from(u8::from(r.ready)))),
        ("skein_replica_driven", "Whether this router drives a replica", |r| Some(f64::from(u8::from(r.drives)))),
        ("skein_replica_running", "Sequences in a replica's batches", |r| r.drives.then_some(r.running as f64)),
        ("skein_replica_waiting", "Sequences that a replica's owner has queued", |r| r.drives.then_some(r.queued as f64)),
        ("skein_replica_kv_used", "Fraction of a replica's KV blocks in use, 0 to 1", |r| r.drives.then_some(f64::from(r.kv_used))),
        ("skein_replica_tokens_per_second", "Tokens per second of this router's clients, over the last 10 s", |r| {
            Some(f64::from(r.tokens_per_second))
        }),
        (
            "skein_replica_ttft_p90_seconds",
            "90th percentile of the time to the first token of this router's clients, over the last minute",
            |r| r.ttft_p90_seconds.map(f64::from),
        ),
    ];
    for (name, help, read) in gauges {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (load, replica) in loads.iter().flat_map(|load| load.replicas.iter().map(move |replica| (load, replica))) {
            if let Some(value) = read(replica) {
                let labels = [("model_name", load.model.as_str()), ("replica", replica.name.as_str())];
                ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
            }
        }
    }
    Ok(())
}
