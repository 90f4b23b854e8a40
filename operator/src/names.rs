//! Names and labels of what the operator makes.

use std::net::{IpAddr, SocketAddr};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Field manager of everything applied.
pub const MANAGER: &str = "skein-operator";
/// Name of a namespace's pool of routers, and of its service.
pub const POOL: &str = "skein-router";
/// Name of the service at which the routers of a namespace reach each other.
pub const POOL_PEERS: &str = "skein-pool";
/// What the routers of a deployment's own are called among applications.
pub const OWN_ROUTER: &str = "skein-dedicated-router";
/// Name of the workers' service account.
pub const WORKER_ACCOUNT: &str = "skein-worker";
/// Secret with the tokens of a namespace.
pub const TOKENS: &str = "skein-tokens";
/// Secret with the authorities, in the operator's namespace.
pub const AUTHORITIES: &str = "skein-authorities";
/// Secret with the certificate of a namespace's routers.
pub const ROUTER_IDENTITY: &str = "skein-router-identity";
/// Key of the token for calls to workers.
pub const WORKER_TOKEN: &str = "worker";
/// Key of the token for calls to the operator.
pub const FLEET_TOKEN: &str = "fleet";
/// Key of the token for calls among routers.
pub const POOL_TOKEN: &str = "pool";
/// Port that routers listen on for each other.
pub const POOL_PORT: u16 = 7072;
/// Port that workers listen on.
pub const WORKER_PORT: u16 = 7071;
/// Ports of a router's HTTP and gRPC APIs.
pub const ROUTER_PORTS: (u16, u16) = (8080, 8081);
/// Port of a service's HTTP API.
pub const SERVICE_PORT: u16 = 80;

/// Label: the deployment.
pub const DEPLOYMENT: &str = "skein.dev/deployment";
/// Label of a deployment's own routers, and of what they need: the deployment.
pub const ROUTER_OF: &str = "skein.dev/router-of";
/// Label: the revision.
pub const REVISION: &str = "skein.dev/revision";
/// Label: number of the replica.
pub const REPLICA: &str = "skein.dev/replica";
/// Label of pods: the replica's name.
pub const REPLICA_NAME: &str = "skein.dev/replica-name";
/// Annotation of StatefulSets: since when the replica drains, in seconds since 1970.
pub const DRAINING: &str = "skein.dev/draining-since";
/// Label: number of the stage, or [`DRAFT`].
pub const STAGE: &str = "skein.dev/stage";
/// In place of a stage's number: the worker of a draft model.
pub const DRAFT: &str = "draft";
/// Label that the StatefulSet controller sets: the ordinal, which is the rank.
pub const RANK: &str = "apps.kubernetes.io/pod-index";

/// Characters of a deployment's name in the names of its StatefulSets.
const CUT: usize = 24;

/// The first `digits` hexadecimal digits of the SHA-256 of `parts`.
pub fn digest(parts: &[&str], digits: usize) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let mut hex: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    hex.truncate(digits);
    hex
}

/// A deployment's name, cut.
fn cut(name: &str) -> &str {
    name[..name.len().min(CUT)].trim_end_matches('-')
}

/// Name of a replica, unique over deployments, revisions and time: `<name cut to 24>-<8 hex>-r<replica>`.
pub fn replica(name: &str, uid: &str, revision: &str, replica: u32) -> String {
    format!("{}-{}-r{replica}", cut(name), digest(&[uid, revision, &replica.to_string()], 8))
}

/// Name of the StatefulSet of a stage of a replica.
pub fn stateful_set(replica: &str, stage: usize) -> String {
    format!("{replica}-s{stage}")
}

/// Name of the Secret with the certificate of a stage of a replica, which its ranks share.
pub fn identity(replica: &str, stage: usize) -> String {
    format!("{}-identity", stateful_set(replica, stage))
}

/// Name of the pod of a worker.
pub fn pod(replica: &str, stage: usize, rank: usize) -> String {
    format!("{}-{rank}", stateful_set(replica, stage))
}

