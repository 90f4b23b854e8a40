//! A request under way: its choices' streams, decoded, with stop strings, until each has finished.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use plan::step::{Logprobs, Sampling, TokenId};
use tokio::time::{Instant, Sleep};

use super::answer::finish_name;
use super::error::ApiError;
use super::metrics::{Metrics, Timeline, TokenTimes};
use super::models::Model;
use super::parameters::Parameters;
use crate::decode::{self, Decoder};
use crate::edge::{Edge, FinishReason, Generation, StreamEvent, TokenStream};
use crate::encode::Tokenizer;
use crate::grammar::Constraint;

/// A prompt, tokenized.
#[derive(Clone, Debug)]
pub(crate) struct Prompt {
    pub(crate) ids: Arc<[TokenId]>,
    /// The text it came from, when it came as text.
    pub(crate) text: Option<Arc<str>>,
}

/// A token as the API shows it.
#[derive(Clone, Debug)]
pub(crate) struct Shown {
    pub(crate) id: TokenId,
    pub(crate) logprobs: Option<Logprobs>,
    /// Where its text starts in the choice's text, in characters.
    pub(crate) offset: usize,
}

/// A token whose text is not certain yet.
struct Held {
    /// Where its text starts in the choice's text, in bytes.
    start: usize,
    /// Bytes of the choice's text that make its own certain.
    end: usize,
    shown: Shown,
}

/// News of one choice.
#[derive(Clone, Debug, Default)]
pub(crate) struct Delta {
    pub(crate) choice: usize,
    /// Text that became certain.
    pub(crate) text: String,
    /// Tokens whose text became certain.
    pub(crate) tokens: Vec<Shown>,
    /// When the reply came that it is from.
    pub(crate) arrived: Option<Instant>,
    pub(crate) finish: Option<FinishReason>,
}

impl Delta {
    /// Nothing is new of `choice`.
    fn begin(&mut self, choice: usize) {
        let Self { choice: of, text, tokens, arrived, finish } = self;
        text.clear();
        tokens.clear();
        (*of, *arrived, *finish) = (choice, None, None);
    }
}

/// Tokens of a request.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u64,
    pub(crate) completion_tokens: u64,
    pub(crate) cached_tokens: u64,
}

struct Choice {
    prompt: Prompt,
    first_of_prompt: bool,
    decoder: Decoder,
    held: VecDeque<Held>,
    /// Bytes of text released, the echo included.
    released: usize,
    /// Bytes and characters of the echo.
    echoed: (usize, usize),
    begun: bool,
    finished: bool,
    times: Timeline,
}

/// What waits for a stream's next event, and gives the stream back with it.
type Next = Pin<Box<dyn Future<Output = (usize, TokenStream, Option<StreamEvent>)> + Send>>;

fn next(choice: usize, mut stream: TokenStream) -> Next {
    Box::pin(async move {
        let event = stream.next().await;
        (choice, stream, event)
    })
}

/// Streams that go on.
enum Streams {
    /// The only choice: nothing is made anew for a token.
    One(Box<TokenStream>),
    /// Those of several choices, or none any more.
    Many(FuturesUnordered<Next>),
}

/// An event of a choice, and what its stream knows.
struct News {
    choice: usize,
    event: Option<StreamEvent>,
    started: Option<Instant>,
    arrived: Option<Instant>,
    /// One of several streams, until it is put back.
    stream: Option<TokenStream>,
}

impl Streams {
    fn new(mut streams: Vec<TokenStream>) -> Self {
        if streams.len() == 1
            && let Some(one) = streams.pop()
        {
            return Self::One(Box::new(one));
        }
        Self::Many(streams.into_iter().enumerate().map(|(choice, stream)| next(choice, stream)).collect())
    }

    fn is_empty(&self) -> bool {
        matches!(self, Self::Many(many) if many.is_empty())
    }

    fn clear(&mut self) {
        *self = Self::Many(FuturesUnordered::new());
    }

    /// The next event of any; `None` when there are none. Cancel-safe.
    async fn next(&mut self) -> Option<News> {
        match self {
            Self::One(stream) => {
                let event = stream.next().await;
                Some(News { choice: 0, event, started: stream.started_at(), arrived: stream.arrived_at(), stream: None })
            }
            Self::Many(many) => {
                let (choice, stream, event) = many.next().await?;
                Some(News { choice, event, started: stream.started_at(), arrived: stream.arrived_at(), stream: Some(stream) })
            }
        }
    }

