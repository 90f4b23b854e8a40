//! Weights on their way to workers: who fetches what, how far it is, what is kept, and who is let in.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::{PermissionsExt, symlink},
};

use e2e::{client, files, program};
use serde_json::{Value, json};

use crate::{
    answers::Request,
    chart::endpoint,
    deletion::objects,
    kubernetes::{Namespace, SYSTEM, WORKERS, condition, hub, identity, name, run_folder, succeed},
    models::{LLAMA, llama, llama_body, llama_here},
    survival::process,
};

/// Bytes of one request of a worker, and requests that it has in flight; crate `source`.
const IN_FLIGHT: u64 = 4 * (8 << 20);

pub(crate) fn manifest(name: &str, spec: &Value) -> String {
    json!({"apiVersion": "skein.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": name}, "spec": spec}).to_string()
}

pub(crate) fn ask(base: &str, body: &Value) -> String {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(client::complete(base, body)).expect("an answer")
}

/// Bytes of weights that each address asked the mirror for, of a repository; what only asks whether there is a file does not count.
pub(crate) fn asked(repository: &str) -> BTreeMap<String, u64> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let list = runtime.block_on(client::get(&format!("{}/sent/{repository}", endpoint()))).expect("the mirror's list");
    let list: Vec<Value> = serde_json::from_str(&list).expect("JSON");
    let mut asked = BTreeMap::new();
    for one in &list {
        let bytes = one["to"].as_u64().expect("a number") - one["from"].as_u64().expect("a number");
        if bytes > 4 {
            *asked.entry(one["peer"].as_str().expect("an address").to_owned()).or_default() += bytes;
        }
    }
    asked
}

pub(crate) fn seen(namespace: &Namespace, deployment: &str, reason: &str) {
    let of = format!("involvedObject.name={deployment}");
    namespace.watch(&["events", "--field-selector", &of], &format!("the event {reason}"), |e| (e["reason"] == reason).then_some(()));
}

#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn ranks_fetch_their_own_bytes_and_go_on_where_they_were_killed() {
    let folder = hub("e2e/weights");
    let (link, pace) = (folder.join("gemma.gguf"), folder.join(".pace"));
    if !link.exists() {
        symlink(files::reference(), &link).expect("a link");
    }
    fs::write(&pace, "2000000").expect("a writable folder");
    let namespace = Namespace::shared("weights");
    let model = json!({"uri": "hf://e2e/weights@main/gemma.gguf", "digest": format!("sha256:{}", files::REFERENCE_SHA256)});
    namespace.apply(&manifest("weights", &json!({"model": model, "parallelism": {"tensor": 2}})));
    let total = namespace.watch_status("weights", "more than half of the bytes", |status| {
        let (done, total) = (status["cache"]["bytesDownloaded"].as_u64()?, status["cache"]["bytesTotal"].as_u64()?);
        let why = condition(status, "WeightsReady");
        let said = why["message"].as_str()?.contains(&format!("{done} of {total} bytes are fetched"));
        let known = why["reason"] == "Downloading" && said && status["cache"]["etaSeconds"].as_u64() > Some(0);
        // Of both workers, in the middle.
        (known && total > 200_000_000 && done > total * 6 / 10 && done < total).then_some(total)
    });
    let pods = namespace.running(WORKERS);
    process(&pods[0]).signal("KILL");
    fs::remove_file(&pace).expect("the mirror's pace");
    namespace.ready("weights", 1);
    seen(&namespace, "weights", "DownloadStarted");
    seen(&namespace, "weights", "DownloadCompleted");
    let cache = &namespace.deployment("weights")["status"]["cache"];
    assert_eq!((cache["bytesDownloaded"].as_u64(), cache["bytesTotal"].as_u64()), (Some(total), Some(total)));

    let local = files::reference();
    let plan = program::json(&["plan", &local.to_string_lossy(), "--tp", "2", "--json"]);
    let [tensors, shared] = ["tensor_bytes", "shared_bytes"].map(|field| plan[field].as_u64().expect("a number"));
    assert_eq!(total, tensors + shared, "each rank fetches its tensors and nothing else");
    let after = namespace.running(WORKERS);
    assert_eq!((identity(&after[0]).1, identity(&after[1]).1), (1, 0), "one was killed, and none restarted by itself");
    let asked = asked("e2e/weights");
    let of = |pod: &Value| asked.get(pod["status"]["podIP"].as_str().expect("an address")).copied().unwrap_or_default();
    let [first, second] = [&after[0], &after[1]].map(of);
    println!("{tensors} bytes of tensors, {shared} held twice: the ranks asked for {first} and {second}");
    // Rank 0 was killed with requests in flight, and is the one that reads the header.
    let header = 16 << 20;
    assert!(second < total * 6 / 10 && first + second < total + IN_FLIGHT + header, "{first} and {second} of {total}");

    let request = Request { prompt: "The capital of France is".into(), tokens: 16, temperature: 0.0, seed: 1 };
    let mut body = request.body();
    body["model"] = json!("weights");
    assert_eq!(ask(&namespace.http("weights"), &body), request.answer_here());
}

