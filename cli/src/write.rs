//! Writes a model into other files: which tensors they hold, in which types, tensor by tensor, so that memory is bounded by a piece of one.
//!
//! Files appear whole or not at all, and never in place of others.

mod gguf;
mod place;
mod resolve;
mod rows;
mod safetensors;

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::Context;
use indicatif::ProgressBar;
use kernels::{Pool, WeightType};
use plan::{
    card::ModelCard,
    dtype::DType,
    gguf::Value,
    header::{Made, Metadata, Target, target},
    model::{Format, ModelHeader, Role, TensorId},
};
use router::encode::{Tokenizer, VectorSettings};
use source::{Source, SourceOptions};

use crate::{
    exit::{BadInput, Outcome, bad_input},
    importance::Importance,
    local::threads,
    output::{self, Unit},
};

pub(crate) use self::place::check_free;
use self::rows::Rows;

/// What is to be written.
pub(crate) struct Order<'a> {
    pub(crate) source: &'a Source,
    /// File or folder to write.
    pub(crate) out: &'a Path,
    pub(crate) format: Format,
    pub(crate) types: Types,
    /// Most bytes of a file, unless one tensor is longer.
    pub(crate) file_bytes: Option<u64>,
    /// How much the errors of the values of each column count.
    pub(crate) importance: Option<&'a Importance>,
    pub(crate) label: &'static str,
    pub(crate) quiet: bool,
    /// Set when nobody waits any more.
    pub(crate) stopped: &'a AtomicBool,
}

/// The types that tensors get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Types {
    /// Those they have; F32 where the format has no such type.
    Kept,
    /// This one: matrices alone, as far as their rows are whole blocks, or in safetensors all of them.
    All(DType),
}

/// What was written.
#[derive(Debug)]
pub(crate) struct Written {
    /// Files, the first one first.
    pub(crate) files: Vec<PathBuf>,
    pub(crate) bytes: u64,
    pub(crate) tensors: usize,
}

/// A tensor with the type it gets.
struct Typed {
    made: Made,
    dtype: DType,
    bytes: u64,
}

/// Writes the model.
///
/// # Errors
/// Bad input when there is something at that place already, or the format cannot say what the model is.
pub(crate) fn write(order: &Order<'_>) -> Outcome<Written> {
    check_free(order.out)?;
    let header = order.source.header().bad_input()?;
    let header = resolve::scaling(order.source, header)?;
    let target = target(&header, order.format).bad_input()?;
    let card = order.source.card().bad_input()?;
    let typed = typed(order, &header, &target)?;
    let rows = Rows { source: order.source, header: &header, pool: Pool::new(threads::available()), importance: order.importance };
    let bar = output::bar(order.quiet, order.label, typed.iter().map(|t| t.bytes).sum(), Unit::Bytes);
    let writing = Writing { order, header: &header, card: &card, rows, bar };
    let written = match order.format {
        Format::GGUF => gguf::write(&writing, target.metadata.as_ref(), &typed),
        Format::Safetensors => safetensors::write(&writing, target.metadata.as_ref(), &typed),
    };
    writing.bar.finish_and_clear();
    written
}

/// Writes a small file, whole or not at all, where nothing is yet.
///
/// # Errors
/// Bad input when there is something at that place already.
pub(crate) fn whole(out: &Path, bytes: &[u8]) -> Outcome {
    check_free(out)?;
    let mut stream = place::Stream::new(place::file(out)?, out, bytes.len() as u64);
    stream.put(bytes)?;
    let file = stream.finish()?;
    place::sync_file(file.as_file(), out)?;
    place::keep_file(file, out)
}

/// What is needed while files are written.
struct Writing<'a> {
    order: &'a Order<'a>,
    header: &'a ModelHeader,
    card: &'a ModelCard,
    rows: Rows<'a>,
    bar: ProgressBar,
}

impl Writing<'_> {
    /// Hands a tensor's bytes to `out`, piece by piece.
    fn tensor(&self, tensor: &Typed, out: &mut dyn FnMut(&[u8]) -> Outcome) -> Outcome {
        self.rows.stream(&tensor.made, tensor.dtype, &mut |bytes| {
            if self.order.stopped.load(Ordering::Relaxed) {
                return Err(crate::exit::Failure::Interrupted);
            }
            out(bytes)?;
            self.bar.inc(bytes.len() as u64);
            Ok(())
        })
    }

    /// Reads what was written as any model is read, and compares what it makes of texts.
    fn verify(&self, written: &Path) -> Outcome {
        let name = written.to_str().ok_or_else(|| bad_input!("the path {} is not UTF-8", written.display()))?;
        let read = Source::open(name, SourceOptions::default()).context("what was written cannot be opened")?;
        read.header().context("what was written cannot be read")?;
        let card = read.card().context("what was written cannot be read")?;
        if self.header.config.encoder.is_some() {
            let settings = |card: &ModelCard| VectorSettings::from_card(card).map_err(|e| e.to_string());
            let (before, after) = (settings(self.card), settings(&card));
            if before != after {
                return Err(bad_input!("vectors and labels would be made otherwise: {after:?}, not {before:?}"));
            }
        }
        let Ok(before) = Tokenizer::from_card(self.card) else { return Ok(()) };
        let after = Tokenizer::from_card(&card).context("the tokenizer that was written cannot be read")?;
        match unlike(&before, &after) {
            None => Ok(()),
            Some(what) => Err(bad_input!("the tokenizer cannot be carried over: {what}")),
        }
    }
}

