//! The reconcile of router pools: one for each namespace that has deployments, and one for each deployment that has routers of its own.

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
    jiff::Timestamp,
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
        pool::{PoolResources, Routers, account, build_pool},
    },
    cache::{Cache, Owner},
    fleet::Hub,
    issuer::{IssueError, Issuer, Wanted},
    models::chain,
    names::{FLEET_TOKEN, MANAGER, POOL, POOL_PORT, POOL_TOKEN, TOKENS, WORKER_TOKEN},
    resource::ModelDeployment,
    routers::{own_count, own_stands, standing as routing},
};

/// First and longest pause before a pool that failed is tried again.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// How long a pool that stands as it should is left alone, unless somebody changes it.
const SETTLED: Duration = Duration::from_secs(600);
/// Most deployments that own a pool together: a pool goes with the last of them, and the cluster looks each of them up whenever one goes.
const OWNERS: usize = 64;

/// Pools that are to be looked at.
#[derive(Debug, Default)]
pub struct Pools {
    /// By what their objects are of: a namespace, or a deployment's own routers.
    asked: Mutex<BTreeSet<Owner>>,
    notify: Notify,
}

impl Pools {
    /// Has the pool of `namespace` reconciled.
    pub fn ask(&self, namespace: &str) {
        self.insert(Owner::new(namespace, ""));
    }

    /// Has a deployment's own routers reconciled.
    pub fn ask_own(&self, namespace: &str, deployment: &str) {
        self.insert(Owner::routers_of(namespace, deployment));
    }

