//! Requests to encoders: texts go in, vectors, scores and labels come out. Each text is a sequence of its own, and the scheduler puts as
//! many into a step as its tokens allow.

mod classify;
mod embeddings;
mod rerank;
mod score;

use std::{collections::HashMap, sync::Arc};

use axum::{
    Json,
    extract::{Request as HttpRequest, State},
    response::{IntoResponse, Response},
};
use futures_util::{StreamExt, TryStreamExt, stream};
use plan::step::{Pooled, TokenId, WantKind};
use serde::Serialize;
use serde_json::Value;
use tokio::time::Instant;

use super::{
    Shared,
    error::ApiError,
    fields::{Fields, wrong},
    http::{RequestId, draw_id, read_body},
    metrics::{Metrics, Timeline},
    models::Model,
    request::{Source, encode_source, missing},
};
use crate::encode::{Classes, Embedding, Tokenizer, VectorSettings};

/// Most texts of one request, as OpenAI's interface has it.
const MOST_TEXTS: usize = 2048;

/// `POST /v1/embeddings`.
pub(super) async fn embeddings(state: State<Arc<Shared>>, request: HttpRequest) -> Result<Response, ApiError> {
    answer::<embeddings::Request>(state.0, request).await
}

/// `POST /v1/rerank`.
pub(super) async fn rerank(state: State<Arc<Shared>>, request: HttpRequest) -> Result<Response, ApiError> {
    answer::<rerank::Request>(state.0, request).await
}

/// `POST /v1/score`.
pub(super) async fn score(state: State<Arc<Shared>>, request: HttpRequest) -> Result<Response, ApiError> {
    answer::<score::Request>(state.0, request).await
}

/// `POST /v1/classify`.
pub(super) async fn classify(state: State<Arc<Shared>>, request: HttpRequest) -> Result<Response, ApiError> {
    answer::<classify::Request>(state.0, request).await
}

/// A kind of request.
trait Parsed: Sized + Send {
    /// Its path, for messages.
    const ROUTE: &'static str;
    /// The parameter that holds its texts.
    const TEXTS: &'static str;
    /// What is answered.
    type Answer: Serialize;

    /// Reads what is its own.
    fn parse(fields: &mut Fields) -> Result<Self, ApiError>;

    /// Makes the answer.
    fn run(self, job: Job) -> impl Future<Output = Result<Self::Answer, ApiError>> + Send;
}

/// What a request has to work with.
struct Job {
    shared: Arc<Shared>,
    model: Model,
    settings: Arc<VectorSettings>,
    /// The parameter that holds the texts, for messages.
    texts: &'static str,
    id: Arc<str>,
    arrived: Instant,
}

async fn answer<R: Parsed>(shared: Arc<Shared>, request: HttpRequest) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let id = request.extensions().get::<RequestId>().map_or_else(|| draw_id().into(), |id| Arc::clone(&id.0));
    let limit = shared.options.deadline;
    let mut gone = Gone(Some(Arc::clone(&shared.metrics)));
    let work = async {
        let body = read_body(&shared, request).await?;
        let mut fields = Fields::parse(&body)?;
        drop(body);
        let name = fields.text("model")?.ok_or_else(|| missing("model"))?;
        let parsed = R::parse(&mut fields)?;
        // Who asks is not looked at.
        fields.text("user")?;
        fields.finish()?;
        let mut model = shared.models.get(&shared.edge, &name).await?;
        // A client sees the name that it used.
        model.name = name;
        let Some(settings) = model.vectors.clone() else {
            let reason = format!("it generates text, and {} needs an encoder: use /v1/completions or /v1/chat/completions", R::ROUTE);
            return Err(unsupported(&model, &reason));
        };
        parsed.run(Job { shared: Arc::clone(&shared), model, settings, texts: R::TEXTS, id, arrived }).await
    };
    let answer = tokio::time::timeout_at(arrived + limit, work).await;
    gone.0 = None;
    Ok(Json(answer.map_err(|_| ApiError::deadline(limit.as_secs()))??).into_response())
}

