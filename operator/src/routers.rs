//! Which routers serve a deployment, those of its namespace or its own, and how one takes over from the other.
//!
//! Those that are to come are told of the deployment, and reach its replicas through those that serve it. Once all of them are open and know
//! every replica that answers, the deployment's service leads to them, and they drive its replicas. Those before are told of it, and of the
//! others, for as long as a replica is drained: what they have begun goes on. After that they are told no more.

use std::{sync::Arc, time::Duration};

use k8s_openapi::jiff::Timestamp;
use plan::{
    fleet::FleetDeployment,
    manifest::{RecoverySpec, RouterSpec},
};

use crate::{
    autoscale::Report,
    cache::Cache,
    fleet::{Hub, Load, Space},
    names,
    resource::{ModelDeployment, RoutersStatus},
};

/// How long those before are told of a deployment at least: longer than a router keeps a client's connection that is idle, or a gRPC channel, so
/// that the next request comes to where the service leads.
const LINGER: i64 = 60;
/// How long a process that has just begun may take to look at every pool.
const BEGIN: Duration = Duration::from_secs(15);

/// Who serves a deployment, and who is told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Routing {
    /// Its own routers take its requests, and drive its replicas; else those of the namespace.
    pub own: bool,
    /// Since when, in seconds since 1970, where that has changed.
    pub since: Option<i64>,
    /// Those of the namespace are told of it.
    pub namespace_told: bool,
    /// Its own are told of it, and exist.
    pub own_told: bool,
    /// When those before have had their time.
    pub until: Option<i64>,
}

/// Whether the spec wants routers of its own.
pub fn wants_own(object: &ModelDeployment) -> bool {
    object.spec["router"]["dedicated"] == true
}

/// How many routers of its own the spec wants.
pub fn own_count(object: &ModelDeployment) -> u32 {
    object.spec["router"]["replicas"].as_u64().and_then(|count| u32::try_from(count).ok()).unwrap_or_else(|| RouterSpec::default().count())
}

/// Whether anything of routers of its own stands.
pub fn own_stands(cache: &Cache, namespace: &str, deployment: &str) -> bool {
    cache.ledger.has("ServiceAccount", namespace, &names::own_router(deployment))
}

/// Who serves it now, as its status says.
pub fn standing(object: &ModelDeployment, now: i64) -> Routing {
    let status = object.status.as_ref();
    let (own, since) = match status.and_then(|s| s.routers.as_ref()) {
        Some(routers) => (routers.dedicated, routers.since.as_ref().and_then(|at| at.parse::<Timestamp>().ok()).map(Timestamp::as_second)),
        // Nothing was ever applied: it begins with what it wants.
        None if status.is_none_or(|s| s.url.is_none()) => (wants_own(object), None),
        None => (false, None),
    };
    routing(object, (own, since), now)
}

fn routing(object: &ModelDeployment, (own, since): (bool, Option<i64>), now: i64) -> Routing {
    let drain = object.spec["recovery"]["drainSeconds"].as_i64().unwrap_or_else(|| RecoverySpec::default().drain_seconds.into());
    let until = since.map(|since| since + drain.max(LINGER)).filter(|until| *until > now);
    let wants = wants_own(object);
    Routing { own, since, namespace_told: !wants || !own || until.is_some(), own_told: wants || own || until.is_some(), until }
}

impl Routing {
    /// As status has it, for as long as its own routers serve it, are told of it, or are there (`stands`).
    fn status(&self, stands: bool) -> Option<RoutersStatus> {
        let since = self.since.and_then(|at| Timestamp::from_second(at).ok()).map(|at| at.to_string());
        (self.own || self.own_told || stands).then_some(RoutersStatus { dedicated: self.own, since })
    }

    /// Whether both are told.
    fn is_changing(&self) -> bool {
        self.namespace_told && self.own_told
    }
}

/// Whether routers of which `coming` is said may take over from those of which `serving` is: as many are open as there are to be, and they
/// reach every replica that answers.
fn may_take_over(serving: &Load, coming: &Load, count: u32) -> bool {
    let reached = |name: &String| coming.replicas.get(name).is_some_and(|said| said.ready);
    coming.open >= count as usize && serving.replicas.iter().filter(|(_, said)| said.ready).all(|(name, _)| reached(name))
}

/// A deployment's routers, as this process reaches them.
pub struct Served {
    /// Who serves it.
    pub routing: Routing,
    namespace: Arc<Space>,
    own: Option<Arc<Space>>,
    /// Something of its own routers is there.
    stands: bool,
    /// This process may not know yet which routers there are.
    begins: bool,
}

impl Served {
    /// Decides who serves it from now on; `count` is the size of the namespace's pool.
    pub fn now(hub: &Hub, cache: &Cache, object: &ModelDeployment, count: u32, now: i64) -> Self {
        let mut routing = standing(object, now);
        let namespace = hub.space(object.namespace());
        let (stands, begins) = (own_stands(cache, object.namespace(), object.name()), hub.age() < BEGIN);
        if !routing.own_told {
            hub.forget_own(object.namespace(), object.name());
            return Self { routing, namespace, own: None, stands, begins };
        }
        let own = hub.own_space(object.namespace(), object.name());
        let wants = wants_own(object);
        if routing.own != wants {
            let (serving, coming) = if wants { (&namespace, &own) } else { (&own, &namespace) };
            let count = if wants { own_count(object) } else { count };
            if may_take_over(&serving.load(object.name()), &coming.load(object.name()), count) {
                routing = self::routing(object, (wants, Some(now)), now);
            }
        }
        Self { routing, namespace, own: Some(own), stands, begins }
    }

