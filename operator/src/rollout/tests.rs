//! Rollouts in every order of events, and what each of them must keep.

use std::collections::BTreeMap;

use proptest::{prelude::*, strategy::Strategy as Generator};

use super::{Strategy, *};

fn goal(revision: &str, replicas: u32, strategy: Strategy) -> Goal {
    Goal { revision: revision.into(), current: None, replicas, strategy, paused: false, gang: true, deadline: 600, drain: 120 }
}

const ROLLING: Strategy = Strategy::Rolling { surge: 1, unavailable: 0 };

/// A cluster that does what a plan says.
#[derive(Clone, Debug, Default)]
struct World {
    replicas: BTreeMap<Id, Seen>,
    memory: Memory,
    now: i64,
}

impl World {
    fn new() -> Self {
        Self { now: 1000, ..Self::default() }
    }

    fn plan(&mut self, goal: &Goal) -> Plan {
        let seen: Vec<Seen> = self.replicas.values().cloned().collect();
        plan(goal, &seen, true, &mut self.memory, self.now)
    }

    /// Plans, checks what every plan must keep, and does it.
    fn step(&mut self, goal: &Goal) -> Plan {
        // What was deleted a step ago is gone by now.
        self.replicas.retain(|_, r| !r.leaving);
        let before = self.clone();
        let plan = self.plan(goal);
        before.check(goal, &plan, self.memory.shortage().is_some());
        for slot in &plan.exist {
            let replica = self.replicas.entry(slot.id.clone()).or_insert_with(|| fresh(&slot.id));
            if slot.draining != replica.draining {
                replica.draining = slot.draining;
                replica.sequences = None;
            }
        }
        for id in &plan.remove {
            self.set(&id.revision, id.number, |r| (r.leaving, r.ready) = (true, false));
        }
        plan
    }

    fn ready(&self) -> usize {
        self.replicas.values().filter(|r| r.ready && r.draining.is_none()).count()
    }

    fn check(&self, goal: &Goal, plan: &Plan, held: bool) {
        let made = plan.exist.iter().filter(|slot| !self.replicas.contains_key(&slot.id)).count();
        let surge = match goal.strategy {
            Strategy::Auto => goal.replicas.div_ceil(4).max(1),
            Strategy::Rolling { surge, .. } => surge,
            Strategy::Recreate => 0,
        };
        let most = (goal.replicas + surge) as usize;
        assert!(made == 0 || self.replicas.len() + made <= most, "{made} more than {} make more than {most}", self.replicas.len());
        let mentioned: BTreeSet<&Id> = plan.exist.iter().map(|s| &s.id).chain(&plan.remove).collect();
        assert_eq!(mentioned.len(), plan.exist.len() + plan.remove.len(), "a replica stands in a plan twice: {plan:?}");
        assert!(self.replicas.keys().all(|id| mentioned.contains(id)), "a replica was forgotten: {plan:?}");
        let others = self.replicas.keys().any(|id| id.revision != goal.revision);
        if goal.replicas == 0 || (goal.strategy == Strategy::Recreate && others) {
            return;
        }
        let taken_back = |id: &Id| plan.taken_back.iter().any(|(taken, _)| taken == id);
        let left = self.replicas.values().filter(|r| {
            let stays = plan.exist.iter().any(|s| s.id == r.id && s.draining.is_none());
            r.ready && r.draining.is_none() && (stays || taken_back(&r.id))
        });
        let waits = |r: &Seen| matches!(r.placement, Placement::Waiting { short: true, .. });
        let crowded = held || self.replicas.values().any(waits);
        let unavailable = match goal.strategy {
            Strategy::Auto => u32::from(crowded),
            Strategy::Rolling { unavailable, .. } => unavailable,
            Strategy::Recreate => 1,
        };
        let least = goal.replicas.saturating_sub(unavailable) as usize;
        let (left, ready) = (left.count(), self.ready());
        assert!(left >= least.min(ready), "of {ready} ready replicas {left} are left, expected {least}: {plan:?}");
    }

    /// Everything finds nodes, loads, and drains.
    fn settle(&mut self) {
        for replica in self.replicas.values_mut() {
            replica.placement = Placement::Settled;
            replica.ready = replica.draining.is_none() && !replica.leaving;
            replica.sequences = Some(0);
        }
    }

    fn set(&mut self, revision: &str, number: u32, change: impl FnOnce(&mut Seen)) {
        change(self.replicas.get_mut(&id(revision, number)).expect("the replica stands"));
    }

    /// A deployment that is rolled out.
    fn settled(goal: &Goal) -> Self {
        let mut world = Self::new();
        for _ in 0..2 * goal.replicas + 2 {
            world.step(goal);
            world.settle();
        }
        assert_eq!(world.step(goal).progress, Progress::Complete);
        world
    }

