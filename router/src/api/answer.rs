//! Answers of both dialects: one JSON object, or the chunks of a stream.

use std::sync::Arc;

use bytes::{BufMut, BytesMut};
use plan::step::TokenId;
use serde::Serialize;
use serde_json::{Value, json};

use super::error::ApiError;
use super::models::unix_seconds;
use super::parameters::Streaming;
use super::request::Dialect;
use super::run::{Delta, Run, Shown, Usage};
use crate::edge::FinishReason;
use crate::encode::Tokenizer;

/// Writes what a run says in the form its request expects.
pub(crate) struct Answer {
    dialect: Dialect,
    id: String,
    created: u64,
    model: String,
    /// A chunk's JSON up to its choices, which is the same in every chunk.
    head: String,
    logprobs: Option<u32>,
    include_usage: bool,
    tokenizer: Arc<Tokenizer>,
}

#[derive(Serialize)]
struct TextChoice<'a> {
    index: usize,
    text: &'a str,
    logprobs: Option<Value>,
    finish_reason: Option<&'static str>,
}

#[derive(Serialize)]
struct ChatChoice<'a> {
    index: usize,
    delta: ChatDelta<'a>,
    logprobs: Option<Value>,
    finish_reason: Option<&'static str>,
}

#[derive(Serialize)]
struct ChatDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

/// The name of a finish reason in both dialects.
pub(crate) fn finish_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

/// Below what JSON and clients take for a log-probability; stands for minus infinity.
const LEAST_LOGPROB: f32 = -9999.0;

impl Answer {
    pub(crate) fn new(dialect: Dialect, id: &str, model: String, run: &Run, logprobs: Option<u32>, streaming: Streaming) -> Self {
        let (prefix, object) = if dialect == Dialect::Chat { ("chatcmpl-", "chat.completion.chunk") } else { ("cmpl-", "text_completion") };
        let (id, created) = (format!("{prefix}{id}"), unix_seconds());
        let mut head = json!({"id": id, "object": object, "created": created, "model": model}).to_string();
        head.pop();
        head.push_str(",\"choices\":");
        Self {
            dialect,
            id,
            created,
            model,
            head,
            logprobs,
            include_usage: streaming.include_usage,
            tokenizer: Arc::clone(&run.model().tokenizer),
        }
    }

    /// The chunks that open a stream.
    pub(crate) fn opening(&self, choices: usize) -> Vec<String> {
        if self.dialect == Dialect::Completions {
            return Vec::new();
        }
        let delta = || ChatDelta { role: Some("assistant"), content: Some("") };
        let chunk = |index| {
            let mut out = BytesMut::new();
            self.chunk(&[ChatChoice { index, delta: delta(), logprobs: None, finish_reason: None }], &mut out);
            text(&out)
        };
        (0..choices).map(chunk).collect()
    }

    /// The chunk for a delta, as text.
    pub(crate) fn delta_text(&self, delta: &Delta) -> String {
        let mut out = BytesMut::new();
        self.delta(delta, &mut out);
        text(&out)
    }

    /// Writes the chunk for a delta behind what is in `out`.
    pub(crate) fn delta(&self, delta: &Delta, out: &mut BytesMut) {
        let (index, logprobs, finish_reason) = (delta.choice, self.logprobs(&delta.tokens), delta.finish.map(finish_name));
        match self.dialect {
            Dialect::Completions => self.chunk(&[TextChoice { index, text: &delta.text, logprobs, finish_reason }], out),
            Dialect::Chat => {
                let content = (!delta.text.is_empty() || finish_reason.is_none()).then_some(delta.text.as_str());
                self.chunk(&[ChatChoice { index, delta: ChatDelta { role: None, content }, logprobs, finish_reason }], out);
            }
        }
    }

    /// The chunk that closes a stream, where the request asked for the usage.
    pub(crate) fn closing(&self, usage: Usage) -> Option<String> {
        self.include_usage.then(|| format!("{}[],\"usage\":{}}}", self.head, usage_object(usage)))
    }

