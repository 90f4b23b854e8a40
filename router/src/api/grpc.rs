//! gRPC on its own port: `skein.v1.Inference`, health and reflection.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, stream};
use plan::step::{Logprobs, TokenId};
use proto::inference as wire;
use proto::inference::inference_server::{Inference, InferenceServer};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::time::Instant;
use tonic::service::Routes;
use tonic::{Request, Response, Status};

use super::answer::finish_name;
use super::connections::{self, Protocol};
use super::constrained::Constrained;
use super::error::ApiError;
use super::fields::Fields;
use super::parameters::{MOST_LOGPROBS, Parameters};
use super::request::{Input, Source, read};
use super::run::{Job, Run, Shown};
use super::{ServeError, Shared};
use crate::encode::Tokenizer;

/// How often the health service looks at the models even if none is known to have changed.
const HEALTH: Duration = Duration::from_millis(500);

pub(super) async fn serve(shared: Arc<Shared>, listener: TcpListener) -> Result<(), ServeError> {
    let (reporter, health) = tonic_health::server::health_reporter();
    let reflect = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(wire::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let reflection = reflect().build_v1().map_err(ServeError::Reflection)?;
    let reflection_alpha = reflect().build_v1alpha().map_err(ServeError::Reflection)?;
    let limit = shared.options.body_bytes;
    let service = InferenceServer::new(Service(Arc::clone(&shared))).max_decoding_message_size(limit);
    let routes = Routes::new(health).add_service(reflection).add_service(reflection_alpha).add_service(service).prepare();
    let (patience, stopping) = (shared.options.patience, shared.stopping.clone());
    let (app, edge, delays) = (routes.into_axum_router(), shared.edge.clone(), Arc::clone(&shared.options.delays));
    let server = connections::serve((listener, Protocol::Grpc), app, edge, (patience, delays), stopping.clone());
    let (mut view, mut told) = (shared.edge.watch(), stopping);
    let watch = async {
        let mut tick = tokio::time::interval(HEALTH);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                // An edge that is gone changes no more; the ticks go on until the server ends.
                Ok(()) = view.changed() => {}
                // Who watches hears of it before the connection ends.
                Ok(()) = told.changed() => {}
            }
            let models = shared.edge.models();
            let ready = !models.is_empty() && models.iter().all(|m| shared.edge.ready(&m.name)) && !*shared.stopping.borrow();
            let status = if ready { tonic_health::ServingStatus::Serving } else { tonic_health::ServingStatus::NotServing };
            reporter.set_service_status("", status).await;
            reporter.set_service_status("skein.v1.Inference", status).await;
        }
    };
    tokio::select! {
        () = server => Ok(()),
        () = watch => Ok(()),
    }
}

struct Service(Arc<Shared>);

type Responses = Pin<Box<dyn Stream<Item = Result<wire::GenerateResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Inference for Service {
    type GenerateStream = Responses;

    async fn generate(&self, request: Request<wire::GenerateRequest>) -> Result<Response<Responses>, Status> {
        let run = self.start(request.into_inner()).await.map_err(ApiError::into_grpc)?;
        Ok(Response::new(Box::pin(responses(run))))
    }

    async fn tokenize(&self, request: Request<wire::TokenizeRequest>) -> Result<Response<wire::TokenizeResponse>, Status> {
        let request = request.into_inner();
        let ids = self.tokenize(request).await.map_err(ApiError::into_grpc)?;
        Ok(Response::new(wire::TokenizeResponse { ids }))
    }

    async fn model_info(&self, request: Request<wire::ModelInfoRequest>) -> Result<Response<wire::ModelInfoResponse>, Status> {
        let model = self.0.models.get(&self.0.edge, &request.into_inner().model).await.map_err(ApiError::into_grpc)?;
        Ok(Response::new(wire::ModelInfoResponse {
            max_context: model.status.limits.max_context as u32,
            vocab: model.tokenizer.vocab() as u32,
            replicas: model.status.replicas as u32,
            end_ids: model.tokenizer.end_ids().to_vec(),
            has_chat_template: model.tokenizer.has_template(),
            model: model.status.name,
            aliases: model.status.aliases,
        }))
    }
}

