//! A cluster of its own for a run of tests: up before it, down after it, whatever becomes of the tests.

use std::{fs::File, os::unix::process::CommandExt, process::Command};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::signal::unix::{SignalKind, signal};

use super::{
    folder::Cluster,
    require_root,
    startup::{self, Content},
    teardown,
};
use crate::{
    paths,
    process::{cargo_path, forget_package, say},
};

/// Most runs of tests beside each other on one machine.
const RUNS: u32 = 100;

/// Installs and builds what a cluster needs, which takes minutes the first time.
///
/// # Errors
/// If it cannot be had, or this process may not make clusters.
pub(crate) fn prepare() -> Result<()> {
    require_root()?;
    startup::prepare()
}

/// Brings a cluster up with Skein as it was built last, runs cargo inside it with what `arrange` gives it, and takes the cluster down.
///
/// # Errors
/// If the cluster does not start or end, cargo fails, or a signal asks this process to stop.
pub(crate) fn during(arrange: impl FnOnce(&mut Command)) -> Result<()> {
    let (cluster, _held) = claim()?;
    // One that was left when an earlier run was killed.
    teardown::clear(&cluster)?;
    let ran = startup::up(&cluster, Content::AsBuilt).and_then(|()| {
        let mut cargo = cluster.inside(cargo_path())?;
        forget_package(&mut cargo);
        arrange(&mut cargo);
        run_until_signal(cargo)
    });
    let cleared = teardown::clear(&cluster);
    ran.and(cleared)
}

/// The first cluster for tests that no other run holds, and what holds it.
fn claim() -> Result<(Cluster, File)> {
    for number in 0..RUNS {
        let cluster = Cluster::named(&format!("test-{number}"))?;
        let path = cluster.folder().with_extension("held");
        let held = File::create(&path).with_context(|| format!("failed to create {}", path.display()))?;
        if held.try_lock().is_ok() {
            return Ok((cluster, held));
        }
    }
    bail!("{RUNS} runs of tests hold a cluster each in {}", paths::cache()?.join("clusters").display())
}

/// Runs `command` to its end; a signal to this process ends the command first, so that what comes after it still happens.
fn run_until_signal(mut command: Command) -> Result<()> {
    // A group of its own: the tests that cargo starts end with it.
    command.process_group(0);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("failed to start a runtime")?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).context("failed to listen for SIGINT")?;
        let mut terminate = signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?;
        let mut child = tokio::process::Command::from(command).spawn().context("failed to start nsenter")?;
        let asked = tokio::select! {
            status = child.wait() => {
                let status = status.context("failed to wait for the tests")?;
                return if status.success() { Ok(()) } else { bail!("the tests on the cluster failed: {status}") };
            }
            _ = interrupt.recv() => "SIGINT",
            _ = terminate.recv() => "SIGTERM",
        };
        say(&format!("{asked}: ending the tests"));
        if let Some(group) = child.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
            kill_process_group(group, Signal::KILL).context("failed to end the tests")?;
        }
        child.wait().await.context("failed to wait for the tests")?;
        bail!("stopped by {asked}")
    })
}
