//! A draft model beside a deployment's own: opened, compared, planned.

use anyhow::Context;
use plan::{
    fleet::FleetDraft,
    manifest::DraftModelSpec,
    planner::{self, Capacity},
    shard::ExecutionPlan,
};
use router::{encode::Tokenizer, scheduler};
use tokio::task::spawn_blocking;

use super::memory;
use crate::{
    args::Global,
    exit::{BadInput, Outcome, bad_input},
    model::Model,
};

/// Part of the free memory that all draft models together may be planned into; they take what they need of it.
const PART: u64 = 4;

/// A draft model, and how its worker is laid out.
#[derive(Debug)]
pub(crate) struct Draft {
    pub(crate) model: Model,
    pub(crate) plan: ExecutionPlan,
    /// What routers are told of it.
    pub(crate) fleet: FleetDraft,
}

/// A draft model that is planned before the model that it guesses for, which has what memory it leaves.
#[derive(Debug)]
pub(super) struct Opened {
    model: Model,
    plan: ExecutionPlan,
}

impl Opened {
    /// Opens the draft model of `model`, sequences of which have at most `context` tokens; `replicas` have one each.
    ///
    /// # Errors
    /// Bad input when there is none, or it cannot guess for `model`.
    pub(super) async fn open(global: &Global, spec: &DraftModelSpec, model: &Model, context: usize, replicas: usize) -> Outcome<Self> {
        let draft = Model::beside(global, &spec.uri, spec.digest.as_deref()).await?;
        let place = || format!("{} cannot be the draft model of {}", draft.name, model.name);
        planner::check_draft(&model.header, &draft.header).with_context(place).bad_input()?;
        let capacity = Capacity { memory_bytes: memory::free().map(|bytes| bytes / PART / replicas.max(1) as u64) };
        let plan = planner::plan_draft(&draft.header, context, &capacity).with_context(place).bad_input()?;
        if !plan.fits {
            return Err(bad_input!("{}: {}, which is the part of memory that draft models may take", place(), plan.message));
        }
        same_tokens(&draft, model).await.map_err(|why| bad_input!("{}: {why}", place()))?;
        Ok(Self { model: draft, plan })
    }

    /// Bytes of its worker's weights and cache.
    pub(super) fn bytes(&self) -> u64 {
        self.plan.stages.iter().flat_map(|stage| &stage.shards).map(|shard| shard.weight_bytes + shard.kv_bytes).sum()
    }

    /// Beside the plan of the model that it guesses for.
    ///
    /// # Errors
    /// Bad input when guessing takes so long that it is never worth it.
    pub(super) fn beside(self, model: &ExecutionPlan) -> Outcome<Draft> {
        let Self { model: draft, plan } = self;
        let fleet = FleetDraft::of(&plan, model);
        if scheduler::is_worth_a_try(fleet.cost) {
            return Ok(Draft { model: draft, plan, fleet });
        }
        Err(bad_input!(
            "{} cannot be a draft model: a token takes it {:.2} of the model's time, so its guesses are never worth it; expected a smaller one",
            draft.name,
            f64::from(fleet.cost) / 1000.0
        ))
    }
}

/// Checks that each id stands for the same bytes in both models.
async fn same_tokens(draft: &Model, model: &Model) -> Result<(), String> {
    let mut tokenizers = Vec::with_capacity(2);
    for of in [draft, model] {
        let card = of.card().await.map_err(|_| format!("the tokenizer of {} cannot be read", of.name))?;
        let built = spawn_blocking(move || Tokenizer::from_card(&card)).await.map_err(|error| error.to_string())?;
        tokenizers.push(built.map_err(|error| format!("the tokenizer of {}: {error}", of.name))?);
    }
    let [got, expected] = tokenizers.as_slice() else { return Ok(()) };
    if got.vocab() != expected.vocab() {
        return Err(format!("its tokenizer has {} tokens, expected the model's {}", got.vocab(), expected.vocab()));
    }
    let other = |id: &u32| got.piece(*id) != expected.piece(*id) || got.is_control(*id) != expected.is_control(*id);
    match (0..expected.vocab() as u32).find(other) {
        None => Ok(()),
        Some(id) => {
            let text = |tokenizer: &Tokenizer| String::from_utf8_lossy(tokenizer.piece(id)).into_owned();
            Err(format!("its token {id} is {:?}, expected {:?}, which is the model's", text(got), text(expected)))
        }
    }
}
