//! Who is let in where, on every port that a pod listens on; and certificates that are replaced under load.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, SocketAddr},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use e2e::client;
use identity::{Dialer, Identity, Name, Protocol, connect, testing};
use operator::certificates::{Authorities, Lifetimes};
use proto::{
    bearer::Bearer,
    pool::{EdgeMessage, pool_client::PoolClient},
    worker::{LinkFrame, ProbeRequest, SessionRequest, worker_client::WorkerClient},
};
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tonic::{
    Code, Status,
    service::interceptor::InterceptedService,
    transport::{Channel, Endpoint},
};

use crate::{
    kubernetes::{Namespace, SYSTEM, WORKERS, identity as is_same, name, succeed},
    load::Load,
    models::{LLAMA, llama, llama_body},
};

/// Selects routers.
const ROUTERS: &str = "app.kubernetes.io/component=router";
/// Nothing that answers takes this long.
const ANSWER: Duration = Duration::from_secs(30);
/// How long certificates made here are valid.
const LIFETIMES: Lifetimes = Lifetimes {
    certificate: Duration::from_secs(3600),
    renew: Duration::from_secs(60),
    authority: Duration::from_secs(86400),
    settle: Duration::from_secs(60),
};

/// Four workers and the pool, in a namespace of its own.
fn deploy(namespace: &Namespace) {
    llama();
    let manifest = "{apiVersion: skein.dev/v1alpha1, kind: ModelDeployment, metadata: {name: tiny}, \
                    spec: {model: {uri: 'MODEL'}, parallelism: {pipeline: 2, tensor: 2}}}";
    namespace.apply(&manifest.replace("MODEL", LLAMA));
    namespace.ready("tiny", 1);
    // Routers may find workers before the API server says where they are.
    namespace.succeed(&["wait", "--for=condition=Ready", "pods", "--all", "--timeout=120s"]);
}

fn operator() -> Value {
    let pods = succeed(&["--namespace", SYSTEM, "get", "pods", "--selector=app.kubernetes.io/name=skein-operator", "--output=json"]);
    let pods: Value = serde_json::from_str(&pods).expect("JSON");
    let all = pods["items"].as_array().expect("a list");
    all.iter().find(|pod| pod["metadata"]["deletionTimestamp"].is_null()).expect("an operator").clone()
}

/// A value of a Secret.
fn secret(namespace: &str, name: &str, key: &str) -> String {
    let template = format!("--output=go-template={{{{index .data \"{key}\" | base64decode}}}}");
    succeed(&["--namespace", namespace, "get", "secret", name, &template])
}

/// Ports that a pod listens on for others, as its kernel lists them.
fn ports(pod: &Value) -> BTreeSet<u16> {
    let uid = pod["metadata"]["uid"].as_str().expect("a uid");
    let pids = fs::read_dir("/proc").expect("/proc").filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let read = |pid: u32, file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let mut own = pids.filter(|pid| read(*pid, "cgroup").contains(uid) && read(*pid, "cmdline").starts_with("/skein"));
    let pid = own.next().unwrap_or_else(|| panic!("no process of {}", name(pod)));
    let listens = |line: &str| {
        let mut fields = line.split_whitespace().skip(1);
        let (address, port) = fields.next()?.rsplit_once(':')?;
        // State 0A is LISTEN; an address that ends in 7F is 127.….
        let open = fields.nth(1)? == "0A" && !address.ends_with("7F");
        open.then(|| u16::from_str_radix(port, 16).expect("a port"))
    };
    ["net/tcp", "net/tcp6"].iter().flat_map(|file| read(pid, file).lines().filter_map(listens).collect::<Vec<_>>()).collect()
}

/// Writes what begins a conversation, and reads what comes back. A process that lets nobody in without a name closes, or sends an alert, whose
/// first byte is 0x15; what is said in either protocol begins with another.
async fn talk(mut stream: impl AsyncRead + AsyncWrite + Unpin, protocol: Protocol) -> bool {
    let begin: &[u8] = match protocol {
        Protocol::Grpc => b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
        // No hello: a rank that is let in is told so.
        Protocol::Collective => &[0; 64],
    };
    let talked = async {
        stream.write_all(begin).await?;
        stream.read_u8().await
    };
    timeout(ANSWER, talked).await.expect("it answers or closes").is_ok_and(|byte| byte != 0x15)
}

