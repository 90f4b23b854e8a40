//! Requests of both dialects: the JSON of `/v1/completions` and `/v1/chat/completions` to a job.

use std::sync::Arc;

use plan::step::TokenId;
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use super::Shared;
use super::constrained::Constrained;
use super::error::ApiError;
use super::fields::{Fields, wrong};
use super::models::Model;
use super::parameters::{MOST_LOGPROBS, Parameters, Streaming, token_id};
use super::run::{Job, Prompt};
use crate::encode::{ChatOptions, Tokenizer};
use crate::grammar::Constraint;

/// Which of OpenAI's interfaces a request speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`.
    Chat,
}

/// A request, parsed and checked but not tokenized.
pub(crate) struct Request {
    pub(crate) model: String,
    pub(crate) streaming: Streaming,
    parameters: Parameters,
    constraint: Option<Constrained>,
    echo: bool,
    input: Input,
}

/// What is to be continued.
pub(crate) enum Input {
    /// Whole prompts.
    Prompts(Vec<Source>),
    /// A conversation.
    Messages { messages: Vec<Value>, add_generation_prompt: bool, variables: Map<String, Value> },
}

/// A text as it came.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Source {
    Text(String),
    Ids(Vec<TokenId>),
}

/// Tokens of a completion that does not say how many, as OpenAI's interface has it.
const COMPLETION_TOKENS: u32 = 16;
/// Most prompts of one request.
const MOST_PROMPTS: usize = 256;

impl Request {
    /// Reads the JSON of a request.
    pub(crate) fn parse(dialect: Dialect, body: &[u8]) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let model = fields.text("model")?.ok_or_else(|| missing("model"))?;
        let streaming = Streaming::read(&mut fields)?;
        let mut parameters = Parameters::read(&mut fields)?;
        let constraint = Constrained::read(&mut fields)?;
        for name in ["skip_special_tokens", "spaces_between_special_tokens"] {
            fields.only(name, "true", |v| v.as_bool() == Some(true))?;
        }
        let request = match dialect {
            Dialect::Completions => {
                let input = Input::Prompts(read_sources(&mut fields, "prompt", MOST_PROMPTS)?);
                parameters.logprobs = fields.integer("logprobs", 0, MOST_LOGPROBS)?.map(|n| n as u32);
                let echo = fields.flag("echo")?.unwrap_or(false);
                let n = parameters.n as i64;
                fields.only("best_of", &format!("n, {n}: choices are not ranked"), |v| v.as_i64() == Some(n))?;
                fields.only("suffix", "none: text is not filled in", |v| v.as_str() == Some(""))?;
                parameters.max_tokens.get_or_insert(COMPLETION_TOKENS);
                Self { model, streaming, parameters, constraint, echo, input }
            }
            Dialect::Chat => {
                let input = read_conversation(&mut fields)?;
                read_chat_parameters(&mut fields, &mut parameters)?;
                Self { model, streaming, parameters, constraint, echo: false, input }
            }
        };
        fields.finish()?;
        request.parameters.check()?;
        if let Some(constraint) = &request.constraint {
            constraint.check(&request.parameters)?;
        }
        if request.parameters.max_tokens == Some(0) && !request.echo {
            return Err(ApiError::parameter("max_tokens", "max_tokens is 0, expected at least 1 (or echo: true)"));
        }
        Ok(request)
    }

    /// Finds the model and tokenizes.
    pub(crate) async fn prepare(self, shared: &Shared, arrived: Instant) -> Result<Job, ApiError> {
        let model = shared.models.get(&shared.edge, &self.model).await?;
        model.must_generate()?;
        let Self { parameters, constraint, echo, input, .. } = self;
        let (prompts, constraint) = read(&model, input, constraint).await?;
        Ok(Job { model, prompts, parameters, constraint, echo, arrived, limit: shared.options.deadline })
    }
}

/// What a model's tokenizer makes of a request.
pub(crate) async fn read(
    model: &Model,
    input: Input,
    constraint: Option<Constrained>,
) -> Result<(Vec<Prompt>, Option<Constraint>), ApiError> {
    let (tokenizer, grammars) = (Arc::clone(&model.tokenizer), Arc::clone(&model.grammars));
    let system = model.status.serving.system_prompt.clone();
    let read = move || {
        let prompts = encode(&tokenizer, input, system.as_deref())?;
        Ok((prompts, constraint.map(|constraint| constraint.compile(&grammars)).transpose()?))
    };
    tokio::task::spawn_blocking(read).await.map_err(|e| ApiError::internal(e.to_string()))?
}

