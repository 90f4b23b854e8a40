//! Models on claims and nodes, on an API server that is a map of objects whose pods a test plays.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use source::SourceOptions;

use super::*;
use crate::{
    build::{pod::MODEL, tests::settings},
    dereference::Standing,
    host::{
        Access, Enforced,
        tests::{access, folders, privileged},
    },
    mock::{self, Objects, REFUSED},
    validate::tests::{self, object},
};

const CLAIM: &str = "/api/v1/namespaces/models/persistentvolumeclaims/claim";
const URI: &str = "pvc://claim/folder/$(HOME)/m.gguf";

fn spec(uri: &str) -> Value {
    json!({ "model": { "uri": uri }, "workers": { "nodeSelector": { "pool": "big" }, "tolerations": [{ "key": "a", "value": "b" }] } })
}

/// What a pod says of a fixture.
fn said() -> String {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models/llama");
    Inspection::of(&path.display().to_string(), SourceOptions::default()).line()
}

/// A namespace, and a process that looks for headers in it.
struct World {
    objects: Objects,
    client: Client,
    cache: Cache,
    settings: Settings,
    models: Models,
    inspections: Inspections,
}

impl World {
    fn new() -> Self {
        let objects = Objects::default();
        objects.lock().expect("nobody panics with it").insert(CLAIM.to_owned(), json!({ "metadata": { "name": "claim" } }));
        Self {
            client: mock::client(&objects),
            objects,
            cache: Cache::default(),
            settings: settings(),
            models: Models::new(None),
            inspections: Inspections::default(),
        }
    }

    /// Looks once; watches have told of everything.
    async fn look(&self, spec: Value) -> Option<Result<Arc<ModelHeader>, Unresolved>> {
        self.look_with(spec, Access::default()).await
    }

    /// Looks once on behalf of a deployment that may have this of nodes.
    async fn look_with(&self, spec: Value, access: Access) -> Option<Result<Arc<ModelHeader>, Unresolved>> {
        let names = |part: &str| self.paths(part).iter().filter_map(|path| path.rsplit('/').next()).map(str::to_owned).collect::<Vec<_>>();
        let standing = Standing { config_maps: names("/configmaps/"), inspectors: names("-inspect"), ..Standing::default() };
        let mut fetched = Fetched { access, header: None, standing, ..tests::fetched() };
        let Self { client, cache, settings, models, inspections, .. } = self;
        let inspector = Inspector { client, cache, settings, models, inspections };
        inspector.inspect(&object(spec), &mut fetched).await.expect("an API server");
        fetched.header
    }

    async fn refused(&self, spec: Value) -> Unresolved {
        self.look(spec).await.expect("a model on a claim").expect_err("no header")
    }

    fn paths(&self, part: &str) -> BTreeSet<String> {
        let objects = self.objects.lock().expect("nobody panics with it");
        objects.keys().filter(|path| path.contains(part) && !path.ends_with("/log")).cloned().collect()
    }

    /// The one pod there is.
    fn pod(&self) -> Option<String> {
        let pods = self.paths("/pods/");
        assert!(pods.len() < 2, "{pods:?}");
        pods.into_iter().next()
    }

    fn play(&self, status: Value, log: Option<&str>) {
        let path = self.pod().expect("a pod");
        let mut objects = self.objects.lock().expect("nobody panics with it");
        objects.get_mut(&path).expect("it stands")["status"] = status;
        log.map(|log| objects.insert(format!("{path}/log"), json!(log)));
    }
}