/// Counts a client that went away, which drops the request.
struct Gone(Option<Arc<Metrics>>);

impl Drop for Gone {
    fn drop(&mut self) {
        if let Some(metrics) = self.0.take() {
            metrics.disconnected();
        }
    }
}

/// Tokens of a request.
#[derive(Clone, Copy, Debug, Serialize)]
struct Usage {
    prompt_tokens: usize,
    total_tokens: usize,
}

/// A text, or two, as ids.
#[derive(Clone, Debug)]
struct Input {
    ids: Arc<[TokenId]>,
    /// Where the second text begins, for models that tell it from the first; 0: nowhere.
    second: u32,
}

impl Input {
    /// A text of parameter `name`, behind `prompt`.
    fn one(tokenizer: &Tokenizer, text: Source, prompt: &str, name: &str) -> Result<Self, ApiError> {
        let text = match text {
            Source::Text(text) if !prompt.is_empty() => Source::Text(format!("{prompt}{text}")),
            as_it_is => as_it_is,
        };
        Ok(Self { ids: encode_source(tokenizer, text, name)?.ids, second: 0 })
    }
}

impl Job {
    /// How the model makes embeddings.
    fn embedding(&self) -> Result<Embedding, ApiError> {
        self.settings.embedding.clone().map_err(|reason| unsupported(&self.model, &reason))
    }

    /// How the model classifies, for a route that needs it to.
    fn classes(&self, route: &str) -> Result<Classes, ApiError> {
        match &self.settings.classes {
            Some(Ok(classes)) => Ok(classes.clone()),
            Some(Err(reason)) => Err(unsupported(&self.model, reason)),
            None => Err(unsupported(&self.model, &format!("it has no classification head, which {route} needs"))),
        }
    }

