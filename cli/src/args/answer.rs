//! Flags of the commands that answer: `run`, `serve`, and the `worker` behind them.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    num::NonZeroUsize,
    path::PathBuf,
    str::FromStr,
};

use clap::{ArgAction, Args};
use plan::manifest::AdapterSpec;

use super::{IsaChoice, Placement, Target};
use crate::exit::{Outcome, bad_input};

/// Flags of `skein run`.
#[derive(Clone, Debug, Args)]
#[command(
    override_usage = "skein run [OPTIONS] <MODEL> [PROMPT]\n       skein run [OPTIONS] --file <FILE> [PROMPT]",
    after_help = "With a PROMPT, or text on standard input, there is one answer. Without, and on a terminal, you chat.\n\n\
                  A model that comes with a chat template is asked as a chat; any other one continues the text it is given.\n\
                  --chat and --raw choose. A template from the manifest serves for chats, but does not make a PROMPT one."
)]
pub(crate) struct RunArgs {
    /// Folder, file or source (file:, hf://, s3://, gs://, oci://, http://, https://) of a model; with --file, the prompt.
    #[arg(value_name = "MODEL")]
    first: Option<String>,
    /// What to answer or continue.
    #[arg(value_name = "PROMPT")]
    second: Option<String>,
    /// Manifest with a ModelDeployment; `-` reads standard input.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Which deployment of a manifest with several.
    #[arg(long, value_name = "NAME", requires = "file")]
    pub(crate) deployment: Option<String>,
    /// Low-rank adapter (LoRA) with which the model answers: its name and its folder, file or source; with --file, the name of one of the manifest's.
    #[arg(long, value_name = "NAME=SOURCE")]
    adapter: Option<String>,
    /// Ask it as a chat.
    #[arg(long, conflicts_with = "raw")]
    pub(crate) chat: bool,
    /// Continue the text, without a chat template.
    #[arg(long)]
    pub(crate) raw: bool,
    /// Instructions before the conversation.
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    pub(crate) system: Option<String>,
    /// One JSON object on stdout, at the end.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    #[command(flatten)]
    pub(crate) generator: GeneratorArgs,
    #[command(flatten)]
    pub(crate) placement: Placement,
}

impl RunArgs {
    /// The model, and the prompt if one was given.
    pub(crate) fn target(&self) -> Outcome<(Target, Option<String>)> {
        match (&self.file, &self.first, &self.second) {
            (Some(file), prompt, None) => Ok((Target { model: None, file: Some(file.clone()) }, prompt.clone())),
            (Some(_), Some(first), Some(_)) => Err(bad_input!("MODEL {first} was given beside --file, expected one of them")),
            (None, Some(model), prompt) => Ok((Target { model: Some(model.clone()), file: None }, prompt.clone())),
            (_, None, _) => Err(bad_input!("no model was given, expected a MODEL or a manifest with --file")),
        }
    }
}

/// The adapter with which a model answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Adapted {
    /// One that is put on a model given without a manifest.
    With(AdapterSpec),
    /// One of a manifest's, by name.
    Named(String),
}

impl RunArgs {
    /// The adapter that was asked for.
    pub(crate) fn adapted(&self) -> Outcome<Option<Adapted>> {
        let Some(given) = &self.adapter else { return Ok(None) };
        match (&self.file, adapter(given)) {
            (None, Ok(spec)) => Ok(Some(Adapted::With(spec))),
            (None, Err(expected)) => Err(bad_input!("--adapter {given}: {expected}")),
            (Some(_), Err(_)) => Ok(Some(Adapted::Named(given.clone()))),
            (Some(_), Ok(_)) => {
                Err(bad_input!("--adapter {given}: with --file, expected the name of one of the manifest's adapters alone"))
            }
        }
    }
}

/// `NAME=SOURCE`.
fn adapter(text: &str) -> Result<AdapterSpec, String> {
    match text.split_once('=') {
        Some((name, uri)) if !name.is_empty() && !uri.is_empty() => {
            Ok(AdapterSpec { name: name.to_owned(), uri: uri.to_owned(), digest: None })
        }
        _ => Err("expected NAME=SOURCE".to_owned()),
    }
}