    /// Puts back the stream of the last news, if it goes on.
    fn settle(&mut self, choice: usize, stream: Option<TokenStream>, open: bool) {
        match (&mut *self, stream) {
            (Self::Many(many), Some(stream)) if open => many.push(next(choice, stream)),
            (Self::One(_), _) if !open => self.clear(),
            _ => {}
        }
    }
}

/// A request under way. Dropping it cancels all its sequences.
pub(crate) struct Run {
    streams: Streams,
    choices: Vec<Choice>,
    model: Model,
    metrics: Arc<Metrics>,
    times: TokenTimes,
    arrived: Instant,
    deadline: Pin<Box<Sleep>>,
    limit: Duration,
    min_tokens: u32,
    echo: bool,
    end_ids: Arc<[TokenId]>,
    usage: Usage,
    /// The last news; what it has room for is used again.
    delta: Delta,
}

/// A request ready to run.
pub(crate) struct Job {
    pub(crate) model: Model,
    pub(crate) prompts: Vec<Prompt>,
    pub(crate) parameters: Parameters,
    pub(crate) constraint: Option<Constraint>,
    /// Return the prompt before what follows it.
    pub(crate) echo: bool,
    pub(crate) arrived: Instant,
    /// Longest the request may take.
    pub(crate) limit: Duration,
}

impl Run {
    /// Submits every choice of every prompt; choice `p * n + c` is the c-th of prompt p.
    pub(crate) fn start(edge: &Edge, metrics: &Arc<Metrics>, job: Job) -> Result<Self, ApiError> {
        let Job { model, prompts, parameters, constraint, echo, arrived, limit } = job;
        model.must_generate()?;
        let context = model.status.limits.max_context;
        let end_ids = parameters.end_ids(&model.tokenizer);
        let sampling = Sampling { masked: constraint.is_some(), ..parameters.sampling(&model.tokenizer, &end_ids)? };
        let score_prompt = if echo { parameters.logprobs } else { None };
        let (mut streams, mut choices, mut usage) = (Vec::new(), Vec::new(), Usage::default());
        let (total, places) = (prompts.len() * parameters.n, model.status.serving.queue_requests);
        if total > places {
            let name = if parameters.n > 1 { "n" } else { "prompt" };
            let message = format!("{} prompts with n {} are {total} sequences, the queue holds {places}", prompts.len(), parameters.n);
            return Err(ApiError::parameter(name, message));
        }
        for prompt in &prompts {
            let max_tokens = room(prompt.ids.len(), context, parameters.max_tokens)?;
            usage.prompt_tokens += prompt.ids.len() as u64;
            for c in 0..parameters.n {
                let mut sampling = sampling.clone();
                sampling.choice = c as u32;
                let (prompt_ids, end_ids) = (Arc::clone(&prompt.ids), Arc::clone(&end_ids));
                let constraint = constraint.clone();
                let generation = Generation { prompt: prompt_ids, sampling, max_tokens, end_ids, score_prompt, constraint };
                streams.push(edge.submit(&model.name, generation)?);
                let decoder = Decoder::new(Arc::clone(&model.tokenizer), Arc::clone(&parameters.stop), prompt.ids.last().copied());
                choices.push(Choice {
                    prompt: prompt.clone(),
                    first_of_prompt: c == 0,
                    decoder,
                    held: VecDeque::new(),
                    released: 0,
                    echoed: (0, 0),
                    begun: false,
                    finished: false,
                    times: Timeline::new(arrived),
                });
            }
        }
        metrics.submitted(&model.status.name, &parameters, usage.prompt_tokens);
        let (streams, deadline) = (Streams::new(streams), Box::pin(tokio::time::sleep_until(arrived + limit)));
        let (metrics, min_tokens) = (Arc::clone(metrics), parameters.min_tokens);
        let times = metrics.tokens(&model.status.name);
        Ok(Self {
            streams,
            choices,
            model,
            metrics,
            times,
            arrived,
            deadline,
            limit,
            min_tokens,
            echo,
            end_ids,
            usage,
            delta: Delta::default(),
        })
    }

    /// Choices in all.
    pub(crate) fn choices(&self) -> usize {
        self.choices.len()
    }

    /// The tokens so far.
    pub(crate) fn usage(&self) -> Usage {
        self.usage
    }

