//! Rollouts on an API server that is a map of objects: step by step, and cut off wherever a process can end.

use plan::fleet::FleetDeployment;
use proto::fleet::{DeploymentLoad, ReplicaState, RouterReport};
use serde_json::{Value, json};
use tokio::time::timeout;

use super::*;
use crate::{
    build::tests::settings,
    certificates::Lifetimes,
    mock::{self, Objects, REFUSED},
    names, requests,
    stop::{PLACES, Place},
    validate::tests::{adapter, draft_header, drafted, header, spec},
};

const DEPLOYMENT_PATH: &str = "/apis/skein.dev/v1alpha1/namespaces/models/modeldeployments/llama";

/// A cluster with one deployment, and the process that looks after it.
struct World {
    objects: Objects,
    passed: Arc<Mutex<Vec<Place>>>,
    context: Arc<Context>,
    term: u64,
}

impl World {
    async fn new() -> Self {
        let objects = Objects::default();
        let passed = Arc::<Mutex<Vec<Place>>>::default();
        let context = context(&objects, 1, Stops::watched(passed.clone(), None)).await;
        let world = Self { objects, passed, context, term: 1 };
        let metadata = json!({ "name": "llama", "namespace": "models", "uid": "0b0c", "generation": 1 });
        let object = json!({ "apiVersion": "skein.dev/v1alpha1", "kind": "ModelDeployment", "metadata": metadata, "spec": spec() });
        world.objects.lock().expect("nobody panics with it").insert(DEPLOYMENT_PATH.to_owned(), object);
        world
    }

    /// Another process takes over, and never leaves `halt`.
    async fn restart(&mut self, halt: Option<Place>) {
        self.term += 1;
        self.context = context(&self.objects, self.term, Stops::watched(self.passed.clone(), halt)).await;
    }

    fn change(&self, change: impl FnOnce(&mut Value)) {
        let mut objects = self.objects.lock().expect("nobody panics with it");
        let object = objects.get_mut(DEPLOYMENT_PATH).expect("the deployment");
        change(&mut object["spec"]);
        object["metadata"]["generation"] = json!(object["metadata"]["generation"].as_i64().unwrap_or_default() + 1);
    }

    fn object(&self) -> Arc<ModelDeployment> {
        let object = self.objects.lock().expect("nobody panics with it")[DEPLOYMENT_PATH].clone();
        Arc::new(serde_json::from_value(object).expect("a deployment"))
    }

    /// One reconcile; whether it came to an end.
    async fn reconcile(&self) -> bool {
        self.watched();
        timeout(Duration::from_secs(1), reconcile(self.object(), self.context.clone())).await.is_ok()
    }

    /// Watches tell of everything that stands.
    fn watched(&self) {
        let named = |object: &Value| {
            let mut object = object.clone();
            object["metadata"]["namespace"] = json!("models");
            object
        };
        let objects: Vec<Value> =
            self.objects.lock().expect("nobody panics with it").values().filter(|o| o.is_object()).map(named).collect();
        self.context.cache.relist(&objects);
    }

    fn told(&self) -> FleetDeployment {
        self.context.hub.space("models").told("llama").expect("routers are told")
    }

    /// A router says that every replica it is told of is ready, but for those of `broken`, and that nothing is left on any.
    fn report(&self, broken: Option<&str>) {
        let space = self.context.hub.space("models");
        let Some((term, number)) = space.number() else { return };
        let state = |r: plan::fleet::FleetReplica| ReplicaState {
            ready: Some(r.revision.as_str()) != broken,
            name: r.name,
            ..ReplicaState::default()
        };
        let replicas = self.told().replicas.into_iter().map(state).collect();
        let load = DeploymentLoad { deployment: "llama".into(), replicas, ..DeploymentLoad::default() };
        space.report(1, RouterReport { router: "one".into(), term, number, loads: vec![load] });
    }

    /// Reconciles and reports until nothing is left to do.
    async fn settle(&self) {
        for _ in 0..12 {
            assert!(self.reconcile().await);
            self.report(None);
            self.serves();
        }
    }

