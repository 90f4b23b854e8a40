//! Other processes by id: who started them, whether they live, and signals.

use std::{fs, process::Command};

/// A process, by id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pid(pub u32);

impl Pid {
    /// Its living children, ascending by id (so in the order in which they were started, unless ids wrapped).
    pub fn children(self) -> Vec<Self> {
        let mut children: Vec<u32> = fs::read_dir("/proc")
            .expect("/proc")
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|&pid| stat(pid).is_some_and(|(state, parent)| parent == self.0 && state != 'Z'))
            .collect();
        children.sort_unstable();
        children.into_iter().map(Self).collect()
    }

    /// Whether it runs (a zombie does not).
    pub fn lives(self) -> bool {
        stat(self.0).is_some_and(|(state, _)| state != 'Z' && state != 'X')
    }

    /// Processor time it has used, in ticks of 10 ms; 0 when it does not exist.
    pub fn cpu_ticks(self) -> u64 {
        let fields = fields(self.0).unwrap_or_default();
        // Fields 14 and 15 of the file, counted from 1; these begin with field 3.
        fields.iter().skip(11).take(2).filter_map(|f| f.parse::<u64>().ok()).sum()
    }

    /// The most memory that it ever held at once, in bytes; 0 when it does not exist.
    pub fn peak_memory(self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0)).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).map_or(0, |kib| kib << 10)
    }

    /// Sends it the signal called `name` (`KILL`, `STOP`, `CONT`, `INT`).
    ///
    /// # Panics
    /// If the process does not exist.
    pub fn signal(self, name: &str) {
        let status = Command::new("kill").arg(format!("-{name}")).arg(self.0.to_string()).status().expect("kill");
        assert!(status.success(), "kill -{name} {}: {status}", self.0);
    }
}

/// State letter and parent of a process; `None` when there is no such process.
fn stat(pid: u32) -> Option<(char, u32)> {
    let fields = fields(pid)?;
    Some((fields.first()?.chars().next()?, fields.get(1)?.parse().ok()?))
}

/// The fields of `/proc/<pid>/stat` from the third on.
fn fields(pid: u32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything; what follows the last parenthesis does not.
    Some(text.rsplit_once(')')?.1.split_whitespace().map(str::to_owned).collect())
}
