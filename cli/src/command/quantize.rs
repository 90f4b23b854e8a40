//! `skein quantize`: writes a GGUF file with the matrices of a model in another type, and says what that cost.

use std::path::Path;

use plan::{
    dtype::DType,
    model::Format,
    step::{OutputValue, TokenId, WantKind},
};
use router::encode::Tokenizer;
use serde::Serialize;

use super::{
    convert::{More, written},
    eval_ppl::{chunks, read_text, scored_step},
};
use crate::{
    args::{Global, QuantizeArgs},
    blocks::Blocks,
    drive::Drive,
    exit::{BadInput, Failure, Outcome, bad_input},
    importance,
    local::loaded::{Loaded, Needs},
    model::Model,
    output::{self, Unit},
    write::{self, Types},
};

/// Tokens of a step while two models are compared: each wanted position brings a row of logits.
const COMPARED: usize = 32;

/// The result, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Quantized {
    to: DType,
    bytes_before: u64,
    bytes_after: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    imatrix: Option<Weighed>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    cost: Option<Cost>,
}

/// What the importance matrix was.
#[derive(Debug, Serialize)]
struct Weighed {
    /// Name of the text or file.
    source: String,
    /// Chunks of the text.
    #[serde(skip_serializing_if = "Option::is_none")]
    chunks: Option<usize>,
    /// Matrices of which it is known.
    matrices: usize,
    /// Matrices of which it is not, such as experts that no token reached: made as without one.
    unknown: usize,
}

/// What a text says of both models.
#[derive(Debug, Serialize)]
struct Cost {
    ppl_before: f64,
    ppl_after: f64,
    /// Mean over the scored tokens of the divergence of the new distribution from the old one, in nats.
    kl_divergence: f64,
    tokens: usize,
}

/// Runs the command.
pub(crate) async fn quantize(global: &Global, args: QuantizeArgs) -> Outcome {
    let to = args.to.dtype();
    if args.imatrix.is_some() || args.imatrix_text.is_some() {
        importance::check(to)?;
    }
    let stdin = Some(Path::new("-"));
    if args.text.as_deref() == stdin && args.imatrix_text.as_deref() == stdin {
        return Err(bad_input!("--text and --imatrix-text cannot both be standard input"));
    }
    let text = args.text.as_deref().map(read_text).transpose()?;
    let calibration = args.imatrix_text.as_deref().map(|path| Ok::<_, Failure>((path, read_text(path)?))).transpose()?;
    if args.output.extension().is_none_or(|e| e != "gguf") {
        return Err(bad_input!("{} does not end with .gguf; other files hold no quantized tensors", args.output.display()));
    }
    // What takes long comes first, so its results must have a place.
    args.save_imatrix.iter().chain([&args.output]).try_for_each(|path| write::check_free(path))?;
    let model = Model::open(global, &args.input).await?;
    if text.is_some() {
        model.must_generate("the comparison over a text")?;
    }
    if args.imatrix.is_some() || calibration.is_some() {
        importance::check_model(&model)?;
    }
    let importance = match (&args.imatrix, &calibration) {
        (Some(path), _) => Some(importance::read(path, &model)?),
        (None, Some((path, text))) => {
            must_fit(&model, args.context as usize)?;
            Some(importance::of_text(global, &model, &args.placement, (path, text), args.context as usize).await?)
        }
        (None, None) => None,
    };
    if let (Some(path), Some(importance)) = (&args.save_imatrix, &importance) {
        importance::save(importance, &model, args.context as usize, path)?;
    }
    let weighed = importance.as_ref().map(|importance| Weighed {
        source: importance.source.clone(),
        chunks: importance.chunks,
        matrices: importance.columns.len(),
        unknown: importance.unknown(&model.header),
    });
    let more = More { importance, ..More::default() };
    let bytes_after = written(global, &model, &args.output, Format::GGUF, Types::All(to), more).await?.bytes;
    let bytes_before = model.header.files.iter().map(|f| f.bytes).sum();
    let cost = match text {
        None => None,
        Some(text) => Some(compare(global, &args, model, &text).await?),
    };
    let result = Quantized { to, bytes_before, bytes_after, imatrix: weighed, cost };
    if args.json { output::json(&result) } else { print(&result) }
}

