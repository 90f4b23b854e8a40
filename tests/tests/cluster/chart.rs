//! The chart: installed, tested, upgraded and uninstalled as its users do it, beside the release that other tests use.

use std::fs;

use e2e::program::{self, Finished};

use crate::{
    kubernetes::{LIMIT, Namespace, SYSTEM, WORKERS, identity, inside, kubectl, succeed},
    models::{LLAMA, llama},
};

const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/skein");

fn helm(args: &[&str]) -> Finished {
    program::finish(program::start(inside("helm").args(args)), LIMIT)
}

fn succeeds(args: &[&str]) -> String {
    let done = helm(args);
    assert!(done.status.success(), "helm {}: {}\n{}\n{}", args.join(" "), done.status, done.stdout, done.stderr);
    done.stdout
}

/// Where the release of the whole cluster has the model hub.
pub(crate) fn endpoint() -> String {
    let values: serde_json::Value =
        serde_json::from_str(&succeeds(&["get", "values", "skein", "--namespace", SYSTEM, "--output=json"])).expect("JSON");
    values["sources"]["hf"]["endpoint"].as_str().expect("a mirror").to_owned()
}

/// The cluster's own operator, put aside: two must not look after one namespace.
struct Aside;

impl Aside {
    fn put() -> Self {
        let aside = Self;
        assert!(Self::scale("0").status.success());
        succeed(&["--namespace", SYSTEM, "wait", "--for=delete", "pods", "--selector=app.kubernetes.io/instance=skein", "--timeout=60s"]);
        aside
    }

    fn scale(replicas: &str) -> Finished {
        kubectl(&["--namespace", SYSTEM, "scale", "deployment/skein-operator", "--replicas", replicas])
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        let back = Self::scale("1").status.success();
        let ready = kubectl(&["--namespace", SYSTEM, "rollout", "status", "deployment/skein-operator", "--timeout=120s"]).status.success();
        assert!(std::thread::panicking() || (back && ready), "the cluster's operator did not come back");
    }
}

/// A release that looks after its own namespace alone.
#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn a_release_is_installed_tested_upgraded_and_uninstalled() {
    llama();
    let namespace = Namespace::alone("chart");
    let _aside = Aside::put();
    let name = namespace.name.as_str();
    // An older chart: the same with another version, before a setting was made.
    let older = tempfile::tempdir().expect("a temporary folder");
    let copied = std::process::Command::new("cp").args(["--recursive", "--dereference", CHART]).arg(older.path()).status().expect("cp");
    assert!(copied.success());
    let older = older.path().join("skein");
    let about = fs::read_to_string(older.join("Chart.yaml")).expect("Chart.yaml");
    fs::write(older.join("Chart.yaml"), about.replace("\nversion: ", "\nversion: 0.0.1-before.")).expect("a writable file");

    let watched = format!("watchNamespace={name}");
    // The definition and the roles of the cluster are the other release's.
    let (mirror, model) = (format!("sources.hf.endpoint={}", endpoint()), format!("tests.model.uri={LLAMA},tests.model.digest="));
    let settings = ["--set", &watched, "--set", "crds.install=false,rbac.aggregate=false", "--set", &mirror, "--set", &model];
    let nodes = ["--set", "sources.hostPaths={/srv/models}"];
    let place = ["mine", "--namespace", name];
    let old = older.to_string_lossy().into_owned();
    let notes = succeeds(&[&["install"], &place[..], &[&old, "--wait", "--timeout=120s"], &settings].concat());
    assert!(notes.contains("helm test mine") && notes.contains("kubectl apply"), "{notes}");

    let user = format!("--as=system:serviceaccount:{name}:mine-operator");
    let looks = |at: &str| kubectl(&["get", "namespace", at, &user]).status.success();
    assert!(!looks(name), "nothing depends on it");
    succeeds(&[&["test"], &place[..], &["--timeout=240s"]].concat());
    // The test leaves nothing.
    assert_eq!(namespace.get(&["modeldeployments"])["items"].as_array().map(Vec::len), Some(0));
    namespace.gone("skein.dev/deployment=mine-test");

    let manifest = "{apiVersion: skein.dev/v1alpha1, kind: ModelDeployment, metadata: {name: tiny}, spec: {model: {uri: 'MODEL'}}}";
    namespace.apply(&manifest.replace("MODEL", LLAMA));
    namespace.ready("tiny", 1);
    let workers = || namespace.pods(WORKERS).iter().map(identity).collect::<Vec<_>>();
    let before = workers();
    succeeds(&[&["upgrade"], &place[..], &[CHART, "--wait", "--timeout=120s", "--set", "operator.replicas=2"], &settings, &nodes].concat());
    let budget = namespace.get(&["poddisruptionbudget", "mine-operator"]);
    assert_eq!(budget["spec"]["maxUnavailable"], 1);
    // It may look at its own namespace now, to see what that allows, and at no other.
    assert_eq!((looks(name), looks(SYSTEM)), (true, false));
    // Another operator leads now, and no worker was touched.
    namespace.ready("tiny", 1);
    assert_eq!(workers(), before);

    succeeds(&[&["uninstall"], &place[..], &["--wait", "--timeout=120s"]].concat());
    let selector = "app.kubernetes.io/instance=mine";
    namespace.gone(selector);
    let kinds = "deployments,pods,services,serviceaccounts,roles,rolebindings,poddisruptionbudgets,clusterroles,clusterrolebindings";
    assert_eq!(namespace.succeed(&["get", kinds, "--selector", selector, "--output=name"]), "");
    // What runs goes on without it.
    assert_eq!(workers(), before);
}