    /// Reconciles while its own routers report.
    async fn settle_own(&self, say: &impl Fn(&crate::fleet::Space, &str), own: &crate::fleet::Space) {
        for _ in 0..3 {
            say(own, "own");
            assert!(self.reconcile().await);
        }
    }

    /// The change of routers was long ago.
    fn date_back(&self) {
        let mut objects = self.objects.lock().expect("nobody panics with it");
        objects.get_mut(DEPLOYMENT_PATH).expect("the deployment")["status"]["routers"]["since"] = json!("2026-01-01T00:00:00Z");
    }

    /// Routers of the namespace report what its own are told.
    fn report_from(&self, own: &crate::fleet::Space, routers: &[&str]) {
        let space = self.context.hub.space("models");
        let Some((term, number)) = space.number() else { return };
        let told = own.told("llama").expect("they are told");
        let replicas = told.replicas.into_iter().map(|r| ReplicaState { ready: true, name: r.name, ..ReplicaState::default() });
        let load = DeploymentLoad { deployment: "llama".into(), replicas: replicas.collect(), ..DeploymentLoad::default() };
        for (stream, router) in (3..).zip(routers) {
            space.report(stream, RouterReport { router: (*router).into(), term, number, loads: vec![load.clone()] });
        }
    }

    /// A replica takes requests.
    fn serves(&self) {
        let told = self.told();
        assert!(told.replicas.iter().any(|r| !r.draining), "nothing takes requests: {told:?}");
    }

    fn revisions(&self) -> Vec<String> {
        self.told().replicas.into_iter().map(|r| r.revision).collect()
    }

    fn reason(&self, kind: &str) -> String {
        self.object().condition(kind).map(|c| c.reason.clone()).unwrap_or_default()
    }

    fn count(&self, kind: &str) -> usize {
        self.objects.lock().expect("nobody panics with it").keys().filter(|path| path.contains(kind)).count()
    }
}

const LIFETIMES: Lifetimes = Lifetimes {
    certificate: Duration::from_secs(3600),
    renew: Duration::from_secs(600),
    authority: Duration::from_secs(86400),
    settle: Duration::from_secs(60),
};

async fn context(objects: &Objects, term: u64, stops: Stops) -> Arc<Context> {
    let metrics = Arc::<Metrics>::default();
    let client = requests::counted(mock::client(objects), metrics.clone());
    let issuer = Issuer::begin(client.clone(), "system", LIFETIMES, Arc::default()).await.expect("authorities");
    let (deployments, mut writer) = reflector::store();
    let object: ModelDeployment =
        serde_json::from_value(json!({ "metadata": { "name": "llama", "namespace": "models", "uid": "0b0c" } })).expect("an object");
    writer.apply_watcher_event(&watcher::Event::Apply(object));
    let models = Models::new(None);
    models.know("hf://org/llama", header());
    models.know("hf://org/small", draft_header());
    models.know_adapter("hf://org/a", "hf://org/llama", adapter());
    let (wake, _woken) = mpsc::channel(8);
    let hub = Arc::new(Hub::new(term, wake));
    hub.space("models").meet(Vec::new(), ["one".to_owned()].into(), &["llama".to_owned()]);
    let reporter = Reporter { controller: MANAGER.to_owned(), instance: None };
    Arc::new(Context {
        recorder: Recorder::new(client.clone(), reporter),
        client,
        settings: settings(),
        models,
        hub,
        pools: Arc::default(),
        deployments,
        cache: Arc::default(),
        written: Mutex::default(),
        metrics,
        scaling: Scaling::default(),
        issuer: Some(Arc::new(issuer)),
        setbacks: Setbacks::default(),
        inspections: Inspections::default(),
        rollouts: Mutex::default(),
        stops,
    })
}

fn two_workers(spec: &mut Value) {
    spec["parallelism"]["tensor"] = json!(1);
}