#[test]
fn the_pod_may_read_one_claim_and_nothing_else() {
    let manifest = |spec: Value| validate::read(&object(spec.clone()), &spec, &tests::fetched()).expect("a manifest");
    let build = |uri: &str, spec: Value| {
        let place = access(folders(), privileged()).place(uri).expect("it may be read").expect("a volume");
        pod::build(&settings(), &object(spec.clone()), &manifest(spec).spec().workers, &place)
    };
    let Object { name, body } = build(URI, spec(URI));
    let typed: Pod = serde_json::from_value(body.clone()).expect("the fields have their types");
    assert!(is_inspector(&typed) && name.len() <= 63, "{name}");
    let pod = &body["spec"];
    assert_eq!((&pod["automountServiceAccountToken"], &pod["restartPolicy"]), (&json!(false), &json!("Never")));
    assert_eq!((&pod["securityContext"]["runAsNonRoot"], &pod["activeDeadlineSeconds"]), (&json!(true), &json!(300)));
    let container = &pod["containers"][0];
    assert_eq!(container["securityContext"]["capabilities"]["drop"], json!(["ALL"]));
    assert_eq!(pod["volumes"], json!([{ "name": "model", "persistentVolumeClaim": { "claimName": "claim", "readOnly": true } }]));
    assert_eq!(container["volumeMounts"], json!([{ "name": "model", "mountPath": MODEL, "readOnly": true }]));
    assert!(container.get("env").is_none() && container.get("ports").is_none(), "{container}");
    // A path is no place for variables.
    assert_eq!(container["args"][3], format!("{MODEL}/folder/$$(HOME)/m.gguf"));
    assert_eq!((&pod["nodeSelector"], &pod["tolerations"][0]["key"]), (&json!({ "pool": "big" }), &json!("a")));
    assert_eq!(body["metadata"]["ownerReferences"][0]["uid"], "0b0c");
    let on_node = build("file:///srv/models//a/$(HOME).gguf", spec(URI));
    let read = &on_node.body["spec"];
    assert_eq!(read["volumes"], json!([{ "name": "model", "hostPath": { "path": "/srv/models", "type": "Directory" } }]));
    assert_eq!(read["containers"][0]["volumeMounts"], container["volumeMounts"], "read alone, in the same place");
    assert_eq!(read["containers"][0]["securityContext"], container["securityContext"]);
    assert_eq!(read["containers"][0]["args"][3], format!("{MODEL}/a/$$(HOME).gguf"));
    assert_ne!(on_node.name, build("file:/srv/models/a/b", spec(URI)).name);
    for other in
        [build("pvc://claim/other", spec(URI)), build("pvc://other/folder/m", spec(URI)), build(URI, json!({ "model": { "uri": URI } }))]
    {
        assert_ne!(other.name, name);
    }
}

