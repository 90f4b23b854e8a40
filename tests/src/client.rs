//! The HTTP client of the tests.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use reqwest::{Client, Response, StatusCode};
use serde_json::Value;

/// What came of a stream of server-sent events.
#[derive(Debug, Default)]
pub struct Streamed {
    /// The pieces of text, joined.
    pub text: String,
    /// Why it ended.
    pub finish: String,
    /// The longest time between two pieces.
    pub gap: Duration,
}

/// Sends `body` to `url` and returns status and JSON.
///
/// # Errors
/// If there is no answer, or it is no JSON.
pub async fn post(url: &str, body: &Value) -> Result<(StatusCode, Value)> {
    let response = send(url, body).await?;
    let status = response.status();
    Ok((status, serde_json::from_str(&response.text().await?)?))
}

/// The text at `url`.
///
/// # Errors
/// If there is no answer or its status is not 2xx.
pub async fn get(url: &str) -> Result<String> {
    Ok(client()?.get(url).send().await?.error_for_status()?.text().await?)
}

/// Sends `body` to `<base>/v1/completions` and returns the first choice's text.
///
/// # Errors
/// If the answer is anything else.
pub async fn complete(base: &str, body: &Value) -> Result<String> {
    let (status, answer) = post(&format!("{base}/v1/completions"), body).await?;
    if !status.is_success() {
        bail!("{status}: {answer}");
    }
    Ok(answer["choices"][0]["text"].as_str().with_context(|| format!("no text in {answer}"))?.to_owned())
}

/// Sends `body` to `<base>/v1/completions` with `"stream": true`; `seen` is called with the number of pieces so far.
///
/// # Errors
/// If the stream breaks, carries an error, or ends without `[DONE]`.
pub async fn stream(base: &str, body: &Value, mut seen: impl FnMut(usize)) -> Result<Streamed> {
    let mut body = body.clone();
    body["stream"] = Value::Bool(true);
    let mut response = send(&format!("{base}/v1/completions"), &body).await?;
    if !response.status().is_success() {
        bail!("{}: {}", response.status(), response.text().await?);
    }
    let mut streamed = Streamed::default();
    let (mut pieces, mut last, mut left) = (0, None::<Instant>, String::new());
    let mut undecoded = Vec::new();
    while let Some(bytes) = response.chunk().await.context("the stream broke")? {
        undecoded.extend_from_slice(&bytes);
        let whole = undecoded.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
        left.push_str(std::str::from_utf8(&undecoded[..whole])?);
        undecoded.drain(..whole);
        while let Some((event, rest)) = left.split_once("\n\n") {
            let event = event.to_owned();
            left = rest.to_owned();
            for data in event.lines().filter_map(|line| line.strip_prefix("data:").map(str::trim)) {
                if data == "[DONE]" {
                    return Ok(streamed);
                }
                let value: Value = serde_json::from_str(data).with_context(|| format!("event {data}"))?;
                if !value["error"].is_null() {
                    bail!("the stream ended with {value}");
                }
                let choice = &value["choices"][0];
                streamed.text.push_str(choice["text"].as_str().unwrap_or_default());
                if let Some(reason) = choice["finish_reason"].as_str() {
                    streamed.finish = reason.to_owned();
                }
                let now = Instant::now();
                if let Some(last) = last.replace(now) {
                    streamed.gap = streamed.gap.max(now - last);
                }
                pieces += 1;
                seen(pieces);
            }
        }
    }
    bail!("the stream ended without [DONE] after {:?}", streamed.text)
}

async fn send(url: &str, body: &Value) -> Result<Response> {
    let request = client()?.post(url).header("content-type", "application/json").body(body.to_string());
    request.send().await.with_context(|| format!("POST {url}"))
}

fn client() -> Result<Client> {
    Ok(Client::builder().timeout(crate::program::LIMIT).build()?)
}