#[tokio::test(start_paused = true)]
async fn a_rollout_passes_every_place_and_leaves_nothing_of_the_old() {
    let mut world = World::new().await;
    world.settle().await;
    let first = world.object().status.clone().expect("a status");
    assert_eq!((world.reason(status::PROGRESSING), first.ready_replicas), ("RolloutComplete".to_owned(), 1));
    assert_eq!((world.count("/statefulsets/"), world.count("/configmaps/"), world.count("/controllerrevisions/")), (2, 2, 1));
    world.passed.lock().expect("nobody panics with it").clear();
    world.change(two_workers);
    world.settle().await;
    let second = world.object().status.clone().expect("a status");
    assert_ne!(first.update_revision, second.update_revision);
    assert_eq!(
        (second.current_revision.clone(), world.reason(status::PROGRESSING)),
        (second.update_revision.clone(), "RolloutComplete".into())
    );
    assert_eq!(world.told().replicas.len(), 1);
    assert_eq!((world.count("/statefulsets/"), world.count("/configmaps/"), world.count("/controllerrevisions/")), (2, 2, 2));
    let passed = world.passed.lock().expect("nobody panics with it").clone();
    assert!(PLACES.iter().all(|place| passed.contains(place)), "{passed:?}");
    // Going back is the revision that was.
    world.change(|s| s["parallelism"]["tensor"] = json!(2));
    world.restart(None).await;
    world.settle().await;
    assert_eq!(Some(world.revisions()), first.update_revision.map(|name| vec![name]));
    assert_eq!(world.count("/controllerrevisions/"), 2);
}

#[tokio::test(start_paused = true)]
async fn a_draft_model_is_rolled_out_with_its_replica_and_goes_with_it() {
    let world = World::new().await;
    world.change(|s| *s = drafted());
    world.settle().await;
    assert_eq!((world.count("/statefulsets/"), world.count("/configmaps/"), world.count("-identity")), (3, 3, 3));
    let replica = world.told().replicas.remove(0);
    assert_eq!(replica.draft.map(|draft| draft.worker).as_deref(), Some(""), "its pod has no address yet");
    let pod = |ip: &str| {
        let labels = json!({ names::DEPLOYMENT: "llama", names::REPLICA: "0", names::REVISION: replica.revision, names::STAGE: "draft" });
        let metadata = json!({ "name": format!("{}-draft-s0-0", replica.name), "namespace": "models", "labels": labels });
        json!({ "apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": { "containers": [] }, "status": { "podIP": ip } })
    };
    let path = format!("/api/v1/namespaces/models/pods/{}-draft-s0-0", replica.name);
    world.objects.lock().expect("nobody panics with it").insert(path.clone(), pod("10.0.0.7"));
    world.settle().await;
    let worker = |world: &World| world.told().replicas[0].draft.as_ref().map(|draft| draft.worker.clone());
    assert_eq!(worker(&world).as_deref(), Some("10.0.0.7:7071"));
    world.objects.lock().expect("nobody panics with it").remove(&path);
    world.settle().await;
    assert_eq!(worker(&world).as_deref(), Some("10.0.0.7:7071"), "it may be on its way back");
    // Without it the replica is another, beside which nothing of it is left.
    world.change(|s| *s = spec());
    world.settle().await;
    assert_eq!((worker(&world), world.reason(status::PROGRESSING)), (None, "RolloutComplete".to_owned()));
    assert_eq!((world.count("/statefulsets/"), world.count("/configmaps/")), (2, 2));
}

