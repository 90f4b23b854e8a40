//! Generation parameters that all interfaces share, range-checked, and what they become with a model's defaults.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;

use plan::step::{Sampling, TokenId};
use serde_json::Value;

use super::error::ApiError;
use super::fields::{Fields, whole, wrong};
use crate::encode::Tokenizer;

/// Most choices of one request.
pub(crate) const MOST_CHOICES: i64 = 128;
/// Most alternatives with log-probabilities.
pub(crate) const MOST_LOGPROBS: i64 = 20;
const MOST_STOPS: usize = 16;
const MOST_STOP_BYTES: usize = 1024;

/// What a request says about generating. `None` leaves it to the model's defaults.
#[derive(Clone, Debug, Default)]
pub(crate) struct Parameters {
    pub(crate) n: usize,
    pub(crate) seed: Option<u64>,
    pub(crate) stop: Arc<[String]>,
    pub(crate) stop_ids: Vec<TokenId>,
    pub(crate) ignore_eos: bool,
    pub(crate) min_tokens: u32,
    pub(crate) max_tokens: Option<u32>,
    pub(crate) logit_bias: Vec<(TokenId, f32)>,
    pub(crate) temperature: Option<f32>,
    pub(crate) top_p: Option<f32>,
    pub(crate) top_k: Option<u32>,
    pub(crate) min_p: Option<f32>,
    pub(crate) repetition_penalty: Option<f32>,
    pub(crate) presence_penalty: f32,
    pub(crate) frequency_penalty: f32,
    /// Alternatives per token.
    pub(crate) logprobs: Option<u32>,
}

impl Parameters {
    /// Reads all but the dialect's own parameters.
    pub(crate) fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        let most = i64::from(u32::MAX);
        let penalty = |f: &mut Fields, name| f.number(name, "a number from -2 to 2", |n| (-2.0..=2.0).contains(&n));
        let parameters = Self {
            n: fields.integer("n", 1, MOST_CHOICES)?.unwrap_or(1) as usize,
            seed: fields.integer("seed", i64::MIN, i64::MAX)?.map(|n| n as u64),
            stop: read_stops(fields)?,
            stop_ids: read_ids(fields, "stop_token_ids")?,
            ignore_eos: fields.flag("ignore_eos")?.unwrap_or(false),
            min_tokens: fields.integer("min_tokens", 0, most)?.unwrap_or(0) as u32,
            max_tokens: fields.integer("max_tokens", 0, most)?.map(|n| n as u32),
            logit_bias: read_bias(fields)?,
            temperature: fields.number("temperature", "a number of at least 0", |n| (0.0..=f64::from(f32::MAX)).contains(&n))?,
            top_p: fields.number("top_p", "a number above 0 and at most 1", |n| n > 0.0 && n <= 1.0)?,
            top_k: fields.integer("top_k", -1, most)?.map(|n| n.max(0) as u32),
            min_p: fields.number("min_p", "a number from 0 to 1", |n| (0.0..=1.0).contains(&n))?,
            repetition_penalty: fields.number("repetition_penalty", "a number above 0 and at most 10", |n| n > 0.0 && n <= 10.0)?,
            presence_penalty: penalty(fields, "presence_penalty")?.unwrap_or(0.0),
            frequency_penalty: penalty(fields, "frequency_penalty")?.unwrap_or(0.0),
            logprobs: None,
        };
        // What says who asks, or how the request is to be filed and billed: nothing of it is kept, and no token depends on it.
        for name in ["user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier"] {
            fields.text(name)?;
        }
        fields.flag("store")?;
        fields.only("metadata", "an object", Value::is_object)?;
        Ok(parameters)
    }

    /// Checks that do not concern one parameter alone.
    pub(crate) fn check(&self) -> Result<(), ApiError> {
        match self.max_tokens {
            Some(most) if self.min_tokens > most => {
                Err(ApiError::parameter("min_tokens", format!("min_tokens is {}, expected at most max_tokens, {most}", self.min_tokens)))
            }
            _ => Ok(()),
        }
    }

    /// Ids that end a stream: the model's unless they are ignored, and the request's own.
    pub(crate) fn end_ids(&self, tokenizer: &Tokenizer) -> Arc<[TokenId]> {
        let mut ids = if self.ignore_eos { Vec::new() } else { tokenizer.end_ids().to_vec() };
        ids.extend_from_slice(&self.stop_ids);
        ids.sort_unstable();
        ids.dedup();
        ids.into()
    }

    /// The sampler's settings, the model's defaults for what was left out.
    pub(crate) fn sampling(&self, tokenizer: &Tokenizer, end_ids: &[TokenId]) -> Result<Sampling, ApiError> {
        let vocab = tokenizer.vocab();
        let outside = |id: &TokenId| *id as usize >= vocab;
        let named = [
            ("logit_bias", self.logit_bias.iter().map(|&(id, _)| id).find(outside)),
            ("stop_token_ids", self.stop_ids.iter().copied().find(outside)),
        ];
        for (name, id) in named {
            if let Some(id) = id {
                return Err(ApiError::parameter(name, format!("{name} holds token {id}, expected ids below {vocab}")));
            }
        }
        let defaults = tokenizer.defaults();
        let by_default = if defaults.do_sample == Some(false) { Some(0.0) } else { defaults.temperature };
        Ok(Sampling {
            temperature: self.temperature.or(by_default).unwrap_or(1.0),
            top_k: self.top_k.or(defaults.top_k).unwrap_or(0),
            top_p: self.top_p.or(defaults.top_p).unwrap_or(1.0),
            min_p: self.min_p.or(defaults.min_p).unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.or(defaults.repetition_penalty).unwrap_or(1.0),
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.clone(),
            suppress: if self.min_tokens > 0 { end_ids.to_vec() } else { Vec::new() },
            min_tokens: self.min_tokens,
            seed: self.seed.unwrap_or_else(draw_seed),
            choice: 0,
            logprobs: self.logprobs,
            masked: false,
        })
    }
}