/// What generates tokens, beside how it is placed.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Placement")]
pub(crate) struct GeneratorArgs {
    /// Longest sequence in tokens [default: the manifest's, else 8192 or what the model has].
    #[arg(long, value_name = "TOKENS")]
    context: Option<NonZeroUsize>,
    /// Most tokens guessed in a step from where the last ones stood before, 0 to 16; they change speed, never results [default: 0, or the manifest's].
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(..=16))]
    pub(crate) prompt_lookup: Option<u32>,
    /// Small model of the same tokenizer that guesses tokens, in a worker of its own; it changes speed, never results [default: the manifest's].
    #[arg(long, value_name = "SOURCE")]
    draft_model: Option<String>,
}

impl GeneratorArgs {
    /// Tokens of the longest sequence.
    pub(crate) fn context(&self) -> Option<usize> {
        self.context.map(Into::into)
    }

    /// Source of the draft model.
    pub(crate) fn draft_model(&self) -> Option<&str> {
        self.draft_model.as_deref()
    }
}

/// How tokens are drawn. What is left out follows the model's generation_config.json, then the API's defaults.
///
/// Ranges are the API's, and checked by it.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Generation")]
pub(crate) struct SamplingArgs {
    /// Most tokens of an answer [default: what the context has room for].
    #[arg(long, value_name = "N")]
    pub(crate) max_tokens: Option<u32>,
    /// 0 always takes the likeliest token.
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub(crate) temperature: Option<f64>,
    /// Keep the K likeliest tokens.
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    pub(crate) top_k: Option<i64>,
    /// Keep the fewest tokens that together have this probability.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) top_p: Option<f64>,
    /// Keep tokens at least this fraction as likely as the likeliest.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) min_p: Option<f64>,
    /// Divide the logits of ids that occurred; 1 changes nothing.
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    pub(crate) repetition_penalty: Option<f64>,
    /// The same seed draws the same tokens [default: another one each time].
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) seed: Option<i64>,
    /// End before this text; may be repeated.
    #[arg(long, value_name = "TEXT", action = ArgAction::Append)]
    pub(crate) stop: Vec<String>,
    /// Go on past end tokens.
    #[arg(long)]
    pub(crate) ignore_eos: bool,
}

/// Flags of `skein serve`.
#[derive(Clone, Debug, Args)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(crate) target: Target,
    /// Low-rank adapter (LoRA) beside MODEL, which requests call MODEL:NAME: its folder, file or source; may be repeated.
    #[arg(long, value_name = "NAME=SOURCE", action = ArgAction::Append, conflicts_with = "file", value_parser = adapter)]
    pub(crate) adapter: Vec<AdapterSpec>,
    /// Address to listen on; 0.0.0.0 lets other machines in, and there are no keys yet.
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST), value_name = "ADDRESS")]
    pub(crate) host: IpAddr,
    /// Port of the HTTP API; 0 takes a free one.
    #[arg(long, default_value_t = 8080)]
    pub(crate) port: u16,
    /// Port of the gRPC API; 0 takes a free one.
    #[arg(long, default_value_t = 8081, value_name = "PORT")]
    pub(crate) grpc_port: u16,
    #[command(flatten)]
    pub(crate) generator: GeneratorArgs,
    #[command(flatten)]
    pub(crate) placement: Placement,
}

