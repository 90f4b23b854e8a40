//! One worker as a child process: started, told its specification, listened to, stopped.
//!
//! The pipe to its standard input is its lifeline: it carries the specification, stays open, and its end, by whatever means this
//! process ends, ends the worker. On standard output it prints its address, and, should it fail, one line that says why. Its log
//! lines are passed on.

use std::{
    ffi::OsString,
    io,
    net::SocketAddr,
    path::PathBuf,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::Context;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    task::JoinHandle,
    time::timeout,
};

use super::restart::{Ending, Fault};
use crate::output;

/// Longest that a worker may take to say where it listens; its weights are loaded after that.
const STARTING: Duration = Duration::from_secs(30);
/// How long a worker may take to end once its pipe is closed, before it is killed.
pub(super) const GRACE: Duration = Duration::from_secs(5);

/// What every worker is started with.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    pub(crate) path: PathBuf,
    pub(crate) args: Vec<OsString>,
    /// Set beside this process's own environment.
    pub(crate) env: Vec<(&'static str, OsString)>,
    /// Put a worker's tag before each line of its log.
    pub(crate) tagged: bool,
}

/// A running worker process. Dropping it kills the process.
pub(crate) struct WorkerProcess {
    child: Child,
    /// Held until the worker is to stop.
    lifeline: Option<ChildStdin>,
    said: Lines<BufReader<ChildStdout>>,
    log: JoinHandle<()>,
}

