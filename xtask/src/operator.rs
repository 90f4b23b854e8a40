//! `cargo xtask bench operator`: many deployments with simulated pods, on a cluster of their own.

use anyhow::Result;
use clap::Args;

use crate::{
    cluster, paths,
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

/// Builds Skein in the profile of this program, and measures its operator.
///
/// # Errors
/// If the cluster does not start, or the operator does not what it should.
pub(crate) fn bench(options: &Options) -> Result<()> {
    cluster::prepare()?;
    say("building skein and its operator");
    let mut build = cargo();
    build.args(["build", "--package", "cli", "--package", "operator"]);
    if paths::built()?.ends_with("release") {
        build.arg("--release");
    }
    run(&mut build)?;
    let test = ["test", "--offline", "--package", "e2e", "--test", "cluster"];
    run(cargo().args(test).arg("--no-run"))?;
    say(&format!("measuring the operator with {} deployments", options.deployments));
    cluster::during(|cargo| {
        cargo.args(test).args(["--", "--ignored", "--exact", TEST, "--nocapture"]);
        cargo.env("SKEIN_TEST_DEPLOYMENTS", options.deployments.to_string());
    })
}
