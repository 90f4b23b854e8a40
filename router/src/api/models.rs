//! The models requests can name, each with its tokenizer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::{Path, State};
use plan::card::ModelCard;
use plan::fleet::ChatTemplate;
use serde_json::{Value, json};

use super::Shared;
use super::error::ApiError;
use crate::edge::{Edge, ModelStatus, SubmitError};
use crate::encode::{Tokenizer, VectorSettings};
use crate::grammar::Grammars;

/// A model with what is needed to talk to it.
#[derive(Clone)]
pub(crate) struct Model {
    pub(crate) status: ModelStatus,
    pub(crate) tokenizer: Arc<Tokenizer>,
    /// Grammars for its tokens.
    pub(crate) grammars: Arc<Grammars>,
    /// How it makes vectors and labels; encoders alone.
    pub(crate) vectors: Option<Arc<VectorSettings>>,
    /// Its own, or with one of its adapters behind a colon.
    pub(crate) name: String,
}

impl Model {
    /// Refuses a model that draws no tokens.
    pub(crate) fn must_generate(&self) -> Result<(), ApiError> {
        if !self.status.limits.is_encoder() {
            return Ok(());
        }
        let message = format!(
            "{} is an encoder, which generates no text: use /v1/embeddings, /v1/rerank, /v1/score or /v1/classify",
            self.status.name
        );
        Err(ApiError { code: "unsupported_endpoint", ..ApiError::parameter("model", message) })
    }
}

struct Entry {
    card: Arc<ModelCard>,
    template: Option<ChatTemplate>,
    built: Built,
}

/// What is made of a card.
#[derive(Clone)]
struct Built {
    tokenizer: Arc<Tokenizer>,
    grammars: Arc<Grammars>,
    vectors: Option<Arc<VectorSettings>>,
}

/// Tokenizers by deployment, built once per card and template.
#[derive(Default)]
pub(crate) struct Models {
    built: Mutex<HashMap<String, Entry>>,
    /// Held while a tokenizer is built, so that it is built once.
    building: tokio::sync::Mutex<()>,
}

impl Models {
    /// The model called `name`.
    pub(crate) async fn get(&self, edge: &Edge, name: &str) -> Result<Model, ApiError> {
        let (status, adapter) = find(edge, name)?;
        let name = adapter.map_or_else(|| status.name.clone(), |adapter| format!("{}:{adapter}", status.name));
        let card = edge.card(&status.name).await?;
        let model = |status, Built { tokenizer, grammars, vectors }: Built| Model { status, tokenizer, grammars, vectors, name };
        if let Some(built) = self.ready(&status, &card) {
            return Ok(model(status, built));
        }
        let _one = self.building.lock().await;
        if let Some(built) = self.ready(&status, &card) {
            return Ok(model(status, built));
        }
        let (template, source, encoder) = (status.serving.chat_template.clone(), Arc::clone(&card), status.limits.is_encoder());
        let build = move || {
            let tokenizer = Tokenizer::from_card(&source)?;
            let tokenizer = Arc::new(match &template {
                Some(template) => tokenizer.with_template(template),
                None => tokenizer,
            });
            let vectors = encoder.then(|| VectorSettings::from_card(&source)).transpose()?.map(Arc::new);
            let grammars = Arc::new(Grammars::new(tokenizer.clone()));
            Ok::<_, ApiError>(Built { tokenizer, grammars, vectors })
        };
        let built = tokio::task::spawn_blocking(build).await.map_err(|e| ApiError::internal(e.to_string()))??;
        let entry = Entry { card, template: status.serving.chat_template.clone(), built: built.clone() };
        let mut all = self.built.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|name, _| edge.models().iter().any(|m| &m.deployment == name));
        all.insert(status.deployment.clone(), entry);
        drop(all);
        Ok(model(status, built))
    }

    fn ready(&self, status: &ModelStatus, card: &Arc<ModelCard>) -> Option<Built> {
        let built = self.built.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = built.get(&status.deployment)?;
        let same = Arc::ptr_eq(&entry.card, card) || entry.card == *card;
        (same && entry.template == status.serving.chat_template).then(|| entry.built.clone())
    }
}

/// The status of the model that requests name so, and the adapter of it that they name.
pub(crate) fn find(edge: &Edge, name: &str) -> Result<(ModelStatus, Option<String>), ApiError> {
    let (deployment, adapter) = edge.resolve(name)?;
    let status = edge.models().into_iter().find(|m| m.deployment == deployment);
    Ok((status.ok_or_else(|| SubmitError::UnknownModel(name.to_owned()))?, adapter))
}

/// Seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

fn object(status: &ModelStatus, name: &str, adapter: bool, created: u64) -> Value {
    let parent = adapter.then_some(&status.name);
    json!({
        "id": name, "object": "model", "created": created, "owned_by": "skein",
        "root": status.name, "parent": parent, "max_model_len": status.limits.max_context,
    })
}

/// `GET /v1/models`: every name that requests can use.
pub(super) async fn list(State(shared): State<Arc<Shared>>) -> Json<Value> {
    let models = shared.edge.models();
    let created = shared.started;
    let names = models.iter().flat_map(|m| {
        let own = std::iter::once(&m.name).chain(&m.aliases).map(move |n| object(m, n, false, created));
        own.chain(m.adapters.iter().map(move |adapter| object(m, &format!("{}:{adapter}", m.name), true, created)))
    });
    Json(json!({"object": "list", "data": names.collect::<Vec<_>>()}))
}

/// `GET /v1/models/{id}`; the id may hold slashes.
pub(super) async fn get(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    let (status, adapter) = find(&shared.edge, &name)?;
    Ok(Json(object(&status, &name, adapter.is_some(), shared.started)))
}
