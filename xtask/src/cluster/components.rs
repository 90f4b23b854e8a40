//! The cluster's programs and their arguments, in the order in which they start.

use std::path::Path;

use anyhow::Result;

use super::{
    certificates::{FOLDER, files},
    configuration::{API_PORT, NODE_NAME, kubeconfig},
    folder::Cluster,
    network::{NODE, PODS, SERVICES},
    packages,
    processes::Program,
};

/// Where etcd is asked, from inside the namespace alone.
const ETCD: &str = "http://127.0.0.1:2379";

/// The runtime of containers.
///
/// # Errors
/// If containerd is missing.
pub(crate) fn containerd(cluster: &Cluster) -> Result<Program> {
    let config = cluster.path("containerd.toml");
    Ok(Program::new("containerd", &packages::path("containerd")?, ["--config".to_owned(), config.display().to_string()]))
}

/// What the API server keeps its objects in. It does not wait for the disk: the cluster does not outlive the machine.
///
/// # Errors
/// If etcd is missing.
pub(crate) fn etcd(cluster: &Cluster) -> Result<Program> {
    let args = [
        "--name=etcd".to_owned(),
        format!("--data-dir={}", cluster.path("etcd").display()),
        format!("--listen-client-urls={ETCD}"),
        format!("--advertise-client-urls={ETCD}"),
        "--listen-peer-urls=http://127.0.0.1:2380".to_owned(),
        "--initial-advertise-peer-urls=http://127.0.0.1:2380".to_owned(),
        "--initial-cluster=etcd=http://127.0.0.1:2380".to_owned(),
        "--unsafe-no-fsync".to_owned(),
    ];
    Ok(Program::new("etcd", &packages::path("etcd")?, args))
}

/// The API server.
pub(crate) fn api_server(cluster: &Cluster, bin: &Path) -> Program {
    let pki = cluster.path(FOLDER);
    let pki = pki.display();
    let args = [
        format!("--etcd-servers={ETCD}"),
        format!("--bind-address={NODE}"),
        format!("--advertise-address={NODE}"),
        format!("--secure-port={API_PORT}"),
        format!("--service-cluster-ip-range={SERVICES}"),
        "--endpoint-reconciler-type=lease".to_owned(),
        "--authorization-mode=Node,RBAC".to_owned(),
        "--enable-admission-plugins=NodeRestriction".to_owned(),
        "--anonymous-auth=false".to_owned(),
        "--profiling=false".to_owned(),
        format!("--client-ca-file={pki}/ca.crt"),
        format!("--tls-cert-file={pki}/apiserver.crt"),
        format!("--tls-private-key-file={pki}/apiserver.key"),
        format!("--kubelet-certificate-authority={pki}/ca.crt"),
        format!("--kubelet-client-certificate={pki}/apiserver-kubelet.crt"),
        format!("--kubelet-client-key={pki}/apiserver-kubelet.key"),
        // The node's name is in no name server and not in the machine's list of hosts.
        "--kubelet-preferred-address-types=InternalIP".to_owned(),
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local".to_owned(),
        format!("--service-account-key-file={pki}/service-accounts.pub"),
        format!("--service-account-signing-key-file={pki}/service-accounts.key"),
        format!("--requestheader-client-ca-file={pki}/front-proxy-ca.crt"),
        "--requestheader-allowed-names=front-proxy".to_owned(),
        "--requestheader-username-headers=X-Remote-User".to_owned(),
        "--requestheader-group-headers=X-Remote-Group".to_owned(),
        "--requestheader-extra-headers-prefix=X-Remote-Extra-".to_owned(),
        format!("--proxy-client-cert-file={pki}/front-proxy.crt"),
        format!("--proxy-client-key-file={pki}/front-proxy.key"),
        "--enable-aggregator-routing=true".to_owned(),
    ];
    Program::new("kube-apiserver", &bin.join("kube-apiserver"), args)
}

/// Requests a second of each controller: with the 20 that they have by default, thousands of objects are theirs to wait for, not the operator's.
const UNHURRIED: [&str; 2] = ["--kube-api-qps=500", "--kube-api-burst=1000"];

/// The programs that need an API server.
pub(crate) fn clients(cluster: &Cluster, bin: &Path) -> [Program; 3] {
    let pki = cluster.path(FOLDER);
    let pki = pki.display();
    let account = |user: &str| {
        let path = kubeconfig(cluster, user);
        ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"].map(|flag| format!("--{flag}={}", path.display()))
    };
    let alone = ["--leader-elect=false".to_owned(), "--bind-address=127.0.0.1".to_owned(), "--profiling=false".to_owned()];

    let mut controllers: Vec<String> = account("controller-manager").into_iter().chain(alone.clone()).collect();
    let authority = files(cluster, "ca");
    controllers.extend([
        "--use-service-account-credentials=true".to_owned(),
        format!("--root-ca-file={}", authority.certificate.display()),
        format!("--service-account-private-key-file={pki}/service-accounts.key"),
        format!("--cluster-signing-cert-file={}", authority.certificate.display()),
        format!("--cluster-signing-key-file={}", authority.key.display()),
        format!("--cluster-cidr={PODS}"),
        // The kubelet has time to renew its lease after tests have stopped the API server: else every pod is taken for lost as soon as it is back.
        "--node-monitor-grace-period=5m".to_owned(),
        // Pods are measured every 10 s.
        "--horizontal-pod-autoscaler-sync-period=5s".to_owned(),
    ]);
    controllers.extend(UNHURRIED.map(str::to_owned));
    let scheduler: Vec<String> = account("scheduler").into_iter().chain(alone).chain(UNHURRIED.map(str::to_owned)).collect();
    let proxy = [
        format!("--kubeconfig={}", kubeconfig(cluster, "proxy").display()),
        "--proxy-mode=iptables".to_owned(),
        format!("--hostname-override={NODE_NAME}"),
        format!("--cluster-cidr={PODS}"),
        "--conntrack-max-per-core=0".to_owned(),
        "--healthz-bind-address=127.0.0.1:10256".to_owned(),
        "--metrics-bind-address=127.0.0.1:10249".to_owned(),
    ];
    [
        Program::new("kube-controller-manager", &bin.join("kube-controller-manager"), controllers),
        Program::new("kube-scheduler", &bin.join("kube-scheduler"), scheduler),
        Program::new("kube-proxy", &bin.join("kube-proxy"), proxy),
    ]
}

/// The node's agent.
pub(crate) fn kubelet(cluster: &Cluster, bin: &Path) -> Program {
    let args = [
        format!("--config={}", cluster.path("kubelet.json").display()),
        format!("--kubeconfig={}", kubeconfig(cluster, "kubelet").display()),
        format!("--root-dir={}", cluster.path("kubelet").display()),
        format!("--cert-dir={}", cluster.path("kubelet/pki").display()),
        format!("--hostname-override={NODE_NAME}"),
        format!("--node-ip={NODE}"),
    ];
    Program::new("kubelet", &bin.join("kubelet"), args)
}