    fn names(&self) -> Vec<String> {
        self.replicas
            .values()
            .filter(|r| !r.leaving)
            .map(|r| format!("{}{}{}", r.id.revision, r.id.number, if r.draining.is_some() { "-" } else { "" }))
            .collect()
    }
}

fn id(revision: &str, number: u32) -> Id {
    Id { revision: revision.into(), number }
}

fn fresh(id: &Id) -> Seen {
    let placement = Placement::Settled;
    Seen { id: id.clone(), ready: false, draining: None, leaving: false, sequences: Some(0), placement, covers: true }
}

fn no_room() -> Placement {
    Placement::Waiting { message: "0/1 nodes are available: 1 Insufficient memory.".into(), short: true }
}

#[test]
fn surge_first_then_drain_then_delete() {
    let mut world = World::settled(&goal("a", 2, ROLLING));
    let next = goal("b", 2, ROLLING);
    assert_eq!(world.step(&next).progress, Progress::New);
    assert_eq!(world.names(), ["a0", "a1", "b0"]);
    assert_eq!(world.step(&next).progress, Progress::Rolling { ready: 0, others: 2 });
    assert_eq!(world.names(), ["a0", "a1", "b0"], "nothing is let go for what is not ready");
    world.set("b", 0, |r| r.ready = true);
    let plan = world.step(&next);
    assert_eq!((plan.drained, plan.again), (vec![id("a", 1)], Some(1120)));
    assert_eq!(world.names(), ["a0", "a1-", "b0"]);
    world.step(&next);
    assert_eq!(world.names(), ["a0", "a1-", "b0"], "it drains until routers say that it is empty");
    world.set("a", 1, |r| r.sequences = Some(0));
    assert_eq!(world.step(&next).remove, [id("a", 1)]);
    world.step(&next);
    assert_eq!(world.names(), ["a0", "b0", "b1"]);
    world.settle();
    world.step(&next);
    world.settle();
    world.step(&next);
    assert_eq!((world.names(), world.step(&next).progress), (vec!["b0".into(), "b1".into()], Progress::Complete));
}

#[test]
fn draining_ends_in_time() {
    let mut world = World::settled(&goal("a", 2, ROLLING));
    let less = goal("a", 1, ROLLING);
    assert_eq!(world.step(&less).drained, [id("a", 1)], "the highest number goes");
    world.set("a", 1, |r| r.sequences = Some(3));
    world.now += 119;
    assert!(world.step(&less).remove.is_empty());
    world.now += 1;
    assert_eq!(world.step(&less).remove, [id("a", 1)]);
}

#[test]
fn going_back_takes_up_what_still_stands() {
    let mut world = World::settled(&goal("a", 2, ROLLING));
    let next = goal("b", 2, ROLLING);
    world.step(&next);
    world.set("b", 0, |r| r.ready = true);
    world.step(&next);
    assert_eq!(world.names(), ["a0", "a1-", "b0"]);
    let back = goal("a", 2, ROLLING);
    world.step(&back);
    assert_eq!(world.names(), ["a0", "a1", "b0"]);
    world.step(&back);
    assert_eq!(world.names(), ["a0", "a1", "b0-"], "the one that drained serves again");
    // One that never was ready needs no draining.
    let mut broken = World::settled(&goal("a", 1, ROLLING));
    broken.step(&goal("b", 1, ROLLING));
    assert_eq!(broken.step(&goal("a", 1, ROLLING)).remove, [id("b", 0)]);
    assert_eq!(broken.step(&goal("a", 1, ROLLING)).progress, Progress::Complete);
}

#[test]
fn recreate_ends_the_old_before_the_first_of_the_new() {
    let mut world = World::settled(&goal("a", 2, Strategy::Recreate));
    let next = goal("b", 2, Strategy::Recreate);
    world.step(&next);
    assert_eq!(world.names(), ["a0-", "a1-"]);
    world.set("a", 0, |r| r.sequences = Some(0));
    world.step(&next);
    world.step(&next);
    assert_eq!(world.names(), ["a1-"], "one is still there");
    world.set("a", 1, |r| r.sequences = Some(0));
    world.step(&next);
    world.step(&next);
    assert_eq!(world.names(), ["b0", "b1"]);
}

