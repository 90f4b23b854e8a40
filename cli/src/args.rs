//! Flags and environment, parsed once into typed settings; nothing else in this crate reads either.

mod answer;
mod bench;
mod files;
mod kubernetes;
mod pool;

use std::{
    env, fmt,
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

use clap::{
    ArgAction, ArgGroup, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum,
    builder::styling::{AnsiColor, Effects, Styles},
};

use plan::{dtype::DType, planner::Vocabulary, worker::CollectiveKind};
use source::{AccessKeys, StoreOptions};

pub(crate) use self::{
    answer::{Adapted, RunArgs, SamplingArgs, ServeArgs, WorkerArgs, WorkerThreads},
    bench::BenchRouterArgs,
    files::{ConvertArgs, FloatType, InspectArgs, QuantizeArgs},
    kubernetes::{ClusterArgs, LogsArgs, StatusArgs, TopArgs},
    pool::RouterArgs,
};
use crate::{bench::test::BenchTest, local::threads};

/// Headings and literals in colour, on a terminal only.
const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().effects(Effects::BOLD))
    .usage(AnsiColor::Green.on_default().effects(Effects::BOLD))
    .literal(AnsiColor::Cyan.on_default().effects(Effects::BOLD))
    .placeholder(AnsiColor::Cyan.on_default())
    .error(AnsiColor::Red.on_default().effects(Effects::BOLD));

/// Serves language models from many processes, described by one manifest.
#[derive(Debug, Parser)]
#[command(name = "skein", version, styles = STYLES, max_term_width = 120, arg_required_else_help = true)]
pub(crate) struct Skein {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Skein {
    /// Parses the command line. A file or link called `kubectl-skein` is a plugin of kubectl, and says so in its help.
    pub(crate) fn from_command_line() -> Self {
        let plugin = env::args_os().next().is_some_and(|own| Path::new(&own).file_stem().is_some_and(|stem| stem == "kubectl-skein"));
        let command = if plugin { Self::command().bin_name("kubectl skein") } else { Self::command() };
        Self::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit())
    }
}

/// Settings of every command.
#[derive(Clone, Debug, Args)]
pub(crate) struct Global {
    /// Say more on stderr (-v: info, -vv: debug, -vvv: trace).
    #[arg(short, long, global = true, action = ArgAction::Count, help_heading = "Global options")]
    pub(crate) verbose: u8,
    /// No progress bars, no summary; errors only.
    #[arg(short, long, global = true, conflicts_with = "verbose", help_heading = "Global options")]
    pub(crate) quiet: bool,
    /// Form of log lines on stderr.
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text, help_heading = "Global options")]
    pub(crate) log_format: LogFormat,
    /// Log filter, such as `info,router=debug`; wins over -v.
    #[arg(long, global = true, env = "RUST_LOG", value_name = "FILTER", hide_env_values = true, help_heading = "Global options")]
    pub(crate) log: Option<String>,
    #[command(flatten)]
    pub(crate) cache: CacheArgs,
}

/// Where fetched model files are kept.
#[derive(Clone, Debug, Args)]
pub(crate) struct CacheArgs {
    /// Folder of fetched model files [default: $XDG_CACHE_HOME/skein or ~/.cache/skein].
    #[arg(long = "cache", global = true, env = "SKEIN_CACHE", value_name = "DIR", hide_env_values = true, help_heading = "Global options")]
    cache: Option<PathBuf>,
    #[arg(long, global = true, env = "XDG_CACHE_HOME", hide = true)]
    xdg_cache_home: Option<PathBuf>,
    #[arg(long, global = true, env = "HOME", hide = true)]
    home: Option<PathBuf>,
    /// Token for hf:// sources.
    #[arg(long, global = true, env = "HF_TOKEN", hide = true, hide_env_values = true)]
    pub(crate) hf_token: Option<String>,
    /// Value of the header Authorization for sources; how a runner tells its workers.
    #[arg(long, global = true, env = "SKEIN_AUTHORIZATION", hide = true, hide_env_values = true)]
    pub(crate) authorization: Option<String>,
    /// Base of hf:// sources.
    #[arg(long, global = true, env = "HF_ENDPOINT", hide = true)]
    pub(crate) hf_endpoint: Option<String>,
    #[command(flatten)]
    pub(crate) s3: StoreArgs,
}

