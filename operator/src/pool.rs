//! The reconcile of router pools, one for each namespace that has deployments.

use std::{
    collections::{BTreeSet, HashMap},
    fs::File,
    io::{self, Read},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{Secret, Service, ServiceAccount},
};
use kube::{Api, Client, api::PostParams, runtime::reflector::Store};
use serde_json::json;
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    apply::{ApplyError, Conflicts, write},
    build::{
        Object, Settings,
        pool::{PoolResources, build_pool},
    },
    fleet::Hub,
    models::chain,
    names::{FLEET_TOKEN, MANAGER, TOKENS, WORKER_TOKEN},
    resource::ModelDeployment,
};

/// First and longest pause before a pool that failed is tried again.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// How long a pool that stands as it should is left alone.
const SETTLED: Duration = Duration::from_secs(60);

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
    /// What objects depend on.
    pub settings: Settings,
    /// All deployments.
    pub deployments: Store<ModelDeployment>,
    /// Who lets routers in.
    pub hub: Arc<Hub>,
    /// What is to be done.
    pub pools: Arc<Pools>,
}

/// How a pool stands.
struct Standing {
    /// What was applied, and when; `None` after a failure.
    applied: Option<(PoolResources, Instant)>,
    retry: Option<(Instant, Duration)>,
}

impl PoolReconciler {
    /// Reconciles what is asked for, one pool at a time, until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let mut standing: HashMap<String, Standing> = HashMap::new();
        loop {
            let next = standing.values().filter_map(|s| s.retry.map(|(at, _)| at)).min();
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.pools.notify.notified() => {}
                () = until(next) => {}
            }
            let now = Instant::now();
            let due = standing.iter().filter(|(_, s)| s.retry.is_some_and(|(at, _)| at <= now)).map(|(n, _)| n.clone());
            let due: BTreeSet<String> = due.chain(self.pools.take()).collect();
            for namespace in due {
                match self.reconcile(&namespace, standing.get(&namespace)).await {
                    Ok(None) => drop(standing.remove(&namespace)),
                    Ok(Some(applied)) => drop(standing.insert(namespace, Standing { applied: Some(applied), retry: None })),
                    Err(error) => {
                        let pause = standing.get(&namespace).and_then(|s| s.retry).map_or(BACKOFF.0, |(_, p)| (p * 2).min(BACKOFF.1));
                        warn!(namespace, error = chain(&error), pause_seconds = pause.as_secs(), "the router pool is not as it should be");
                        standing.insert(namespace, Standing { applied: None, retry: Some((Instant::now() + pause, pause)) });
                    }
                }
            }
        }
    }

    /// Applies a namespace's pool, unless that was done a moment ago; `None` when the namespace has no deployments.
    async fn reconcile(&self, namespace: &str, before: Option<&Standing>) -> Result<Option<(PoolResources, Instant)>, PoolError> {
        let all = self.deployments.state();
        let mut here: Vec<_> = all.iter().filter(|d| d.namespace() == namespace && !d.is_deleted()).collect();
        if here.is_empty() {
            return Ok(None);
        }
        here.sort_by(|a, b| a.uid().cmp(b.uid()));
        let owners: Vec<_> = here.iter().map(|d| d.owner(false)).collect();
        let built = build_pool(&owners, &self.settings);
        if let Some((applied, at)) = before.and_then(|s| s.applied.as_ref())
            && *applied == built
            && at.elapsed() < SETTLED
        {
            return Ok(Some((built, *at)));
        }
        let PoolResources { accounts, tokens, service, deployment } = &built;
        for account in accounts {
            write::<ServiceAccount>(&self.client, namespace, account, Conflicts::Ours).await?;
        }
        let token = self.tokens(namespace, tokens).await?;
        self.hub.space(namespace).let_in(token);
        write::<Service>(&self.client, namespace, service, Conflicts::Theirs).await?;
        write::<Deployment>(&self.client, namespace, deployment, Conflicts::Ours).await?;
        Ok(Some((built, Instant::now())))
    }

    /// Makes the namespace's tokens where they are missing; the one that routers carry.
    async fn tokens(&self, namespace: &str, object: &Object) -> Result<String, PoolError> {
        let api = Api::<Secret>::namespaced(self.client.clone(), namespace);
        if api.get_opt(TOKENS).await.map_err(PoolError::Tokens)?.is_none() {
            let mut body = object.body.clone();
            let draw = || draw().map_err(PoolError::Draw);
            body["stringData"] = json!({ FLEET_TOKEN: draw()?, WORKER_TOKEN: draw()? });
            let secret: Secret = serde_json::from_value(body).map_err(|e| PoolError::Tokens(kube::Error::SerdeError(e)))?;
            let params = PostParams { field_manager: Some(format!("{MANAGER}-tokens")), ..PostParams::default() };
            match api.create(&params, &secret).await {
                Ok(_) => info!(namespace, "drew tokens"),
                Err(kube::Error::Api(status)) if status.code == 409 => {}
                Err(error) => return Err(PoolError::Tokens(error)),
            }
        }
        let secret: Secret = write(&self.client, namespace, object, Conflicts::Ours).await?;
        let token = secret.data.unwrap_or_default().remove(FLEET_TOKEN).ok_or(PoolError::NoToken)?;
        String::from_utf8(token.0).map_err(|_| PoolError::NoToken)
    }
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
