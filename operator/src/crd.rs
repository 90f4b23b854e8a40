//! The CustomResourceDefinition, made from the manifest's own types.

use std::fmt::Write;

use plan::manifest::{DeploymentSpec, KIND};
use schemars::{JsonSchema, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use crate::resource::{GROUP, PLURAL, Status, VERSION};

/// Rules between fields, in CEL: path below the object (`[]` for the entries of a list), rule, message.
const RULES: [(&str, &str, &str); 29] = [
    ("", "self.metadata.name.size() <= 45", "metadata.name must have at most 45 characters"),
    ("", "!self.metadata.name.contains('.')", "metadata.name must be a DNS label"),
    (
        "",
        "!(self.metadata.name in ['skein-router', 'skein-pool'])",
        "metadata.name skein-router and skein-pool are those of the namespace's router pool",
    ),
    (
        "spec.model.uri",
        "self.matches('^(hf|s3|gs|oci|https?|pvc)://|^file:')",
        "uri must begin with hf://, s3://, gs://, oci://, http://, https://, pvc:// or file:",
    ),
    (
        "spec.model.uri",
        "!self.startsWith('pvc://') || (self.matches('^pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/[^/]+)+/?$') && !self.matches('/[.][.]?(/|$)'))",
        "uri must be pvc://CLAIM/PATH, without empty parts, . and ..",
    ),
    (
        "spec.model",
        "!has(self.credentialsSecretRef) || !self.uri.matches('^(pvc://|file:)')",
        "credentialsSecretRef must be absent where uri is pvc:// or file:, which are no server's",
    ),
    (
        "spec.model.uri",
        "!self.startsWith('file:') || (self.matches('^file:/(//)?[^/]') && !self.matches('/[.][.](/|$)'))",
        "uri must be file:/PATH on a cluster, absolute and without ..",
    ),
    (
        "spec.adapters",
        "self.all(a, a.uri.matches('^(hf|s3|gs|oci|https?)://|^file:'))",
        "the uri of each adapter must begin with hf://, s3://, gs://, oci://, http://, https:// or file:",
    ),
    (
        "",
        "!has(self.spec.adapters) || self.spec.adapters.all(a, a.name != (has(self.spec.model.name) ? self.spec.model.name : self.metadata.name))",
        "an adapter must have another name than the model",
    ),
    ("spec.model", "!has(self.aliases) || !has(self.name) || !(self.name in self.aliases)", "aliases must not hold name"),
    (
        "spec.chat.template",
        "(has(self.builtin) ? 1 : 0) + (has(self.inline) ? 1 : 0) + (has(self.configMapKeyRef) ? 1 : 0) == 1",
        "exactly one of builtin, inline and configMapKeyRef must be set",
    ),
    ("spec.parallelism", "self.pipeline * self.tensor <= 1024", "pipeline × tensor must be at most 1024"),
    (
        "spec.parallelism",
        "!has(self.stages) || self.stages.size() == self.pipeline",
        "stages must have one entry for each of the pipeline's stages",
    ),
    ("spec.autoscaling", "self.mode != 'Builtin' || has(self.maxReplicas)", "maxReplicas must be set in mode Builtin"),
    (
        "spec.autoscaling",
        "self.mode != 'Builtin' || (has(self.targets) && self.targets.size() > 0)",
        "targets must hold at least one in mode Builtin",
    ),
    (
        "spec.autoscaling",
        "!has(self.maxReplicas) || (has(self.minReplicas) ? self.minReplicas : 1) <= self.maxReplicas",
        "maxReplicas must be at least minReplicas",
    ),
    (
        "spec.autoscaling",
        "self.mode != 'External' || (!has(self.minReplicas) && !has(self.maxReplicas) && (!has(self.targets) || self.targets.size() == 0) && !has(self.behavior) && !has(self.coldStart))",
        "minReplicas, maxReplicas, targets, behavior and coldStart are of mode Builtin, and must be absent in mode External",
    ),
    (
        "spec.autoscaling",
        "self.mode != 'Builtin' || (has(self.minReplicas) && self.minReplicas == 0) || !has(self.coldStart)",
        "coldStart must be absent where minReplicas is not 0",
    ),
    (
        "spec.autoscaling",
        "self.mode != 'Builtin' || (has(self.minReplicas) && self.minReplicas == 0) || !has(self.behavior) || !has(self.behavior.idleSecondsToZero)",
        "behavior.idleSecondsToZero must be absent where minReplicas is not 0",
    ),
    ("spec.workers.tolerations.[]", "has(self.key) || self.operator == 'Exists'", "key must be set unless operator is Exists"),
    ("spec.workers.tolerations.[]", "self.operator != 'Exists' || !has(self.value)", "value must be absent where operator is Exists"),
    (
        "spec.workers.tolerations.[]",
        "!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
        "tolerationSeconds needs effect NoExecute",
    ),
    ("spec.cache", "self.policy != 'PVC' || has(self.pvcName)", "pvcName must be set with policy PVC"),
    ("spec.cache", "self.policy == 'PVC' || !has(self.pvcName)", "pvcName needs policy PVC"),
    ("spec.cache", "self.policy == 'EmptyDir' || !has(self.sizeLimit)", "sizeLimit is of policy EmptyDir: other caches are shared"),
    (
        "spec.router",
        "self.dedicated || !has(self.replicas)",
        "replicas needs dedicated: true; the pool's size is a setting of the operator",
    ),
    ("spec.engine.kvCache", "self.blockTokens == 16", "blockTokens must be 16"),
    (
        "spec.rollout",
        "self.strategy == 'RollingUpdate' || (!has(self.maxSurge) && !has(self.maxUnavailable))",
        "maxSurge and maxUnavailable need strategy RollingUpdate",
    ),
    (
        "spec.rollout",
        "!(has(self.maxSurge) && (self.maxSurge == 0 || self.maxSurge == '0%')) || (has(self.maxUnavailable) && self.maxUnavailable != 0 && self.maxUnavailable != '0%')",
        "maxSurge and maxUnavailable must not both be 0",
    ),
];

/// Columns of `kubectl get`: name, type, path, priority.
const COLUMNS: [(&str, &str, &str, u8); 11] = [
    ("Ready", "string", ".status.conditions[?(@.type==\"Ready\")].status", 0),
    ("Reason", "string", ".status.conditions[?(@.type==\"Ready\")].reason", 0),
    ("Model", "string", ".spec.model.uri", 1),
    ("PP", "integer", ".spec.parallelism.pipeline", 0),
    ("TP", "integer", ".spec.parallelism.tensor", 0),
    ("Desired", "integer", ".status.desiredReplicas", 0),
    ("Up", "integer", ".status.readyReplicas", 0),
    ("Updated", "integer", ".status.updatedReplicas", 1),
    ("Revision", "string", ".status.currentRevision", 1),
    ("URL", "string", ".status.url", 1),
    ("Age", "date", ".metadata.creationTimestamp", 0),
];

/// The definition.
pub fn definition() -> Value {
    let mut status = schema_of::<Status>();
    drop_defaults(&mut status);
    let mut schema = json!({
        "type": "object",
        "description": "A model, deployed: replicas of worker processes, and routers in front of them.",
        "required": ["spec"],
        "properties": { "spec": schema_of::<DeploymentSpec>(), "status": status },
    });
    for (path, rule, message) in RULES {
        let keys = path.split('.').filter(|key| !key.is_empty());
        let place = keys.fold(&mut schema, |node, key| if key == "[]" { &mut node["items"] } else { &mut node["properties"][key] });
        let rules = place.as_object_mut().map(|node| node.entry("x-kubernetes-validations").or_insert_with(|| json!([])));
        if let Some(Value::Array(rules)) = rules {
            rules.push(json!({ "rule": rule, "message": message }));
        }
    }
    let column = |(name, kind, path, priority): (&str, &str, &str, u8)| json!({ "name": name, "type": kind, "jsonPath": path, "priority": priority });
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": { "name": format!("{PLURAL}.{GROUP}"), "labels": { "app.kubernetes.io/part-of": "skein" } },
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND, "listKind": format!("{KIND}List"), "plural": PLURAL, "singular": "modeldeployment",
                "shortNames": ["mdep", "modeldep"], "categories": ["inference"],
            },
            "versions": [{
                "name": VERSION,
                "served": true,
                "storage": true,
                "additionalPrinterColumns": COLUMNS.map(column),
                "schema": { "openAPIV3Schema": schema },
                "subresources": {
                    "status": {},
                    "scale": {
                        "specReplicasPath": ".spec.replicas",
                        "statusReplicasPath": ".status.replicas",
                        "labelSelectorPath": ".status.selector",
                    },
                },
            }],
        },
    })
}

