//! Manifests that work, and what is said of those that do not.

use proptest::prelude::*;

use super::{CachePolicy, Manifest, Memory, ModelSpec, RolloutStrategy, SecretData, TaintEffect, TolerationOperator};
use crate::{
    fleet::{ChatTemplate, RoutingPolicy},
    planner::KvMemory,
    shard::KvDType,
};

const LEAST: &str = "apiVersion: skein.dev/v1alpha1
kind: ModelDeployment
metadata:
  name: tiny
spec:
  model:
    uri: file:/models/tiny
";

fn error(yaml: &str) -> String {
    Manifest::parse("m.yaml", yaml).unwrap_err().to_string()
}

#[test]
fn six_lines_are_enough() {
    let m = Manifest::parse("m.yaml", LEAST).unwrap();
    assert_eq!((m.name(), m.model_name(), m.spec().replicas), ("tiny", "tiny", 1));
    let spec = m.planner_spec();
    assert_eq!((spec.pipeline, spec.tensor, spec.max_batch_sequences, spec.kv_memory), (1, 1, 64, KvMemory::Auto));
    assert!(m.spec().engine.kv_cache.prefix_caching);
    let serving = m.serving();
    assert_eq!((serving.policy, serving.queue_requests, serving.queue_seconds), (RoutingPolicy::PrefixAware, 1000, 60));
    assert_eq!(serving.prompt_lookup, 0, "what guesses is asked for");
}

