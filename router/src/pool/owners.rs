//! Which router drives a replica.

use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::Peer;

/// Where a replica is driven.
pub(crate) enum Seat {
    /// In this process.
    Here,
    /// By another router.
    Peer(Arc<Peer>),
    /// Nowhere yet: it is not known whether another router has it.
    Nobody,
}

/// What a router says of itself and of one replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Standing {
    /// It was reached, or shown not to be there, since it was named.
    pub(super) known: bool,
    /// It answers.
    pub(super) alive: bool,
    /// It wants to drive nothing.
    pub(super) leaving: bool,
    /// It has the replica, or has not let go of it yet.
    pub(super) holds: bool,
}

/// What counts of this router.
#[derive(Clone, Copy, Debug)]
pub(super) struct Own<'a> {
    pub(super) name: &'a str,
    /// The state names it.
    pub(super) listed: bool,
    pub(super) leaving: bool,
    /// It is one of those that may drive the replica.
    pub(super) chosen_from: bool,
    /// It drives the replica.
    pub(super) here: bool,
}

/// Decides for this router where `replica` is driven: by one of the routers whose pool is `drivers`.
pub(super) fn seat<'a>(this: Own<'_>, others: impl Iterator<Item = &'a Arc<Peer>>, drivers: &str, replica: &str) -> Seat {
    let others: Vec<(&Arc<Peer>, Standing)> = others.map(|peer| (peer, peer.standing(replica))).collect();
    let alive = || others.iter().filter(|(_, s)| s.alive);
    let willing = || alive().filter(|(peer, s)| !s.leaving && peer.pool == drivers);
    // A router that the state does not name is not dialled by the others, and drives only what nobody else can.
    let own = this.chosen_from && ((this.listed && !this.leaving) || willing().next().is_none());
    let names = willing().map(|(peer, _)| peer.name.as_str()).chain(own.then_some(this.name));
    let Some(chosen) = names.max_by_key(|router| weight(router, replica)) else {
        // Nobody who should can: whoever has it keeps it until somebody can.
        let holder = alive().filter(|(_, s)| s.holds).max_by_key(|(peer, _)| weight(&peer.name, replica));
        return match holder {
            _ if this.here => Seat::Here,
            Some((peer, _)) => Seat::Peer((*peer).clone()),
            None => Seat::Nobody,
        };
    };
    let holder = alive().filter(|(_, s)| s.holds).max_by_key(|(peer, _)| (peer.name == chosen, weight(&peer.name, replica)));
    match (chosen == this.name, holder) {
        (true, _) if this.here => Seat::Here,
        (_, Some((peer, _))) => Seat::Peer((*peer).clone()),
        (true, None) if others.iter().all(|(_, s)| s.known) => Seat::Here,
        (true, None) => Seat::Nobody,
        (false, None) => alive().find(|(peer, _)| peer.name == chosen).map_or(Seat::Nobody, |(peer, _)| Seat::Peer((*peer).clone())),
    }
}

/// Rendezvous hashing (Thaler, Ravishankar 1996): the router with the highest weight has the replica, so that a router's coming or going moves
/// no replica between two others.
fn weight(router: &str, replica: &str) -> u64 {
    let mut state = Sha256::new();
    for part in [router, replica] {
        state.update((part.len() as u64).to_le_bytes());
        state.update(part);
    }
    let digest = state.finalize();
    digest.iter().take(8).fold(0, |weight, byte| weight << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replicas_are_spread_and_a_router_that_goes_moves_only_its_own() {
        let chosen = |routers: &[&str], replica: &str| routers.iter().copied().max_by_key(|r| weight(r, replica)).expect("one").to_owned();
        let (three, two) = (["a", "b", "c"], ["a", "c"]);
        let mut counts = [0; 3];
        for i in 0..300 {
            let replica = format!("model-r{i}");
            let before = chosen(&three, &replica);
            counts[three.iter().position(|r| *r == before).expect("one of them")] += 1;
            if before != "b" {
                assert_eq!(chosen(&two, &replica), before);
            }
        }
        assert!(counts.iter().all(|n| (70..130).contains(n)), "{counts:?}");
        // The same in every process and version.
        assert_eq!(weight("skein-router-0", "gemma-r0"), weight("skein-router-0", "gemma-r0"));
        assert_ne!(weight("ab", "c"), weight("a", "bc"));
    }
}