impl CacheArgs {
    /// The cache folder: `--cache` or `$SKEIN_CACHE`, else `$XDG_CACHE_HOME/skein`, else `~/.cache/skein`; `None` when all are unset.
    pub(crate) fn folder(&self) -> Option<PathBuf> {
        let set = |path: &&PathBuf| !path.as_os_str().is_empty();
        let xdg = self.xdg_cache_home.as_ref().filter(set).map(|base| base.join("skein"));
        let home = self.home.as_ref().filter(set).map(|base| base.join(".cache/skein"));
        self.cache.clone().filter(|path| set(&path)).or(xdg).or(home)
    }
}

/// How s3:// sources are reached, as other tools read it from the environment.
#[derive(Clone, Default, Args)]
pub(crate) struct StoreArgs {
    #[arg(long, global = true, env = "AWS_ENDPOINT_URL", hide = true)]
    aws_endpoint_url: Option<String>,
    #[arg(long, global = true, env = "AWS_REGION", hide = true)]
    aws_region: Option<String>,
    #[arg(long, global = true, env = "AWS_DEFAULT_REGION", hide = true)]
    aws_default_region: Option<String>,
    #[arg(long, global = true, env = "AWS_ACCESS_KEY_ID", hide = true, hide_env_values = true)]
    aws_access_key_id: Option<String>,
    #[arg(long, global = true, env = "AWS_SECRET_ACCESS_KEY", hide = true, hide_env_values = true)]
    aws_secret_access_key: Option<String>,
    #[arg(long, global = true, env = "AWS_SESSION_TOKEN", hide = true, hide_env_values = true)]
    aws_session_token: Option<String>,
    /// Keys of one source, as JSON; how a runner tells its workers.
    #[arg(long, global = true, env = "SKEIN_ACCESS_KEYS", hide = true, hide_env_values = true)]
    pub(crate) access_keys: Option<String>,
}

impl StoreArgs {
    /// The options of a source; keys where both parts of them are there.
    pub(crate) fn options(&self) -> StoreOptions {
        let set = |value: &Option<String>| value.clone().filter(|value| !value.is_empty());
        let pair = set(&self.aws_access_key_id).zip(set(&self.aws_secret_access_key));
        let keys = pair.map(|(id, secret)| AccessKeys { id, secret, session: set(&self.aws_session_token), region: None, endpoint: None });
        StoreOptions { endpoint: set(&self.aws_endpoint_url), region: set(&self.aws_region).or(set(&self.aws_default_region)), keys }
    }
}

impl fmt::Debug for StoreArgs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.options().fmt(f)
    }
}

/// Form of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Answer a prompt, or chat, in this terminal.
    Run(RunArgs),
    /// Serve models over HTTP (OpenAI-compatible) and gRPC.
    Serve(ServeArgs),
    /// Show how a manifest's model is laid out over workers, and whether it fits.
    Plan(PlanArgs),
    /// Show what a model is, from its headers alone.
    Inspect(InspectArgs),
    /// Write a model into other files: a GGUF file, or a folder of safetensors.
    Convert(ConvertArgs),
    /// Write a GGUF file with its matrices in another type, and say what that cost.
    Quantize(QuantizeArgs),
    /// Compute logits or perplexity.
    #[command(subcommand)]
    Eval(EvalCommand),
    /// Measure an engine, a running endpoint or the router.
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Show the deployments of a cluster's namespace: replicas, stages and ranks, and what is wrong with them.
    Status(StatusArgs),
    /// Show what the replicas of a cluster's namespace have to do, as its routers say it.
    Top(TopArgs),
    /// Show the logs of a deployment's workers on a cluster, or of the routers.
    Logs(LogsArgs),
    /// Run one rank of one stage; started by the other commands.
    #[command(hide = true)]
    Worker(WorkerArgs),
    /// Run one router of a pool, told its fleet by a control plane; started by the operator.
    #[command(hide = true)]
    Router(RouterArgs),
}

#[derive(Debug, Subcommand)]
pub(crate) enum EvalCommand {
    /// Logits after a list of ids, the loss of each id, and greedy continuation.
    Logits(LogitsArgs),
    /// Perplexity of a text by llama.cpp's convention.
    Ppl(PplArgs),
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Prefill and decode speed of an engine.
    Engine(BenchEngineArgs),
    /// Latency and throughput of a running endpoint.
    Load(BenchLoadArgs),
    /// What the router takes for a token and a request, in front of simulated replicas.
    Router(BenchRouterArgs),
}

