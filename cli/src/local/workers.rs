//! All worker processes of this machine: started in order, kept alive one by one, stopped together.

use std::{
    env,
    ffi::OsString,
    fs::File,
    io::{self, Read},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use kernels::Isa;
use plan::fleet::FleetState;
use router::replica;
use source::Credentials;
use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    alarm::Alarm,
    deployment::Planned,
    fleet::{self, Seat},
    process::{self, Program, WorkerProcess},
    restart::{Ending, Fault, Restarts, Verdict},
};
use crate::{
    args::{CollectiveChoice, Global, LogFormat},
    exit::{Failure, Outcome},
};

/// What happens when a worker ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keep {
    /// Everything is over: a measurement or evaluation cannot go on.
    Once,
    /// It is started again, and the router learns its new address.
    Alive,
}

/// The worker processes. Dropping this kills them; [`Workers::stop`] lets them end.
pub(crate) struct Workers {
    shared: Arc<Shared>,
    keepers: JoinSet<()>,
}

/// What the keepers of all workers share.
struct Shared {
    program: Program,
    keep: Keep,
    fleet: watch::Sender<FleetState>,
    /// For each deployment: it has answered once.
    proven: Vec<AtomicBool>,
    alarm: Alarm,
    stop: CancellationToken,
    /// What calls must carry.
    token: String,
    /// Longest that a worker may not answer before it is killed, and so started again.
    patience: Duration,
}

/// How long a worker of a running server may be deaf. Streams have left it by then, to another replica or to wait for this one: where there is no
/// other, this is how long they wait before the worker is replaced.
const PATIENCE: Duration = Duration::from_secs(5);
/// Questions in a row that a deaf worker leaves unanswered, at the least: a runner that was stopped itself must ask again before it judges.
const UNANSWERED: u32 = 2;

/// The settings that every worker gets.
pub(crate) struct Common<'a> {
    pub(crate) global: &'a Global,
    pub(crate) isa: Isa,
    /// Threads of all workers together.
    pub(crate) threads: usize,
    pub(crate) collective: CollectiveChoice,
    /// What calls must carry.
    pub(crate) token: &'a str,
}

impl Workers {
    /// Starts every worker of `planned`, stage by stage and rank by rank, and waits until each says where it listens.
    ///
    /// # Errors
    /// When one cannot be started, or ends.
    pub(crate) async fn start(planned: &[Planned], common: &Common<'_>, keep: Keep) -> Outcome<Self> {
        let shared = Arc::new(Shared {
            program: program(common)?,
            keep,
            fleet: watch::Sender::new(fleet::state(planned)),
            proven: planned.iter().map(|_| AtomicBool::new(false)).collect(),
            alarm: Alarm::default(),
            stop: CancellationToken::new(),
            token: common.token.to_owned(),
            patience: PATIENCE,
        });
        let mut keepers = JoinSet::new();
        for (seat, spec) in fleet::specs(planned, common.threads, common.collective.into()) {
            let spec = serde_json::to_string(&spec).context("failed to write a worker's specification")?;
            let of = &planned[seat.deployment];
            let (name, shown) = if seat.draft {
                (format!("worker of the draft model of {}", of.name), None)
            } else {
                (format!("worker of {}, stage {} rank {}", of.name, seat.stage, seat.rank), of.model.credentials.as_ref())
            };
            // Started here and not in its task, so that process ids ascend in the order of the plan.
            let mut program = shared.program.clone();
            // In the environment, since everybody may read a command line.
            program.env.extend(shown.and_then(Credentials::header).map(|value| ("SKEIN_AUTHORIZATION", value.into())));
            if let Some(keys) = shown.and_then(Credentials::keys) {
                let keys = serde_json::to_string(keys).context("failed to write keys of a source")?;
                program.env.push(("SKEIN_ACCESS_KEYS", keys.into()));
            }
            let keeper = Keeper { shared: shared.clone(), program, name, seat, spec };
            let process = keeper.start()?;
            keepers.spawn(keeper.run(process));
        }
        let workers = Self { shared, keepers };
        let mut fleet = workers.fleet();
        tokio::select! {
            biased;
            failure = workers.failed() => {
                workers.stop().await;
                Err(failure)
            }
            // The sender lives as long as `workers`.
            _ = fleet.wait_for(fleet::complete) => Ok(workers),
        }
    }

