//! The cluster as tests see it: kubectl, namespaces of their own, watches that end.

use std::{
    env, fs,
    io::Write,
    net::TcpStream,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicUsize, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use e2e::program::{self, Finished};
use serde_json::Value;

/// Longest that anything on the cluster may take; seconds on an idle machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(300);
/// Namespace of the operator.
pub(crate) const SYSTEM: &str = "skein-system";
/// Selects worker pods.
pub(crate) const WORKERS: &str = "app.kubernetes.io/component=worker";
/// The manifest that the documentation starts with.
pub(crate) const SAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests/samples/gemma3-270m.yaml");
/// Name of the sample's deployment and model.
pub(crate) const SAMPLE_NAME: &str = "gemma3-270m";
/// Before a watch that broke is begun again.
const PAUSE: Duration = Duration::from_millis(200);

/// Failed tests after which the cluster itself is taken to be at fault: the others would each wait for nothing.
const FAILURES: usize = 4;
/// Characters that are printed of each look at the namespace of a failed test.
const LOOKED: usize = 5_000;
static FAILED: AtomicUsize = AtomicUsize::new(0);

/// Tests that disturb the whole cluster have it for themselves.
static CLUSTER: RwLock<()> = RwLock::new(());

enum Turn {
    Shared { _guard: RwLockReadGuard<'static, ()> },
    Alone { _guard: RwLockWriteGuard<'static, ()> },
}

/// `program` inside the cluster.
///
/// # Panics
/// If the tests were not started in a cluster: whatever else KUBECONFIG names is left alone.
pub(crate) fn inside(program: &str) -> Command {
    let cluster = env::var_os("SKEIN_CLUSTER").is_some() && env::var_os("KUBECONFIG").is_some();
    assert!(cluster, "this test needs a cluster of its own: run `cargo xtask test --only cluster`");
    let mut command = Command::new(program);
    command.stdin(Stdio::null());
    command
}

/// Runs kubectl to its end, whatever that is.
pub(crate) fn kubectl(args: &[&str]) -> Finished {
    program::finish(program::start(inside("kubectl").args(args)), LIMIT)
}

/// Runs kubectl and returns what it printed.
///
/// # Panics
/// If it fails.
pub(crate) fn succeed(args: &[&str]) -> String {
    let done = kubectl(args);
    assert!(done.status.success(), "kubectl {}: {}\n{}", args.join(" "), done.status, done.stderr);
    done.stdout
}

/// Stops or starts one of the cluster's own programs.
///
/// # Panics
/// If that fails.
pub(crate) fn component(action: &str, program: &str) {
    let xtask = env::var_os("SKEIN_XTASK").expect("SKEIN_XTASK, set by xtask");
    let mut command = Command::new(xtask);
    let done = program::finish(program::start(command.args(["cluster", action, program]).stdin(Stdio::null())), LIMIT);
    assert!(done.status.success(), "{action} {program}: {}", done.stderr);
}

/// The folder of the cluster's state.
pub(crate) fn run_folder() -> PathBuf {
    let kubeconfig = PathBuf::from(env::var_os("KUBECONFIG").expect("KUBECONFIG, set by xtask"));
    kubeconfig.parent().expect("a run folder").to_owned()
}

/// The folder whose files the cluster's mirror of a model hub serves, for the repository `name`.
pub(crate) fn hub(name: &str) -> PathBuf {
    let folder = run_folder().join("hub").join(name);
    fs::create_dir_all(&folder).expect("a writable run folder");
    folder
}

/// A namespace of one test, in which Pod Security `restricted` is enforced; it goes away with the value.
pub(crate) struct Namespace {
    pub(crate) name: String,
    _turn: Turn,
}

impl Namespace {
    /// One beside those of other tests.
    pub(crate) fn shared(name: &str) -> Self {
        Self::make(name, Turn::Shared { _guard: CLUSTER.read().unwrap_or_else(PoisonError::into_inner) })
    }

    /// One of a test that disturbs others or measures: no other runs meanwhile.
    pub(crate) fn alone(name: &str) -> Self {
        Self::make(name, Turn::Alone { _guard: CLUSTER.write().unwrap_or_else(PoisonError::into_inner) })
    }

    fn make(name: &str, turn: Turn) -> Self {
        let failed = FAILED.load(Ordering::Relaxed);
        assert!(failed < FAILURES, "not run: {failed} tests failed on this cluster before");
        let name = format!("test-{name}");
        // What an earlier run of the same test left on a cluster that stays.
        succeed(&["delete", "namespace", &name, "--ignore-not-found"]);
        succeed(&["create", "namespace", &name]);
        succeed(&["label", "namespace", &name, "pod-security.kubernetes.io/enforce=restricted"]);
        let namespace = Self { name, _turn: turn };
        // Pods are refused until the namespace has its account.
        namespace.succeed(&["wait", "--for=create", "serviceaccount/default", "--timeout=60s"]);
        namespace
    }

    /// Runs kubectl in the namespace, whatever becomes of it.
    pub(crate) fn kubectl(&self, args: &[&str]) -> Finished {
        kubectl(&[&["--namespace", &self.name], args].concat())
    }

    /// Runs kubectl in the namespace and returns what it printed.
    ///
    /// # Panics
    /// If it fails.
    pub(crate) fn succeed(&self, args: &[&str]) -> String {
        succeed(&[&["--namespace", &self.name], args].concat())
    }

    /// Applies a manifest as a user would.
    ///
    /// # Panics
    /// If it is refused.
    pub(crate) fn apply(&self, manifest: &str) {
        let done = self.try_apply(manifest);
        assert!(done.status.success(), "{}\n{manifest}", done.stderr);
    }

    /// Applies a manifest, or is refused.
    pub(crate) fn try_apply(&self, manifest: &str) -> Finished {
        let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
        file.write_all(manifest.as_bytes()).expect("a writable file");
        self.kubectl(&["apply", "--filename", &file.path().to_string_lossy()])
    }

    /// An object or list.
    ///
    /// # Panics
    /// If there is none.
    pub(crate) fn get(&self, what: &[&str]) -> Value {
        let text = self.succeed(&[&["get", "--output=json"], what].concat());
        serde_json::from_str(&text).expect("JSON from kubectl")
    }

    /// The deployment called `name`.
    pub(crate) fn deployment(&self, name: &str) -> Value {
        self.get(&["modeldeployment", name])
    }

    /// The pods that `selector` selects.
    pub(crate) fn pods(&self, selector: &str) -> Vec<Value> {
        self.get(&["pods", "--selector", selector])["items"].as_array().expect("a list").clone()
    }

    /// The pods that `selector` selects, once the API server knows that their containers run: others hear that of the containers themselves,
    /// and earlier than it does of the node.
    pub(crate) fn running(&self, selector: &str) -> Vec<Value> {
        let runs = "--for=jsonpath={.status.containerStatuses[0].state.running}";
        self.succeed(&["wait", runs, "pods", "--selector", selector, "--timeout=120s"]);
        self.pods(selector)
    }

    /// Watches objects until one of them, as it was added or changed, gives a value.
    ///
    /// # Panics
    /// If none does within [`LIMIT`]; the message names `what` and has the last state seen.
    pub(crate) fn watch<T>(&self, objects: &[&str], what: &str, mut found: impl FnMut(&Value) -> Option<T>) -> T {
        let began = Instant::now();
        let mut last = Value::Null;
        loop {
            let mut watch = Watch::begin(&self.name, objects);
            loop {
                let left = LIMIT.saturating_sub(began.elapsed());
                match watch.told.recv_timeout(left) {
                    Ok(event) => {
                        last = event["object"].clone();
                        if let Some(value) = found(&last) {
                            return value;
                        }
                    }
                    // The API server ends watches now and then, and is stopped by some tests.
                    Err(RecvTimeoutError::Disconnected) => break,
                    Err(RecvTimeoutError::Timeout) => panic!("waited {LIMIT:?} for {what}; last seen: {last:#}"),
                }
            }
            watch.end();
            thread::park_timeout(PAUSE);
            assert!(began.elapsed() < LIMIT, "waited {LIMIT:?} for {what}; last seen: {last:#}");
        }
    }

    /// Watches the deployment called `name` until `found` gives a value for a status of its present spec.
    pub(crate) fn watch_status<T>(&self, name: &str, what: &str, mut found: impl FnMut(&Value) -> Option<T>) -> T {
        self.watch(&["modeldeployment", name], what, |object| {
            let current = object["status"]["observedGeneration"] == object["metadata"]["generation"];
            if current { found(&object["status"]) } else { None }
        })
    }

    /// Waits until the deployment called `name` is Ready with all of `replicas`.
    pub(crate) fn ready(&self, name: &str, replicas: u64) {
        let what = format!("{name} to be Ready with {replicas} replicas");
        self.watch_status(name, &what, |status| {
            let all = status["readyReplicas"] == replicas && status["replicas"] == replicas;
            (all && condition(status, "Ready")["status"] == "True").then_some(())
        });
    }

    /// Waits until no pod that `selector` selects is left.
    pub(crate) fn gone(&self, selector: &str) {
        self.succeed(&["wait", "--for=delete", "pods", "--selector", selector, "--timeout=120s"]);
    }

    /// Base of the HTTP API of the service called `name`, once it leads somewhere: a node's rules follow its endpoints by up to a second.
    ///
    /// # Panics
    /// If it leads nowhere.
    pub(crate) fn http(&self, name: &str) -> String {
        let address = self.address(name);
        program::until(&format!("{name} at {address}"), || TcpStream::connect((address.as_str(), 80)).ok());
        format!("http://{address}")
    }

    /// Base of the gRPC API of the service called `name`.
    pub(crate) fn grpc(&self, name: &str) -> String {
        format!("http://{}:8081", self.address(name))
    }

    fn address(&self, name: &str) -> String {
        let service = self.get(&["service", name]);
        service["spec"]["clusterIP"].as_str().expect("a service's address").to_owned()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if thread::panicking() {
            let name = self.name.as_str();
            FAILED.fetch_add(1, Ordering::Relaxed);
            let looks: [&[&str]; 5] = [
                &["--namespace", SYSTEM, "get", "pods", "--output=wide"],
                &["--namespace", name, "get", "pods,modeldeployments", "--output=wide"],
                &["--namespace", name, "get", "modeldeployments", "--output=jsonpath={range .items[*]}{.status.conditions}{\"\\n\"}{end}"],
                &["--namespace", name, "get", "events", "--sort-by=.metadata.creationTimestamp"],
                &["--namespace", SYSTEM, "logs", "deployment/skein-operator", "--tail=25"],
            ];
            for look in looks {
                let done = kubectl(look);
                let text = done.stdout + &done.stderr;
                // Of many objects the last: what is printed before the panic must not bury it.
                let last: String = text.chars().skip(text.chars().count().saturating_sub(LOOKED)).collect();
                // Best effort: the test has failed already, and its panic is what counts.
                let _ = writeln!(std::io::stderr(), "--- kubectl {}\n{last}", look.join(" "));
            }
        }
        // Waited for, so that what goes away does not take the next test's processors.
        let gone = kubectl(&["delete", "namespace", &self.name, "--timeout=120s"]);
        assert!(thread::panicking() || gone.status.success(), "{}", gone.stderr);
    }
}

/// A `kubectl get --watch` and the events it has told.
pub(crate) struct Watch {
    child: Child,
    pub(crate) told: mpsc::Receiver<Value>,
}

impl Watch {
    /// Watches what `objects` names: a kind, with a selector, or the name of one object.
    pub(crate) fn begin(namespace: &str, objects: &[&str]) -> Self {
        let mut command = inside("kubectl");
        command.args(["--namespace", namespace, "get", "--watch", "--output-watch-events", "--output=json"]);
        // kubectl reads an object that is named, watches it anew, and drops the first event, which may be a change between the two. Of a list
        // it watches what comes after what it read.
        match objects {
            [kind, name] if !name.starts_with('-') => command.args([kind, &*format!("--field-selector=metadata.name={name}")]),
            objects => command.args(objects),
        };
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("kubectl starts");
        let stdout = child.stdout.take().expect("a pipe");
        // Room for what a burst of changes tells while one is looked at; a full channel holds kubectl back.
        let (tell, told) = mpsc::sync_channel(64);
        thread::spawn(move || {
            let events = serde_json::Deserializer::from_reader(stdout).into_iter::<Value>();
            events.map_while(Result::ok).try_for_each(|event| tell.send(event))
        });
        Self { child, told }
    }

    fn end(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end();
    }
}

/// The condition called `kind` of a status; null when it has none.
pub(crate) fn condition<'a>(status: &'a Value, kind: &str) -> &'a Value {
    let all = status["conditions"].as_array().into_iter().flatten();
    all.into_iter().find(|c| c["type"] == kind).unwrap_or(&Value::Null)
}

/// A pod's name.
pub(crate) fn name(pod: &Value) -> &str {
    pod["metadata"]["name"].as_str().expect("a name")
}

/// What tells a pod and its containers from those that would follow them: uid, and restarts of its first container.
pub(crate) fn identity(pod: &Value) -> (String, u64) {
    let uid = pod["metadata"]["uid"].as_str().expect("a uid").to_owned();
    (uid, pod["status"]["containerStatuses"][0]["restartCount"].as_u64().unwrap_or(0))
}
