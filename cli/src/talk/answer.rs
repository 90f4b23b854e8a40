//! One answer: streamed, timed, summed up.

use std::{future::Future, time::Duration};

use router::{
    api::{Dialect, Direct, DirectRequest, Refusal, TokenCounts},
    edge::FinishReason,
};
use serde::Serialize;
use serde_json::Value;
use tokio::time::Instant;

use crate::exit::{Failure, Outcome};

/// An answer that ended, or was cut off.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Answer {
    pub(crate) text: String,
    /// `None`: it was interrupted.
    pub(crate) finish: Option<FinishReason>,
    pub(crate) counts: TokenCounts,
    /// From the question to the first token.
    pub(crate) first: Duration,
    /// From the question to the end.
    pub(crate) total: Duration,
}

/// An answer as `--json` prints it. Times in seconds.
#[derive(Debug, Serialize)]
pub(crate) struct Printed<'a> {
    model: &'a str,
    text: &'a str,
    /// `stop`, `length`, or `interrupted`.
    finish_reason: &'static str,
    prompt_tokens: u64,
    completion_tokens: u64,
    first_token_s: f64,
    total_s: f64,
    /// Tokens per second after the first; `null` when there are fewer than two.
    tok_s: Option<f64>,
}

/// Asks, shows the text as it comes, and stops early when `interrupted` completes.
///
/// # Errors
/// Bad input when the API refuses the request.
pub(crate) async fn ask(
    direct: &Direct,
    dialect: Dialect,
    body: &Value,
    mut show: impl FnMut(&str) -> Outcome,
    interrupted: impl Future<Output = ()>,
) -> Outcome<Answer> {
    let began = Instant::now();
    let mut interrupted = std::pin::pin!(interrupted);
    let mut stream = direct.start(DirectRequest::parse(dialect, body).map_err(refused)?).await.map_err(refused)?;
    let mut answer =
        Answer { text: String::new(), finish: None, counts: TokenCounts::default(), first: Duration::ZERO, total: Duration::ZERO };
    loop {
        let piece = tokio::select! {
            biased;
            () = &mut interrupted => break,
            piece = stream.next() => piece,
        };
        let Some(piece) = piece else { break };
        let piece = piece.map_err(refused)?;
        if answer.first.is_zero() {
            answer.first = began.elapsed();
        }
        answer.finish = piece.finish.or(answer.finish);
        answer.text.push_str(&piece.text);
        if !piece.text.is_empty() {
            show(&piece.text)?;
        }
    }
    answer.counts = stream.counts();
    answer.total = began.elapsed();
    Ok(answer)
}

/// Whether the question or the machine is to blame.
pub(crate) fn refused(refusal: Refusal) -> Failure {
    if refusal.request { Failure::Input(refusal.into()) } else { Failure::Failed(refusal.into()) }
}

impl Answer {
    /// New tokens per second after the first; `None` when there are fewer than two.
    fn rate(&self) -> Option<f64> {
        let seconds = self.total.saturating_sub(self.first).as_secs_f64();
        (self.counts.completion > 1 && seconds > 0.0).then(|| (self.counts.completion - 1) as f64 / seconds)
    }

    /// How long it took, on one line, for a person.
    pub(crate) fn summary(&self) -> String {
        let Answer { counts, first, .. } = self;
        let rate = self.rate().map(|rate| format!(", {rate:.1} tok/s")).unwrap_or_default();
        let end = match self.finish {
            Some(FinishReason::Stop) => "",
            Some(FinishReason::Length) => ", cut at the limit",
            None => ", interrupted",
        };
        format!("{} prompt tokens, first token after {:.2} s; {} tokens{rate}{end}", counts.prompt, first.as_secs_f64(), counts.completion)
    }

    /// The form of `--json`.
    pub(crate) fn printed<'a>(&'a self, model: &'a str) -> Printed<'a> {
        Printed {
            model,
            text: &self.text,
            finish_reason: match self.finish {
                Some(FinishReason::Stop) => "stop",
                Some(FinishReason::Length) => "length",
                None => "interrupted",
            },
            prompt_tokens: self.counts.prompt,
            completion_tokens: self.counts.completion,
            first_token_s: self.first.as_secs_f64(),
            total_s: self.total.as_secs_f64(),
            tok_s: self.rate(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(completion: u64) -> Answer {
        let counts = TokenCounts { prompt: 6, cached: 0, completion };
        let (first, total) = (Duration::from_millis(500), Duration::from_millis(1500));
        Answer { text: String::new(), finish: Some(FinishReason::Length), counts, first, total }
    }

    #[test]
    fn the_rate_leaves_the_first_token_out() {
        assert_eq!(answer(48).rate(), Some(47.0));
        assert_eq!(answer(1).rate(), None);
        assert_eq!(answer(48).summary(), "6 prompt tokens, first token after 0.50 s; 48 tokens, 47.0 tok/s, cut at the limit");
        assert_eq!(answer(1).summary(), "6 prompt tokens, first token after 0.50 s; 1 tokens, cut at the limit");
    }
}