/// Name of a part of the worker specifications of a stage; replicas of a revision share them.
pub fn specification(name: &str, uid: &str, revision: &str, stage: usize, part: usize) -> String {
    format!("{}-{}-s{stage}-{part}", cut(name), digest(&[uid, revision], 8))
}

/// Name of the worker specification of a draft model; replicas of a revision share it.
pub fn draft_specification(name: &str, uid: &str, revision: &str) -> String {
    format!("{}-{}-{DRAFT}", cut(name), digest(&[uid, revision], 8))
}

/// Name of the pod that reads the headers of a deployment's model, and is `pod`.
pub fn inspector(name: &str, uid: &str, pod: &str) -> String {
    format!("{}-{}-inspect", cut(name), digest(&[uid, pod], 8))
}

/// Name of the object that keeps what was read of a deployment's model at `uri`.
pub fn header(name: &str, uid: &str, uri: &str) -> String {
    format!("{}-{}-header", cut(name), digest(&[uid, uri], 8))
}

/// Name of the object that keeps a revision.
pub fn revision(name: &str, uid: &str, revision: &str) -> String {
    format!("{}-{}-{revision}", cut(name), digest(&[uid, revision], 8))
}

/// Name of the headless service, the disruption budget and the network policy of a deployment's workers.
pub fn workers(name: &str) -> String {
    format!("{name}-workers")
}

/// Name of a deployment's own routers, and of what they need: none that those of a namespace have, whatever the deployment is called.
pub fn own_router(name: &str) -> String {
    format!("{name}-dedicated-router")
}

/// Name of the service at which a deployment's own routers reach each other.
pub fn own_peers(name: &str) -> String {
    format!("{name}-dedicated-routers")
}

/// Name of the Secret with the certificate of a deployment's own routers.
pub fn own_identity(name: &str) -> String {
    format!("{name}-dedicated-router-identity")
}

/// Labels of everything of `component`.
pub fn labels(component: &str) -> Value {
    json!({
        "app.kubernetes.io/name": format!("skein-{component}"),
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/part-of": "skein",
        "app.kubernetes.io/managed-by": MANAGER,
    })
}

/// What `/scale` selects: one pod of each replica, that of stage 0, rank 0.
pub fn scale_selector(name: &str) -> String {
    format!("{DEPLOYMENT}={name},{STAGE}=0,{RANK}=0")
}

/// Where a worker listens.
pub fn worker_address(ip: IpAddr) -> String {
    SocketAddr::new(ip, WORKER_PORT).to_string()
}

#[cfg(test)]
mod tests {
    use plan::fleet::FleetDraft;

    use super::*;

    #[test]
    fn names_are_short_and_differ() {
        let long = "a".repeat(45);
        let name = stateful_set(&replica(&long, "uid", "0123456789", 999), 255);
        assert!(name.len() <= 52, "{name} has {}", name.len());
        let draft = stateful_set(&FleetDraft::name(&replica(&long, "uid", "0123456789", 999)), 0);
        assert!(draft.len() <= 52, "{draft} has {}", draft.len());
        assert!(name.starts_with(&"a".repeat(24)));
        let base = replica("a", "u", "r", 0);
        for other in [replica("a", "v", "r", 0), replica("a", "u", "s", 0), replica("a", "u", "r", 1)] {
            assert_ne!(base, other);
        }
        // Lengths are hashed with the parts, so that parts cannot flow into each other.
        assert_ne!(digest(&["ab", "c"], 8), digest(&["a", "bc"], 8));
        assert_eq!(replica(&format!("{}-b", "a".repeat(23)), "u", "r", 0).find("--"), None, "a cut name ends in no dash");
    }

    #[test]
    fn addresses_of_both_families_can_be_dialled() {
        assert_eq!(worker_address([10, 0, 0, 1].into()), "10.0.0.1:7071");
        assert_eq!(worker_address("fd00::1".parse().expect("an address")), "[fd00::1]:7071");
    }
}
