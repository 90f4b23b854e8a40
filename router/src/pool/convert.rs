//! Sequences and their events between the scheduler's types and the wire.

use std::sync::Arc;

use plan::step::TokenId;
use proto::{
    convert::{
        ConvertError, decode_logprobs, decode_output, decode_sampling, decode_wants, encode_logprobs, encode_output, encode_sampling,
        encode_want,
    },
    fleet::AdapterState,
    pool::{self as wire, event::Kind},
    worker,
};

use super::announced::Announcement;
use crate::{
    edge::FinishReason,
    fleet::Presence,
    grammar::{Constraint, GrammarSource},
    replica::owner::{PrefixDelta, SequenceEvent},
    scheduler::{BlockHash, EventKind, Submission},
};

/// Bytes of a block's hash.
const HASH: usize = 16;

pub(super) fn encode_submission(ticket: u64, replica: &str, submission: &Submission) -> wire::Submit {
    wire::Submit {
        ticket,
        replica: replica.to_owned(),
        prompt: submission.prompt.to_vec(),
        emitted: submission.emitted.clone(),
        sampling: Some(encode_sampling(&submission.sampling)),
        max_tokens: submission.max_tokens,
        end_ids: submission.end_ids.to_vec(),
        score_prompt: submission.score_prompt,
        wants: submission.wants.iter().map(encode_want).collect(),
        logits: submission.logits,
        chunk: submission.chunk.map(|chunk| u32::try_from(chunk).unwrap_or(u32::MAX)),
        adapter: submission.adapter.to_string(),
        salt: submission.salt.clone(),
        second: submission.second,
        constraint: submission.constraint.as_ref().map(|constraint| encode_constraint(&constraint.source)),
    }
}

pub(super) fn decode_submission(submit: wire::Submit) -> Result<Submission, ConvertError> {
    let missing = |field: &str| ConvertError::Missing { field: format!("submit.{field}") };
    if submit.prompt.is_empty() {
        return Err(missing("prompt"));
    }
    Ok(Submission {
        wants: decode_wants(submit.wants, submit.prompt.len())?.into(),
        prompt: submit.prompt.into(),
        emitted: submit.emitted,
        sampling: decode_sampling(submit.sampling.ok_or_else(|| missing("sampling"))?)?,
        max_tokens: submit.max_tokens,
        end_ids: submit.end_ids.into(),
        score_prompt: submit.score_prompt,
        logits: submit.logits,
        chunk: submit.chunk.map(|chunk| chunk as usize),
        adapter: submit.adapter.into(),
        salt: submit.salt,
        second: submit.second,
        constraint: submit.constraint.map(decode_constraint).transpose()?,
    })
}

fn encode_constraint(source: &GrammarSource) -> wire::Constraint {
    let source = match source {
        GrammarSource::JsonSchema(text) => wire::constraint::Source::JsonSchema(text.clone()),
        GrammarSource::Regex(text) => wire::constraint::Source::Regex(text.clone()),
    };
    wire::Constraint { source: Some(source) }
}

fn decode_constraint(constraint: wire::Constraint) -> Result<Constraint, ConvertError> {
    let missing = || ConvertError::Missing { field: "submit.constraint.source".to_owned() };
    let source = match constraint.source.ok_or_else(missing)? {
        wire::constraint::Source::JsonSchema(text) => GrammarSource::JsonSchema(text),
        wire::constraint::Source::Regex(text) => GrammarSource::Regex(text),
    };
    Ok(Constraint { source: Arc::new(source), grammar: None })
}

/// How an adapter is doing on a replica.
pub(crate) fn encode_presence((numerics, presence): (String, Presence)) -> AdapterState {
    let (ready, failure) = presence.said();
    AdapterState { numerics, ready, failure: failure.unwrap_or_default() }
}

