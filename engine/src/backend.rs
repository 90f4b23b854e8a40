//! The seam between what a step means and where it is computed.

use plan::step::BlockCopy;

use crate::{
    Observed, Progress, Timings,
    batch::Batch,
    collective::CollectiveError,
    question::{Need, Row},
    ranks::Ranks,
};

/// What a stage's computation is given beside its batch.
pub(crate) struct Context<'a, 'r> {
    pub(crate) ranks: &'a mut Ranks<'r>,
    pub(crate) progress: &'a Progress,
    pub(crate) timings: &'a mut Timings,
}

/// Holds one rank's weights and KV cache, and computes its part of a stage.
///
/// Results stay in the backend's buffers until its next call. Bits do not depend on the backend's batch, threads or ranks.
pub(crate) trait Backend: Send {
    /// Copies a block in every layer of its KV group that this stage has.
    fn copy_block(&mut self, copy: BlockCopy);

    /// Runs all layers of the stage. `hidden`: the output of the stage before, `[tokens, hidden]`; on the first stage the batch's ids are
    /// looked up instead.
    ///
    /// Afterwards [`Backend::rows`] are, on the last stage of a decoder, the normed states of the batch's wanted rows, else the states of all
    /// rows.
    fn forward(&mut self, batch: &Batch<'_>, hidden: &[f32], context: &mut Context<'_, '_>) -> Result<(), CollectiveError>;

    /// What [`Backend::forward`] left, `[rows, hidden]`.
    fn rows(&self) -> &[f32];

    /// What is needed of this rank's logits of normed states, `[rows, hidden]`, for each of `needs`, on a stage that multiplies the vocabulary.
    fn vocabulary(&mut self, states: &[f32], needs: &[Need], timings: &mut Timings) -> Vec<Row<'_>>;

    /// What the classification head makes of `states`, `[rows, hidden]`: `[rows, labels]`, on the last stage of a model that has one.
    fn classify(&mut self, states: &[f32], rows: usize) -> Vec<f32>;

    /// Sums the squares of what goes into products from now on, beginning with nothing. Only for a rank that is alone in its stage.
    fn observe(&mut self);

    /// The sums since [`Backend::observe`]; nothing is summed any more.
    fn observed(&mut self) -> Observed;
}
