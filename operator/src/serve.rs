//! The process: serves health, metrics and the fleet, and reconciles once it leads.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, bail};
use axum::{Router, extract::State, http::StatusCode, routing::get};
use identity::{Identity, Incoming, Protocol};
use kube::Client;
use proto::fleet::fleet_server::FleetServer;
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
    time::sleep,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::transport::Server;
use tracing::{info, warn};

use crate::{
    args::{Args, Tls},
    build::Settings,
    certificates::Lifetimes,
    controller::{self, Options},
    fleet::{FleetService, Hub},
    host::Folders,
    issuer::Issuer,
    lease::{Election, Notes},
    metrics::Metrics,
    models::chain,
    requests,
    stop::Stops,
};

/// Largest report of a router: a thousand deployments of a thousand replicas.
const REPORT: usize = 64 << 20;
/// How often a router's connection is tried out, and how long its other end may take.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(5));

/// Pause after a connection could not be taken: out of file descriptors, say.
const PAUSE: Duration = Duration::from_millis(10);
/// The hub, once this process leads.
type Leader = Arc<OnceLock<Arc<Hub>>>;
/// What the fleet's server needs once this process leads: the hub, and what this process is, where names are proven.
type Led = (Arc<Hub>, Option<Identity>);

/// How long reconciles may go on once this process is told to stop.
const GRACE: Duration = Duration::from_secs(10);

/// What HTTP handlers see.
#[derive(Clone)]
struct Health {
    metrics: Arc<Metrics>,
    leader: Leader,
    /// Another API call would be answered.
    reached: Arc<AtomicBool>,
}

/// Runs the operator until `stop`, or until it loses its lease.
///
/// # Errors
/// When an address cannot be listened on, the API server cannot be found, or the lease is lost.
pub async fn run(args: Args, stop: CancellationToken) -> anyhow::Result<()> {
    let settings = settings(&args)?;
    // Bound before anything else, so that a probe finds a process that starts.
    let http = TcpListener::bind(args.http_listen).await.with_context(|| format!("failed to listen on {}", args.http_listen))?;
    let fleet = TcpListener::bind(args.fleet_listen).await.with_context(|| format!("failed to listen on {}", args.fleet_listen))?;
    let (leader, tasks, metrics) = (Arc::new(OnceLock::new()), TaskTracker::new(), Arc::new(Metrics::default()));
    let reached = Arc::new(AtomicBool::new(false));
    let health = Health { metrics: metrics.clone(), leader: leader.clone(), reached: reached.clone() };
    let web = tokio::spawn(axum::serve(http, routes(health)).with_graceful_shutdown(stop.clone().cancelled_owned()).into_future());
    let (leading, led) = oneshot::channel();
    let routers = tokio::spawn(serve_fleet(fleet, led, tasks.clone(), stop.clone()));

    let client = Client::try_default().await.context("failed to find the API server")?;
    let version = client.apiserver_version().await.context("failed to reach the API server")?;
    info!(version = version.git_version, "API server reached");
    reached.store(true, Ordering::Relaxed);
    let client = requests::counted(client, metrics.clone());
    let outcome = lead((&args, settings), client, (&leader, leading, &metrics), &stop).await;
    stop.cancel();
    tasks.close();
    tasks.wait().await;
    routers.await.context("the fleet's server broke")?.context("the fleet's server failed")?;
    web.await.context("the HTTP server broke")?.context("the HTTP server failed")?;
    outcome
}

/// Waits for the lease, and reconciles for as long as it is held.
async fn lead(
    (args, settings): (&Args, Settings),
    client: Client,
    (leader, leading, metrics): (&Leader, oneshot::Sender<Led>, &Arc<Metrics>),
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let identity = args.identity.clone().unwrap_or_else(|| format!("{}-{}", args.namespace, std::process::id()));
    let election = Election::new(client.clone(), &args.namespace, identity.clone());
    let term = tokio::select! {
        () = stop.cancelled() => return Ok(()),
        term = election.win() => term,
    };
    let issuer = match args.tls {
        Tls::Disabled => None,
        Tls::Auto => {
            let begun = Issuer::begin(client.clone(), &args.namespace, lifetimes(args)?, metrics.clone()).await;
            Some(Arc::new(begun.context("failed to get the authorities")?))
        }
    };
    // As many as deployments may change with one report; more wait in their routers' streams.
    let (wake, woken) = mpsc::channel(1024);
    let hub = Arc::new(Hub::new(term, wake));
    let stops = args.stop_at.map_or_else(Stops::default, |place| Stops::at(place, Notes::new(client.clone(), &args.namespace)));
    let options = Options {
        stops,
        client,
        settings,
        namespace: args.watch_namespace.clone(),
        identity,
        hub: hub.clone(),
        woken,
        metrics: metrics.clone(),
        issuer: issuer.clone(),
    };
    if leader.set(hub.clone()).is_err() {
        bail!("this process leads already");
    }
    if leading.send((hub, issuer.map(|issuer| issuer.identity().clone()))).is_err() {
        bail!("the fleet's server has ended");
    }
    metrics.lead();
    let reconciling = controller::run(options, stop.child_token());
    if !while_held(&election, reconciling, stop).await {
        // Another may write now: what is under way here is dropped, and this process starts anew.
        bail!("the lease is lost");
    }
    if let Err(error) = election.release().await {
        warn!(error = chain(&error), "the lease is not given back; the next operator waits for it to run out");
    }
    Ok(())
}

