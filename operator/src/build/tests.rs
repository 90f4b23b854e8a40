//! What is applied: one golden file, and rules that every object keeps.

use std::{env, fs, path::Path};

use k8s_openapi::api::{
    apps::v1::{ControllerRevision, Deployment, StatefulSet},
    core::v1::{ConfigMap, Secret, Service, ServiceAccount},
    networking::v1::NetworkPolicy,
    policy::v1::PodDisruptionBudget,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use super::{
    pod::{CACHE, MODEL},
    pool::{PoolResources, Routers, account, build_pool},
    *,
};
use crate::{
    dereference::Fetched,
    host::tests::{access, folders, privileged},
    validate::{
        tests::{drafted, fetched, object, spec, valid},
        validate,
    },
};

/// What the operator was started with.
/// Where workers and new routers find a router.
const MEETING: &str = "http://10.0.0.2:7072";
const REACH: Reach<'static> = Reach { own: false, meeting: Some(MEETING) };
/// The routers of the namespace, and a deployment's own.
const SHARED: Routers<'static> = Routers { own_of: None, count: 2 };
const OWN: Routers<'static> = Routers { own_of: Some("llama"), count: 3 };

pub(crate) fn settings() -> Settings {
    Settings {
        image: "docker.io/local/skein:dev".into(),
        image_pull_policy: "Never".into(),
        fleet_address: "http://10.0.0.1:7070".into(),
        hf_endpoint: Some("http://mirror:8000".into()),
        folders: folders(),
        worker_cpu: "250m".into(),
        pool_size: 2,
        router_cpu: "100m".into(),
        router_memory: "256Mi".into(),
        proven: true,
    }
}

/// The revision of a spec, of which nothing is written down.
pub(crate) fn revision(spec: &Value) -> Revision {
    Revision::of(&valid(spec.clone()), &object(spec.clone()), &settings(), &[], 0).expect("it can be kept").0
}

/// The first replicas of a revision.
pub(crate) fn slots(revision: &Revision, replicas: u32) -> Vec<Slot> {
    (0..replicas).map(|number| Slot { id: Id { revision: revision.name.clone(), number }, draining: None }).collect()
}

fn built(spec: Value) -> Resources {
    let (valid, revision) = (valid(spec.clone()), revision(&spec));
    let slots = slots(&revision, valid.replicas());
    build(&valid, &object(spec), &revision, &revision::by_name(&[], &revision), &slots, REACH).expect("it can be built")
}

fn all(resources: &Resources) -> Vec<&Object> {
    let Resources { revision, config_maps, worker_service, network_policy, disruption_budget, service, stateful_sets } = resources;
    [revision]
        .into_iter()
        .chain(config_maps)
        .chain([worker_service, network_policy, disruption_budget, service])
        .chain(stateful_sets)
        .collect()
}

/// The same after a trip through the typed object: a field that Kubernetes does not have would be lost.
fn keeps<K: Serialize + DeserializeOwned>(object: &Object) {
    let typed: K = serde_json::from_value(object.body.clone()).expect("the fields have their types");
    assert_eq!(sorted(&serde_json::to_value(typed).expect("plain data")), sorted(&object.body), "{}", object.name);
}

/// With keys in order, since the order of fields means nothing.
fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let mut entries: Vec<_> = fields.iter().map(|(k, v)| (k.clone(), sorted(v))).collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(entries.into_iter().collect())
        }
        Value::Array(items) => items.iter().map(sorted).collect(),
        other => other.clone(),
    }
}

#[test]
fn objects_are_those_of_the_golden_file() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/build/golden.json");
    let resources = built(spec());
    let pool = build_pool(SHARED, &[object(spec()).owner(false)], &settings(), Some(MEETING));
    let own = build_pool(OWN, &[], &settings(), Some(MEETING));
    let objects = |pool: &PoolResources| {
        let shared = pool.accounts.iter().chain(&pool.tokens).chain(&pool.service);
        shared.chain([&pool.peers, &pool.network_policy, &pool.disruption_budget, &pool.deployment]).cloned().collect::<Vec<_>>()
    };
    let pools = [objects(&pool), objects(&own)].concat();
    let mut bodies: Vec<Value> = all(&resources).into_iter().chain(&pools).map(|o| o.body.clone()).collect();
    // Specifications are the planner's business, and long.
    for data in bodies.iter_mut().filter_map(|b| b.get_mut("data")?.as_object_mut()) {
        data.values_mut().for_each(|v| *v = json!("…"));
    }
    let text = format!("{:#}\n", Value::Array(bodies));
    if env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, &text).expect("the file can be written");
    }
    assert_eq!(fs::read_to_string(&path).unwrap_or_default(), text, "UPDATE_GOLDEN=1 rewrites it");
}