#[tokio::test(start_paused = true)]
async fn a_process_that_ends_anywhere_in_a_rollout_is_taken_over_from() {
    for place in PLACES {
        let mut world = World::new().await;
        world.settle().await;
        world.change(two_workers);
        world.restart(Some(place)).await;
        world.reconcile().await;
        let mut ended = false;
        for _ in 0..12 {
            world.report(None);
            if !world.reconcile().await {
                ended = true;
                break;
            }
            world.serves();
        }
        assert!(ended || world.passed.lock().expect("nobody panics with it").contains(&place), "{place} was not come to");
        world.restart(None).await;
        world.settle().await;
        assert_eq!(world.reason(status::PROGRESSING), "RolloutComplete", "{place}");
        let revision = world.object().status.as_ref().and_then(|s| s.update_revision.clone()).expect("a revision");
        assert_eq!(world.revisions(), [revision], "{place}");
        assert_eq!((world.count("/statefulsets/"), world.count("/configmaps/")), (2, 2), "{place}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_broken_revision_leaves_the_old_one_and_can_be_gone_back_from() {
    let world = World::new().await;
    world.settle().await;
    let old = world.revisions();
    world.change(two_workers);
    assert!(world.reconcile().await);
    let broken = world.object().status.as_ref().and_then(|s| s.update_revision.clone()).expect("a revision");
    for _ in 0..6 {
        world.report(Some(&broken));
        assert!(world.reconcile().await);
        assert!(world.told().replicas.iter().any(|r| r.revision == old[0] && !r.draining));
    }
    let status = world.object().status.clone().expect("a status");
    assert_eq!((status.ready_replicas, status.replicas, world.reason(status::PROGRESSING)), (1, 2, "RollingOut".into()));
    assert_eq!(world.object().condition(status::READY).map(|c| c.status.as_str()), Some("True"));
    world.change(|s| s["parallelism"]["tensor"] = json!(2));
    world.settle().await;
    assert_eq!((world.revisions(), world.count("/statefulsets/")), (old, 2));
}

#[tokio::test(start_paused = true)]
async fn a_spec_that_is_refused_leaves_what_stands_to_routers() {
    let mut world = World::new().await;
    world.settle().await;
    let told = world.told();
    world.change(|s| s["parallelism"]["pipeline"] = json!(0));
    world.restart(None).await;
    assert!(world.reconcile().await);
    assert_eq!(world.reason(status::ACCEPTED), "InvalidSpec");
    assert_eq!(world.told().replicas, told.replicas);
    world.change(|s| s["parallelism"]["pipeline"] = json!(2));
    world.change(|s| s["suspend"] = json!(true));
    world.reconcile().await;
    world.report(None);
    world.reconcile().await;
    assert!(world.told().replicas.iter().all(|r| r.draining));
    world.report(None);
    world.report(None);
    world.reconcile().await;
    assert_eq!(
        (world.told().replicas.len(), world.count("/statefulsets/"), world.reason(status::AVAILABLE)),
        (0, 0, "ScaledToZero".into())
    );
    world.change(|s| s["suspend"] = json!(false));
    world.settle().await;
    assert_eq!(world.told().replicas, told.replicas, "it comes back as it was");
}

/// Objects whose path has `part`.
fn having(world: &World, part: &str) -> BTreeMap<String, Value> {
    let objects = world.objects.lock().expect("nobody panics with it");
    objects.iter().filter(|(path, _)| path.contains(part)).map(|(path, object)| (path.clone(), object.clone())).collect()
}

/// The pod that reads a model says what it found, and all that follows is done.
async fn the_model_is_read(world: &World) {
    let pod = having(world, "/pods/").into_keys().next().expect("a pod");
    {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models/llama");
        let said = source::Inspection::of(&path.display().to_string(), source::SourceOptions::default()).line();
        let mut objects = world.objects.lock().expect("nobody panics with it");
        objects.get_mut(&pod).expect("it stands")["status"] = json!({ "phase": "Succeeded" });
        objects.insert(format!("{pod}/log"), json!(said));
    }
    world.settle().await;
    world.objects.lock().expect("nobody panics with it").remove(&format!("{pod}/log"));
}

#[tokio::test(start_paused = true)]
async fn certificates_are_there_before_pods_and_are_renewed_without_them() {
    let world = World::new().await;
    world.objects.lock().expect("nobody panics with it").insert(REFUSED.to_owned(), json!("-identity"));
    for _ in 0..3 {
        assert!(world.reconcile().await);
    }
    assert_eq!(world.count("/statefulsets/"), 0, "a pod would wait for what cannot be made");
    world.objects.lock().expect("nobody panics with it").remove(REFUSED);
    world.settle().await;
    let sets = having(&world, "/statefulsets/");
    assert_eq!(sets.len(), 2);
    for set in sets.values() {
        let volumes = set["spec"]["template"]["spec"]["volumes"].as_array().expect("volumes");
        let secret = volumes.iter().find_map(|v| v["secret"]["secretName"].as_str()).expect("a Secret");
        let secret = &having(&world, &format!("/secrets/{secret}"));
        let owner = &secret.values().next().expect("it stands")["metadata"]["ownerReferences"];
        assert_eq!((owner.as_array().map(Vec::len), &owner[0]["uid"]), (Some(1), &set["metadata"]["uid"]), "it goes with its StatefulSet");
    }
    // Nothing is due.
    let before = having(&world, "");
    world.settle().await;
    assert_eq!(having(&world, ""), before, "the steady state writes nothing");
    // Also of a deployment whose spec is refused now.
    for valid in [true, false] {
        if !valid {
            world.change(|s| s["parallelism"]["pipeline"] = json!(0));
            assert!(world.reconcile().await);
        }
        for path in having(&world, "/secrets/").keys().filter(|path| path.ends_with("-identity")) {
            let mut objects = world.objects.lock().expect("nobody panics with it");
            let annotations = &mut objects.get_mut(path).expect("a Secret")["metadata"]["annotations"];
            annotations["skein.dev/issued"] = json!("1700000000");
        }
        world.context.issuer.as_ref().expect("names are proven").forget();
        let before = having(&world, "");
        assert!(world.reconcile().await);
        let after = having(&world, "");
        assert_eq!(after.len(), before.len());
        let differ: Vec<&String> = after.keys().filter(|path| after[*path] != before[*path]).collect();
        assert!(differ.len() == 2 && differ.iter().all(|path| path.contains("/secrets/")), "{differ:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn adapters_come_and_go_without_a_rollout() {
    let world = World::new().await;
    world.settle().await;
    let (before, sets) = (world.revisions(), world.count("/statefulsets/"));
    assert!(world.told().adapters.is_empty());
    world.change(|spec| spec["adapters"] = json!([{ "name": "a", "uri": "hf://org/a" }]));
    world.settle().await;
    let [told] = &world.told().adapters[..] else { panic!("one adapter is told") };
    assert_eq!((told.name.as_str(), told.source.uri.as_str()), ("a", "hf://org/a"));
    assert_eq!((world.revisions(), world.count("/statefulsets/")), (before.clone(), sets), "workers are left alone");
    assert_eq!(world.reason(status::PROGRESSING), "RolloutComplete");
    world.change(|spec| spec["adapters"] = json!([]));
    world.settle().await;
    assert!(world.told().adapters.is_empty());
    assert_eq!(world.revisions(), before);
}

#[tokio::test(start_paused = true)]
async fn a_model_on_a_claim_is_rolled_out_once_a_pod_has_read_it() {
    let mut world = World::new().await;
    world.change(|spec| spec["model"]["uri"] = json!("pvc://claim/llama"));
    let claim = "/api/v1/namespaces/models/persistentvolumeclaims/claim";
    world.objects.lock().expect("nobody panics with it").insert(claim.to_owned(), json!({ "metadata": { "name": "claim" } }));
    for _ in 0..3 {
        assert!(world.reconcile().await);
    }
    let resolved = world.object().condition(MODEL_RESOLVED).cloned().expect("a condition");
    assert_eq!((resolved.status.as_str(), resolved.reason.as_str()), ("Unknown", "Resolving"));
    assert!(resolved.message.contains("-inspect reads the headers of pvc://claim/llama"), "{}", resolved.message);
    assert_eq!((world.count("/pods/"), world.count("/statefulsets/")), (1, 0));
    the_model_is_read(&world).await;
    assert_eq!((world.reason(status::PROGRESSING), world.reason(MODEL_RESOLVED)), ("RolloutComplete".into(), "Resolved".into()));
    assert_eq!((world.count("/pods/"), world.count("/statefulsets/"), having(&world, "-header").len()), (0, 2, 1));
    let before = requests(&world);
    assert!(world.reconcile().await);
    assert_eq!(requests(&world), before, "what is known is not looked at again");
    // Another process goes by what is kept, and one for another model lets go of it.
    world.restart(None).await;
    world.settle().await;
    assert_eq!((world.count("/pods/"), having(&world, "-header").len()), (0, 1));
    world.change(|spec| spec["model"]["uri"] = json!("hf://org/llama"));
    world.settle().await;
    assert_eq!((world.count("/pods/"), having(&world, "-header").len()), (0, 0));
}

/// A namespace that allows host paths lets a model on nodes in, one that does no more takes nothing away, and neither needs another process.
#[tokio::test(start_paused = true)]
async fn a_model_on_nodes_goes_by_what_its_namespace_says() {
    let world = World::new().await;
    let label = |level: &str| {
        let labels = json!({ "pod-security.kubernetes.io/enforce": level });
        let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "models", "labels": labels } });
        world.objects.lock().expect("nobody panics with it").insert("/api/v1/namespaces/models".to_owned(), namespace);
    };
    label("restricted");
    world.change(|spec| spec["model"]["uri"] = json!("file:/srv/models/llama"));
    for _ in 0..3 {
        assert!(world.reconcile().await);
    }
    assert_eq!((world.reason(status::ACCEPTED), world.reason(status::READY)), ("HostPathForbidden".into(), "HostPathForbidden".into()));
    assert_eq!((world.count("/pods/"), world.count("/statefulsets/")), (0, 0));

    label("privileged");
    assert!(world.reconcile().await);
    the_model_is_read(&world).await;
    assert_eq!((world.reason(status::PROGRESSING), world.reason(status::READY)), ("RolloutComplete".into(), "Ready".into()));
    let (told, stands) = (world.told(), having(&world, "/statefulsets/"));
    assert_eq!((stands.len(), told.replicas.len(), world.count("/pods/")), (2, 1, 0));

    label("baseline");
    world.settle().await;
    assert_eq!((world.reason(status::ACCEPTED), world.reason(status::READY)), ("HostPathForbidden".into(), "HostPathForbidden".into()));
    assert_eq!((world.told(), having(&world, "/statefulsets/")), (told.clone(), stands.clone()), "what runs goes on");
    world.change(|spec| spec["replicas"] = json!(2));
    world.settle().await;
    assert_eq!(having(&world, "/statefulsets/"), stands, "and nothing is added to it");

    label("privileged");
    world.settle().await;
    assert_eq!((world.reason(status::READY), world.told().replicas.len()), ("Ready".into(), 2));
    assert!(world.told().replicas.contains(&told.replicas[0]), "it is as it was");
}

/// Requests to the API server so far.
fn requests(world: &World) -> u64 {
    let text = world.context.metrics.text(0).expect("text");
    let counts = text.lines().filter(|line| line.starts_with("skein_operator_api_requests_total{"));
    counts.map(|line| line.rsplit(' ').next().and_then(|n| n.parse::<u64>().ok()).expect("a number")).sum()
}

#[tokio::test(start_paused = true)]
async fn what_stands_as_it_should_costs_no_request() {
    let world = World::new().await;
    world.settle().await;
    let before = requests(&world);
    for _ in 0..3 {
        world.report(None);
        assert!(world.reconcile().await);
    }
    assert_eq!(requests(&world), before, "nothing was read or written");
    // Control: what somebody has deleted is written again, that alone, and then there is nothing to do once more.
    let service = "/api/v1/namespaces/models/services/llama";
    assert!(world.objects.lock().expect("nobody panics with it").remove(service).is_some());
    for _ in 0..2 {
        assert!(world.reconcile().await);
        assert_eq!(requests(&world), before + 1);
    }
    assert!(having(&world, "").contains_key(service));
    // A new process knows nothing of who wrote what, and looks at everything once; but it changes nothing.
    let mut world = world;
    let stands = having(&world, "");
    world.restart(None).await;
    world.settle().await;
    assert_eq!(having(&world, ""), stands);
    let after = requests(&world);
    assert!(world.reconcile().await);
    assert_eq!(requests(&world), after);
}

#[test]
fn what_is_not_ready_for_long_is_looked_at_less_often() {
    let since = "2026-01-01T00:00:00Z";
    let condition = json!({ "type": "Ready", "status": "False", "lastTransitionTime": since });
    let object: ModelDeployment =
        serde_json::from_value(json!({ "metadata": { "name": "a" }, "status": { "conditions": [condition] } })).expect("an object");
    let began = since.parse::<Timestamp>().expect("a time").as_second();
    for (after, looks) in [(0, 15), (60, 15), (100, 25), (400, 100), (86400, 300)] {
        assert_eq!(starting(&object, began + after), Duration::from_secs(looks), "after {after} s");
    }
}

/// From the namespace's routers to its own and back: nobody is left without what they were told before those that come are ready.
#[tokio::test]
async fn a_deployment_changes_to_routers_of_its_own_and_back() {
    let world = World::new().await;
    world.settle().await;
    let hub = &world.context.hub;
    let service = || {
        let objects = world.objects.lock().expect("nobody panics with it");
        objects["/api/v1/namespaces/models/services/llama"]["spec"]["selector"].get(names::ROUTER_OF).is_some()
    };
    let routers = || world.object().status.as_ref().and_then(|s| s.routers.clone());
    assert_eq!((service(), routers()), (false, None));

    world.change(|s| s["router"] = json!({ "dedicated": true, "replicas": 1 }));
    assert!(world.reconcile().await);
    let own = hub.own_space("models", "llama");
    let pod = |name: &str, pool: &str| plan::fleet::FleetRouter { name: name.into(), address: "10.0.0.9:7072".into(), pool: pool.into() };
    own.meet(vec![pod("own", "llama")], ["own".to_owned()].into(), &["llama".to_owned()]);
    assert!(world.reconcile().await);
    assert!(!service(), "its own routers report nothing yet");
    assert_eq!(world.told().drivers, "");
    assert!(own.told("llama").is_some_and(|told| told.drivers.is_empty()), "they are to reach it through the others");

    let say = |space: &crate::fleet::Space, router: &str| {
        let Some((term, number)) = space.number() else { return };
        let told = space.told("llama").expect("they are told");
        let replicas = told.replicas.into_iter().map(|r| ReplicaState { ready: true, name: r.name, ..ReplicaState::default() });
        let load = DeploymentLoad { deployment: "llama".into(), replicas: replicas.collect(), ..DeploymentLoad::default() };
        space.report(2, RouterReport { router: router.into(), term, number, loads: vec![load] });
    };
    say(&own, "own");
    assert!(world.reconcile().await);
    assert!(service(), "they are open and reach every replica");
    assert!(routers().is_some_and(|r| r.dedicated && r.since.is_some()));
    assert!(own.told("llama").is_some_and(|told| told.drivers == "llama"));
    assert!(hub.space("models").told("llama").is_some(), "those before finish what they have begun");
    world.date_back();
    world.settle_own(&say, &own).await;
    assert_eq!(hub.space("models").told("llama"), None, "those before are told no more");
    assert_eq!((world.reason(status::ROUTER_READY), world.reason(status::READY)), ("Ready".into(), "Ready".into()));

    world.change(|s| s["router"] = json!({}));
    assert!(world.reconcile().await);
    assert!(service(), "those of the namespace do not reach it yet");
    let both = ["one", "two"];
    hub.space("models").meet(Vec::new(), both.map(str::to_owned).into(), &["llama".to_owned()]);
    world.report_from(&own, &both[..1]);
    assert!(world.reconcile().await);
    assert!(service(), "one of them does not report yet");
    world.report_from(&own, &both);
    assert!(world.reconcile().await);
    assert!(!service() && routers().is_some_and(|r| !r.dedicated));
    assert!(hub.space("models").told("llama").is_some_and(|told| told.drivers.is_empty()));
    world.date_back();
    world.settle().await;
    assert_eq!((service(), routers()), (false, None));
    assert_eq!(world.reason(status::READY), "Ready");
}