#[test]
fn every_field_has_an_effect() {
    let m = Manifest::parse(
        "m.yaml",
        &format!(
            "{LEAST}    name: served
    aliases: [other, third]
    digest: sha256:{}
    format: GGUF
  chat:
    template: {{builtin: Gemma}}
    systemPrompt: be brief
  engine:
    dtype: Auto
    device: CPU
    maxContextTokens: 100
    maxBatchSequences: 5
    maxBatchTokens: 6
    screening: true
    kvCache: {{blockTokens: 16, memory: 1Gi, prefixCaching: false, dtype: F32}}
    draft: {{promptLookup: 9, model: {{uri: hf://a/small}}}}
  parallelism:
    pipeline: 2
    tensor: 3
    stages: [{{layers: 1}}, {{layers: 3}}]
  replicas: 4
  workers:
    resources: {{limits: {{memory: 3Gi}}}}
    nodeSelector: {{example.com/pool: big}}
    tolerations:
    - {{key: example.com/gpu, value: a100, effect: NoSchedule}}
    - {{operator: Exists, effect: NoExecute, tolerationSeconds: 30}}
  router:
    policy: RoundRobin
    queue: {{maxRequests: 7, timeoutSeconds: 8}}
  rollout: {{strategy: RollingUpdate, maxSurge: 25%, maxUnavailable: 1, paused: true, progressDeadlineSeconds: 9, revisionHistoryLimit: 2}}
  recovery: {{drainSeconds: 10}}
  scheduling: {{gang: false}}
  suspend: true
",
            "a".repeat(64)
        ),
    )
    .unwrap();
    assert_eq!((m.model_name(), m.spec().model.aliases.len(), m.spec().replicas), ("served", 2, 4));
    let spec = m.planner_spec();
    assert_eq!((spec.pipeline, spec.tensor, spec.stage_layers), (2, 3, Some(vec![1, 3])));
    assert_eq!((spec.max_context, spec.max_batch_sequences, spec.max_batch_tokens), (Some(100), 5, 6));
    assert_eq!((spec.kv_memory, spec.kv_dtype), (KvMemory::Bytes(1 << 30), Some(KvDType::F32)));
    assert_eq!((spec.worker_memory, spec.screening), (Some(3 << 30), true));
    let workers = &m.spec().workers;
    assert_eq!(workers.node_selector["example.com/pool"], "big");
    let [first, second] = &workers.tolerations[..] else { panic!("{workers:?}") };
    assert_eq!(
        (first.operator, first.value.as_deref(), first.effect),
        (TolerationOperator::Equal, Some("a100"), Some(TaintEffect::NoSchedule))
    );
    assert_eq!((second.operator, second.key.as_deref(), second.toleration_seconds), (TolerationOperator::Exists, None, Some(30)));
    let serving = m.serving();
    assert_eq!((serving.chat_template, serving.system_prompt.as_deref()), (Some(ChatTemplate::Gemma), Some("be brief")));
    assert_eq!((serving.policy, serving.queue_requests, serving.queue_seconds), (RoutingPolicy::RoundRobin, 7, 8));
    assert_eq!(serving.prompt_lookup, 9);
    assert!(!m.spec().engine.kv_cache.prefix_caching);
    let rollout = &m.spec().rollout;
    assert_eq!((rollout.strategy, rollout.bounds(5), rollout.paused), (RolloutStrategy::RollingUpdate, (2, 1), true));
    assert_eq!((rollout.progress_deadline_seconds, rollout.revision_history_limit), (9, 2));
    assert_eq!((m.spec().recovery.drain_seconds, m.spec().scheduling.gang, m.spec().suspend), (10, false, true));
}

#[test]
fn errors_name_line_column_field_and_expectation() {
    let cases: &[(&str, &[&str])] = &[
        ("  engine:\n    maxTokens: 3\n", &["m.yaml:9:5", "spec.engine.maxTokens", "unknown field", "maxBatchTokens"]),
        ("  replicas: many\n", &["m.yaml:8:13", "spec.replicas", "whole number", "\"many\""]),
        ("  replicas: -1\n", &["m.yaml:8:13", "spec.replicas", "-1"]),
        ("  replicas: 1001\n", &["m.yaml:8:13", "spec.replicas", "0 to 1000", "1001"]),
        ("  engine:\n    device: CUDA\n", &["m.yaml:9:13", "spec.engine.device", "CUDA is not supported yet", "CPU"]),
        ("  engine:\n    device: TPU\n", &["spec.engine.device", "Auto, CPU", "\"TPU\""]),
        ("  autoscaling: {coldStart: {progressEvents: true}}\n", &["m.yaml:8:29", "progressEvents", "not supported yet"]),
        ("  autoscaling: {behavior: {schedules: []}}\n", &["m.yaml:8:28", "schedules", "not supported yet"]),
        ("  parallelism: 3\n", &["m.yaml:8:16", "spec.parallelism", "a mapping", "3"]),
        ("  parallelism: {pipeline: 0}\n", &["m.yaml:8:27", "spec.parallelism.pipeline", "1 to 256"]),
        ("  parallelism: {pipeline: 64, tensor: 32}\n", &["spec.parallelism", "1024", "2048"]),
        ("  parallelism: {pipeline: 2, stages: [{layers: 1}]}\n", &["spec.parallelism.stages", "2 stages, got 1"]),
        ("  parallelism: {pipeline: 1, stages: [{layers: x}]}\n", &["m.yaml:8:48", "spec.parallelism.stages[0].layers"]),
        ("  parallelism: {stages: [{layers: 0}]}\n", &["m.yaml:8:35", "spec.parallelism.stages[0].layers", "at least 1"]),
        ("  engine: {kvCache: {blockTokens: 32}}\n", &["spec.engine.kvCache.blockTokens", "expected 16, got 32"]),
        ("  engine: {kvCache: {memory: lots}}\n", &["m.yaml:8:30", "spec.engine.kvCache.memory", "512Mi", "lots"]),
        ("  chat: {template: {builtin: Gemma, inline: x}}\n", &["spec.chat.template", "exactly one", "got 2"]),
        ("  chat: {template: {}}\n", &["spec.chat.template", "exactly one", "got 0"]),
        ("  chat: {template: {configMapKeyRef: {name: a, key: b}}}\n", &["m.yaml:8:38", "ConfigMap a is not in the file"]),
        ("    uri: hf://a/b\n", &["m.yaml:8:5", "uri"]),
        ("    aliases: [tiny]\n", &["m.yaml:8:15", "spec.model.aliases[0]", "tiny"]),
        ("    digest: abc\n", &["spec.model.digest", "64 hexadecimal"]),
        ("    name: 12\n", &["m.yaml:8:11", "spec.model.name", "text"]),
        ("  workers: {resources: {limits: {memory: much}}}\n", &["m.yaml:8:42", "spec.workers.resources.limits.memory", "512Mi", "much"]),
        ("  workers: {resources: {limits: {memory: 0.5}}}\n", &["spec.workers.resources.limits.memory", "0.5"]),
        ("  workers: {resources: {limits: {cpu: 2}}}\n", &["spec.workers.resources.limits.cpu", "not supported yet"]),
        ("  workers: {nodeSelector: {-a: b}}\n", &["m.yaml:8:32", "spec.workers.nodeSelector.-a", "example.com/gpu", "\"-a\""]),
        ("  workers: {nodeSelector: {a: b c}}\n", &["m.yaml:8:31", "spec.workers.nodeSelector.a", "\"b c\""]),
        ("  workers: {nodeSelector: {a: true}}\n", &["m.yaml:8:31", "spec.workers.nodeSelector.a", "text", "true"]),
        ("  workers: {tolerations: [{value: x}]}\n", &["spec.workers.tolerations[0].key", "operator Exists"]),
        ("  workers: {tolerations: [{key: a, operator: Exists, value: x}]}\n", &["m.yaml:8:61", "tolerations[0].value", "operator Exists"]),
        ("  workers: {tolerations: [{key: a, operator: Some}]}\n", &["tolerations[0].operator", "Equal, Exists", "\"Some\""]),
        ("  workers: {tolerations: [{key: a, tolerationSeconds: 3}]}\n", &["tolerations[0].tolerationSeconds", "NoExecute"]),
        ("  workers: {tolerations: [{key: a/b/c}]}\n", &["tolerations[0].key", "\"a/b/c\""]),
        ("  engine: {maxContextTokens: 4294967296}\n", &["m.yaml:8:30", "spec.engine.maxContextTokens", "4294967296"]),
        ("  engine: {maxContextTokens: 1.5}\n", &["spec.engine.maxContextTokens", "whole number", "1.5"]),
        ("  engine: {maxContextTokens: true}\n", &["spec.engine.maxContextTokens", "whole number", "true"]),
        ("  engine: {draft: {promptLookup: 17}}\n", &["spec.engine.draft.promptLookup", "expected 0 to 16, got 17"]),
        ("  engine: {draft: {model: hf://a/b}}\n", &["m.yaml:8:27", "spec.engine.draft.model"]),
        ("  engine: {draft: {model: {uri: pvc://a/b}}}\n", &["spec.engine.draft.model.uri", "a model alone may be on a claim"]),
        ("  engine: {draft: {model: {uri: file:a, digest: 3f}}}\n", &["spec.engine.draft.model.digest", "64 hexadecimal"]),
        ("  engine: {kvCache: {prefixCaching: yes}}\n", &["spec.engine.kvCache.prefixCaching", "true or false", "\"yes\""]),
        ("  rollout: {maxSurge: 2}\n", &["m.yaml:8:23", "spec.rollout.maxSurge", "strategy RollingUpdate", "Auto"]),
        ("  rollout: {strategy: RollingUpdate, maxSurge: 0}\n", &["spec.rollout", "maxSurge or maxUnavailable above 0"]),
        ("  rollout: {strategy: RollingUpdate, maxSurge: 101%}\n", &["spec.rollout.maxSurge", "0% to 100%", "101%"]),
        ("  rollout: {strategy: Canary}\n", &["spec.rollout.strategy", "Auto, RollingUpdate, Recreate"]),
        ("  rollout: {progressDeadlineSeconds: 0}\n", &["spec.rollout.progressDeadlineSeconds", "1 to 86400"]),
        ("  recovery: {drainSeconds: 86401}\n", &["spec.recovery.drainSeconds", "0 to 86400"]),
        ("  adapters: [{name: A, uri: file:/a}]\n", &["m.yaml:8:21", "spec.adapters[0].name", "lower-case letters", "\"A\""]),
        ("  adapters: [{name: '', uri: file:/a}]\n", &["spec.adapters[0].name", "1 to 64"]),
        ("  adapters: [{name: tiny, uri: file:/a}]\n", &["spec.adapters[0].name", "another name than the model's", "tiny"]),
        ("  adapters: [{name: a, uri: file:/a}, {name: a, uri: file:/b}]\n", &["m.yaml:8:46", "spec.adapters[1].name", "a again"]),
        ("  adapters: [{name: a, uri: ftp://b/k}]\n", &["spec.adapters[0].uri", "expected hf://, s3://"]),
        ("  adapters: [{name: a, uri: pvc://b/k}]\n", &["spec.adapters[0].uri", "a model alone may be on a claim"]),
        ("  adapters: [{name: a, uri: file:/a, digest: abc}]\n", &["spec.adapters[0].digest", "64 hexadecimal"]),
        ("  adapters: [{name: a}]\n", &["spec.adapters[0]", "uri", "missing"]),
        ("  replicas: 1\n  replicas: 2\n", &["m.yaml:9:3", "replicas"]),
        ("  chat: {template: {inline: [x]}}\n", &["m.yaml:8:29", "spec.chat.template.inline", "text"]),
        ("  replicas: [1\n", &["m.yaml:"]),
    ];
    for (tail, parts) in cases {
        let got = error(&format!("{LEAST}{tail}"));
        for part in *parts {
            assert!(got.contains(part), "{tail:?} says {got:?}, without {part:?}");
        }
    }
}

#[test]
fn errors_of_whole_documents() {
    for (from, to, parts) in [
        ("file:/models/tiny", "ftp://b/k", ["spec.model.uri", "expected hf://, s3://"]),
        ("file:/models/tiny", "/models/tiny", ["m.yaml:7:10", "spec.model.uri"]),
        ("name: tiny", "name: Tiny_1", ["m.yaml:4:9", "metadata.name"]),
        ("name: tiny", "namespace: x", ["metadata", "the field name is missing"]),
        ("skein.dev/v1alpha1", "skein.dev/v2", ["m.yaml:1:13", "expected skein.dev/v1alpha1"]),
        ("ModelDeployment", "Deployment", ["m.yaml:2:7", "expected ModelDeployment"]),
        ("    uri: file:/models/tiny\n", "    {}\n", ["spec.model", "the field uri is missing"]),
        ("kind: ModelDeployment\n", "", ["kind", "missing"]),
    ] {
        let got = error(&LEAST.replace(from, to));
        assert!(parts.iter().all(|p| got.contains(p)), "{to:?} says {got:?}, expected {parts:?}");
    }
    assert!(error("").contains("expected a document of kind ModelDeployment"));
    let other = LEAST.replace("name: tiny", "name: other");
    assert!(error(&format!("{LEAST}---\n{other}")).contains("expected one ModelDeployment, got 2"));
    assert_eq!(Manifest::parse_all("m.yaml", &format!("{LEAST}---\n{other}")).unwrap().len(), 2);
}

#[test]
fn two_deployments_of_one_name_are_refused() {
    let parse = |second: &str| Manifest::parse_all("m.yaml", &format!("{LEAST}---\n{second}")).map(|all| all.len());
    let refused = |second: &str| parse(second).unwrap_err().to_string();
    let got = refused(LEAST);
    assert!(got.contains("metadata.name: ModelDeployment tiny stands in the file twice") && got.starts_with("m.yaml:12:9:"), "{got}");
    let other = LEAST.replace("name: tiny", "name: other");
    let got = refused(&format!("{other}    name: tiny\n"));
    assert!(got.contains("spec.model.name: the model name tiny is taken by tiny"), "{got}");
    let got = refused(&format!("{other}    aliases: [a, tiny]\n"));
    assert!(got.contains("spec.model.aliases: the model name tiny is taken"), "{got}");
    assert_eq!(parse(&format!("{other}    aliases: [a, b]\n")).unwrap(), 2);
    assert_eq!(parse(&LEAST.replace("name: tiny", "name: tiny\n  namespace: elsewhere")).unwrap(), 2);
}

#[test]
fn a_key_that_stands_twice_is_refused_in_plain_words() {
    let got = error(&format!("{LEAST}kind: ModelDeployment\n"));
    assert!(got.contains("duplicate mapping key: kind") && !got.contains("Policy"), "{got}");
}

#[test]
fn config_map_of_the_same_file_is_the_template() {
    let map = "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: chat}\ndata:\n  t: '{{ messages }}'\n---\napiVersion: v1\nkind: Secret\nmetadata: {name: s}\nstringData: {a: b}\n";
    let deployment = format!("{LEAST}  chat: {{template: {{configMapKeyRef: {{name: chat, key: t}}}}}}\n");
    let m = Manifest::parse("m.yaml", &format!("{deployment}{map}")).unwrap();
    assert_eq!(m.chat_template, Some(ChatTemplate::Inline("{{ messages }}".into())));
    let wrong = error(&format!("{}{map}", deployment.replace("key: t", "key: u")));
    assert!(wrong.contains("has no key u, it has t"), "{wrong}");
}

#[test]
fn two_config_maps_of_one_name_are_refused() {
    let map = "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: chat}\ndata: {t: x}\n";
    let got = error(&format!("{LEAST}{map}{map}"));
    assert!(got.contains("metadata.name") && got.contains("chat") && got.contains("m.yaml:16:18"), "{got}");
    let apart = map.replace("{name: chat}", "{name: chat, namespace: other}");
    assert!(Manifest::parse("m.yaml", &format!("{LEAST}{map}{apart}")).is_ok());
}

#[test]
fn a_secret_of_the_file_gives_the_credentials() {
    let least = LEAST.replace("file:/models/tiny", "hf://org/tiny");
    let manifest = format!("{least}    credentialsSecretRef: {{name: hub}}\n");
    let secret = |data: &str| format!("---\napiVersion: v1\nkind: Secret\ntype: Opaque\nmetadata: {{name: hub}}\n{data}\n");
    let other = "---\napiVersion: v1\nkind: Secret\nmetadata: {name: other}\nstringData: {token: no}\n";
    let read = |data: &str| Manifest::parse("m.yaml", &format!("{manifest}{other}{}", secret(data))).expect("valid").credentials;
    let token = |text: &str| Some(SecretData([("token".to_owned(), text.as_bytes().to_vec())].into()));
    assert_eq!(read("data: {token: aGZfYWJj}"), token("hf_abc"));
    assert_eq!(read("data: {token: aGZfYWJj}\nstringData: {token: wins}"), token("wins"));
    assert_eq!(format!("{:?}", read("stringData: {token: hidden}")), "Some({\"token\"})");
    // Where it is not in the file, it may be elsewhere; one that is named nowhere is not read.
    assert_eq!(Manifest::parse("m.yaml", &format!("{manifest}{other}")).expect("valid").credentials, None);
    assert_eq!(Manifest::parse("m.yaml", &format!("{LEAST}{other}")).expect("valid").credentials, None);
    let got = error(&format!("{manifest}{}", secret("data: {token: '%secret%'}")));
    assert!(got.contains("token is not base64") && !got.contains("%secret%"), "{got}");
    let got = error(&format!("{least}    credentialsSecretRef: {{name: A_b}}\n"));
    assert!(got.contains("spec.model.credentialsSecretRef.name: expected lower-case letters"), "{got}");
}

#[test]
fn a_model_may_be_on_a_claim() {
    let read = |uri: &str, more: &str| Manifest::parse("m.yaml", &LEAST.replace("file:/models/tiny", &format!("'{uri}'{more}")));
    for (uri, volume) in [
        ("pvc://models/a/b.gguf", ("models", "a/b.gguf")),
        ("pvc://team.models/folder/", ("team.models", "folder/")),
        ("pvc://m/..a b", ("m", "..a b")),
    ] {
        read(uri, "").expect("valid");
        assert_eq!(ModelSpec::volume(uri), Some(volume));
    }
    assert_eq!(ModelSpec::volume("hf://a/b"), None);
    for uri in ["pvc://", "pvc://m", "pvc://m/", "pvc:///a", "pvc://M/a", "pvc://m//a", "pvc://m/a/../b", "pvc://m/.", "pvc://m/a//"] {
        let got = read(uri, "").expect_err("refused").to_string();
        assert!(got.contains("spec.model.uri: expected pvc://CLAIM/PATH"), "{uri}: {got}");
    }
    let got = read("pvc://m/a", "\n    credentialsSecretRef: {name: a}").expect_err("refused").to_string();
    assert!(got.contains("spec.model.credentialsSecretRef: expected none beside a pvc:// uri"), "{got}");
    let got = error(&format!("{LEAST}    credentialsSecretRef: {{name: a}}\n"));
    assert!(got.contains("spec.model.credentialsSecretRef: expected none beside a file: uri"), "{got}");
}

#[test]
fn paths_of_a_machine_are_known() {
    for (uri, path) in [("file:/a/b", "/a/b"), ("file:///a", "/a"), ("file:a", "a"), ("file://a", "a"), ("file:////a", "//a")] {
        assert_eq!(ModelSpec::path(uri), Some(path), "{uri}");
    }
    assert_eq!((ModelSpec::path("/a"), ModelSpec::path("pvc://a/b")), (None, None));
}

#[test]
fn a_cache_is_a_folder_or_a_claim() {
    let cache = |text: &str| Manifest::parse("m.yaml", &format!("{LEAST}  cache: {text}\n")).map(|m| m.spec().cache.clone());
    let claim = cache("{policy: PVC, pvcName: weights}").expect("valid");
    assert_eq!((claim.policy, claim.pvc_name.as_deref()), (CachePolicy::PVC, Some("weights")));
    assert_eq!(cache("{policy: NodeLocal}").expect("valid").policy, CachePolicy::NodeLocal);
    assert_eq!(cache("{sizeLimit: 10Gi}").expect("valid").size_limit.map(|b| b.0), Some(10 << 30));
    for (text, said) in [
        ("{policy: PVC}", "spec.cache: expected pvcName beside policy PVC"),
        ("{pvcName: weights}", "spec.cache.pvcName: expected policy PVC beside it"),
        ("{policy: PVC, pvcName: a, sizeLimit: 1Gi}", "spec.cache.sizeLimit: expected policy EmptyDir beside it"),
        ("{policy: PVC, pvcName: A/b}", "spec.cache.pvcName: expected lower-case letters"),
        ("{policy: NodeLocal, pvcName: a}", "spec.cache.pvcName: expected policy PVC beside it, got NodeLocal"),
        ("{policy: NodeLocal, sizeLimit: 1Gi}", "spec.cache.sizeLimit: expected policy EmptyDir beside it, got NodeLocal"),
    ] {
        let got = cache(text).expect_err("refused").to_string();
        assert!(got.contains(said), "{got}");
    }
}

/// Every field of the resource's design is there or refused by name: none is accepted and ignored, none is a mystery.
#[test]
fn fields_that_are_not_there_yet_say_so() {
    let fields = [
        "model.revision",
        "model.files",
        "model.caBundleRef",
        "model.tokenizerURI",
        "chat.defaults",
        "rollout.partition",
        "rollout.canary",
        "recovery.policy",
        "recovery.maxRestarts",
        "recovery.backoffSeconds",
        "scheduling.schedulerName",
        "scheduling.priorityClassName",
        "scheduling.queueName",
        "scheduling.topology",
        "cache.claimTemplate",
        "access",
        "security",
        "observability",
        "experimental",
        "workers.image",
        "workers.env",
        "workers.serviceAccountName",
        "workers.podTemplateOverlay",
        "workers.resources.requests",
        "router.apis",
        "router.service",
        "router.gateway",
        "router.inferencePool",
    ];
    for field in fields {
        let parts: Vec<&str> = field.split('.').collect();
        // The model stands in the minimal manifest already.
        let (depth, parts) = if parts[0] == "model" { (2, &parts[1..]) } else { (1, &parts[..]) };
        let lines: String = parts
            .iter()
            .enumerate()
            .map(|(i, p)| format!("{}{p}:{}", "  ".repeat(depth + i), if i + 1 < parts.len() { "\n" } else { " 1\n" }))
            .collect();
        let got = error(&format!("{LEAST}{lines}"));
        assert!(got.contains(&format!("spec.{field}: is not supported yet")), "{got}");
    }
    for (field, value) in [("engine: {dtype: BF16}", "BF16"), ("engine: {device: CUDA}", "CUDA")] {
        let got = error(&format!("{LEAST}  {field}\n"));
        assert!(got.contains(&format!("{value} is not supported yet")), "{got}");
    }
    let got = error(&format!("{LEAST}    format: PyTorch\n"));
    assert!(got.contains("PyTorch is not supported yet"), "{got}");
    let planned = error(&format!("{LEAST}  frobnicate: 1\n"));
    assert!(planned.contains("unknown field") && !planned.contains("not supported yet"), "{planned}");
}

#[test]
fn a_memory_limit_is_one_of_the_plan() {
    let model = crate::samples::Sample::llama().model();
    let of = |tail: &str| Manifest::parse("m.yaml", &format!("{LEAST}{tail}")).unwrap();
    let capacity = crate::planner::Capacity { memory_bytes: Some(1 << 30) };
    let plan = of("  workers: {resources: {limits: {memory: 1Ki}}}\n").plan(&model, &capacity).unwrap();
    assert!(!plan.fits && plan.message.contains("of 1024 bytes of memory"), "{}", plan.message);
    let plan = of("  workers: {resources: {limits: {memory: 8Gi}}}\n").plan(&model, &capacity).unwrap();
    assert!(plan.fits && plan.message.contains("of 1073741824 bytes of memory"), "{}", plan.message);
    let error = of("    format: Safetensors\n").plan(&model, &capacity).unwrap_err();
    assert_eq!(error.to_string(), "the weights are GGUF, expected Safetensors");
}

#[test]
fn null_means_absent() {
    let m = Manifest::parse("m.yaml", &format!("{LEAST}  engine:\n  chat: ~\n")).unwrap();
    assert_eq!(m.spec().engine, super::EngineSpec::default());
    assert!(error(&format!("{LEAST}  nothing:\n")).contains("unknown field"));
}

#[test]
fn bombs_are_refused() {
    let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for i in 1..9 {
        let refs = vec![format!("*a{}", i - 1); 10].join(", ");
        bomb += &format!("a{i}: &a{i} [{refs}]\n");
    }
    assert!(Manifest::parse("m.yaml", &bomb).is_err());
    assert!(Manifest::parse("m.yaml", &"[".repeat(100_000)).is_err());
    assert!(Manifest::parse("m.yaml", &"a: ".repeat(1000)).is_err());
    assert!(error(&" ".repeat(2 << 20)).contains("bytes"));
}

#[test]
fn types_survive_json() {
    let yaml = format!("{LEAST}  engine: {{kvCache: {{memory: 0.5}}}}\n");
    let m = Manifest::parse("m.yaml", &yaml).unwrap();
    assert_eq!(m.spec().engine.kv_cache.memory, Some(Memory::Fraction(0.5)));
    let json = serde_json::to_string(&m.deployment).unwrap();
    assert_eq!(serde_json::from_str::<super::ModelDeployment>(&json).unwrap(), m.deployment);
}

#[test]
fn samples_are_valid() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/samples");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let m = Manifest::parse(&path.display().to_string(), &std::fs::read_to_string(&path).unwrap()).unwrap();
        assert!(!m.spec().model.uri.is_empty());
        seen += 1;
    }
    assert!(seen > 0);
}

proptest! {
    #[test]
    fn mutated_manifests_never_panic(at in 0..LEAST.len(), byte in any::<u8>(), cut in any::<bool>()) {
        let mut bytes = LEAST.as_bytes().to_vec();
        if cut { bytes.truncate(at) } else { bytes[at] = byte }
        if let Ok(text) = String::from_utf8(bytes) {
            let _ = Manifest::parse_all("m.yaml", &text);
        }
    }
}

#[test]
fn autoscaling_is_read_with_its_defaults() {
    use super::{AutoscalingMode, Builtin, TargetKind};
    let of = |tail: &str| Manifest::parse("m.yaml", &format!("{LEAST}{tail}")).unwrap();
    let absent = of("");
    assert_eq!((absent.spec().autoscaling.mode, absent.spec().autoscaling.builtin()), (AutoscalingMode::Disabled, None));
    assert_eq!(absent.serving().hold, None);
    let least = of("  autoscaling: {mode: Builtin, maxReplicas: 3, targets: [{type: QueueDepth, value: 4}]}\n");
    let expected =
        Builtin { min: 1, max: 3, targets: vec![(TargetKind::QueueDepth, 4.0)], up_seconds: 0, down_seconds: 300, idle_seconds: 300 };
    assert_eq!(least.spec().autoscaling.builtin(), Some(expected));
    assert_eq!(least.serving().hold, None, "there is always a replica");
    let zero = of(
        "  autoscaling: {mode: Builtin, minReplicas: 0, maxReplicas: 3, targets: [{type: TTFTP90, value: 500m}, {type: KVCacheUtilization, \
                   value: 0.8}], behavior: {scaleUpStabilizationSeconds: 5, scaleDownStabilizationSeconds: 6, idleSecondsToZero: 7}, coldStart: \
                   {maxHeldRequests: 8, holdTimeoutSeconds: 9}}\n",
    );
    let builtin = zero.spec().autoscaling.builtin().unwrap();
    assert_eq!(builtin.targets, [(TargetKind::TTFTP90, 0.5), (TargetKind::KVCacheUtilization, 0.8)]);
    assert_eq!((builtin.min, builtin.up_seconds, builtin.down_seconds, builtin.idle_seconds), (0, 5, 6, 7));
    assert_eq!(zero.serving().hold, Some(crate::fleet::HoldSettings { requests: 8, seconds: 9 }));
    let external = of("  autoscaling: {mode: External}\n");
    assert_eq!((external.spec().autoscaling.builtin(), external.serving().hold), (None, None));
    // What is written is what was read.
    let again = serde_json::to_string(zero.spec()).unwrap();
    assert_eq!(serde_yaml::from_str::<super::DeploymentSpec>(&again).unwrap(), *zero.spec());
}

#[test]
fn autoscaling_that_makes_no_sense_is_refused() {
    let target = "targets: [{type: QueueDepth, value: 4}]";
    let builtin = format!("mode: Builtin, maxReplicas: 3, {target}");
    for (text, parts) in [
        ("mode: Sometimes", &["spec.autoscaling.mode", "Builtin", "Sometimes"][..]),
        (&format!("mode: Builtin, {target}"), &["spec.autoscaling.maxReplicas", "mode Builtin, got none"]),
        ("mode: Builtin, maxReplicas: 3", &["spec.autoscaling.targets", "at least one"]),
        (
            &format!("mode: Builtin, minReplicas: 4, maxReplicas: 3, {target}"),
            &["spec.autoscaling.maxReplicas", "at least minReplicas 4, got 3"],
        ),
        (&format!("mode: Builtin, maxReplicas: 1001, {target}"), &["spec.autoscaling.maxReplicas", "1 to 1000, got 1001"]),
        ("mode: External, maxReplicas: 3", &["spec.autoscaling.maxReplicas", "got External"]),
        (&format!("mode: External, {target}"), &["spec.autoscaling.targets", "got External"]),
        (&format!("{builtin}, coldStart: {{}}"), &["spec.autoscaling.coldStart", "minReplicas 0 beside it, got 1"]),
        (&format!("{builtin}, behavior: {{idleSecondsToZero: 5}}"), &["spec.autoscaling.behavior.idleSecondsToZero", "minReplicas 0"]),
        (&format!("{builtin}, behavior: {{scaleUpStabilizationSeconds: 3601}}"), &["scaleUpStabilizationSeconds", "0 to 3600"]),
        ("mode: Builtin, maxReplicas: 3, targets: [{type: QueueDepth, value: 0}]", &["targets[0].value", "above 0"]),
        ("mode: Builtin, maxReplicas: 3, targets: [{type: QueueDepth, value: much}]", &["targets[0].value", "above 0", "much"]),
        ("mode: Builtin, maxReplicas: 3, targets: [{type: KVCacheUtilization, value: 80}]", &["targets[0].value", "up to 1", "80"]),
        (
            "mode: Builtin, maxReplicas: 3, targets: [{type: TTFTP90, value: 1}, {type: TTFTP90, value: 2}]",
            &["targets[1].type", "TTFTP90 again"],
        ),
        ("mode: Builtin, maxReplicas: 3, targets: [{type: CPU, value: 1}]", &["targets[0].type", "QueueDepth", "CPU"]),
    ] {
        let got = error(&format!("{LEAST}  autoscaling: {{{text}}}\n"));
        for part in parts {
            assert!(got.contains(part), "{text:?} says {got:?}, without {part:?}");
        }
    }
    // Switched off, settings may stay for another time.
    assert!(Manifest::parse("m.yaml", &format!("{LEAST}  autoscaling: {{mode: Disabled, maxReplicas: 3, {target}}}\n")).is_ok());
}
