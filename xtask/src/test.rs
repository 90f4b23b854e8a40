//! `cargo xtask test`: everything the tests need, then all of them.

use std::{
    process::Command,
    thread::{self, JoinHandle},
};

use anyhow::{Result, anyhow};
use clap::{Args, ValueEnum};

use crate::{
    minilm, model,
    process::{cargo, run, say},
    python,
};

/// Options of `test`.
#[derive(Args)]
pub(crate) struct Options {
    /// Run only tests whose name contains this.
    #[arg(long)]
    filter: Option<String>,
    /// Run only the tests of one kind [default: both].
    #[arg(long)]
    only: Option<Kind>,
}

/// Kinds of tests.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Kind {
    /// Those that need this machine alone.
    Local,
    /// Those on a one-node Kubernetes cluster, which comes up for them; Linux, as root.
    Cluster,
}

/// Prepares what tests need while the workspace builds, then runs them: first on this machine, then on a cluster of their own.
///
/// # Errors
/// If something cannot be prepared or a test fails; the tests of the second kind run in any case.
pub(crate) fn all(options: &Options) -> Result<()> {
    let wanted = |kind| options.only.is_none_or(|only| only == kind);
    let clients = Preparation::start("the models and the Python clients", || {
        model::ensure()?;
        minilm::ensure()?;
        python::clients()
    });
    let cluster = wanted(Kind::Cluster).then(|| Preparation::start("the cluster's programs", prepare_cluster));
    say("building the workspace");
    // The end-to-end tests start the programs themselves: the tests of their own packages make cargo build them, once, with everybody's features.
    let built = run(cargo().args(["test", "--workspace", "--no-run"]));
    let python = clients.wait()?;
    if let Some(cluster) = cluster {
        cluster.wait()?;
    }
    built?;
    let arrange = |command: &mut Command, args: &[&str]| {
        command.args(["test", "--workspace", "--no-fail-fast"]).args(args).arg("--").env("SKEIN_TEST_PYTHON", &python);
        command.args(&options.filter);
    };
    let mut local = Ok(());
    if wanted(Kind::Local) {
        say("running the tests on this machine");
        let mut tests = cargo();
        arrange(&mut tests, &[]);
        local = run(&mut tests);
    }
    let mut remote = Ok(());
    if wanted(Kind::Cluster) {
        say("running the tests on a cluster");
        remote = on_cluster(|tests| {
            // Nothing is fetched: inside, no network is reached.
            arrange(tests, &["--offline", "--test", "cluster"]);
            tests.arg("--ignored");
        });
    }
    match (local, remote) {
        (Err(local), Err(remote)) => Err(anyhow!("{local:#}; {remote:#}")),
        (local, remote) => local.and(remote),
    }
}

/// Something that is prepared while other things go on.
struct Preparation<T> {
    what: &'static str,
    thread: JoinHandle<Result<T>>,
}

impl<T: Send + 'static> Preparation<T> {
    fn start(what: &'static str, prepare: impl FnOnce() -> Result<T> + Send + 'static) -> Self {
        Self { what, thread: thread::spawn(prepare) }
    }

    fn wait(self) -> Result<T> {
        self.thread.join().map_err(|_| anyhow!("the thread that prepares {} panicked", self.what))?
    }
}

#[cfg(target_os = "linux")]
use crate::cluster::{during as on_cluster, prepare as prepare_cluster};

#[cfg(not(target_os = "linux"))]
fn prepare_cluster() -> Result<()> {
    anyhow::bail!("the cluster tests need Linux; `cargo xtask test --only local` runs all others")
}

#[cfg(not(target_os = "linux"))]
fn on_cluster(_: impl FnOnce(&mut Command)) -> Result<()> {
    prepare_cluster()
}