    /// The fleet as of now and from now on.
    pub(crate) fn fleet(&self) -> watch::Receiver<FleetState> {
        self.shared.fleet.subscribe()
    }

    /// Notes that a deployment has answered: from now on none of its workers is given up.
    pub(crate) fn prove(&self, deployment: usize) {
        if let Some(proven) = self.shared.proven.get(deployment) {
            proven.store(true, Ordering::Relaxed);
        }
    }

    /// Completes when a worker ended that is not started again, with the reason.
    pub(crate) async fn failed(&self) -> Failure {
        self.shared.alarm.wait().await
    }

    /// Stops all workers and waits for their end.
    pub(crate) async fn stop(mut self) {
        self.shared.stop.cancel();
        while self.keepers.join_next().await.is_some() {}
    }
}

/// What keeps one worker running.
struct Keeper {
    shared: Arc<Shared>,
    program: Program,
    name: String,
    seat: Seat,
    /// One line.
    spec: String,
}

impl Keeper {
    fn start(&self) -> anyhow::Result<WorkerProcess> {
        let (program, at) = (&self.program, self.seat);
        let place = if at.draft { "draft".to_owned() } else { format!("{}.{}", at.stage, at.rank) };
        let process = WorkerProcess::start(program, &format!("{}.{}.{place}", at.deployment, at.replica));
        process.with_context(|| format!("failed to start the {} as {}", self.name, program.path.display()))
    }

    /// Runs the worker, again and again, until told to stop or nothing more can be done.
    async fn run(self, first: WorkerProcess) {
        let mut restarts = Restarts::default();
        let mut process = first;
        loop {
            let began = Instant::now();
            let Some(ending) = self.watch(process).await else { return };
            let proven = self.shared.proven.get(self.seat.deployment).is_some_and(|proven| proven.load(Ordering::Relaxed));
            let verdict = match self.shared.keep {
                Keep::Once => Verdict::GiveUp,
                Keep::Alive => restarts.after(&ending, began.elapsed(), proven),
            };
            let Verdict::Again(pause) = verdict else { return self.shared.alarm.raise(self.failure(ending)) };
            match self.again(&ending, pause).await {
                Some(Ok(next)) => process = next,
                Some(Err(failure)) => return self.shared.alarm.raise(failure),
                None => return,
            }
        }
    }

    /// Waits, and starts the worker again; `None` when told to stop.
    async fn again(&self, ending: &Ending, pause: Duration) -> Option<Outcome<WorkerProcess>> {
        let (Seat { stage, rank, draft, .. }, pause_ms) = (self.seat, pause.as_millis() as u64);
        let why = self.failure(ending.clone());
        warn!(stage, rank, draft, pause_ms, why = %why, "worker ended; starting it again");
        tokio::select! {
            () = self.shared.stop.cancelled() => None,
            () = tokio::time::sleep(pause) => Some(self.start().map_err(Failure::from)),
        }
    }

    /// Follows one process to its end; `None` when told to stop, and then it is gone.
    async fn watch(&self, mut process: WorkerProcess) -> Option<Ending> {
        let ended = tokio::select! {
            biased;
            () = self.shared.stop.cancelled() => None,
            ended = self.follow(&mut process) => Some(ended),
        };
        let stopped = match &ended {
            // One that will not do as it should, a deaf one first of all, gets no time to end by itself: its streams wait for another.
            Some(Err(_)) => process.kill().await,
            // One that ended is only waited for, until its last log lines are through.
            Some(Ok(_)) | None => process.stop().await,
        };
        if let Err(error) = &stopped {
            warn!(worker = self.name, %error, "failed to wait for a worker");
        }
        Some(match ended? {
            Ok(ending) => ending,
            Err(error) => {
                Ending { status: stopped.unwrap_or_default(), fault: Some(Fault { input: false, message: format!("{error:#}") }) }
            }
        })
    }

