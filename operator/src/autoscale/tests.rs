//! Loads over time, and what becomes of the number of replicas.

use super::*;

const INFLIGHT: &[(TargetKind, f64)] = &[(TargetKind::InflightPerReplica, 8.0)];

fn spec(min: u32, max: u32, targets: &[(TargetKind, f64)]) -> Builtin {
    Builtin { min, max, targets: targets.to_vec(), up_seconds: 0, down_seconds: 300, idle_seconds: 60 }
}

fn running(running: u32) -> Report {
    Report { running, ..Report::default() }
}

/// A deployment whose replicas answer as soon as they are wanted, unless a test says otherwise.
struct World {
    spec: Builtin,
    history: History,
    desired: u32,
    ready: Option<u32>,
    now: i64,
    /// Times at which the number changed, and what it became.
    changes: Vec<(i64, u32)>,
}

impl World {
    fn new(spec: Builtin, desired: u32) -> Self {
        Self { spec, history: History::default(), desired, ready: None, now: 1000, changes: Vec::new() }
    }

    fn decide(&mut self, reports: &[Report]) -> Decision {
        let observed = Observed { desired: self.desired, ready: self.ready.unwrap_or(self.desired), reports };
        let decision = decide(&self.spec, &observed, &mut self.history, self.now);
        if decision.desired != self.desired {
            self.changes.push((self.now, decision.desired));
        }
        self.desired = decision.desired;
        decision
    }

    /// The last of the decisions of `seconds` seconds with this load, one each second.
    fn run(&mut self, seconds: i64, report: Report) -> Decision {
        let mut last = None;
        for _ in 0..seconds {
            last = Some(self.decide(&[report]));
            self.now += 1;
        }
        last.expect("at least one second")
    }
}

#[test]
fn load_adds_replicas_at_once_and_takes_them_away_after_the_window() {
    let mut world = World::new(spec(1, 4, INFLIGHT), 1);
    let decision = world.run(1, running(20));
    assert_eq!((decision.desired, decision.reason), (3, Reason::ValidMetrics));
    assert!(decision.message.contains("20 requests in flight"), "{}", decision.message);
    let decision = world.run(1, running(100));
    assert_eq!((decision.desired, decision.reason), (4, Reason::AtMax));
    assert_eq!(decision.again, Some(world.now - 1 + PERIOD));
    // The last that asked for more was at `from`.
    let from = world.now - 1;
    world.run(400, running(3));
    assert_eq!(world.changes, [(1000, 3), (1001, 4), (from + 300, 1)]);
}

#[test]
fn a_load_that_comes_and_goes_within_the_window_changes_nothing() {
    let flap = |down_seconds| {
        let mut world = World::new(Builtin { down_seconds, ..spec(1, 4, INFLIGHT) }, 1);
        for _ in 0..20 {
            world.run(30, running(16));
            world.run(30, running(1));
        }
        world.changes.len()
    };
    assert_eq!(flap(300), 1);
    assert_eq!(flap(0), 40, "the load does flap");
}

#[test]
fn a_burst_shorter_than_the_up_window_adds_nothing() {
    let burst = |up_seconds, seconds| {
        let mut world = World::new(Builtin { up_seconds, ..spec(1, 4, INFLIGHT) }, 1);
        world.run(100, running(1));
        world.run(seconds, running(30));
        world.run(100, running(1));
        world.changes
    };
    assert_eq!(burst(20, 19), []);
    assert_eq!(burst(20, 21), [(1119, 4)], "asked for since 1100, and less last at 1099");
    assert_eq!(burst(0, 1), [(1100, 4)]);
}

#[test]
fn what_is_nearly_right_is_left_alone() {
    let mut world = World::new(spec(1, 10, INFLIGHT), 4);
    assert_eq!(world.run(400, running(35)).desired, 4, "8.75 on each");
    assert_eq!(world.run(1, running(36)).desired, 5, "9 on each");
}

