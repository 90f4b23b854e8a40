//! The reconcile of router pools, one for each namespace that has deployments.

use std::{
    collections::{BTreeSet, HashMap},
    fs::File,
    io::{self, Read},
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use identity::Name;
use k8s_openapi::{
    api::{
        apps::v1::Deployment,
        core::v1::{Pod, Secret, Service, ServiceAccount},
        networking::v1::NetworkPolicy,
        policy::v1::PodDisruptionBudget,
    },
    apimachinery::pkg::apis::meta::v1::OwnerReference,
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
    runtime::reflector::Store,
};
use plan::fleet::FleetRouter;
use serde_json::json;
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::{
    apply::{ApplyError, Conflicts, Writer, write},
    build::{
        Object, Settings,
        pool::{PoolResources, build_pool},
    },
    cache::{Cache, Owner},
    fleet::Hub,
    issuer::{IssueError, Issuer, Wanted},
    models::chain,
    names::{self, FLEET_TOKEN, MANAGER, POOL, POOL_PORT, POOL_TOKEN, ROUTER_IDENTITY, TOKENS, WORKER_TOKEN},
    resource::ModelDeployment,
};

/// First and longest pause before a pool that failed is tried again.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// How long a pool that stands as it should is left alone, unless somebody changes it.
const SETTLED: Duration = Duration::from_secs(600);
/// Most deployments that own a pool together: a pool goes with the last of them, and the cluster looks each of them up whenever one goes.
const OWNERS: usize = 64;

/// Namespaces whose pools are to be looked at.
#[derive(Debug, Default)]
pub struct Pools {
    asked: Mutex<BTreeSet<String>>,
    notify: Notify,
}

impl Pools {
    /// Has the pool of `namespace` reconciled.
    pub fn ask(&self, namespace: &str) {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).insert(namespace.to_owned());
        self.notify.notify_one();
    }

    fn take(&self) -> BTreeSet<String> {
        std::mem::take(&mut *self.asked.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Why a pool does not stand.
#[derive(Debug, thiserror::Error)]
enum PoolError {
    #[error(transparent)]
    Apply(#[from] ApplyError),
    #[error(transparent)]
    Issue(#[from] IssueError),
    #[error("failed to read the tokens of the namespace")]
    Tokens(#[source] kube::Error),
    #[error("secret {TOKENS} has no key {FLEET_TOKEN}; delete it, and it is made anew")]
    NoToken,
    #[error("failed to draw tokens")]
    Draw(#[source] io::Error),
}

/// What reconciles pools.
pub struct PoolReconciler {
    /// For the API server.
    pub client: Client,
    /// What stands in the cluster.
    pub cache: Arc<Cache>,
    /// What objects depend on.
    pub settings: Settings,
    /// All deployments.
    pub deployments: Store<ModelDeployment>,
    /// Who lets routers in.
    pub hub: Arc<Hub>,
    /// What is to be done.
    pub pools: Arc<Pools>,
    /// Who certifies routers, where they prove their names.
    pub issuer: Option<Arc<Issuer>>,
}

/// How a pool stands.
struct Standing {
    /// What was applied, and when; `None` after a failure.
    applied: Option<Applied>,
    retry: Option<(Instant, Duration)>,
}

/// What was applied of a pool.
struct Applied {
    built: PoolResources,
    at: Instant,
    /// When its certificate is to be looked at.
    certificate: Option<Instant>,
}

impl Standing {
    /// When it is to be looked at though nothing happens.
    fn next(&self) -> Option<Instant> {
        self.retry.map(|(at, _)| at).or_else(|| self.applied.as_ref()?.certificate)
    }
}

impl PoolReconciler {
    /// Reconciles what is asked for, one pool at a time, until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let mut standing: HashMap<String, Standing> = HashMap::new();
        loop {
            let next = standing.values().filter_map(Standing::next).min();
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.pools.notify.notified() => {}
                () = until(next) => {}
            }
            let now = Instant::now();
            let due = standing.iter().filter(|(_, s)| s.next().is_some_and(|at| at <= now)).map(|(n, _)| n.clone());
            let due: BTreeSet<String> = due.chain(self.pools.take()).collect();
            for namespace in due {
                match self.reconcile(&namespace, standing.get(&namespace)).await {
                    Ok(None) => drop(standing.remove(&namespace)),
                    Ok(Some(applied)) => drop(standing.insert(namespace, Standing { applied: Some(applied), retry: None })),
                    // Deletions come one by one as the namespace goes; the last of them ends the pool.
                    Err(PoolError::Apply(error)) if error.is_of_a_namespace_that_goes() => {
                        debug!(namespace, error = chain(&error), "the namespace goes");
                        standing.remove(&namespace);
                    }
                    Err(error) => {
                        // Asked for in between, it is tried at once, and not later for it.
                        let pause = match standing.get(&namespace).and_then(|s| s.retry) {
                            None => BACKOFF.0,
                            Some((at, pause)) if at > now => pause,
                            Some((_, pause)) => (pause * 2).min(BACKOFF.1),
                        };
                        warn!(namespace, error = chain(&error), pause_seconds = pause.as_secs(), "the router pool is not as it should be");
                        standing.insert(namespace, Standing { applied: None, retry: Some((Instant::now() + pause, pause)) });
                    }
                }
            }
        }
    }

    /// Applies a namespace's pool, unless that was done a moment ago; `None` when the namespace has no deployments.
    async fn reconcile(&self, namespace: &str, before: Option<&Standing>) -> Result<Option<Applied>, PoolError> {
        let all = self.deployments.state();
        let mut here: Vec<_> = all.iter().filter(|d| d.namespace() == namespace && !d.is_deleted()).collect();
        if here.is_empty() {
            if let Some(issuer) = &self.issuer {
                issuer.note_expiry("router", (namespace, POOL), None);
            }
            return Ok(None);
        }
        let expected: Vec<String> = here.iter().map(|d| d.name().to_owned()).collect();
        let space = self.hub.space(namespace);
        let owner = Owner::new(namespace, "");
        let pods = self.cache.pods.of(&owner);
        let pods: Vec<&Pod> = pods.iter().map(Arc::as_ref).filter(|pod| is_router(pod)).collect();
        let concerned = space.meet(routers(&pods), open(&pods), &expected);
        self.hub.wake(namespace, concerned).await;
        // By what nobody chooses: those that are deleted together are not those that own it together.
        here.sort_by(|a, b| a.uid().cmp(b.uid()));
        let owners: Vec<_> = here.iter().take(OWNERS).map(|d| d.owner(false)).collect();
        let mut built = build_pool(&owners, &self.settings, space.meeting().as_deref());
        let certificate = self.certify(namespace, owners.clone()).await?;
        if let Some(Applied { built: applied, at, .. }) = before.and_then(|s| s.applied.as_ref())
            && *applied == built
            && at.elapsed() < SETTLED
            && self.stands(namespace, applied)
        {
            return Ok(Some(Applied { built, at: *at, certificate }));
        }
        let writer = Writer { client: &self.client, cache: &self.cache };
        for account in &built.accounts {
            writer.write::<ServiceAccount>(&owner, account, Conflicts::Ours).await?;
        }
        let token = self.tokens(&writer, &owner, &built.tokens).await?;
        space.let_in(token);
        writer.write::<Service>(&owner, &built.service, Conflicts::Theirs).await?;
        if space.meeting().is_none() || !self.cache.ledger.stands("Service", namespace, &built.peers.name, &built.peers.body) {
            let peers: Service = write(&self.client, namespace, &built.peers, Conflicts::Theirs).await?;
            if let Some(url) = meeting(&peers).filter(|url| space.meeting().as_ref() != Some(url)) {
                built = build_pool(&owners, &self.settings, Some(&url));
                space.meet_at(url);
            }
        }
        let PoolResources { peers, network_policy, disruption_budget, deployment, .. } = &built;
        writer.write::<Service>(&owner, peers, Conflicts::Theirs).await?;
        writer.write::<NetworkPolicy>(&owner, network_policy, Conflicts::Ours).await?;
        writer.write::<PodDisruptionBudget>(&owner, disruption_budget, Conflicts::Ours).await?;
        writer.write::<Deployment>(&owner, deployment, Conflicts::Ours).await?;
        Ok(Some(Applied { built, at: Instant::now(), certificate }))
    }

    /// Sees to it that the routers have a certificate before they need one; when it is to be looked at again.
    async fn certify(&self, namespace: &str, owners: Vec<OwnerReference>) -> Result<Option<Instant>, PoolError> {
        let Some(issuer) = &self.issuer else { return Ok(None) };
        let name = Name::Router { namespace: namespace.to_owned() };
        let wanted = Wanted { secret: ROUTER_IDENTITY.to_owned(), name, labels: names::labels("router"), owners };
        let stands = issuer.certify(namespace, vec![wanted]).await?;
        issuer.note_expiry("router", (namespace, POOL), stands.map(|s| s.expires));
        Ok(stands.map(|s| Instant::now() + s.again))
    }

    /// Whether everything stands as it was applied; the Secret of the tokens is not watched.
    fn stands(&self, namespace: &str, applied: &PoolResources) -> bool {
        let stands = |kind: &str, object: &Object| self.cache.ledger.stands(kind, namespace, &object.name, &object.body);
        let PoolResources { accounts, tokens: _, service, peers, network_policy, disruption_budget, deployment } = applied;
        accounts.iter().all(|account| stands("ServiceAccount", account))
            && stands("Service", service)
            && stands("Service", peers)
            && stands("NetworkPolicy", network_policy)
            && stands("PodDisruptionBudget", disruption_budget)
            && stands("Deployment", deployment)
    }

    /// Makes the namespace's tokens where they are missing; the one that routers carry.
    async fn tokens(&self, writer: &Writer<'_>, owner: &Owner, object: &Object) -> Result<String, PoolError> {
        let namespace = owner.namespace.as_str();
        let api = Api::<Secret>::namespaced(self.client.clone(), namespace);
        let mut found = api.get_opt(TOKENS).await.map_err(PoolError::Tokens)?;
        if found.is_none() {
            // Whatever this process wrote of it before, it is gone.
            self.cache.ledger.forget("Secret", namespace, TOKENS);
            let mut body = object.body.clone();
            let draw = || draw().map_err(PoolError::Draw);
            body["stringData"] = json!({ FLEET_TOKEN: draw()?, WORKER_TOKEN: draw()?, POOL_TOKEN: draw()? });
            let secret: Secret = serde_json::from_value(body).map_err(|e| PoolError::Tokens(kube::Error::SerdeError(e)))?;
            let params = PostParams { field_manager: Some(format!("{MANAGER}-tokens")), ..PostParams::default() };
            match api.create(&params, &secret).await {
                Ok(_) => info!(namespace, "drew tokens"),
                Err(kube::Error::Api(status)) if status.code == 409 => {}
                Err(error) => return Err(PoolError::Tokens(error)),
            }
        }
        writer.write::<Secret>(owner, object, Conflicts::Ours).await?;
        if found.is_none() {
            found = api.get_opt(TOKENS).await.map_err(PoolError::Tokens)?;
        }
        let secret = found.ok_or(PoolError::NoToken)?;
        if !secret.data.as_ref().is_some_and(|data| data.contains_key(POOL_TOKEN)) {
            // One that was made before routers had each other to talk to.
            let params = PatchParams { field_manager: Some(format!("{MANAGER}-tokens")), ..PatchParams::default() };
            let more = json!({ "stringData": { POOL_TOKEN: draw().map_err(PoolError::Draw)? } });
            api.patch(TOKENS, &params, &Patch::Merge(more)).await.map_err(PoolError::Tokens)?;
        }
        let token = secret.data.unwrap_or_default().remove(FLEET_TOKEN).ok_or(PoolError::NoToken)?;
        String::from_utf8(token.0).map_err(|_| PoolError::NoToken)
    }
}

/// Where a service is reached, by its own address: nothing depends on cluster DNS.
fn meeting(service: &Service) -> Option<String> {
    let ip: IpAddr = service.spec.as_ref()?.cluster_ip.as_ref()?.parse().ok()?;
    Some(format!("http://{}", SocketAddr::new(ip, POOL_PORT)))
}

/// Whether a pod is one of a pool.
fn is_router(pod: &Pod) -> bool {
    pod.metadata.labels.as_ref().and_then(|labels| labels.get("app.kubernetes.io/component")).is_some_and(|component| component == "router")
}

/// Names of the pods to which services lead.
fn open(pods: &[&Pod]) -> BTreeSet<String> {
    let ready = |pod: &&&Pod| {
        let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
        let ready = conditions.into_iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True");
        ready && pod.metadata.deletion_timestamp.is_none()
    };
    pods.iter().filter(ready).filter_map(|pod| pod.metadata.name.clone()).collect()
}

/// Pods that are routers, or will be, or still are, and have an address.
fn routers(pods: &[&Pod]) -> Vec<FleetRouter> {
    let router = |pod: &Pod| {
        let status = pod.status.as_ref().filter(|s| !matches!(s.phase.as_deref(), Some("Succeeded" | "Failed")))?;
        let ip = status.pod_ip.as_deref()?.parse::<IpAddr>().ok()?;
        Some(FleetRouter { name: pod.metadata.name.clone()?, address: SocketAddr::new(ip, POOL_PORT).to_string() })
    };
    let mut found: Vec<FleetRouter> = pods.iter().copied().filter_map(router).collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// A token that nobody can guess.
fn draw() -> io::Result<String> {
    let mut bytes = [0; 32];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routers_with_an_address_are_told_of_each_other() {
        let pod = |name: &str, status: serde_json::Value| {
            serde_json::from_value(json!({ "metadata": { "name": name }, "status": status })).expect("a pod")
        };
        let pods: Vec<Pod> = vec![
            pod("b", json!({ "phase": "Running", "podIP": "10.0.0.2" })),
            pod("a", json!({ "phase": "Pending", "podIP": "10.0.0.1" })),
            pod("c", json!({ "phase": "Pending" })),
            pod("d", json!({ "phase": "Succeeded", "podIP": "10.0.0.4" })),
        ];
        let found = routers(&pods.iter().collect::<Vec<_>>());
        let told: Vec<(&str, &str)> = found.iter().map(|r| (r.name.as_str(), r.address.as_str())).collect();
        assert_eq!(told, [("a", "10.0.0.1:7072"), ("b", "10.0.0.2:7072")]);
    }

    #[test]
    fn services_lead_to_routers_that_are_ready_and_stay() {
        let pod = |name: &str, ready: &str, more: serde_json::Value| {
            let mut pod = json!({ "metadata": { "name": name }, "status": { "conditions": [{ "type": "Ready", "status": ready }] } });
            pod["metadata"]["deletionTimestamp"] = more;
            serde_json::from_value(pod).expect("a pod")
        };
        let pods: Vec<Pod> = vec![
            pod("ready", "True", json!(null)),
            pod("starting", "False", json!(null)),
            pod("leaving", "True", json!("2026-01-01T00:00:00Z")),
            serde_json::from_value(json!({ "metadata": { "name": "unknown" } })).expect("a pod"),
        ];
        assert_eq!(open(&pods.iter().collect::<Vec<_>>()), BTreeSet::from(["ready".to_owned()]));
    }
}
