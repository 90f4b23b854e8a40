//! The client of the API server, whose requests are counted by verb and resource.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use http::{Method, Request, Response, header::CONTENT_TYPE};
use kube::{Client, client::Body};
use tower_service::Service;

use crate::metrics::Metrics;

/// A client whose requests are counted.
pub fn counted(client: Client, metrics: Arc<Metrics>) -> Client {
    let namespace = client.default_namespace().to_owned();
    Client::new(Counted { client, metrics }, namespace)
}

struct Counted {
    client: Client,
    metrics: Arc<Metrics>,
}

impl Service<Request<Body>> for Counted {
    type Response = Response<Body>;
    type Error = kube::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, kube::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), kube::Error>> {
        // The client waits for room itself when it sends.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let (verb, resource) = described(&request);
        self.metrics.requested(verb, resource);
        let client = self.client.clone();
        Box::pin(async move { client.send(request).await })
    }
}

/// Resources that the operator has to do with.
const RESOURCES: [&str; 17] = [
    "configmaps",
    "controllerrevisions",
    "deployments",
    "events",
    "leases",
    "modeldeployments",
    "modeldeployments/status",
    "networkpolicies",
    "nodes",
    "persistentvolumeclaims",
    "poddisruptionbudgets",
    "pods",
    "pods/log",
    "secrets",
    "serviceaccounts",
    "services",
    "statefulsets",
];

/// Verb and resource of a request, each from a closed list.
fn described<B>(request: &Request<B>) -> (&'static str, &'static str) {
    let path: Vec<&str> = request.uri().path().split('/').filter(|part| !part.is_empty()).collect();
    let rest = match path.as_slice() {
        ["api", _, rest @ ..] | ["apis", _, _, rest @ ..] => rest,
        _ => return ("get", "none"),
    };
    let rest = match rest {
        ["namespaces", _, rest @ ..] if !rest.is_empty() => rest,
        rest => rest,
    };
    let known = |name: &str| RESOURCES.into_iter().find(|resource| *resource == name).unwrap_or("other");
    let (named, resource) = match rest {
        [resource] => (false, known(resource)),
        [resource, _] => (true, known(resource)),
        [resource, _, part, ..] => (true, known(&format!("{resource}/{part}"))),
        [] => (false, "none"),
    };
    let applies = request.headers().get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/apply-patch"));
    let watches = request.uri().query().is_some_and(|query| query.split('&').any(|part| matches!(part, "watch=true" | "watch=1")));
    let verb = match *request.method() {
        Method::GET if watches => "watch",
        Method::GET if named => "get",
        Method::GET => "list",
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH if applies => "apply",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => "other",
    };
    (verb, resource)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_by_verb_and_resource() {
        let of = |method: &str, uri: &str, kind: &str| {
            described(&Request::builder().method(method).uri(uri).header(CONTENT_TYPE, kind).body(()).expect("a request"))
        };
        let ns = "/apis/apps/v1/namespaces/n";
        assert_eq!(of("PATCH", &format!("{ns}/statefulsets/x?fieldManager=m"), "application/apply-patch+yaml"), ("apply", "statefulsets"));
        assert_eq!(of("PATCH", "/api/v1/namespaces/n/secrets/x", "application/merge-patch+json"), ("patch", "secrets"));
        assert_eq!(of("GET", "/api/v1/namespaces/n/pods?labelSelector=a", ""), ("list", "pods"));
        assert_eq!(of("GET", "/api/v1/pods?watch=true&labelSelector=a", ""), ("watch", "pods"));
        assert_eq!(of("GET", "/api/v1/namespaces/n/pods/x/log?limitBytes=1", ""), ("get", "pods/log"));
        assert_eq!(of("GET", "/api/v1/nodes/x", ""), ("get", "nodes"));
        assert_eq!(of("POST", "/apis/events.k8s.io/v1/namespaces/n/events", ""), ("create", "events"));
        let status = "/apis/skein.dev/v1alpha1/namespaces/n/modeldeployments/x/status";
        assert_eq!(of("PATCH", status, "application/apply-patch+yaml"), ("apply", "modeldeployments/status"));
        assert_eq!(of("GET", "/version", ""), ("get", "none"));
        assert_eq!(of("GET", "/api/v1/namespaces/n/gadgets", ""), ("list", "other"));
    }
}
