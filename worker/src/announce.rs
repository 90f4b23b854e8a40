//! Says where this worker is to routers that do not find it: one that came back at another address while nobody updates the fleet state.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use identity::Dialer;
use proto::pool::{Announcement, pool_client::PoolClient};
use tokio::{
    net::{UdpSocket, lookup_host},
    time::{interval, timeout},
};
use tonic::{
    Status,
    transport::{Endpoint, Uri},
};
use tracing::{debug, info};

use crate::state::Worker;

/// A worker that had a session and has had none for so long is not found where routers look for it.
const UNFOUND: Duration = Duration::from_secs(5);
/// How often it is looked whether there is a session.
const LOOK: Duration = Duration::from_millis(250);
/// First and longest pause between two announcements.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));
/// Longest wait for a router.
const ANSWER: Duration = Duration::from_secs(2);

/// Announces the worker, which listens at `listening`, to one of `routers` after the other while it has no session.
pub(crate) async fn announce(worker: Arc<Worker>, routers: Vec<Uri>, listening: SocketAddr) {
    let (mut looks, mut found, mut next, mut pause) = (interval(LOOK), None::<Instant>, Instant::now(), BACKOFF.0);
    let mut routers = routers.iter().cycle();
    loop {
        tokio::select! {
            () = worker.stop.cancelled() => return,
            _ = looks.tick() => {}
        }
        if worker.gate.live().is_some() {
            (found, pause) = (Some(Instant::now()), BACKOFF.0);
            continue;
        }
        if found.is_some_and(|at| at.elapsed() < UNFOUND) || Instant::now() < next {
            continue;
        }
        let Some(router) = routers.next() else { return };
        let said = tokio::select! {
            () = worker.stop.cancelled() => return,
            said = timeout(ANSWER, say(&worker, router, listening)) => said,
        };
        match said {
            Ok(Ok(address)) => info!(%router, address, "announced this worker"),
            Ok(Err(status)) => debug!(%router, %status, "a router did not take the announcement"),
            Err(_) => debug!(%router, "a router did not answer the announcement in time"),
        }
        next = Instant::now() + pause;
        pause = (pause * 2).min(BACKOFF.1);
    }
}

/// Announces it to one router; the address that was given.
async fn say(worker: &Worker, router: &Uri, listening: SocketAddr) -> Result<String, Status> {
    let unreachable = |error: io::Error| Status::unavailable(error.to_string());
    let address = own(router, listening).await.map_err(unreachable)?.to_string();
    let named = worker.identity.clone().and_then(|own| own.name().router().map(|router| (own, router)));
    let channel = Endpoint::from(router.clone()).connect_timeout(ANSWER).connect_with_connector(Dialer::new(named)).await;
    let channel = channel.map_err(|error| Status::unavailable(crate::failure::chain(&error)))?;
    let announcement = Announcement {
        replica: worker.spec.replica.clone(),
        stage: worker.stage() as u32,
        rank: worker.rank() as u32,
        revision: String::new(),
        address: address.clone(),
        incarnation: worker.incarnation,
    };
    PoolClient::with_interceptor(channel, worker.bearer.clone()).announce(announcement).await?;
    Ok(address)
}

/// Where the router finds this worker: where it listens or, if that is everywhere, the address that it has on the way to the router.
async fn own(router: &Uri, listening: SocketAddr) -> io::Result<SocketAddr> {
    if !listening.ip().is_unspecified() {
        return Ok(listening);
    }
    let nowhere = || io::Error::new(io::ErrorKind::InvalidInput, format!("{router} names no host"));
    let host = router.host().ok_or_else(nowhere)?.trim_start_matches('[').trim_end_matches(']');
    let to = lookup_host((host, router.port_u16().unwrap_or(80))).await?.next().ok_or_else(nowhere)?;
    // Connecting a datagram socket sends nothing; it only asks for the route.
    let any: SocketAddr = if to.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0_u16; 8], 0).into() };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(to).await?;
    Ok(SocketAddr::new(socket.local_addr()?.ip(), listening.port()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_worker_that_listens_everywhere_names_the_address_on_the_way_to_the_router() {
        let router = Uri::from_static("http://127.0.0.1:7072");
        let everywhere = own(&router, "0.0.0.0:7071".parse().expect("an address")).await.expect("a route");
        assert_eq!(everywhere.to_string(), "127.0.0.1:7071");
        let one = own(&router, "127.0.0.9:7071".parse().expect("an address")).await.expect("its own");
        assert_eq!(one.to_string(), "127.0.0.9:7071");
    }
}