fn schema_of<T: JsonSchema>() -> Value {
    let settings = SchemaSettings::openapi3().with(|s| {
        s.inline_subschemas = true;
        s.meta_schema = None;
    });
    let mut schema = settings.into_generator().into_root_schema_for::<T>().to_value();
    structure(&mut schema);
    schema
}

/// Keywords that mean nothing to the API server, or that it refuses.
const DROPPED: [&str; 6] = ["$schema", "title", "nullable", "examples", "const", "deprecated"];

/// Turns a JSON schema into a structural one: one type at each node, no unions with null, unknown fields pruned rather than refused.
fn structure(schema: &mut Value) {
    let Value::Object(node) = schema else { return };
    for union in ["anyOf", "oneOf", "allOf"] {
        if let Some(Value::Array(variants)) = node.remove(union) {
            join(node, variants);
        }
    }
    if let Some(Value::Array(types)) = node.get("type") {
        let kind = types.iter().find(|t| *t != "null").cloned().unwrap_or(Value::Null);
        node.insert("type".into(), kind);
    }
    if let Some(Value::Array(values)) = node.get_mut("enum") {
        values.retain(|value| !value.is_null());
    }
    DROPPED.iter().for_each(|key| {
        node.remove(*key);
    });
    if node.get("default").is_some_and(Value::is_null) {
        node.remove("default");
    }
    if node.get("additionalProperties").is_some_and(Value::is_boolean) {
        node.remove("additionalProperties");
    }
    match node.get("format").and_then(Value::as_str) {
        Some("uint32" | "uint16" | "uint8") => drop(node.insert("format".into(), "int64".into())),
        Some("uint64" | "uint") => drop(node.insert("format".into(), "int64".into())),
        _ => {}
    }
    if let Some(Value::String(text)) = node.get_mut("description") {
        *text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    }
    if let Some(Value::Object(properties)) = node.get_mut("properties") {
        properties.values_mut().for_each(structure);
    }
    for key in ["items", "additionalProperties"] {
        node.get_mut(key).map(structure);
    }
}