#[tokio::test(start_paused = true)]
async fn a_pod_reads_the_header_and_is_gone() {
    let world = World::new();
    let first = world.refused(spec(URI)).await;
    assert_eq!(first.reason, "Resolving");
    let pod = world.pod().expect("a pod");
    assert!(first.message.contains(pod.rsplit('/').next().expect("a name")) && first.message.contains(URI), "{}", first.message);
    world.play(json!({ "phase": "Running" }), None);
    assert_eq!(world.refused(spec(URI)).await.reason, "Resolving");
    assert_eq!(world.pod(), Some(pod), "one is enough");
    world.play(json!({ "phase": "Succeeded" }), Some(&format!("a line before\n{}\n", said())));
    assert_eq!(world.look(spec(URI)).await.expect("a claim").expect("a header"), tests::header());
    assert_eq!(world.pod(), None);
    // It is kept: by this process, and for the next.
    let kept = world.paths("/configmaps/");
    assert_eq!(kept.len(), 1);
    for _ in 0..2 {
        world.look(spec(URI)).await.expect("a claim").expect("a header");
        world.inspections.lock().headers.clear();
    }
    assert_eq!(world.pod(), None);
    // A record that somebody has changed is no record.
    let path = kept.first().expect("a record").clone();
    world.objects.lock().expect("nobody panics with it").get_mut(&path).expect("it")["data"]["header"] = json!("{\"header\": 1}");
    assert_eq!(world.refused(spec(URI)).await.reason, "Resolving");
    assert!(world.pod().is_some());
    // A pod that was made for another path goes.
    let before = world.pod();
    world.refused(spec("pvc://claim/other")).await;
    assert!(world.pod().is_some() && world.pod() != before);
    assert_eq!(world.look(json!({ "model": { "uri": "hf://org/llama" } })).await, None);
    assert_eq!(world.pod(), None, "nobody waits for it any more");
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_brings_nothing_is_followed_by_pauses_that_grow() {
    let world = World::new();
    let missing = r#"{"refused":{"reason":"NotFound","message":"/var/lib/skein/model/folder/m.gguf does not exist"}}"#;
    let mut pauses = Vec::new();
    for _ in 0..9 {
        assert_eq!(world.refused(spec(URI)).await.reason, "Resolving");
        world.play(json!({ "phase": "Failed" }), Some(missing));
        let why = Unresolved { reason: "NotFound", message: "pvc://claim/folder/m.gguf does not exist".into() };
        // However often it is looked at, as when the pod goes.
        for _ in 0..3 {
            assert_eq!(world.refused(spec(URI)).await, why);
            assert_eq!(world.pod(), None);
        }
        let pause = world.inspections.pause("0b0c").expect("a pause");
        pauses.push(pause.as_secs());
        tokio::time::advance(pause + Duration::from_millis(1)).await;
        assert_eq!(world.inspections.pause("0b0c"), None);
    }
    assert_eq!(pauses, [10, 20, 40, 80, 160, 320, 600, 600, 600]);
    // Another path is tried at once.
    world.refused(spec("pvc://claim/other")).await;
    world.play(json!({ "phase": "Failed" }), Some(missing));
    world.refused(spec("pvc://claim/other")).await;
    assert_eq!(world.inspections.pause("0b0c"), Some(BACKOFF.0));
}

#[tokio::test(start_paused = true)]
async fn what_keeps_a_pod_from_its_work_is_said() {
    let container = |state: Value| json!([{ "name": "x", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": state }]);
    let waits = |reason: &str| json!({ "phase": "Pending", "containerStatuses": container(json!({ "waiting": { "reason": reason } })) });
    let unplaced = json!({ "phase": "Pending", "conditions": [{ "type": "PodScheduled", "status": "False", "message": "0/3 nodes" }] });
    let killed = container(json!({ "terminated": { "exitCode": 137, "reason": "OOMKilled" } }));
    let whole = said();
    let cases = [
        (unplaced, None, "InspectionWaits", "0/3 nodes; correct the claim or spec.workers"),
        (waits("ImagePullBackOff"), None, "InspectionWaits", "ImagePullBackOff; check the operator's --image"),
        (waits("ContainerCreating"), None, "Resolving", "ContainerCreating"),
        (json!({ "phase": "Running", "startTime": "2026-01-01T00:00:00Z" }), None, "SourceUnreachable", "its node may be lost"),
        (json!({ "phase": "Failed", "reason": "DeadlineExceeded" }), None, "SourceUnreachable", "DeadlineExceeded"),
        (json!({ "phase": "Failed", "containerStatuses": killed }), Some("noise"), "SourceUnreachable", "OOMKilled with exit code 137"),
        (json!({ "phase": "Succeeded" }), Some(&whole[..whole.len() - 1]), "SourceUnreachable", "is not understood"),
        (json!({ "phase": "Failed" }), Some(r#"{"refused":{"reason":"tensor_missing","message":"m"}}"#), "header_invalid", "m"),
    ];
    for (status, log, reason, says) in cases {
        let world = World::new();
        world.refused(spec(URI)).await;
        world.play(status.clone(), log);
        let why = world.refused(spec(URI)).await;
        assert_eq!(why.reason, reason, "{status}");
        assert!(why.message.contains(says), "{status}: {}", why.message);
        assert_eq!(world.pod().is_some(), ["InspectionWaits", "Resolving"].contains(&reason), "{status}");
    }
}

#[tokio::test(start_paused = true)]
async fn no_pod_is_made_in_vain() {
    let world = World::new();
    assert_eq!(world.look(json!({ "model": { "uri": "hf://org/llama" } })).await, None);
    let mut wrong = spec(URI);
    wrong["workers"]["nodeSelector"] = json!({ "a": "b c" });
    assert_eq!(world.look(wrong).await, None, "its validation says what is wrong");
    assert_eq!(world.look(spec("pvc://claim/../m")).await, None);
    let claim = world.objects.lock().expect("nobody panics with it").remove(CLAIM).expect("it stands");
    let why = world.refused(spec(URI)).await;
    assert_eq!(why.reason, "NotFound");
    assert!(why.message.contains("no PersistentVolumeClaim claim in the namespace models"), "{}", why.message);
    world.objects.lock().expect("nobody panics with it").insert(CLAIM.to_owned(), claim);
    assert_eq!(world.refused(spec(URI)).await, why, "it is looked for when the pause is over");
    assert_eq!(world.pod(), None);
    tokio::time::advance(BACKOFF.0).await;
    world.objects.lock().expect("nobody panics with it").insert(REFUSED.to_owned(), json!("/pods"));
    let why = world.refused(spec(URI)).await;
    assert_eq!(why.reason, "SourceUnreachable");
    assert!(why.message.contains("is refused: Forbidden"), "{}", why.message);
    world.objects.lock().expect("nobody panics with it").remove(REFUSED);
    tokio::time::advance(BACKOFF.1).await;
    assert_eq!(world.refused(spec(URI)).await.reason, "Resolving");
    // One that somebody else has made under its name says nothing.
    let path = world.pod().expect("a pod");
    world.objects.lock().expect("nobody panics with it").get_mut(&path).expect("it")["metadata"]["ownerReferences"] = json!([]);
    world.play(json!({ "phase": "Succeeded" }), Some(&said()));
    let why = world.refused(spec(URI)).await;
    assert!(why.message.contains("is not this deployment's"), "{}", why.message);
    assert_eq!(world.pod(), Some(path));
}

#[tokio::test(start_paused = true)]
async fn a_model_on_nodes_is_read_once_the_namespace_allows_it() {
    let (world, uri) = (World::new(), "file:/srv/models/folder/m.gguf");
    let named = |level: &str| Enforced::Level(Some(level.to_owned()));
    for access in [
        Access::default(),
        access(folders(), Enforced::Unknown),
        access(folders(), named("restricted")),
        access(folders(), Enforced::Level(None)),
        access(folders(), Enforced::Hidden),
    ] {
        assert_eq!(world.look_with(spec(uri), access).await, None, "its validation says what is wrong");
    }
    // The cache must be allowed too.
    let mut cached = spec(uri);
    cached["cache"] = json!({ "policy": "NodeLocal" });
    let no_cache = crate::host::Folders::new(&["/srv/models".to_owned()], None).expect("folders");
    assert_eq!(world.look_with(cached, access(no_cache, privileged())).await, None);
    assert_eq!(world.pod(), None, "nothing of a node was mounted");

    let allowed = || access(folders(), privileged());
    let look = || async { world.look_with(spec(uri), allowed()).await.expect("it is looked for") };
    let first = look().await.expect_err("no header yet");
    assert_eq!(first.reason, "Resolving");
    assert!(first.message.contains("on a node, which must have the folder /srv/models: "), "{}", first.message);
    let denied = r#"{"refused":{"reason":"DownloadFailed","message":"failed to open /var/lib/skein/model/folder/m.gguf: Permission denied (os error 13)"}}"#;
    world.play(json!({ "phase": "Failed" }), Some(denied));
    let why = look().await.expect_err("it may not be read");
    let says = "failed to open /srv/models/folder/m.gguf: Permission denied (os error 13); user 65532 must be able to read it on the node";
    assert_eq!((why.reason, why.message.as_str()), ("DownloadFailed", says));
    tokio::time::advance(BACKOFF.1).await;
    assert_eq!(look().await.expect_err("another pod").reason, "Resolving");
    world.play(json!({ "phase": "Succeeded" }), Some(&said()));
    assert_eq!(look().await.expect("a header"), tests::header());
    assert_eq!(world.pod(), None);
    // A permission that is taken back leaves no pod behind.
    let other = "file:/srv/models/other";
    assert!(world.look_with(spec(other), allowed()).await.is_some() && world.pod().is_some());
    assert_eq!(world.look_with(spec(other), access(folders(), named("baseline"))).await, None);
    assert_eq!(world.pod(), None);
}
