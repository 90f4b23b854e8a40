//! What the operator counts of itself.

use std::{collections::BTreeMap, sync::OnceLock, time::Duration};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

/// How a reconcile ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Result {
    /// `applied`, or the reason of a refusal or failure: a closed list.
    result: &'static str,
}

/// A request to the API server.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Request {
    /// `get`, `list`, `watch`, `create`, `apply`, `patch`, `update` or `delete`.
    verb: &'static str,
    /// Plural name of the kind: a closed list.
    resource: &'static str,
}

/// Whose certificate.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    /// `authority`, `operator`, `router` or `worker`.
    kind: &'static str,
}

/// Why deployments are ready, or are not.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    /// That of the condition `Ready`: a closed list.
    reason: String,
}

/// Counts deployments by the reason of their condition `Ready`, whenever it is asked.
type Census = Box<dyn Fn() -> BTreeMap<String, i64> + Send + Sync>;

/// The operator's metrics.
pub struct Metrics {
    registry: Registry,
    reconciles: Family<Result, Counter>,
    seconds: Histogram,
    status_writes: Counter,
    requests: Family<Request, Counter>,
    routers: Gauge,
    leading: Gauge,
    expiries: Family<Kind, Gauge>,
    deployments: Family<Reason, Gauge>,
    census: OnceLock<Census>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("skein_operator");
        let (reconciles, status_writes, routers, leading) = (Family::default(), Counter::default(), Gauge::default(), Gauge::default());
        let seconds = Histogram::new([0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0]);
        registry.register("reconciles", "Reconciles of deployments, by how they ended", reconciles.clone());
        registry.register("reconcile_seconds", "Time of a reconcile", seconds.clone());
        registry.register("status_writes", "Statuses written", status_writes.clone());
        let requests = Family::default();
        registry.register("api_requests", "Requests to the API server, by verb and resource", requests.clone());
        let deployments = Family::default();
        registry.register("deployments", "Deployments, by the reason of their condition Ready", deployments.clone());
        registry.register("routers", "Routers connected", routers.clone());
        registry.register("leading", "1 while this process leads", leading.clone());
        let expiries = Family::<Kind, Gauge>::default();
        let help = "When the first certificate of its kind expires unless it is renewed, in seconds since 1970; of authorities, the newest";
        registry.register("certificate_expiry_timestamp_seconds", help, expiries.clone());
        Self { registry, reconciles, seconds, status_writes, requests, routers, leading, expiries, deployments, census: OnceLock::new() }
    }
}

impl Metrics {
    /// Counts a reconcile.
    pub fn reconciled(&self, result: &'static str, took: Duration) {
        self.reconciles.get_or_create(&Result { result }).inc();
        self.seconds.observe(took.as_secs_f64());
    }

    /// Counts a status that was written.
    pub fn status_written(&self) {
        self.status_writes.inc();
    }

    /// Counts a request to the API server.
    pub fn requested(&self, verb: &'static str, resource: &'static str) {
        self.requests.get_or_create(&Request { verb, resource }).inc();
    }

    /// Notes that this process leads.
    pub fn lead(&self) {
        self.leading.set(1);
    }

    /// Notes when certificates expire, by kind, in place of what was noted.
    pub fn expiries(&self, all: &BTreeMap<&'static str, i64>) {
        for kind in ["authority", "operator", "router", "worker"].map(|kind| Kind { kind }) {
            match all.get(kind.kind) {
                Some(at) => drop(self.expiries.get_or_create(&kind).set(*at)),
                None => drop(self.expiries.remove(&kind)),
            }
        }
    }

    /// Has deployments counted by `census`; once.
    pub fn count(&self, census: impl Fn() -> BTreeMap<String, i64> + Send + Sync + 'static) {
        // One that leads does so once in its life.
        let _ = self.census.set(Box::new(census));
    }

    /// Everything as text, with the number of `routers` connected.
    ///
    /// # Errors
    /// Never in practice: text is written to memory.
    pub fn text(&self, routers: usize) -> std::result::Result<String, std::fmt::Error> {
        self.routers.set(routers as i64);
        self.deployments.clear();
        for (reason, count) in self.census.get().map(|census| census()).unwrap_or_default() {
            self.deployments.get_or_create(&Reason { reason }).set(count);
        }
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn dashboards_read_what_there_is() {
        let metrics = Metrics::default();
        metrics.reconciled("Applied", Duration::ZERO);
        metrics.expiries(&BTreeMap::from([("router", 1)]));
        let text = metrics.text(1).expect("text");
        let dashboard = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/skein/dashboards/skein.json");
        let dashboard = fs::read_to_string(dashboard).expect("a dashboard");
        let names = dashboard.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).filter(|name| name.starts_with("skein_operator_"));
        let known = |name: &str| text.lines().any(|line| line.starts_with(&format!("{name}{{")) || line.starts_with(&format!("{name} ")));
        assert!(!known("skein_operator_no_such_metric"));
        let mut seen = 0;
        for name in names {
            assert!(known(name), "the dashboard reads {name}, which is not among\n{text}");
            seen += 1;
        }
        assert!(seen >= 3, "{seen}");
    }
}