#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn credentials_let_a_deployment_in() {
    const SECRET: &str = "a-token-that-nobody-sees";
    let folder = hub("e2e/private");
    files::copy_fixture("llama", &folder);
    fs::write(folder.join(".authorization"), format!("Bearer {SECRET}")).expect("a writable folder");
    let namespace = Namespace::shared("private");
    let refused = |what: &str, words: &str| {
        namespace.watch_status("private", what, |status| {
            let resolved = condition(status, "ModelResolved");
            let said = resolved["message"].as_str().is_some_and(|m| m.contains(words));
            (resolved["status"] == "False" && resolved["reason"] == "Unauthorized" && said).then_some(())
        });
    };
    let secret = |key: &str, value: &str| {
        let body = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hub"}, "stringData": {key: value}});
        namespace.succeed(&["delete", "secret", "hub", "--ignore-not-found"]);
        namespace.apply(&body.to_string());
    };
    let model = json!({"uri": "hf://e2e/private@main"});
    namespace.apply(&manifest("private", &json!({"model": model})));
    refused("no credentials", "refused with status 401");
    seen(&namespace, "private", "DownloadFailed");
    let mut shown = model.clone();
    shown["credentialsSecretRef"] = json!({"name": "hub"});
    namespace.apply(&manifest("private", &json!({"model": shown})));
    refused("a Secret that is not there", "Secret hub does not exist");
    secret("password", SECRET);
    refused("a Secret with other keys", "AWS_SECRET_ACCESS_KEY, got password");
    secret("token", "another");
    refused("a wrong token", "refused with status 401");
    secret("token", SECRET);
    namespace.ready("private", 1);
    ask(&namespace.http("private"), &llama_body("private"));
    namespace.running(WORKERS);
    // It is in a file of the pod, and neither in its description nor in a log.
    let pods = namespace.succeed(&["get", "pods,modeldeployments,statefulsets,controllerrevisions,configmaps", "--output=yaml"]);
    let logs = namespace.succeed(&["logs", "--selector", WORKERS, "--tail=-1"]);
    let operator = succeed(&["--namespace", SYSTEM, "logs", "deployment/skein-operator", "--tail=-1"]);
    for text in [pods, logs, operator] {
        assert!(!text.contains(SECRET), "{text}");
    }
}

/// A volume of this node, and a claim for it in the namespace; both go with the value.
struct Volume<'a> {
    namespace: &'a Namespace,
    name: &'a str,
    folder: std::path::PathBuf,
}

impl<'a> Volume<'a> {
    fn make(namespace: &'a Namespace, name: &'a str) -> Self {
        let folder = run_folder().join("volumes").join(name);
        fs::create_dir_all(&folder).expect("a writable run folder");
        // Kubernetes gives folders of a node to no group.
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).expect("its permissions");
        let volume = json!({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": {
            "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteMany"], "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "", "hostPath": {"path": folder}, "claimRef": {"namespace": namespace.name, "name": name},
        }});
        let claim = json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": {
            "accessModes": ["ReadWriteMany"], "storageClassName": "", "volumeName": name, "resources": {"requests": {"storage": "1Gi"}},
        }});
        succeed(&["delete", "persistentvolume", name, "--ignore-not-found"]);
        namespace.apply(&volume.to_string());
        namespace.apply(&claim.to_string());
        Self { namespace, name, folder }
    }
}

impl Drop for Volume<'_> {
    fn drop(&mut self) {
        // A claim is held by the pods that use it; it goes with the namespace.
        self.namespace.kubectl(&["delete", "persistentvolumeclaim", self.name, "--wait=false"]);
        crate::kubernetes::kubectl(&["delete", "persistentvolume", self.name, "--wait=false"]);
    }
}

