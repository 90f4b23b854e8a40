//! How many replicas a deployment should have: from what routers report to a number, a reason and when to look again. Pure, in seconds of
//! whatever clock the caller has.
//!
//! Each target asks for a number of replicas, and the largest counts. What is asked for is remembered: more replicas come once the least that
//! was asked for over the up window is more than there are, fewer once the most over the down window is less, so that a load which comes and
//! goes within a window changes nothing. What is not known changes nothing either: without a fresh report the number stays, and while one
//! router of several is silent it does not fall.

#[cfg(test)]
mod tests;

use std::{cmp::Ordering, collections::VecDeque};

use plan::manifest::{Builtin, TargetKind};

/// A report that is older says nothing of the load now.
pub const STALE: i64 = 5;
/// Seconds between two looks while there is load.
pub const PERIOD: i64 = 5;
/// Part of a target that a measure may be off without anything being done.
const TOLERANCE: f64 = 0.1;
/// A latency below this part of its target leaves room for one replica less.
const AMPLE: f64 = 0.5;
/// Most that a latency asks for at once, as a multiple of what there is: how it falls with more replicas is not known.
const STRIDE: f64 = 2.0;

/// What one router says of a deployment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Report {
    /// Seconds since it came.
    pub age: i64,
    /// Requests that wait for a place on a replica.
    pub queued: u32,
    /// Requests that run.
    pub running: u32,
    /// Requests that wait because there is no replica.
    pub held: u32,
    /// Part of the KV blocks in use, of the replicas it knows.
    pub kv_used: f64,
    /// Seconds to the first token that nine of ten stay below; `None` where there was none.
    pub ttft_p90: Option<f64>,
    /// The same between tokens.
    pub itl_p90: Option<f64>,
    /// Tokens generated in a second.
    pub tokens_per_second: f64,
}

/// What is known of a deployment.
#[derive(Clone, Copy, Debug)]
pub struct Observed<'a> {
    /// Replicas wanted so far.
    pub desired: u32,
    /// Replicas that answer.
    pub ready: u32,
    /// Of every router of the pool, with a silent one's last.
    pub reports: &'a [Report],
}

/// What is remembered between two decisions. One that begins empty, as after a restart, waits a whole window before it takes anything away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// When, and how many replicas were asked for; ascending in time.
    asked: VecDeque<(i64, u32)>,
    /// When there was last a request.
    busy: Option<i64>,
}

/// Why a number is what it is: reasons of the condition `ScalingActive`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as the condition's reasons")]
pub enum Reason {
    ValidMetrics,
    MetricsStale,
    AtMax,
    AtZero,
}

impl Reason {
    /// As conditions write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::ValidMetrics => "ValidMetrics",
            Self::MetricsStale => "MetricsStale",
            Self::AtMax => "AtMax",
            Self::AtZero => "AtZero",
        }
    }

    /// Whether the number follows the load.
    pub fn is_active(self) -> bool {
        self != Self::MetricsStale
    }
}

/// What was decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Replicas wanted.
    pub desired: u32,
    /// Why.
    pub reason: Reason,
    /// The same for people, with what was measured.
    pub message: String,
    /// When to look again though routers say nothing new.
    pub again: Option<i64>,
}

/// What all fresh reports say together.
#[derive(Clone, Copy, Debug, Default)]
struct Total {
    queued: u32,
    running: u32,
    held: u32,
    kv_used: f64,
    ttft: Option<f64>,
    itl: Option<f64>,
    tokens_per_second: f64,
}