#[test]
fn without_fresh_reports_the_number_stays() {
    let old = Report { age: STALE + 1, ..running(100) };
    for reports in [&[][..], &[old], &[old, old]] {
        let mut world = World::new(spec(0, 4, INFLIGHT), 2);
        for _ in 0..1000 {
            let decision = world.decide(reports);
            assert_eq!((decision.desired, decision.reason), (2, Reason::MetricsStale));
            assert_eq!(decision.again, Some(world.now + PERIOD));
            world.now += 1;
        }
        assert!(!Reason::MetricsStale.is_active());
    }
    // The same load, known, changes it.
    assert_eq!(World::new(spec(0, 4, INFLIGHT), 2).run(1, running(100)).desired, 4);
}

#[test]
fn while_one_router_is_silent_nothing_is_taken_away() {
    let silent = Report { age: STALE + 1, ..Report::default() };
    let mut world = World::new(spec(0, 4, INFLIGHT), 2);
    for _ in 0..1000 {
        let decision = world.decide(&[running(0), silent]);
        assert!(decision.desired == 2 && decision.message.contains("1 of 2 routers are silent"), "{decision:?}");
        world.now += 1;
    }
    assert_eq!(world.decide(&[running(30), silent]).desired, 4, "but added");
    let mut known = World::new(spec(0, 4, INFLIGHT), 2);
    known.run(1000, running(0));
    assert_eq!(known.desired, 0);
}

#[test]
fn windows_begin_anew_after_silence_and_after_a_restart() {
    let mut world = World::new(spec(1, 4, INFLIGHT), 4);
    world.run(299, running(1));
    world.decide(&[]);
    assert_eq!(world.run(299, running(1)).desired, 4);
    assert_eq!(world.run(2, running(1)).desired, 1);
}

#[test]
fn an_idle_deployment_goes_to_zero_and_a_held_request_wakes_it() {
    let mut world = World::new(spec(0, 4, INFLIGHT), 2);
    world.run(10, running(1));
    let idle = world.now - 1;
    let decision = world.run(100, running(0));
    assert_eq!((decision.desired, decision.reason, decision.again), (0, Reason::AtZero, None));
    assert_eq!(world.changes, [(idle + 60, 0)], "whatever the window for fewer replicas is");
    world.run(5000, running(0));
    let decision = world.run(1, Report { held: 1, ..Report::default() });
    assert_eq!((decision.desired, decision.reason), (1, Reason::ValidMetrics));
    // While it starts, the held request keeps it.
    world.ready = Some(0);
    assert_eq!(world.run(500, Report { held: 1, ..Report::default() }).desired, 1);
    world.ready = None;
    assert_eq!(world.run(59, running(0)).desired, 1);
    assert_eq!(world.run(1, running(0)).desired, 0);
    assert_eq!(world.run(1, Report { held: 20, ..Report::default() }).desired, 3, "as many as the held requests ask for");
}

#[test]
fn one_that_keeps_a_replica_never_goes_to_zero() {
    let mut world = World::new(spec(1, 4, INFLIGHT), 1);
    assert_eq!(world.run(5000, running(0)).desired, 1);
    assert_eq!(world.changes, []);
}

#[test]
fn a_single_request_restarts_the_idle_time() {
    let mut world = World::new(spec(0, 4, INFLIGHT), 1);
    for _ in 0..20 {
        world.run(59, running(0));
        world.run(1, running(1));
    }
    assert_eq!(world.changes, []);
}

