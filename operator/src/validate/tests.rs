//! Deployments and what becomes of them, on the header of a test model.

use std::{path::Path, sync::Arc};

use plan::{dtype::DType, model::ModelHeader};
use serde_json::{Value, json};
use source::{Source, SourceOptions};

use super::*;
use crate::{
    dereference::Standing,
    host::{
        Access, Enforced, Folders,
        tests::{access, folders, privileged},
    },
};

/// A deployment with this spec.
pub(crate) fn object(spec: Value) -> ModelDeployment {
    let metadata = json!({ "name": "llama", "namespace": "models", "uid": "0b0c", "generation": 3 });
    serde_json::from_value(json!({ "apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": spec })).expect("an object")
}

/// The least spec, on two stages of two ranks.
pub(crate) fn spec() -> Value {
    json!({ "model": { "uri": "hf://org/llama" }, "parallelism": { "pipeline": 2, "tensor": 2 } })
}

/// The header of the committed llama.
pub(crate) fn header() -> Arc<ModelHeader> {
    let source = Source::open(&fixture("llama"), SourceOptions::default()).expect("the fixture");
    Arc::new(source.header().expect("its header"))
}

fn fixture(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models").join(name).display().to_string()
}

/// The same in 4 bits, which takes less than half of the time.
pub(crate) fn draft_header() -> Arc<ModelHeader> {
    Arc::new(header().loaded_as(DType::Q4_0))
}

/// The least spec, with a draft model.
pub(crate) fn drafted() -> Value {
    let mut spec = spec();
    spec["engine"] = json!({ "draft": { "model": { "uri": "hf://org/small" } } });
    spec
}

/// Everything read, and nothing standing.
pub(crate) fn fetched() -> Fetched {
    let access = Access { namespace: "models".into(), ..Access::default() };
    Fetched {
        access,
        header: Some(Ok(header())),
        draft: Some(Ok(draft_header())),
        adapters: Vec::new(),
        template: None,
        taken: None,
        standing: Standing::default(),
    }
}

pub(crate) fn valid(spec: Value) -> ValidatedDeployment {
    validate(&object(spec), &fetched()).expect("a valid deployment")
}

fn refusal(spec: Value, fetched: &Fetched) -> Rejection {
    validate(&object(spec), fetched).expect_err("a refusal")
}

/// A refusal for every reason that there is.
pub(crate) fn refusals() -> Vec<Rejection> {
    let mut wrong = spec();
    wrong["parallelism"]["pipeline"] = json!(0);
    let mut deep = spec();
    deep["parallelism"]["pipeline"] = json!(200);
    let local = json!({ "model": { "uri": "file:/models/a" } });
    let taken = Fetched { taken: Some(("llama".into(), "older".into())), ..fetched() };
    let reasons =
        ["Resolving", "InspectionWaits", "NotFound", "Unauthorized", "DigestMismatch", "SourceUnreachable", "architecture_unsupported"];
    let unresolved = reasons.map(|reason| Unresolved { reason, message: "what happened".into() });
    let sources = unresolved.map(|unresolved| refusal(spec(), &Fetched { header: Some(Err(unresolved)), ..fetched() }));
    [refusal(wrong, &fetched()), refusal(deep, &fetched()), refusal(local, &fetched()), refusal(spec(), &taken)]
        .into_iter()
        .chain(sources)
        .collect()
}

#[test]
fn a_plan_and_its_workers() {
    let one = valid(spec());
    assert_eq!((one.plan.stages.len(), one.plan.stages[0].shards.len(), one.replicas()), (2, 2, 1));
    assert_eq!(one.worker_specs().len(), 4);
    let mut asleep = spec();
    asleep["suspend"] = json!(true);
    assert_eq!(valid(asleep).replicas(), 0);
}

