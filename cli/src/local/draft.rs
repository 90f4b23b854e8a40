//! A draft model beside a deployment's own: opened, compared, planned.

use anyhow::Context;
use plan::{
    fleet::FleetDraft,
    manifest::DraftModelSpec,
    planner::{self, Capacity, DraftError},
    shard::ExecutionPlan,
};
use router::encode;
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
        let plan = planner::plan_draft(&draft.header, context, &capacity).map_err(|error| match error {
            DraftError::Memory { .. } => bad_input!("{}: {error}, which is the part of memory that draft models may take", place()),
            error => bad_input!("{}: {:#}", place(), anyhow::Error::from(error)),
        })?;
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
        let place = || format!("{} cannot be a draft model", draft.name);
        let fleet = FleetDraft::of(&plan, model).with_context(place).bad_input()?;
        // Its tokens were compared when it was opened.
        Ok(Draft { fleet: FleetDraft { compared: true, ..fleet }, model: draft, plan })
    }
}

/// Checks that each id stands for the same bytes in both models.
async fn same_tokens(draft: &Model, model: &Model) -> Result<(), String> {
    let mut cards = Vec::with_capacity(2);
    for of in [draft, model] {
        cards.push(of.card().await.map_err(|_| format!("the tokenizer of {} cannot be read", of.name))?);
    }
    let compared = spawn_blocking(move || encode::same_tokens(&cards[0], &cards[1])).await;
    compared.map_err(|error| error.to_string())?.map_err(|error| error.to_string())
}