/// How a model is placed onto threads and processes.
#[derive(Clone, Debug, Args)]
pub(crate) struct Placement {
    /// Pipeline stages [default: 1, or the manifest's]; more than one worker in all means real worker processes.
    #[arg(long, value_name = "N", help_heading = "Placement")]
    pub(crate) pp: Option<NonZeroUsize>,
    /// Tensor-parallel ranks of each stage [default: 1, or the manifest's].
    #[arg(long, value_name = "N", help_heading = "Placement")]
    pub(crate) tp: Option<NonZeroUsize>,
    /// Compute threads in all [default: the cores this process may use].
    #[arg(long, value_name = "N", help_heading = "Placement")]
    pub(crate) threads: Option<NonZeroUsize>,
    /// Instructions of the kernels; they change speed, never results.
    #[arg(long, value_enum, default_value_t = IsaChoice::Auto, help_heading = "Placement")]
    pub(crate) isa: IsaChoice,
    /// Type of KV cache entries [default: f32 for float weights, else f16].
    #[arg(long, value_enum, help_heading = "Placement")]
    pub(crate) kv: Option<KvChoice>,
    /// Convert weights that are stored as floats as they are loaded [default: none, or the manifest's].
    #[arg(long, value_enum, value_name = "BITS|TYPE", help_heading = "Placement")]
    load_in: Option<LoadIn>,
    /// Most tokens in one step [default: 512, or the manifest's].
    #[arg(long, value_name = "TOKENS", help_heading = "Placement")]
    pub(crate) chunk: Option<NonZeroUsize>,
    /// Stages that multiply the vocabulary: last, spread (the first too), or auto (the first too where it holds the table and one greedy
    /// stream is faster by it).
    #[arg(long, value_enum, default_value_t = VocabularyChoice::Last, help_heading = "Placement")]
    pub(crate) vocabulary: VocabularyChoice,
    /// Find the likeliest tokens by a copy of the vocabulary in 4 bits, and multiply those alone exactly [default: the manifest's]: greedy
    /// draws, and those of a top-k of at most 40, are faster, and, rarely, other ones.
    #[arg(long, help_heading = "Placement")]
    pub(crate) screening: bool,
    /// How the ranks of a stage talk.
    #[arg(long, value_enum, default_value_t = CollectiveChoice::Shm, help_heading = "Placement")]
    pub(crate) collective: CollectiveChoice,
}

/// Most tokens in a step when nothing says otherwise.
const CHUNK: usize = 512;

impl Placement {
    /// Pipeline stages and tensor-parallel ranks of each, where no manifest says.
    pub(crate) fn parallelism(&self) -> (usize, usize) {
        (self.pp.map_or(1, NonZeroUsize::get), self.tp.map_or(1, NonZeroUsize::get))
    }

    /// Type that floats are converted to as they are loaded.
    pub(crate) fn load_in(&self) -> Option<DType> {
        self.load_in.map(LoadIn::dtype)
    }

    /// Compute threads of all workers together.
    pub(crate) fn threads(&self) -> usize {
        self.threads.map_or_else(threads::available, NonZeroUsize::get)
    }

    /// Most tokens in a step, where no manifest says.
    pub(crate) fn chunk(&self) -> usize {
        self.chunk.map_or(CHUNK, NonZeroUsize::get)
    }
}

/// Type that weights are converted to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LoadIn {
    #[value(name = "8bit", aliases = ["q8_0", "Q8_0"])]
    Q8,
    #[value(name = "4bit", aliases = ["q4_k", "Q4_K"])]
    Q4K,
    #[value(name = "q6_k")]
    Q6K,
    #[value(name = "q5_k")]
    Q5K,
    #[value(name = "q5_1")]
    Q51,
    #[value(name = "q5_0")]
    Q50,
    #[value(name = "q4_1")]
    Q41,
    #[value(name = "q4_0")]
    Q40,
    #[value(name = "iq4_nl")]
    Iq4Nl,
    #[value(name = "q3_k")]
    Q3K,
    #[value(name = "q2_k")]
    Q2K,
}