#[test]
fn a_draft_model_is_planned_beside_the_model() {
    let one = valid(drafted());
    let draft = one.draft.as_ref().expect("a draft model");
    assert_eq!((draft.plan.stages.len(), draft.plan.max_context), (1, one.plan.max_context));
    assert!((200..400).contains(&draft.fleet.cost) && !draft.fleet.compared, "{:?}", draft.fleet);
    let worker = one.draft_spec().expect("its worker");
    assert_eq!(
        (worker.uri.as_str(), worker.replica.as_str(), worker.shard.stage, worker.shard.rank),
        ("hf://org/small", "llama-draft", 0, 0)
    );
    assert_eq!(one.worker_specs(), valid(spec()).worker_specs(), "the model's workers are as they are without it");
}

#[test]
fn a_draft_model_that_cannot_guess_is_refused_by_its_field() {
    let refused = |fetched: Fetched| refusal(drafted(), &fetched);
    let unresolved = |reason| Fetched { draft: Some(Err(Unresolved { reason, message: "hf://org/small".into() })), ..fetched() };
    for (reason, condition, expected, part) in [
        ("NotFound", MODEL_RESOLVED, "NotFound", "check spec.engine.draft.model.uri; it is looked for again"),
        ("Unauthorized", MODEL_RESOLVED, "Unauthorized", "is shown no credentials, so name one in spec.engine.draft.model.uri"),
        ("DigestMismatch", MODEL_RESOLVED, "DigestMismatch", "correct spec.engine.draft.model.digest"),
        ("architecture_unsupported", ACCEPTED, "UnsupportedArchitecture", "deploy a model of a supported architecture"),
    ] {
        let r = refused(unresolved(reason));
        assert_eq!((r.condition, r.reason, r.until), (condition, expected, Until::Source));
        assert!(r.message.starts_with("hf://org/small; ") && r.message.contains(part), "{}", r.message);
    }
    let r = refused(Fetched { draft: None, ..fetched() });
    assert_eq!(r.reason, "Resolving", "{}", r.message);

    let encoder = Source::open(&fixture("bert"), SourceOptions::default()).and_then(|source| source.header()).expect("its header");
    for (header, part) in [
        (
            header(),
            "a token takes the draft model 1.00 of the model's time, so its guesses are never worth it; expected less than 0.50; name another",
        ),
        (Arc::new(encoder), "the draft model is an encoder, which draws no tokens; name another"),
    ] {
        let r = refused(Fetched { draft: Some(Ok(header)), ..fetched() });
        assert_eq!((r.condition, r.reason, r.until), (ACCEPTED, "PlanInfeasible", Until::Changed));
        assert!(r.message.starts_with("spec.engine.draft.model: hf://org/small cannot guess for this model: "), "{}", r.message);
        assert!(r.message.ends_with(part), "{}", r.message);
    }

    let mut of_node = drafted();
    of_node["engine"]["draft"]["model"]["uri"] = json!("file:/srv/models/small");
    let r = refusal(of_node, &Fetched { access: access(folders(), privileged()), ..fetched() });
    assert_eq!((r.reason, r.until), ("HostPathForbidden", Until::Changed));
    assert!(r.message.starts_with("spec.engine.draft.model: file:/srv/models/small is a path of a node"), "{}", r.message);
}

#[test]
fn refusals_name_the_field_and_the_next_step() {
    let mut wrong = spec();
    wrong["parallelism"]["pipeline"] = json!(0);
    let r = refusal(wrong, &fetched());
    assert_eq!((r.condition, r.reason, r.until), (ACCEPTED, "InvalidSpec", Until::Changed));
    assert!(r.message.starts_with("spec.parallelism.pipeline: "), "{}", r.message);

    let mut unknown = spec();
    unknown["modle"] = json!(1);
    assert!(refusal(unknown, &fetched()).message.contains("modle"));

    let mut deep = spec();
    deep["parallelism"]["pipeline"] = json!(200);
    let r = refusal(deep, &fetched());
    assert_eq!(r.reason, "PlanInfeasible");
    assert!(r.message.contains("200 pipeline stages"), "{}", r.message);

    let mut small = spec();
    small["workers"] = json!({ "resources": { "limits": { "memory": "1Ki" } } });
    assert_eq!(refusal(small, &fetched()).reason, "PlanInfeasible");

    let taken = Fetched { taken: Some(("llama".into(), "older".into())), ..fetched() };
    let r = refusal(spec(), &taken);
    assert_eq!((r.reason, r.until), ("NameTaken", Until::Elsewhere));
    assert!(r.message.contains("older"), "{}", r.message);
}

