//! What all pods have in common: Pod Security `restricted`, no credentials.

use plan::manifest::WorkersSpec;
use serde_json::{Value, json};

use crate::names;

/// User and group that everything runs as; the image's too.
pub(crate) const USER: u32 = 65532;
/// Folder of the worker's specification.
pub(super) const SPEC: &str = "/etc/skein/spec";
/// Folder of fetched weights.
pub(super) const CACHE: &str = "/var/cache/skein";

/// Folder of the volume that a model is on.
pub(crate) const MODEL: &str = "/var/lib/skein/model";
/// Folder of what a source is shown.
pub(super) const CREDENTIALS: &str = "/etc/skein/credentials";

/// Folder of a process's certificate.
const IDENTITY: &str = "/etc/skein/identity";
/// Mode of secret files: for the group of the pod alone.
const SECRET_MODE: u32 = 0o440;

/// A pod of one container.
pub(crate) fn template(account: &str, grace_seconds: u32, container: Value) -> Value {
    json!({
        "serviceAccountName": account,
        "automountServiceAccountToken": false,
        "enableServiceLinks": false,
        "terminationGracePeriodSeconds": grace_seconds,
        "securityContext": {
            "runAsNonRoot": true,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": { "type": "RuntimeDefault" },
        },
        "containers": [container],
    })
}

/// Has it run where a deployment's workers may.
pub(crate) fn schedule(pod: &mut Value, workers: &WorkersSpec) {
    if !workers.node_selector.is_empty() {
        pod["nodeSelector"] = json!(workers.node_selector);
    }
    if !workers.tolerations.is_empty() {
        pod["tolerations"] = json!(workers.tolerations);
    }
}

/// Appends arguments of a container.
pub(super) fn with_args(container: &mut Value, more: [&str; 2]) {
    if let Some(args) = container["args"].as_array_mut() {
        args.extend(more.map(Value::from));
    }
}

/// Has the pod prove its name by what is in `secret`.
pub(super) fn with_identity(pod: &mut Value, secret: &str) {
    with_secret(pod, ("identity", IDENTITY), secret);
}

/// Gives the pod's program the folder of a Secret, by the flag of the volume's name. The Secret is mounted whole, since a part of it would
/// stay as it is when it changes.
pub(super) fn with_secret(pod: &mut Value, (name, folder): (&str, &str), secret: &str) {
    let container = &mut pod["containers"][0];
    with_args(container, [&format!("--{name}"), folder]);
    if let Some(mounts) = container["volumeMounts"].as_array_mut() {
        mounts.push(volume_mount(name, folder, true));
    }
    if let Some(volumes) = pod["volumes"].as_array_mut() {
        volumes.push(json!({ "name": name, "secret": { "secretName": secret, "defaultMode": SECRET_MODE } }));
    }
}

/// What a container may not do.
pub(crate) fn restricted() -> Value {
    json!({ "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": { "drop": ["ALL"] } })
}

/// A volume in a container.
pub(super) fn volume_mount(name: &str, path: &str, read_only: bool) -> Value {
    if read_only { json!({ "name": name, "mountPath": path, "readOnly": true }) } else { json!({ "name": name, "mountPath": path }) }
}

/// A token of the namespace as an environment variable.
pub(super) fn token(variable: &str, key: &str) -> Value {
    json!({ "name": variable, "valueFrom": { "secretKeyRef": { "name": names::TOKENS, "key": key } } })
}

/// A field of the pod as an environment variable.
pub(super) fn field(variable: &str, path: &str) -> Value {
    json!({ "name": variable, "valueFrom": { "fieldRef": { "apiVersion": "v1", "fieldPath": path } } })
}
