//! A draft model beside a deployment's own: whether it can guess for it, and how its one worker is laid out.

use super::{Capacity, PlanError, Spec, plan};
use crate::{fleet::FleetDraft, model::ModelHeader, predict, shard::ExecutionPlan};

/// Most sequences that are guessed for at once: steps with more rows than that have no drafts.
pub const DRAFT_SEQUENCES: usize = 16;
/// Most tokens in a step of the draft model.
const BATCH_TOKENS: usize = 256;
/// What a step of it takes at the least, in thousandths of one of the model that it guesses for: it has to be sent and answered too.
const LEAST_COST: u32 = 50;
/// From here on what a step of it takes is more than its guesses are worth to a sequence that is alone (crate `router` tells what they are worth).
pub const DRAFT_COST_LIMIT: u32 = 500;

/// Why a model cannot guess for another.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DraftError {
    /// Only tokens are guessed.
    #[error("{which} is an encoder, which draws no tokens")]
    Encoder {
        /// Which of the two.
        which: &'static str,
    },
    /// Ids would mean something else.
    #[error("the draft model has a vocabulary of {got} tokens, expected the model's {expected}")]
    Vocabulary {
        /// The draft model's.
        got: usize,
        /// The model's.
        expected: usize,
    },
    /// Its guesses come too late.
    #[error("a token takes the draft model {:.2} of the model's time, so its guesses are never worth it; expected less than {:.2}", f64::from(*cost) / 1000.0, f64::from(DRAFT_COST_LIMIT) / 1000.0)]
    Slow {
        /// What a step of it takes, in thousandths of one of the model.
        cost: u32,
    },
    /// It does not fit.
    #[error("the draft model {message}")]
    Memory {
        /// What the plan says.
        message: String,
    },
    /// It cannot be laid out.
    #[error("the draft model cannot be planned")]
    Plan(#[from] PlanError),
}

/// Checks that a model can guess for another, as far as headers tell; that their tokenizers are the same is for whoever has them.
///
/// # Errors
/// When it cannot.
pub fn check_draft(model: &ModelHeader, draft: &ModelHeader) -> Result<(), DraftError> {
    for (which, header) in [("the model", model), ("the draft model", draft)] {
        if header.config.encoder.is_some() {
            return Err(DraftError::Encoder { which });
        }
    }
    let (got, expected) = (draft.config.vocab, model.config.vocab);
    if got == expected { Ok(()) } else { Err(DraftError::Vocabulary { got, expected }) }
}

/// Plans the one worker of a draft model. Where its context is shorter than `context`, nothing is guessed beyond it.
///
/// # Errors
/// When it cannot be laid out, or has too little memory.
pub fn plan_draft(draft: &ModelHeader, context: usize, capacity: &Capacity) -> Result<ExecutionPlan, DraftError> {
    let spec = Spec {
        max_context: Some(context.min(draft.config.context)),
        max_batch_sequences: DRAFT_SEQUENCES,
        max_batch_tokens: BATCH_TOKENS,
        ..Spec::default()
    };
    let laid_out = plan(&spec, draft, capacity)?;
    if laid_out.fits { Ok(laid_out) } else { Err(DraftError::Memory { message: laid_out.message }) }
}

impl FleetDraft {
    /// What its worker calls the replica that it is the only worker of: the draft model of `replica`.
    pub fn name(replica: &str) -> String {
        format!("{replica}-draft")
    }

    /// Of a draft model's plan, beside the plan of the model that it guesses for; its worker has said nothing yet.
    ///
    /// # Errors
    /// When guessing takes so long that it is never worth it.
    pub fn of(draft: &ExecutionPlan, model: &ExecutionPlan) -> Result<Self, DraftError> {
        let cost = predict::thousandths(draft, model, LEAST_COST);
        if cost >= DRAFT_COST_LIMIT {
            return Err(DraftError::Slow { cost });
        }
        Ok(Self { worker: String::new(), limits: super::limits(draft, false), cost, compared: false })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::Sample;

    const ANY: Capacity = Capacity { memory_bytes: None };

    #[test]
    fn ids_must_mean_the_same() {
        let model = Sample::llama().model();
        assert_eq!(check_draft(&model, &Sample { layers: 1, ..Sample::llama() }.model()), Ok(()));
        let other = Sample { vocab: 7, ..Sample::llama() }.model();
        assert_eq!(check_draft(&model, &other), Err(DraftError::Vocabulary { got: 7, expected: 6 }));
    }

    #[test]
    fn its_context_is_the_shorter_of_both() {
        let short = Sample { context: 32, ..Sample::llama() }.model();
        assert_eq!(plan_draft(&short, 64, &ANY).unwrap().max_context, 32);
        let draft = plan_draft(&short, 20, &ANY).unwrap();
        assert_eq!((draft.max_context, draft.stages.len(), draft.max_batch_sequences), (20, 1, DRAFT_SEQUENCES));
        let model = plan(&Spec::default(), &Sample { layers: 12, ..Sample::llama() }.model(), &ANY).unwrap();
        let fleet = FleetDraft::of(&draft, &model).unwrap();
        assert!((50..DRAFT_COST_LIMIT).contains(&fleet.cost) && !fleet.limits.prefix_caching, "{fleet:?}");
    }

    #[test]
    fn what_is_as_slow_or_too_large_is_refused() {
        let model = Sample::llama().model();
        let draft = plan_draft(&model, 20, &ANY).unwrap();
        let refused = FleetDraft::of(&draft, &draft).unwrap_err();
        assert_eq!(refused, DraftError::Slow { cost: 1000 });
        assert!(refused.to_string().contains("1.00 of the model's time"), "{refused}");
        let refused = plan_draft(&model, 20, &Capacity { memory_bytes: Some(1) }).unwrap_err();
        assert!(matches!(&refused, DraftError::Memory { message } if message.starts_with("does not fit")), "{refused}");
    }
}
