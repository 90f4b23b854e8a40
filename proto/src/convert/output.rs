//! Results of a step, and f32 values as bytes.

use bytes::Bytes;
use plan::step::{Logprobs, Output, OutputValue};

use super::ConvertError;
use crate::worker::{self as wire, output::Value};

/// Values as little-endian bytes, four each.
pub fn f32s_to_bytes(values: &[f32]) -> Bytes {
    let mut bytes = vec![0; values.len() * 4];
    for (to, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
        *to = value.to_le_bytes();
    }
    Bytes::from(bytes)
}

/// Appends little-endian values to `into`; `field` names them in the error.
///
/// # Errors
/// If `bytes` is not a whole number of values.
pub fn f32s_from_bytes(bytes: &[u8], field: &'static str, into: &mut Vec<f32>) -> Result<(), ConvertError> {
    let (chunks, rest) = bytes.as_chunks::<4>();
    if !rest.is_empty() {
        return Err(ConvertError::value(field, format!("{} bytes long", bytes.len()), "a multiple of 4 bytes"));
    }
    into.extend(chunks.iter().map(|chunk| f32::from_le_bytes(*chunk)));
    Ok(())
}

/// A result as it crosses the wire.
pub fn encode_output(output: &Output) -> wire::Output {
    let value = match &output.value {
        OutputValue::Token { id, logprobs } => Value::Token(wire::Token { id: *id, logprobs: logprobs.as_ref().map(encode_logprobs) }),
        OutputValue::Score(logprobs) => Value::Score(encode_logprobs(logprobs)),
        OutputValue::Logits(logits) => Value::Logits(f32s_to_bytes(logits)),
        OutputValue::Vector(vector) => Value::Pooled(f32s_to_bytes(vector)),
        OutputValue::Failed(detail) => Value::Failed(detail.clone()),
    };
    wire::Output { sequence: output.sequence, position: output.position, value: Some(value) }
}

/// A result from the wire.
///
/// # Errors
/// If the value is missing or its lists do not match.
pub fn decode_output(output: wire::Output) -> Result<Output, ConvertError> {
    let floats = |bytes: &Bytes, field| {
        let mut values = Vec::with_capacity(bytes.len() / 4);
        f32s_from_bytes(bytes, field, &mut values).map(|()| values)
    };
    let value = match output.value.ok_or_else(|| ConvertError::missing("output.value"))? {
        Value::Token(token) => OutputValue::Token {
            id: token.id,
            logprobs: token.logprobs.map(decode_logprobs).transpose().map_err(|e| e.within("output.token"))?,
        },
        Value::Score(score) => OutputValue::Score(decode_logprobs(score).map_err(|e| e.within("output.score"))?),
        Value::Logits(bytes) => OutputValue::Logits(floats(&bytes, "output.logits")?),
        Value::Pooled(bytes) => OutputValue::Vector(floats(&bytes, "output.pooled")?),
        Value::Failed(detail) => OutputValue::Failed(detail),
    };
    Ok(Output { sequence: output.sequence, position: output.position, value })
}

/// Log-probabilities as they cross the wire.
pub fn encode_logprobs(logprobs: &Logprobs) -> wire::Logprobs {
    let (top_ids, top) = logprobs.top.iter().copied().unzip();
    wire::Logprobs { token: logprobs.token, top_ids, top }
}

/// Log-probabilities from the wire.
///
/// # Errors
/// If the lists of alternatives and of their values differ in length.
pub fn decode_logprobs(logprobs: wire::Logprobs) -> Result<Logprobs, ConvertError> {
    if logprobs.top_ids.len() != logprobs.top.len() {
        let got = format!("{} long beside {} ids", logprobs.top.len(), logprobs.top_ids.len());
        return Err(ConvertError::value("top", got, "one value for each id"));
    }
    Ok(Logprobs { token: logprobs.token, top: logprobs.top_ids.into_iter().zip(logprobs.top).collect() })
}