    /// The model that runs.
    pub(crate) fn model(&self) -> &Model {
        &self.model
    }

    /// The next news; `None` after every choice has finished. Nothing may be asked after an error.
    pub(crate) async fn next(&mut self) -> Option<Result<Delta, ApiError>> {
        let advanced = self.advance().await?;
        Some(advanced.map(|()| std::mem::take(&mut self.delta)))
    }

    /// What [`Run::advance`] brought last.
    pub(crate) fn delta(&self) -> &Delta {
        &self.delta
    }

    /// Brings the next news into [`Run::delta`]; otherwise as [`Run::next`].
    pub(crate) async fn advance(&mut self) -> Option<Result<(), ApiError>> {
        loop {
            if self.streams.is_empty() {
                return None;
            }
            let news = tokio::select! {
                biased;
                news = self.streams.next() => news?,
                () = self.deadline.as_mut() => {
                    self.streams.clear();
                    self.metrics.finished(&self.model.status.name, "abort", &Timeline::new(self.arrived));
                    return Some(Err(ApiError::deadline(self.limit.as_secs())));
                }
            };
            let News { choice, event, started, arrived, stream } = news;
            self.choices[choice].times.started = started;
            match self.take(choice, event) {
                Ok(open) => {
                    self.delta.arrived = arrived;
                    let delta = &self.delta;
                    self.streams.settle(choice, stream, open);
                    if !delta.text.is_empty() || !delta.tokens.is_empty() || delta.finish.is_some() {
                        return Some(Ok(()));
                    }
                }
                Err(e) => {
                    self.streams.clear();
                    self.metrics.finished(&self.model.status.name, "error", &Timeline::new(self.arrived));
                    return Some(Err(e));
                }
            }
        }
    }

    /// Takes an event of a choice, and says in [`Run::delta`] what is new. Whether its stream goes on.
    fn take(&mut self, index: usize, event: Option<StreamEvent>) -> Result<bool, ApiError> {
        let mut delta = std::mem::take(&mut self.delta);
        delta.begin(index);
        let open = self.fill(index, event, &mut delta);
        self.delta = delta;
        open
    }

    fn fill(&mut self, index: usize, event: Option<StreamEvent>, delta: &mut Delta) -> Result<bool, ApiError> {
        match event {
            Some(StreamEvent::Prompt { cached_tokens, scores }) => {
                self.begin(index, delta, scores);
                // Choices of one prompt share it; it was counted once.
                if self.choices[index].first_of_prompt {
                    self.usage.cached_tokens += u64::from(cached_tokens);
                }
            }
            Some(StreamEvent::Token { id, logprobs }) => {
                self.begin(index, delta, Vec::new());
                return Ok(self.token(index, id, logprobs, delta));
            }
            Some(StreamEvent::Finished(reason)) => {
                self.begin(index, delta, Vec::new());
                let scan = self.choices[index].times.tokens > self.min_tokens;
                let before = delta.text.len();
                let stopped = self.choices[index].decoder.finish(scan, &mut delta.text);
                self.choices[index].released += delta.text.len() - before;
                self.end(index, if stopped { FinishReason::Stop } else { reason }, delta);
                return Ok(false);
            }
            Some(StreamEvent::Failed(e)) => return Err(e.into()),
            None => return Err(ApiError::internal("the stream ended without a reason")),
        }
        Ok(true)
    }

    /// The prompt's own text and tokens, once, where they are echoed.
    fn begin(&mut self, index: usize, delta: &mut Delta, scores: Vec<Logprobs>) {
        let choice = &mut self.choices[index];
        if std::mem::replace(&mut choice.begun, true) || !self.echo {
            return;
        }
        let tokenizer = &self.model.tokenizer;
        match &choice.prompt.text {
            Some(text) => delta.text.push_str(text),
            None => delta.text.push_str(&decode::text(tokenizer, &choice.prompt.ids, false)),
        }
        let mut scores = std::iter::once(None).chain(scores.into_iter().map(Some));
        let offsets = offsets(tokenizer, &delta.text, &choice.prompt.ids);
        let shown = choice.prompt.ids.iter().zip(offsets);
        delta.tokens.extend(shown.map(|(&id, offset)| Shown { id, logprobs: scores.next().flatten(), offset }));
        choice.echoed = (delta.text.len(), delta.text.chars().count());
        choice.released = choice.echoed.0;
    }

