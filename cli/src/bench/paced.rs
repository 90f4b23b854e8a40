//! Replicas without weights that take as long as a cost model says, each on a thread of its own, as an engine has one.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use plan::{card::ModelCard, fleet::FleetReplica, shard::KvGeometry, step::Step};
use router::replica::{
    AdapterLine, BoxFuture, Connector, Replica, ReplicaError, Session, StepReply,
    simulated::{CostModel, Pipeline, SimulatedEngine, SimulatedModel},
};
use tokio::sync::mpsc;

/// Name of the threads, and of the worker in errors.
pub(crate) const NAME: &str = "simulated";
/// With one stage two steps are in flight.
const STEPS: usize = 2;

/// Makes replicas of one stage.
#[derive(Debug)]
pub(crate) struct PacedConnector {
    pub(crate) model: SimulatedModel,
    pub(crate) cost: CostModel,
    pub(crate) card: Arc<ModelCard>,
}

impl Connector for PacedConnector {
    fn replica(&self, replica: &FleetReplica) -> Arc<dyn Replica> {
        Arc::new(Paced { model: self.model, cost: self.cost, card: self.card.clone(), kv: replica.limits.kv.clone() })
    }
}

struct Paced {
    model: SimulatedModel,
    cost: CostModel,
    card: Arc<ModelCard>,
    kv: KvGeometry,
}

impl Replica for Paced {
    fn stages(&self) -> usize {
        1
    }

    fn open(&self) -> BoxFuture<'_, Result<Session, ReplicaError>> {
        Box::pin(async {
            let ((steps, inbox), (outbox, replies)) = (mpsc::channel(STEPS), mpsc::channel(STEPS + 1));
            let mut engine = SimulatedEngine::new(self.model, self.kv.clone());
            // That scheduler and blocks are right is for tests; here it would take time.
            engine.verify = false;
            let pipeline = Pipeline::new(1, self.cost);
            // It ends with its session.
            let started = thread::Builder::new().name(NAME.into()).spawn(move || serve(engine, pipeline, inbox, &outbox));
            started.map_err(|error| ReplicaError::Lost { worker: NAME.into(), detail: format!("no thread: {error}") })?;
            let (adapters, _) = AdapterLine::new();
            Ok(Session { steps, replies, adapters, unmasked: None })
        })
    }

    fn card(&self) -> BoxFuture<'_, Result<Arc<ModelCard>, ReplicaError>> {
        Box::pin(async { Ok(self.card.clone()) })
    }
}

/// Runs steps until the session is dropped, or a step cannot be.
fn serve(
    mut engine: SimulatedEngine,
    mut pipeline: Pipeline,
    mut inbox: mpsc::Receiver<Step>,
    outbox: &mpsc::Sender<Result<StepReply, ReplicaError>>,
) {
    let begun = Instant::now();
    while let Some(step) = inbox.blocking_recv() {
        let due = pipeline.run(begun.elapsed(), &step);
        let reply = engine.run(&step).map_err(|detail| ReplicaError::Protocol { worker: NAME.into(), detail });
        wait(begun, due);
        let arrived = tokio::time::Instant::now();
        let reply = reply.map(|outputs| StepReply { step: step.id, arrived, outputs });
        let failed = reply.is_err();
        if outbox.blocking_send(reply).is_err() || failed {
            return;
        }
    }
}

/// Sleeps until `due` has passed since `begun`.
fn wait(begun: Instant, due: Duration) {
    let left = due.saturating_sub(begun.elapsed());
    if !left.is_zero() {
        thread::sleep(left);
    }
}

#[cfg(test)]
mod tests {
    use plan::step::{Input, SequenceStep};

    use super::*;

    fn step(id: u64, tokens: u32) -> Step {
        let part = SequenceStep {
            sequence: 1,
            first_position: 0,
            input: Input::Ids((0..tokens).collect()),
            tables: Vec::new(),
            wants: Vec::new(),
            begin: None,
            adapter: 0,
            second: 0,
        };
        Step { id, sequences: vec![part], ..Step::default() }
    }

    #[test]
    fn steps_take_what_the_cost_model_says_one_after_the_other() {
        let millis = Duration::from_millis;
        let cost = CostModel { step: millis(20), token: millis(1) };
        let mut pipeline = Pipeline::new(1, cost);
        assert_eq!(pipeline.run(millis(0), &step(1, 4)), millis(24));
        assert_eq!(pipeline.run(millis(3), &step(2, 1)), millis(45), "it waits for the one before");
        assert_eq!(pipeline.run(millis(100), &step(3, 0)), millis(120), "an idle one starts at once");
    }
}