impl Service {
    async fn start(&self, request: wire::GenerateRequest) -> Result<Run, ApiError> {
        let (arrived, shared) = (Instant::now(), &self.0);
        let parameters = read_parameters(&request)?;
        if parameters.max_tokens == Some(0) {
            return Err(ApiError::parameter("max_tokens", "max_tokens is 0, expected at least 1"));
        }
        let constraint = request.constraint.map(Constrained::of).transpose()?;
        if let Some(constraint) = &constraint {
            constraint.check(&parameters)?;
        }
        let input = match request.prompt {
            Some(wire::generate_request::Prompt::Text(text)) => Input::Prompts(vec![Source::Text(text)]),
            Some(wire::generate_request::Prompt::Ids(ids)) => Input::Prompts(vec![Source::Ids(ids.ids)]),
            Some(wire::generate_request::Prompt::Chat(chat)) => {
                if chat.messages.is_empty() {
                    return Err(ApiError::parameter("chat", "chat has no messages, expected at least one"));
                }
                let message = |m: wire::ChatMessage| json!({"role": m.role, "content": m.content});
                let messages = chat.messages.into_iter().map(message).enumerate().map(|(i, m)| super::request::read_message(i, &m));
                let messages = messages.collect::<Result<_, _>>()?;
                Input::Messages { messages, add_generation_prompt: true, variables: serde_json::Map::new() }
            }
            None => return Err(ApiError::parameter("prompt", "the request has no prompt, expected text, ids or chat")),
        };
        let model = shared.models.get(&shared.edge, &request.model).await?;
        let (prompts, constraint) = read(&model, input, constraint).await?;
        let job = Job { model, prompts, parameters, constraint, echo: false, arrived, limit: shared.options.deadline };
        Run::start(&shared.edge, &shared.metrics, job)
    }

    async fn tokenize(&self, request: wire::TokenizeRequest) -> Result<Vec<TokenId>, ApiError> {
        let tokenizer = self.0.models.get(&self.0.edge, &request.model).await?.tokenizer;
        let encode = move || match request.add_special_tokens {
            true => tokenizer.encode_prompt(&request.text, true),
            false => tokenizer.encode(&request.text, true),
        };
        Ok(tokio::task::spawn_blocking(encode).await.map_err(|e| ApiError::internal(e.to_string()))??)
    }
}

/// The parameters of a request, by the checks of the JSON interface.
fn read_parameters(request: &wire::GenerateRequest) -> Result<Parameters, ApiError> {
    let sampling = request.sampling.clone().unwrap_or_default();
    let mut object = serde_json::Map::new();
    let mut set = |name: &str, value: Option<Value>| {
        // What JSON cannot say (NaN, infinities) is refused by name.
        if let Some(value) = value {
            object.insert(name.to_owned(), if value.is_null() { "not a finite number".into() } else { value });
        }
    };
    set("max_tokens", request.max_tokens.map(Value::from));
    set("min_tokens", Some(request.min_tokens.into()));
    set("ignore_eos", Some(request.ignore_eos.into()));
    set("stop", Some(request.stop.clone().into()));
    set("stop_token_ids", Some(request.stop_token_ids.clone().into()));
    set("temperature", sampling.temperature.map(Value::from));
    set("top_k", sampling.top_k.map(Value::from));
    set("top_p", sampling.top_p.map(Value::from));
    set("min_p", sampling.min_p.map(Value::from));
    set("repetition_penalty", sampling.repetition_penalty.map(Value::from));
    set("presence_penalty", sampling.presence_penalty.map(Value::from));
    set("frequency_penalty", sampling.frequency_penalty.map(Value::from));
    let bias: serde_json::Map<String, Value> = sampling.logit_bias.iter().map(|(id, b)| (id.to_string(), Value::from(*b))).collect();
    set("logit_bias", Some(bias.into()));
    set("logprobs", request.logprobs.map(Value::from));
    let mut fields = Fields::from(object);
    let mut parameters = Parameters::read(&mut fields)?;
    parameters.seed = sampling.seed;
    parameters.logprobs = fields.integer("logprobs", 0, MOST_LOGPROBS)?.map(|n| n as u32);
    fields.finish()?;
    parameters.check()?;
    Ok(parameters)
}

fn responses(run: Run) -> impl Stream<Item = Result<wire::GenerateResponse, Status>> + Send {
    stream::unfold(Some(run), |run| async move {
        let mut run = run?;
        match run.next().await? {
            Err(e) => Some((Err(e.into_grpc()), None)),
            Ok(delta) => {
                let tokenizer = &run.model().tokenizer;
                let tokens = delta.tokens.iter().map(|t| token(tokenizer, t)).collect();
                let usage = run.usage();
                let response = wire::GenerateResponse {
                    text: delta.text,
                    tokens,
                    finish_reason: delta.finish.map(finish_name).unwrap_or_default().to_owned(),
                    usage: delta.finish.map(|_| wire::Usage {
                        prompt_tokens: usage.prompt_tokens as u32,
                        completion_tokens: usage.completion_tokens as u32,
                        cached_tokens: usage.cached_tokens as u32,
                    }),
                };
                Some((Ok(response), Some(run)))
            }
        }
    })
}

fn token(tokenizer: &Tokenizer, shown: &Shown) -> wire::GeneratedToken {
    let bytes = |id: TokenId| tokenizer.piece(id).to_vec();
    let alternatives = |l: &Logprobs| {
        let one = |&(id, logprob): &(TokenId, f32)| wire::TokenAlternative { id, bytes: bytes(id), logprob };
        l.top.iter().map(one).collect()
    };
    wire::GeneratedToken {
        id: shown.id,
        bytes: bytes(shown.id),
        logprob: shown.logprobs.as_ref().map(|l| l.token),
        top: shown.logprobs.as_ref().map(alternatives).unwrap_or_default(),
    }
}