#[test]
fn auto_goes_one_down_where_there_is_no_room_beside_the_old() {
    let mut world = World::settled(&goal("a", 2, Strategy::Auto));
    let next = goal("b", 2, Strategy::Auto);
    world.step(&next);
    world.set("b", 0, |r| r.placement = no_room());
    let plan = world.step(&next);
    assert!(plan.drained.is_empty());
    assert_eq!(plan.again, Some(1010));
    world.now += 10;
    // What would give no room is not given up; a rolling update never goes below its bounds.
    let mut vain = world.clone();
    vain.replicas.values_mut().for_each(|r| r.covers = false);
    assert!(vain.step(&next).drained.is_empty());
    assert!(world.clone().step(&goal("b", 2, ROLLING)).drained.is_empty());
    assert_eq!(world.step(&next).drained, [id("a", 1)]);
    assert!(world.step(&next).drained.is_empty(), "one down, and not two");
    // While it drains, the one that waits is not taken back.
    world.now += GANG;
    assert!(world.step(&next).taken_back.is_empty());
    world.set("a", 1, |r| r.sequences = Some(0));
    world.step(&next);
    world.step(&next);
    assert_eq!(world.names(), ["a0", "b0", "b1"]);
    world.settle();
    world.step(&next);
    assert_eq!(world.names(), ["a0-", "b0", "b1"]);
}

#[test]
fn a_gang_without_room_is_taken_back_and_tried_again() {
    let mut world = World::new();
    let two = goal("a", 2, ROLLING);
    world.step(&two);
    for number in 0..2 {
        world.set("a", number, |r| r.placement = no_room());
    }
    world.step(&two);
    world.now += GANG;
    let plan = world.step(&two);
    assert_eq!(plan.remove, [id("a", 1)], "the lowest keeps what it has");
    assert!(plan.taken_back[0].1.contains("Insufficient memory"));
    let plan = world.step(&two);
    assert!(plan.remove.is_empty() && !world.replicas.contains_key(&id("a", 1)), "it is not made again at once");
    let again = plan.again.expect("it is looked at again");
    // The lowest finds its room in what was given back.
    world.set("a", 0, |r| r.placement = Placement::Settled);
    world.step(&two);
    world.now = world.now.max(again) + 60;
    world.step(&two);
    assert_eq!(world.names(), ["a0", "a1"]);
    // Alone it is taken back too, and the next pause is longer.
    world.set("a", 1, |r| r.placement = no_room());
    world.step(&two);
    world.now += GANG;
    assert_eq!(world.step(&two).remove, [id("a", 1)]);
    let mut free = two.clone();
    free.gang = false;
    let mut lone = World::new();
    lone.step(&free);
    lone.set("a", 0, |r| r.placement = no_room());
    lone.step(&free);
    lone.now += 1000;
    assert!(lone.step(&free).remove.is_empty(), "without gang it waits");
}

#[test]
fn paused_replaces_nothing_and_scales_what_was_there() {
    let mut world = World::settled(&goal("a", 2, ROLLING));
    let mut paused = Goal { paused: true, current: Some("a".into()), ..goal("b", 3, ROLLING) };
    assert_eq!(world.step(&paused).progress, Progress::Paused);
    assert_eq!(world.names(), ["a0", "a1", "a2"]);
    world.settle();
    paused.replicas = 1;
    world.step(&paused);
    assert_eq!(world.names(), ["a0", "a1-", "a2-"]);
    // In the middle both stay.
    let mut mixed = World::settled(&goal("a", 2, ROLLING));
    mixed.step(&goal("b", 2, ROLLING));
    paused.replicas = 2;
    mixed.step(&paused);
    assert_eq!(mixed.names(), ["a0", "a1", "b0"]);
}

#[test]
fn a_rollout_without_progress_is_stalled_and_goes_on_when_it_can() {
    let mut world = World::settled(&goal("a", 1, ROLLING));
    let next = goal("b", 1, ROLLING);
    world.step(&next);
    assert_eq!(world.step(&next).again, Some(1600));
    world.now += 599;
    // A replica that comes and goes is no progress.
    assert_eq!(world.step(&next).progress, Progress::Rolling { ready: 0, others: 1 });
    world.now += 1;
    assert_eq!(world.step(&next).progress, Progress::Stalled { ready: 0, others: 1 });
    assert_eq!(world.names(), ["a0", "b0"], "the old one serves on");
    world.set("b", 0, |r| r.ready = true);
    assert_eq!(world.step(&next).progress, Progress::Rolling { ready: 1, others: 1 });
    let mut later = World { memory: Memory::recall(None, 900), ..world.clone() };
    later.now = 1500;
    later.set("b", 0, |r| r.ready = false);
    later.set("a", 0, |r| r.draining = None);
    assert_eq!(later.step(&next).progress, Progress::Stalled { ready: 0, others: 1 }, "another process counts from what it knows");
}

#[test]
fn nothing_is_let_go_while_routers_are_away() {
    let world = World::settled(&goal("a", 2, ROLLING));
    let seen: Vec<Seen> = world.replicas.values().cloned().collect();
    let planned = |goal: &Goal, known| plan(goal, &seen, known, &mut world.memory.clone(), world.now);
    assert!(planned(&goal("a", 1, ROLLING), false).drained.is_empty());
    assert_eq!(planned(&goal("a", 1, ROLLING), true).drained.len(), 1);
    assert_eq!(planned(&goal("a", 0, ROLLING), false).drained.len(), 2, "none wanted is none wanted");
}

