//! Processor time of this process's threads, by their names.

use std::{collections::HashMap, fs, time::Duration};

/// What each thread had used at some moment, and its name; none on systems that do not say.
#[derive(Clone, Debug, Default)]
pub(crate) struct Threads(HashMap<u32, (String, Duration)>);

impl Threads {
    /// Looks now.
    pub(crate) fn look() -> Self {
        let Ok(folder) = fs::read_dir("/proc/self/task") else { return Self::default() };
        let thread = |entry: fs::DirEntry| {
            let id = entry.file_name().to_str()?.parse().ok()?;
            let name = fs::read_to_string(entry.path().join("comm")).ok()?;
            let used = on_processor(&fs::read_to_string(entry.path().join("schedstat")).ok()?)?;
            Some((id, (name.trim_end().to_owned(), used)))
        };
        Self(folder.filter_map(Result::ok).filter_map(thread).collect())
    }

    /// What threads called `name` used since `before`; `None` when there are none, or the system does not say.
    pub(crate) fn used_since(&self, before: &Self, name: &str) -> Option<Duration> {
        let named = self.0.iter().filter(|(_, (own, _))| own == name);
        let since = |(id, (_, now)): (&u32, &(String, Duration))| {
            let then = before.0.get(id).map_or(Duration::ZERO, |(_, then)| *then);
            now.saturating_sub(then)
        };
        named.map(since).reduce(|sum, one| sum + one)
    }
}

/// The first number of `schedstat`: nanoseconds on a processor.
fn on_processor(schedstat: &str) -> Option<Duration> {
    schedstat.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_added_up_by_name() {
        let threads = |of: &[(u32, &str, u64)]| {
            Threads(of.iter().map(|(id, name, nanos)| (*id, ((*name).to_owned(), Duration::from_nanos(*nanos)))).collect())
        };
        let before = threads(&[(1, "router", 100), (2, "router", 50), (3, "client", 7)]);
        let after = threads(&[(1, "router", 130), (2, "router", 50), (3, "client", 9), (4, "router", 5)]);
        assert_eq!(after.used_since(&before, "router"), Some(Duration::from_nanos(35)));
        assert_eq!(after.used_since(&before, "client"), Some(Duration::from_nanos(2)));
        assert_eq!(after.used_since(&before, "worker"), None);
    }

    #[test]
    fn time_on_a_processor_is_the_first_number() {
        assert_eq!(on_processor("3273629 12 1\n"), Some(Duration::from_nanos(3_273_629)));
        assert_eq!(on_processor(""), None);
    }
}
