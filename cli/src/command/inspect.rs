//! `skein inspect`: what a model is, from its headers alone.

use std::collections::BTreeMap;

use anyhow::Context;
use plan::{
    dtype::DType,
    model::{Architecture, Format, ModelHeader, TensorInfo},
};
use serde::Serialize;
use source::{Inspection, Keep, SourceOptions};

use crate::{
    args::{Global, InspectArgs},
    exit::{Failure, Outcome},
    model::{self, Model},
    output,
};

/// The result, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Inspected<'a> {
    model: &'a str,
    format: Format,
    architecture: Architecture,
    parameters: u64,
    /// Bytes of the weight files.
    size_bytes: u64,
    /// Bytes of the tensors that the forward pass uses, by type.
    type_bytes: BTreeMap<DType, u64>,
    layers: usize,
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    value_dim: usize,
    ffn: usize,
    vocab: usize,
    context_tokens: usize,
    /// Layers by attention window; `null` stands for full attention.
    windows: Vec<Window>,
    tied_embeddings: bool,
    files: Vec<File<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tensors: Option<Vec<&'a TensorInfo>>,
}

/// Layers that share a window.
#[derive(Debug, PartialEq, Serialize)]
struct Window {
    tokens: Option<u32>,
    layers: usize,
}

/// One weight file.
#[derive(Debug, Serialize)]
struct File<'a> {
    name: &'a str,
    bytes: u64,
}

/// Runs the command.
pub(crate) async fn inspect(global: &Global, args: InspectArgs) -> Outcome {
    if args.header {
        return say_header(global, args.model).await;
    }
    let model = Model::open(global, &args.model).await?;
    let inspected = describe(&model.name, &model.header, args.tensors);
    if args.json { output::json(&inspected) } else { print(&inspected) }
}

/// Says the headers to a program, or why there are none. Standard error stays empty: in the log of a container it would be in between.
async fn say_header(global: &Global, model: String) -> Outcome {
    let options = SourceOptions { keep: Keep::Nothing, ..model::source_options(global)? };
    let read = tokio::task::spawn_blocking(move || Inspection::of(&model, options));
    let inspection = read.await.context("reading the header was cut off")?;
    output::line(&inspection.line())?;
    match inspection {
        Inspection::Header(_) => Ok(()),
        Inspection::Refused { .. } => Err(Failure::Told { input: true }),
    }
}

/// What the headers say.
fn describe<'a>(name: &'a str, header: &'a ModelHeader, tensors: bool) -> Inspected<'a> {
    let config = &header.config;
    let mut type_bytes = BTreeMap::new();
    for tensor in header.tensors.values() {
        *type_bytes.entry(tensor.dtype).or_default() += tensor.bytes;
    }
    let mut windows: BTreeMap<Option<u32>, usize> = BTreeMap::new();
    for layer in &config.layers {
        *windows.entry(layer.window).or_default() += 1;
    }
    Inspected {
        model: name,
        format: header.format,
        architecture: config.architecture,
        parameters: header.tensors.values().map(elements).sum(),
        size_bytes: header.files.iter().map(|file| file.bytes).sum(),
        type_bytes,
        layers: config.layers.len(),
        hidden: config.hidden,
        heads: config.heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        value_dim: config.value_dim(),
        ffn: config.ffn,
        vocab: config.vocab,
        context_tokens: config.context,
        windows: windows.into_iter().map(|(tokens, layers)| Window { tokens, layers }).collect(),
        tied_embeddings: config.tied_embeddings,
        files: header.files.iter().map(|file| File { name: &file.name, bytes: file.bytes }).collect(),
        tensors: tensors.then(|| header.tensors.values().collect()),
    }
}

/// Values of a tensor.
fn elements(tensor: &TensorInfo) -> u64 {
    tensor.shape.iter().map(|&n| n as u64).product()
}

/// The result for a person.
fn print(model: &Inspected<'_>) -> Outcome {
    let types: Vec<String> = model.type_bytes.iter().map(|(dtype, bytes)| format!("{dtype:?} {}", output::bytes(*bytes))).collect();
    let attention = |window: &Window| match window.tokens {
        Some(tokens) => format!("{} with a window of {tokens}", window.layers),
        None => format!("{} full", window.layers),
    };
    let windows: Vec<String> = model.windows.iter().map(attention).collect();
    let narrower = if model.value_dim == model.head_dim { String::new() } else { format!(" ({} of values)", model.value_dim) };
    let rows = [
        ("model", model.model.to_owned()),
        ("format", format!("{:?}, {} in {} files", model.format, output::bytes(model.size_bytes), model.files.len())),
        ("architecture", format!("{:?}", model.architecture)),
        ("parameters", format!("{:.1} M", model.parameters as f64 / 1e6)),
        ("types", types.join(", ")),
        ("layers", format!("{} ({})", model.layers, windows.join(", "))),
        ("hidden", format!("{}, feed-forward {}", model.hidden, model.ffn)),
        ("heads", format!("{} query, {} key/value, {} values each{narrower}", model.heads, model.kv_heads, model.head_dim)),
        ("vocabulary", format!("{}{}", model.vocab, if model.tied_embeddings { ", tied" } else { "" })),
        ("context", format!("{} tokens", model.context_tokens)),
    ];
    for (label, text) in rows {
        output::line(&format!("{label:<13} {text}"))?;
    }
    for tensor in model.tensors.iter().flatten() {
        let shape: Vec<String> = tensor.shape.iter().map(usize::to_string).collect();
        output::line(&format!("{:<40} {:>5?} {:>16}  {}", tensor.name, tensor.dtype, shape.join("×"), output::bytes(tensor.bytes)))?;
    }
    Ok(())
}
