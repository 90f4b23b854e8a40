//! Steps and masks.

use plan::{
    step::{Begin, BlockCopy, Input, Mask, Pooled, Pooling, Sampling, SequenceId, SequenceStep, Step, TableChange, Want, WantKind},
    worker::Epoch,
};

use super::{ConvertError, encode_epoch};
use crate::worker::{
    self as wire,
    want::{Classes, Kind, Logits, Sample, Score, pooled::Over},
};

/// A step of `epoch` as it crosses the wire, without its masks: see [`encode_mask`].
pub fn encode_step(epoch: Epoch, step: &Step) -> wire::Step {
    wire::Step {
        epoch: Some(encode_epoch(epoch)),
        id: step.id,
        frees: step.frees.clone(),
        copies: step.copies.iter().map(|c| wire::BlockCopy { group: c.group, from: c.from, to: c.to }).collect(),
        sequences: step.sequences.iter().map(encode_sequence).collect(),
    }
}

/// A step from the wire; its epoch is the caller's to check.
///
/// # Errors
/// If a field is missing, an input empty, a want's offset past its input or before the previous one, or a sampling parameter out of its range.
pub fn decode_step(step: wire::Step) -> Result<Step, ConvertError> {
    if step.id == 0 {
        return Err(ConvertError::value("step.id", 0, "1 or more"));
    }
    let sequences = step.sequences.into_iter().enumerate();
    let sequences = sequences.map(|(i, s)| decode_sequence(s).map_err(|e| e.within(format_args!("step.sequences[{i}]"))));
    Ok(Step {
        id: step.id,
        frees: step.frees,
        copies: step.copies.iter().map(|c| BlockCopy { group: c.group, from: c.from, to: c.to }).collect(),
        sequences: sequences.collect::<Result<_, _>>()?,
        masks: Vec::new(),
    })
}

fn encode_sequence(sequence: &SequenceStep) -> wire::SequenceStep {
    let input = match &sequence.input {
        Input::Ids(ids) => wire::sequence_step::Input::Ids(wire::Ids { ids: ids.clone() }),
        Input::Sampled { step, drafts } => wire::sequence_step::Input::Sampled(wire::SampledInput { step: *step, drafts: drafts.clone() }),
    };
    let table = |t: &TableChange| wire::TableChange { group: t.group, first: t.first, blocks: t.blocks.clone() };
    wire::SequenceStep {
        sequence: sequence.sequence,
        first_position: sequence.first_position,
        input: Some(input),
        tables: sequence.tables.iter().map(table).collect(),
        wants: sequence.wants.iter().map(encode_want).collect(),
        begin: sequence.begin.as_deref().map(encode_begin),
        adapter: sequence.adapter,
        second: sequence.second,
    }
}

/// A want as it crosses the wire.
pub fn encode_want(want: &Want) -> wire::Want {
    let kind = match want.kind {
        WantKind::Sample => Kind::Sample(Sample {}),
        WantKind::Score { target, top } => Kind::Score(Score { target, top }),
        WantKind::Logits => Kind::Logits(Logits {}),
        WantKind::Pooled(pooled) => Kind::Pooled(wire::want::Pooled {
            over: match pooled.over {
                Pooling::Token => Over::Token,
                Pooling::First => Over::First,
                Pooling::Mean => Over::Mean,
            }
            .into(),
            dimensions: pooled.dimensions,
            normalize: pooled.normalize,
        }),
        WantKind::Classes => Kind::Classes(Classes {}),
    };
    wire::Want { offset: want.offset, kind: Some(kind) }
}

/// Wants from the wire, of an input of `input` tokens.
///
/// # Errors
/// If one is of no kind, past the input, or before the one before it.
pub fn decode_wants(wants: Vec<wire::Want>, input: usize) -> Result<Vec<Want>, ConvertError> {
    let mut decoded = Vec::with_capacity(wants.len());
    let mut least = 0;
    for (i, want) in wants.into_iter().enumerate() {
        let offset = want.offset;
        if offset as usize >= input {
            return Err(ConvertError::value(format!("wants[{i}].offset"), offset, "an offset within the input"));
        }
        if offset < least {
            return Err(ConvertError::value(format!("wants[{i}].offset"), offset, "offsets that ascend"));
        }
        least = offset;
        let kind = match want.kind.ok_or_else(|| ConvertError::missing(format!("wants[{i}].kind")))? {
            Kind::Sample(_) => WantKind::Sample,
            Kind::Score(score) => WantKind::Score { target: score.target, top: score.top },
            Kind::Logits(_) => WantKind::Logits,
            Kind::Pooled(pooled) => WantKind::Pooled(Pooled {
                over: match Over::try_from(pooled.over) {
                    Ok(Over::Token) => Pooling::Token,
                    Ok(Over::First) => Pooling::First,
                    Ok(Over::Mean) => Pooling::Mean,
                    Err(_) => return Err(ConvertError::value(format!("wants[{i}].pooled.over"), pooled.over, "0, 1 or 2")),
                },
                dimensions: pooled.dimensions,
                normalize: pooled.normalize,
            }),
            Kind::Classes(_) => WantKind::Classes,
        };
        decoded.push(Want { offset, kind });
    }
    Ok(decoded)
}

