//! Watches whether workers live and get on.
//!
//! Silence and standstill are counted in the driver's own ticks, each taken after everything that had arrived was read: a router that was stopped
//! itself, or had no processor for a while, does not blame its workers.

use std::time::Duration;

use proto::worker::Heartbeat;

/// Time between two ticks; workers' heartbeats are as far apart.
pub(super) const TICK: Duration = Duration::from_millis(100);
/// A worker that has sent nothing for so many ticks is dead.
const SILENT: u32 = 10;
/// A worker may always take this long for a layer.
const LEAST: Duration = Duration::from_secs(2);
/// And this many times what a layer is predicted to take.
const FACTOR: u32 = 8;
/// Prediction before anything was measured: a layer of a large model on a slow machine, per token.
const UNMEASURED: Duration = Duration::from_millis(20);

/// What is known of one worker's pace.
#[derive(Debug)]
pub(super) struct Pace {
    /// Layers between which it reports progress.
    layers: u32,
    /// Longest time per token of a step so far.
    token: Option<Duration>,
    silent: u32,
    still: u32,
    last: Heartbeat,
}

/// What is wrong with a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    Silent { millis: u64 },
    Stuck { step: u64, layer: u32, millis: u64 },
}

impl Pace {
    /// For a worker that reports after each of `layers` layers.
    pub(super) fn new(layers: usize) -> Self {
        Self { layers: u32::try_from(layers.max(1)).unwrap_or(u32::MAX), token: None, silent: 0, still: 0, last: Heartbeat::default() }
    }

    /// Something came from it.
    pub(super) fn heard(&mut self) {
        self.silent = 0;
    }

    /// A heartbeat came. Only a change is progress, or that it waits for others.
    pub(super) fn beat(&mut self, heartbeat: Heartbeat) {
        if heartbeat != self.last || heartbeat.step == 0 {
            self.last = heartbeat;
            self.still = 0;
        }
    }

    /// Whether it computes nothing: it is idle, or waits for its input.
    pub(super) fn waits(&self) -> bool {
        self.last.step == 0
    }

    /// It answered a step of `tokens` tokens after `time` of its own.
    pub(super) fn answered(&mut self, tokens: usize, time: Duration) {
        self.still = 0;
        let token = time / u32::try_from(tokens.max(1)).unwrap_or(u32::MAX);
        self.token = Some(self.token.map_or(token, |t| t.max(token)));
    }

    /// A tick has passed; `tokens` are in the largest step that is due, if any is.
    pub(super) fn tick(&mut self, tokens: Option<usize>) -> Option<Trouble> {
        self.silent += 1;
        if self.silent > SILENT {
            return Some(Trouble::Silent { millis: millis(self.silent) });
        }
        let Some(tokens) = tokens else {
            self.still = 0;
            return None;
        };
        self.still += 1;
        let stuck = TICK * self.still > self.limit(tokens);
        stuck.then(|| Trouble::Stuck { step: self.last.step, layer: self.last.layer, millis: millis(self.still) })
    }

    /// How long the worker may take between two changes of its heartbeat.
    fn limit(&self, tokens: usize) -> Duration {
        let tokens = u32::try_from(tokens.max(1)).unwrap_or(u32::MAX);
        let layer = self.token.map_or(UNMEASURED, |t| t / self.layers);
        LEAST.max(layer.saturating_mul(tokens).saturating_mul(FACTOR))
    }
}

fn millis(ticks: u32) -> u64 {
    (TICK * ticks).as_millis() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beat(step: u64, layer: u32) -> Heartbeat {
        Heartbeat { step, layer, finished: 0 }
    }

    /// Ticks until there is trouble, with a heartbeat at each.
    fn until_trouble(pace: &mut Pace, tokens: Option<usize>, mut heartbeat: impl FnMut(u32) -> Option<Heartbeat>) -> (u32, Trouble) {
        for tick in 1..10_000 {
            if let Some(heartbeat) = heartbeat(tick) {
                pace.heard();
                pace.beat(heartbeat);
            }
            if let Some(trouble) = pace.tick(tokens) {
                return (tick, trouble);
            }
        }
        panic!("no trouble");
    }

    #[test]
    fn a_silent_worker_is_dead_after_a_second() {
        let mut pace = Pace::new(4);
        assert_eq!(until_trouble(&mut pace, None, |_| None), (11, Trouble::Silent { millis: 1100 }));
    }

    #[test]
    fn a_worker_is_stuck_when_its_layer_takes_too_long() {
        let mut pace = Pace::new(4);
        pace.answered(1, Duration::from_millis(40));
        let stuck = until_trouble(&mut pace, Some(1), |_| Some(beat(3, 2)));
        assert_eq!(stuck, (21, Trouble::Stuck { step: 3, layer: 2, millis: 2100 }));
        // 100 tokens are predicted to take a second per layer.
        let mut pace = Pace::new(4);
        pace.answered(1, Duration::from_millis(40));
        assert_eq!(until_trouble(&mut pace, Some(100), |_| Some(beat(3, 2))).0, 81);
    }

    #[test]
    fn progress_waiting_and_idleness_are_no_standstill() {
        let mut pace = Pace::new(4);
        for tick in 0..100 {
            pace.heard();
            pace.beat(beat(1, tick));
            assert_eq!(pace.tick(Some(1)), None);
        }
        for tokens in [Some(1), None] {
            for _ in 0..100 {
                pace.heard();
                pace.beat(beat(if tokens.is_some() { 0 } else { 7 }, 0));
                assert_eq!(pace.tick(tokens), None);
            }
        }
    }
}