/// Reconciles for as long as the lease is held; whether it still is.
async fn while_held(election: &Election, reconciling: impl Future<Output = ()>, stop: &CancellationToken) -> bool {
    // A reconcile under way may end; one that waits for an API server that is away does not.
    let ended = async {
        stop.cancelled().await;
        sleep(GRACE).await;
    };
    tokio::select! {
        // The lease is looked at first: a process that was stopped for a while must not write before it has.
        biased;
        () = election.keep() => false,
        () = reconciling => true,
        () = ended => true,
    }
}

/// Turns routers away until this process leads, so that they dial again and find who does; then serves them.
async fn serve_fleet(
    listener: TcpListener,
    led: oneshot::Receiver<Led>,
    tasks: TaskTracker,
    stop: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let turning_away = async {
        loop {
            match listener.accept().await {
                Ok(connection) => drop(connection),
                Err(error) => {
                    warn!(%error, "failed to take a connection");
                    sleep(PAUSE).await;
                }
            }
        }
    };
    let (hub, identity) = tokio::select! {
        led = led => match led {
            Ok(led) => led,
            // This process ends without having led.
            Err(_) => return Ok(()),
        },
        () = turning_away => return Ok(()),
    };
    let service = FleetService::new(hub, tasks, stop.clone());
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE.0))
        .http2_keepalive_timeout(Some(KEEPALIVE.1))
        .add_service(FleetServer::new(service).max_decoding_message_size(REPORT))
        .serve_with_incoming_shutdown(Incoming::new(listener, identity, Protocol::Grpc), stop.cancelled_owned())
        .await
}

/// How long things last, as told; what cannot work is refused before anything is signed.
fn lifetimes(args: &Args) -> anyhow::Result<Lifetimes> {
    let [certificate, renew, authority, settle] =
        [args.certificate_seconds, args.certificate_renew_seconds, args.authority_seconds, args.authority_settle_seconds]
            .map(Duration::from_secs);
    // What is replaced must reach a process while it is still valid, as must a new authority before it signs.
    if renew + settle > certificate {
        bail!(
            "certificates are valid for {certificate:?}, replaced after {renew:?}, and reach everybody within {settle:?}: expected a validity of \
             at least {:?}",
            renew + settle
        );
    }
    Ok(Lifetimes { certificate, renew, authority, settle })
}

fn settings(args: &Args) -> anyhow::Result<Settings> {
    Ok(Settings {
        image: args.image.clone(),
        image_pull_policy: args.image_pull_policy.clone(),
        fleet_address: args.fleet_address.clone(),
        hf_endpoint: args.hf_endpoint.clone(),
        folders: Folders::new(&args.host_paths, args.node_cache.as_deref())?,
        worker_cpu: args.worker_cpu.clone(),
        pool_size: args.pool_size,
        router_cpu: args.router_cpu.clone(),
        router_memory: args.router_memory.clone(),
        proven: args.tls == Tls::Auto,
    })
}

fn routes(health: Health) -> Router {
    Router::new().route("/live", get(|| async { "live" })).route("/ready", get(ready)).route("/metrics", get(text)).with_state(health)
}

/// 200 once the API server was reached. One that waits for the lease is ready too: it would take over.
async fn ready(State(health): State<Health>) -> (StatusCode, &'static str) {
    match (health.reached.load(Ordering::Relaxed), health.leader.get().is_some()) {
        (false, _) => (StatusCode::SERVICE_UNAVAILABLE, "the API server is not reached yet"),
        (true, false) => (StatusCode::OK, "waiting for the lease"),
        (true, true) => (StatusCode::OK, "leading"),
    }
}