    /// The ids of texts; takes as long as they are, so it runs off the event loop.
    async fn encode<T: Send + 'static>(
        &self,
        texts: Vec<T>,
        encode: impl Fn(&Tokenizer, T) -> Result<Input, ApiError> + Send + 'static,
    ) -> Result<Vec<Input>, ApiError> {
        let tokenizer = Arc::clone(&self.model.tokenizer);
        let work = move || texts.into_iter().map(|text| encode(&tokenizer, text)).collect::<Result<Vec<_>, _>>();
        let inputs = tokio::task::spawn_blocking(work).await.map_err(|e| ApiError::internal(e.to_string()))??;
        let limits = &self.model.status.limits;
        // An encoder reads a text in one step.
        let most = limits.max_context.min(limits.max_batch_tokens);
        let Some(long) = inputs.iter().map(|input| input.ids.len()).find(|&tokens| tokens > most) else { return Ok(inputs) };
        let message = format!("{} holds a text of {long} tokens, and the model reads at most {most}", self.texts);
        Err(ApiError { code: "context_length_exceeded", ..ApiError::parameter(self.texts, message) })
    }

    /// What the model makes of each input, in order, and how many tokens they had.
    async fn vectors(&self, inputs: Vec<Input>, kind: WantKind) -> Result<(Vec<Vec<f32>>, Usage), ApiError> {
        let status = &self.model.status;
        let tokens = inputs.iter().map(|input| input.ids.len()).sum();
        self.shared.metrics.submitted_texts(&status.name, tokens as u64);
        // Enough at a time to fill the steps in flight, so that one request does not take the whole queue.
        let most = (2 * status.limits.max_batch_sequences).min(status.serving.queue_requests).max(1);
        let one = |input: Input| {
            let vector = self.shared.edge.vector(&status.name, input.ids, input.second, kind.clone());
            async move { Ok::<_, ApiError>(vector?.get().await?) }
        };
        let vectors: Result<Vec<_>, ApiError> = stream::iter(inputs).map(one).buffered(most).try_collect().await;
        let reason = if vectors.is_ok() { "stop" } else { "error" };
        self.shared.metrics.finished(&status.name, reason, &Timeline::new(self.arrived));
        Ok((vectors?, Usage { prompt_tokens: tokens, total_tokens: tokens }))
    }

    /// Values of the classification head for each input, as many as there are labels.
    async fn labels(&self, inputs: Vec<Input>, classes: &Classes) -> Result<(Vec<Vec<f32>>, Usage), ApiError> {
        let (values, usage) = self.vectors(inputs, WantKind::Classes).await?;
        match values.iter().find(|v| v.len() != classes.labels.len()) {
            Some(v) => Err(ApiError::internal(format!("the model gave {} values for {} labels", v.len(), classes.labels.len()))),
            None => Ok((values, usage)),
        }
    }

    /// Scores of pairs: by the classification head, where the model has one, which must then be of one label; else the cosine of the
    /// texts' embeddings.
    async fn scores(&self, pairs: Vec<(Source, Source)>, route: &str) -> Result<(Vec<f32>, Usage), ApiError> {
        if self.settings.classes.is_none() {
            return self.cosines(pairs).await;
        }
        let classes = self.classes(route)?;
        if classes.labels.len() != 1 {
            let count = classes.labels.len();
            return Err(unsupported(
                &self.model,
                &format!("its head has {count} labels; {route} needs one of one label, or an embedding model"),
            ));
        }
        let typed = classes.token_types;
        let inputs = self.encode(pairs, move |tokenizer, pair| {
            let (Source::Text(first), Source::Text(second)) = pair else {
                return Err(ApiError::internal("a pair of token ids came, expected two texts"));
            };
            let (ids, begin) = tokenizer.encode_pair(&first, &second, true)?;
            let inside = typed && begin < ids.len();
            Ok(Input { ids: ids.into(), second: if inside { begin as u32 } else { 0 } })
        });
        let (mut values, usage) = self.labels(inputs.await?, &classes).await?;
        values.iter_mut().for_each(|v| classes.score.apply(v));
        Ok((values.into_iter().map(|v| v[0]).collect(), usage))
    }

    async fn cosines(&self, pairs: Vec<(Source, Source)>) -> Result<(Vec<f32>, Usage), ApiError> {
        let embedding = self.embedding()?;
        let kind = WantKind::Pooled(Pooled { over: embedding.pooling, dimensions: 0, normalize: true });
        // A text that is in several pairs is read once.
        let (mut texts, mut known): (Vec<Source>, HashMap<Source, usize>) = (Vec::new(), HashMap::new());
        let mut place = |text: Source| {
            *known.entry(text).or_insert_with_key(|text| {
                texts.push(text.clone());
                texts.len() - 1
            })
        };
        let places: Vec<(usize, usize)> = pairs.into_iter().map(|(a, b)| (place(a), place(b))).collect();
        let (prompt, name) = (embedding.prompt, self.texts);
        let inputs = self.encode(texts, move |tokenizer, text| Input::one(tokenizer, text, &prompt, name)).await?;
        let (vectors, usage) = self.vectors(inputs, kind).await?;
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32;
        Ok((places.into_iter().map(|(a, b)| dot(&vectors[a], &vectors[b])).collect(), usage))
    }
}

/// A text of parameter `name`.
fn read_text(name: &str, value: &Value) -> Result<Source, ApiError> {
    value.as_str().map(|text| Source::Text(text.to_owned())).ok_or_else(|| wrong(name, value, "a string"))
}

/// One or several texts of parameter `name`.
fn read_texts(fields: &mut Fields, name: &str) -> Result<Vec<Source>, ApiError> {
    let value = fields.take(name).ok_or_else(|| missing(name))?;
    match &value {
        Value::Array(list) if (1..=MOST_TEXTS).contains(&list.len()) => list.iter().map(|v| read_text(name, v)).collect(),
        Value::String(_) => Ok(vec![read_text(name, &value)?]),
        other => Err(wrong(name, other, &format!("a string or a list of 1 to {MOST_TEXTS} strings"))),
    }
}

/// The model cannot do what is asked.
fn unsupported(model: &Model, reason: &str) -> ApiError {
    let message = format!("{} cannot be used so: {reason}", model.name);
    ApiError { code: "unsupported_endpoint", ..ApiError::parameter("model", message) }
}