impl WorkerProcess {
    /// Starts `program`, in a process group of its own, so that Ctrl-C on the terminal reaches this process alone. `tag` tells its log
    /// lines from those of others.
    ///
    /// # Errors
    /// When the system cannot start it.
    pub(crate) fn start(program: &Program, tag: &str) -> io::Result<Self> {
        let mut command = Command::new(&program.path);
        command.args(&program.args).envs(program.env.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0).kill_on_drop(true);
        let mut child = command.spawn()?;
        let (lifeline, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let missing = || io::Error::other("a pipe is missing");
        let said = BufReader::new(stdout.ok_or_else(missing)?).lines();
        let tag = if program.tagged { format!("[{tag}] ") } else { String::new() };
        let log = tokio::spawn(pass_on(stderr.ok_or_else(missing)?, tag));
        Ok(Self { child, lifeline, said, log })
    }

    /// Its process id, while it runs.
    pub(crate) fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// Tells it what to do and waits until it says where it listens; `None` when it ended instead.
    ///
    /// # Errors
    /// When it says something else, or nothing in time.
    pub(crate) async fn address(&mut self, spec: &str) -> anyhow::Result<Option<SocketAddr>> {
        let starting = async {
            if let Some(lifeline) = &mut self.lifeline {
                let line = format!("{spec}\n");
                // A worker that ended closes the pipe; how it ended says more than this error.
                if lifeline.write_all(line.as_bytes()).await.is_err() {
                    return Ok(None);
                }
            }
            let Some(line) = self.said.next_line().await.context("failed to read what a worker says")? else { return Ok(None) };
            line.parse().map(Some).with_context(|| format!("a worker said {line:?}, expected the address it listens on"))
        };
        timeout(STARTING, starting).await.with_context(|| format!("a worker did not say where it listens within {STARTING:?}"))?
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When the system cannot wait for it.
    pub(crate) async fn ended(&mut self) -> io::Result<Ending> {
        let mut fault = None;
        // Standard output closes with the process, and before it is waited for, so nothing said is lost.
        while let Some(line) = self.said.next_line().await? {
            match serde_json::from_str::<Fault>(&line) {
                Ok(said) => fault = Some(said),
                Err(_) => output::log_line(line.as_bytes()),
            }
        }
        Ok(Ending { status: self.child.wait().await?, fault })
    }

    /// Closes its pipe and waits for its end; kills it, by its id, when it takes too long. Waits for its last log lines.
    ///
    /// # Errors
    /// When the system cannot wait for it.
    pub(crate) async fn stop(mut self) -> io::Result<ExitStatus> {
        drop(self.lifeline.take());
        let status = match timeout(GRACE, self.child.wait()).await {
            Ok(ended) => ended?,
            Err(_) => {
                self.child.start_kill()?;
                self.child.wait().await?
            }
        };
        self.last_words().await;
        Ok(status)
    }

    /// Kills it, by its id, and waits for its end and its last log lines: for one from which nothing more is expected.
    ///
    /// # Errors
    /// When the system cannot wait for it.
    pub(crate) async fn kill(mut self) -> io::Result<ExitStatus> {
        self.child.start_kill()?;
        let status = self.child.wait().await?;
        self.last_words().await;
        Ok(status)
    }

    /// Waits for the log of a worker that is gone to end, unless it left children that hold it open.
    async fn last_words(&mut self) {
        let _ = timeout(GRACE, &mut self.log).await;
    }
}

/// Copies a worker's log lines to standard error.
async fn pass_on(log: impl AsyncRead + Unpin, tag: String) {
    let mut lines = BufReader::new(log).split(b'\n');
    while let Ok(Some(line)) = lines.next_segment().await {
        output::log_line(&[tag.as_bytes(), &line].concat());
    }
}

/// How a process ended, for a person.
pub(crate) fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(9)) => "was killed (signal 9): by someone, or because memory ran out".to_owned(),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => format!("ended: {status}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A shell in place of a worker.
    fn shell(script: &str) -> Program {
        Program { path: "/bin/sh".into(), args: vec!["-c".into(), script.into()], env: vec![("SAID", "yes".into())], tagged: true }
    }

    const ADDRESS: &str = "127.0.0.1:4711";

    #[tokio::test]
    async fn a_worker_gets_its_specification_and_says_its_address() {
        let mut worker = WorkerProcess::start(&shell("read spec; test \"$spec$SAID\" = '{}yes' && echo 127.0.0.1:4711; cat"), "0").unwrap();
        assert_eq!(worker.address("{}").await.unwrap(), Some(ADDRESS.parse().unwrap()));
        // `cat` ends when the pipe does.
        assert!(worker.stop().await.unwrap().success());
    }

    #[tokio::test]
    async fn a_worker_that_will_not_end_is_killed() {
        use std::os::unix::process::ExitStatusExt;
        let mut worker = WorkerProcess::start(&shell("read spec; echo 127.0.0.1:4711; kill -STOP $$"), "0").unwrap();
        worker.address("{}").await.unwrap();
        assert_eq!(worker.stop().await.unwrap().signal(), Some(9));
    }

    #[tokio::test]
    async fn a_worker_has_a_process_group_of_its_own() {
        // Field 5 of stat is the process group.
        let script = "read spec; read -r _ _ _ _ group rest < /proc/$$/stat; test $group = $$ && echo 127.0.0.1:4711; cat";
        let mut worker = WorkerProcess::start(&shell(script), "0").unwrap();
        assert_eq!(worker.address("{}").await.unwrap(), Some(ADDRESS.parse().unwrap()));
        worker.stop().await.unwrap();
    }

    #[tokio::test]
    async fn what_a_failing_worker_says_is_heard() {
        let script = r#"read spec; echo 127.0.0.1:4711; echo '{"input":true,"message":"a.gguf is damaged"}'; exit 2"#;
        let mut worker = WorkerProcess::start(&shell(script), "0").unwrap();
        worker.address("{}").await.unwrap();
        let ending = worker.ended().await.unwrap();
        assert_eq!(ending.fault, Some(Fault { input: true, message: "a.gguf is damaged".into() }));
        assert_eq!(describe(ending.status), "ended with exit code 2");
    }

    #[tokio::test]
    async fn a_worker_that_ends_or_chatters_at_the_start_is_no_worker() {
        let mut worker = WorkerProcess::start(&shell("exit 3"), "0").unwrap();
        assert_eq!(worker.address("{}").await.unwrap(), None);
        assert_eq!(worker.ended().await.unwrap().status.code(), Some(3));
        let mut worker = WorkerProcess::start(&shell("read spec; echo hello; cat"), "0").unwrap();
        assert!(worker.address("{}").await.is_err());
    }
}