#[test]
fn sources_that_fail_are_tried_again() {
    for (from, condition, reason, until) in [
        ("Resolving", MODEL_RESOLVED, "Resolving", Until::Elsewhere),
        ("InspectionWaits", MODEL_RESOLVED, "SourceUnreachable", Until::Elsewhere),
        ("NotFound", MODEL_RESOLVED, "NotFound", Until::Source),
        ("Unauthorized", MODEL_RESOLVED, "Unauthorized", Until::Source),
        ("SourceUnreachable", MODEL_RESOLVED, "SourceUnreachable", Until::Source),
        ("DownloadFailed", MODEL_RESOLVED, "SourceUnreachable", Until::Source),
        ("InvalidSpec", ACCEPTED, "InvalidSpec", Until::Changed),
        ("architecture_unsupported", ACCEPTED, "UnsupportedArchitecture", Until::Source),
    ] {
        let unresolved = Unresolved { reason: from, message: "what happened".into() };
        let r = refusal(spec(), &Fetched { header: Some(Err(unresolved)), ..fetched() });
        assert_eq!((r.condition, r.reason, r.until), (condition, reason, until), "{from}");
        assert!(r.message.starts_with("what happened; "), "{}", r.message);
    }
}

#[test]
fn a_template_comes_from_its_config_map() {
    let mut spec = spec();
    spec["chat"] = json!({ "template": { "configMapKeyRef": { "name": "chat", "key": "t" } } });
    let r = refusal(spec.clone(), &fetched());
    assert_eq!((r.reason, r.until), ("InvalidSpec", Until::Elsewhere));
    assert!(r.message.contains("ConfigMap chat does not exist"), "{}", r.message);
    let text = "{{ messages }}\n---\n'\"\u{1F9A2}\u{7}";
    let there = Fetched { template: Some(("chat".into(), [("t".to_owned(), text.to_owned())].into())), ..fetched() };
    let valid = validate(&object(spec), &there).expect("a template");
    assert_eq!(valid.manifest.serving().chat_template, Some(plan::fleet::ChatTemplate::Inline(text.into())));
}

/// Models and caches on nodes need both keys; which one is missing is said, whatever is known of the model.
#[test]
fn folders_of_nodes_are_for_those_who_have_both_keys() {
    let on_node = json!({ "model": { "uri": "file:///srv/models/./a//b.gguf" }, "parallelism": { "pipeline": 2 } });
    let mut cached = spec();
    cached["cache"] = json!({ "policy": "NodeLocal" });
    for (spec, path, setting) in [(&on_node, "/srv/models/a/b.gguf", "sources.hostPaths"), (&cached, "/srv/cache", "sources.nodeCache")] {
        let with = |access: Access| Fetched { access, ..fetched() };
        let r = refusal(spec.clone(), &with(access(Folders::default(), Enforced::Unknown)));
        assert_eq!((r.condition, r.reason, r.until), (ACCEPTED, "HostPathForbidden", Until::Changed));
        assert!(r.message.contains("was told of none") && r.message.contains(setting), "{}", r.message);
        for (enforced, says) in [
            (Enforced::Level(Some("restricted".into())), "is labelled pod-security.kubernetes.io/enforce=restricted, which forbids"),
            (Enforced::Level(Some("baseline".into())), "is labelled pod-security.kubernetes.io/enforce=baseline, which forbids"),
            (Enforced::Level(Some("Privileged".into())), "is labelled pod-security.kubernetes.io/enforce=Privileged, which forbids"),
            (Enforced::Level(None), "is not labelled pod-security.kubernetes.io/enforce,"),
            (Enforced::Hidden, "let its service account get namespaces"),
            (Enforced::Unknown, "let its service account get namespaces"),
        ] {
            let r = refusal(spec.clone(), &with(access(folders(), enforced)));
            assert_eq!((r.condition, r.reason, r.until), (ACCEPTED, "HostPathForbidden", Until::Elsewhere));
            let whole = [path, "namespace models", "pod-security.kubernetes.io/enforce=privileged", says];
            assert!(whole.iter().all(|words| r.message.contains(words)), "{whole:?} in {}", r.message);
        }
        let valid = validate(&object(spec.clone()), &with(access(folders(), privileged()))).expect("both keys are there");
        assert_eq!(valid.node_folders(), [if path == "/srv/cache" { path } else { "/srv/models" }]);
    }
    // What is on no node needs neither, and has nothing of nodes.
    assert_eq!(valid(spec()).node_folders(), Vec::<&str>::new());
}

