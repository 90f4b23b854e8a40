//! Deployments that answer on this machine: a router's edge in this process, and behind it one engine here or many workers.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, anyhow};
use router::{
    edge::{Edge, EdgeOptions},
    replica::{Connector, WorkersConnector},
};
use tokio::sync::watch;

use super::{
    deployment::Planned,
    fleet,
    in_process::OneReplica,
    loaded::{self, Loaded},
    loading,
    workers::{Common, Keep, Workers, draw_token},
};
use crate::{
    args::{Global, Placement},
    exit::{Failure, Outcome, bad_input},
    output,
};

/// Longest that a stream waits for a lost replica: a worker is started again at once, but has its weights to load.
const RESUME: Duration = Duration::from_secs(120);
/// Longest from loaded weights to the first token.
const PROOF: Duration = Duration::from_secs(120);

/// Deployments, started.
pub(crate) struct Serving {
    pub(crate) edge: Edge,
    planned: Vec<Planned>,
    behind: Behind,
}

/// What computes.
enum Behind {
    Engine { engine: Box<Loaded>, draft: Option<Box<Loaded>> },
    Workers { workers: Workers, token: String },
}

impl Serving {
    /// Starts what `planned` says, and the edge before it.
    ///
    /// # Errors
    /// Bad input when a plan does not fit, or weights cannot be loaded.
    pub(crate) async fn start(global: &Global, planned: Vec<Planned>, placement: &Placement) -> Outcome<Self> {
        if let Some(wide) = planned.iter().find(|deployment| !deployment.plan.fits) {
            return Err(bad_input!("{}: {}", wide.name, wide.plan.message));
        }
        let isa = loaded::isa(placement)?;
        let threads = placement.threads();
        let (behind, state, connector): (_, _, Arc<dyn Connector>) = match planned.as_slice() {
            [only] if fleet::all_workers(&planned) == 1 => {
                // One state for good: without its sender it stays in force.
                let state = watch::Sender::new(fleet::state(&planned)).subscribe();
                let engine = loaded::in_process(global, only.model.clone(), only.plan.clone(), isa, threads).await?;
                let draft = match &only.draft {
                    // The two take turns, so each has all threads.
                    Some(draft) => Some(loaded::in_process(global, draft.model.clone(), draft.plan.clone(), isa, threads).await?),
                    None => None,
                };
                let connector = OneReplica { replica: engine.replica.clone(), draft: draft.as_ref().map(|draft| draft.replica.clone()) };
                (Behind::Engine { engine: Box::new(engine), draft: draft.map(Box::new) }, state, Arc::new(connector))
            }
            _ => {
                let token = draw_token().context("failed to draw a token for the workers")?;
                let common = Common { global, isa, threads, collective: placement.collective, token: &token };
                let workers = Workers::start(&planned, &common, Keep::Alive).await?;
                let (state, connector) = (workers.fleet(), WorkersConnector::new(Some(token.clone())));
                (Behind::Workers { workers, token }, state, Arc::new(connector))
            }
        };
        let edge = Edge::start(state, EdgeOptions { connector, resume: RESUME, deadline: None });
        Ok(Self { edge, planned, behind })
    }

    /// Waits until a token came out of every replica.
    ///
    /// # Errors
    /// When a worker cannot be kept, or no token comes.
    pub(crate) async fn ready(&self, quiet: bool) -> Outcome {
        tokio::select! {
            biased;
            failure = self.failed() => Err(failure),
            done = self.proven(quiet) => done,
        }
    }

    async fn proven(&self, quiet: bool) -> Outcome {
        if let Behind::Workers { workers, token } = &self.behind {
            loading::wait(quiet, &self.planned, &workers.fleet(), token).await;
        }
        let waiting = output::spinner(quiet, "Waiting");
        // What a manifest keeps at no replicas is known by name and refused, and does not hold up the rest.
        for (number, deployment) in self.planned.iter().enumerate().filter(|(_, deployment)| deployment.replicas > 0) {
            waiting.set_message(format!("for the first token of {}", deployment.served));
            match tokio::time::timeout(PROOF, self.edge.wait_complete(&deployment.served)).await {
                Ok(true) => {}
                Ok(false) => return Err(anyhow!("the router stopped before {} was ready", deployment.served).into()),
                Err(_) => return Err(self.silent(deployment)),
            }
            if let Some(failure) = self.adapter_failure(deployment) {
                return Err(failure);
            }
            if let Behind::Workers { workers, .. } = &self.behind {
                workers.prove(number);
            }
        }
        waiting.finish_and_clear();
        Ok(())
    }

    /// Why an adapter of a deployment cannot be used, where one cannot.
    fn adapter_failure(&self, deployment: &Planned) -> Option<Failure> {
        let load = self.edge.load().into_iter().find(|load| load.deployment == deployment.name)?;
        let adapters = load.replicas.into_iter().flat_map(|replica| replica.adapters);
        let (name, why) = adapters.filter_map(|adapter| Some((adapter.name, adapter.failure?))).next()?;
        Some(anyhow!("adapter {name} of {} cannot be loaded: {why}", deployment.served).into())
    }

    /// Why a deployment has not answered, as far as it is known.
    fn silent(&self, deployment: &Planned) -> Failure {
        let load = self.edge.load().into_iter().find(|load| load.deployment == deployment.name);
        let last = load.and_then(|load| load.replicas.into_iter().find_map(|replica| replica.last_failure));
        let because = last.map(|failure| format!(": {failure}")).unwrap_or_default();
        anyhow!("{} gave no token within {} s of loading{because}", deployment.served, PROOF.as_secs()).into()
    }

    /// Completes when something ended that cannot be started again, with the reason.
    pub(crate) async fn failed(&self) -> Failure {
        match &self.behind {
            Behind::Engine { .. } => std::future::pending().await,
            Behind::Workers { workers, .. } => workers.failed().await,
        }
    }

    /// What is served.
    pub(crate) fn planned(&self) -> &[Planned] {
        &self.planned
    }

    /// Ends all streams, then the workers, and waits for them.
    pub(crate) async fn stop(self) {
        self.edge.shutdown().await;
        drop(self.edge);
        match self.behind {
            Behind::Engine { engine, draft } => {
                engine.close().await;
                if let Some(draft) = draft {
                    draft.close().await;
                }
            }
            Behind::Workers { workers, .. } => workers.stop().await,
        }
    }
}