/// Certificates of the cluster's own authorities, and of others.
struct Minted {
    authorities: Authorities,
    now: i64,
}

impl Minted {
    fn now() -> i64 {
        SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").as_secs().cast_signed()
    }

    /// By the authorities of the cluster.
    fn ours() -> Self {
        let authorities = serde_json::from_str(&secret(SYSTEM, "skein-authorities", "authorities.json")).expect("authorities");
        Self { authorities, now: Self::now() }
    }

    /// By an authority that nobody knows.
    fn strange() -> Self {
        let (mut authorities, now) = (Authorities::default(), Self::now());
        authorities.turn(now, &LIFETIMES).expect("an authority");
        Self { authorities, now }
    }

    /// A process called `name`, which trusts whom `trusting` trusts.
    fn process(&self, name: &Name, trusting: &Self) -> Identity {
        let files = self.authorities.issue(name, self.now, &LIFETIMES).expect("a certificate");
        Identity::given([&files.certificate, &files.key, &trusting.authorities.trusted()]).expect("an identity")
    }
}

/// A port, who answers there, and what is spoken.
struct Door {
    pod: String,
    address: SocketAddr,
    owner: Name,
    protocol: Protocol,
}

impl Door {
    async fn open(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap_or_else(|error| panic!("{} at {}: {error}", self.pod, self.address))
    }

    /// Whether `identity` is let in.
    async fn admits(&self, identity: &Identity) -> bool {
        match connect(identity, &self.owner, self.protocol, self.open().await).await {
            Ok(stream) => talk(stream, self.protocol).await,
            Err(_) => false,
        }
    }

    /// Whether somebody without a certificate is let in, encrypted or not.
    async fn admits_anybody(&self) -> bool {
        let encrypted = match testing::connect_unnamed(self.protocol, self.open().await).await {
            Ok(stream) => talk(stream, self.protocol).await,
            Err(_) => false,
        };
        encrypted || talk(self.open().await, self.protocol).await
    }

    /// Whether it is for processes called `name`.
    fn is_for(&self, name: &Name) -> bool {
        match self.protocol {
            Protocol::Grpc => self.owner.admits(name),
            // Ranks of one stage have one name.
            Protocol::Collective => self.owner == *name,
        }
    }

    async fn channel(&self, identity: &Identity) -> Channel {
        let dialer = Dialer::new(Some((identity.clone(), self.owner.clone())));
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).expect("an address");
        endpoint.connect_with_connector(dialer).await.expect("a channel")
    }
}

/// Every port of a pod that is not the users' or for probes and metrics. A port that nobody has thought of fails the test.
fn doors(pod: &Value, owner: &Name) -> Vec<Door> {
    let ip: IpAddr = pod["status"]["podIP"].as_str().expect("an address").parse().expect("an address");
    let door = |port: u16| {
        let protocol = match (owner, port) {
            (Name::Operator, 7070) | (Name::Worker { .. }, 7071) | (Name::Router { .. }, 7072) => Protocol::Grpc,
            (Name::Operator, 8080) | (Name::Router { .. }, 8080 | 8081) => return None,
            (Name::Worker { .. }, _) => Protocol::Collective,
            _ => panic!("{} listens on port {port}, which is no port of {owner}", name(pod)),
        };
        Some(Door { pod: name(pod).to_owned(), address: SocketAddr::new(ip, port), owner: owner.clone(), protocol })
    };
    ports(pod).into_iter().filter_map(door).collect()
}

fn label<'a>(pod: &'a Value, key: &str) -> &'a str {
    pod["metadata"]["labels"][key].as_str().expect("a label")
}

