//! `/v1/rerank`: documents in the order in which they answer a query.

use serde_json::{Value, json};

use super::{ApiError, Fields, Job, MOST_TEXTS, Parsed, Source, missing, read_text, wrong};

pub(super) struct Request {
    query: Source,
    documents: Vec<Source>,
    top: usize,
    with_documents: bool,
}

impl Parsed for Request {
    const ROUTE: &'static str = "/v1/rerank";
    const TEXTS: &'static str = "documents";
    type Answer = Value;

    fn parse(fields: &mut Fields) -> Result<Self, ApiError> {
        let query = read_text("query", &fields.take("query").ok_or_else(|| missing("query"))?)?;
        let value = fields.take("documents").ok_or_else(|| missing("documents"))?;
        let list = value.as_array().filter(|l| (1..=MOST_TEXTS).contains(&l.len()));
        let list = list.ok_or_else(|| wrong("documents", &value, &format!("a list of 1 to {MOST_TEXTS} strings or objects with text")))?;
        let documents = list.iter().map(|v| read_text("documents", v.get("text").unwrap_or(v))).collect::<Result<Vec<_>, _>>()?;
        let top = fields.integer("top_n", 1, i64::MAX)?.map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX));
        let with_documents = fields.flag("return_documents")?.unwrap_or(true);
        Ok(Self { query, documents, top, with_documents })
    }

    async fn run(self, job: Job) -> Result<Value, ApiError> {
        let pairs = self.documents.iter().map(|document| (self.query.clone(), document.clone())).collect();
        let (scores, usage) = job.scores(pairs, Self::ROUTE).await?;
        let mut order: Vec<usize> = (0..scores.len()).collect();
        // Of equal scores the earlier document comes first: the sort is stable.
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        order.truncate(self.top);
        let result = |index: usize| {
            let mut result = json!({"index": index, "relevance_score": scores[index]});
            if let (true, Source::Text(text)) = (self.with_documents, &self.documents[index]) {
                result["document"] = json!({"text": text});
            }
            result
        };
        let results: Vec<Value> = order.into_iter().map(result).collect();
        Ok(json!({"id": &*job.id, "model": job.model.name, "usage": usage, "results": results}))
    }
}