    fn insert(&self, pool: Owner) {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).insert(pool);
        self.notify.notify_one();
    }

    fn take(&self) -> BTreeSet<Owner> {
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
    owners: Vec<OwnerReference>,
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
        let mut standing: HashMap<Owner, Standing> = HashMap::new();
        loop {
            let next = standing.values().filter_map(Standing::next).min();
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.pools.notify.notified() => {}
                () = until(next) => {}
            }
            let now = Instant::now();
            let due = standing.iter().filter(|(_, s)| s.next().is_some_and(|at| at <= now)).map(|(n, _)| n.clone());
            let due: BTreeSet<Owner> = due.chain(self.pools.take()).collect();
            for pool in due {
                match self.reconcile(&pool, standing.get(&pool)).await {
                    Ok(None) => drop(standing.remove(&pool)),
                    Ok(Some(applied)) => drop(standing.insert(pool, Standing { applied: Some(applied), retry: None })),
                    // Deletions come one by one as the namespace goes; the last of them ends the pool.
                    Err(PoolError::Apply(error)) if error.is_of_a_namespace_that_goes() => {
                        debug!(namespace = pool.namespace, error = chain(&error), "the namespace goes");
                        standing.remove(&pool);
                    }
                    Err(error) => {
                        // Asked for in between, it is tried at once, and not later for it.
                        let pause = match standing.get(&pool).and_then(|s| s.retry) {
                            None => BACKOFF.0,
                            Some((at, pause)) if at > now => pause,
                            Some((_, pause)) => (pause * 2).min(BACKOFF.1),
                        };
                        let (Owner { namespace, name, .. }, pause_seconds) = (&pool, pause.as_secs());
                        warn!(namespace, own_of = name, error = chain(&error), pause_seconds, "the router pool is not as it should be");
                        standing.insert(pool, Standing { applied: None, retry: Some((Instant::now() + pause, pause)) });
                    }
                }
            }
        }
    }

    /// Applies a pool, unless that was done a moment ago; `None` when nobody is to have it.
    async fn reconcile(&self, owner: &Owner, before: Option<&Standing>) -> Result<Option<Applied>, PoolError> {
        let namespace = owner.namespace.as_str();
        let own_of = owner.routers.then_some(owner.name.as_str());
        let now = Timestamp::now().as_second();
        let all = self.deployments.state();
        let mut here: Vec<_> = all.iter().filter(|d| d.namespace() == namespace && !d.is_deleted()).collect();
        if let Some(name) = own_of {
            here.retain(|d| d.name() == name && routing(d, now).own_told);
        }
        // By what nobody chooses: those that are deleted together are not those that own it together.
        here.sort_by(|a, b| a.uid().cmp(b.uid()));
        let Some(first) = here.first() else {
            return self.end(owner).await.map(|()| None);
        };
        let count = match own_of {
            Some(_) => own_count(first),
            // Deployments with routers of their own need none of these.
            None if here.iter().any(|d| routing(d, now).namespace_told) => self.settings.pool_size,
            None => 0,
        };
        let pool = Routers { own_of, count };
        let expected: Vec<String> = here.iter().map(|d| d.name().to_owned()).collect();
        let space = self.hub.pool(owner);
        let pods = self.cache.pods.of(owner);
        let pods: Vec<&Pod> = pods.iter().map(Arc::as_ref).filter(|pod| is_router(pod)).collect();
        let concerned = space.meet(addresses(&pods, own_of.unwrap_or_default()), open(&pods), &expected);
        self.hub.wake(namespace, concerned).await;
        let before = before.and_then(|s| s.applied.as_ref());
        let owners = match own_of {
            Some(_) => self.own_account(namespace, pool, first, before).await?,
            None => here.iter().take(OWNERS).map(|d| d.owner(false)).collect(),
        };
        let build = |meeting: Option<&str>| match own_of {
            // The account is the deployment's, and all else is the account's.
            Some(_) => PoolResources { accounts: vec![own_account(pool, first)], ..build_pool(pool, &owners, &self.settings, meeting) },
            None => build_pool(pool, &owners, &self.settings, meeting),
        };
        let mut built = build(space.meeting().as_deref());
        let certificate = self.certify(namespace, pool, owners.clone()).await?;
        if let Some(Applied { built: applied, at, .. }) = before
            && *applied == built
            && at.elapsed() < SETTLED
            && self.stands(namespace, applied)
        {
            return Ok(Some(Applied { built, owners, at: *at, certificate }));
        }
        let writer = Writer { client: &self.client, cache: &self.cache };
        for account in &built.accounts {
            writer.write::<ServiceAccount>(owner, account, Conflicts::Ours).await?;
        }
        if let Some(tokens) = &built.tokens {
            let token = self.tokens(&writer, owner, tokens).await?;
            space.let_in(token);
        }
        if let Some(service) = &built.service {
            writer.write::<Service>(owner, service, Conflicts::Theirs).await?;
        }
        if space.meeting().is_none() || !self.cache.ledger.stands("Service", namespace, &built.peers.name, &built.peers.body) {
            let peers: Service = write(&self.client, namespace, &built.peers, Conflicts::Theirs).await?;
            if let Some(url) = meeting(&peers).filter(|url| space.meeting().as_ref() != Some(url)) {
                built = build(Some(&url));
                space.meet_at(url);
            }
        }
        let PoolResources { peers, network_policy, disruption_budget, deployment, .. } = &built;
        writer.write::<Service>(owner, peers, Conflicts::Theirs).await?;
        writer.write::<NetworkPolicy>(owner, network_policy, Conflicts::Ours).await?;
        writer.write::<PodDisruptionBudget>(owner, disruption_budget, Conflicts::Ours).await?;
        writer.write::<Deployment>(owner, deployment, Conflicts::Ours).await?;
        Ok(Some(Applied { built, owners, at: Instant::now(), certificate }))
    }

    /// Nobody is to have a pool any more. That of a namespace goes with its deployments; a deployment's own is deleted while the deployment is
    /// there.
    async fn end(&self, owner: &Owner) -> Result<(), PoolError> {
        let (namespace, name) = (owner.namespace.as_str(), owner.name.as_str());
        if let Some(issuer) = &self.issuer {
            issuer.note_expiry("router", (namespace, if owner.routers { name } else { POOL }), None);
        }
        if owner.routers {
            self.hub.forget_own(namespace, name);
            if own_stands(&self.cache, namespace, name) {
                Writer { client: &self.client, cache: &self.cache }.remove_routers(owner).await?;
                self.hub.wake(namespace, vec![name.to_owned()]).await;
            }
        }
        Ok(())
    }

    /// What owns a deployment's own routers: their account, which stands before anything else of theirs.
    async fn own_account(
        &self,
        namespace: &str,
        pool: Routers<'_>,
        object: &ModelDeployment,
        before: Option<&Applied>,
    ) -> Result<Vec<OwnerReference>, PoolError> {
        let account = own_account(pool, object);
        match before {
            Some(before) if self.cache.ledger.stands("ServiceAccount", namespace, &account.name, &account.body) => {
                Ok(before.owners.clone())
            }
            _ => Ok(vec![owned_by(&write::<ServiceAccount>(&self.client, namespace, &account, Conflicts::Ours).await?)]),
        }
    }

    /// Sees to it that the routers have a certificate before they need one; when it is to be looked at again.
    async fn certify(&self, namespace: &str, pool: Routers<'_>, owners: Vec<OwnerReference>) -> Result<Option<Instant>, PoolError> {
        let Some(issuer) = &self.issuer else { return Ok(None) };
        let name = Name::Router { namespace: namespace.to_owned() };
        let wanted = Wanted { secret: pool.identity(), name, labels: pool.labels(), owners };
        let stands = issuer.certify(namespace, vec![wanted]).await?;
        issuer.note_expiry("router", (namespace, pool.own_of.unwrap_or(POOL)), stands.map(|s| s.expires));
        Ok(stands.map(|s| Instant::now() + s.again))
    }

    /// Whether everything stands as it was applied; the Secret of the tokens is not watched.
    fn stands(&self, namespace: &str, applied: &PoolResources) -> bool {
        let stands = |kind: &str, object: &Object| self.cache.ledger.stands(kind, namespace, &object.name, &object.body);
        let PoolResources { accounts, tokens: _, service, peers, network_policy, disruption_budget, deployment } = applied;
        accounts.iter().all(|account| stands("ServiceAccount", account))
            && service.iter().all(|service| stands("Service", service))
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

/// The account of a deployment's own routers.
fn own_account(pool: Routers<'_>, object: &ModelDeployment) -> Object {
    account(pool.name(), pool.labels(), &[object.owner(false)])
}

/// A reference that makes an object an account's.
fn owned_by(account: &ServiceAccount) -> OwnerReference {
    OwnerReference {
        api_version: "v1".to_owned(),
        kind: "ServiceAccount".to_owned(),
        name: account.metadata.name.clone().unwrap_or_default(),
        uid: account.metadata.uid.clone().unwrap_or_default(),
        controller: None,
        block_owner_deletion: None,
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

/// Pods that are routers of `pool`, as in [`FleetRouter::pool`], or will be, or still are, and have an address.
fn addresses(pods: &[&Pod], pool: &str) -> Vec<FleetRouter> {
    let router = |pod: &Pod| {
        let status = pod.status.as_ref().filter(|s| !matches!(s.phase.as_deref(), Some("Succeeded" | "Failed")))?;
        let ip = status.pod_ip.as_deref()?.parse::<IpAddr>().ok()?;
        Some(FleetRouter { name: pod.metadata.name.clone()?, address: SocketAddr::new(ip, POOL_PORT).to_string(), pool: pool.to_owned() })
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
    use kube::runtime::{reflector, watcher};
    use tokio::sync::mpsc;

    use super::*;
    use crate::{
        build::tests::settings,
        mock::{self, Objects},
    };

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
        let found = addresses(&pods.iter().collect::<Vec<_>>(), "");
        let told: Vec<(&str, &str)> = found.iter().map(|r| (r.name.as_str(), r.address.as_str())).collect();
        assert_eq!(told, [("a", "10.0.0.1:7072"), ("b", "10.0.0.2:7072")]);
    }

    /// A deployment of which routers of its own are wanted, or not, and that nobody serves yet.
    fn object(dedicated: bool) -> ModelDeployment {
        let spec = json!({ "router": { "dedicated": dedicated, "replicas": 3 } });
        serde_json::from_value(json!({ "metadata": { "name": "llama", "namespace": "models", "uid": "0b0c" }, "spec": spec }))
            .expect("an object")
    }

    #[tokio::test]
    async fn own_routers_belong_to_their_account_and_go_with_it() {
        let objects = Objects::default();
        let tokens = json!({ FLEET_TOKEN: "eA==", WORKER_TOKEN: "eA==", POOL_TOKEN: "eA==" });
        let secret = json!({ "metadata": { "name": TOKENS, "namespace": "models" }, "data": tokens });
        // The map of objects forgets what another wrote of one.
        let draw = || {
            let path = format!("/api/v1/namespaces/models/secrets/{TOKENS}");
            objects.lock().expect("nobody panics with it").insert(path, secret.clone());
        };
        let (deployments, mut known) = reflector::store();
        let (wake, mut woken) = mpsc::channel(8);
        let reconciler = PoolReconciler {
            client: mock::client(&objects),
            cache: Arc::default(),
            settings: settings(),
            deployments,
            hub: Arc::new(Hub::new(1, wake)),
            pools: Arc::default(),
            issuer: None,
        };
        let (own, shared) = (Owner::routers_of("models", "llama"), Owner::new("models", ""));
        let standing = |kind: &str| -> Vec<serde_json::Value> {
            let objects = objects.lock().expect("nobody panics with it");
            objects.iter().filter(|(path, _)| path.contains(&format!("/{kind}/"))).map(|(_, object)| object.clone()).collect()
        };
        let replicas =
            |name: &str| standing("deployments").iter().find(|d| d["metadata"]["name"] == name).map(|d| d["spec"]["replicas"].clone());

        known.apply_watcher_event(&watcher::Event::Apply(object(true)));
        assert!(reconciler.reconcile(&own, None).await.expect("it is applied").is_some());
        let account = standing("serviceaccounts").pop().expect("an account");
        assert_eq!(account["metadata"]["ownerReferences"][0]["uid"], "0b0c");
        for kind in ["deployments", "services", "networkpolicies", "poddisruptionbudgets"] {
            let all = standing(kind);
            let owners: Vec<_> = all.iter().map(|object| &object["metadata"]["ownerReferences"]).collect();
            assert!(owners.len() == 1 && owners[0][0]["uid"] == account["metadata"]["uid"] && owners[0][1].is_null(), "{kind}: {owners:?}");
        }
        assert_eq!(replicas("llama-dedicated-router"), Some(json!(3)));
        draw();
        assert!(reconciler.reconcile(&shared, None).await.expect("it is applied").is_some());
        assert_eq!(replicas(POOL), Some(json!(0)), "nobody is served by those of the namespace");

        known.apply_watcher_event(&watcher::Event::Apply(object(false)));
        assert!(own_stands(&reconciler.cache, "models", "llama"));
        assert!(reconciler.reconcile(&own, None).await.expect("it is taken away").is_none());
        let left = standing("serviceaccounts");
        assert!(left.iter().all(|account| account["metadata"]["name"] != "llama-dedicated-router"), "{left:?}");
        assert!(!own_stands(&reconciler.cache, "models", "llama"));
        assert!(woken.try_recv().is_ok(), "its status is to say so");
        draw();
        assert!(reconciler.reconcile(&shared, None).await.expect("it is applied").is_some());
        assert_eq!(replicas(POOL), Some(json!(settings().pool_size)));
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
