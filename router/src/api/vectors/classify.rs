//! `/v1/classify`: the labels of texts, by the names in the model's own `config.json`.

use serde::Serialize;

use super::{ApiError, Fields, Input, Job, Parsed, Source, Usage, read_texts};
use crate::api::models::unix_seconds;

pub(super) struct Request {
    texts: Vec<Source>,
}

#[derive(Serialize)]
pub(super) struct Answer {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    data: Vec<Item>,
    usage: Usage,
}

#[derive(Serialize)]
struct Item {
    index: usize,
    /// The likeliest, of equal ones the first.
    label: String,
    probs: Vec<f32>,
    num_classes: usize,
}

impl Parsed for Request {
    const ROUTE: &'static str = "/v1/classify";
    const TEXTS: &'static str = "input";
    type Answer = Answer;

    fn parse(fields: &mut Fields) -> Result<Self, ApiError> {
        Ok(Self { texts: read_texts(fields, Self::TEXTS)? })
    }

    async fn run(self, job: Job) -> Result<Answer, ApiError> {
        let classes = job.classes(Self::ROUTE)?;
        let inputs = job.encode(self.texts, |tokenizer, text| Input::one(tokenizer, text, "", Self::TEXTS)).await?;
        let (values, usage) = job.labels(inputs, &classes).await?;
        let item = |(index, mut probs): (usize, Vec<f32>)| {
            classes.activation.apply(&mut probs);
            let best = (0..probs.len()).rev().max_by(|&a, &b| probs[a].total_cmp(&probs[b])).unwrap_or(0);
            Item { index, label: classes.labels[best].clone(), num_classes: probs.len(), probs }
        };
        let data = values.into_iter().enumerate().map(item).collect();
        Ok(Answer { id: job.id.to_string(), object: "list", created: unix_seconds(), model: job.model.name, data, usage })
    }
}
