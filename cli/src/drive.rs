//! Steps of one's own making on a replica: what `eval` and `bench` use in place of the scheduler.

use anyhow::Context;
use plan::{
    adapter::AdapterSource,
    step::{Output, Step},
};
use router::replica::{AdapterAnswer, AdapterLine, AdapterOrder, Replica, Session};

/// A session whose steps are made by hand.
#[derive(Debug)]
pub(crate) struct Drive {
    session: Session,
    /// Number of the last step sent.
    sent: u64,
    /// Number of the last step answered.
    answered: u64,
}

impl Drive {
    /// Opens a session on `replica`.
    pub(crate) async fn open(replica: &dyn Replica) -> anyhow::Result<Self> {
        Ok(Self { session: replica.open().await.context("failed to open a session")?, sent: 0, answered: 0 })
    }

    /// Has every worker load an adapter into a slot, and waits for it.
    pub(crate) async fn load(&mut self, slot: u32, adapter: AdapterSource) -> anyhow::Result<()> {
        let AdapterLine { orders, answers } = &mut self.session.adapters;
        // A session that is over takes no orders; its last reply says why.
        if orders.send(AdapterOrder::Load { slot, adapter }).await.is_ok() {
            tokio::select! {
                Some(AdapterAnswer { result, .. }) = answers.recv() => return result.map_err(|why| anyhow::anyhow!("the adapter is not loaded: {why}")),
                Some(reply) = self.session.replies.recv() => drop(reply.context("the session ended")?),
                else => {}
            }
        }
        anyhow::bail!("the session ended while an adapter was loaded")
    }

    /// Sends a step, numbered here, and returns its number. Waits while too many steps are unanswered.
    pub(crate) async fn send(&mut self, mut step: Step) -> anyhow::Result<u64> {
        self.sent += 1;
        step.id = self.sent;
        if self.session.steps.send(step).await.is_err() {
            // The session is over; its last reply says why.
            while let Some(reply) = self.session.replies.recv().await {
                reply.context("the session ended")?;
            }
            anyhow::bail!("the session ended at step {}", self.sent);
        }
        Ok(self.sent)
    }

    /// Waits for the outputs of the oldest unanswered step.
    pub(crate) async fn receive(&mut self) -> anyhow::Result<Vec<Output>> {
        self.answered += 1;
        match self.session.replies.recv().await {
            Some(Ok(reply)) if reply.step == self.answered => Ok(reply.outputs),
            Some(Ok(reply)) => anyhow::bail!("reply of step {} came, expected step {}", reply.step, self.answered),
            Some(Err(error)) => Err(anyhow::Error::new(error).context(format!("step {} failed", self.answered))),
            None => anyhow::bail!("the session ended before step {} was answered", self.answered),
        }
    }

    /// Sends a step and waits for its outputs; nothing may be unanswered.
    pub(crate) async fn run(&mut self, step: Step) -> anyhow::Result<Vec<Output>> {
        self.send(step).await?;
        self.receive().await
    }
}