/// What may happen to a deployment.
#[derive(Clone, Debug)]
enum Happening {
    Spec(u8),
    Scale(u32),
    Pause(bool),
    Strategy(Strategy),
    Ready(usize, bool),
    Emptied(usize),
    Crowded(usize, bool),
    Passed(i64),
}

fn happening() -> impl Generator<Value = Happening> {
    let strategy = prop_oneof![
        Just(Strategy::Auto),
        Just(Strategy::Recreate),
        (0u32..3, 0u32..3)
            .prop_filter("something moves", |(s, u)| s + u > 0)
            .prop_map(|(surge, unavailable)| Strategy::Rolling { surge, unavailable }),
    ];
    prop_oneof![
        1 => (0u8..3).prop_map(Happening::Spec),
        1 => (0u32..6).prop_map(Happening::Scale),
        1 => any::<bool>().prop_map(Happening::Pause),
        1 => strategy.prop_map(Happening::Strategy),
        8 => (0usize..12, prop::bool::weighted(0.8)).prop_map(|(n, ready)| Happening::Ready(n, ready)),
        4 => (0usize..12).prop_map(Happening::Emptied),
        3 => (0usize..12, any::<bool>()).prop_map(|(n, full)| Happening::Crowded(n, full)),
        3 => (0i64..200).prop_map(Happening::Passed),
    ]
}

fn happen(world: &mut World, goal: &mut Goal, what: Happening) {
    let mut nth = |n: usize, change: &dyn Fn(&mut Seen)| {
        let count = world.replicas.len().max(1);
        if let Some(replica) = world.replicas.values_mut().nth(n % count) {
            change(replica);
        }
    };
    match what {
        Happening::Spec(n) => goal.revision = ["a", "b", "c"][n as usize].into(),
        Happening::Scale(n) => goal.replicas = n,
        Happening::Pause(paused) => (goal.paused, goal.current) = (paused, Some("a".into())),
        Happening::Strategy(strategy) => goal.strategy = strategy,
        Happening::Ready(n, ready) => nth(n, &|r| r.ready = ready && r.placement == Placement::Settled && !r.leaving),
        Happening::Emptied(n) => nth(n, &|r| r.sequences = Some(0)),
        Happening::Crowded(n, full) => nth(n, &|r| {
            if !r.ready && !r.leaving {
                r.placement = if full { no_room() } else { Placement::Settled };
            }
        }),
        Happening::Passed(seconds) => world.now += seconds,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    /// [`World::check`] holds in every step; when all is well at last, what is wanted stands.
    #[test]
    fn any_order_of_events_keeps_the_bounds_and_ends_well(events in prop::collection::vec(happening(), 0..60)) {
        let (mut world, mut goal) = (World::new(), goal("a", 2, Strategy::Auto));
        for event in events {
            happen(&mut world, &mut goal, event);
            world.step(&goal);
        }
        goal.paused = false;
        for _ in 0..60 {
            world.step(&goal);
            world.settle();
            world.now += 30;
        }
        let plan = world.step(&goal);
        prop_assert_eq!(plan.progress, Progress::Complete);
        let wanted: Vec<Id> = (0..goal.replicas).map(|n| id(&goal.revision, n)).collect();
        prop_assert_eq!(world.replicas.keys().cloned().collect::<Vec<_>>(), wanted);
        prop_assert_eq!(world.clone().plan(&goal).drained, vec![]);
    }

    /// A revision that never gets ready takes no more of the old one than it may.
    #[test]
    fn a_revision_that_is_never_ready_leaves_the_old_one_serving(
        replicas in 1u32..6, surge in 0u32..3, unavailable in 0u32..3, times in prop::collection::vec(0i64..90, 1..40), full in any::<bool>(),
    ) {
        prop_assume!(surge + unavailable > 0);
        let rolling = Strategy::Rolling { surge, unavailable };
        let mut world = World::settled(&goal("a", replicas, rolling));
        let next = goal("b", replicas, rolling);
        for passed in times {
            world.step(&next);
            world.now += passed;
            for replica in world.replicas.values_mut() {
                replica.sequences = Some(0);
                if replica.id.revision == "b" && full {
                    replica.placement = no_room();
                }
            }
            let ready = world.ready() as u32;
            prop_assert!(ready >= replicas.saturating_sub(unavailable), "{ready} of {replicas}");
            prop_assert!(world.replicas.keys().any(|id| id.revision == "a") || unavailable >= replicas);
        }
    }
}
