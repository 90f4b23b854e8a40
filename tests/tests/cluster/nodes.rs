//! Folders of the node, which is this machine: models that are read from one and a cache that is kept in one, where both keys are there.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{PermissionsExt, chown, symlink},
    path::Path,
};

use e2e::files;
use serde_json::{Value, json};

use crate::{
    kubernetes::{Namespace, WORKERS, condition, identity, run_folder},
    models::{LLAMA, llama, llama_body, llama_here},
    weights::{INSPECTORS, ask, asked, manifest, seen, small},
};

/// Label by which a namespace lets host paths in.
const ENFORCE: &str = "pod-security.kubernetes.io/enforce";
/// User that pods run as.
const USER: u32 = 65532;

fn label(namespace: &Namespace, level: Option<&str>) {
    let label = level.map_or_else(|| format!("{ENFORCE}-"), |level| format!("{ENFORCE}={level}"));
    crate::kubernetes::succeed(&["label", "namespace", &namespace.name, "--overwrite", &label]);
}

/// Waits until a condition of the deployment is false for this reason, in these words.
fn refused(namespace: &Namespace, name: &str, (kind, reason): (&str, &str), says: &[&str]) {
    namespace.watch_status(name, &format!("{reason} of {name}, which says {says:?}"), |status| {
        let found = condition(status, kind);
        let said = found["message"].as_str().is_some_and(|message| says.iter().all(|words| message.contains(words)));
        (found["status"] == "False" && found["reason"] == reason && said).then_some(())
    });
}

/// The fixture as a model in a folder, which is made anew.
fn put(folder: &Path) {
    if folder.exists() {
        fs::remove_dir_all(folder).expect("a writable run folder");
    }
    fs::create_dir_all(folder).expect("a writable run folder");
    files::copy_fixture("llama", folder);
}

const FORBIDDEN: (&str, &str) = ("Accepted", "HostPathForbidden");

#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn a_model_on_a_node_is_served_where_its_namespace_allows_it() {
    let namespace = Namespace::shared("on-node");
    // What the operator was told of, and a folder beside it whose name begins alike.
    let (told, beside) = (run_folder().join("models"), run_folder().join("models-of-others"));
    put(&told.join("llama"));
    put(&told.join("closed"));
    put(&beside.join("llama"));
    fs::set_permissions(told.join("closed/config.json"), fs::Permissions::from_mode(0o600)).expect("its permissions");
    let link = told.join("elsewhere");
    if link.symlink_metadata().is_ok() {
        fs::remove_file(&link).expect("a writable run folder");
    }
    symlink(beside.join("llama"), &link).expect("a link");
    let shown = told.to_string_lossy().into_owned();
    let apply = |path: &Path| {
        let spec = json!({"model": {"uri": format!("file://{}", path.display())}, "parallelism": {"pipeline": 2, "tensor": 2}});
        namespace.apply(&manifest("on-node", &spec));
    };
    let is_refused = |path: &Path, why: (&str, &str), says: &[&str]| {
        apply(path);
        refused(&namespace, "on-node", why, says);
    };

    // The namespace: as `restricted` enforces it, without a label, and as `baseline` does.
    let llama = told.join("llama");
    let at = llama.to_string_lossy();
    is_refused(
        &llama,
        FORBIDDEN,
        &[&at, "enforce=restricted, which forbids host paths", "label it pod-security.kubernetes.io/enforce=privileged"],
    );
    seen(&namespace, "on-node", "ReconcileError");
    label(&namespace, None);
    refused(&namespace, "on-node", FORBIDDEN, &[&at, "is not labelled"]);
    label(&namespace, Some("baseline"));
    refused(&namespace, "on-node", FORBIDDEN, &[&at, "enforce=baseline, which forbids host paths"]);
    // The setting, which the label does not replace.
    label(&namespace, Some("privileged"));
    let outside = ["was told of", shown.as_str(), "sources.hostPaths"];
    is_refused(&beside.join("llama"), FORBIDDEN, &outside);
    is_refused(Path::new("/etc/hostname"), FORBIDDEN, &outside);
    assert_eq!(namespace.pods("app.kubernetes.io/managed-by=skein-operator,app.kubernetes.io/component!=router"), Vec::<Value>::new());

    // Both keys, and what is wrong all the same; a link that leads out of the folder leads nowhere.
    is_refused(&link, ("ModelResolved", "NotFound"), &[&format!("{shown}/elsewhere"), "does not exist"]);
    is_refused(&told.join("absent"), ("ModelResolved", "NotFound"), &[&format!("{shown}/absent does not exist")]);
    let closed = [&format!("{shown}/closed"), "Permission denied", "user 65532 must be able to read it on the node"];
    is_refused(&told.join("closed"), ("ModelResolved", "SourceUnreachable"), &closed);
    apply(&llama);
    namespace.ready("on-node", 1);
    namespace.gone(INSPECTORS);
    let pods = namespace.pods(WORKERS);
    assert_eq!(pods.len(), 4);
    for pod in &pods {
        let (spec, container) = (&pod["spec"], &pod["spec"]["containers"][0]);
        let volumes = spec["volumes"].as_array().expect("volumes");
        let folders: Vec<&Value> = volumes.iter().filter_map(|volume| volume.get("hostPath")).collect();
        assert_eq!(folders, [&json!({"path": shown, "type": "Directory"})], "the folder that the operator was told of, and no other");
        let mounts = container["volumeMounts"].as_array().expect("mounts");
        assert_eq!(mounts.iter().find(|mount| mount["name"] == "model").expect("the folder")["readOnly"], true);
        assert_eq!((&spec["securityContext"]["runAsNonRoot"], &spec["securityContext"]["runAsUser"]), (&json!(true), &json!(USER)));
        assert_eq!(container["securityContext"]["allowPrivilegeEscalation"], false);
        assert_eq!(container["securityContext"]["capabilities"], json!({"drop": ["ALL"]}));
    }
    assert_eq!(namespace.deployment("on-node")["status"]["cache"], Value::Null, "nothing is fetched");
    let (http, here) = (namespace.http("on-node"), llama_here());
    assert_eq!(ask(&http, &llama_body("on-node")), here);
    // Control: another request has another answer.
    let mut other = llama_body("on-node");
    other["prompt"] = json!("xyz");
    assert_ne!(ask(&http, &other), here);

    // A permission that is taken back is said, and takes nothing away.
    let before: Vec<_> = pods.iter().map(identity).collect();
    label(&namespace, Some("restricted"));
    refused(&namespace, "on-node", FORBIDDEN, &[&at, "enforce=restricted"]);
    assert_eq!(ask(&http, &llama_body("on-node")), here);
    label(&namespace, Some("privileged"));
    namespace.ready("on-node", 1);
    assert_eq!(namespace.pods(WORKERS).iter().map(identity).collect::<Vec<_>>(), before, "a worker was replaced");
    namespace.succeed(&["delete", "modeldeployment", "on-node"]);
    namespace.gone(WORKERS);
    assert!(llama.join("config.json").exists());
}