/// Tokenizes; takes as long as the text is, so it runs off the event loop.
fn encode(tokenizer: &Tokenizer, input: Input, system: Option<&str>) -> Result<Vec<Prompt>, ApiError> {
    match input {
        Input::Prompts(sources) => sources.into_iter().map(|s| encode_source(tokenizer, s, "prompt")).collect(),
        Input::Messages { mut messages, add_generation_prompt, variables } => {
            if let Some(system) = system
                && messages.iter().all(|m| m.get("role").and_then(Value::as_str) != Some("system"))
            {
                messages.insert(0, json!({"role": "system", "content": system}));
            }
            let ids =
                tokenizer.chat(&messages, ChatOptions { add_generation_prompt, variables: Some(&variables), ..ChatOptions::default() })?;
            if ids.is_empty() {
                return Err(ApiError::parameter("messages", "the chat template made an empty prompt of the messages"));
            }
            Ok(vec![Prompt { ids: ids.into(), text: None }])
        }
    }
}

/// The ids of a text of parameter `name`.
pub(crate) fn encode_source(tokenizer: &Tokenizer, source: Source, name: &str) -> Result<Prompt, ApiError> {
    let (ids, text) = match source {
        Source::Text(text) => (tokenizer.encode_prompt(&text, true)?, Some(Arc::from(text))),
        Source::Ids(ids) => (ids, None),
    };
    let vocab = tokenizer.vocab();
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        return Err(ApiError::parameter(name, format!("{name} holds token {id}, expected ids below {vocab}")));
    }
    if ids.is_empty() {
        let message = format!("{name} is empty, and this model puts no token before a text: expected at least one token");
        return Err(ApiError::parameter(name, message));
    }
    Ok(Prompt { ids: ids.into(), text })
}

/// The refusal of a request without a parameter that it must have.
pub(crate) fn missing(name: &str) -> ApiError {
    ApiError { code: "missing_parameter", ..ApiError::parameter(name, format!("parameter {name:?} is missing")) }
}

/// The texts of parameter `name`, or their ids.
pub(crate) fn read_sources(fields: &mut Fields, name: &str, most: usize) -> Result<Vec<Source>, ApiError> {
    let value = fields.take(name).ok_or_else(|| missing(name))?;
    let expected = format!("a string, a list of token ids, or a list of at most {most} of either");
    let refuse = || wrong(name, &value, &expected);
    let ids = |list: &[Value]| list.iter().map(token_id).collect::<Option<Vec<TokenId>>>();
    let list = match &value {
        Value::String(text) => return Ok(vec![Source::Text(text.clone())]),
        Value::Array(list) if !list.is_empty() => list,
        _ => return Err(refuse()),
    };
    if list[0].is_number() {
        return Ok(vec![Source::Ids(ids(list).ok_or_else(refuse)?)]);
    }
    let one = |v: &Value| match v {
        Value::String(text) => Some(Source::Text(text.clone())),
        Value::Array(list) if !list.is_empty() => ids(list).map(Source::Ids),
        _ => None,
    };
    if list.len() > most {
        return Err(refuse());
    }
    list.iter().map(one).collect::<Option<Vec<_>>>().ok_or_else(refuse)
}