#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn what_is_on_a_claim_is_not_fetched_again() {
    llama();
    let namespace = Namespace::shared("claimed");
    let volume = Volume::make(&namespace, "test-claimed");
    let cache = json!({"policy": "PVC", "pvcName": "test-claimed"});
    let spec = |tensor: u32| json!({"model": {"uri": LLAMA}, "parallelism": {"tensor": tensor}, "cache": cache});
    namespace.apply(&manifest("claimed", &spec(2)));
    namespace.ready("claimed", 1);
    let http = namespace.http("claimed");
    let before = ask(&http, &llama_body("claimed"));
    assert!(fs::read_dir(volume.folder.join("parts")).expect("a cache").count() > 1);
    // Its pods go, and with another split each worker needs what both had.
    let gone: Vec<String> = namespace.pods(WORKERS).iter().map(|pod| name(pod).to_owned()).collect();
    namespace.apply(&manifest("claimed", &spec(1)));
    namespace
        .succeed(&[&["wait", "--for=delete", "pod", "--timeout=120s"][..], &gone.iter().map(String::as_str).collect::<Vec<_>>()].concat());
    namespace.ready("claimed", 1);
    let pods = namespace.running(WORKERS);
    let address = pods[0]["status"]["podIP"].as_str().expect("an address");
    let (asked, small) = (asked("e2e/llama").get(address).copied().unwrap_or_default(), small());
    assert!(asked <= small, "{asked} bytes were asked for again, the small files have {small}");
    assert_eq!(ask(&http, &llama_body("claimed")), before);
}

/// Bytes of the tiny llama's tokenizer and configuration, which are fetched when they are asked for.
pub(crate) fn small() -> u64 {
    ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors.index.json"]
        .iter()
        .filter_map(|file| fs::metadata(files::fixture("llama").join(file)).ok())
        .map(|file| file.len())
        .sum()
}

/// The pods that read headers.
pub(crate) const INSPECTORS: &str = "app.kubernetes.io/component=inspector";

/// A model on a claim is planned by what a short-lived pod reads, and answers as `skein run` does; whatever is wrong is said, and nothing is left.
#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn a_model_on_a_claim_answers_as_this_machine_does() {
    let namespace = Namespace::shared("on-claim");
    assert_eq!(objects(&namespace), BTreeSet::new());
    let volume = Volume::make(&namespace, "test-on-claim");
    let folder = volume.folder.join("models/llama");
    fs::create_dir_all(&folder).expect("a writable volume");
    files::copy_fixture("llama", &folder);
    fs::write(volume.folder.join("damaged.gguf"), b"GGUF\x03\0\0\0").expect("a writable volume");
    let apply = |uri: &str| {
        let spec = json!({"model": {"uri": uri}, "parallelism": {"pipeline": 2, "tensor": 2}});
        namespace.apply(&manifest("on-claim", &spec));
    };
    for (uri, kind, reason, says) in [
        ("pvc://nowhere/llama", "ModelResolved", "NotFound", "no PersistentVolumeClaim nowhere"),
        ("pvc://test-on-claim/models/absent", "ModelResolved", "NotFound", "pvc://test-on-claim/models/absent does not exist"),
        ("pvc://test-on-claim/damaged.gguf", "Accepted", "UnsupportedArchitecture", "at byte 8"),
    ] {
        apply(uri);
        namespace.watch_status("on-claim", &format!("what is wrong with {uri}"), |status| {
            let found = condition(status, kind);
            let said = found["message"].as_str().is_some_and(|message| message.contains(says));
            (found["status"] == "False" && found["reason"] == reason && said).then_some(())
        });
        namespace.gone(INSPECTORS);
    }
    seen(&namespace, "on-claim", "DownloadFailed");
    apply("pvc://test-on-claim/models/llama");
    namespace.ready("on-claim", 1);
    namespace.gone(INSPECTORS);
    let status = namespace.deployment("on-claim")["status"].clone();
    assert_eq!((&status["plan"]["fits"], &status["model"]["format"]), (&json!(true), &json!("Safetensors")));
    assert_eq!(status["cache"], Value::Null, "nothing is fetched");
    let pods = namespace.pods(WORKERS);
    assert_eq!(pods.len(), 4);
    for pod in &pods {
        let volumes = pod["spec"]["volumes"].as_array().expect("volumes");
        let model = volumes.iter().find(|volume| volume["name"] == "model").expect("the claim");
        assert_eq!(model["persistentVolumeClaim"], json!({"claimName": "test-on-claim", "readOnly": true}));
    }
    assert_eq!(ask(&namespace.http("on-claim"), &llama_body("on-claim")), llama_here());
    // The pod was one that `restricted` lets in, and that was made for each of the paths that could be looked for, once.
    let events = namespace.get(&["events", "--field-selector", "involvedObject.kind=Pod,reason=Scheduled"]);
    let events = events["items"].as_array().expect("a list");
    let inspected: BTreeSet<&str> =
        events.iter().filter_map(|event| event["involvedObject"]["name"].as_str()).filter(|name| name.ends_with("-inspect")).collect();
    assert_eq!(inspected.len(), 3, "{inspected:?}");

    namespace.succeed(&["delete", "modeldeployment", "on-claim"]);
    program::until("a namespace with its claim alone", || {
        (objects(&namespace) == BTreeSet::from(["persistentvolumeclaim/test-on-claim".to_owned()])).then_some(())
    });
}