#[test]
fn a_model_on_nodes_is_planned_when_its_header_is_known() {
    let on_node = json!({ "model": { "uri": "file:/srv/models/a" } });
    let allowed = Fetched { access: access(folders(), privileged()), ..fetched() };
    let valid = validate(&object(on_node.clone()), &allowed).expect("a valid deployment");
    assert_eq!(valid.worker_specs()[0].uri, "file:/var/lib/skein/model/a");
    let r = refusal(on_node, &Fetched { header: None, ..allowed });
    assert_eq!((r.condition, r.reason, r.until), (MODEL_RESOLVED, "Resolving", Until::Elsewhere));
}

/// The adapter that the committed llama has, as if it were at `uri`.
pub(crate) fn adapter() -> Arc<plan::adapter::AdapterHeader> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models/llama-lora-a");
    let source = Source::open_adapter(&path.display().to_string(), SourceOptions::default()).expect("the fixture");
    Arc::new(source.adapter_header(&header().config).expect("its header"))
}

#[test]
fn adapters_change_neither_the_plan_nor_what_workers_are_told() {
    let mut with = spec();
    with["adapters"] = json!([{ "name": "a", "uri": "hf://org/a" }, { "name": "b", "uri": "hf://org/b" }]);
    let opened = |name: &str, header| Opened { name: name.into(), uri: format!("hf://org/{name}"), digest: None, header };
    let missing = Unresolved { reason: "NotFound", message: "hf://org/b does not exist".into() };
    let there = Fetched { adapters: vec![opened("a", Ok(adapter())), opened("b", Err(missing))], ..fetched() };
    let (bare, valid) = (valid(spec()), validate(&object(with.clone()), &there).expect("a valid deployment"));
    assert_eq!((valid.worker_specs(), valid.limits(), &valid.numerics), (bare.worker_specs(), bare.limits(), &bare.numerics));
    assert!(valid.plan.adapter_bytes > 0 && valid.plan.message.contains("adapters"), "{}", valid.plan.message);
    assert_eq!(valid.adapters[0].1.as_ref().map(|a| a.numerics.clone()), Ok(adapter().numerics("hf://org/a")));
    assert_eq!(valid.adapters[1], ("b".to_owned(), Err("hf://org/b does not exist".to_owned())));
    // What fits without adapters need not fit with them.
    let need = bare.plan.stages.iter().flat_map(|s| &s.shards).map(|s| s.weight_bytes).max().expect("a worker");
    let limited = |spec: &Value, limit: u64| {
        let mut spec = spec.clone();
        spec["engine"] = json!({ "maxBatchTokens": 16, "maxBatchSequences": 1, "maxContextTokens": 16 });
        spec["workers"] = json!({ "resources": { "limits": { "memory": limit.to_string() } } });
        validate(&object(spec), &there)
    };
    let limit = (need..need * 4).step_by(4096).find(|limit| {
        let mut alone = spec();
        alone["engine"] = json!({ "maxBatchTokens": 16, "maxBatchSequences": 1, "maxContextTokens": 16 });
        alone["workers"] = json!({ "resources": { "limits": { "memory": limit.to_string() } } });
        validate(&object(alone), &fetched()).is_ok()
    });
    let refused = limited(&with, limit.expect("a limit that does")).expect_err("a refusal");
    assert_eq!(refused.reason, "PlanInfeasible");
    assert!(refused.message.contains("take adapters away"), "{}", refused.message);
}
