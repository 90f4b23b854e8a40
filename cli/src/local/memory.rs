//! How much memory this machine leaves to workers.

use std::fs;

use plan::planner::Capacity;

/// The memory each of `workers` workers may take: an equal part of what is free beside `taken` bytes; unknown on systems that do not say.
pub(crate) fn of_each(workers: usize, taken: u64) -> Capacity {
    Capacity { memory_bytes: free().map(|bytes| bytes.saturating_sub(taken) / workers.max(1) as u64) }
}

/// Bytes that new processes can use: what the kernel calls available, but no more than the cgroup's limit (v2, then v1).
pub(crate) fn free() -> Option<u64> {
    let available = available(&fs::read_to_string("/proc/meminfo").ok()?)?;
    let limits = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let limit = limits.iter().find_map(|path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok());
    Some(limit.map_or(available, |limit| available.min(limit)))
}

/// `MemAvailable` in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::available;

    #[test]
    fn available_memory_is_in_kibibytes() {
        assert_eq!(available("MemTotal:  4 kB\nMemAvailable:    2048 kB\n"), Some(2 << 20));
        assert_eq!(available("MemTotal:  4 kB\n"), None);
    }
}
