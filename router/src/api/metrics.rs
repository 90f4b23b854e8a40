//! Prometheus metrics: vLLM's names, so that existing dashboards and pickers work, and Skein's own.

use std::sync::Mutex;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use plan::shard::BLOCK_TOKENS;

use super::parameters::Parameters;
use crate::edge::Edge;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Named {
    model_name: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Finished {
    model_name: String,
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
    decode: Histograms,
    prompt_tokens: Histograms,
    generation_tokens: Histograms,
    most_tokens: Histograms,
    choices: Histograms,
    finished: Family<Finished, Counter>,
    answered: Family<Answered, Counter>,
    disconnected: Counter<u64, AtomicU64>,
}

impl Metrics {
    /// Registers everything; loads are read from `edge` whenever metrics are asked for.
    pub(crate) fn new(edge: Edge) -> Self {
        let metrics = Self {
            registry: Mutex::default(),
            ttft: histograms(|| Histogram::new(TTFT)),
            itl: histograms(|| Histogram::new(ITL)),
            per_token: histograms(|| Histogram::new(ITL)),
            e2e: histograms(|| Histogram::new(E2E)),
            decode: histograms(|| Histogram::new(E2E)),
            prompt_tokens: histograms(|| Histogram::new(TOKENS)),
            generation_tokens: histograms(|| Histogram::new(TOKENS)),
            most_tokens: histograms(|| Histogram::new(TOKENS)),
            choices: histograms(|| Histogram::new(CHOICES)),
            finished: Family::default(),
            answered: Family::default(),
            disconnected: Counter::default(),
        };
        let mut r = Registry::default();
        let second = || Unit::Seconds;
        r.register_with_unit("vllm:time_to_first_token", "Arrival to first token", second(), metrics.ttft.clone());
        r.register_with_unit("vllm:inter_token_latency", "Time between tokens of a stream", second(), metrics.itl.clone());
        r.register_with_unit(
            "vllm:request_time_per_output_token",
            "Mean time per token of a stream after its first",
            second(),
            metrics.per_token.clone(),
        );
        r.register_with_unit("vllm:e2e_request_latency", "Arrival to last token", second(), metrics.e2e.clone());
        r.register_with_unit("vllm:request_decode_time", "First to last token", second(), metrics.decode.clone());
        r.register("vllm:request_prompt_tokens", "Prompt tokens of a request", metrics.prompt_tokens.clone());
        r.register("vllm:request_generation_tokens", "Tokens generated for a choice", metrics.generation_tokens.clone());
        r.register("vllm:request_params_max_tokens", "max_tokens of requests that set it", metrics.most_tokens.clone());
        r.register("vllm:request_params_n", "Choices asked for", metrics.choices.clone());
        r.register("vllm:request_success", "Choices that ended, by reason", metrics.finished.clone());
        r.register("skein_http_answers", "HTTP answers by route and status", metrics.answered.clone());
        r.register("skein_disconnected_requests", "Requests whose client went away before the end", metrics.disconnected.clone());
        r.register_collector(Box::new(Loads(edge)));
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

    /// A choice ended after `total`; `decoded`: time from its first to its last token, and how many there were.
    pub(super) fn finished(&self, model: &str, finished_reason: &'static str, total: Duration, decoded: Option<(Duration, u32)>) {
        let named = named(model);
        self.finished.get_or_create(&Finished { model_name: model.to_owned(), finished_reason }).inc();
        self.e2e.get_or_create(&named).observe(total.as_secs_f64());
        if let Some((time, tokens)) = decoded {
            self.decode.get_or_create(&named).observe(time.as_secs_f64());
            self.generation_tokens.get_or_create(&named).observe(f64::from(tokens));
            if tokens > 1 {
                self.per_token.get_or_create(&named).observe(time.as_secs_f64() / f64::from(tokens - 1));
            }
        }
    }
}

/// Where the times of one model's tokens go; no lookup per token.
pub(super) struct TokenTimes {
    pub(super) first: Histogram,
    pub(super) between: Histogram,
}

fn named(model: &str) -> Named {
    Named { model_name: model.to_owned() }
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
        use prometheus_client::metrics::MetricType::{Counter, Gauge};
        let loads = self.0.load();
        let models = self.0.models();
        type Read = fn(&crate::edge::DeploymentLoad) -> f64;
        let gauges: [(&str, &str, Read); 4] = [
            ("vllm:num_requests_running", "Sequences in batches", |l| l.running as f64),
            ("vllm:num_requests_waiting", "Sequences waiting", |l| l.queued as f64),
            ("vllm:kv_cache_usage_perc", "Fraction of KV blocks in use, 0 to 1", |l| f64::from(l.kv_used)),
            ("skein_tokens_per_second", "Tokens emitted per second over the last 10 s", |l| f64::from(l.tokens_per_second)),
        ];
        for (name, help, read) in gauges {
            let mut family = encoder.encode_descriptor(name, help, None, Gauge)?;
            for load in &loads {
                ConstGauge::new(read(load)).encode(family.encode_family(&named(&load.model))?)?;
            }
        }
        let counters: [(&str, &str, fn(&crate::edge::DeploymentLoad) -> u64); 7] = [
            ("vllm:prompt_tokens", "Prompt tokens processed or found in the cache", |l| l.prompt_tokens_total),
            ("vllm:generation_tokens", "Tokens emitted", |l| l.tokens_total),
            ("vllm:num_preemptions", "Sequences put back into the queue because blocks ran out", |l| l.preemptions_total),
            ("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache", |l| l.prefix_query_tokens_total),
            ("vllm:prefix_cache_hits", "Tokens found in the prefix cache", |l| l.prefix_hit_tokens_total),
            ("skein_resumed_streams", "Streams that went on after their replica was lost or drained", |l| l.resumed_total),
            ("skein_refused_requests", "Requests refused because the queue was full", |l| l.refused_total),
        ];
        for (name, help, read) in counters {
            let mut family = encoder.encode_descriptor(name, help, None, Counter)?;
            for load in &loads {
                ConstCounter::new(read(load)).encode(family.encode_family(&named(&load.model))?)?;
            }
        }
        let mut family = encoder.encode_descriptor("vllm:cache_config_info", "Shape of a replica's KV cache", None, Gauge)?;
        for model in &models {
            let blocks = model.limits.kv.groups.iter().map(|g| g.blocks).max().unwrap_or(0);
            let labels =
                [("model_name", model.name.clone()), ("block_size", BLOCK_TOKENS.to_string()), ("num_gpu_blocks", blocks.to_string())];
            ConstGauge::new(1_i64).encode(family.encode_family(&labels)?)?;
        }
        let mut family = encoder.encode_descriptor("skein_replicas", "Replicas of a model, and those ready", None, Gauge)?;
        for model in &models {
            for (state, n) in [("all", model.replicas), ("ready", model.ready_replicas)] {
                let labels = [("model_name", model.name.as_str()), ("state", state)];
                ConstGauge::new(n as i64).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}