#[test]
fn each_measure_asks_for_what_it_needs_and_the_most_counts() {
    use TargetKind::{ITLP90, KVCacheUtilization, QueueDepth, TTFTP90, TokensPerSecond};
    let load = Report {
        queued: 10,
        running: 16,
        kv_used: 0.9,
        ttft_p90: Some(3.0),
        itl_p90: Some(0.06),
        tokens_per_second: 450.0,
        ..Report::default()
    };
    let asked = |targets: &[(TargetKind, f64)]| World::new(spec(1, 100, targets), 2).decide(&[load]).desired;
    assert_eq!(asked(&[(QueueDepth, 2.0)]), 5);
    assert_eq!(asked(&[(TargetKind::InflightPerReplica, 2.0)]), 13);
    assert_eq!(asked(&[(KVCacheUtilization, 0.5)]), 4);
    assert_eq!(asked(&[(TTFTP90, 2.0)]), 3);
    assert_eq!(asked(&[(TTFTP90, 0.1)]), 4, "a latency at most doubles what there is");
    assert_eq!(asked(&[(ITLP90, 0.05)]), 3);
    assert_eq!(asked(&[(TokensPerSecond, 100.0)]), 5);
    assert_eq!(asked(&[(TTFTP90, 2.0), (QueueDepth, 2.0), (KVCacheUtilization, 0.5)]), 5);
    // Two routers: counts add up, of latencies and caches the worst counts.
    let two = |targets: &[(TargetKind, f64)]| World::new(spec(1, 100, targets), 2).decide(&[load, Report { kv_used: 0.1, ..load }]).desired;
    assert_eq!((two(&[(QueueDepth, 2.0)]), two(&[(KVCacheUtilization, 0.5)]), two(&[(TTFTP90, 2.0)])), (10, 4, 3));
}

#[test]
fn a_latency_asks_for_nothing_while_replicas_start_and_gives_back_one_at_a_time() {
    let slow = Report { running: 4, ttft_p90: Some(10.0), ..Report::default() };
    let target = [(TargetKind::TTFTP90, 1.0)];
    let mut world = World::new(spec(1, 100, &target), 2);
    assert_eq!(world.run(1, slow).desired, 4);
    world.ready = Some(2);
    assert_eq!(world.run(100, slow).desired, 4, "what is slow now may be well with four");
    world.ready = None;
    assert_eq!(world.run(1, slow).desired, 8);
    let quick = Report { running: 4, ttft_p90: Some(0.1), ..Report::default() };
    assert_eq!(world.run(302, quick).desired, 7);
    // What is neither slow nor quick keeps what there is, and no request is not slow, whatever was measured last.
    assert_eq!(World::new(spec(1, 100, &target), 4).run(2000, Report { running: 4, ttft_p90: Some(0.8), ..Report::default() }).desired, 4);
    assert_eq!(World::new(spec(1, 100, &target), 4).run(2000, Report { ttft_p90: Some(10.0), ..Report::default() }).desired, 1);
}

#[test]
fn a_spec_that_changes_bounds_counts_at_once() {
    let mut world = World::new(spec(1, 8, INFLIGHT), 8);
    world.run(1, running(64));
    world.spec.max = 5;
    assert_eq!(world.run(1, running(64)).desired, 5);
    (world.spec.min, world.spec.max) = (6, 8);
    assert_eq!(world.run(1, running(1)).desired, 6);
}

#[test]
fn looking_only_when_told_to_gives_what_looking_every_second_gives() {
    // A load by the second; the deployment is looked at also when it begins or ends, as routers say so at once.
    let load = |now: i64| match now - 1000 {
        0..100 => 0,
        100..250 => 30,
        250..400 => 6,
        400..2000 => 0,
        2000..2010 => 1,
        _ => 0,
    };
    let mut always = World::new(spec(0, 4, INFLIGHT), 1);
    while always.now < 5000 {
        always.run(1, running(load(always.now)));
    }
    let mut seldom = World::new(spec(0, 4, INFLIGHT), 1);
    let (mut looks, mut again) = (0, Some(seldom.now));
    while seldom.now < 5000 {
        let turned = (load(seldom.now) == 0) != (load(seldom.now - 1) == 0);
        if again.is_some_and(|at| at <= seldom.now) || turned {
            looks += 1;
            again = seldom.decide(&[running(load(seldom.now))]).again;
        }
        seldom.now += 1;
    }
    let numbers = |changes: &[(i64, u32)]| changes.iter().map(|(_, n)| *n).collect::<Vec<_>>();
    assert_eq!(numbers(&always.changes), numbers(&seldom.changes));
    for ((exact, _), (late, _)) in always.changes.iter().zip(&seldom.changes) {
        // Between two looks a load is not seen to last.
        assert!((late - exact).abs() <= PERIOD, "{exact} {late}");
    }
    assert!(looks < 120, "{looks} looks in 4,000 s");
}
