//! `cargo xtask bench operator`: many deployments with simulated pods, on a cluster of their own.

use anyhow::Result;
use clap::Args;

use crate::{
    cluster,
    process::{cargo, run, say},
};

/// The test that measures.
const TEST: &str = "many::many_deployments_settle_and_then_nothing_is_written";

/// Options of `bench operator`.
#[derive(Args)]
pub(crate) struct Options {
    /// How many deployments.
    #[arg(long, default_value_t = 1000)]
    deployments: usize,
}

/// Builds what `cargo xtask test` builds, and measures the operator.
///
/// # Errors
/// If the cluster does not start, or the operator does not what it should.
pub(crate) fn bench(options: &Options) -> Result<()> {
    cluster::prepare()?;
    say("building the workspace");
    // The same packages and features as `test`: others would compile most dependencies again.
    run(cargo().args(["test", "--workspace", "--no-run"]))?;
    say(&format!("measuring the operator with {} deployments", options.deployments));
    cluster::during(|cargo| {
        cargo.args(["test", "--workspace", "--offline", "--test", "cluster", "--", "--ignored", "--exact", TEST, "--nocapture"]);
        cargo.env("SKEIN_TEST_DEPLOYMENTS", options.deployments.to_string());
    })
}