impl Total {
    fn of<'a>(reports: impl Iterator<Item = &'a Report>) -> Self {
        let worst = |a: Option<f64>, b: Option<f64>| a.into_iter().chain(b).reduce(f64::max);
        reports.fold(Self::default(), |all, r| Self {
            queued: all.queued.saturating_add(r.queued),
            running: all.running.saturating_add(r.running),
            held: all.held.saturating_add(r.held),
            // Every router sees the replicas whole; the latest of them may be behind.
            kv_used: all.kv_used.max(r.kv_used),
            ttft: worst(all.ttft, r.ttft_p90),
            itl: worst(all.itl, r.itl_p90),
            tokens_per_second: all.tokens_per_second + r.tokens_per_second,
        })
    }

    fn inflight(&self) -> u32 {
        self.queued.saturating_add(self.running).saturating_add(self.held)
    }
}

/// Decides. `now` never goes back.
pub fn decide(spec: &Builtin, observed: &Observed<'_>, history: &mut History, now: i64) -> Decision {
    let desired = observed.desired.clamp(spec.min, spec.max);
    let fresh = || observed.reports.iter().filter(|r| r.age <= STALE);
    let silent = observed.reports.len() - fresh().count();
    if fresh().next().is_none() {
        let message = match silent {
            0 => "no router reports; the number of replicas stays".to_owned(),
            n => format!("the last report of each of {n} routers is older than {STALE} s; the number of replicas stays"),
        };
        // What will be reported then is not known: the windows begin anew.
        *history = History::default();
        return Decision { desired, reason: Reason::MetricsStale, message, again: Some(now + PERIOD) };
    }
    let total = Total::of(fresh());
    if total.inflight() > 0 || history.busy.is_none() {
        history.busy = Some(now);
    }
    let idle_at = history.busy.unwrap_or(now) + spec.idle_seconds;
    if desired == 0 && total.inflight() == 0 {
        history.asked.clear();
        let message = "no replicas, and no request waits for one".to_owned();
        return Decision { desired: 0, reason: Reason::AtZero, message, again: None };
    }
    let asked = spec.targets.iter().map(|&(kind, value)| (ask(kind, value, &total, observed, desired), kind, value));
    let (most, kind, value) = asked.max_by_key(|(replicas, ..)| *replicas).unwrap_or((desired, TargetKind::QueueDepth, 0.0));
    let floor = spec.min.max(1);
    let wanted = most.clamp(floor, spec.max);
    let mut next = if desired == 0 {
        // Held requests wait for nothing but this.
        history.asked.clear();
        history.ask(wanted, now);
        wanted
    } else {
        history.settle(spec, desired, wanted, now)
    };
    if silent > 0 {
        next = next.max(desired);
    }
    let idle = spec.min == 0 && silent == 0 && total.inflight() == 0 && now >= idle_at;
    if idle {
        history.asked.clear();
        let message = format!("no request for {} s; the next one wakes the deployment", spec.idle_seconds);
        return Decision { desired: 0, reason: Reason::AtZero, message, again: None };
    }
    let reason = if next == spec.max && most > spec.max { Reason::AtMax } else { Reason::ValidMetrics };
    let measured = describe(kind, &total);
    let mut message = format!("{measured} against {kind:?} {value} asks for {most} replicas; {next} are wanted");
    if silent > 0 {
        message.push_str(&format!("; {silent} of {} routers are silent, so none is taken away", observed.reports.len()));
    }
    let quiet = total.inflight() == 0 && silent == 0 && next == observed.ready;
    let again = match (quiet, history.settles(spec, next, now)) {
        (false, _) => Some(now + PERIOD),
        (true, at) => at.into_iter().chain((spec.min == 0).then_some(idle_at)).filter(|at| *at > now).min(),
    };
    Decision { desired: next, reason, message, again }
}

