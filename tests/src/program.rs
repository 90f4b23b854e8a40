//! The `skein` program: where it was built, and runs of it that end.

use std::{
    env,
    ffi::OsStr,
    io::Read,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    thread::{self, JoinHandle},
    time::Duration,
};

use serde_json::Value;

use crate::wait;

/// Longest run of a command; generous, because machines are shared and builds are not optimized throughout.
pub const LIMIT: Duration = Duration::from_secs(600);

/// The `skein` beside the test program (`target/<profile>/skein`).
///
/// # Panics
/// If it was not built.
pub fn skein() -> PathBuf {
    let test = env::current_exe().expect("the path of this test");
    let folder = test.parent().and_then(|deps| deps.parent()).expect("target/<profile>/deps");
    let skein = folder.join(format!("skein{}", env::consts::EXE_SUFFIX));
    assert!(skein.exists(), "{} was not built: run `cargo xtask test`, or `cargo build --package cli` first", skein.display());
    skein
}

/// What a run of a program left.
#[derive(Debug)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// What it printed.
    pub stdout: String,
    /// Its diagnostics.
    pub stderr: String,
}

/// Runs `skein` with `args` to its end.
///
/// # Panics
/// If it cannot start or runs longer than [`LIMIT`].
pub fn run(args: &[impl AsRef<OsStr>]) -> Finished {
    run_with_input(args, "")
}

/// Runs `skein` with `args` to its end, with `input` on standard input.
///
/// # Panics
/// As [`run`].
pub fn run_with_input(args: &[impl AsRef<OsStr>], input: &str) -> Finished {
    use std::io::Write;
    let mut child = start(Command::new(skein()).args(args).stdin(Stdio::piped()));
    let mut stdin = child.stdin.take().expect("a pipe");
    // A program that ends without reading closes the pipe, which is not this test's concern.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    finish(child, LIMIT)
}

/// Starts `command` with its output captured.
///
/// # Panics
/// If it cannot start.
pub fn start(command: &mut Command) -> Child {
    let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

/// Waits for `child` to end and collects its output.
///
/// # Panics
/// If it is still running after `limit`; it is killed first.
pub fn finish(mut child: Child, limit: Duration) -> Finished {
    let stdout = collect(child.stdout.take().expect("a pipe"));
    let stderr = collect(child.stderr.take().expect("a pipe"));
    let began = std::time::Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("wait for a child") {
            break Some(status);
        }
        if began.elapsed() > limit {
            child.kill().expect("kill a child");
            child.wait().expect("wait for a killed child");
            break None;
        }
        thread::park_timeout(Duration::from_millis(5));
    };
    let (stdout, stderr) = (stdout.join().expect("a reader"), stderr.join().expect("a reader"));
    let status = status.unwrap_or_else(|| panic!("still running after {limit:?}; stderr:\n{stderr}"));
    Finished { status, stdout, stderr }
}

fn collect(mut from: impl Read + Send + 'static) -> JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).expect("a readable pipe");
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Runs `skein` and returns the one JSON object it prints.
///
/// # Panics
/// If it fails or prints something else.
pub fn json(args: &[impl AsRef<OsStr>]) -> Value {
    let done = run(args);
    let shown: Vec<_> = args.iter().map(|a| a.as_ref().to_string_lossy()).collect();
    assert!(done.status.success(), "skein {}: {}\n{}", shown.join(" "), done.status, done.stderr);
    serde_json::from_str(&done.stdout).unwrap_or_else(|e| panic!("skein {}: {e} in {}", shown.join(" "), done.stdout))
}

/// The numbers of the array `field`, as the 32-bit floats that were printed.
///
/// # Panics
/// If there is no such array of numbers.
pub fn floats(value: &Value, field: &str) -> Vec<f32> {
    let list = value[field].as_array().unwrap_or_else(|| panic!("no array {field} in {value}"));
    list.iter().map(|x| x.as_f64().expect("a number") as f32).collect()
}

/// The ids in the array `field`.
///
/// # Panics
/// If there is no such array of ids.
pub fn ids(value: &Value, field: &str) -> Vec<u32> {
    let list = value[field].as_array().unwrap_or_else(|| panic!("no array {field} in {value}"));
    list.iter().map(|x| u32::try_from(x.as_u64().expect("an id")).expect("an id")).collect()
}

/// `ids` as `--input-ids` takes them.
pub fn id_list(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

/// Waits until `condition` gives a value, for at most [`LIMIT`].
///
/// # Panics
/// If it does not.
pub fn until<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    wait::until(LIMIT, what, condition)
}
