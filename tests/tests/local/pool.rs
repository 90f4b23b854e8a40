//! Two real routers share real workers; one is killed, the other goes on.

use std::{
    fs,
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use e2e::{client, files, process::Pid, program};
use plan::{
    fleet::{FleetDeployment, FleetReplica, FleetRouter, FleetState, RoutingPolicy, ServingSettings},
    planner::{self, Capacity, Origin, Spec},
    worker::CollectiveKind,
};
use source::{Source, SourceOptions};
use tempfile::TempDir;
use tokio::task::JoinSet;

use crate::streams::{alone, mixed};

const STREAMS: usize = 8;
const REPLICAS: usize = 2;

/// A process that is killed at the end of the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    /// Starts `skein` and gives the first line that it prints.
    fn start(args: &[&str], envs: &[(&str, &str)]) -> (Self, String) {
        let mut command = Command::new(program::skein());
        command.args(args).envs(envs.iter().copied()).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut process = Self(command.spawn().expect("skein starts"));
        let (tell, told) = mpsc::channel();
        let stdout = BufReader::new(process.0.stdout.take().expect("a pipe"));
        thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| tell.send(line)));
        let line = told.recv_timeout(Duration::from_secs(60)).expect("a first line");
        (process, line)
    }
}

/// The workers of a model, and the state that names them and two routers, kept in a file for each router.
struct World {
    folder: TempDir,
    _workers: Vec<Process>,
    /// An address of this machine that is this test's own, so that ports can be chosen.
    host: String,
}

impl World {
    fn start(model: &Path) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let uri = model.to_string_lossy();
        let header = Source::open(&uri, SourceOptions::default()).and_then(|s| s.header()).expect("the model's header");
        let plan = planner::plan(&Spec::default(), &header, &Capacity { memory_bytes: None }).expect("a plan");
        let limits = planner::limits(&plan, true);
        let (mut workers, mut replicas) = (Vec::new(), Vec::new());
        for i in 0..REPLICAS {
            let name = format!("model-r{i}");
            let specs = planner::worker_specs(&plan, &Origin { replica: &name, uri: &uri, digest: None }, 1, CollectiveKind::Tcp);
            let spec = folder.path().join(format!("{name}.json"));
            fs::write(&spec, serde_json::to_vec(&specs[0]).expect("plain data")).expect("a file");
            let (worker, address) =
                Process::start(&["worker", "--spec", &spec.to_string_lossy()], &[("SKEIN_WORKER_TOKEN", "worker-token")]);
            workers.push(worker);
            replicas.push(FleetReplica {
                name,
                revision: "1".into(),
                numerics: "1".into(),
                weight: 1,
                draining: false,
                limits: limits.clone(),
                workers: vec![vec![address]],
                draft: None,
            });
        }
        let serving = ServingSettings {
            chat_template: None,
            system_prompt: None,
            policy: RoutingPolicy::LeastLoad,
            queue_requests: 64,
            queue_seconds: 60,
            prompt_lookup: 0,
            hold: None,
            stopped: None,
        };
        let deployment = FleetDeployment {
            name: "model".into(),
            model: "model".into(),
            aliases: Vec::new(),
            drivers: String::new(),
            limits,
            serving,
            replicas,
            adapters: Vec::new(),
        };
        let pid = std::process::id();
        let host = format!("127.{}.{}.{}", 1 + pid / 65_536 % 254, pid / 256 % 256, 1 + pid % 254);
        let router = |i| FleetRouter { name: format!("router-{i}"), address: format!("{host}:{}", 7072 + i), pool: String::new() };
        let state = FleetState { term: 1, number: 1, deployments: vec![deployment], routers: (0..2).map(router).collect() };
        for i in 0..2 {
            fs::write(folder.path().join(format!("state-{i}")), serde_json::to_vec(&state).expect("plain data")).expect("a file");
        }
        Self { folder, _workers: workers, host }
    }

    /// Starts a router; the base of its HTTP API.
    fn router(&self, i: usize) -> (Process, String) {
        let at = |port: usize| format!("{}:{}", self.host, port + i);
        let state = self.folder.path().join(format!("state-{i}"));
        let (name, http, grpc, pool) = (format!("router-{i}"), at(8080), at(8090), at(7072));
        let mut args = vec!["router", "--name", &name, "--http", &http, "--grpc", &grpc, "--pool", &pool];
        // Nobody writes states: the port of discard.
        let state = state.to_string_lossy();
        args.extend(["--fleet", "http://127.0.0.1:9", "--state", &state]);
        let tokens = [("SKEIN_WORKER_TOKEN", "worker-token"), ("SKEIN_POOL_TOKEN", "pool-token")];
        let (process, line) = Process::start(&args, &tokens);
        let address: SocketAddr = http.parse().expect("an address");
        assert!(line.starts_with(&format!("ready http://{address} ")), "{line}");
        (process, format!("http://{address}"))
    }
}

/// Waits until a router reaches every replica.
async fn until_complete(base: &str) {
    let began = Instant::now();
    let ready = |line: &str| line.starts_with("skein_replicas") && line.contains("\"ready\"") && line.ends_with(&format!(" {REPLICAS}"));
    while !client::get(&format!("{base}/metrics")).await.expect("metrics").lines().any(ready) {
        assert!(began.elapsed() < Duration::from_secs(60), "{base} does not reach every replica");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_router_takes_only_its_own_connections_along() {
    let mut requests = mixed("model", STREAMS);
    for request in &mut requests {
        request["max_tokens"] = 48.into();
        request["ignore_eos"] = true.into();
    }
    let expected = alone(&files::reference(), &requests).await;
    let world = World::start(&files::reference());
    let ((first, first_at), (_second, second_at)) = (world.router(0), world.router(1));
    until_complete(&first_at).await;
    until_complete(&second_at).await;
    // Every router answers for every replica.
    for base in [&first_at, &second_at] {
        assert_eq!(client::complete(base, &requests[0]).await.expect("an answer"), expected[0]);
    }
    let (started, victim) = (Arc::new(AtomicUsize::new(0)), Pid(first.0.id()));
    let mut running = JoinSet::new();
    for (i, request) in requests.iter().cloned().enumerate() {
        let (base, started) = (second_at.clone(), started.clone());
        running.spawn(async move {
            let stream = client::stream(&base, &request, |pieces| {
                if pieces == 6 && started.fetch_add(1, Ordering::SeqCst) + 1 == STREAMS {
                    victim.signal("KILL");
                }
            });
            (i, stream.await)
        });
    }
    let mut longest = Duration::ZERO;
    while let Some(done) = running.join_next().await {
        let (i, streamed) = done.expect("a task");
        let streamed = streamed.unwrap_or_else(|e| panic!("stream {i}: {e:#}"));
        assert_eq!(streamed.text, expected[i], "stream {i}");
        longest = longest.max(streamed.gap);
    }
    assert_eq!(started.load(Ordering::SeqCst), STREAMS, "no router was killed");
    println!("one of two routers killed: longest gap {longest:?}");
    // What the dead one drove is driven by the other.
    until_complete(&second_at).await;
}
