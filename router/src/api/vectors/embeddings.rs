//! `/v1/embeddings`, as OpenAI's interface has it.

use base64::{Engine, engine::general_purpose::STANDARD};
use plan::step::{Pooled, WantKind};
use serde::Serialize;
use serde_json::Value;

use super::{ApiError, Fields, Input, Job, MOST_TEXTS, Parsed, Source, Usage, wrong};
use crate::api::request::read_sources;

pub(super) struct Request {
    texts: Vec<Source>,
    base64: bool,
    dimensions: Option<u32>,
}

#[derive(Serialize)]
pub(super) struct Answer {
    object: &'static str,
    data: Vec<Item>,
    model: String,
    usage: Usage,
}

#[derive(Serialize)]
struct Item {
    object: &'static str,
    index: usize,
    embedding: Vector,
}

/// Values, or their bytes: f32, little-endian.
#[derive(Serialize)]
#[serde(untagged)]
enum Vector {
    Floats(Vec<f32>),
    Base64(String),
}

impl Parsed for Request {
    const ROUTE: &'static str = "/v1/embeddings";
    const TEXTS: &'static str = "input";
    type Answer = Answer;

    fn parse(fields: &mut Fields) -> Result<Self, ApiError> {
        let texts = read_sources(fields, Self::TEXTS, MOST_TEXTS)?;
        let base64 = match fields.take("encoding_format") {
            None => false,
            Some(Value::String(format)) if format == "float" => false,
            Some(Value::String(format)) if format == "base64" => true,
            Some(other) => return Err(wrong("encoding_format", &other, "\"float\" or \"base64\"")),
        };
        let dimensions = fields.integer("dimensions", 1, i64::from(u32::MAX))?.map(|n| n as u32);
        Ok(Self { texts, base64, dimensions })
    }

    async fn run(self, job: Job) -> Result<Answer, ApiError> {
        let (embedding, width) = (job.embedding()?, job.settings.width);
        if let Some(n) = self.dimensions.filter(|&n| n as usize > width) {
            return Err(ApiError::parameter("dimensions", format!("dimensions is {n}, and embeddings of this model have {width}")));
        }
        let prompt = embedding.prompt;
        let inputs = job.encode(self.texts, move |tokenizer, text| Input::one(tokenizer, text, &prompt, Self::TEXTS)).await?;
        // The first values of a vector are a vector too, for models that were trained so: Kusupati et al. 2022, arXiv:2205.13147.
        let cut = self.dimensions.unwrap_or(0);
        let pooled = Pooled { over: embedding.pooling, dimensions: cut, normalize: embedding.normalize || cut > 0 };
        let (vectors, usage) = job.vectors(inputs, WantKind::Pooled(pooled)).await?;
        let item = |(index, values): (usize, Vec<f32>)| Item {
            object: "embedding",
            index,
            embedding: if self.base64 { Vector::Base64(bytes(&values)) } else { Vector::Floats(values) },
        };
        let data = vectors.into_iter().enumerate().map(item).collect();
        Ok(Answer { object: "list", data, model: job.model.name, usage })
    }
}

fn bytes(values: &[f32]) -> String {
    STANDARD.encode(values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())
}