/// A status is what the operator wrote, and nothing is filled into it; what tells the entries of a list apart must be there.
fn drop_defaults(schema: &mut Value) {
    let Value::Object(node) = schema else { return };
    node.remove("default");
    if let Some(keys) = node.get("x-kubernetes-list-map-keys").cloned() {
        node["items"]["required"] = keys;
    }
    if let Some(Value::Object(properties)) = node.get_mut("properties") {
        properties.values_mut().for_each(drop_defaults);
    }
    node.get_mut("items").map(drop_defaults);
}

/// Merges the variants of a union: `T or null` becomes `T`, a list of constants becomes an enumeration.
fn join(node: &mut Map<String, Value>, variants: Vec<Value>) {
    let is_null = |v: &Value| v["type"] == "null" || v["enum"] == json!([null]) || v["const"].is_null() && v.get("const").is_some();
    let variants: Vec<Value> = variants.into_iter().filter(|v| !is_null(v)).collect();
    let constants: Vec<Value> = variants
        .iter()
        .flat_map(|v| v.get("const").map(std::slice::from_ref).or(v["enum"].as_array().map(Vec::as_slice)).unwrap_or_default())
        .cloned()
        .collect();
    if variants.len() > 1 && !constants.is_empty() {
        node.insert("type".into(), "string".into());
        node.insert("enum".into(), constants.into());
        return;
    }
    for variant in variants {
        if let Value::Object(fields) = variant {
            for (key, value) in fields {
                node.entry(key).or_insert(value);
            }
        }
    }
}

/// The definition as the file in `manifests/`.
pub fn yaml() -> String {
    let mut text = String::from("# Generated from the types of the manifest (crate plan) by `cargo xtask codegen`.\n");
    write_map(&mut text, &definition(), 0);
    text
}

/// Writes the fields of an object, one a line, at `depth`.
fn write_map(text: &mut String, value: &Value, depth: usize) {
    for (key, value) in value.as_object().into_iter().flatten() {
        let _ = write!(text, "{:1$}{key}:", "", depth * 2);
        write_value(text, value, depth);
    }
}