#[test]
fn every_field_is_one_that_kubernetes_has() {
    let resources = built(spec());
    keeps::<ControllerRevision>(&resources.revision);
    resources.config_maps.iter().for_each(keeps::<ConfigMap>);
    resources.stateful_sets.iter().for_each(keeps::<StatefulSet>);
    keeps::<Service>(&resources.service);
    keeps::<Service>(&resources.worker_service);
    keeps::<NetworkPolicy>(&resources.network_policy);
    keeps::<PodDisruptionBudget>(&resources.disruption_budget);
    keeps::<ServiceAccount>(&account(OWN.name(), OWN.labels(), &[object(spec()).owner(false)]));
    for routers in [SHARED, OWN] {
        let pool = build_pool(routers, &[object(spec()).owner(false)], &settings(), Some(MEETING));
        pool.accounts.iter().for_each(keeps::<ServiceAccount>);
        pool.tokens.iter().for_each(keeps::<Secret>);
        pool.service.iter().for_each(keeps::<Service>);
        keeps::<Service>(&pool.peers);
        keeps::<NetworkPolicy>(&pool.network_policy);
        keeps::<PodDisruptionBudget>(&pool.disruption_budget);
        keeps::<Deployment>(&pool.deployment);
    }
}

#[test]
fn a_deployments_own_routers_are_taken_for_no_others() {
    let (shared, own) = (build_pool(SHARED, &[], &settings(), None), build_pool(OWN, &[], &settings(), None));
    let selects = |selector: &Value, pool: &PoolResources| {
        let labels = &pool.deployment.body["spec"]["template"]["metadata"]["labels"];
        selector.as_object().expect("labels").iter().all(|(key, value)| labels[key] == *value)
    };
    for (pool, other) in [(&shared, &own), (&own, &shared)] {
        for selector in [
            &pool.deployment.body["spec"]["selector"]["matchLabels"],
            &pool.disruption_budget.body["spec"]["selector"]["matchLabels"],
            &pool.network_policy.body["spec"]["podSelector"]["matchLabels"],
            &pool.peers.body["spec"]["selector"],
        ] {
            assert!(selects(selector, pool) && !selects(selector, other), "{selector}");
        }
    }
    // Workers, and routers of either kind, let both in: one takes over from the other.
    let (workers, peers) = (built(spec()).network_policy, &own.network_policy);
    for policy in [&workers, peers] {
        let from =
            policy.body["spec"]["ingress"].as_array().expect("rules").iter().flat_map(|r| r["from"].as_array().into_iter().flatten());
        let router =
            from.map(|f| &f["podSelector"]["matchLabels"]).find(|l| l["app.kubernetes.io/component"] == "router").expect("routers");
        assert!(selects(router, &own) && selects(router, &shared), "{router}");
    }
    // The deployment's service leads to the one or to the other.
    let (valid, revision) = (valid(spec()), revision(&spec()));
    let service = |own| {
        let reach = Reach { own, ..REACH };
        build(&valid, &object(spec()), &revision, &revision::by_name(&[], &revision), &[], reach).expect("it can be built").service
    };
    assert!(selects(&service(true).body["spec"]["selector"], &own) && !selects(&service(true).body["spec"]["selector"], &shared));
    assert!(selects(&service(false).body["spec"]["selector"], &shared));
    let args = own.deployment.body["spec"]["template"]["spec"]["containers"][0]["args"].to_string();
    assert!(args.contains("\"--deployment\",\"llama\""), "{args}");
    assert_eq!((&own.deployment.body["spec"]["replicas"], own.service, own.tokens, own.accounts.len()), (&json!(3), None, None, 0));
}

#[test]
#[should_panic(expected = "no-such-field")]
fn a_field_that_kubernetes_does_not_have_is_seen() {
    keeps::<ConfigMap>(&Object {
        name: "no-such-field".into(),
        body: json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": {}, "dat": {} }),
    });
}

