//! Running given ids for what the model computes at them.

use std::sync::Arc;

use plan::step::{Output, OutputValue, Sampling};

use super::{Edge, EvaluateError, Evaluated, Evaluation, StreamEvent, stream::Item};
use crate::scheduler::Submission;

impl Edge {
    /// Runs ids for what the model computes at them: one output per want, then per greedy token its logits when asked for and
    /// the token.
    ///
    /// # Errors
    /// Those of [`Edge::submit`], and what breaks a stream.
    pub async fn evaluate(&self, model: &str, evaluation: Evaluation) -> Result<Evaluated, EvaluateError> {
        let Evaluation { ids, wants, chunk, greedy, greedy_logits } = evaluation;
        if let Some(want) = wants.iter().find(|w| w.offset as usize >= ids.len()) {
            return Err(EvaluateError::Invalid(format!("a result is wanted at {}, there are {} ids", want.offset, ids.len())));
        }
        if !wants.is_sorted_by_key(|w| w.offset) {
            return Err(EvaluateError::Invalid("wants must ascend by offset".to_owned()));
        }
        let mut position = ids.len() as u32;
        let submission = Submission {
            wants: wants.into(),
            logits: greedy_logits,
            chunk,
            ..Submission::generate(ids, Sampling::default(), greedy, Arc::new([]))
        };
        let mut course = self.course(model, submission)?;
        let mut outputs = Evaluated::new();
        while let Some(item) = course.next().await {
            match item {
                Item::Output(output) => outputs.push(Output { sequence: 0, ..output }),
                Item::Event(StreamEvent::Token { id, logprobs }) => {
                    let value = OutputValue::Token { id, logprobs };
                    outputs.push(Output { sequence: 0, position: position - 1, value });
                    position += 1;
                }
                Item::Event(StreamEvent::Failed(error)) => return Err(error.into()),
                Item::Event(StreamEvent::Prompt { .. } | StreamEvent::Finished(_)) => {}
            }
        }
        Ok(outputs)
    }
}