    /// As status has it.
    pub fn status(&self) -> Option<RoutersStatus> {
        self.routing.status(self.stands)
    }

    fn serving(&self) -> &Space {
        self.own.as_ref().filter(|_| self.routing.own).unwrap_or(&self.namespace)
    }

    /// Those that are told of it beside those that serve it.
    fn other(&self) -> Option<&Space> {
        let own = self.own.as_ref().filter(|_| self.routing.is_changing())?;
        Some(if self.routing.own { &self.namespace } else { own })
    }

    /// What routers say of it.
    pub fn load(&self, name: &str) -> Load {
        let load = self.serving().load(name);
        match self.other() {
            Some(other) => load.with(other.load(name)),
            None => load,
        }
    }

    /// What each router measures of it.
    pub fn reports(&self, name: &str) -> Vec<Report> {
        let mut reports = self.serving().reports(name);
        reports.extend(self.other().into_iter().flat_map(|other| other.reports(name)));
        reports
    }

    /// Where any of the routers that serve it is reached.
    pub fn meeting(&self) -> Option<String> {
        self.serving().meeting()
    }

    /// Whether this process knows what routers are to be told of it.
    pub fn knows(&self, name: &str) -> bool {
        self.serving().knows(name)
    }

    /// What routers are told of it.
    pub fn told(&self, name: &str) -> Option<FleetDeployment> {
        self.serving().told(name)
    }

    /// Sets what routers are told of it. `expected` as in [`Space::settle`], for the routers of the namespace.
    pub fn settle(&self, name: &str, entry: Option<FleetDeployment>, expected: &[String]) {
        let Some(own) = &self.own else {
            self.namespace.host(name, Vec::new());
            return self.namespace.settle(name, entry, expected);
        };
        let guests = if self.routing.is_changing() {
            let (shared, dedicated) = (self.namespace.routers(), own.routers());
            if self.begins && (shared.is_none() || dedicated.is_none()) {
                // Routers that know each other must not be told otherwise before it is known who is there.
                return;
            }
            (shared.unwrap_or_default(), dedicated.unwrap_or_default())
        } else {
            (Vec::new(), Vec::new())
        };
        own.host(name, guests.0);
        own.settle(name, entry.clone(), &[name.to_owned()]);
        self.namespace.host(name, guests.1);
        self.namespace.settle(name, entry.filter(|_| self.routing.namespace_told), expected);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::fleet::Said;

    fn object(dedicated: bool, status: Value) -> ModelDeployment {
        let spec = json!({ "router": { "dedicated": dedicated }, "recovery": { "drainSeconds": 10 } });
        serde_json::from_value(json!({ "metadata": { "name": "a", "namespace": "n" }, "spec": spec, "status": status })).expect("an object")
    }

    /// Who serves it, and which routers are told: the namespace's, its own.
    fn told(object: &ModelDeployment, now: i64) -> (bool, bool, bool) {
        let routing = standing(object, now);
        (routing.own, routing.namespace_told, routing.own_told)
    }

    #[test]
    fn whoever_serves_and_whoever_is_to_are_told_and_whoever_did_for_a_while() {
        let fresh = json!({ "conditions": [] });
        assert_eq!(told(&object(false, fresh.clone()), 0), (false, true, false));
        assert_eq!(told(&object(true, fresh), 0), (true, false, true), "it begins with what it wants");
        let served = json!({ "url": "http://a.n" });
        assert_eq!(told(&object(true, served.clone()), 0), (false, true, true), "its own are not there yet");
        assert_eq!(told(&object(false, served), 0), (false, true, false));
        let own = json!({ "url": "http://a.n", "routers": { "dedicated": true, "since": "1970-01-01T00:01:40Z" } });
        assert_eq!(told(&object(true, own.clone()), 159), (true, true, true));
        assert_eq!(told(&object(true, own.clone()), 160), (true, false, true));
        assert_eq!(told(&object(false, own), 200), (true, true, true), "those of the namespace do not serve it yet");
        let back = json!({ "url": "http://a.n", "routers": { "dedicated": false, "since": "1970-01-01T00:01:40Z" } });
        assert_eq!(told(&object(false, back.clone()), 159), (false, true, true));
        assert_eq!(told(&object(false, back), 160), (false, true, false), "its own have had their time");
    }

    #[test]
    fn status_says_what_was_read_from_it() {
        let now = 1_800_000_000;
        let own = Routing { own: true, since: Some(now), namespace_told: true, own_told: true, until: Some(now + LINGER) };
        let status = serde_json::to_value(own.status(false)).expect("plain data");
        let read = standing(&object(true, json!({ "url": "http://a.n", "routers": status })), now);
        assert_eq!(read, own);
        assert_eq!(standing(&object(false, json!({ "url": "http://a.n" })), now).status(false), None, "of the namespace's nothing is said");
    }

    #[test]
    fn nobody_takes_over_before_all_are_open_and_reach_what_answers() {
        let load = |open: usize, ready: &[(&str, bool)]| {
            let said = |ready: bool| Said { ready, ..Said::default() };
            Load { routers: open, open, replicas: ready.iter().map(|(name, ready)| ((*name).to_owned(), said(*ready))).collect() }
        };
        let serving = load(2, &[("r0", true), ("r1", false)]);
        assert!(may_take_over(&serving, &load(2, &[("r0", true)]), 2));
        assert!(!may_take_over(&serving, &load(1, &[("r0", true)]), 2), "one is not open");
        assert!(!may_take_over(&serving, &load(2, &[("r0", false), ("r1", true)]), 2), "a replica that answers is not reached");
        assert!(may_take_over(&load(2, &[]), &load(2, &[]), 2), "there are no replicas");
    }
}