/// What an administrator of a namespace may do comes from the roles that the chart adds to.
#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn roles_are_extended() {
    let namespace = Namespace::shared("roles");
    for role in ["view", "edit"] {
        namespace.succeed(&["create", "serviceaccount", role]);
        let account = format!("--serviceaccount={}:{role}", namespace.name);
        namespace.succeed(&["create", "rolebinding", role, &format!("--clusterrole={role}"), &account]);
    }
    let may = |role: &str, verb: &str, part: &str| {
        let user = format!("--as=system:serviceaccount:{}:{role}", namespace.name);
        let subresource = format!("--subresource={part}");
        namespace.kubectl(&["auth", "can-i", verb, "modeldeployments.skein.dev", &subresource, &user]).stdout.trim() == "yes"
    };
    assert_eq!([may("view", "get", ""), may("view", "create", "")], [true, false]);
    assert_eq!([may("edit", "get", ""), may("edit", "create", ""), may("edit", "patch", "scale")], [true; 3]);
    // Nobody is given the status, which is the operator's.
    assert!(!may("edit", "patch", "status"));
}

/// Values that the chart does not have, or of another form, are refused before anything is installed.
#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn wrong_values_are_refused() {
    for (value, words) in [
        ("operator.replica=2", "replica"),
        ("operator.replicas=0", "replicas"),
        ("images.pullPolicy=Sometimes", "pullPolicy"),
        ("sources.hf.endpoint=mirror", "endpoint"),
        ("sources.hostPaths={models}", "hostPaths"),
        ("sources.hostPaths={/srv/models,/srv/../etc}", "hostPaths"),
        ("sources.hostPaths={/}", "hostPaths"),
        ("sources.nodeCache=cache", "nodeCache"),
        ("security.tls=Secret", "tls"),
        ("security.certificateSeconds=60", "certificateSeconds"),
    ] {
        let done = helm(&["template", "skein", CHART, "--set", value]);
        assert!(!done.status.success() && done.stderr.contains(words), "{value}: {}", done.stderr);
    }
    assert!(helm(&["template", "skein", CHART, "--set", "operator.replicas=2"]).status.success());
}

/// What needs a Prometheus or a Grafana is made only where it is asked for.
#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn monitors_and_dashboards_are_made_where_they_are_asked_for() {
    let rendered = |settings: &str| succeeds(&["template", "skein", CHART, "--namespace", "system", "--set", settings]);
    let plain = rendered("operator.replicas=1");
    assert!(!plain.contains("kind: PodMonitor") && !plain.contains("dashboards"), "{plain}");
    let monitored = rendered("metrics.podMonitor.enabled=true,metrics.podMonitor.labels.release=p");
    assert_eq!((monitored.matches("kind: PodMonitor").count(), monitored.matches("release: p\n").count()), (2, 2), "{monitored}");
    assert!(monitored.contains("any: true"), "{monitored}");
    let one = rendered("metrics.podMonitor.enabled=true,watchNamespace=models");
    assert!(one.contains("matchNames: [models]") && !one.contains("any: true"), "{one}");
    let shown = rendered("metrics.dashboards.enabled=true");
    assert!(shown.contains("grafana_dashboard: \"1\"") && shown.contains("\n  skein.json: |\n"), "{shown}");
    // The API server takes the map, with its dashboard in it.
    let manifest = tempfile::tempdir().expect("a temporary folder");
    let file = manifest.path().join("map.yaml");
    let only =
        succeeds(&["template", "skein", CHART, "--set", "metrics.dashboards.enabled=true", "--show-only", "templates/dashboards.yaml"]);
    fs::write(&file, only).expect("a writable file");
    let file = file.to_string_lossy();
    let taken = succeed(&["apply", "--server-side", "--dry-run=server", "--output=json", "--filename", &file]);
    let taken: serde_json::Value = serde_json::from_str(&taken).expect("JSON");
    let dashboard: serde_json::Value = serde_json::from_str(taken["data"]["skein.json"].as_str().expect("a dashboard")).expect("JSON");
    assert!(dashboard["panels"].as_array().is_some_and(|panels| panels.len() > 5), "{dashboard}");
}

/// The manifest for those without helm can be applied as it is.
#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn the_plain_manifest_is_what_the_api_server_takes() {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests/install.yaml");
    let done = kubectl(&["apply", "--server-side", "--force-conflicts", "--dry-run=server", "--filename", manifest]);
    assert!(done.status.success(), "{}", done.stderr);
    for object in ["namespace/skein-system", "deployment.apps/skein-operator", "clusterrole.rbac.authorization.k8s.io/skein-operator"] {
        assert!(done.stdout.contains(object), "{object} in {}", done.stdout);
    }
    assert!(succeed(&["get", "crd", "modeldeployments.skein.dev", "--output=name"]).contains("skein.dev"));
}
