//! `skein eval logits` of an encoder: the vectors and labels that it gives for given ids.

use anyhow::{Context, bail};
use plan::step::{Input, OutputValue, Pooled, Pooling, SequenceStep, Step, TokenId, Want, WantKind};
use serde::Serialize;

use crate::{
    args::{Global, LogitsArgs},
    drive::Drive,
    exit::{Outcome, bad_input},
    local::loaded::{Loaded, Needs},
    model::Model,
    output,
};

/// The result, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Evaluated {
    /// Final state of the first token.
    cls_hidden: Vec<f32>,
    /// Mean of the final states, of length 1.
    mean_pooled_l2: Vec<f32>,
    /// What the classification head gives; empty where there is none.
    logits: Vec<f32>,
}

/// Runs the command for a model that was found to be an encoder.
pub(super) async fn eval(global: &Global, args: LogitsArgs, model: Model) -> Outcome {
    if args.greedy > 0 {
        return Err(bad_input!("--greedy {}: {} is an encoder, which draws no tokens", args.greedy, model.name));
    }
    if let Some(uri) = &args.adapter {
        return Err(bad_input!("--adapter {uri}: adapters of encoders are not supported"));
    }
    let (ids, classifies) = (args.input_ids, model.header.config.labels() > 0);
    // An encoder reads its input in one step, however many ids that has.
    let needs = Needs { context: ids.len(), sequences: 1, batch_tokens: ids.len(), adapters: Vec::new() };
    let loaded = Loaded::start(global, model, &args.placement, &needs).await?;
    let result = loaded.watch(evaluate(&loaded, &ids, classifies)).await;
    loaded.close().await;
    let result = result?;
    if args.json { output::json(&result) } else { print(&result) }
}

async fn evaluate(loaded: &Loaded, ids: &[TokenId], classifies: bool) -> Outcome<Evaluated> {
    let mut drive = Drive::open(loaded.replica.as_ref()).await?;
    let kinds = [
        WantKind::Pooled(Pooled { over: Pooling::First, ..Pooled::HIDDEN }),
        WantKind::Pooled(Pooled { over: Pooling::Mean, normalize: true, dimensions: 0 }),
    ];
    let kinds = kinds.into_iter().chain(classifies.then_some(WantKind::Classes));
    let part = SequenceStep {
        sequence: 1,
        first_position: 0,
        input: Input::Ids(ids.to_vec()),
        tables: Vec::new(),
        wants: kinds.map(|kind| Want { offset: ids.len() as u32 - 1, kind }).collect(),
        begin: None,
        adapter: 0,
        second: 0,
    };
    let mut vectors = Vec::new();
    for output in drive.run(Step { sequences: vec![part], ..Step::default() }).await? {
        vectors.push(vector(output.value)?);
    }
    let mut vectors = vectors.into_iter();
    let cls_hidden = vectors.next().context("no state of the first token came")?;
    let mean_pooled_l2 = vectors.next().context("no mean came")?;
    Ok(Evaluated { cls_hidden, mean_pooled_l2, logits: vectors.next().unwrap_or_default() })
}

fn vector(value: OutputValue) -> anyhow::Result<Vec<f32>> {
    match value {
        OutputValue::Vector(vector) => Ok(vector),
        OutputValue::Failed(reason) => bail!("the engine failed: {reason}"),
        other => bail!("{other:?} came in place of a vector"),
    }
}

/// The result for a person.
fn print(result: &Evaluated) -> Outcome {
    let line = |name: &str, values: &[f32]| {
        let first: Vec<String> = values.iter().take(6).map(|v| format!("{v:.6}")).collect();
        let more = if values.len() > 6 { format!(" … ({} values)", values.len()) } else { String::new() };
        output::line(&format!("{name:<13}{}{more}", first.join(" ")))
    };
    line("first token", &result.cls_hidden)?;
    line("mean", &result.mean_pooled_l2)?;
    if result.logits.is_empty() { Ok(()) } else { line("labels", &result.logits) }
}
