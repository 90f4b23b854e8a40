//! `/v1/score`: how well pairs of texts belong together.

use serde_json::{Value, json};

use super::{ApiError, Fields, Job, Parsed, Source, read_texts};
use crate::api::models::unix_seconds;

pub(super) struct Request {
    pairs: Vec<(Source, Source)>,
}

impl Parsed for Request {
    const ROUTE: &'static str = "/v1/score";
    const TEXTS: &'static str = "text_2";
    type Answer = Value;

    /// `text_1` and `text_2`: one of the first for all of the second, or as many of both.
    fn parse(fields: &mut Fields) -> Result<Self, ApiError> {
        let (mut first, second) = (read_texts(fields, "text_1")?, read_texts(fields, "text_2")?);
        if first.len() == 1 {
            first = vec![first.remove(0); second.len()];
        }
        if first.len() != second.len() {
            let message = format!("text_1 has {} texts and text_2 {}, expected one, or as many", first.len(), second.len());
            return Err(ApiError::parameter("text_1", message));
        }
        Ok(Self { pairs: first.into_iter().zip(second).collect() })
    }

    async fn run(self, job: Job) -> Result<Value, ApiError> {
        let (scores, usage) = job.scores(self.pairs, Self::ROUTE).await?;
        let item = |(index, score): (usize, &f32)| json!({"index": index, "object": "score", "score": score});
        let data: Vec<Value> = scores.iter().enumerate().map(item).collect();
        let (id, created) = (&*job.id, unix_seconds());
        Ok(json!({"id": id, "object": "list", "created": created, "model": job.model.name, "data": data, "usage": usage}))
    }
}