pub(super) fn encode_event(ticket: u64, kind: &EventKind) -> wire::Event {
    let kind = match kind {
        EventKind::Started => Kind::Started(wire::event::Started {}),
        EventKind::Prompt { cached_tokens, scores } => {
            Kind::Prompt(wire::event::Prompt { cached_tokens: *cached_tokens, scores: scores.iter().map(encode_logprobs).collect() })
        }
        EventKind::Token { id, logprobs } => Kind::Token(worker::Token { id: *id, logprobs: logprobs.as_ref().map(encode_logprobs) }),
        EventKind::Output(output) => Kind::Output(encode_output(output)),
        EventKind::Finished(reason) => Kind::Finished(wire::event::Finished { length: *reason == FinishReason::Length }),
        EventKind::Failed(message) => Kind::Failed(message.clone()),
    };
    wire::Event { ticket, kind: Some(kind) }
}

pub(super) fn released(ticket: u64) -> wire::Event {
    wire::Event { ticket, kind: Some(Kind::Released(wire::event::Released {})) }
}

pub(super) fn decode_event(event: wire::Event) -> Result<SequenceEvent, ConvertError> {
    let kind = match event.kind.ok_or_else(|| ConvertError::Missing { field: "event.kind".to_owned() })? {
        Kind::Started(_) => EventKind::Started,
        Kind::Prompt(prompt) => {
            let scores = prompt.scores.into_iter().map(decode_logprobs).collect::<Result<_, _>>()?;
            EventKind::Prompt { cached_tokens: prompt.cached_tokens, scores }
        }
        Kind::Token(worker::Token { id, logprobs }) => {
            EventKind::Token { id: TokenId::from(id), logprobs: logprobs.map(decode_logprobs).transpose()? }
        }
        Kind::Output(output) => EventKind::Output(decode_output(output)?),
        Kind::Finished(end) => EventKind::Finished(if end.length { FinishReason::Length } else { FinishReason::Stop }),
        Kind::Failed(message) => EventKind::Failed(message),
        Kind::Released(_) => return Ok(SequenceEvent::Released),
    };
    Ok(SequenceEvent::Happened(kind))
}

pub(super) fn encode_prefixes(replica: &str, delta: &PrefixDelta) -> wire::Prefixes {
    let hashes = |list: &[BlockHash]| list.iter().flat_map(|h| h.0.to_le_bytes()).collect();
    wire::Prefixes { replica: replica.to_owned(), reset: delta.reset, added: hashes(&delta.added), removed: hashes(&delta.removed) }
}

pub(super) fn decode_prefixes(prefixes: &wire::Prefixes) -> Result<PrefixDelta, ConvertError> {
    let hashes = |bytes: &[u8], field: &str| {
        let (whole, rest) = bytes.as_chunks::<HASH>();
        if rest.is_empty() {
            return Ok(whole.iter().map(|h| BlockHash(u128::from_le_bytes(*h))).collect());
        }
        let (field, got) = (format!("prefixes.{field}"), format!("{} bytes long", bytes.len()));
        Err(ConvertError::Value { field, got, expected: "a multiple of 16 bytes" })
    };
    Ok(PrefixDelta { reset: prefixes.reset, added: hashes(&prefixes.added, "added")?, removed: hashes(&prefixes.removed, "removed")? })
}

pub(super) fn encode_announcement(a: &Announcement) -> wire::Announcement {
    wire::Announcement {
        replica: a.replica.clone(),
        stage: a.stage as u32,
        rank: a.rank as u32,
        revision: a.revision.clone().unwrap_or_default(),
        address: a.address.clone(),
        incarnation: a.incarnation,
    }
}

pub(super) fn decode_announcement(a: wire::Announcement) -> Announcement {
    Announcement {
        replica: a.replica,
        stage: a.stage as usize,
        rank: a.rank as usize,
        revision: Some(a.revision).filter(|revision| !revision.is_empty()),
        address: a.address,
        incarnation: a.incarnation,
    }
}
