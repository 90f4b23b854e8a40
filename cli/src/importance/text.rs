//! The importance matrix of a text: the model reads it, and what goes into each product is squared and summed by column.

use std::{collections::HashMap, path::Path, sync::atomic::Ordering};

use anyhow::Context;
use engine::{Engine, NoMasks};
use plan::step::{TokenId, Want, WantKind};
use router::encode::Tokenizer;

use super::{Importance, Squares, name};
use crate::{
    args::{Global, Placement},
    blocks::Blocks,
    command::{convert::Stop, eval_ppl},
    exit::{BadInput, Failure, Outcome, bad_input},
    local::loaded::{self, Needs},
    model::Model,
    output::{self, Unit},
};

/// Computes the importance matrix of the text at `path`, in whole chunks of `context` tokens, by an engine in this process.
///
/// # Errors
/// Bad input when the text is shorter than a chunk, or the model cannot run so.
pub(crate) async fn of_text(
    global: &Global,
    model: &Model,
    placement: &Placement,
    (path, text): (&Path, &str),
    context: usize,
) -> Outcome<Importance> {
    if placement.parallelism() != (1, 1) {
        return Err(bad_input!(
            "an importance matrix is computed by one engine in this process, --pp and --tp cannot be given with --imatrix-text"
        ));
    }
    let tokenizer = Tokenizer::from_card(&*model.card().await?).bad_input()?;
    let chunks = eval_ppl::cut(tokenizer.bos(), tokenizer.encode(text, false).bad_input()?, context, None)?;
    let model = model.clone().loaded_as(placement.load_in());
    let needs = Needs { context, sequences: 1, batch_tokens: placement.chunk().min(context), ..Needs::default() };
    let plan = loaded::plan(&model, placement, &needs)?;
    let (isa, threads) = (loaded::isa(placement)?, placement.threads());
    let stop = Stop::default();
    let (quiet, stopped, count) = (global.quiet, stop.flag(), chunks.len());
    let observed = tokio::task::spawn_blocking(move || {
        let loading = output::bar(quiet, "Loading", plan.tensor_bytes, Unit::Bytes);
        let mut engine = loaded::load(&model, &plan, isa, threads, &|bytes| loading.set_position(bytes))?;
        loading.finish_and_clear();
        engine.observe().context("the engine has other ranks")?;
        let blocks = Blocks::new(&plan.kv, 1, context, needs.batch_tokens).bad_input()?;
        let bar = output::bar(quiet, "Reading", chunks.len() as u64, Unit::Items);
        let mut steps = 0;
        for (number, ids) in chunks.iter().enumerate() {
            for first in (0..context).step_by(needs.batch_tokens) {
                if stopped.load(Ordering::Relaxed) {
                    return Err(Failure::Interrupted);
                }
                steps += 1;
                read(&mut engine, &blocks, steps, (number, ids), (first, needs.batch_tokens))?;
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(engine.observed())
    });
    let mut importance =
        Importance { squares: HashMap::new(), columns: HashMap::new(), source: name(path), chunks: Some(count), from_text: true };
    for (id, columns) in observed.await.context("reading the text was cut off")?? {
        let squares = Squares { sums: columns.sums.iter().map(|sum| *sum as f32).collect(), rows: columns.rows as f32 };
        let means = squares.means().ok_or_else(|| {
            bad_input!("on this text the model computes numbers that are not finite: what goes into {:?} of layer {:?}", id.role, id.layer)
        })?;
        importance.columns.insert(id, means);
        importance.squares.insert(id, squares);
    }
    Ok(importance)
}

/// Has the engine read some ids of a chunk. Something is wanted of every one, so that each goes through all layers.
fn read(engine: &mut Engine, blocks: &Blocks, step: u64, (number, ids): (usize, &[TokenId]), (first, most): (usize, usize)) -> Outcome {
    let mut part = eval_ppl::scored_step(blocks, ids, number, first, most, |_| WantKind::Logits);
    part.id = step;
    for sequence in &mut part.sequences {
        let score = |at: usize| WantKind::Score { target: ids.get(first + at + 1).copied().unwrap_or(ids[0]), top: 0 };
        sequence.wants = (0..ids.len().min(first + most) - first).map(|at| Want { offset: at as u32, kind: score(at) }).collect();
    }
    engine.run(&part, &[], &mut NoMasks).map(drop).with_context(|| format!("chunk {number} cannot be read")).map_err(Failure::Failed)
}
