//! `skein eval ppl`: perplexity of a text by llama.cpp's convention.
//!
//! The text is tokenized with the beginning token and without special-token parsing, and cut into chunks that do not overlap; the
//! first id of each chunk is replaced by the beginning token, and the second half of each chunk is scored (`context / 2 − 1` ids).
//! Convention: `perplexity_v1` in llama.cpp's `tools/perplexity/perplexity.cpp`.

use std::{io::Read, path::Path};

use anyhow::{Context, bail};
use plan::step::{Input, OutputValue, SequenceStep, Step, TokenId, Want, WantKind};
use router::encode::Tokenizer;
use serde::Serialize;

use crate::{
    args::{Global, PplArgs},
    blocks::Blocks,
    drive::Drive,
    exit::{BadInput, Outcome, bad_input},
    local::loaded::{Loaded, Needs},
    model::Model,
    output::{self, Unit},
};

/// The result, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Perplexity {
    /// `exp` of the mean loss.
    ppl: f64,
    /// Scored tokens.
    tokens: usize,
    /// Chunks they came from.
    chunks: usize,
    /// Tokens of a chunk.
    context: usize,
}

/// Runs the command.
pub(crate) async fn eval(global: &Global, args: PplArgs) -> Outcome {
    let text = read_text(&args.text)?;
    let model = Model::open(global, &args.model).await?;
    model.must_generate("perplexity")?;
    let context = args.context as usize;
    if context > model.header.config.context {
        return Err(bad_input!("chunks of {context} tokens do not fit the model's context of {} tokens", model.header.config.context));
    }
    let tokenizer = {
        let card = model.card().await?;
        Tokenizer::from_card(&card).bad_input()?
    };
    let chunks = chunks(&tokenizer, &text, context, args.chunks.map(Into::into))?;

    let chunk = args.placement.chunk();
    let needs = Needs { context, sequences: 1, batch_tokens: chunk, ..Needs::default() };
    let loaded = Loaded::start(global, model, &args.placement, &needs).await?;
    let result = loaded.watch(score(global, &loaded, &chunks, chunk)).await;
    loaded.close().await;
    let result = Perplexity { context, ..result? };
    if args.json {
        output::json(&result)
    } else {
        output::line(&format!("perplexity {:.4} over {} tokens of {} chunks", result.ppl, result.tokens, result.chunks))
    }
}

/// The whole text, which must be UTF-8.
pub(super) fn read_text(path: &Path) -> Outcome<String> {
    if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).context("failed to read the text from standard input").bad_input()?;
        return Ok(text);
    }
    let bytes = std::fs::read(path).with_context(|| format!("failed to read text file {}", path.display())).bad_input()?;
    String::from_utf8(bytes).with_context(|| format!("text file {} is not UTF-8", path.display())).bad_input()
}

/// Whole chunks of `context` ids, each beginning with the beginning token.
pub(super) fn chunks(tokenizer: &Tokenizer, text: &str, context: usize, most: Option<usize>) -> Outcome<Vec<Vec<TokenId>>> {
    let bos = tokenizer.bos().ok_or_else(|| bad_input!("the model's tokenizer has no beginning token, perplexity needs one"))?;
    cut(Some(bos), tokenizer.encode(text, false).bad_input()?, context, most)
}

/// Whole chunks of `context` of the ids of a text, each beginning with the beginning token, where there is one.
pub(crate) fn cut(bos: Option<TokenId>, text: Vec<TokenId>, context: usize, most: Option<usize>) -> Outcome<Vec<Vec<TokenId>>> {
    let ids: Vec<TokenId> = bos.into_iter().chain(text).collect();
    let mut chunks: Vec<Vec<TokenId>> = ids.chunks_exact(context).take(most.unwrap_or(usize::MAX)).map(<[TokenId]>::to_vec).collect();
    if chunks.is_empty() {
        return Err(bad_input!("the text has {} tokens, expected at least one chunk of {context}", ids.len()));
    }
    for (chunk, bos) in chunks.iter_mut().zip(bos.into_iter().cycle()) {
        chunk[0] = bos;
    }
    Ok(chunks)
}

