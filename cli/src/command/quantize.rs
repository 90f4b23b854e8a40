//! `skein quantize`: writes a GGUF file with the matrices of another in another type, and says what that cost.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use anyhow::Context;
use kernels::{Pool, WeightType, convert_rows};
use plan::{
    card::GGUF_HEADER,
    dtype::DType,
    gguf::{self, Keep, Value, Writer},
    step::{OutputValue, TokenId, WantKind},
};
use router::encode::Tokenizer;
use serde::Serialize;
use source::{RawHeader, Source};

use super::eval_ppl::{chunks, read_text, scored_step};
use crate::{
    args::{Global, QuantizeArgs},
    blocks::Blocks,
    drive::Drive,
    exit::{BadInput, Outcome, bad_input},
    local::{
        loaded::{Loaded, Needs},
        threads,
    },
    model::Model,
    output::{self, Unit},
};

/// Most bytes converted at a time, unless one row is longer.
const PIECE: usize = 16 << 20;
/// Tokens of a step while two models are compared: each wanted position brings a row of logits.
const COMPARED: usize = 32;

/// The result, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Quantized {
    to: DType,
    bytes_before: u64,
    bytes_after: u64,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    cost: Option<Cost>,
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
    let text = args.text.as_deref().map(read_text).transpose()?;
    let model = Model::open(global, &args.input).await?;
    if text.is_some() {
        model.must_generate("the comparison over a text")?;
    }
    let (source, out, quiet) = (model.source.clone(), args.output.clone(), global.quiet);
    let written = tokio::task::spawn_blocking(move || write(&source, &out, to, quiet)).await.context("writing was cut off")?;
    let bytes_after = written?;
    let bytes_before = model.header.files.iter().map(|f| f.bytes).sum();
    let cost = match text {
        None => None,
        Some(text) => Some(compare(global, &args, model, &text).await?),
    };
    let result = Quantized { to, bytes_before, bytes_after, cost };
    if args.json { output::json(&result) } else { print(&result) }
}

fn print(result: &Quantized) -> Outcome {
    output::line(&format!("{} became {} ({:?})", output::bytes(result.bytes_before), output::bytes(result.bytes_after), result.to))?;
    let Some(cost) = &result.cost else { return Ok(()) };
    output::line(&format!("perplexity {:.4} became {:.4} over {} tokens", cost.ppl_before, cost.ppl_after, cost.tokens))?;
    output::line(&format!("KL divergence {:.6} nats a token", cost.kl_divergence))
}

/// The number that tells which type most tensors of a file have.
fn file_type(to: DType) -> u32 {
    match to {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::Q4_0 => 2,
        DType::Q4_1 => 3,
        DType::Q8_0 => 7,
        DType::Q5_0 => 8,
        DType::Q5_1 => 9,
        DType::Q2_K => 10,
        DType::Q3_K => 11,
        DType::Q4_K => 14,
        DType::Q5_K => 16,
        DType::Q6_K => 18,
        DType::IQ4_NL => 25,
        DType::BF16 => 32,
        DType::MXFP4 => 38,
    }
}

/// The type a tensor gets.
fn wanted(tensor: &gguf::Tensor, stored: DType, to: DType) -> DType {
    let vocabulary = ["token_embd.weight", "output.weight"].contains(&tensor.name.as_str());
    // Norms and biases are vectors; the choice of experts turns on small differences.
    let kept = ["ffn_gate_inp.weight", "token_types.weight"].iter().any(|name| tensor.name.ends_with(name));
    if tensor.dims.len() < 2 || kept {
        return stored;
    }
    to.for_rows(tensor.dims[0] as usize, vocabulary).unwrap_or(stored)
}