impl LoadIn {
    /// The type.
    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::Q8 => DType::Q8_0,
            Self::Q4K => DType::Q4_K,
            Self::Q6K => DType::Q6_K,
            Self::Q5K => DType::Q5_K,
            Self::Q51 => DType::Q5_1,
            Self::Q50 => DType::Q5_0,
            Self::Q41 => DType::Q4_1,
            Self::Q40 => DType::Q4_0,
            Self::Iq4Nl => DType::IQ4_NL,
            Self::Q3K => DType::Q3_K,
            Self::Q2K => DType::Q2_K,
        }
    }
}

/// Instructions of the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum IsaChoice {
    Auto,
    Scalar,
    Avx2,
    #[value(name = "avxvnni")]
    AvxVnni,
    Avx512,
    Amx,
}

impl IsaChoice {
    /// The name `kernels` knows it by.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avxvnni",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
        }
    }
}

/// Type of KV cache entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum KvChoice {
    F32,
    F16,
    /// 8 bits and shared scales: half of f16; results change slightly.
    Q8,
}

/// Stages that multiply the vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum VocabularyChoice {
    Last,
    Spread,
    Auto,
}

impl VocabularyChoice {
    /// As plans name it.
    pub(crate) fn planned(self) -> Vocabulary {
        match self {
            Self::Auto => Vocabulary::Auto,
            Self::Last => Vocabulary::Last,
            Self::Spread => Vocabulary::Spread,
        }
    }
}

/// Transport of a stage's collective.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CollectiveChoice {
    Shm,
    Unix,
    Tcp,
}

impl From<CollectiveChoice> for CollectiveKind {
    fn from(choice: CollectiveChoice) -> Self {
        match choice {
            CollectiveChoice::Shm => Self::SharedMemory,
            CollectiveChoice::Unix => Self::Unix,
            CollectiveChoice::Tcp => Self::Tcp,
        }
    }
}

/// A model, or a manifest that names one.
#[derive(Clone, Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Target {
    /// Folder, file or source (file:, hf://, s3://, gs://, oci://, http://, https://) of a model.
    #[arg(value_name = "MODEL")]
    pub(crate) model: Option<String>,
    /// Manifest with a ModelDeployment; `-` reads standard input.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
}

