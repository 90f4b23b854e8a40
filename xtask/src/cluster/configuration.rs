//! Configuration files of the cluster's programs.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::{Value, json};

use super::{
    certificates::{FOLDER, files},
    cgroups,
    folder::Cluster,
    images,
    network::{NODE, PODS},
};

/// The node's name.
pub(crate) const NODE_NAME: &str = "node-0";
/// Port of the API server.
pub(crate) const API_PORT: u16 = 6443;

/// The files that a pod's containers resolve names by: none, as the cluster has no name server.
const RESOLV_CONF: &str = "# No name server is reachable from this cluster.\n";

/// Writes all of them.
///
/// # Errors
/// If one cannot be written.
pub(crate) fn create(cluster: &Cluster, cni: &Path) -> Result<()> {
    for user in ["admin", "controller-manager", "scheduler", "proxy", "kubelet"] {
        let path = if user == "admin" { cluster.kubeconfig() } else { kubeconfig(cluster, user) };
        write(cluster, &path, &credentials(cluster, user))?;
    }
    cluster.write("resolv.conf", RESOLV_CONF)?;
    cluster.write("containerd.toml", &containerd(cluster, cni))?;
    write(cluster, &cluster.path("cni/10-bridge.conflist"), &pod_network(cluster))?;
    write(cluster, &cluster.path("kubelet.json"), &kubelet(cluster))
}

/// Where a component's kubeconfig lies.
pub(crate) fn kubeconfig(cluster: &Cluster, user: &str) -> PathBuf {
    cluster.path(&format!("{user}.kubeconfig"))
}

/// JSON is YAML too, so the programs read it as it is.
fn write(cluster: &Cluster, path: &Path, value: &Value) -> Result<()> {
    let part = path.strip_prefix(cluster.folder()).unwrap_or(path).to_string_lossy().into_owned();
    cluster.write(&part, &format!("{value:#}\n")).map(drop)
}

fn credentials(cluster: &Cluster, user: &str) -> Value {
    let own = files(cluster, user);
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "skein", "cluster": {
            "server": format!("https://{NODE}:{API_PORT}"),
            "certificate-authority": files(cluster, "ca").certificate,
        }}],
        "users": [{"name": user, "user": {"client-certificate": own.certificate, "client-key": own.key}}],
        "contexts": [{"name": "skein", "context": {"cluster": "skein", "user": user}}],
        "current-context": "skein",
    })
}

fn containerd(cluster: &Cluster, cni: &Path) -> String {
    let run = cluster.folder().display();
    let pause = images::PAUSE;
    let cni = cni.display();
    let socket = cluster.containerd();
    let socket = socket.display();
    // `restrict_oom_score_adj`: without CAP_SYS_RESOURCE a score below one's own is refused and runc fails.
    // `netns_mounts_under_state_dir`: pods' namespaces are mounted in the run folder and so are found when it is cleared away.
    format!(
        r#"version = 2
root = "{run}/containerd/root"
state = "{run}/containerd/state"

[grpc]
address = "{socket}"

[plugins."io.containerd.internal.v1.opt"]
path = "{run}/containerd/opt"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true
disable_tcp_service = true
stream_server_address = "127.0.0.1"

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{cni}"
conf_dir = "{run}/cni"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
Root = "{run}/runc"
"#
    )
}

fn pod_network(cluster: &Cluster) -> Value {
    json!({
        "cniVersion": "1.0.0",
        "name": cluster.id(),
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": true,
                "ipMasq": true,
                "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": PODS}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                    "dataDir": cluster.path("cni-addresses"),
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
}

fn kubelet(cluster: &Cluster) -> Value {
    let server = files(cluster, "kubelet-server");
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": NODE.to_string(),
        "healthzBindAddress": "127.0.0.1",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": cluster.path(FOLDER).join("ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": server.certificate,
        "tlsPrivateKeyFile": server.key,
        "containerRuntimeEndpoint": format!("unix://{}", cluster.containerd().display()),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": cgroups::name(cluster),
        "failCgroupV1": false,
        "failSwapOn": false,
        // Nobody answers there, which a pod that asks is told at once. Without an address pods would be said to lack one.
        "clusterDNS": [NODE.to_string()],
        "clusterDomain": "cluster.local",
        "resolvConf": cluster.path("resolv.conf"),
        "podLogsDir": cluster.path("pod-logs"),
        "volumePluginDir": cluster.path("volume-plugins"),
        "maxPods": 250,
        "serializeImagePulls": false,
        // How long a changed Secret may take to reach a pod that runs.
        "syncFrequency": "10s",
        // The disk is the machine's own, and images come back by no pull: nothing is evicted or removed to make room. A share of the disk
        // would be one of its nominal size, of which a quota may leave little.
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "64Mi", "nodefs.inodesFree": "1%", "imagefs.available": "64Mi"},
        "imageGCHighThresholdPercent": 100,
    })
}