#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn every_internal_port_is_for_those_alone_whose_name_it_expects() {
    let namespace = Namespace::shared("identity");
    deploy(&namespace);
    let router = Name::Router { namespace: namespace.name.clone() };
    let worker = |pod: &Value| Name::Worker {
        namespace: namespace.name.clone(),
        replica: label(pod, "skein.dev/replica-name").to_owned(),
        stage: label(pod, "skein.dev/stage").parse().expect("a number"),
    };
    let workers = namespace.running(WORKERS);
    let mut all: Vec<Door> = workers.iter().flat_map(|pod| doors(pod, &worker(pod))).collect();
    all.extend(namespace.running(ROUTERS).iter().flat_map(|pod| doors(pod, &router)));
    all.extend(doors(&operator(), &Name::Operator));
    // Four workers with a port for steps and links; of the ranks of each stage all but the last are called by others. Two routers, one operator.
    let of = |protocol: Protocol| all.iter().filter(|door| door.protocol == protocol).count();
    assert!(of(Protocol::Grpc) == 7 && of(Protocol::Collective) >= 2, "{} and {}", of(Protocol::Grpc), of(Protocol::Collective));

    let mut names: BTreeMap<String, Name> = workers.iter().map(worker).map(|n| (n.to_string(), n)).collect();
    let elsewhere = ["spiffe://skein/ns/elsewhere/router", "spiffe://skein/ns/elsewhere/replica/r/stage/0", "spiffe://skein/operator"];
    let other = format!("spiffe://skein/ns/{}/replica/other/stage/0", namespace.name);
    names.extend(elsewhere.into_iter().chain([other.as_str()]).map(|n| (n.to_owned(), n.parse().expect("a name"))));
    names.insert(router.to_string(), router.clone());
    assert_eq!(names.len(), 7);

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let (ours, strange) = (Minted::ours(), Minted::strange());
    runtime.block_on(async {
        for door in &all {
            let Door { pod, address, owner, protocol } = door;
            let place = format!("{pod} ({owner}) at {address} ({protocol:?})");
            assert!(!door.admits_anybody().await, "{place} admits somebody without a certificate");
            for name in names.values() {
                let admitted = door.admits(&ours.process(name, &ours)).await;
                assert_eq!(admitted, door.is_for(name), "{place}, called by {name}");
                assert!(!door.admits(&strange.process(name, &ours)).await, "{place} trusts an authority of {name} that nobody knows");
            }
        }
        refuse_by_call(&namespace, &all, (&ours, &router)).await;
    });
}

/// Those who are let in may not say everything: sessions are for routers, links for workers, sequences for routers.
async fn refuse_by_call(namespace: &Namespace, all: &[Door], (ours, router): (&Minted, &Name)) {
    let refused = |result: Result<(), Status>| assert_eq!(result.expect_err("refused").code(), Code::PermissionDenied);
    let bearer = |key: &str| Bearer::new(Some(secret(&namespace.name, "skein-tokens", key)));
    let door = all.iter().find(|door| matches!(door.owner, Name::Worker { .. }) && door.protocol == Protocol::Grpc).expect("a worker");
    let [as_router, as_worker] = [ours.process(router, ours), ours.process(&door.owner, ours)];
    let client = |channel, key: &str| InterceptedService::new(channel, bearer(key));
    let mut one = WorkerClient::new(client(door.channel(&as_router).await, "worker"));
    let mut two = WorkerClient::new(client(door.channel(&as_worker).await, "worker"));
    one.probe(ProbeRequest::default()).await.expect("a router may probe");
    two.probe(ProbeRequest::default()).await.expect("a worker may probe");
    refused(one.link(tokio_stream::iter([LinkFrame::default()])).await.map(drop));
    refused(two.session(tokio_stream::iter([SessionRequest::default()])).await.map(drop));
    let door = all.iter().find(|door| matches!(door.owner, Name::Router { .. })).expect("a router");
    let mut pool = PoolClient::new(client(door.channel(&as_worker).await, "pool"));
    refused(pool.join(tokio_stream::iter([EdgeMessage::default()])).await.map(drop));
}

/// Settings of the operator, put back when dropped.
struct Settings(Vec<String>);

