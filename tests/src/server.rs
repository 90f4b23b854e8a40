//! A running `skein serve`: started on free ports, stopped and waited for when dropped.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;

use crate::{
    process::Pid,
    program::{LIMIT, skein},
};

/// A manifest for `model` (a file or folder) called `name`, with further lines of `spec` (already indented by two).
pub fn manifest(name: &str, model: &Path, spec: &str) -> String {
    format!(
        "apiVersion: skein.dev/v1alpha1\nkind: ModelDeployment\nmetadata:\n  name: {name}\nspec:\n  model:\n    uri: file://{}\n{spec}",
        model.display()
    )
}

/// `parallelism` of a manifest.
pub fn parallelism(pipeline: usize, tensor: usize) -> String {
    format!("  parallelism:\n    pipeline: {pipeline}\n    tensor: {tensor}\n")
}

/// A server and where it answers.
pub struct Server {
    child: Child,
    /// `http://127.0.0.1:port`.
    pub http: String,
    /// `http://127.0.0.1:port` of the gRPC API.
    pub grpc: String,
    log: Arc<Mutex<Vec<String>>>,
    _folder: TempDir,
}

impl Server {
    /// Starts a server with `manifest` and waits until a token came out.
    ///
    /// # Panics
    /// If it ends or says nothing within the limit.
    pub fn start(manifest: &str) -> Self {
        Self::start_with(manifest, &[])
    }

    /// As [`Server::start`], with more arguments.
    ///
    /// # Panics
    /// As [`Server::start`].
    pub fn start_with(manifest: &str, args: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("model.yaml");
        fs::write(&path, manifest).expect("a writable folder");
        Self::serving(&[&["-f", &path.to_string_lossy()], args].concat(), folder)
    }

    /// Starts `skein serve` with `args` and waits until it is ready.
    ///
    /// # Panics
    /// As [`Server::start`].
    pub fn of(args: &[&str]) -> Self {
        Self::serving(args, tempfile::tempdir().expect("a temporary folder"))
    }

    fn serving(args: &[&str], folder: TempDir) -> Self {
        let mut child = Command::new(skein())
            .args(["--log-format", "json", "-v", "serve", "--port", "0", "--grpc-port", "0"])
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("skein starts");
        let (tell, told) = mpsc::channel();
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| tell.send(line)));
        let log = Arc::new(Mutex::new(Vec::new()));
        let (stderr, kept) = (BufReader::new(child.stderr.take().expect("a pipe")), log.clone());
        thread::spawn(move || stderr.lines().map_while(Result::ok).for_each(|line| kept.lock().unwrap().push(line)));
        let mut server = Self { child, http: String::new(), grpc: String::new(), log, _folder: folder };
        let began = Instant::now();
        loop {
            let left = LIMIT.saturating_sub(began.elapsed());
            let line = told.recv_timeout(left).expect("a line that begins with `ready`");
            let words: Vec<&str> = line.split(' ').collect();
            if let ["ready", http, "grpc", grpc] = words[..] {
                (server.http, server.grpc) = (http.into(), grpc.into());
                return server;
            }
        }
    }

    /// The server's own process.
    pub fn pid(&self) -> Pid {
        Pid(self.child.id())
    }

    /// Its worker processes.
    pub fn workers(&self) -> Vec<Pid> {
        self.pid().children()
    }

    /// Kills the server itself, as a crash would, and waits for its end; its workers must see to themselves.
    pub fn kill(&mut self) {
        self.child.kill().expect("kill the server");
        self.child.wait().expect("wait for the server");
    }

    /// Events logged so far whose message is `message`, by the server and its workers.
    pub fn logged(&self, message: &str) -> Vec<Value> {
        logged(&self.log.lock().unwrap().join("\n"), message)
    }
}

/// Events in `log` (JSON, one a line) whose message is `message`: their fields.
pub fn logged(log: &str, message: &str) -> Vec<Value> {
    let events = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    events.map(|event| event["fields"].clone()).filter(|fields| fields["message"] == message).collect()
}

impl Drop for Server {
    fn drop(&mut self) {
        if thread::panicking() {
            let log = self.log.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let tail = log.iter().rev().take(60).rev().cloned().collect::<Vec<_>>().join("\n");
            let _ = writeln!(std::io::stderr(), "--- the server said last:\n{tail}");
        }
        if matches!(self.child.try_wait(), Ok(None)) {
            self.pid().signal("INT");
            let began = Instant::now();
            while matches!(self.child.try_wait(), Ok(None)) {
                if began.elapsed() > Duration::from_secs(30) {
                    let _ = self.child.kill();
                    let _ = self.child.wait();
                    assert!(thread::panicking(), "the server did not stop within 30 s of SIGINT");
                    return;
                }
                thread::park_timeout(Duration::from_millis(5));
            }
        }
    }
}