fn decode_sequence(sequence: wire::SequenceStep) -> Result<SequenceStep, ConvertError> {
    let input = match sequence.input.ok_or_else(|| ConvertError::missing("input"))? {
        wire::sequence_step::Input::Ids(ids) => Input::Ids(ids.ids),
        wire::sequence_step::Input::Sampled(sampled) => Input::Sampled { step: sampled.step, drafts: sampled.drafts },
    };
    if input.is_empty() {
        return Err(ConvertError::value("input.ids", "empty", "at least one id"));
    }
    let wants = decode_wants(sequence.wants, input.len())?;
    let table = |t: wire::TableChange| TableChange { group: t.group, first: t.first, blocks: t.blocks };
    let begin = sequence.begin.map(decode_begin).transpose().map_err(|e| e.within("begin"))?;
    Ok(SequenceStep {
        sequence: sequence.sequence,
        first_position: sequence.first_position,
        input,
        tables: sequence.tables.into_iter().map(table).collect(),
        wants,
        begin: begin.map(Box::new),
        adapter: sequence.adapter,
        second: sequence.second,
    })
}

fn encode_begin(begin: &Begin) -> wire::Begin {
    wire::Begin { ids: begin.ids.clone(), prompt_len: begin.prompt_len, sampling: Some(encode_sampling(&begin.sampling)) }
}

/// Sampling settings as they cross the wire.
pub fn encode_sampling(s: &Sampling) -> wire::Sampling {
    wire::Sampling {
        temperature: s.temperature,
        top_k: s.top_k,
        top_p: s.top_p,
        min_p: s.min_p,
        repetition_penalty: s.repetition_penalty,
        presence_penalty: s.presence_penalty,
        frequency_penalty: s.frequency_penalty,
        logit_bias: s.logit_bias.iter().map(|&(id, bias)| wire::LogitBias { id, bias }).collect(),
        suppress: s.suppress.clone(),
        min_tokens: s.min_tokens,
        seed: s.seed,
        choice: s.choice,
        logprobs: s.logprobs,
        masked: s.masked,
    }
}

fn decode_begin(begin: wire::Begin) -> Result<Begin, ConvertError> {
    if begin.prompt_len as usize > begin.ids.len() {
        return Err(ConvertError::value("prompt_len", begin.prompt_len, "at most the number of ids"));
    }
    let sampling = decode_sampling(begin.sampling.ok_or_else(|| ConvertError::missing("sampling"))?).map_err(|e| e.within("sampling"))?;
    Ok(Begin { ids: begin.ids, prompt_len: begin.prompt_len, sampling })
}

/// Sampling settings from the wire.
///
/// # Errors
/// If one is out of its range, or the biases are not in the order of their ids.
pub fn decode_sampling(s: wire::Sampling) -> Result<Sampling, ConvertError> {
    let checked = |field: &'static str, value: f32, ok: fn(f32) -> bool, expected: &'static str| {
        if value.is_finite() && ok(value) { Ok(value) } else { Err(ConvertError::value(field, value, expected)) }
    };
    let any = |_: f32| true;
    let fraction = |v: f32| (0.0..=1.0).contains(&v);
    let mut logit_bias = Vec::with_capacity(s.logit_bias.len());
    for bias in s.logit_bias {
        // −∞ forbids an id.
        if bias.bias.is_nan() || bias.bias == f32::INFINITY {
            return Err(ConvertError::value(format!("logit_bias[id {}]", bias.id), bias.bias, "a finite number or -inf"));
        }
        if logit_bias.last().is_some_and(|&(id, _)| id >= bias.id) {
            return Err(ConvertError::value("logit_bias", format!("id {} out of order", bias.id), "ids that ascend"));
        }
        logit_bias.push((bias.id, bias.bias));
    }
    Ok(Sampling {
        temperature: checked("temperature", s.temperature, |v| v >= 0.0, "a finite number, 0 or more")?,
        top_k: s.top_k,
        top_p: checked("top_p", s.top_p, fraction, "a number from 0 to 1")?,
        min_p: checked("min_p", s.min_p, fraction, "a number from 0 to 1")?,
        repetition_penalty: checked("repetition_penalty", s.repetition_penalty, |v| v > 0.0, "a finite number above 0")?,
        presence_penalty: checked("presence_penalty", s.presence_penalty, any, "a finite number")?,
        frequency_penalty: checked("frequency_penalty", s.frequency_penalty, any, "a finite number")?,
        logit_bias,
        suppress: s.suppress,
        min_tokens: s.min_tokens,
        seed: s.seed,
        choice: s.choice,
        logprobs: s.logprobs,
        masked: s.masked,
    })
}

/// The mask of a sequence's draw in a step, as it crosses the wire.
pub fn encode_mask(epoch: Epoch, step: u64, sequence: SequenceId, mask: &Mask) -> wire::MaskUpdate {
    let mask = match mask {
        Mask::Unchanged => wire::mask_update::Mask::Unchanged(true),
        Mask::Ids(ids) => wire::mask_update::Mask::Ids(wire::Ids { ids: ids.clone() }),
        Mask::Bits(bits) => wire::mask_update::Mask::Bits(bits.clone()),
    };
    wire::MaskUpdate { epoch: Some(encode_epoch(epoch)), step, sequence, mask: Some(mask) }
}

/// A mask from the wire: (step, sequence, mask); its epoch is the caller's to check.
///
/// # Errors
/// If the mask is missing, or its ids do not ascend.
pub fn decode_mask(update: wire::MaskUpdate) -> Result<(u64, SequenceId, Mask), ConvertError> {
    let mask = match update.mask.ok_or_else(|| ConvertError::missing("mask.mask"))? {
        wire::mask_update::Mask::Unchanged(true) => Mask::Unchanged,
        wire::mask_update::Mask::Unchanged(false) => return Err(ConvertError::value("mask.unchanged", false, "true")),
        wire::mask_update::Mask::Ids(ids) if ids.ids.is_sorted_by(|a, b| a < b) => Mask::Ids(ids.ids),
        wire::mask_update::Mask::Ids(_) => return Err(ConvertError::value("mask.ids", "out of order", "ids that ascend")),
        wire::mask_update::Mask::Bits(bits) => Mask::Bits(bits),
    };
    Ok((update.step, update.sequence, mask))
}
