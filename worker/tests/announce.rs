//! A worker that no fleet state names at its address is found, because it says where it is.

use std::{sync::Arc, time::Duration};

use plan::{
    fleet::{FleetDeployment, FleetState, RoutingPolicy, ServingSettings},
    worker::CollectiveKind,
};
use router::{
    control::FleetStore,
    edge::{Edge, EdgeOptions},
    pool::PoolOptions,
    replica::WorkersConnector,
};
use tokio::{net::TcpListener, time::timeout};

use crate::fleet::{LONG, Running, TOKEN, fleet, own_address, plan, specs};

/// A router that has the state at first told of `workers`, and where its pool listens.
async fn router(workers: &[Running]) -> (Edge, String) {
    let mut replica = fleet(workers);
    // Nobody listens on the port of discard.
    replica.workers = vec![vec!["127.0.0.1:9".to_owned()]];
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
    let limits = replica.limits.clone();
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
    let state = FleetState { term: 1, number: 1, deployments: vec![deployment], routers: Vec::new() };
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("a bound listener");
    let worker_token = Some(TOKEN.to_owned());
    let pool = PoolOptions {
        pool: String::new(),
        name: "router-0".into(),
        listener,
        token: None,
        worker_token: worker_token.clone(),
        identity: None,
        seeds: Vec::new(),
    };
    let options = EdgeOptions { connector: Arc::new(WorkersConnector::new(worker_token)), resume: LONG, deadline: None };
    (Edge::join(&FleetStore::new(state, None), options, pool), format!("http://{address}"))
}

async fn start(routers: Vec<String>) -> Running {
    let spec = specs(&plan(1, 1), CollectiveKind::Tcp).remove(0);
    let listen = own_address();
    Running::start_announced(spec, listen, routers).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_is_found_where_it_says_it_is() {
    let silent = start(Vec::new()).await;
    let (edge, address) = router(&[silent]).await;
    // Control: nobody says anything, and nobody is found.
    assert!(timeout(Duration::from_millis(500), edge.wait_ready("a")).await.is_err());
    // The first one it is told of is not there.
    let _announced = start(vec!["http://127.0.0.1:9".to_owned(), address]).await;
    assert!(timeout(LONG, edge.wait_ready("a")).await.expect("in time"));
    edge.shutdown().await;
}
