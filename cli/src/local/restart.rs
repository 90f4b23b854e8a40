//! When a worker that ended is started again, and when it is given up.

use std::{process::ExitStatus, time::Duration};

/// A worker that ran this long was well: its end counts as the first one.
const STEADY: Duration = Duration::from_secs(30);
/// The first worker that ends is replaced at once; then the pauses double from here …
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// … to here.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Signals in a row that a worker may die of before its deployment has answered once.
const ATTEMPTS: u32 = 3;

/// How a worker ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ending {
    /// As the system says.
    pub(crate) status: ExitStatus,
    /// What the worker itself said, if it could.
    pub(crate) fault: Option<Fault>,
}

/// Why a worker cannot go on, in its own words.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Fault {
    /// What it was given cannot be used.
    pub(crate) input: bool,
    pub(crate) message: String,
}

/// What to do about an ended worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Start it again after a pause.
    Again(Duration),
    /// Another attempt would end like this one.
    GiveUp,
}

/// Ends in a row of one worker.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Restarts {
    short_lives: u32,
}

impl Restarts {
    /// Takes the end of a worker that lived for `lived`. `proven` says whether its deployment has answered before.
    ///
    /// Before that, a worker that ends by itself will end again: its input is at fault, or its program. Afterwards nothing is given
    /// up, because others are being served.
    pub(crate) fn after(&mut self, ending: &Ending, lived: Duration, proven: bool) -> Verdict {
        if lived >= STEADY {
            self.short_lives = 0;
        }
        let pause = match self.short_lives {
            0 => Duration::ZERO,
            n => FIRST_PAUSE.saturating_mul(1 << (n - 1).min(16)).min(LONGEST_PAUSE),
        };
        self.short_lives += 1;
        let by_itself = ending.fault.is_some() || ending.status.code().is_some();
        if !proven && (by_itself || self.short_lives >= ATTEMPTS) { Verdict::GiveUp } else { Verdict::Again(pause) }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    /// Killed by SIGKILL.
    fn killed() -> Ending {
        Ending { status: ExitStatus::from_raw(9), fault: None }
    }

    /// Exit code 2, with a message.
    fn refused() -> Ending {
        Ending { status: ExitStatus::from_raw(2 << 8), fault: Some(Fault { input: true, message: "a.gguf is damaged".into() }) }
    }

    const SHORT: Duration = Duration::from_secs(1);

    #[test]
    fn the_first_loss_is_replaced_at_once_and_pauses_double() {
        let mut restarts = Restarts::default();
        let pauses: Vec<u64> = (0..9)
            .map(|_| match restarts.after(&killed(), SHORT, true) {
                Verdict::Again(pause) => pause.as_millis() as u64,
                Verdict::GiveUp => panic!("given up"),
            })
            .collect();
        assert_eq!(pauses, [0, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
        assert_eq!(restarts.after(&killed(), STEADY, true), Verdict::Again(Duration::ZERO));
    }

    #[test]
    fn bad_input_is_given_up_at_once_unless_others_are_served() {
        assert_eq!(Restarts::default().after(&refused(), SHORT, false), Verdict::GiveUp);
        assert_eq!(Restarts::default().after(&refused(), SHORT, true), Verdict::Again(Duration::ZERO));
        let crashed = Ending { status: ExitStatus::from_raw(101 << 8), fault: None };
        assert_eq!(Restarts::default().after(&crashed, SHORT, false), Verdict::GiveUp);
    }

    #[test]
    fn a_worker_that_is_killed_again_and_again_at_the_start_is_given_up() {
        let mut restarts = Restarts::default();
        assert!(matches!(restarts.after(&killed(), SHORT, false), Verdict::Again(_)));
        assert!(matches!(restarts.after(&killed(), SHORT, false), Verdict::Again(_)));
        assert_eq!(restarts.after(&killed(), SHORT, false), Verdict::GiveUp);
    }
}
