//! The cluster's processes: started in its network namespace, recorded with their ids, ended by nothing but those records.

use std::{
    fs::{self, File},
    io,
    path::Path,
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use serde::{Deserialize, Serialize};

use super::{folder::Cluster, network};
use crate::process::command;

const RECORDS: &str = "processes";

/// What a process is started with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Program {
    /// Name among the cluster's processes, and of its log.
    pub(crate) name: String,
    /// The executable.
    pub(crate) path: String,
    /// Its arguments; one of them names the run folder, by which the process is known later.
    pub(crate) args: Vec<String>,
}

impl Program {
    /// A program called `name` at `path`.
    pub(crate) fn new(name: &str, path: &Path, args: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { name: name.to_owned(), path: path.to_string_lossy().into_owned(), args: args.into_iter().map(Into::into).collect() }
    }
}

/// A process of the cluster as it was recorded when it started.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Process {
    /// What it was started with.
    pub(crate) program: Program,
    pid: i32,
    /// Clock ticks after boot at which it started: with the id, it names one process for good.
    started: u64,
}

/// Starts `program` in the cluster's namespace, with its output in `logs/NAME.log`, and records it.
///
/// # Errors
/// If it cannot start, or its command line would not name the run folder.
pub(crate) fn start(cluster: &Cluster, program: Program) -> Result<Process> {
    let folder = cluster.folder().to_string_lossy().into_owned();
    if !program.args.iter().any(|a| a.contains(&folder)) {
        bail!("the command line of {} does not name {folder}", program.name);
    }
    let log = cluster.make("logs")?.join(format!("{}.log", program.name));
    let output = File::options().create(true).append(true).open(&log).with_context(|| format!("failed to open {}", log.display()))?;
    // `setsid` keeps a terminal's signals from it; both it and `nsenter` become the program, so the id stays.
    let child = command("setsid")
        .arg("nsenter")
        .arg(network::enter(cluster))
        .arg(&program.path)
        .args(&program.args)
        .env("PATH", search_path()?)
        .current_dir(cluster.folder())
        .stdout(output.try_clone().context("failed to share a log")?)
        .stderr(output)
        .stdin(Stdio::null())
        .spawn()
        .with_context(|| format!("failed to start {}", program.name))?;
    let pid = i32::try_from(child.id()).context("a process id too large")?;
    let started = status(pid).with_context(|| format!("{} ended at once; see {}", program.name, log.display()))?.started;
    let process = Process { program, pid, started };
    let record = serde_json::to_string_pretty(&process)?;
    cluster.write(&format!("{RECORDS}/{}.json", process.program.name), &record)?;
    Ok(process)
}

/// The recorded processes of the cluster, those that ended among them.
///
/// # Errors
/// If a record cannot be read.
pub(crate) fn recorded(cluster: &Cluster) -> Result<Vec<Process>> {
    let folder = cluster.path(RECORDS);
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e).with_context(|| format!("failed to list {}", folder.display())),
    };
    let mut all = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let text = fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
        // A record that was cut short when the machine stopped says nothing of a living process.
        if !text.is_empty() {
            all.push(serde_json::from_str(&text).with_context(|| format!("failed to parse {}", path.display()))?);
        }
    }
    Ok(all)
}

impl Process {
    /// Whether this very process still runs.
    pub(crate) fn alive(&self, cluster: &Cluster) -> bool {
        status(self.pid).is_some_and(|s| s.started == self.started && s.state != 'Z') && names(self.pid, cluster)
    }

    /// Ends it: asks first where `grace` is not zero, then kills.
    pub(crate) fn end(&self, cluster: &Cluster, grace: Duration) -> Result<()> {
        end(self.pid, grace, || self.alive(cluster)).with_context(|| format!("failed to end {}", self.program.name))
    }
}