#[test]
fn replicas_share_specifications_and_nothing_else() {
    let (one, two) = (built(spec()), {
        let mut spec = spec();
        spec["replicas"] = json!(2);
        built(spec)
    });
    assert_eq!(one.config_maps, two.config_maps);
    assert_eq!((one.stateful_sets.len(), two.stateful_sets.len()), (2, 4));
    assert_eq!(one.stateful_sets[..], two.stateful_sets[..2]);
    let selectors: Vec<_> = two.stateful_sets.iter().map(|s| &s.body["spec"]["selector"]).collect();
    assert!((1..4).all(|i| !selectors[..i].contains(&selectors[i])), "two StatefulSets select the same pods");
    let mut none = spec();
    none["replicas"] = json!(0);
    assert!(built(none).stateful_sets.is_empty());
}

#[test]
fn a_draft_model_has_a_worker_of_its_own_beside_each_replica() {
    let mut spec = drafted();
    spec["replicas"] = json!(2);
    spec["model"]["credentialsSecretRef"] = json!({ "name": "hub" });
    let resources = built(spec);
    assert_eq!(resources.stateful_sets.len(), 6);
    let names: Vec<&str> = resources.stateful_sets.iter().map(|set| set.name.as_str()).collect();
    for (at, replica) in [(2, names[0]), (5, names[3])] {
        let set = &resources.stateful_sets[at];
        keeps::<StatefulSet>(set);
        let replica = replica.strip_suffix("-s0").expect("the first stage");
        assert_eq!(set.name, format!("{replica}-draft-s0"));
        let template = &set.body["spec"]["template"];
        assert_eq!((&template["metadata"]["labels"][STAGE], &set.body["spec"]["replicas"]), (&json!(DRAFT), &json!(1)));
        assert_eq!(template["metadata"]["labels"][names::REPLICA_NAME], format!("{replica}-draft"), "what it calls itself");
        let pod = &template["spec"];
        let text = pod.to_string();
        assert!(text.contains(&format!("{replica}-draft-s0-identity")) && text.contains(MEETING), "{text}");
        assert!(!text.contains("hub"), "what the model's source is shown is not for others: {text}");
        let spec = &pod["volumes"][0]["projected"]["sources"];
        assert_eq!(spec, &json!([{ "configMap": { "name": resources.config_maps[2].name } }]));
    }
    let map = &resources.config_maps[2];
    keeps::<ConfigMap>(map);
    let said: Value = serde_json::from_str(map.body["data"]["rank-0.json"].as_str().expect("a text")).expect("JSON");
    assert_eq!(said["uri"], "hf://org/small");
    let selectors: Vec<_> = resources.stateful_sets.iter().map(|s| &s.body["spec"]["selector"]).collect();
    assert!((1..6).all(|i| !selectors[..i].contains(&selectors[i])), "two StatefulSets select the same pods");
    // Nobody keeps it where it is for the sake of the replica, which answers without it.
    let budget = &resources.disruption_budget.body["spec"]["selector"]["matchExpressions"];
    assert_eq!(budget, &json!([{ "key": STAGE, "operator": "NotIn", "values": [DRAFT] }]));
}

#[test]
fn pods_pass_restricted_and_hold_no_credentials() {
    let resources = built(drafted());
    let pool = build_pool(SHARED, &[], &settings(), None);
    let sets = resources.stateful_sets.iter().map(|s| &s.body["spec"]["template"]["spec"]);
    for pod in sets.chain([&pool.deployment.body["spec"]["template"]["spec"]]) {
        assert_eq!(pod["automountServiceAccountToken"], false);
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        for container in pod["containers"].as_array().expect("containers") {
            let context = &container["securityContext"];
            assert_eq!(context["allowPrivilegeEscalation"], false);
            assert_eq!(context["capabilities"]["drop"], json!(["ALL"]));
        }
        for volume in pod["volumes"].as_array().expect("volumes") {
            assert!(volume.get("hostPath").is_none(), "{volume}");
        }
    }
}