/// Texts with what tokenizers treat in ways of their own.
const TEXTS: [&str; 8] = [
    "The geese take turns in front; it's 2026-01-31, and 1234567 of them came.",
    "fn main() {\n\tprintln!(\"{:>8}\", x[0] + 3.14e-2);\n}\n\n",
    "  leading,   inner   and trailing spaces  \r\n\r\n \t",
    "日本語のテキスト、한국어 텍스트 и русский текст",
    "e\u{301}\u{327} \u{1f469}\u{200d}\u{1f4bb} \u{feff}\u{0}\u{7}",
    "<s></s><|im_start|>user<|eot_id|><start_of_turn>[INST] <0x0A> ▁ ##x",
    "I'M you'LL they'd WE'VE",
    "",
];

/// How two tokenizers differ.
fn unlike(before: &Tokenizer, after: &Tokenizer) -> Option<String> {
    for text in TEXTS {
        for special in [false, true] {
            let ids = |t: &Tokenizer| t.encode_prompt(text, special).map_err(|e| e.to_string());
            if ids(before) != ids(after) {
                return Some(format!("{text:?} would become {:?}, not {:?}", ids(after), ids(before)));
            }
        }
    }
    let ends = (before.end_ids(), after.end_ids());
    if ends.0 != ends.1 {
        return Some(format!("texts would end with one of {:?}, not {:?}", ends.1, ends.0));
    }
    (before.has_template() != after.has_template()).then(|| "its chat template is lost".to_owned())
}

/// Gives every tensor its type.
fn typed(order: &Order<'_>, header: &ModelHeader, target: &Target) -> Outcome<Vec<Typed>> {
    let stored = |id: &TensorId| header.tensors.get(id).map_or(DType::F32, |t| t.stored_type());
    target
        .tensors
        .iter()
        .map(|made| {
            let parts: Vec<DType> = made.parts.iter().map(|part| stored(&part.id)).collect();
            // Rows of one tensor have one type.
            let has = if parts.iter().all(|t| *t == parts[0]) { parts[0] } else { DType::F32 };
            let dtype = wanted(made, has, order);
            let unfit = || bad_input!("rows of tensor {} are not whole blocks of {dtype:?}", made.name);
            let rows: usize = made.shape.iter().rev().skip(1).product();
            let row = made.shape.last().and_then(|&k| dtype.row_bytes(k)).ok_or_else(unfit)?;
            Ok(Typed { made: made.clone(), dtype, bytes: (rows * row) as u64 })
        })
        .collect()
}

/// The type that a tensor gets.
fn wanted(made: &Made, has: DType, order: &Order<'_>) -> DType {
    let role = made.parts[0].id.role;
    if order.format == Format::Safetensors {
        return match order.types {
            // Files of DeepSeek have it so whatever the others are: the choice of experts turns on it.
            Types::All(_) if role == Role::RouterBias => DType::F32,
            Types::All(dtype) => dtype,
            Types::Kept if has.block_len() == 1 => has,
            Types::Kept => DType::F32,
        };
    }
    // As other writers have it: vectors whole, and the choice of experts, which turns on small differences.
    if made.shape.len() < 2 || matches!(role, Role::Router | Role::Positions | Role::TokenTypes) {
        return DType::F32;
    }
    let vocabulary = matches!(role, Role::Embedding | Role::Output);
    match order.types {
        Types::Kept => has,
        Types::All(to) => made.shape.last().and_then(|&k| to.for_rows(k, vocabulary)).unwrap_or(has),
    }
}

/// The kernels' name for a stored type.
pub(crate) fn weight_type(dtype: DType) -> Outcome<WeightType> {
    let name = format!("{dtype:?}");
    Ok(WeightType::ALL.into_iter().find(|t| t.to_string() == name).with_context(|| format!("no kernel has type {name}"))?)
}

/// The entries of a GGUF header made from those of another file, or of other files.
fn gguf_metadata(metadata: Option<&Metadata>) -> Option<&Vec<(String, Value)>> {
    match metadata {
        Some(Metadata::Gguf(entries)) => Some(entries),
        _ => None,
    }
}

/// Tensors in files of at most `most` bytes, unless one is longer.
fn parts(tensors: &[Typed], most: Option<u64>) -> Vec<&[Typed]> {
    let Some(most) = most else { return vec![tensors] };
    let (mut parts, mut begin, mut bytes) = (Vec::new(), 0, 0);
    for (index, tensor) in tensors.iter().enumerate() {
        if index > begin && bytes + tensor.bytes > most {
            parts.push(&tensors[begin..index]);
            (begin, bytes) = (index, 0);
        }
        bytes += tensor.bytes;
    }
    parts.push(&tensors[begin..]);
    parts
}
