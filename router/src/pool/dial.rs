//! The stream to another router: dialled again and again while the fleet state names it.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures_util::StreamExt;
use identity::Dialer;
use plan::fleet::FleetState;
use proto::{
    convert::{ConvertError, decode_fleet},
    pool::{
        EdgeMessage, Hello, OwnerMessage, StateRequest, edge_message::Message as Said, owner_message::Message, pool_client::PoolClient,
    },
};
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{
    Streaming,
    service::interceptor::InterceptedService,
    transport::{Channel, Endpoint},
};
use tracing::{debug, info, warn};

use super::{COMMANDS, Pool, SILENT, TICK, VERSIONS, peer::Line};
use crate::pool::Peer;

/// A router that has not accepted a connection and a stream within this time is not there.
const OPEN: Duration = Duration::from_secs(1);
/// First and longest pause between attempts to reach a router.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// The same for a first fleet state.
const SEEK: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// Bytes that may be under way on a stream.
const WINDOW: u32 = 4 << 20;
/// Largest message: a fleet state, or the cached blocks of a large replica.
pub(super) const MESSAGE: usize = 64 << 20;

type Client = PoolClient<InterceptedService<Channel, proto::bearer::Bearer>>;
/// A fleet state on its way here.
type Fetch = Pin<Box<dyn Future<Output = Result<FleetState, Ended>> + Send>>;

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("it cannot be reached")]
    Connect(#[source] tonic::transport::Error),
    #[error("it did not answer within {} ms", OPEN.as_millis())]
    Late,
    #[error("it ended the stream: {0}")]
    Status(tonic::Status),
    #[error("it closed the stream")]
    Closed,
    #[error("it has been silent for {} ms", (TICK * SILENT).as_millis())]
    Silent,
    #[error("it does not take what it is sent")]
    Stalled,
    #[error("it sent a message that is not understood")]
    Message(#[source] ConvertError),
    #[error("it is {got} in version {version}, expected {expected} in {VERSIONS:?}")]
    Welcome { expected: String, got: String, version: u32 },
}

/// Keeps a stream to `peer` until it is stopped.
pub(super) async fn follow(pool: Arc<Pool>, peer: Arc<Peer>) {
    let mut pause = BACKOFF.0;
    loop {
        let ended = tokio::select! {
            () = peer.stop.cancelled() => break,
            ended = join(&pool, &peer) => ended,
        };
        let (joined, news) = peer.lost();
        if news {
            pool.changed.send_replace(());
        }
        if joined {
            pause = BACKOFF.0;
            warn!(router = peer.name, error = &ended as &dyn std::error::Error, "a router of the pool is lost");
        } else {
            debug!(router = peer.name, error = &ended as &dyn std::error::Error, "a router of the pool is not there");
        }
        tokio::select! {
            () = peer.stop.cancelled() => break,
            () = sleep(pause) => pause = (pause * 2).min(BACKOFF.1),
        }
    }
    peer.lost();
    pool.changed.send_replace(());
}

/// One stream, until it ends.
async fn join(pool: &Arc<Pool>, peer: &Peer) -> Ended {
    let broken = pool.stop.child_token();
    let _guard = broken.clone().drop_guard();
    let opened = timeout(OPEN, open(pool, peer, &broken)).await;
    let (client, line, mut incoming) = match opened {
        Ok(Ok(opened)) => opened,
        Ok(Err(ended)) => return ended,
        Err(_) => return Ended::Late,
    };
    info!(router = peer.name, "joined a router of the pool");
    peer.joined(line);
    pool.announcements().iter().for_each(|announcement| peer.tell(announcement));
    pool.changed.send_replace(());
    let mut ticks = interval(TICK);
    // After a stop of this process there is one tick, and then everything that arrived is read.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut silent, mut fetch) = (0, None::<Fetch>);
    loop {
        tokio::select! {
            message = incoming.message() => {
                silent = 0;
                let taken = match message {
                    Ok(Some(OwnerMessage { message: Some(message) })) => take(pool, peer, message),
                    Ok(Some(OwnerMessage { message: None })) => Ok(()),
                    Ok(None) => return Ended::Closed,
                    Err(status) => return Ended::Status(status),
                };
                if let Err(error) = taken {
                    return Ended::Message(error);
                }
                // States of routers of another pool are of other deployments, and counted for themselves.
                if fetch.is_none() && peer.pool == pool.own && peer.number() > pool.store.number() {
                    fetch = Some(Box::pin(fetch_state(client.clone())));
                }
            }
            fetched = async { match &mut fetch { Some(fetch) => fetch.await, None => std::future::pending().await } } => {
                fetch = None;
                match fetched {
                    Ok(state) => pool.take(state).await,
                    Err(error) => return error,
                }
            }
            _ = ticks.tick() => {
                silent += 1;
                if silent > SILENT {
                    return Ended::Silent;
                }
                peer.alive();
            }
            () = broken.cancelled() => return Ended::Stalled,
        }
    }
}

fn take(pool: &Pool, peer: &Peer, message: Message) -> Result<(), ConvertError> {
    match message {
        Message::Event(event) => peer.take_event(event)?,
        Message::Status(status) => {
            if peer.take_status(status) {
                pool.changed.send_replace(());
            }
        }
        Message::Prefixes(prefixes) => peer.take_prefixes(&prefixes)?,
        Message::Welcome(_) => {}
    }
    Ok(())
}

/// Connects and is welcomed.
async fn open(pool: &Pool, peer: &Peer, broken: &CancellationToken) -> Result<(Client, Line, Streaming<OwnerMessage>), Ended> {
    let mut client = dial(pool, &format!("http://{}", peer.address)).await?;
    let (outgoing, messages) = mpsc::channel(COMMANDS);
    let hello = Hello { version_min: VERSIONS.0, version_max: VERSIONS.1, from: pool.name.clone(), to: peer.name.clone() };
    outgoing.try_send(EdgeMessage { message: Some(Said::Hello(hello)) }).map_err(|_| Ended::Stalled)?;
    let messages = ReceiverStream::new(messages).take_until(broken.clone().cancelled_owned());
    let mut incoming = client.join(messages).await.map_err(Ended::Status)?.into_inner();
    match incoming.message().await.map_err(Ended::Status)?.and_then(|m| m.message) {
        Some(Message::Welcome(w)) if w.name == peer.name && (VERSIONS.0..=VERSIONS.1).contains(&w.version) => {}
        Some(Message::Welcome(w)) => return Err(Ended::Welcome { expected: peer.name.clone(), got: w.name, version: w.version }),
        _ => return Err(Ended::Closed),
    }
    Ok((client, Line { outgoing, broken: broken.clone() }, incoming))
}

/// The one place where routers are dialled.
async fn dial(pool: &Pool, address: &str) -> Result<Client, Ended> {
    let endpoint = Endpoint::from_shared(address.to_owned()).map_err(Ended::Connect)?;
    let endpoint =
        endpoint.connect_timeout(OPEN).tcp_nodelay(true).initial_stream_window_size(WINDOW).initial_connection_window_size(WINDOW);
    let named = pool.identity.clone().and_then(|own| own.name().router().map(|router| (own, router)));
    let channel = endpoint.connect_with_connector(Dialer::new(named)).await.map_err(Ended::Connect)?;
    let client = PoolClient::with_interceptor(channel, pool.bearer.clone());
    Ok(client.max_decoding_message_size(MESSAGE).max_encoding_message_size(usize::MAX))
}

async fn fetch_state(mut client: Client) -> Result<FleetState, Ended> {
    let state = client.state(StateRequest {}).await.map_err(Ended::Status)?.into_inner();
    decode_fleet(state).map_err(Ended::Message)
}

/// Asks one router after another for a fleet state, until there is one.
pub(super) async fn seek(pool: Arc<Pool>, seeds: Vec<String>) {
    let mut states = pool.store.subscribe();
    let mut pause = SEEK.0;
    let asking = async {
        for seed in seeds.iter().cycle() {
            let asked = async { fetch_state(dial(&pool, seed).await?).await };
            match timeout(OPEN, asked).await {
                Ok(Ok(state)) => pool.take(state).await,
                Ok(Err(error)) => debug!(seed, error = &error as &dyn std::error::Error, "no fleet state from there"),
                Err(_) => debug!(seed, "no fleet state from there in time"),
            }
            sleep(pause).await;
            pause = (pause * 2).min(SEEK.1);
        }
    };
    tokio::select! {
        () = pool.stop.cancelled() => {}
        _ = states.wait_for(|state| state.term > 0) => {}
        () = asking => {}
    }
}
