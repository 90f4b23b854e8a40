//! The simulated replica: its engine behind a session, in tokio's time, and the ways it can break.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use plan::{
    card::ModelCard,
    fleet::{FleetDraft, FleetReplica},
    shard::KvGeometry,
    step::{Input, Step},
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::Instant,
};

use super::{SimulatedEngine, SimulatedModel};
use crate::replica::{AdapterEnd, AdapterLine, BoxFuture, Connector, Replica, ReplicaError, Session, StepReply};

/// What a step costs on one stage.
#[derive(Clone, Copy, Debug)]
pub struct CostModel {
    /// Reading the weights, once a step.
    pub step: Duration,
    /// Each token on top.
    pub token: Duration,
}

impl CostModel {
    /// Steps take no time.
    pub const FREE: Self = Self { step: Duration::ZERO, token: Duration::ZERO };

    /// Time of `tokens` tokens on one stage.
    pub fn of(&self, tokens: usize) -> Duration {
        self.step + self.token * tokens as u32
    }
}

/// When the stages of a pipeline are done with what they were given.
#[derive(Clone, Debug)]
pub struct Pipeline {
    free_at: Vec<Duration>,
    /// End of each of the last steps.
    ended: HashMap<u64, Duration>,
    cost: CostModel,
}

impl Pipeline {
    /// `stages` idle stages.
    pub fn new(stages: usize, cost: CostModel) -> Self {
        Self { free_at: vec![Duration::ZERO; stages], ended: HashMap::new(), cost }
    }

    /// Puts a step in at `now`; returns when its reply comes. A stage runs one step at a time, and a step that continues from
    /// a token drawn in another starts after that one's end.
    pub fn run(&mut self, now: Duration, step: &Step) -> Duration {
        let drawn_in = step.sequences.iter().filter_map(|s| match &s.input {
            Input::Sampled { step, .. } => self.ended.get(step).copied(),
            Input::Ids(_) => None,
        });
        let mut at = drawn_in.fold(now, Duration::max);
        for stage in &mut self.free_at {
            at = at.max(*stage) + self.cost.of(step.tokens());
            *stage = at;
        }
        self.ended.insert(step.id, at);
        self.ended.remove(&step.id.saturating_sub(64));
        at
    }
}

/// How a simulated replica misbehaves; set through [`SimulatedReplica::set_fault`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// Not at all.
    #[default]
    None,
    /// The session breaks when it is given a step with this number or a later one; sessions that follow work.
    LoseAtStep(u64),
    /// The session is broken and none can be opened, and nothing else answers.
    Down,
    /// Steps are not answered until this ends.
    Deaf,
    /// The session is broken and none can be opened: its workers load their weights again.
    Loading,
}

/// A replica that runs a [`SimulatedEngine`] in tokio's time.
#[derive(Debug)]
pub struct SimulatedReplica {
    model: SimulatedModel,
    kv: KvGeometry,
    stages: usize,
    cost: CostModel,
    card: Arc<ModelCard>,
    fault: watch::Sender<Fault>,
    running: Mutex<Option<JoinHandle<()>>>,
    steps: Arc<AtomicU64>,
    /// See [`SimulatedEngine::goes_back`].
    goes_back: bool,
}

impl SimulatedReplica {
    /// A replica of `stages` stages.
    pub fn new(model: SimulatedModel, kv: KvGeometry, stages: usize, cost: CostModel, card: Arc<ModelCard>) -> Self {
        let steps = Arc::default();
        Self { model, kv, stages, cost, card, fault: watch::Sender::new(Fault::None), running: Mutex::new(None), steps, goes_back: false }
    }

    /// Misbehave from now on.
    pub fn set_fault(&self, fault: Fault) {
        self.fault.send_replace(fault);
    }

    /// Steps replied to in all sessions.
    pub fn steps(&self) -> u64 {
        self.steps.load(Ordering::Relaxed)
    }
}

impl Replica for SimulatedReplica {
    fn stages(&self) -> usize {
        self.stages
    }

    fn open(&self) -> BoxFuture<'_, Result<Session, ReplicaError>> {
        Box::pin(async move {
            let last = self.running.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(last) = last {
                // It ends when its session is dropped, which the caller did.
                let _ = last.await;
            }
            match *self.fault.borrow() {
                Fault::Down => return Err(lost("it is down")),
                Fault::Loading => return Err(ReplicaError::Loading { worker: "simulated".to_owned(), percent: 50 }),
                Fault::None | Fault::Deaf | Fault::LoseAtStep(_) => {}
            }
            let (steps, inbox) = mpsc::channel(self.stages + 1);
            let (outbox, replies) = mpsc::channel(self.stages + 2);
            let mut engine = SimulatedEngine::new(self.model, self.kv.clone());
            engine.goes_back = self.goes_back;
            let run = Run {
                engine,
                pipeline: Pipeline::new(self.stages, self.cost),
                fault: self.fault.subscribe(),
                steps: self.steps.clone(),
                start: Instant::now(),
            };
            let (adapters, end) = AdapterLine::new();
            let fault = self.fault.clone();
            let task = tokio::spawn(async move {
                if let Some(error) = run.serve(inbox, end, &outbox).await {
                    fault.send_if_modified(|f| {
                        let once = matches!(f, Fault::LoseAtStep(_));
                        if once {
                            *f = Fault::None;
                        }
                        once
                    });
                    // The receiver may be gone, and then nobody wants to know.
                    let _ = outbox.send(Err(error)).await;
                }
            });
            *self.running.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
            Ok(Session { steps, replies, adapters, unmasked: None })
        })
    }

    fn card(&self) -> BoxFuture<'_, Result<Arc<ModelCard>, ReplicaError>> {
        Box::pin(async move { if *self.fault.borrow() == Fault::Down { Err(lost("it is down")) } else { Ok(self.card.clone()) } })
    }
}

