//! Checks a step against the plan and the steps before it, before anything of it is applied.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use plan::{
    model::ModelConfig,
    shard::{BLOCK_TOKENS, KvGeometry},
    step::{Input, Pooling, SequenceStep, Step, TokenId, WantKind},
};

use crate::{
    Adapter, InvalidStep,
    sequences::{HOLE, Sequence, Sequences, entries_needed},
};

/// What steps are checked against.
pub(crate) struct Limits<'a> {
    pub(crate) config: &'a ModelConfig,
    pub(crate) kv: &'a KvGeometry,
    /// Adapters by slot.
    pub(crate) adapters: &'a HashMap<u32, Arc<Adapter>>,
    pub(crate) max_batch_tokens: usize,
    pub(crate) max_context: usize,
    /// Id of the last step.
    pub(crate) last_step: u64,
    /// Hidden values that came from the stage before.
    pub(crate) hidden: usize,
    /// Whether this is the first stage, which needs ids and no hidden values.
    pub(crate) first: bool,
    /// Whether this rank samples: it needs ids too, and settings where samples are wanted.
    pub(crate) samples: bool,
    /// Whether this is the last stage.
    pub(crate) last: bool,
}

/// Checks a step.
pub(crate) fn check(limits: &Limits<'_>, step: &Step, sequences: &Sequences) -> Result<(), InvalidStep> {
    if step.id <= limits.last_step {
        return Err(InvalidStep::Order { got: step.id, last: limits.last_step });
    }
    // Counted apart from any allocation, since every input is in memory already.
    let tokens = step.tokens();
    if tokens > limits.max_batch_tokens {
        return Err(InvalidStep::Tokens { got: tokens, max: limits.max_batch_tokens });
    }
    let expected = if limits.first { 0 } else { tokens * limits.config.hidden };
    if limits.hidden != expected {
        return Err(InvalidStep::Hidden { got: limits.hidden, expected });
    }
    for copy in &step.copies {
        let group = check_group(limits.kv, copy.group)?;
        check_block(limits.kv, group, copy.from)?;
        check_block(limits.kv, group, copy.to)?;
    }
    let mut seen = HashSet::with_capacity(step.sequences.len());
    for part in &step.sequences {
        if !seen.insert(part.sequence) {
            return Err(InvalidStep::Twice { sequence: part.sequence });
        }
        let known = sequences.by_id.get(&part.sequence).filter(|_| !step.frees.contains(&part.sequence));
        check_position(limits, part, known)?;
        check_ids(limits, part)?;
        check_tables(limits, part, known)?;
        check_kind(limits, part)?;
        check_wants(limits, part, known.is_some() && sequences.histories.contains_key(&part.sequence))?;
    }
    Ok(())
}

fn check_position(limits: &Limits<'_>, part: &SequenceStep, known: Option<&Sequence>) -> Result<(), InvalidStep> {
    let SequenceStep { sequence, first_position, adapter, .. } = *part;
    if adapter != 0 && !limits.adapters.contains_key(&adapter) {
        return Err(InvalidStep::Adapter { sequence, adapter });
    }
    if let Some(before) = known.map(|known| known.adapter).filter(|before| *before != adapter) {
        return Err(InvalidStep::OtherAdapter { sequence, adapter, before });
    }
    if part.input.is_empty() {
        return Err(InvalidStep::Empty { sequence });
    }
    match known {
        Some(known) if first_position as usize > known.fed => {
            return Err(InvalidStep::Position { sequence, got: first_position, fed: known.fed as u32 });
        }
        None if part.begin.is_none() && first_position > 0 => {
            return Err(InvalidStep::UnknownSequence { sequence, position: first_position });
        }
        _ => {}
    }
    if let Some(begin) = &part.begin
        && begin.ids.len() < first_position as usize
    {
        return Err(InvalidStep::ShortHistory { sequence, position: first_position, got: begin.ids.len() });
    }
    let end = (first_position as usize).saturating_add(part.input.len());
    if end > limits.max_context {
        return Err(InvalidStep::Context { sequence, got: end, max: limits.max_context });
    }
    Ok(())
}

fn check_ids(limits: &Limits<'_>, part: &SequenceStep) -> Result<(), InvalidStep> {
    let (sequence, vocab) = (part.sequence, limits.config.vocab);
    let check = |ids: &[TokenId]| match ids.iter().find(|&&id| id as usize >= vocab) {
        Some(&id) => Err(InvalidStep::Id { sequence, id, vocab }),
        None => Ok(()),
    };
    match &part.input {
        Input::Ids(ids) => check(ids)?,
        Input::Sampled { step, .. } if limits.first || limits.samples => {
            return Err(InvalidStep::Unresolved { sequence, step: *step });
        }
        Input::Sampled { drafts, .. } => check(drafts)?,
    }
    if let Some(begin) = &part.begin {
        check(&begin.ids)?;
        check(&begin.sampling.suppress)?;
        begin.sampling.logit_bias.iter().try_for_each(|(id, _)| check(&[*id]))?;
    }
    for want in &part.wants {
        if let WantKind::Score { target, .. } = want.kind {
            check(&[target])?;
        }
    }
    Ok(())
}