/// Ids of the processes whose command lines name the cluster's run folder and whose program's file name begins with `program`.
pub(crate) fn naming(cluster: &Cluster, program: &str) -> Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("failed to list /proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let first = String::from_utf8_lossy(line.split(|b| *b == 0).next().unwrap_or_default()).into_owned();
        let is_program = Path::new(&first).file_name().is_some_and(|n| n.to_string_lossy().starts_with(program));
        if is_program && names(pid, cluster) && pid.cast_unsigned() != std::process::id() {
            found.push(pid);
        }
    }
    Ok(found)
}

/// Ends the process `pid` if `is_it` still holds once a handle on it is held, so that no other process of the same id is ever hit.
pub(crate) fn end(pid: i32, grace: Duration, is_it: impl FnOnce() -> bool) -> Result<()> {
    let Some(pid) = Pid::from_raw(pid) else { return Ok(()) };
    let handle = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(handle) => handle,
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        Err(e) => return Err(e).context("failed to take hold of a process"),
    };
    if !is_it() {
        return Ok(());
    }
    let signals = [(Signal::TERM, grace), (Signal::KILL, Duration::from_secs(10))];
    for (signal, patience) in signals.into_iter().filter(|(_, p)| !p.is_zero()) {
        match pidfd_send_signal(&handle, signal) {
            Ok(()) => {}
            Err(rustix::io::Errno::SRCH) => return Ok(()),
            Err(e) => return Err(e).context("failed to signal a process"),
        }
        let patience = Timespec::try_from(patience).context("a time too long")?;
        if poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&patience)).context("failed to wait for a process")? > 0 {
            return Ok(());
        }
    }
    bail!("process {pid:?} did not end when it was killed")
}

/// Whether an argument of the process lies in the cluster's run folder or names it.
fn names(pid: i32, cluster: &Cluster) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let folder = cluster.folder().to_string_lossy().into_owned();
    line.split(|b| *b == 0).any(|arg| has_path(&String::from_utf8_lossy(arg), &folder))
}

/// Whether `arg` has `folder` in it as a whole path or the beginning of one.
fn has_path(arg: &str, folder: &str) -> bool {
    arg.match_indices(folder).any(|(at, _)| matches!(arg.as_bytes().get(at + folder.len()), None | Some(b'/' | b',' | b':' | b'"')))
}

/// What the kernel says of a process.
struct Status {
    state: char,
    started: u64,
}

fn status(pid: i32) -> Option<Status> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The program's name stands in parentheses and may hold anything; fields are counted after it (proc(5): 3 is the state, 22 the start).
    let fields: Vec<&str> = text.rsplit_once(") ")?.1.split(' ').collect();
    Some(Status { state: fields.first()?.chars().next()?, started: fields.get(19)?.parse().ok()? })
}

/// PATH with the folders of system programs, which not every shell has.
fn search_path() -> Result<std::ffi::OsString> {
    let own = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(Into::into);
    std::env::join_paths(std::env::split_paths(&own).chain(system)).context("PATH cannot be extended")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_told_from_one_whose_name_begins_alike() {
        assert!(has_path("--root-dir=/c/one/kubelet", "/c/one"));
        assert!(has_path("/c/one", "/c/one"));
        assert!(!has_path("--root-dir=/c/one-more/kubelet", "/c/one"));
        assert!(has_path("/c/one-more,/c/one/x", "/c/one"));
    }

    #[test]
    fn this_process_has_a_start() {
        let own = i32::try_from(std::process::id()).expect("an id");
        let status = status(own).expect("this process");
        assert!(status.started > 0);
        assert_ne!(status.state, 'Z');
    }

    #[test]
    fn a_process_is_ended_only_if_it_is_the_one_meant() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        let pid = i32::try_from(child.id()).expect("an id");
        end(pid, Duration::from_secs(5), || false).expect("left alone");
        assert!(child.try_wait().expect("a state").is_none());
        end(pid, Duration::from_secs(5), || true).expect("ended");
        assert!(!child.wait().expect("a state").success());
    }
}