    /// Tells a process what to do, publishes where it listens, and waits for its end.
    async fn follow(&self, process: &mut WorkerProcess) -> anyhow::Result<Ending> {
        let Some(address) = process.address(&self.spec).await? else { return Ok(process.ended().await?) };
        let (Seat { stage, rank, draft, .. }, address) = (self.seat, address.to_string());
        info!(stage, rank, draft, pid = process.id(), address, "worker started");
        self.shared.fleet.send_modify(|state| fleet::seat(state, self.seat, address.clone()));
        tokio::select! {
            ended = process.ended() => Ok(ended?),
            () = self.deaf(&address), if self.shared.keep == Keep::Alive => {
                bail!("it did not answer for {} s and was killed", self.shared.patience.as_secs())
            }
        }
    }

    /// Completes when the worker at `address` has not answered for too long.
    async fn deaf(&self, address: &str) {
        let patience = self.shared.patience;
        let (mut heard, mut unanswered) = (Instant::now(), 0);
        while unanswered < UNANSWERED || heard.elapsed() < patience {
            tokio::time::sleep(patience / 8).await;
            if replica::loading(address, Some(&self.shared.token)).await.is_ok() {
                (heard, unanswered) = (Instant::now(), 0);
            } else {
                unanswered += 1;
            }
        }
    }

    /// An ending as the user's or the machine's fault.
    fn failure(&self, ending: Ending) -> Failure {
        match ending.fault {
            Some(Fault { input: true, message }) => Failure::Input(anyhow::anyhow!(message)),
            Some(Fault { input: false, message }) => Failure::Failed(anyhow::anyhow!("{}: {message}", self.name)),
            None => Failure::Failed(anyhow::anyhow!("the {} {}", self.name, process::describe(ending.status))),
        }
    }
}

/// This program as a worker, with this process's settings.
fn program(common: &Common<'_>) -> Outcome<Program> {
    let path = env::current_exe().context("failed to find this program, which workers are started from")?;
    let mut args = global_args(common.global);
    args.extend(["worker".into(), "--isa".into(), common.isa.name().into()]);
    let tagged = common.global.log_format == LogFormat::Text;
    Ok(Program { path, args, env: vec![("SKEIN_WORKER_TOKEN", common.token.into())], tagged })
}

/// The flags that give a worker this process's logging and cache.
fn global_args(global: &Global) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec!["--log-format".into()];
    args.push(match global.log_format {
        LogFormat::Text => "text".into(),
        LogFormat::Json => "json".into(),
    });
    args.extend((0..global.verbose).map(|_| "--verbose".into()));
    if global.quiet {
        args.push("--quiet".into());
    }
    if let Some(filter) = &global.log {
        args.extend(["--log".into(), filter.into()]);
    }
    if let Some(folder) = global.cache.folder() {
        args.extend(["--cache".into(), folder.into()]);
    }
    args
}