#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn a_cache_on_a_node_outlives_its_pods() {
    llama();
    let namespace = Namespace::shared("node-cache");
    let folder = run_folder().join("node-cache");
    let own = folder.join(&namespace.name);
    if own.exists() {
        fs::remove_dir_all(&own).expect("a writable run folder");
    }
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).expect("its permissions");
    chown(&folder, Some(0), Some(0)).expect("its owner");
    let spec = |tensor: u32| json!({"model": {"uri": LLAMA}, "parallelism": {"tensor": tensor}, "cache": {"policy": "NodeLocal"}});
    namespace.apply(&manifest("cached", &spec(2)));
    let shown = folder.to_string_lossy();
    refused(&namespace, "cached", FORBIDDEN, &[&shown, "enforce=restricted, which forbids host paths"]);
    assert_eq!(namespace.pods(WORKERS), Vec::<Value>::new());
    label(&namespace, Some("privileged"));
    let says = [&own.to_string_lossy(), "Permission denied", "user 65532 must be able to write to", shown.as_ref()];
    refused(&namespace, "cached", ("WeightsReady", "DownloadFailed"), &says);
    chown(&folder, Some(USER), Some(USER)).expect("its owner");
    namespace.ready("cached", 1);
    let http = namespace.http("cached");
    let before = ask(&http, &llama_body("cached"));
    assert_eq!(before, llama_here());
    assert!(fs::read_dir(own.join("parts")).expect("a cache of the namespace").count() > 1);
    let entries: BTreeSet<_> = fs::read_dir(&folder).expect("the folder").map(|entry| entry.expect("an entry").file_name()).collect();
    assert!(entries.contains(own.file_name().expect("a name")) && !entries.contains(std::ffi::OsStr::new("parts")), "{entries:?}");
    namespace.succeed(&["delete", "modeldeployment", "cached"]);
    namespace.gone(WORKERS);
    // With another split each worker needs what both had.
    namespace.apply(&manifest("cached", &spec(1)));
    namespace.ready("cached", 1);
    let pods = namespace.running(WORKERS);
    let address = pods[0]["status"]["podIP"].as_str().expect("an address");
    let (asked, small) = (asked("e2e/llama").get(address).copied().unwrap_or_default(), small());
    assert!(asked <= small, "{asked} bytes were asked for again, the small files have {small}");
    assert_eq!(ask(&namespace.http("cached"), &llama_body("cached")), before);
}