fn check_tables(limits: &Limits<'_>, part: &SequenceStep, known: Option<&Sequence>) -> Result<(), InvalidStep> {
    let sequence = part.sequence;
    let max = limits.max_context.div_ceil(BLOCK_TOKENS);
    for change in &part.tables {
        let group = check_group(limits.kv, change.group)?;
        let end = (change.first as usize).saturating_add(change.blocks.len());
        if end > max {
            return Err(InvalidStep::Entry { sequence, got: end - 1, max });
        }
        for &block in &change.blocks {
            check_block(limits.kv, group, block)?;
        }
    }
    let first = part.first_position as usize;
    for (group, geometry) in limits.kv.groups.iter().enumerate() {
        let table = known.and_then(|k| k.tables.get(group)).map_or(&[][..], Vec::as_slice);
        let set_now = |entry: usize| {
            part.tables.iter().any(|c| c.group as usize == group && (c.first as usize..c.first as usize + c.blocks.len()).contains(&entry))
        };
        for entry in entries_needed(geometry.window, first, part.input.len()) {
            if table.get(entry).is_none_or(|&block| block == HOLE) && !set_now(entry) {
                let from = geometry.window.map_or(0, |w| (first + 1).saturating_sub(w as usize));
                return Err(InvalidStep::Hole { sequence, group, position: from.max(entry * BLOCK_TOKENS) });
            }
        }
    }
    Ok(())
}

/// Encoders read whole sequences and give vectors, decoders whatever is not of a whole sequence.
fn check_kind(limits: &Limits<'_>, part: &SequenceStep) -> Result<(), InvalidStep> {
    let (sequence, encoder) = (part.sequence, limits.config.encoder);
    let unsuited = |got, expected| Err(InvalidStep::Unsuited { sequence, got, expected });
    for want in &part.wants {
        match (&want.kind, encoder) {
            (WantKind::Pooled(pooled), _) if pooled.dimensions as usize > limits.config.hidden => {
                return Err(InvalidStep::Dimensions { sequence, got: pooled.dimensions, width: limits.config.hidden });
            }
            (WantKind::Pooled(pooled), None) if pooled.over != Pooling::Token => {
                return unsuited("a vector of its whole input", "one of a token, which is what a decoder gives");
            }
            (WantKind::Classes, None) => return unsuited("labels", "no labels of a decoder"),
            (WantKind::Classes, Some(e)) if e.classifier.is_none() => return unsuited("labels", "none of a model that does not classify"),
            (WantKind::Sample | WantKind::Score { .. } | WantKind::Logits, Some(_)) => {
                return unsuited("tokens or logits", "vectors, which is what an encoder gives");
            }
            _ => {}
        }
    }
    let Some(encoder) = encoder else {
        return if part.second == 0 { Ok(()) } else { unsuited("a second text", "one text, for a decoder has no token types") };
    };
    if part.second > 0 && (encoder.token_types < 2 || part.second as usize >= part.input.len()) {
        return unsuited("a second text", "one within its input, of a model with token types");
    }
    if part.first_position > 0 || part.begin.is_some() || matches!(part.input, Input::Sampled { .. }) {
        return unsuited("a position, settings or a drawn token", "its whole input at once, which is what an encoder takes");
    }
    Ok(())
}

/// `begun`: settings came in an earlier step.
fn check_wants(limits: &Limits<'_>, part: &SequenceStep, begun: bool) -> Result<(), InvalidStep> {
    let (sequence, tokens) = (part.sequence, part.input.len());
    let mut least = 0;
    for want in &part.wants {
        if want.offset < least || want.offset as usize >= tokens {
            return Err(InvalidStep::Want { sequence, offset: want.offset, tokens });
        }
        least = want.offset;
        if limits.last && want.kind == WantKind::Sample && part.begin.is_none() && !begun {
            return Err(InvalidStep::NoSampling { sequence });
        }
    }
    Ok(())
}

fn check_group(kv: &KvGeometry, group: u32) -> Result<usize, InvalidStep> {
    let groups = kv.groups.len();
    if (group as usize) < groups { Ok(group as usize) } else { Err(InvalidStep::Group { got: group, groups }) }
}

fn check_block(kv: &KvGeometry, group: usize, block: u32) -> Result<(), InvalidStep> {
    let blocks = kv.groups[group].blocks;
    if (block as usize) < blocks { Ok(()) } else { Err(InvalidStep::Block { group, block, blocks }) }
}
