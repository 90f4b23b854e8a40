//! An API server that is a map of objects, for tests.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{Arc, Mutex},
};

use http::{Method, Request, Response};
use kube::{Client, client::Body};
use serde_json::{Value, json};
use tower::service_fn;

/// Objects by their path.
pub(crate) type Objects = Arc<Mutex<BTreeMap<String, Value>>>;

/// No object: the part of a path whose writes are refused.
pub(crate) const REFUSED: &str = "refused";

/// No object either: the end of a path that may not be read.
pub(crate) const HIDDEN: &str = "hidden";

/// Kinds that are made, and asked for by name.
const NAMED: [&str; 4] = ["secrets", "leases", "pods", "persistentvolumeclaims"];

/// A client of the API server that keeps `objects`.
pub(crate) fn client(objects: &Objects) -> Client {
    let objects = objects.clone();
    Client::new(service_fn(move |request| answer(objects.clone(), request)), "models")
}

/// The status of an answer, and the answer.
type Answer = (u16, Value);

fn failure(code: u16, reason: &str) -> Answer {
    (code, json!({ "kind": "Status", "status": "Failure", "reason": reason, "code": code, "message": reason }))
}

/// What an API server does with a request.
async fn answer(objects: Objects, request: Request<Body>) -> Result<Response<Body>, Infallible> {
    let (parts, body) = request.into_parts();
    let body = body.collect_bytes().await.expect("a body in memory");
    let path = parts.uri.path().to_owned();
    let merges = parts.headers.get("content-type").is_some_and(|t| t == "application/merge-patch+json");
    let mut objects = objects.lock().expect("nobody panics with it");
    let refused = objects.get(REFUSED).and_then(Value::as_str).is_some_and(|part| path.contains(part));
    let hidden = objects.get(HIDDEN).and_then(Value::as_str).is_some_and(|end| path.ends_with(end));
    let (status, answer) = match parts.method {
        Method::GET if hidden => failure(403, "Forbidden"),
        Method::GET => get(&objects, &path),
        _ if refused => failure(403, "Forbidden"),
        Method::DELETE => match objects.remove(&path) {
            Some(_) => (200, json!({ "kind": "Status", "status": "Success" })),
            None => failure(404, "NotFound"),
        },
        Method::POST | Method::PUT | Method::PATCH => {
            let object: Value = serde_json::from_slice(&body).expect("JSON");
            match parts.method {
                Method::POST => create(&mut objects, &path, object),
                Method::PUT => replace(&mut objects, &path, object),
                _ => patch(&mut objects, path, object, merges),
            }
        }
        _ => failure(405, "MethodNotAllowed"),
    };
    // A log is text.
    let text = answer.as_str().map_or_else(|| answer.to_string(), str::to_owned);
    let response = Response::builder().status(status).body(Body::from(text.into_bytes()));
    Ok(response.expect("a response"))
}

/// An object that is asked for by name, as namespaces and what keeps a header are too, or what is below a path.
fn get(objects: &BTreeMap<String, Value>, path: &str) -> Answer {
    let namespace = path.strip_prefix("/api/v1/namespaces/").is_some_and(|rest| !rest.contains('/'));
    if namespace || NAMED.iter().any(|kind| path.contains(&format!("/{kind}/"))) || path.ends_with("-header") {
        return objects.get(path).map_or_else(|| failure(404, "NotFound"), |object| (200, object.clone()));
    }
    let inside = |p: &&String| p.strip_prefix(path).is_some_and(|rest| rest.starts_with('/'));
    let items: Vec<Value> = objects.keys().filter(inside).map(|p| objects[p].clone()).collect();
    (200, json!({ "apiVersion": "v1", "kind": "List", "metadata": {}, "items": items }))
}

/// Secrets, leases and pods are kept; events are taken and forgotten.
fn create(objects: &mut BTreeMap<String, Value>, path: &str, mut object: Value) -> Answer {
    if NAMED.iter().any(|kind| path.ends_with(&format!("/{kind}"))) {
        let path = format!("{path}/{}", object["metadata"]["name"].as_str().expect("a name"));
        if objects.contains_key(&path) {
            return failure(409, "AlreadyExists");
        }
        object["metadata"]["resourceVersion"] = json!("1");
        objects.insert(path, object.clone());
    }
    (200, object)
}

fn replace(objects: &mut BTreeMap<String, Value>, path: &str, mut object: Value) -> Answer {
    let Some(known) = objects.get(path) else { return failure(404, "NotFound") };
    let version = &known["metadata"]["resourceVersion"];
    if object["metadata"]["resourceVersion"] != *version {
        return failure(409, "Conflict");
    }
    let next: u64 = version.as_str().and_then(|v| v.parse().ok()).expect("a version");
    object["metadata"]["resourceVersion"] = json!((next + 1).to_string());
    objects.insert(path.to_owned(), object.clone());
    (200, object)
}

fn patch(objects: &mut BTreeMap<String, Value>, path: String, mut object: Value, merges: bool) -> Answer {
    if path.ends_with("/status") {
        let known = objects.get_mut(path.trim_end_matches("/status")).expect("the object stands");
        known["status"] = object["status"].clone();
        return (200, known.clone());
    }
    if merges {
        return match objects.get_mut(&path) {
            // An event that is told again.
            None if path.contains("/events/") => (200, object),
            None => failure(404, "NotFound"),
            Some(known) => {
                merge(known, object);
                (200, known.clone())
            }
        };
    }
    let made = objects.get(&path).map(|o| o["metadata"]["creationTimestamp"].clone());
    object["metadata"]["creationTimestamp"] = made.unwrap_or_else(|| json!("2026-01-01T00:00:00Z"));
    object["metadata"]["uid"] = json!(path);
    objects.insert(path, object.clone());
    (200, object)
}

fn merge(known: &mut Value, patch: Value) {
    match (known, patch) {
        (Value::Object(known), Value::Object(patch)) => {
            patch.into_iter().for_each(|(key, value)| merge(known.entry(key).or_insert(Value::Null), value));
        }
        (known, patch) => *known = patch,
    }
}
