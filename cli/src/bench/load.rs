//! One client of an OpenAI-compatible endpoint: sends a prompt, times what streams back.

use std::{
    borrow::Cow,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use futures_util::StreamExt;
use reqwest::{Client, RequestBuilder, Response};
use serde::Deserialize;
use serde_json::{Value, json};

/// An endpoint and what each request asks of it.
#[derive(Clone, Debug)]
pub(crate) struct Endpoint {
    client: Client,
    /// Without a trailing slash or `/v1`.
    base: String,
    api_key: Option<String>,
    /// Tokens of each request.
    pub(crate) max_tokens: u32,
    pub(crate) temperature: f32,
}

/// What one request took. Times in seconds.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Timed {
    /// From sending to the first piece of text.
    pub(crate) first: f64,
    /// Between pieces of text.
    pub(crate) gaps: Vec<f64>,
    /// From sending to the end.
    pub(crate) total: f64,
    pub(crate) prompt_tokens: u64,
    pub(crate) completion_tokens: u64,
}

impl Endpoint {
    /// A client of the endpoint at `url`.
    ///
    /// # Errors
    /// When the HTTP client cannot be made.
    pub(crate) fn new(url: &str, api_key: Option<String>, timeout: Duration, max_tokens: u32, temperature: f32) -> anyhow::Result<Self> {
        let client = Client::builder().timeout(timeout).build().context("failed to make an HTTP client")?;
        let base = url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        Ok(Self { client, base, api_key, max_tokens, temperature })
    }

    /// The first model the endpoint lists.
    pub(crate) async fn first_model(&self) -> anyhow::Result<String> {
        let response = self.send(self.client.get(format!("{}/v1/models", self.base))).await?;
        let models: Value = response.json().await.with_context(|| format!("{}/v1/models did not answer with JSON", self.base))?;
        match models.pointer("/data/0/id").and_then(Value::as_str) {
            Some(id) => Ok(id.to_owned()),
            None => bail!("{}/v1/models lists no model", self.base),
        }
    }

    /// Streams one completion to its end.
    pub(crate) async fn complete(&self, model: &str, prompt: &str) -> anyhow::Result<Timed> {
        let body = json!({
            "model": model,
            "prompt": prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "ignore_eos": true,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        let started = Instant::now();
        let response = self.send(self.client.post(format!("{}/v1/completions", self.base)).json(&body)).await?;
        let mut events = Events::default();
        let mut body = response.bytes_stream();
        let (mut arrivals, mut usage) = (Vec::new(), None);
        while let Some(part) = body.next().await {
            let now = started.elapsed().as_secs_f64();
            events.push(&part.context("the stream broke")?, |event| {
                if event == "[DONE]" {
                    return Ok(());
                }
                let event: Event<'_> = serde_json::from_str(event).with_context(|| format!("an event is not what streams say: {event}"))?;
                if let Some(error) = event.error {
                    bail!("the stream failed: {error}");
                }
                if event.choices.first().is_some_and(|choice| !choice.text.is_empty()) {
                    arrivals.push(now);
                }
                usage = event.usage.or(usage.take());
                Ok(())
            })?;
        }
        let total = started.elapsed().as_secs_f64();
        let Some(&first) = arrivals.first() else { bail!("the stream ended without text") };
        Ok(Timed {
            first,
            gaps: arrivals.windows(2).map(|pair| pair[1] - pair[0]).collect(),
            total,
            prompt_tokens: usage.as_ref().map_or(0, |usage| usage.prompt_tokens),
            completion_tokens: usage.as_ref().map_or(arrivals.len() as u64, |usage| usage.completion_tokens),
        })
    }

    /// Sends a request and turns an error status into an error with the server's words.
    async fn send(&self, request: RequestBuilder) -> anyhow::Result<Response> {
        let request = match &self.api_key {
            Some(key) => request.bearer_auth(key),
            None => request,
        };
        let response = request.send().await.with_context(|| format!("failed to reach {}", self.base))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let text = response.text().await.unwrap_or_default();
        let message =
            serde_json::from_str::<Value>(&text).ok().and_then(|v| v.pointer("/error/message").and_then(Value::as_str).map(str::to_owned));
        bail!("{} answered {status}: {}", self.base, message.unwrap_or(text))
    }
}

/// What counts of an event: no more of it is read, as clients share processors with what they measure.
#[derive(Deserialize)]
struct Event<'a> {
    #[serde(borrow, default)]
    choices: Vec<Choice<'a>>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(borrow, default)]
    text: Cow<'a, str>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
}

/// Cuts a byte stream into the data of server-sent events.
#[derive(Debug, Default)]
struct Events {
    rest: Vec<u8>,
}

impl Events {
    /// Hands on the events that `bytes` completes. Lines other than `data:` are dropped.
    fn push(&mut self, bytes: &[u8], mut take: impl FnMut(&str) -> anyhow::Result<()>) -> anyhow::Result<()> {
        self.rest.extend_from_slice(bytes);
        let Some(end) = self.rest.iter().rposition(|&byte| byte == b'\n') else { return Ok(()) };
        let text = String::from_utf8_lossy(&self.rest[..end]);
        text.lines().filter_map(|line| line.strip_prefix("data:")).try_for_each(|data| take(data.trim()))?;
        drop(text);
        self.rest.drain(..=end);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_whole_wherever_the_stream_is_cut() {
        let stream = "data: {\"a\":1}\n\n: note\ndata: {\"b\":\"é\"}\r\n\r\ndata: [DONE]\n\n".as_bytes();
        for size in 1..stream.len() {
            let mut events = Events::default();
            let mut seen = Vec::new();
            for part in stream.chunks(size) {
                let taken = events.push(part, |event| {
                    seen.push(event.to_owned());
                    Ok(())
                });
                taken.expect("nothing refuses an event");
            }
            assert_eq!(seen, ["{\"a\":1}", "{\"b\":\"é\"}", "[DONE]"], "{size}");
        }
    }
}
