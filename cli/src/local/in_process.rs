//! A replica without worker processes: the engine on a thread of its own.

use std::{
    collections::HashMap,
    error::Error,
    sync::{Arc, Mutex, PoisonError, mpsc as jobs},
    thread,
};

use anyhow::Context;
use engine::{Adapter, Engine, MaskSource, StageOutput, Timings};
use plan::{
    adapter::AdapterSource,
    card::ModelCard,
    fleet::FleetReplica,
    step::{Input, Mask, Output, OutputValue, SequenceId, Step, TokenId},
};
use router::replica::{
    AdapterAnswer, AdapterEnd, AdapterLine, AdapterOrder, BoxFuture, Connector, Replica, ReplicaError, Session, StepReply,
};
use tokio::{runtime::Handle, sync::mpsc, time::Instant};
use tracing::warn;

/// Name in errors.
const NAME: &str = "in this process";
/// Steps that may wait while one runs: with one stage, two are in flight, and one more sends without waiting.
const STEPS: usize = 3;

/// An engine that holds a whole model, driven as a replica of one stage and one rank.
#[derive(Debug)]
pub(crate) struct InProcess {
    card: Arc<ModelCard>,
    sessions: jobs::SyncSender<Ends>,
    timings: Arc<Mutex<Timings>>,
}

/// The engine's ends of a session's channels.
struct Ends {
    steps: mpsc::Receiver<Step>,
    replies: mpsc::Sender<Result<StepReply, ReplicaError>>,
    adapters: AdapterEnd,
}

/// Loads an adapter for the engine; why not, for a person. Blocks.
pub(crate) type AdapterLoader = Box<dyn Fn(&AdapterSource) -> Result<Adapter, String> + Send>;

impl InProcess {
    /// Moves `engine` onto its thread, which ends when the replica and its session are dropped.
    pub(crate) fn start(engine: Engine, card: Arc<ModelCard>, loader: AdapterLoader) -> anyhow::Result<Self> {
        // One session is live; the next one may wait here until the engine has finished the last one's step.
        let (sessions, opened) = jobs::sync_channel(1);
        let timings = Arc::default();
        let (told, runtime) = (Arc::clone(&timings), Handle::current());
        thread::Builder::new()
            .name("engine".into())
            .spawn(move || serve(engine, &loader, &opened, &told, &runtime))
            .context("failed to start the engine thread")?;
        Ok(Self { card, sessions, timings })
    }

    /// Where the engine's time went, up to the last step answered.
    pub(crate) fn timings(&self) -> Timings {
        *self.timings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Replica for InProcess {
    fn stages(&self) -> usize {
        1
    }

    fn open(&self) -> BoxFuture<'_, Result<Session, ReplicaError>> {
        Box::pin(async {
            let (steps, receive_steps) = mpsc::channel(STEPS);
            let (send_replies, replies) = mpsc::channel(STEPS + 1);
            let (adapters, end) = AdapterLine::new();
            match self.sessions.try_send(Ends { steps: receive_steps, replies: send_replies, adapters: end }) {
                Ok(()) => Ok(Session { steps, replies, adapters, unmasked: None }),
                Err(jobs::TrySendError::Full(_)) => Err(ReplicaError::Failed {
                    worker: NAME.into(),
                    reason: "busy".into(),
                    detail: "an earlier session has not ended".into(),
                }),
                Err(jobs::TrySendError::Disconnected(_)) => Err(gone()),
            }
        })
    }

    fn card(&self) -> BoxFuture<'_, Result<Arc<ModelCard>, ReplicaError>> {
        Box::pin(async { Ok(self.card.clone()) })
    }
}

/// Hands out one replica and its draft model, whatever the fleet says.
#[derive(Clone)]
pub(crate) struct OneReplica {
    pub(crate) replica: Arc<dyn Replica>,
    pub(crate) draft: Option<Arc<dyn Replica>>,
}

impl Connector for OneReplica {
    fn replica(&self, _replica: &FleetReplica) -> Arc<dyn Replica> {
        self.replica.clone()
    }

    fn draft(&self, _replica: &FleetReplica) -> Option<Arc<dyn Replica>> {
        self.draft.clone()
    }
}

fn gone() -> ReplicaError {
    ReplicaError::Lost { worker: NAME.into(), detail: "the engine thread has ended".into() }
}