impl Settings {
    fn set(new: &[(&str, u64)]) -> Self {
        let before: Value =
            serde_json::from_str(&succeed(&["--namespace", SYSTEM, "get", "deployment", "skein-operator", "--output=json"])).expect("JSON");
        let env = before["spec"]["template"]["spec"]["containers"][0]["env"].as_array().expect("an environment").clone();
        let old = |name: &str| {
            let known = env.iter().find(|v| v["name"] == name).and_then(|v| v["value"].as_str());
            known.map_or_else(|| format!("{name}-"), |value| format!("{name}={value}"))
        };
        let this = Self(new.iter().map(|(name, _)| old(name)).collect());
        Self::apply(&new.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>());
        this
    }

    fn apply(settings: &[String]) {
        let all: Vec<&str> = settings.iter().map(String::as_str).collect();
        succeed(&[&["--namespace", SYSTEM, "set", "env", "deployment/skein-operator"], &all[..]].concat());
        succeed(&["--namespace", SYSTEM, "rollout", "status", "deployment/skein-operator", "--timeout=120s"]);
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        Self::apply(&self.0);
    }
}

/// When a Secret's certificate was made, and which authorities are beside it.
fn issued(secret: &Value) -> (u64, String) {
    let note = |key: &str| secret["metadata"]["annotations"][key].as_str().expect("a note").to_owned();
    (note("skein.dev/issued").parse().expect("a time"), note("skein.dev/trusted"))
}

/// Every minute another authority and other certificates, each valid for five, under load. Then everything connects anew.
#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn certificates_that_change_every_minute_fail_no_request() {
    let namespace = Namespace::alone("rotation");
    deploy(&namespace);
    let body = llama_body("tiny");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let base = namespace.http("tiny");
    let expected = runtime.block_on(client::stream(&base, &body, |_| {})).expect("an answer").text;
    let pods = || [WORKERS, ROUTERS].map(|s| namespace.pods(s).iter().map(is_same).collect::<Vec<_>>());
    let before = pods();
    let load = Load::start(&base, 2, vec![(body, expected)]);
    load.more(4);
    let settings = Settings::set(&[
        ("SKEIN_CERTIFICATE_SECONDS", 300),
        ("SKEIN_CERTIFICATE_RENEW_SECONDS", 60),
        ("SKEIN_AUTHORITY_SECONDS", 60),
        ("SKEIN_AUTHORITY_SETTLE_SECONDS", 60),
    ]);
    let (mut seen, mut trusted) = (BTreeSet::new(), BTreeSet::new());
    namespace.watch(&["secret", "skein-router-identity"], "three other certificates", |secret| {
        let (at, authorities) = issued(secret);
        seen.insert(at);
        trusted.insert(authorities);
        (seen.len() > 3 && trusted.len() > 3).then_some(())
    });
    let newest = *seen.last().expect("a certificate");
    for pod in namespace.pods(WORKERS) {
        let volumes = pod["spec"]["volumes"].as_array().expect("volumes");
        let name = volumes.iter().find_map(|v| v["secret"]["secretName"].as_str()).expect("a certificate");
        // Those of workers go with those of routers, give or take one that is being made now.
        namespace.watch(&["secret", name], "a certificate of the last minute", |secret| (issued(secret).0 + 60 >= newest).then_some(()));
    }
    load.more(8);
    assert_eq!(pods(), before, "a pod was restarted");
    // A worker starts again by what is in its folder now: its peers, and the routers, take one another for who they are.
    let workers = namespace.pods(WORKERS);
    let last = workers.last().expect("workers");
    namespace.succeed(&["delete", "pod", name(last), "--grace-period=0", "--force"]);
    namespace.watch(&["pods", "--selector", WORKERS], "a pod in its place", |pod| {
        let anew = name(pod) == name(last) && pod["metadata"]["uid"] != last["metadata"]["uid"];
        (anew && pod["status"]["containerStatuses"][0]["ready"] == true).then_some(())
    });
    load.more(8);
    load.stop().assert_whole("certificates that change every minute");
    drop(settings);
    namespace.ready("tiny", 1);
}
