//! Routers and workers that prove who they are; everybody else is refused.

use std::{net::SocketAddr, sync::Arc};

use identity::{
    Dialer, Identity,
    testing::{Authority, Process},
};
use plan::{
    planner::{self, Origin},
    shard::ExecutionPlan,
    worker::CollectiveKind,
};
use proto::{
    bearer::Bearer,
    worker::{AcquireRequest, ProbeRequest, worker_client::WorkerClient},
};
use router::replica::{Connector, Replica, WorkersConnector};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::{Code, transport::Endpoint};
use worker::{Deadlines, WorkerError, WorkerOptions};

use crate::{
    fleet::{LONG, Running, TOKEN, fleet, model, own_address, plan},
    replica::{driven, ids, solo, steps},
};

const ROUTER: &str = "spiffe://skein/ns/a/router";

fn name(stage: usize) -> String {
    format!("spiffe://skein/ns/a/replica/fixture-r0/stage/{stage}")
}

/// Workers over TCP, each with the certificate of its stage.
async fn start(plan: &ExecutionPlan, authority: &Authority) -> (Vec<Running>, Vec<Process>) {
    let processes: Vec<Process> = (0..plan.stages.len()).map(|stage| authority.process(&name(stage))).collect();
    let origin = Origin { replica: "fixture-r0", uri: &model(), digest: None };
    let mut workers = Vec::new();
    for spec in planner::worker_specs(plan, &origin, 1, CollectiveKind::Tcp) {
        let identity = processes[spec.shard.stage].identity.clone();
        workers.push(Running::start_as(spec, own_address(), Deadlines::default(), Some(identity)).await);
    }
    (workers, processes)
}

fn connect(workers: &[Running], identity: Option<Identity>) -> Arc<dyn Replica> {
    WorkersConnector::new(Some(TOKEN.to_owned())).with_identity(identity).replica(&fleet(workers))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn proven_stages_and_ranks_give_the_bits_of_one_engine() {
    let (authority, plan) = (Authority::new(), plan(2, 2));
    let router = authority.process(ROUTER);
    let (workers, processes) = start(&plan, &authority).await;
    let replica = connect(&workers, Some(router.identity.clone()));
    let steps = steps(&plan, ids);
    let expected = solo(&steps);
    assert!(driven(&*replica, &steps).await.expect("replies") == expected, "encrypted connections change bits");
    // Everybody gets a certificate of a new authority: the next session is proven by it.
    let new = Authority::new();
    new.write(router.folder.path(), &[&authority, &new], &[ROUTER]);
    for (stage, process) in processes.iter().enumerate() {
        new.write(process.folder.path(), &[&authority, &new], &[&name(stage)]);
    }
    assert!(driven(&*replica, &steps).await.expect("replies") == expected, "the second session differs");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_cannot_prove_its_name_is_refused() {
    let (authority, plan) = (Authority::new(), plan(1, 1));
    let (workers, _processes) = start(&plan, &authority).await;
    let opens = |identity: Option<Identity>| {
        let replica = connect(&workers, identity);
        async move { timeout(LONG, replica.open()).await.expect("in time").map(drop) }
    };
    let refused = [
        None,
        Some(authority.process("spiffe://skein/ns/b/router")),
        Some(Authority::new().process(ROUTER)),
        Some(authority.process("spiffe://skein/ns/a/replica/other-r0/stage/0")),
        Some(authority.process("spiffe://skein/operator")),
    ];
    for (i, stranger) in refused.iter().enumerate() {
        let error = opens(stranger.as_ref().map(|p| p.identity.clone())).await.expect_err("a refusal");
        assert!(error.to_string().contains("stage 0 rank 0"), "stranger {i}: {error}");
    }
    // Control: the namespace's own router.
    opens(Some(authority.process(ROUTER).identity)).await.expect("a session");
}

/// A worker may be probed by another, and not be driven by it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_are_for_those_whose_business_they_are() {
    let (authority, plan) = (Authority::new(), plan(1, 1));
    let (workers, _processes) = start(&plan, &authority).await;
    let client = |process: &Process| {
        let expected = name(0).parse().expect("a name");
        let endpoint = Endpoint::from_shared(format!("http://{}", workers[0].address)).expect("an address");
        let channel = endpoint.connect_with_connector_lazy(Dialer::new(Some((process.identity.clone(), expected))));
        WorkerClient::with_interceptor(channel, Bearer::new(Some(TOKEN.to_owned())))
    };
    let acquire = AcquireRequest { router: "r".into(), workers: vec![workers[0].named()], handover: false };
    let (peer, router) = (authority.process(&name(0)), authority.process(ROUTER));
    client(&peer).probe(ProbeRequest {}).await.expect("an answer");
    let status = client(&peer).acquire(acquire.clone()).await.expect_err("a refusal");
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    // Control: the router may.
    client(&router).acquire(acquire).await.expect("an epoch");
}

#[tokio::test]
async fn a_worker_with_the_certificate_of_another_does_not_start() {
    let process = Authority::new().process(&name(1));
    let origin = Origin { replica: "fixture-r0", uri: &model(), digest: None };
    let spec = planner::worker_specs(&plan(1, 1), &origin, 1, CollectiveKind::Tcp).remove(0);
    let isa = kernels::Isa::named("auto").expect("an instruction set");
    let mut options = WorkerOptions::new(spec, SocketAddr::from(([127, 0, 0, 1], 0)), None, isa, source::SourceOptions::default());
    options.identity = Some(process.identity);
    let ended = timeout(LONG, worker::serve(options, |_| {}, CancellationToken::new())).await.expect("in time");
    assert!(matches!(&ended, Err(WorkerError::Identity { stage: 0, .. })), "{ended:?}");
}