/// Writes what follows a key or a dash.
fn write_value(text: &mut String, value: &Value, depth: usize) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            text.push('\n');
            write_map(text, value, depth + 1);
        }
        Value::Array(items) if items.iter().any(Value::is_object) => {
            text.push('\n');
            for item in items {
                // The first field stands on the dash's line, the others below it.
                let mut fields = String::new();
                write_map(&mut fields, item, depth + 1);
                let start = (depth + 1) * 2;
                let _ = write!(text, "{:1$}- ", "", depth * 2);
                text.push_str(&fields[start.min(fields.len())..]);
            }
        }
        // JSON is YAML.
        scalar => {
            let _ = writeln!(text, " {scalar}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    /// Every schema node below `schema`, with its path.
    fn nodes<'a>(path: &str, schema: &'a Value, found: &mut Vec<(String, &'a Value)>) {
        found.push((path.to_owned(), schema));
        for (name, child) in schema["properties"].as_object().into_iter().flatten() {
            nodes(&format!("{path}.{name}"), child, found);
        }
        if let Some(items) = schema.get("items") {
            nodes(&format!("{path}[]"), items, found);
        }
    }

    #[test]
    fn the_committed_definition_is_what_the_types_give() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/crd.yaml");
        let text = yaml();
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&path, &text).expect("the file can be written");
        }
        let committed = fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(committed, text, "manifests/crd.yaml is stale: run cargo xtask codegen");
        assert!(text.len() < 200 << 10, "the definition has {} bytes", text.len());
    }

    #[test]
    fn every_node_is_structural_and_every_field_is_explained() {
        let definition = definition();
        let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        let mut found = Vec::new();
        nodes("", schema, &mut found);
        assert!(found.len() > 60, "{}", found.len());
        for (path, node) in &found {
            let typed = node["type"].is_string() || node["x-kubernetes-int-or-string"] == true;
            assert!(typed, "{path} has no type: {node}");
            for key in ["anyOf", "oneOf", "allOf", "$ref", "nullable", "const", "$defs", "definitions"] {
                assert!(node.get(key).is_none(), "{path} has {key}: {node}");
            }
            if !path.is_empty() && !path.ends_with("[]") {
                assert!(node["description"].as_str().is_some_and(|d| !d.is_empty()), "{path} is not explained");
            }
        }
    }

    #[test]
    fn every_rule_stands_at_its_field() {
        let definition = definition();
        let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        for (path, rule, _) in RULES {
            let keys = path.split('.').filter(|k| !k.is_empty());
            let place = keys.fold(schema, |node, key| if key == "[]" { &node["items"] } else { &node["properties"][key] });
            assert!(place["type"].is_string(), "{path} is not a field");
            assert!(place["x-kubernetes-validations"].as_array().is_some_and(|rules| rules.iter().any(|r| r["rule"] == rule)), "{path}");
        }
    }

    #[test]
    fn defaults_are_those_of_the_parser() {
        let definition = definition();
        let spec = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"];
        assert_eq!(spec["replicas"]["default"], 1);
        assert_eq!(spec["parallelism"]["properties"]["pipeline"]["default"], 1);
        assert_eq!(spec["router"]["properties"]["policy"]["default"], "PrefixAware");
        assert_eq!(spec["router"]["properties"]["policy"]["enum"], json!(["PrefixAware", "LeastLoad", "RoundRobin", "Random"]));
        assert_eq!(spec["engine"]["properties"]["kvCache"]["default"]["blockTokens"], 16);
        let mut found = Vec::new();
        nodes("", &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"], &mut found);
        assert!(found.len() > 30 && found.iter().all(|(_, node)| node.get("default").is_none()), "a status has no defaults");
        for (path, node) in found.iter().filter(|(_, node)| node["x-kubernetes-list-type"] == "map") {
            assert_eq!(node["items"]["required"], node["x-kubernetes-list-map-keys"], "{path}: the API server wants keys to be there");
        }
    }

    #[test]
    fn yaml_holds_what_json_does() {
        let parsed: Value = serde_yaml::from_str(&yaml()).expect("it is YAML");
        assert_eq!(parsed, definition());
    }
}