fn print(result: &Quantized) -> Outcome {
    output::line(&format!("{} became {} ({:?})", output::bytes(result.bytes_before), output::bytes(result.bytes_after), result.to))?;
    if let Some(Weighed { source, matrices, unknown, .. }) = &result.imatrix {
        output::line(&format!("importance of {matrices} matrices by {source}, {unknown} made without"))?;
    }
    let Some(cost) = &result.cost else { return Ok(()) };
    output::line(&format!("perplexity {:.4} became {:.4} over {} tokens", cost.ppl_before, cost.ppl_after, cost.tokens))?;
    output::line(&format!("KL divergence {:.6} nats a token", cost.kl_divergence))
}

/// Refuses chunks that are too long.
fn must_fit(model: &Model, context: usize) -> Outcome {
    let most = model.header.config.context;
    if context > most { Err(bad_input!("chunks of {context} tokens do not fit the model's context of {most} tokens")) } else { Ok(()) }
}

/// Runs a text through both models.
async fn compare(global: &Global, args: &QuantizeArgs, before: Model, text: &str) -> Outcome<Cost> {
    let context = args.context as usize;
    must_fit(&before, context)?;
    let card = before.card().await?;
    let tokenizer = Tokenizer::from_card(&card).bad_input()?;
    let chunks = chunks(&tokenizer, text, context, Some(args.chunks.get()))?;
    let name = args.output.to_str().ok_or_else(|| bad_input!("the path {} is not UTF-8", args.output.display()))?;
    let after = Model::open(global, name).await?;
    let needs = Needs { context, sequences: 1, batch_tokens: COMPARED, ..Needs::default() };
    let before = Loaded::start(global, before, &args.placement, &needs).await?;
    let after = Loaded::start(global, after, &args.placement, &needs).await?;
    let result = diverge(global, &before, &after, &chunks).await;
    before.close().await;
    after.close().await;
    result
}

/// Sums over the scored positions.
#[derive(Debug, Default)]
struct Sums {
    before: f64,
    after: f64,
    divergence: f64,
    tokens: usize,
}

impl Sums {
    /// Adds a position's logits of both models, after which `target` came.
    fn add(&mut self, before: &[f32], after: &[f32], target: TokenId) {
        let normalizer = |logits: &[f32]| {
            let most = f64::from(logits.iter().copied().fold(f32::MIN, f32::max));
            most + logits.iter().map(|&l| (f64::from(l) - most).exp()).sum::<f64>().ln()
        };
        let (of_before, of_after) = (normalizer(before), normalizer(after));
        let divergence = |(&b, &a): (&f32, &f32)| {
            let (b, a) = (f64::from(b) - of_before, f64::from(a) - of_after);
            b.exp() * (b - a)
        };
        self.divergence += before.iter().zip(after).map(divergence).sum::<f64>();
        self.before += of_before - f64::from(before[target as usize]);
        self.after += of_after - f64::from(after[target as usize]);
        self.tokens += 1;
    }
}

async fn diverge(global: &Global, before: &Loaded, after: &Loaded, chunks: &[Vec<TokenId>]) -> Outcome<Cost> {
    let context = chunks[0].len();
    let blocks = [before, after].map(|loaded| Blocks::new(&loaded.plan.kv, 1, context, COMPARED));
    let [blocks_before, blocks_after] = blocks;
    let (blocks_before, blocks_after) = (blocks_before.bad_input()?, blocks_after.bad_input()?);
    let mut drives = (Drive::open(before.replica.as_ref()).await?, Drive::open(after.replica.as_ref()).await?);
    let bar = output::bar(global.quiet, "Comparing", chunks.len() as u64, Unit::Items);
    let mut sums = Sums::default();
    for (number, ids) in chunks.iter().enumerate() {
        for first in (0..context).step_by(COMPARED) {
            let step = |blocks: &Blocks| scored_step(blocks, ids, number, first, COMPARED, |_| WantKind::Logits);
            let (old, new) = (drives.0.run(step(&blocks_before)).await?, drives.1.run(step(&blocks_after)).await?);
            for (old, new) in old.into_iter().zip(new) {
                match (old.value, new.value) {
                    (OutputValue::Logits(a), OutputValue::Logits(b)) if old.position == new.position && a.len() == b.len() => {
                        sums.add(&a, &b, ids[old.position as usize + 1]);
                    }
                    _ => return Err(anyhow::anyhow!("something other than logits came").into()),
                }
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let mean = |sum: f64| sum / sums.tokens.max(1) as f64;
    Ok(Cost {
        ppl_before: mean(sums.before).exp(),
        ppl_after: mean(sums.after).exp(),
        kl_divergence: mean(sums.divergence),
        tokens: sums.tokens,
    })
}