/// The engine thread: one session after the other.
fn serve(mut engine: Engine, loader: &AdapterLoader, opened: &jobs::Receiver<Ends>, timings: &Mutex<Timings>, runtime: &Handle) {
    while let Ok(mut ends) = opened.recv() {
        engine.reset();
        let mut sampled = HashMap::new();
        while let Some(work) = runtime.block_on(next(&mut ends)) {
            let step = match work {
                Work::Step(step) => step,
                Work::Order(order) => {
                    if let Some(answer) = obey(&mut engine, loader, order)
                        && ends.adapters.answers.blocking_send(answer).is_err()
                    {
                        break;
                    }
                    continue;
                }
            };
            let reply = run(&mut engine, step, &mut sampled);
            let now = engine.timings();
            let before = std::mem::replace(&mut *timings.lock().unwrap_or_else(PoisonError::into_inner), now);
            if let Some(alarm) = now.alarm(&before) {
                warn!("{alarm}");
            }
            let failed = reply.is_err();
            if ends.replies.blocking_send(reply).is_err() || failed {
                break;
            }
        }
    }
}

/// What the engine does next.
enum Work {
    Step(Step),
    Order(AdapterOrder),
}

/// The next step or order; `None` when the session is dropped.
async fn next(ends: &mut Ends) -> Option<Work> {
    tokio::select! {
        biased;
        step = ends.steps.recv() => step.map(Work::Step),
        Some(order) = ends.adapters.orders.recv() => Some(Work::Order(order)),
    }
}

/// Fills or empties a slot. Steps wait meanwhile: the file of an adapter is small, and there is one process.
fn obey(engine: &mut Engine, loader: &AdapterLoader, order: AdapterOrder) -> Option<AdapterAnswer> {
    match order {
        AdapterOrder::Load { slot, adapter } => {
            let bound = loader(&adapter).and_then(|loaded| engine.bind_adapter(slot, Arc::new(loaded)).map_err(|e| e.to_string()));
            Some(AdapterAnswer { slot, result: bound })
        }
        AdapterOrder::Unload { slot } => {
            engine.unbind_adapter(slot);
            None
        }
    }
}

/// Runs one step. `sampled` holds each live sequence's last token and the step that drew it.
fn run(engine: &mut Engine, mut step: Step, sampled: &mut HashMap<SequenceId, (u64, TokenId)>) -> Result<StepReply, ReplicaError> {
    let failed = |reason: &str, detail: String| ReplicaError::Failed { worker: NAME.into(), reason: reason.into(), detail };
    for sequence in &step.frees {
        sampled.remove(sequence);
    }
    for part in &mut step.sequences {
        if let Input::Sampled { step: from, drafts } = &mut part.input {
            let id = match sampled.get(&part.sequence) {
                Some(&(drawn, id)) if drawn == *from => id,
                _ => return Err(failed("protocol", format!("sequence {} has no token from step {from}", part.sequence))),
            };
            let mut ids = vec![id];
            ids.append(drafts);
            part.input = Input::Ids(ids);
        }
    }
    let mut masks = Masks(step.masks.drain(..).collect());
    match engine.run(&step, &[], &mut masks) {
        Ok(StageOutput::Outputs(outputs)) => {
            remember(step.id, &outputs, sampled);
            Ok(StepReply { step: step.id, arrived: Instant::now(), outputs })
        }
        Ok(StageOutput::Hidden(_) | StageOutput::Question(_)) => Err(failed("engine", "the engine holds no last stage".into())),
        Err(error) => Err(failed("engine", format!("{:#}", anyhow::Error::new(error)))),
    }
}

/// The masks that came with a step.
struct Masks(HashMap<SequenceId, Mask>);

impl MaskSource for Masks {
    fn mask(&mut self, _step: u64, sequence: SequenceId) -> Result<Mask, Box<dyn Error + Send + Sync>> {
        self.0.remove(&sequence).ok_or_else(|| "none came with the step".into())
    }
}

/// Notes each sequence's last drawn token.
fn remember(step: u64, outputs: &[Output], sampled: &mut HashMap<SequenceId, (u64, TokenId)>) {
    for output in outputs {
        if let OutputValue::Token { id, .. } = output.value {
            sampled.insert(output.sequence, (step, id));
        }
    }
}