/// A seed for a request that has none. The hasher's keys are random per process and differ per call.
fn draw_seed() -> u64 {
    RandomState::new().build_hasher().finish()
}

fn read_stops(fields: &mut Fields) -> Result<Arc<[String]>, ApiError> {
    let Some(value) = fields.take("stop") else { return Ok(Arc::default()) };
    let list = match &value {
        Value::Array(list) => list.as_slice(),
        one => std::slice::from_ref(one),
    };
    let expected = format!("a string or at most {MOST_STOPS} of them, each of 1 to {MOST_STOP_BYTES} bytes");
    let text = |v: &Value| v.as_str().filter(|s| !s.is_empty() && s.len() <= MOST_STOP_BYTES).map(str::to_owned);
    let stops: Option<Vec<String>> = list.iter().map(text).collect();
    stops.filter(|s| s.len() <= MOST_STOPS).map(Arc::from).ok_or_else(|| wrong("stop", &value, &expected))
}

/// A list of token ids.
pub(crate) fn read_ids(fields: &mut Fields, name: &str) -> Result<Vec<TokenId>, ApiError> {
    let Some(value) = fields.take(name) else { return Ok(Vec::new()) };
    let ids: Option<Vec<TokenId>> = value.as_array().and_then(|list| list.iter().map(token_id).collect());
    ids.filter(|ids| ids.len() <= 1024).ok_or_else(|| wrong(name, &value, "a list of at most 1024 token ids"))
}

/// A token id.
pub(crate) fn token_id(value: &Value) -> Option<TokenId> {
    whole(value).and_then(|n| TokenId::try_from(n).ok())
}

fn read_bias(fields: &mut Fields) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let Some(value) = fields.take("logit_bias") else { return Ok(Vec::new()) };
    let entry = |(id, bias): (&String, &Value)| {
        let bias = bias.as_f64().filter(|b| (-100.0..=100.0).contains(b))?;
        Some((id.parse::<TokenId>().ok()?, bias as f32))
    };
    let bias: Option<Vec<(TokenId, f32)>> = value.as_object().and_then(|map| map.iter().map(entry).collect());
    let mut bias = bias
        .filter(|b| b.len() <= 1024)
        .ok_or_else(|| wrong("logit_bias", &value, "an object of at most 1024 token ids, each with a number from -100 to 100"))?;
    bias.sort_unstable_by_key(|&(id, _)| id);
    bias.dedup_by_key(|&mut (id, _)| id);
    Ok(bias)
}

/// `stream` and `stream_options`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Streaming {
    pub(crate) stream: bool,
    /// A last chunk with the usage, and `usage: null` in the others.
    pub(crate) include_usage: bool,
}

impl Streaming {
    pub(crate) fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        let stream = fields.flag("stream")?.unwrap_or(false);
        let mut include_usage = false;
        if let Some(value) = fields.take("stream_options") {
            let expected = "an object with include_usage, together with stream: true";
            let map = value.as_object().filter(|_| stream).ok_or_else(|| wrong("stream_options", &value, expected))?;
            for (name, option) in map {
                match (name.as_str(), option.as_bool()) {
                    ("include_usage", Some(on)) => include_usage = on,
                    // Padding against traffic analysis, which is not added.
                    ("include_obfuscation", Some(false)) => {}
                    _ if option.is_null() => {}
                    _ => {
                        return Err(wrong(&format!("stream_options.{name}"), option, "include_usage to be the only option, true or false"));
                    }
                }
            }
        }
        Ok(Self { stream, include_usage })
    }
}