/// Scores the second half of each chunk.
async fn score(global: &Global, loaded: &Loaded, chunks: &[Vec<TokenId>], most: usize) -> Outcome<Perplexity> {
    let context = chunks[0].len();
    let blocks = Blocks::new(&loaded.plan.kv, 1, context, most).bad_input()?;
    let mut drive = Drive::open(loaded.replica.as_ref()).await?;
    let bar = output::bar(global.quiet, "Scoring", chunks.len() as u64, Unit::Items);
    let (mut sum, mut tokens) = (0.0, 0);
    for (number, ids) in chunks.iter().enumerate() {
        for first in (0..context).step_by(most) {
            let step = scored_step(&blocks, ids, number, first, most, |target| WantKind::Score { target, top: 0 });
            for output in drive.run(step).await? {
                sum += loss(output.value).with_context(|| format!("chunk {number} position {}", output.position))?;
                tokens += 1;
            }
        }
        bar.inc(1);
        bar.set_message(format!("perplexity {:.4}", (sum / tokens as f64).exp()));
    }
    bar.finish_and_clear();
    let expected = chunks.len() * (context - context / 2 - 1);
    if tokens != expected {
        return Err(anyhow::anyhow!("{tokens} scores came, expected {expected}").into());
    }
    Ok(Perplexity { ppl: (sum / tokens as f64).exp(), tokens, chunks: chunks.len(), context })
}

/// The step that feeds at most `most` ids of chunk `number` from `first` on, and wants `kind` of the scored ids among those that follow.
pub(crate) fn scored_step(
    blocks: &Blocks,
    ids: &[TokenId],
    number: usize,
    first: usize,
    most: usize,
    kind: impl Fn(TokenId) -> WantKind,
) -> Step {
    let part = &ids[first..ids.len().min(first + most)];
    let sequence = number as u64 + 1;
    Step {
        frees: if first == 0 && number > 0 { vec![sequence - 1] } else { Vec::new() },
        sequences: vec![SequenceStep {
            sequence,
            first_position: first as u32,
            input: Input::Ids(part.to_vec()),
            tables: blocks.changes(0, first, part.len()),
            wants: wants(ids, first, part.len(), kind),
            begin: None,
            adapter: 0,
            second: 0,
        }],
        ..Step::default()
    }
}

/// What is wanted at positions `context / 2 .. context − 1`, as far as they lie in `first .. first + tokens`.
fn wants(ids: &[TokenId], first: usize, tokens: usize, kind: impl Fn(TokenId) -> WantKind) -> Vec<Want> {
    (first.max(ids.len() / 2)..(first + tokens).min(ids.len() - 1))
        .map(|at| Want { offset: (at - first) as u32, kind: kind(ids[at + 1]) })
        .collect()
}

/// The loss an output says.
fn loss(value: OutputValue) -> anyhow::Result<f64> {
    match value {
        OutputValue::Score(score) => Ok(-f64::from(score.token)),
        OutputValue::Failed(reason) => bail!("the engine failed: {reason}"),
        _ => bail!("something other than a score came"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_half_is_scored_whatever_the_chunking() {
        let ids: Vec<TokenId> = (0..512).collect();
        let score = |target| WantKind::Score { target, top: 0 };
        let whole = wants(&ids, 0, 512, score);
        assert_eq!(whole.len(), 255);
        assert_eq!(whole[0], Want { offset: 256, kind: WantKind::Score { target: 257, top: 0 } });
        assert_eq!(whole[254], Want { offset: 510, kind: WantKind::Score { target: 511, top: 0 } });
        for most in [1, 7, 64, 300] {
            let positions: Vec<u32> = (0..512)
                .step_by(most)
                .flat_map(|first| wants(&ids, first, most.min(512 - first), score).into_iter().map(move |w| w.offset + first as u32))
                .collect();
            assert_eq!(positions, (256..511).collect::<Vec<u32>>(), "{most}");
        }
    }
}
