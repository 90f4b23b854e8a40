//! Waiting for workers to load their weights, with a bar.

use std::time::Duration;

use futures_util::future::join_all;
use indicatif::ProgressBar;
use plan::fleet::FleetState;
use router::replica::{self, Loading};
use tokio::sync::watch;

use super::{deployment::Planned, fleet};
use crate::output::{self, Unit};

/// Pause between questions: short enough to be smooth on a terminal, and to cost little of a small model's start.
const PERIOD: Duration = Duration::from_millis(40);

/// Asks every worker how far it is until all have loaded; a worker that does not answer has loaded nothing.
pub(crate) async fn wait(quiet: bool, planned: &[Planned], fleet: &watch::Receiver<FleetState>, token: &str) {
    let sizes: Vec<u64> = planned.iter().flat_map(shard_sizes).collect();
    let bar = Cleared(output::bar(quiet, "Loading", sizes.iter().sum(), Unit::Bytes));
    loop {
        let addresses: Vec<String> = fleet::addresses(&fleet.borrow()).cloned().collect();
        let answers = join_all(addresses.iter().map(|address| replica::loading(address, Some(token)))).await;
        let answers = answers.into_iter().map(|answer| answer.unwrap_or(Loading { done: false, fraction: 0.0 }));
        let (mut loaded, mut all) = (0, true);
        for (answer, &size) in answers.zip(&sizes) {
            loaded += if answer.done { size } else { (size as f64 * f64::from(answer.fraction)) as u64 };
            all &= answer.done;
        }
        bar.0.set_position(loaded);
        if all {
            return;
        }
        tokio::time::sleep(PERIOD).await;
    }
}

/// Bytes of each worker, in the order of [`fleet::addresses`].
fn shard_sizes(planned: &Planned) -> impl Iterator<Item = u64> {
    let shards = || planned.plan.stages.iter().flat_map(|stage| &stage.shards);
    let draft = || planned.draft.iter().flat_map(|draft| &draft.plan.stages).flat_map(|stage| &stage.shards);
    (0..planned.replicas).flat_map(move |_| shards().chain(draft()).map(|shard| shard.weight_bytes))
}

/// A bar that goes away with whatever waited beside it.
struct Cleared(ProgressBar);

impl Drop for Cleared {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