fn read_chat_parameters(fields: &mut Fields, parameters: &mut Parameters) -> Result<(), ApiError> {
    let asked = fields.flag("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0, MOST_LOGPROBS)?;
    if top.is_some_and(|n| n > 0) && !asked {
        return Err(ApiError::parameter("top_logprobs", "top_logprobs needs logprobs: true"));
    }
    parameters.logprobs = asked.then_some(top.unwrap_or(0) as u32);
    if let Some(most) = fields.integer("max_completion_tokens", 0, i64::from(u32::MAX))? {
        if parameters.max_tokens.is_some_and(|n| i64::from(n) != most) {
            return Err(ApiError::parameter("max_completion_tokens", "max_completion_tokens and max_tokens differ: expected one of them"));
        }
        parameters.max_tokens = Some(most as u32);
    }
    let empty = |v: &Value| v.as_array().is_some_and(Vec::is_empty);
    fields.only("tools", "none: tool calls are not supported", empty)?;
    fields.only("functions", "none: tool calls are not supported", empty)?;
    for name in ["tool_choice", "function_call"] {
        fields.only(name, "\"none\" or \"auto\"", |v| matches!(v.as_str(), Some("none" | "auto")))?;
    }
    fields.only("parallel_tool_calls", "true or false", Value::is_boolean)?;
    fields.only("modalities", "[\"text\"]", |v| *v == json!(["text"]))?;
    // A guess at the answer, to draw it faster: it changes no token.
    fields.only("prediction", "an object", Value::is_object)?;
    fields.only("reasoning_effort", "\"none\": models are not told how long to think", |v| v.as_str() == Some("none"))?;
    fields.only("verbosity", "\"medium\": models are not told how much to write", |v| v.as_str() == Some("medium"))?;
    for name in ["audio", "web_search_options"] {
        fields.only(name, "null: it is not supported", |_| false)?;
    }
    Ok(())
}

fn read_conversation(fields: &mut Fields) -> Result<Input, ApiError> {
    let value = fields.take("messages").ok_or_else(|| missing("messages"))?;
    let list = value.as_array().filter(|l| !l.is_empty());
    let list = list.ok_or_else(|| wrong("messages", &value, "a list of at least one message"))?;
    let messages = list.iter().enumerate().map(|(i, m)| read_message(i, m)).collect::<Result<_, _>>()?;
    let add_generation_prompt = fields.flag("add_generation_prompt")?.unwrap_or(true);
    let variables = match fields.take("chat_template_kwargs") {
        None => Map::new(),
        Some(Value::Object(map)) => {
            const FIXED: [&str; 5] = ["messages", "tools", "add_generation_prompt", "bos_token", "eos_token"];
            if let Some(name) = map.keys().find(|k| FIXED.contains(&k.as_str())) {
                return Err(ApiError::parameter("chat_template_kwargs", format!("chat_template_kwargs cannot set {name:?}")));
            }
            map
        }
        Some(other) => return Err(wrong("chat_template_kwargs", &other, "an object")),
    };
    Ok(Input::Messages { messages, add_generation_prompt, variables })
}

/// A message as templates expect it: `role`, `content` as one string, and what belongs to tools.
pub(crate) fn read_message(index: usize, message: &Value) -> Result<Value, ApiError> {
    let path = |name: &str| format!("messages[{index}].{name}");
    let map = message.as_object().ok_or_else(|| wrong(&format!("messages[{index}]"), message, "an object with role and content"))?;
    let role = map.get("role").unwrap_or(&Value::Null);
    let role = match role.as_str() {
        Some("developer") => "system",
        Some(known @ ("system" | "user" | "assistant" | "tool")) => known,
        _ => return Err(wrong(&path("role"), role, "system, developer, user, assistant or tool")),
    };
    let content = match map.get("content").unwrap_or(&Value::Null) {
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            let mut text = String::new();
            for (i, part) in parts.iter().enumerate() {
                let piece = part.get("text").and_then(Value::as_str).filter(|_| part.get("type").and_then(Value::as_str) == Some("text"));
                text.push_str(piece.ok_or_else(|| wrong(&path(&format!("content[{i}]")), part, "a part of type \"text\""))?);
            }
            text
        }
        Value::Null if role == "assistant" && map.get("tool_calls").is_some_and(Value::is_array) => String::new(),
        other => return Err(wrong(&path("content"), other, "a string or a list of text parts")),
    };
    let mut read = Map::new();
    read.insert("role".to_owned(), role.into());
    read.insert("content".to_owned(), content.into());
    for (name, value) in map.iter().filter(|(_, v)| !v.is_null()) {
        match name.as_str() {
            "role" | "content" => {}
            "name" | "tool_call_id" if value.is_string() => drop(read.insert(name.clone(), value.clone())),
            "tool_calls" if value.is_array() => drop(read.insert(name.clone(), value.clone())),
            // What an answer of this API holds beside its content, when it is sent back.
            "annotations" if value.as_array().is_some_and(Vec::is_empty) => {}
            _ => return Err(wrong(&path(name), value, "role, content, name, tool_calls or tool_call_id")),
        }
    }
    Ok(Value::Object(read))
}