async fn text(State(health): State<Health>) -> (StatusCode, String) {
    let routers = health.leader.get().map_or(0, |hub| hub.routers());
    match health.metrics.text(routers) {
        Ok(text) => (StatusCode::OK, text),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use k8s_openapi::api::core::v1::ConfigMap;
    use kube::{
        Api,
        api::{Patch, PatchParams},
    };
    use serde_json::json;

    use super::*;
    use crate::mock::{self, Objects};

    /// Writes who it is, again and again, as a reconcile might.
    async fn write(objects: &Objects, who: &str) {
        let api = Api::<ConfigMap>::namespaced(mock::client(objects), "models");
        loop {
            let body = json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "written" }, "data": { "by": who } });
            api.patch("written", &PatchParams::apply("test"), &Patch::Apply(body)).await.expect("it is written");
            sleep(Duration::from_millis(100)).await;
        }
    }

    fn writer(objects: &Objects) -> Option<String> {
        let objects = objects.lock().expect("nobody panics with it");
        let written = objects.get("/api/v1/namespaces/models/configmaps/written")?;
        written["data"]["by"].as_str().map(str::to_owned)
    }

    /// Two operators, of which the one that leads is stopped, as a process may be: the other takes over, and the first one writes nothing more.
    #[tokio::test(start_paused = true)]
    async fn an_operator_that_lost_its_lease_stops_writing() {
        let (objects, stop) = (Objects::default(), CancellationToken::new());
        let election = |name: &str| Election::new(mock::client(&objects), "skein-system", name.to_owned());
        let (first, second) = (election("first"), election("second"));
        let earlier = first.win().await;
        let leading = while_held(&first, write(&objects, "first"), &stop);
        tokio::pin!(leading);
        // While it leads, the other waits, however long.
        tokio::select! {
            _ = second.win() => panic!("there are two leaders"),
            _ = &mut leading => panic!("the lease was held"),
            () = sleep(Duration::from_secs(120)) => {}
        }
        assert_eq!(writer(&objects).as_deref(), Some("first"));
        // It is stopped: nothing of it goes on.
        let later = second.win().await;
        assert!(later > earlier);
        let follower = while_held(&second, write(&objects, "second"), &stop);
        tokio::pin!(follower);
        tokio::select! {
            _ = &mut follower => panic!("the lease is held"),
            () = sleep(Duration::from_secs(30)) => {}
        }
        assert_eq!(writer(&objects).as_deref(), Some("second"));
        // It goes on, and learns that it leads no more before it writes.
        assert!(!leading.await);
        assert_eq!(writer(&objects).as_deref(), Some("second"));
    }

    /// Control: one that still holds its lease goes on writing after a stop.
    #[tokio::test(start_paused = true)]
    async fn an_operator_that_kept_its_lease_goes_on() {
        let (objects, stop) = (Objects::default(), CancellationToken::new());
        let election = Election::new(mock::client(&objects), "skein-system", "first".to_owned());
        election.win().await;
        let leading = while_held(&election, write(&objects, "first"), &stop);
        tokio::pin!(leading);
        tokio::select! {
            _ = &mut leading => panic!("the lease was held"),
            () = sleep(Duration::from_secs(5)) => {}
        }
        sleep(Duration::from_secs(4)).await;
        objects.lock().expect("nobody panics with it").remove("/api/v1/namespaces/models/configmaps/written");
        tokio::select! {
            _ = &mut leading => panic!("the lease was held"),
            () = sleep(Duration::from_secs(5)) => {}
        }
        assert_eq!(writer(&objects).as_deref(), Some("first"));
        stop.cancel();
        assert!(leading.await, "it ends as it is told to, with its lease");
    }

    #[test]
    fn what_cannot_reach_a_process_in_time_is_refused() {
        let with = |more: &[&str]| {
            let args = ["skein-operator", "--image=i", "--fleet-address=http://10.0.0.1:7070"];
            lifetimes(&Args::try_parse_from(args.iter().chain(more)).expect("they are understood"))
        };
        let usual = with(&[]).expect("the defaults work");
        assert!(usual.renew + usual.settle < usual.certificate && usual.certificate < usual.authority);
        with(&["--certificate-seconds=300", "--certificate-renew-seconds=60", "--authority-settle-seconds=240"]).expect("just enough");
        let refused = with(&["--certificate-seconds=300", "--certificate-renew-seconds=60", "--authority-settle-seconds=241"]);
        assert!(refused.expect_err("too short").to_string().contains("301s"));
    }
}
