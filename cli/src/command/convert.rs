//! `skein convert`: writes a model into other files, its values as they are.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::Context;
use plan::model::Format;
use serde::Serialize;

use crate::{
    args::{ConvertArgs, FloatType, Global},
    exit::{Outcome, bad_input},
    importance::Importance,
    model::Model,
    output,
    write::{self, Order, Types, Written},
};

/// The result, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Converted {
    format: Format,
    files: Vec<String>,
    tensors: usize,
    bytes: u64,
}

/// Runs the command.
pub(crate) async fn convert(global: &Global, args: ConvertArgs) -> Outcome {
    let format = format(&args.output)?;
    let model = Model::open(global, &args.input).await?;
    let types = args.dtype.map_or(Types::Kept, |dtype: FloatType| Types::All(dtype.dtype()));
    let written = written(global, &model, &args.output, format, types, More { file_bytes: args.file_size, ..More::default() }).await?;
    let files = written.files.iter().map(|path| path.display().to_string()).collect();
    let result = Converted { format, files, tensors: written.tensors, bytes: written.bytes };
    if args.json {
        return output::json(&result);
    }
    output::line(&format!("{} tensors in {} of {:?}:", result.tensors, output::bytes(result.bytes), result.format))?;
    result.files.iter().try_for_each(|file| output::line(&format!("  {file}")))
}

/// The format that a name asks for.
fn format(out: &Path) -> Outcome<Format> {
    match out.extension().and_then(|e| e.to_str()) {
        Some("gguf") => Ok(Format::GGUF),
        Some(end @ ("bin" | "pt" | "pth" | "safetensors")) => Err(bad_input!(
            "{} ends with .{end}; a GGUF file (.gguf) or a folder of safetensors can be written, which PyTorch reads too",
            out.display()
        )),
        _ => Ok(Format::Safetensors),
    }
}

/// Tells a thread that nobody waits for it any more, when it is dropped.
#[derive(Default)]
pub(crate) struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Set when that is so.
    pub(crate) fn flag(&self) -> Arc<AtomicBool> {
        self.0.clone()
    }
}

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What is asked for beside format and types.
#[derive(Default)]
pub(super) struct More {
    /// Most bytes of a file.
    pub(super) file_bytes: Option<u64>,
    pub(super) importance: Option<Importance>,
}

/// Writes a model; when the future is dropped, nothing is left behind.
pub(super) async fn written(global: &Global, model: &Model, out: &Path, format: Format, types: Types, more: More) -> Outcome<Written> {
    let (source, out, quiet) = (model.source.clone(), out.to_owned(), global.quiet);
    let stop = Stop::default();
    let stopped = stop.flag();
    let task = tokio::task::spawn_blocking(move || {
        let order = Order {
            source: &source,
            out: &out,
            format,
            types,
            file_bytes: more.file_bytes,
            importance: more.importance.as_ref(),
            label: if matches!(types, Types::All(to) if to.block_len() > 1) { "Quantizing" } else { "Converting" },
            quiet,
            stopped: &stopped,
        };
        write::write(&order)
    });
    task.await.context("writing was cut off")?
}