/// Flags of `skein worker`.
#[derive(Clone, Debug, Args)]
pub(crate) struct WorkerArgs {
    /// Read the worker's specification from a file, and run until a signal comes [default: one JSON line on standard input, whose end ends the worker].
    #[arg(long, value_name = "FILE")]
    pub(crate) spec: Option<PathBuf>,
    /// Address to listen on; it is printed with the port in use.
    #[arg(long, default_value_t = SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), value_name = "ADDRESS:PORT")]
    pub(crate) listen: SocketAddr,
    /// Instructions of the kernels.
    #[arg(long, value_enum, default_value_t = IsaChoice::Auto)]
    pub(crate) isa: IsaChoice,
    /// Folder of this worker's certificate (tls.crt, tls.key) and of the authorities it trusts (ca.crt): connections are encrypted, and each end
    /// proves its name.
    #[arg(long, value_name = "DIR")]
    pub(crate) identity: Option<PathBuf>,
    /// Router, or service that leads to any, to say where this worker is while it has no session, as http://host:port; may be repeated.
    #[arg(long, value_name = "URL", action = ArgAction::Append)]
    pub(crate) announce: Vec<String>,
    /// Folder into which a Secret with credentials for the model's source is mounted.
    #[arg(long, value_name = "DIR")]
    pub(crate) credentials: Option<PathBuf>,
    /// Token that every call must carry.
    #[arg(long, env = "SKEIN_WORKER_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    pub(crate) token: Option<String>,
    /// Name of the replica, instead of the specification's: replicas of one revision share specifications.
    #[arg(long, value_name = "NAME", requires = "spec")]
    pub(crate) replica: Option<String>,
    /// Compute threads, instead of the specification's; `auto` takes the cores this process may use.
    #[arg(long, value_name = "N|auto", requires = "spec")]
    pub(crate) threads: Option<WorkerThreads>,
}

/// Compute threads of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WorkerThreads {
    /// The cores this process may use.
    Auto,
    /// This many.
    Fixed(NonZeroUsize),
}

impl FromStr for WorkerThreads {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            number => number.parse().map(Self::Fixed).map_err(|_| "expected a number of at least 1, or auto"),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Command, Skein};

    fn run(args: &[&str]) -> RunArgs {
        match Skein::try_parse_from([&["skein", "run"], args].concat()).unwrap().command {
            Command::Run(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_prompt_follows_the_model_or_the_manifest() {
        let (target, prompt) = run(&["a.gguf", "hi"]).target().unwrap();
        assert_eq!((target.model.as_deref(), prompt.as_deref()), (Some("a.gguf"), Some("hi")));
        let (target, prompt) = run(&["-f", "a.yaml", "hi"]).target().unwrap();
        assert_eq!((target.model, target.file, prompt.as_deref()), (None, Some("a.yaml".into()), Some("hi")));
        assert_eq!(run(&["-f", "a.yaml"]).target().unwrap().1, None);
        assert!(run(&["-f", "a.yaml", "model", "hi"]).target().is_err());
        assert!(run(&[]).target().is_err());
    }

    #[test]
    fn negative_numbers_are_values_and_not_flags() {
        let args = run(&["m", "x", "--temperature", "-1", "--seed", "-7", "--stop", "a", "--stop", "b"]);
        assert_eq!((args.sampling.temperature, args.sampling.seed), (Some(-1.0), Some(-7)));
        assert_eq!(args.sampling.stop, ["a", "b"]);
    }

    #[test]
    fn a_worker_of_a_cluster_is_told_its_replica_and_threads() {
        let worker = |args: &[&str]| match Skein::try_parse_from([&["skein", "worker"], args].concat()).map(|s| s.command) {
            Ok(Command::Worker(args)) => Some(args),
            _ => None,
        };
        let args = worker(&["--spec", "f", "--replica", "a-r1", "--threads", "auto"]).expect("flags of a pod");
        assert_eq!((args.replica.as_deref(), args.threads), (Some("a-r1"), Some(WorkerThreads::Auto)));
        let three = Some(WorkerThreads::Fixed(NonZeroUsize::new(3).expect("not 0")));
        assert_eq!(worker(&["--spec", "f", "--threads", "3"]).expect("a number").threads, three);
        for wrong in
            [&["--spec", "f", "--threads", "0"][..], &["--spec", "f", "--threads", "many"], &["--threads", "1"], &["--replica", "a"]]
        {
            assert!(worker(wrong).is_none(), "{wrong:?}");
        }
    }

    #[test]
    fn chat_and_raw_exclude_each_other() {
        assert!(Skein::try_parse_from(["skein", "run", "m", "--chat", "--raw"]).is_err());
        assert!(Skein::try_parse_from(["skein", "run", "m", "--deployment", "a"]).is_err());
    }
}
