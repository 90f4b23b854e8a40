//! `skein eval logits`: what a model computes at given ids.

use std::sync::Arc;

use anyhow::{Context, bail};
use plan::{
    adapter::AdapterSource,
    manifest::AdapterSpec,
    step::{Begin, Input, Output, OutputValue, Sampling, SequenceStep, Step, TokenId, Want, WantKind},
};
use serde::Serialize;

use super::eval_vectors;
use crate::{
    args::{Global, LogitsArgs},
    blocks::Blocks,
    drive::Drive,
    exit::{BadInput, Outcome, bad_input},
    local::loaded::{Loaded, Needs},
    model::Model,
    output,
};

/// The result, as `--json` prints it.
#[derive(Debug, Default, Serialize)]
struct Evaluated {
    /// Logits after the last id, `[vocab]`.
    last_logits: Vec<f32>,
    /// Ids that follow greedily.
    greedy_ids: Vec<TokenId>,
    /// `−ln p(ids[i + 1] | ids[..= i])` for each `i`; one fewer than ids.
    nll_per_token: Vec<f32>,
}

/// Runs the command.
pub(crate) async fn eval(global: &Global, mut args: LogitsArgs) -> Outcome {
    let ids: Arc<[TokenId]> = std::mem::take(&mut args.input_ids).into();
    let model = Model::open(global, &args.model).await?;
    check_ids(&ids, model.header.config.vocab)?;
    let length = ids.len() + args.greedy as usize;
    if length > model.header.config.context {
        return Err(bad_input!(
            "{} ids and {} greedy tokens need a context of {length} tokens, the model has {}",
            ids.len(),
            args.greedy,
            model.header.config.context
        ));
    }
    if model.header.config.encoder.is_some() {
        return eval_vectors::eval(global, LogitsArgs { input_ids: ids.to_vec(), ..args }, model).await;
    }
    let adapter = match args.adapter {
        Some(uri) => Some(model.adapter(global, &AdapterSpec { name: "adapter".to_owned(), uri, digest: None }).await?),
        None => None,
    };
    let adapters = adapter.iter().map(|adapter| adapter.header.clone()).collect();
    let needs = Needs { context: length, sequences: 1, batch_tokens: args.placement.chunk(), adapters };
    let adapter = adapter.map(|adapter| adapter.source);
    let loaded = Loaded::start(global, model, &args.placement, &needs).await?;
    let result = loaded.watch(evaluate(&loaded, &ids, adapter, args.greedy, args.placement.chunk())).await;
    loaded.close().await;
    let result = result?;
    if args.json { output::json(&result) } else { print(&result) }
}

/// Refuses ids that the vocabulary does not have.
fn check_ids(ids: &[TokenId], vocab: usize) -> Outcome {
    match ids.iter().find(|&&id| id as usize >= vocab) {
        Some(id) => Err(bad_input!("id {id} is not in the vocabulary of {vocab} ids, expected 0 to {}", vocab - 1)),
        None => Ok(()),
    }
}

