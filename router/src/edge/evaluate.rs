//! Running given ids for what the model computes at them.

use std::sync::Arc;

use plan::step::{Output, OutputValue, Sampling, TokenId, Want, WantKind};

use super::{
    Edge, EvaluateError, Evaluated, Evaluation, StreamError, StreamEvent, SubmitError,
    stream::{Course, Item},
};
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

impl Edge {
    /// Queues an encoder's reading of `ids` for one vector of it. `second` is where the second text of a pair begins; 0: there is one.
    ///
    /// # Errors
    /// Those of [`Edge::submit`].
    pub(crate) fn vector(&self, model: &str, ids: Arc<[TokenId]>, second: u32, kind: WantKind) -> Result<PendingVector, SubmitError> {
        let wants = Arc::new([Want { offset: 0, kind }]);
        self.course(model, Submission::encode(ids, second, wants)).map(PendingVector)
    }
}

/// A vector on its way. Dropping it cancels the sequence.
#[derive(Debug)]
pub(crate) struct PendingVector(Course);

impl PendingVector {
    /// Waits for it.
    ///
    /// # Errors
    /// What breaks a stream.
    pub(crate) async fn get(mut self) -> Result<Vec<f32>, StreamError> {
        while let Some(item) = self.0.next().await {
            match item {
                Item::Output(Output { value: OutputValue::Vector(vector), .. }) => return Ok(vector),
                Item::Output(other) => return Err(StreamError::Engine(format!("a vector was wanted, {:?} came", other.value))),
                Item::Event(StreamEvent::Failed(error)) => return Err(error),
                Item::Event(_) => {}
            }
        }
        Err(StreamError::Engine("the sequence ended without its vector".to_owned()))
    }
}
