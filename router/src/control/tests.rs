//! A router and a control plane over loopback.

use std::{pin::Pin, sync::Arc, time::Duration};

use plan::fleet::{FleetDeployment, FleetReplica, FleetState, ReplicaLimits, RoutingPolicy, ServingSettings};
use plan::shard::{KvDType, KvGeometry};
use proto::{
    bearer::Bearer,
    convert::encode_fleet,
    fleet::{self as wire, fleet_server},
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};
use tokio_stream::{Stream, StreamExt, wrappers::WatchStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming, transport::server::TcpIncoming};

use super::{Control, FleetStore};
use crate::{
    edge::{Edge, EdgeOptions},
    replica::WorkersConnector,
};

const TOKEN: &str = "secret";

/// A control plane that sends what its channel holds, and hands reports on.
struct Plane {
    states: watch::Receiver<FleetState>,
    reports: mpsc::Sender<wire::RouterReport>,
}

#[tonic::async_trait]
impl fleet_server::Fleet for Plane {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<wire::FleetState, Status>> + Send>>;

    async fn watch(&self, request: Request<Streaming<wire::RouterReport>>) -> Result<Response<Self::WatchStream>, Status> {
        Bearer::new(Some(TOKEN.into())).check(&request)?;
        let (mut incoming, reports) = (request.into_inner(), self.reports.clone());
        tokio::spawn(async move {
            while let Ok(Some(report)) = incoming.message().await {
                if reports.send(report).await.is_err() {
                    return;
                }
            }
        });
        let states = WatchStream::new(self.states.clone()).map(|state| Ok(encode_fleet(&state)));
        Ok(Response::new(Box::pin(states)))
    }
}

fn state(number: u64) -> FleetState {
    let limits = ReplicaLimits {
        kv: KvGeometry { dtype: KvDType::F32, groups: Vec::new() },
        max_context: 8,
        max_batch_sequences: 1,
        max_batch_tokens: 1,
        prefix_caching: true,
    };
    let serving = ServingSettings {
        chat_template: None,
        system_prompt: None,
        policy: RoutingPolicy::default(),
        queue_requests: 1,
        queue_seconds: 1,
        prompt_lookup: 0,
        hold: None,
        stopped: None,
    };
    // Nobody listens on the port of discard.
    let replica = FleetReplica {
        name: "a-r0".into(),
        revision: "1".into(),
        numerics: "n".into(),
        weight: 1,
        draining: false,
        limits: limits.clone(),
        workers: vec![vec!["127.0.0.1:9".into()]],
        draft: None,
    };
    let deployment = FleetDeployment {
        name: "a".into(),
        model: "a".into(),
        aliases: Vec::new(),
        drivers: String::new(),
        limits,
        serving,
        replicas: vec![replica],
        adapters: Vec::new(),
    };
    FleetState { term: 7, number, deployments: vec![deployment], routers: Vec::new() }
}

/// Serves `states` until `stop`; the address and the reports.
async fn serve(states: watch::Receiver<FleetState>, stop: CancellationToken) -> (String, mpsc::Receiver<wire::RouterReport>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("a bound listener");
    // Every report is read by the test, or the stream ends.
    let (reports, received) = mpsc::channel(16);
    let service = fleet_server::FleetServer::new(Plane { states, reports });
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming_shutdown(TcpIncoming::from(listener), stop.cancelled_owned()),
    );
    (format!("http://{address}"), received)
}

fn edge(fleet: watch::Receiver<FleetState>) -> Edge {
    Edge::start(fleet, EdgeOptions { connector: Arc::new(WorkersConnector::new(None)), resume: Duration::from_secs(1), deadline: None })
}

#[tokio::test]
async fn states_come_down_reports_go_up_and_the_last_state_is_kept() {
    let folder = tempfile::tempdir().expect("a folder");
    let kept = folder.path().join("fleet.json");
    let (sender, states) = watch::channel(state(1));
    let stop = CancellationToken::new();
    let (address, mut reports) = serve(states, stop.clone()).await;

    let control = Control::new("router-0".into(), &address, Some(TOKEN.into())).expect("an address");
    assert_eq!(FleetStore::read(&kept).expect("no file is no error"), None);
    let store = FleetStore::new(FleetState::default(), Some(kept.clone()));
    let mut seen = store.subscribe();
    let follow = tokio::spawn(control.follow(edge(store.subscribe()), store, stop.clone()));
    seen.wait_for(|s| s.number == 1).await.expect("a state comes");
    sender.send_replace(state(2));
    seen.wait_for(|s| s.number == 2).await.expect("the next state comes");
    // An older one, as from an operator that lost its lease, changes nothing; the next one shows that it was seen.
    sender.send_replace(state(1));
    loop {
        let report = reports.recv().await.expect("reports come");
        assert_eq!(report.router, "router-0");
        if (report.term, report.number) == (7, 2) && !report.loads.is_empty() {
            assert!(!report.loads[0].replicas[0].ready, "nobody listens there");
            break;
        }
    }
    sender.send_replace(state(3));
    let last = seen.wait_for(|s| s.number != 2).await.expect("the next state comes").number;
    assert_eq!(last, 3);
    stop.cancel();
    follow.await.expect("it ends");
    let restored = FleetStore::read(&kept).expect("a kept state").expect("a kept state");
    assert!((2..=3).contains(&restored.number), "{}", restored.number);
    // Another file: the third state may still be on its way to the first.
    let damaged = folder.path().join("damaged.json");
    std::fs::write(&damaged, "{").expect("a file");
    assert!(FleetStore::read(&damaged).is_err(), "a damaged file is no state");
}

#[tokio::test]
async fn a_router_without_the_token_gets_nothing() {
    let (_sender, states) = watch::channel(state(1));
    let stop = CancellationToken::new();
    let (address, _reports) = serve(states, stop.clone()).await;
    let control = Control::new("router-0".into(), &address, Some("other".into())).expect("an address");
    let store = FleetStore::new(FleetState::default(), None);
    let ended = control.stream(&edge(store.subscribe()), &store).await;
    assert!(matches!(&ended, super::StreamError::Status(s) if s.code() == tonic::Code::Unauthenticated), "{ended}");
    assert_eq!(store.number(), (0, 0));
    stop.cancel();
}