    fn token(&mut self, index: usize, id: TokenId, logprobs: Option<Logprobs>, delta: &mut Delta) -> bool {
        let now = Instant::now();
        let choice = &mut self.choices[index];
        self.usage.completion_tokens += 1;
        choice.times.tokens += 1;
        match choice.times.last.replace(now) {
            Some(last) => self.times.between.observe((now - last).as_secs_f64()),
            None => {
                choice.times.first = Some(now);
                self.times.first.observe((now - self.arrived).as_secs_f64());
            }
        }
        if self.end_ids.binary_search(&id).is_ok() {
            // The end token, or one drawn past it by mistake: not text. `Finished` follows.
            return true;
        }
        let before = delta.text.len();
        let start = choice.echoed.0 + choice.decoder.decoded();
        let shown = Shown { id, logprobs, offset: choice.echoed.1 + choice.decoder.characters() };
        let stopped = choice.decoder.push(id, choice.times.tokens > self.min_tokens, &mut delta.text);
        let end = choice.echoed.0 + choice.decoder.decoded() + usize::from(choice.decoder.is_inside_character());
        choice.held.push_back(Held { start, end, shown });
        choice.released += delta.text.len() - before;
        if stopped {
            self.end(index, FinishReason::Stop, delta);
            return false;
        }
        while let Some(held) = choice.held.pop_front_if(|held| held.end <= choice.released) {
            delta.tokens.push(held.shown);
        }
        true
    }

    fn end(&mut self, index: usize, reason: FinishReason, delta: &mut Delta) {
        let choice = &mut self.choices[index];
        let stopped = choice.decoder.stop().is_some();
        // Tokens past the place where a stop string began are not part of the answer.
        let cut = choice.released;
        delta.tokens.extend(choice.held.drain(..).filter(|held| !stopped || held.start < cut).map(|held| held.shown));
        delta.finish = Some(reason);
        self.metrics.finished(&self.model.status.name, finish_name(reason), &choice.times);
        choice.finished = true;
        if self.choices.iter().all(|c| c.finished) {
            let most = self.choices.iter().map(|c| c.times.tokens).max().unwrap_or(0);
            self.metrics.longest(&self.model.status.name, most);
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if !self.streams.is_empty() {
            self.metrics.disconnected();
            self.metrics.finished(&self.model.status.name, "abort", &Timeline::new(self.arrived));
        }
    }
}

/// Where the text of each token of a prompt starts in the prompt's text, in characters. What the text does not show, like a
/// BOS put before it, starts where the next token does.
fn offsets(tokenizer: &Tokenizer, text: &str, ids: &[TokenId]) -> Vec<usize> {
    let (mut at, mut counted, mut characters) = (0, 0, 0);
    let mut offset = |id: &TokenId| {
        let start = (0..=at).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
        characters += text[counted..start].chars().count();
        counted = start;
        let (piece, rest) = (tokenizer.piece(*id), &text.as_bytes()[at..]);
        at += match piece.strip_prefix(b" ") {
            _ if rest.starts_with(piece) => piece.len(),
            Some(bare) if at == 0 && rest.starts_with(bare) => bare.len(),
            _ if tokenizer.is_control(*id) => 0,
            // The tokenizer changed the text before it cut it.
            _ => piece.len().min(rest.len()),
        };
        characters
    };
    ids.iter().map(&mut offset).collect()
}

/// Tokens that may follow a prompt.
fn room(prompt: usize, context: usize, max_tokens: Option<u32>) -> Result<u32, ApiError> {
    let too_long = |what: String| {
        let message = format!("{what}; the model's context is {context} tokens");
        ApiError { code: "context_length_exceeded", ..ApiError::parameter("prompt", message) }
    };
    let left = context.saturating_sub(prompt);
    match max_tokens {
        _ if prompt > context || (left == 0 && max_tokens != Some(0)) => {
            Err(too_long(format!("the prompt has {prompt} tokens and leaves no room for an answer")))
        }
        Some(most) if most as usize > left => Err(ApiError {
            param: Some("max_tokens".to_owned()),
            ..too_long(format!("the prompt has {prompt} tokens and max_tokens is {most}"))
        }),
        Some(most) => Ok(most),
        None => Ok(u32::try_from(left).unwrap_or(u32::MAX)),
    }
}
