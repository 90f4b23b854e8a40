//! What makes a revision, and what does not.

use k8s_openapi::api::apps::v1::ControllerRevision;

use super::*;
use crate::{
    build::tests::{revision, settings},
    cache::KeptRevision,
    validate::tests::{drafted, object, spec, valid},
};

fn changed(change: impl FnOnce(&mut Value)) -> Value {
    let mut spec = spec();
    change(&mut spec);
    spec
}

fn of(spec: &Value, settings: &Settings, known: &[Revision]) -> (Revision, u32) {
    Revision::of(&valid(spec.clone()), &object(spec.clone()), settings, known, 0).expect("it can be kept")
}

#[test]
fn a_revision_is_what_decides_workers() {
    let one = revision(&spec());
    for same in [
        changed(|s| s["router"] = json!({ "policy": "Random" })),
        changed(|s| s["replicas"] = json!(3)),
        changed(|s| s["rollout"] = json!({ "strategy": "Recreate", "paused": true })),
        changed(|s| s["suspend"] = json!(true)),
        changed(|s| s["model"]["aliases"] = json!(["other"])),
        changed(|s| s["engine"] = json!({ "draft": { "promptLookup": 8 } })),
    ] {
        assert_eq!(revision(&same).name, one.name, "{same}");
    }
    for other in [
        changed(|s| s["parallelism"]["tensor"] = json!(1)),
        changed(|s| s["engine"] = json!({ "maxBatchTokens": 7 })),
        changed(|s| s["engine"] = json!({ "kvCache": { "prefixCaching": false } })),
        changed(|s| s["workers"] = json!({ "resources": { "limits": { "memory": "8Gi" } } })),
        changed(|s| s["model"]["digest"] = json!(format!("sha256:{}", "a".repeat(64)))),
        drafted(),
    ] {
        assert_ne!(revision(&other).name, one.name, "{other}");
    }
    let mut pinned = drafted();
    pinned["engine"]["draft"]["model"]["digest"] = json!(format!("sha256:{}", "a".repeat(64)));
    assert_ne!(revision(&pinned).name, revision(&drafted()).name, "another draft model has another worker");
    // So does what the operator puts into pods: another image is rolled out like another spec.
    let image = Settings { image: "skein:next".into(), ..settings() };
    assert_ne!(of(&spec(), &image, &[]).0.name, one.name);
    let elsewhere = Settings { fleet_address: "http://10.0.0.9:7070".into(), router_cpu: "2".into(), ..settings() };
    assert_eq!(of(&spec(), &elsewhere, &[]).0.name, one.name, "routers are no part of it");
    // As is whether workers prove their names: those that do and those that do not stand beside each other.
    let plain = of(&spec(), &Settings { proven: false, ..settings() }, &[]).0;
    assert!(plain.name != one.name && plain.record.plain && !one.record.plain);
}

#[test]
fn going_back_is_the_same_revision_with_a_new_number() {
    let (a, b) = (spec(), changed(|s| s["parallelism"]["tensor"] = json!(1)));
    let first = of(&a, &settings(), &[]).0;
    let second = of(&b, &settings(), std::slice::from_ref(&first)).0;
    assert_eq!((first.number, second.number), (1, 2));
    let known = [first.clone(), second.clone()];
    assert_eq!(of(&b, &settings(), &known).0, second, "the latest keeps its number");
    let back = of(&a, &settings(), &known).0;
    assert_eq!((back.name.as_str(), back.number), (first.name.as_str(), 3));
    // The spec that is kept is the first one: what is written down never changes.
    let served = changed(|s| s["replicas"] = json!(9));
    assert_eq!(of(&served, &settings(), &known).0.record, first.record);
}

#[test]
fn a_name_that_another_revision_has_is_passed_over() {
    let mut taken = revision(&spec());
    taken.record.numerics = "other".into();
    let (found, collisions) = of(&spec(), &settings(), std::slice::from_ref(&taken));
    assert_eq!(collisions, 1);
    assert_ne!(found.name, taken.name);
    let again = Revision::of(&valid(spec()), &object(spec()), &settings(), &[taken, found.clone()], collisions).expect("it can be kept");
    assert_eq!(again, (found, 1), "it is found again");
}

#[test]
fn the_latest_without_replicas_are_kept() {
    let known: Vec<Revision> = (1..=6).map(|number| Revision { name: format!("r{number}"), number, ..revision(&spec()) }).collect();
    let kept = BTreeSet::from(["r1", "r6"]);
    let names = |limit| forgotten(&known, &kept, limit).into_iter().map(|r| r.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(2), ["r3", "r2"]);
    assert_eq!(names(0).len(), 4);
    assert!(names(9).is_empty());
}

#[test]
fn room_is_compared_in_all_and_for_the_largest_worker() {
    let (four, two) = (revision(&spec()).record, revision(&changed(|s| s["parallelism"]["tensor"] = json!(1))).record);
    assert!(four.covers(&four));
    // Two large workers need less in all, but more each.
    assert!(!two.covers(&four) && !four.covers(&two), "{:?} {:?}", two.needs(), four.needs());
    let needs = four.needs();
    assert_eq!(needs[0], (1.0, 0.25), "four workers of 250m");
    assert!(needs[1].1 > 96e6 && needs[1].0 > 2.0 * needs[1].1);
}

#[test]
fn a_draft_model_takes_room_and_has_a_worker_beside_each_replica() {
    let (with, without) = (revision(&drafted()), revision(&spec()));
    assert_eq!(with.record.workers(), 4, "it is none of those that a replica cannot answer without");
    assert!(with.record.covers(&without.record) && !without.record.covers(&with.record));
    let told = with.replica("r".into(), false, |_, _| String::new(), || "10.0.0.9:7071".into()).draft.expect("a draft model");
    assert_eq!((told.worker.as_str(), told.compared), ("10.0.0.9:7071", false));
    assert_eq!(without.replica("r".into(), false, |_, _| String::new(), String::new).draft, None);
    let maps: Vec<&str> = with.config_maps().collect();
    assert_eq!((maps.len(), maps.iter().filter(|name| name.ends_with("-draft")).count()), (3, 1), "{maps:?}");
    // As it is written down, so it is read.
    let written: ControllerRevision = serde_json::from_value(with.object(&object(drafted())).body).expect("an object");
    assert_eq!(KeptRevision::of(written).read().expect("it is understood").record, with.record);
}

#[test]
fn what_is_not_understood_is_not_used() {
    let object = revision(&spec()).object(&object(spec()));
    let mut written: ControllerRevision = serde_json::from_value(object.body).expect("an object");
    assert!(KeptRevision::of(written.clone()).read().is_some());
    written.data = None;
    assert!(KeptRevision::of(written.clone()).read().is_none());
}