/// Feeds `ids` in chunks, then continues greedily.
async fn evaluate(loaded: &Loaded, ids: &[TokenId], adapter: Option<AdapterSource>, greedy: u32, chunk: usize) -> Outcome<Evaluated> {
    let blocks = Blocks::new(&loaded.plan.kv, 1, ids.len() + greedy as usize, chunk).bad_input()?;
    let mut drive = Drive::open(loaded.replica.as_ref()).await?;
    let slot = u32::from(adapter.is_some());
    if let Some(adapter) = adapter {
        drive.load(slot, adapter).await?;
    }
    let mut result = Evaluated::default();
    let mut first = 0;
    for part in ids.chunks(chunk) {
        let last = first + part.len() == ids.len();
        let mut wants: Vec<Want> = (0..part.len() - usize::from(last))
            .map(|at| Want { offset: at as u32, kind: WantKind::Score { target: ids[first + at + 1], top: 0 } })
            .collect();
        if last {
            wants.push(Want { offset: part.len() as u32 - 1, kind: WantKind::Logits });
        }
        let begin =
            (first == 0).then(|| Box::new(Begin { ids: ids.to_vec(), prompt_len: ids.len() as u32, sampling: Sampling::default() }));
        let step = step(&blocks, slot, (first, part.to_vec()), wants, begin);
        for output in drive.run(step).await? {
            take(&mut result, output)?;
        }
        first += part.len();
    }
    if result.nll_per_token.len() + 1 != ids.len() {
        return Err(anyhow::anyhow!("{} scores came, expected {}", result.nll_per_token.len(), ids.len() - 1).into());
    }
    if greedy > 0 {
        let likeliest = argmax(&result.last_logits).context("no logits came for the last id")?;
        result.greedy_ids.push(likeliest);
    }
    for position in ids.len()..ids.len() + (greedy as usize).saturating_sub(1) {
        let Some(&last) = result.greedy_ids.last() else { break };
        let want = Want { offset: 0, kind: WantKind::Sample };
        for output in drive.run(step(&blocks, slot, (position, vec![last]), vec![want], None)).await? {
            take(&mut result, output)?;
        }
    }
    Ok(result)
}

/// A step of the one sequence.
fn step(blocks: &Blocks, adapter: u32, (first, ids): (usize, Vec<TokenId>), wants: Vec<Want>, begin: Option<Box<Begin>>) -> Step {
    let tables = blocks.changes(0, first, ids.len());
    let input = Input::Ids(ids);
    let part = SequenceStep { sequence: 1, first_position: first as u32, input, tables, wants, begin, adapter, second: 0 };
    Step { sequences: vec![part], ..Step::default() }
}

/// Puts an output where it belongs.
fn take(result: &mut Evaluated, output: Output) -> anyhow::Result<()> {
    match output.value {
        OutputValue::Score(score) => result.nll_per_token.push(-score.token),
        OutputValue::Logits(logits) => result.last_logits = logits,
        OutputValue::Token { id, .. } => result.greedy_ids.push(id),
        OutputValue::Failed(reason) => bail!("the engine failed at position {}: {reason}", output.position),
        OutputValue::Vector(_) => bail!("a vector came that was not asked for"),
    }
    Ok(())
}

/// The id with the largest logit; ties go to the lower id. `None` when there is no logit.
fn argmax(logits: &[f32]) -> Option<TokenId> {
    let mut best: Option<(usize, f32)> = None;
    for (id, &logit) in logits.iter().enumerate() {
        if best.is_none_or(|(_, most)| logit > most) {
            best = Some((id, logit));
        }
    }
    best.map(|(id, _)| id as TokenId)
}

/// The result for a person.
fn print(result: &Evaluated) -> Outcome {
    let mut order: Vec<usize> = (0..result.last_logits.len()).collect();
    order.sort_by(|&a, &b| result.last_logits[b].total_cmp(&result.last_logits[a]).then(a.cmp(&b)));
    let top: Vec<String> = order.iter().take(5).map(|&id| format!("{id}:{:.4}", result.last_logits[id])).collect();
    output::line(&format!("likeliest    {}", top.join(" ")))?;
    if !result.nll_per_token.is_empty() {
        let mean = result.nll_per_token.iter().map(|&nll| f64::from(nll)).sum::<f64>() / result.nll_per_token.len() as f64;
        output::line(&format!("loss         {mean:.4} per token, perplexity {:.4}", mean.exp()))?;
    }
    if !result.greedy_ids.is_empty() {
        let ids: Vec<String> = result.greedy_ids.iter().map(TokenId::to_string).collect();
        output::line(&format!("greedy       {}", ids.join(" ")))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_the_lower_id() {
        assert_eq!(argmax(&[0.0, 2.0, 2.0, 1.0]), Some(1));
        assert_eq!(argmax(&[-1.0, f32::NEG_INFINITY]), Some(0));
        assert_eq!(argmax(&[]), None);
    }

    #[test]
    fn ids_outside_the_vocabulary_are_refused() {
        assert!(check_ids(&[0, 511], 512).is_ok());
        assert!(check_ids(&[0, 512], 512).is_err());
    }
}