struct Run {
    engine: SimulatedEngine,
    pipeline: Pipeline,
    fault: watch::Receiver<Fault>,
    steps: Arc<AtomicU64>,
    start: Instant,
}

impl Run {
    /// Serves steps until the session is dropped (`None`) or broken.
    async fn serve(
        mut self,
        mut inbox: mpsc::Receiver<Step>,
        mut adapters: AdapterEnd,
        outbox: &mpsc::Sender<Result<StepReply, ReplicaError>>,
    ) -> Option<ReplicaError> {
        let mut due: VecDeque<(Instant, StepReply)> = VecDeque::new();
        let mut down = self.fault.clone();
        loop {
            let next = due.front().map_or_else(Instant::now, |(at, _)| *at);
            let deaf = *self.fault.borrow_and_update() == Fault::Deaf;
            tokio::select! {
                biased;
                is_down = async { down.wait_for(|f| matches!(f, Fault::Down | Fault::Loading)).await.is_ok() } => {
                    return is_down.then(|| lost("it went down"));
                }
                Ok(()) = self.fault.changed(), if deaf => {}
                () = tokio::time::sleep_until(next), if !due.is_empty() && !deaf => {
                    let (_, mut reply) = due.pop_front()?;
                    reply.arrived = Instant::now();
                    self.steps.fetch_add(1, Ordering::Relaxed);
                    outbox.send(Ok(reply)).await.ok()?;
                }
                Some(order) = adapters.orders.recv() => {
                    match self.engine.order(order) {
                        Ok(None) => {}
                        Ok(Some(answer)) => adapters.answers.send(answer).await.ok()?,
                        Err(detail) => return Some(ReplicaError::Protocol { worker: "simulated".to_owned(), detail }),
                    }
                }
                step = inbox.recv() => {
                    let step = step?;
                    if matches!(*self.fault.borrow(), Fault::LoseAtStep(n) if step.id >= n) {
                        return Some(lost("it broke at a step"));
                    }
                    let at = self.start + self.pipeline.run(self.start.elapsed(), &step);
                    match self.engine.run(&step) {
                        Ok(outputs) => due.push_back((at, StepReply { step: step.id, arrived: at, outputs })),
                        Err(detail) => return Some(ReplicaError::Protocol { worker: "simulated".to_owned(), detail }),
                    }
                }
            }
        }
    }
}

fn lost(detail: &str) -> ReplicaError {
    ReplicaError::Lost { worker: "simulated".to_owned(), detail: detail.to_owned() }
}

/// Makes simulated replicas, and hands them out by name to whoever wants to break them.
#[derive(Debug)]
pub struct SimulatedConnector {
    model: SimulatedModel,
    stages: usize,
    cost: CostModel,
    card: Arc<ModelCard>,
    replicas: Mutex<HashMap<String, Arc<SimulatedReplica>>>,
    /// The model of draft models.
    pub draft: Option<SimulatedModel>,
    /// Their files; those of the model where there are none.
    pub draft_card: Option<Arc<ModelCard>>,
}

impl SimulatedConnector {
    /// Replicas of `stages` stages that all run `model`.
    pub fn new(model: SimulatedModel, stages: usize, cost: CostModel, card: Arc<ModelCard>) -> Self {
        Self { model, stages, cost, card, replicas: Mutex::default(), draft: None, draft_card: None }
    }

    /// The replica made last under this name; a draft model's is that of its replica and `-draft`.
    pub fn get(&self, name: &str) -> Option<Arc<SimulatedReplica>> {
        self.replicas.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }
}

impl Connector for SimulatedConnector {
    fn replica(&self, replica: &FleetReplica) -> Arc<dyn Replica> {
        let made = SimulatedReplica::new(self.model, replica.limits.kv.clone(), self.stages, self.cost, self.card.clone());
        let made = Arc::new(made);
        self.replicas.lock().unwrap_or_else(PoisonError::into_inner).insert(replica.name.clone(), made.clone());
        made
    }

    fn draft(&self, replica: &FleetReplica) -> Option<Arc<dyn Replica>> {
        let kv = replica.draft.as_ref()?.limits.kv.clone();
        let card = self.draft_card.as_ref().unwrap_or(&self.card).clone();
        let made = SimulatedReplica::new(self.draft?, kv, 1, self.cost, card);
        let made = Arc::new(SimulatedReplica { goes_back: true, ..made });
        self.replicas.lock().unwrap_or_else(PoisonError::into_inner).insert(FleetDraft::name(&replica.name), made.clone());
        Some(made)
    }
}