#[derive(Clone, Debug, Args)]
#[command(group(ArgGroup::new("planned").required(true).args(["model", "file", "deployment"])))]
pub(crate) struct PlanArgs {
    /// Folder, file or source (file:, hf://, s3://, gs://, oci://, http://, https://) of a model.
    #[arg(value_name = "MODEL")]
    pub(crate) model: Option<String>,
    /// Manifest with a ModelDeployment; `-` reads standard input.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// ModelDeployment of a cluster, whose plan is in its status.
    #[arg(long, value_name = "NAME")]
    pub(crate) deployment: Option<String>,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// One JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
    /// Small model of the same tokenizer that guesses tokens, in a worker of its own [default: the manifest's].
    #[arg(long, value_name = "SOURCE", conflicts_with = "deployment", help_heading = "Placement")]
    pub(crate) draft_model: Option<String>,
    #[command(flatten)]
    pub(crate) placement: Placement,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct LogitsArgs {
    /// Folder, file or source of a model.
    #[arg(value_name = "MODEL")]
    pub(crate) model: String,
    /// Token ids, separated by commas.
    #[arg(long, value_name = "ID,ID,…", value_delimiter = ',', required = true)]
    pub(crate) input_ids: Vec<u32>,
    /// Continue greedily by N tokens, whatever tokens come.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) greedy: u32,
    /// Folder, file or source of a low-rank adapter (LoRA) that is put on the model.
    #[arg(long, value_name = "DIR")]
    pub(crate) adapter: Option<String>,
    /// One JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) placement: Placement,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct PplArgs {
    /// Folder, file or source of a model.
    #[arg(value_name = "MODEL")]
    pub(crate) model: String,
    /// Text to score; `-` reads standard input.
    #[arg(long, value_name = "FILE")]
    pub(crate) text: PathBuf,
    /// Tokens of a chunk; the second half of each is scored.
    #[arg(long, default_value_t = 512, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(4..))]
    pub(crate) context: u32,
    /// Score the first N chunks alone.
    #[arg(long, value_name = "N")]
    pub(crate) chunks: Option<NonZeroUsize>,
    /// One JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) placement: Placement,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct BenchEngineArgs {
    /// Folder, file or source of a model.
    #[arg(value_name = "MODEL")]
    pub(crate) model: String,
    /// Tests: ppN (prefill), tgN (decode), tgN@dM (decode after M tokens), batchN (decode of N sequences).
    #[arg(long, value_delimiter = ',', default_value = "pp512,tg128", value_name = "TEST,…")]
    pub(crate) tests: Vec<BenchTest>,
    /// Timed repetitions of each test, after one that is not counted.
    #[arg(long, default_value = "5", value_name = "N")]
    pub(crate) repetitions: NonZeroUsize,
    /// Time loading too: weights from the page cache to the first token, beside reading them alone.
    #[arg(long)]
    pub(crate) load: bool,
    /// Show where the engine's time went.
    #[arg(long)]
    pub(crate) profile: bool,
    /// One JSON object a test on stdout.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) placement: Placement,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct BenchLoadArgs {
    /// Base of an OpenAI-compatible endpoint, such as http://127.0.0.1:8080.
    #[arg(long, required_unless_present = "deployment")]
    pub(crate) url: Option<String>,
    /// ModelDeployment of a cluster, reached at its service through kubectl port-forward.
    #[arg(long, value_name = "NAME", conflicts_with = "url")]
    pub(crate) deployment: Option<String>,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// Model name [default: the deployment's, or the first of /v1/models].
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// Requests in flight at once.
    #[arg(long, default_value = "8", value_name = "N")]
    pub(crate) concurrency: NonZeroUsize,
    /// Requests in all.
    #[arg(long, default_value = "64", value_name = "N")]
    pub(crate) requests: NonZeroUsize,
    /// File with one prompt a line [default: built-in prompts of different lengths].
    #[arg(long, value_name = "FILE")]
    pub(crate) prompts: Option<PathBuf>,
    /// Tokens to generate for each request, end tokens ignored.
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub(crate) max_tokens: u32,
    /// Temperature of each request.
    #[arg(long, default_value_t = 0.0, value_parser = at_least_zero)]
    pub(crate) temperature: f32,
    /// Seconds that one request may take.
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    pub(crate) timeout: u64,
    /// API key.
    #[arg(long, env = "OPENAI_API_KEY", hide_env_values = true)]
    pub(crate) api_key: Option<String>,
    /// One JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Parses a finite number that is not negative.
fn at_least_zero(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if value.is_finite() && value >= 0.0 => Ok(value),
        _ => Err("expected a number of at least 0".into()),
    }
}

/// What `skein bench router` is told.
#[cfg(test)]
pub(crate) fn bench_router(flags: &[&str]) -> BenchRouterArgs {
    let all = ["skein", "bench", "router", "m"].into_iter().chain(flags.iter().copied());
    match Skein::try_parse_from(all).map(|skein| skein.command) {
        Ok(Command::Bench(BenchCommand::Router(args))) => args,
        other => panic!("{flags:?}: {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn definitions_are_consistent() {
        Skein::command().debug_assert();
    }

    #[test]
    fn keys_of_a_store_come_in_pairs() {
        let text = |text: &str| Some(text.to_owned());
        let half = StoreArgs {
            aws_access_key_id: text("a"),
            aws_secret_access_key: text(""),
            aws_default_region: text("r"),
            ..StoreArgs::default()
        };
        assert!(half.options().keys.is_none() && half.options().region == text("r"));
        let whole = StoreArgs { aws_secret_access_key: text("hidden"), aws_session_token: text("s"), aws_region: text("own"), ..half };
        let keys = whole.options().keys.expect("keys");
        assert_eq!((&*keys.id, &*keys.secret, keys.session, whole.options().region), ("a", "hidden", text("s"), text("own")));
        assert!(!format!("{whole:?}").contains("hidden"), "{whole:?}");
    }

    #[test]
    fn cache_folder_falls_back_in_order() {
        let cache = |cache: Option<&str>, xdg: Option<&str>, home: Option<&str>| {
            CacheArgs {
                cache: cache.map(Into::into),
                xdg_cache_home: xdg.map(Into::into),
                home: home.map(Into::into),
                hf_token: None,
                authorization: None,
                hf_endpoint: None,
                s3: StoreArgs::default(),
            }
            .folder()
        };
        assert_eq!(cache(Some("/a"), Some("/b"), Some("/c")), Some("/a".into()));
        assert_eq!(cache(Some(""), Some("/b"), Some("/c")), Some("/b/skein".into()));
        assert_eq!(cache(None, None, Some("/c")), Some("/c/.cache/skein".into()));
        assert_eq!(cache(None, Some(""), None), None);
    }
}