/// Replicas that one target asks for.
fn ask(kind: TargetKind, value: f64, total: &Total, observed: &Observed<'_>, desired: u32) -> u32 {
    let per_replica = |sum: f64| {
        let replicas = f64::from(observed.ready.max(1));
        if (sum / (value * replicas) - 1.0).abs() <= TOLERANCE { observed.ready.max(1) } else { whole(sum / value) }
    };
    match kind {
        TargetKind::QueueDepth => per_replica(f64::from(total.queued.saturating_add(total.held))),
        TargetKind::InflightPerReplica => per_replica(f64::from(total.inflight())),
        TargetKind::TokensPerSecond => per_replica(total.tokens_per_second),
        // What replicas measure says nothing of those that are still to come, or that are going.
        _ if observed.ready != desired => desired,
        TargetKind::KVCacheUtilization => per_replica(total.kv_used * f64::from(observed.ready)),
        TargetKind::TTFTP90 => latency(total.ttft, value, total, observed.ready),
        TargetKind::ITLP90 => latency(total.itl, value, total, observed.ready),
    }
}

/// Replicas that a latency asks for: it grows with the load, but does not say how much more would fit.
fn latency(measured: Option<f64>, value: f64, total: &Total, ready: u32) -> u32 {
    // Without requests there is nothing that could be slow.
    let Some(measured) = measured.filter(|_| total.inflight() > 0) else { return ready.saturating_sub(1) };
    match measured / value {
        ratio if ratio > 1.0 + TOLERANCE => whole(f64::from(ready) * ratio.min(STRIDE)),
        ratio if ratio < AMPLE => ready.saturating_sub(1),
        _ => ready,
    }
}

/// Replicas that cover a fraction of one.
fn whole(replicas: f64) -> u32 {
    // The cast saturates, and NaN is 0.
    replicas.ceil() as u32
}

fn describe(kind: TargetKind, total: &Total) -> String {
    let seconds = |of: Option<f64>| of.map_or_else(|| "no latency yet".to_owned(), |s| format!("{s:.3} s"));
    match kind {
        TargetKind::QueueDepth => format!("{} requests waiting", total.queued.saturating_add(total.held)),
        TargetKind::InflightPerReplica => format!("{} requests in flight", total.inflight()),
        TargetKind::KVCacheUtilization => format!("{:.2} of the KV blocks in use", total.kv_used),
        TargetKind::TTFTP90 => format!("{} to the first token", seconds(total.ttft)),
        TargetKind::ITLP90 => format!("{} between tokens", seconds(total.itl)),
        TargetKind::TokensPerSecond => format!("{:.0} tokens a second", total.tokens_per_second),
    }
}

impl History {
    /// Notes what is asked for, and gives what the windows allow.
    fn settle(&mut self, spec: &Builtin, desired: u32, wanted: u32, now: i64) -> u32 {
        if self.asked.is_empty() {
            // What stands was asked for by whoever made it.
            self.ask(desired, now);
        }
        self.ask(wanted, now);
        let longest = spec.up_seconds.max(spec.down_seconds);
        self.asked.retain(|(at, _)| at + longest >= now);
        let within = |seconds: i64| self.asked.iter().filter(move |(at, _)| at + seconds > now).map(|(_, n)| *n);
        let least = within(spec.up_seconds).fold(wanted, u32::min);
        let most = within(spec.down_seconds).fold(wanted, u32::max);
        desired.clamp(least, most)
    }

    /// Notes one number; of a run of equal ones the last counts, since windows look back from now.
    fn ask(&mut self, replicas: u32, now: i64) {
        match self.asked.back_mut() {
            Some((at, last)) if *last == replicas => *at = now,
            _ => self.asked.push_back((now, replicas)),
        }
    }

    /// When what is remembered would allow something else than `desired`, if nothing new is asked for.
    fn settles(&self, spec: &Builtin, desired: u32, now: i64) -> Option<i64> {
        let last = self.asked.back()?.1;
        let mut before = self.asked.iter().rev().skip(1);
        let (other, seconds) = match last.cmp(&desired) {
            Ordering::Equal => return None,
            Ordering::Less => (before.find(|(_, n)| *n > last), spec.down_seconds),
            Ordering::Greater => (before.find(|(_, n)| *n < last), spec.up_seconds),
        };
        Some((other?.0 + seconds).max(now + 1))
    }
}