    /// The whole answer.
    pub(crate) async fn collect(&self, run: &mut Run) -> Result<Value, ApiError> {
        let mut choices: Vec<Delta> = (0..run.choices()).map(|choice| Delta { choice, ..Delta::default() }).collect();
        while let Some(delta) = run.next().await {
            let delta = delta?;
            let choice = &mut choices[delta.choice];
            choice.text.push_str(&delta.text);
            choice.tokens.extend(delta.tokens);
            choice.finish = delta.finish.or(choice.finish);
        }
        let choices = choices.iter().map(|c| {
            let (logprobs, finish) = (self.logprobs(&c.tokens), c.finish.map(finish_name));
            match self.dialect {
                Dialect::Completions => json!({"index": c.choice, "text": c.text, "logprobs": logprobs, "finish_reason": finish}),
                Dialect::Chat => json!({
                    "index": c.choice, "message": {"role": "assistant", "content": c.text, "refusal": null},
                    "logprobs": logprobs, "finish_reason": finish,
                }),
            }
        });
        let object = if self.dialect == Dialect::Chat { "chat.completion" } else { "text_completion" };
        Ok(json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model,
            "choices": choices.collect::<Vec<_>>(), "usage": usage_object(run.usage()),
        }))
    }

    fn chunk<C: Serialize>(&self, choices: &[C], out: &mut BytesMut) {
        out.extend_from_slice(self.head.as_bytes());
        // Strings, numbers and maps with string keys, into memory: cannot fail.
        let _ = serde_json::to_writer((&mut *out).writer(), choices);
        out.extend_from_slice(if self.include_usage { b",\"usage\":null}" } else { b"}" });
    }

    fn logprobs(&self, tokens: &[Shown]) -> Option<Value> {
        let top = self.logprobs? as usize;
        Some(match self.dialect {
            Dialect::Completions => self.text_logprobs(tokens, top),
            Dialect::Chat => {
                let entry = |id: TokenId, logprob: f32| {
                    let piece = self.tokenizer.piece(id);
                    json!({"token": self.name(id), "logprob": logprob.max(LEAST_LOGPROB), "bytes": piece})
                };
                let content = tokens.iter().filter_map(|t| {
                    let logprobs = t.logprobs.as_ref()?;
                    let mut object = entry(t.id, logprobs.token);
                    object["top_logprobs"] = logprobs.top.iter().take(top).map(|&(id, l)| entry(id, l)).collect();
                    Some(object)
                });
                json!({"content": content.collect::<Vec<_>>(), "refusal": null})
            }
        })
    }

    fn text_logprobs(&self, tokens: &[Shown], top: usize) -> Value {
        let names: Vec<String> = tokens.iter().map(|t| self.name(t.id)).collect();
        let own: Vec<Option<f32>> = tokens.iter().map(|t| t.logprobs.as_ref().map(|l| l.token.max(LEAST_LOGPROB))).collect();
        let best = |t: &Shown| {
            let logprobs = t.logprobs.as_ref()?;
            let own = std::iter::once((t.id, logprobs.token));
            let map = logprobs.top.iter().take(top).copied().chain(own);
            Some(map.map(|(id, l)| (self.name(id), Value::from(l.max(LEAST_LOGPROB)))).collect::<serde_json::Map<_, _>>())
        };
        let tops: Option<Vec<_>> = (top > 0).then(|| tokens.iter().map(best).collect());
        let offsets: Vec<usize> = tokens.iter().map(|t| t.offset).collect();
        json!({"tokens": names, "token_logprobs": own, "top_logprobs": tops, "text_offset": offsets})
    }

    /// A token's text, or its bytes where they are no text of their own.
    fn name(&self, id: TokenId) -> String {
        let piece = self.tokenizer.piece(id);
        match std::str::from_utf8(piece) {
            Ok(text) => text.to_owned(),
            Err(_) => piece.iter().fold("bytes:".to_owned(), |name, b| format!("{name}\\x{b:02x}")),
        }
    }
}

/// What was written as JSON, which is UTF-8.
fn text(json: &[u8]) -> String {
    String::from_utf8_lossy(json).into_owned()
}

fn usage_object(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    })
}