#[test]
fn caches_and_credentials_are_mounted_as_the_spec_says() {
    let pod = |change: &dyn Fn(&mut Value)| {
        let mut spec = spec();
        change(&mut spec);
        let set = built(spec).stateful_sets.remove(0);
        keeps::<StatefulSet>(&set);
        set.body["spec"]["template"]["spec"].clone()
    };
    let volume = |pod: &Value, name: &str| {
        pod["volumes"].as_array().into_iter().flatten().find(|v| v["name"] == name).cloned().unwrap_or(Value::Null)
    };
    assert_eq!(volume(&pod(&|_| ()), "cache"), json!({ "name": "cache", "emptyDir": {} }));
    let limited = pod(&|spec| spec["cache"] = json!({ "sizeLimit": "1Gi" }));
    assert_eq!(volume(&limited, "cache")["emptyDir"]["sizeLimit"], (1_u64 << 30).to_string());
    let claimed = pod(&|spec| spec["cache"] = json!({ "policy": "PVC", "pvcName": "weights" }));
    assert_eq!(volume(&claimed, "cache"), json!({ "name": "cache", "persistentVolumeClaim": { "claimName": "weights" } }));
    let on_claim = pod(&|spec| spec["model"]["uri"] = json!("pvc://models/a/b.gguf"));
    let claim = json!({ "name": "model", "persistentVolumeClaim": { "claimName": "models", "readOnly": true } });
    assert_eq!(volume(&on_claim, "model"), claim);
    let mounts = on_claim["containers"][0]["volumeMounts"].as_array().expect("mounts");
    assert!(mounts.contains(&json!({ "name": "model", "mountPath": MODEL, "readOnly": true })), "{mounts:?}");
    let other = |uri: &str| {
        let mut spec = spec();
        spec["model"]["uri"] = json!(uri);
        (valid(spec.clone()).worker_specs()[0].uri.clone(), revision(&spec).name)
    };
    let (first, second) = (other("pvc://models/a/b.gguf"), other("pvc://others/a/b.gguf"));
    assert_eq!(first.0, format!("file:{MODEL}/a/b.gguf"));
    assert_eq!(first.0, second.0);
    assert_ne!(first.1, second.1, "another claim is another model");
    let shown = pod(&|spec| spec["model"]["credentialsSecretRef"] = json!({ "name": "hub" }));
    assert_eq!(volume(&shown, "credentials")["secret"], json!({ "secretName": "hub", "defaultMode": 0o440 }));
    let args: Vec<_> = shown["containers"][0]["args"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    assert!(args.windows(2).any(|pair| pair == ["--credentials", CREDENTIALS]), "{args:?}");
    assert_eq!(volume(&pod(&|_| ()), "credentials"), Value::Null);
}

/// What pods get of nodes: a folder that the operator was told of, and no right beyond it.
#[test]
fn folders_of_nodes_are_mounted_as_the_operator_names_them() {
    let allowed = Fetched { access: access(folders(), privileged()), ..fetched() };
    let mut of_node = spec();
    of_node["model"]["uri"] = json!("file:///srv/models/tiny//a.gguf");
    of_node["cache"] = json!({ "policy": "NodeLocal" });
    let valid_one = validate(&object(of_node.clone()), &allowed).expect("a valid deployment");
    let record = Revision::of(&valid_one, &object(of_node), &settings(), &[], 0).expect("it can be kept").0.record;
    let (pod, bare) = (&record.stages[0].pod, &revision(&spec()).record.stages[0].pod);
    let typed: k8s_openapi::api::core::v1::PodSpec = serde_json::from_value(pod.clone()).expect("the fields have their types");
    let volumes = typed.volumes.unwrap_or_default();
    let host = |name: &str| {
        let path = volumes.iter().find(|v| v.name == name).and_then(|v| v.host_path.clone()).expect("a folder of the node");
        (path.path, path.type_)
    };
    assert_eq!(host("model"), ("/srv/models".to_owned(), Some("Directory".to_owned())), "not the path that the spec names");
    assert_eq!(host("cache"), ("/srv/cache".to_owned(), Some("Directory".to_owned())));
    let container = &typed.containers[0];
    let mount = |name: &str| container.volume_mounts.iter().flatten().find(|m| m.name == name).expect("it is mounted");
    assert_eq!((mount("model").mount_path.as_str(), mount("model").read_only), (MODEL, Some(true)));
    assert_eq!((mount("cache").mount_path.as_str(), mount("cache").read_only), (CACHE, None));
    assert_eq!(valid_one.worker_specs()[0].uri, format!("file:{MODEL}/tiny/a.gguf"));
    // Namespaces share no cache.
    let args = container.args.clone().unwrap_or_default();
    assert!(args.windows(2).any(|pair| pair == ["--cache", &format!("{CACHE}/models")]), "{args:?}");
    // All else is as it is without folders of nodes.
    for field in ["securityContext", "serviceAccountName", "automountServiceAccountToken"] {
        assert_eq!(pod[field], bare[field], "{field}");
    }
    assert_eq!(pod["containers"][0]["securityContext"], restricted());
}

#[test]
fn many_ranks_are_spread_over_several_config_maps() {
    let valid = valid(spec());
    let specs = valid.worker_specs();
    let bytes = serde_json::to_string(&specs[0]).expect("plain data").len();
    let ranks: Vec<WorkerSpec> = (0..2 * PART / bytes)
        .map(|rank| {
            let mut spec = specs[0].clone();
            spec.shard.rank = rank;
            spec
        })
        .collect();
    let maps = pack(ranks.iter()).expect("each fits");
    assert!(maps.len() >= 2, "{}", maps.len());
    assert_eq!(maps.iter().map(Map::len).sum::<usize>(), ranks.len());
    assert!(maps.iter().all(|m| serde_json::to_string(m).expect("plain data").len() < 1 << 20));
}

#[test]
fn a_replica_of_a_revision_that_the_spec_has_left_is_built_from_what_was_written_down() {
    let (old, new) = (spec(), {
        let mut spec = spec();
        spec["parallelism"]["tensor"] = json!(1);
        spec
    });
    let (first, second) = (revision(&old), revision(&new));
    let before = built(old);
    let mut slots = slots(&first, 1);
    slots[0].draining = Some(1_700_000_000);
    let written: ControllerRevision = serde_json::from_value(before.revision.body.clone()).expect("an object");
    let read = crate::cache::KeptRevision::of(written).read().expect("it is understood");
    assert_eq!((&read.name, &read.record), (&first.name, &first.record));
    let known = [read];
    let after =
        build(&valid(new.clone()), &object(new), &second, &revision::by_name(&known, &second), &slots, REACH).expect("it can be built");
    let mut sets = after.stateful_sets;
    assert_eq!(sets[0].body["metadata"]["annotations"][DRAINING], "1700000000");
    sets.iter_mut().for_each(|set| drop(set.body["metadata"].as_object_mut().expect("metadata").shift_remove("annotations")));
    assert_eq!(sets, before.stateful_sets, "not a byte of it changes");
    assert_ne!(after.config_maps, before.config_maps);
}

#[test]
fn workers_run_where_the_spec_says() {
    let mut placed = spec();
    placed["workers"] = json!({
        "nodeSelector": { "example.com/pool": "big" },
        "tolerations": [{ "key": "gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 30 }, { "key": "a", "value": "b" }],
    });
    assert_ne!(revision(&placed).name, revision(&spec()).name, "workers elsewhere are other workers");
    let resources = built(placed);
    for set in &resources.stateful_sets {
        let pod = &set.body["spec"]["template"]["spec"];
        assert_eq!(pod["nodeSelector"], json!({ "example.com/pool": "big" }));
        assert_eq!(pod["tolerations"][0], json!({ "key": "gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 30 }));
        assert_eq!(pod["tolerations"][1], json!({ "key": "a", "operator": "Equal", "value": "b" }));
        keeps::<StatefulSet>(set);
    }
    assert!(built(spec()).stateful_sets.iter().all(|set| set.body["spec"]["template"]["spec"].get("nodeSelector").is_none()));
}

#[test]
fn how_workers_find_and_know_others_is_no_part_of_a_revision() {
    let resources = built(spec());
    assert!(!resources.revision.body.to_string().contains("identity"));
    assert!(resources.stateful_sets[0].body.to_string().contains("--identity"));
    let mut plain = revision(&spec());
    plain.record.plain = true;
    let set = build(&valid(spec()), &object(spec()), &plain, &revision::by_name(&[], &plain), &slots(&plain, 1), Reach::default());
    assert!(!set.expect("it can be built").stateful_sets[0].body.to_string().contains("identity"));
    let sets: Vec<StatefulSet> = resources.stateful_sets.iter().map(|s| serde_json::from_value(s.body.clone()).expect("a set")).collect();
    assert_eq!(crate::observe::meeting(&sets).as_deref(), Some(MEETING));
    assert!(!resources.revision.body.to_string().contains(MEETING));
    assert_eq!(crate::observe::meeting(&[]), None);
}