/// Writes the file; returns its length. It appears whole or not at all.
fn write(source: &Source, out: &Path, to: DType, quiet: bool) -> Outcome<u64> {
    let RawHeader::Gguf { parts } = source.raw_header().bad_input()? else {
        return Err(bad_input!(
            "{} is not GGUF; only GGUF files can be quantized so far (--load-in converts any model at load)",
            source.uri()
        ));
    };
    let mut writer = Writer::new();
    for entry in whole_metadata(source)? {
        if !entry.key.starts_with("split.") && entry.key != "general.file_type" && entry.key != "general.quantization_version" {
            writer.metadata(&entry.key, entry.value);
        }
    }
    writer.metadata("general.file_type", Value::U32(file_type(to))).metadata("general.quantization_version", Value::U32(2));
    let mut tensors = Vec::new();
    for (file, (model_file, header)) in parts.iter().enumerate() {
        for tensor in &header.tensors {
            let unknown =
                || bad_input!("tensor {} of {} has type {}, which is not supported", tensor.name, model_file.name, tensor.kind.name);
            let stored = tensor.kind.dtype().ok_or_else(unknown)?;
            let made = wanted(tensor, stored, to);
            let shape: Vec<usize> = tensor.dims.iter().rev().map(|&d| d as usize).collect();
            writer.tensor(&tensor.name, &shape, made, Vec::new());
            tensors.push((file, tensor, stored, made));
        }
    }
    let pool = Pool::new(threads::available());
    let folder = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let temporary = out.with_extension(format!("{}.part", std::process::id()));
    let failed = || format!("failed to write {} in {}", temporary.display(), folder.display());
    let result = (|| -> Outcome<u64> {
        let mut file = BufWriter::new(File::create(&temporary).with_context(failed)?);
        let header = writer.header().context("the tensors do not fit a GGUF file")?;
        file.write_all(&header).with_context(failed)?;
        let mut written = header.len() as u64;
        let bar = output::bar(quiet, "Quantizing", tensors.len() as u64, Unit::Items);
        for (index, tensor, stored, made) in tensors {
            written += convert(source, (index, tensor), (stored, made), &pool, &mut file)?;
            let padding = written.next_multiple_of(32) - written;
            file.write_all(&[0; 32][..padding as usize]).with_context(failed)?;
            written += padding;
            bar.inc(1);
        }
        bar.finish_and_clear();
        file.into_inner().map_err(|e| e.into_error()).and_then(|f| f.sync_all()).with_context(failed)?;
        std::fs::rename(&temporary, out).with_context(|| format!("failed to rename {} to {}", temporary.display(), out.display()))?;
        Ok(written)
    })();
    if result.is_err() && temporary.exists() {
        std::fs::remove_file(&temporary).with_context(|| format!("failed to remove {}", temporary.display()))?;
    }
    result
}

/// The metadata with its vocabulary.
fn whole_metadata(source: &Source) -> Outcome<Vec<gguf::Entry>> {
    let card = source.card().bad_input()?;
    let bytes = card.file(GGUF_HEADER).context("the model has no GGUF header")?;
    let read = |keep: Keep<'_>| gguf::read(&mut &*bytes, bytes.len() as u64, keep, false).bad_input();
    let short = read(Keep::Short)?;
    let skipped = |e: &&gguf::Entry| matches!(&e.value, Value::Array(array) if array.values.is_none());
    let keys: Vec<&str> = short.metadata.iter().filter(skipped).map(|e| e.key.as_str()).collect();
    Ok(read(Keep::Keys(&keys))?.metadata)
}

/// The kernels' name for a stored type.
fn weight_type(dtype: DType) -> Outcome<WeightType> {
    let name = format!("{dtype:?}");
    Ok(WeightType::ALL.into_iter().find(|t| t.to_string() == name).with_context(|| format!("no kernel has type {name}"))?)
}

/// Writes a tensor in another type; returns the bytes written.
fn convert(
    source: &Source,
    (file, tensor): (usize, &gguf::Tensor),
    (stored, made): (DType, DType),
    pool: &Pool,
    out: &mut impl Write,
) -> Outcome<u64> {
    let k = tensor.dims.first().copied().unwrap_or(1) as usize;
    let row =
        stored.row_bytes(k).filter(|&bytes| bytes > 0).with_context(|| format!("rows of tensor {} are not whole blocks", tensor.name))?;
    let types = (weight_type(stored)?, weight_type(made)?);
    let piece = ((PIECE / row).max(1) * row) as u64;
    let (end, mut written) = (tensor.offset + tensor.bytes, 0);
    let mut buffer = Vec::new();
    let mut begin = tensor.offset;
    while begin < end {
        let range = begin..end.min(begin + piece);
        buffer.resize((range.end - range.start) as usize, 0);
        source.read(file, range.clone(), &mut buffer).bad_input()?;
        let rows = if stored == made {
            std::mem::take(&mut buffer)
        } else {
            convert_rows(pool, types, k, &buffer, None)
                .with_context(|| format!("tensor {} cannot be converted", tensor.name))
                .bad_input()?
        };
        out.write_all(&rows).with_context(|| format!("failed to write tensor {}", tensor.name))?;
        written += rows.len() as u64;
        begin = range.end;
    }
    Ok(written)
}

/// Runs a text through both models.
async fn compare(global: &Global, args: &QuantizeArgs, before: Model, text: &str) -> Outcome<Cost> {
    let context = args.context as usize;
    if context > before.header.config.context {
        return Err(bad_input!("chunks of {context} tokens do not fit the model's context of {} tokens", before.header.config.context));
    }
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