/// A token that nobody can guess, for the calls of one run.
///
/// # Errors
/// When the system gives no random bytes.
pub(crate) fn draw_token() -> io::Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use plan::{
        fleet::{FleetDeployment, FleetReplica, ReplicaLimits},
        shard::{KvDType, KvGeometry},
    };

    use super::*;
    use crate::{args::Skein, local::deployment};

    /// One deployment of one worker.
    fn one_seat() -> FleetState {
        let workers = vec![vec![String::new()]];
        let kv = KvGeometry { dtype: KvDType::F32, groups: Vec::new() };
        let limits = ReplicaLimits { kv, max_context: 1, max_batch_sequences: 1, max_batch_tokens: 1, prefix_caching: true };
        let replica = FleetReplica {
            name: "a-0".into(),
            revision: String::new(),
            numerics: String::new(),
            weight: 1,
            draining: false,
            limits: limits.clone(),
            workers,
            draft: None,
        };
        let (model, serving) = ("a".to_owned(), deployment::serving());
        let deployment = FleetDeployment {
            name: "a".into(),
            model,
            aliases: Vec::new(),
            drivers: String::new(),
            limits,
            serving,
            replicas: vec![replica],
            adapters: Vec::new(),
        };
        FleetState { term: 1, number: 1, deployments: vec![deployment], routers: Vec::new() }
    }

    /// One worker that is a shell script, kept as `keep` says.
    fn kept(script: &str, keep: Keep, patience: Duration) -> Workers {
        let shared = Arc::new(Shared {
            program: Program { path: "/bin/sh".into(), args: vec!["-c".into(), script.into()], env: Vec::new(), tagged: true },
            keep,
            fleet: watch::Sender::new(one_seat()),
            proven: vec![AtomicBool::new(false)],
            alarm: Alarm::default(),
            stop: CancellationToken::new(),
            token: String::new(),
            patience,
        });
        let seat = Seat { deployment: 0, replica: 0, stage: 0, rank: 0, draft: false };
        let keeper = Keeper { shared: shared.clone(), program: shared.program.clone(), name: "worker".into(), seat, spec: "{}".into() };
        let process = keeper.start().unwrap();
        let mut keepers = JoinSet::new();
        keepers.spawn(keeper.run(process));
        Workers { shared, keepers }
    }

    #[tokio::test]
    async fn a_worker_that_dies_is_started_again_and_its_new_address_published() {
        // The process id is the port, so every process has another address; each but the last kills itself.
        let folder = tempfile::tempdir().unwrap();
        let mark = folder.path().join("dead");
        let mark = mark.display();
        let script = format!("read spec; echo 127.0.0.1:$((10000 + $$ % 50000)); if mkdir {mark} 2>/dev/null; then kill -9 $$; fi; cat");
        let workers = kept(&script, Keep::Alive, PATIENCE);
        let mut fleet = workers.fleet();
        let first = fleet.wait_for(fleet::complete).await.unwrap().clone();
        let second = fleet.wait_for(|state| state.number > first.number).await.unwrap().clone();
        assert_ne!(fleet::addresses(&first).next(), fleet::addresses(&second).next());
        workers.stop().await;
    }

    #[tokio::test]
    async fn a_worker_that_answers_nothing_is_replaced() {
        // Nobody listens on the port of discard.
        let workers = kept("read spec; echo 127.0.0.1:9; cat", Keep::Alive, Duration::from_millis(80));
        workers.prove(0);
        workers.fleet().wait_for(|state| state.number > 2).await.unwrap();
        workers.stop().await;
    }

    #[tokio::test]
    async fn a_worker_that_is_deaf_because_it_stands_still_is_replaced_at_once() {
        let workers = kept("read spec; echo 127.0.0.1:9; kill -STOP $$", Keep::Alive, Duration::from_millis(80));
        workers.prove(0);
        let mut fleet = workers.fleet();
        let again = fleet.wait_for(|state| state.number > 2);
        // Less than a worker gets that is asked to end.
        assert!(tokio::time::timeout(process::GRACE / 2, again).await.is_ok(), "a stopped worker was given time to end by itself");
        workers.stop().await;
    }

    #[tokio::test]
    async fn what_a_worker_cannot_use_is_the_users_to_know() {
        let script = r#"read spec; echo 127.0.0.1:4711; echo '{"input":true,"message":"a.gguf is damaged"}'; exit 2"#;
        let workers = kept(script, Keep::Alive, PATIENCE);
        let failure = workers.failed().await;
        assert!(matches!(&failure, Failure::Input(error) if error.to_string() == "a.gguf is damaged"), "{failure}");
        workers.stop().await;
    }

    #[tokio::test]
    async fn the_end_of_a_worker_ends_an_evaluation() {
        let workers = kept("read spec; echo 127.0.0.1:4711; kill -9 $$", Keep::Once, PATIENCE);
        let failure = workers.failed().await;
        assert!(matches!(&failure, Failure::Failed(error) if error.to_string().contains("signal 9")), "{failure}");
        workers.stop().await;
    }

    #[test]
    fn tokens_differ() {
        let (a, b) = (draw_token().unwrap(), draw_token().unwrap());
        assert_eq!((a.len(), b.len()), (32, 32));
        assert_ne!(a, b);
    }

    #[test]
    fn workers_log_as_their_runner_does() {
        let args = ["skein", "-vv", "--log-format", "json", "--log", "info", "--cache", "/c", "inspect", "m"];
        let global = Skein::try_parse_from(args).unwrap().global;
        assert_eq!(
            global_args(&global),
            ["--log-format", "json", "--verbose", "--verbose", "--log", "info", "--cache", "/c"].map(OsString::from)
        );
        // They are flags that this program takes.
        let again = [vec!["skein".into()], global_args(&global), vec!["worker".into()]].concat();
        assert_eq!(Skein::try_parse_from(again).unwrap().global.verbose, 2);
    }
}
