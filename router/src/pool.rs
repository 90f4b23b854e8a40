//! The pool: routers that share the replicas of a namespace, each reaching every replica.
//!
//! Each router opens one stream to each other one that the fleet state names, and is the edge on it: sequences of its clients go up, their
//! events and the condition of the other's replicas come down. Who drives a replica follows from the routers that answer, by rendezvous
//! hashing, and needs no agreement: a router that holds a replica says so, the others send their sequences there, and it lets go when it sees
//! that another one should have it. Two that drive the same replica for a moment are kept apart by the arbiter among its workers.

mod announced;
mod convert;
mod dial;
mod guest;
mod owners;
mod peer;
mod serve;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use identity::Identity;
use plan::fleet::{FleetRouter, FleetState};
use proto::bearer::Bearer;
use tokio::{net::TcpListener, sync::watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use self::{
    announced::{AnnounceError, Announced, Announcement},
    owners::Own,
};
pub(crate) use self::{guest::PeerSink, owners::Seat, peer::Peer};
use crate::{control::FleetStore, fleet::View};

/// Protocol versions spoken here.
const VERSIONS: (u32, u32) = (1, 1);
/// Time between two signs of life.
const TICK: Duration = Duration::from_millis(200);
/// A router that has said nothing for so many ticks is dead. Ticks are the listener's own: one that was stopped itself blames nobody.
const SILENT: u32 = 5;
/// Messages to an edge that may wait for the network: what a thousand streams say in a second. An edge that is further behind is let go.
const EVENTS: usize = 16_384;
/// Submissions and cancellations that may wait for the network: more than all requests that a router lets wait. Further behind, an owner is let go.
const COMMANDS: usize = 4096;

/// One router's place in a pool.
#[derive(Debug)]
pub struct PoolOptions {
    /// Its name in the fleet state.
    pub name: String,
    /// The deployment whose own router it is; empty for one of the namespace's.
    pub pool: String,
    /// Where the other routers reach it.
    pub listener: TcpListener,
    /// What the routers' calls carry.
    pub token: Option<String>,
    /// What workers' announcements carry: the token of calls to them.
    pub worker_token: Option<String>,
    /// Who this router is: each end of a connection proves its name; without one, connections are plain.
    pub identity: Option<Identity>,
    /// Routers, or a service that leads to any, to ask for the fleet state while none is known: `http://host:port`.
    pub seeds: Vec<String>,
}

/// What this router knows of its pool.
pub(crate) struct Pool {
    name: String,
    /// Whose router this is, as in [`FleetRouter::pool`].
    own: String,
    bearer: Bearer,
    identity: Option<Identity>,
    /// Of workers' announcements.
    workers: Bearer,
    store: FleetStore,
    peers: Mutex<Peers>,
    announced: Mutex<Announced>,
    leaving: AtomicBool,
    /// Who drives what may have changed.
    changed: watch::Sender<()>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

#[derive(Default)]
struct Peers {
    /// This router is one of those that the state names.
    listed: bool,
    others: BTreeMap<String, Arc<Peer>>,
}

impl Pool {
    /// Serves the other routers, and looks for the fleet state where none is known.
    pub(crate) fn start(options: PoolOptions, store: FleetStore, view: watch::Receiver<Arc<View>>, stop: CancellationToken) -> Arc<Self> {
        let PoolOptions { name, pool: own, listener, token, worker_token, identity, seeds } = options;
        let pool = Arc::new(Self {
            name,
            own,
            bearer: Bearer::new(token),
            identity,
            workers: Bearer::new(worker_token),
            store,
            peers: Mutex::default(),
            announced: Mutex::default(),
            leaving: AtomicBool::new(false),
            changed: watch::Sender::new(()),
            stop,
            tasks: TaskTracker::new(),
        });
        pool.tasks.spawn(serve::serve(pool.clone(), listener, view));
        if !seeds.is_empty() {
            pool.tasks.spawn(dial::seek(pool.clone(), seeds));
        }
        pool
    }

    /// Whose router this is, as in [`FleetRouter::pool`].
    pub(crate) fn own(&self) -> &str {
        &self.own
    }

    /// Reports that who drives what may have changed.
    pub(crate) fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Dials the routers of a state that are not dialled yet, and leaves those that are not in it.
    pub(crate) fn follow(self: &Arc<Self>, routers: &[FleetRouter]) {
        let mut peers = lock(&self.peers);
        peers.listed = routers.iter().any(|r| r.name == self.name);
        peers.others.retain(|name, peer| {
            let stays = routers.iter().any(|r| r.name == *name && r.address == peer.address);
            if !stays {
                peer.stop.cancel();
            }
            stays
        });
        for router in routers.iter().filter(|r| r.name != self.name) {
            if !peers.others.contains_key(&router.name) {
                let peer = Arc::new(Peer::new(router, self.stop.child_token()));
                self.tasks.spawn(dial::follow(self.clone(), peer.clone()));
                peers.others.insert(router.name.clone(), peer);
            }
        }
    }

    /// Where `replica` is driven from now on, by one of the routers of `drivers`; `here`: it is this router that drives it.
    pub(crate) fn seat(&self, replica: &str, drivers: &str, here: bool) -> Seat {
        let peers = lock(&self.peers);
        let own = Own { name: &self.name, listed: peers.listed, leaving: self.leaving(), chosen_from: self.own == drivers, here };
        owners::seat(own, peers.others.values(), drivers, replica)
    }

    /// Drives nothing from now on that another router can.
    pub(crate) fn leave(&self) {
        if !self.leaving.swap(true, Ordering::Relaxed) {
            info!("leaving the pool");
            self.changed.send_replace(());
        }
    }

    fn leaving(&self) -> bool {
        self.leaving.load(Ordering::Relaxed)
    }

    /// Puts the addresses that workers announced in place of those that a state names for them.
    pub(crate) fn place_announced(&self, state: &mut FleetState) {
        lock(&self.announced).place(state);
    }

    /// A worker announced itself, here or (`told`) to another router.
    fn announce(&self, announcement: Announcement, told: bool) -> Result<(), AnnounceError> {
        let state = self.store.current();
        if !lock(&self.announced).take(&state, &announcement, !told)? {
            return Ok(());
        }
        let Announcement { replica, stage, rank, address, .. } = &announcement;
        info!(replica, stage, rank, address, "a worker announced itself");
        self.changed.send_replace(());
        if !told {
            lock(&self.peers).others.values().for_each(|peer| peer.tell(&announcement));
        }
        Ok(())
    }

    /// What was announced so far, for a router that was not there.
    fn announcements(&self) -> Vec<Announcement> {
        lock(&self.announced).all()
    }

    /// Takes a state that another router has.
    async fn take(&self, state: FleetState) {
        if let Err(failure) = self.store.take(state).await {
            warn!(error = &failure as &dyn std::error::Error, "a state from another router is not kept");
        }
    }

    /// Waits until every task has ended, once it is stopped.
    pub(crate) async fn end(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// Nothing panics while such a lock is held.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
