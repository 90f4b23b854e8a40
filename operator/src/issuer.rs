//! Keeps the authorities in a Secret of the operator's namespace, and the certificate of every process in one beside it.
//!
//! Only the operator that leads writes; what two write at once all the same is settled by the API server: a Secret of authorities is made once,
//! and replaced only by who has read the last one.

mod expiry;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

use futures_util::{StreamExt, TryStreamExt, stream};
use identity::{CERTIFICATE, Identity, IdentityError, KEY, Name, TRUSTED};
use k8s_openapi::{
    ByteString,
    api::core::v1::Secret,
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use tokio::time::sleep;
use tracing::{info, warn};

use self::expiry::Expiries;
use crate::{
    apply::{ApplyError, Conflicts, write},
    build::{Object, owned},
    certificates::{Authorities, CertificateError, Files, Lifetimes, Note},
    metrics::Metrics,
    models::chain,
    names::{AUTHORITIES, MANAGER},
};

/// Key of the authorities in their Secret.
const KEPT: &str = "authorities.json";
/// Annotations of a Secret: whose certificate it holds, when that was made, and the digest of the authorities beside it.
const NOTE: [&str; 3] = ["skein.dev/identity", "skein.dev/issued", "skein.dev/trusted"];
/// Secrets looked at at once.
const CONCURRENCY: usize = 8;
/// How long a Secret is taken to stand as it did when it was looked at: none is listed or watched.
const TRUSTED_FOR: Duration = Duration::from_secs(900);
/// How often the Secret of the authorities is looked at though nothing is due, and how soon it is tried again when that failed.
const LOOK: (Duration, Duration) = (Duration::from_secs(300), Duration::from_secs(5));

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// The API server refused, or did not answer.
    #[error("failed to {action} secret {name}")]
    Api {
        /// What was tried.
        action: &'static str,
        /// The Secret.
        name: String,
        /// Why not.
        source: kube::Error,
    },
    /// A certificate could not be written.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// What is kept is damaged.
    #[error("secret {AUTHORITIES} holds no authorities; restore it, or delete it, and everybody is given certificates of a new one")]
    Damaged(#[source] serde_json::Error),
    /// A certificate could not be made.
    #[error(transparent)]
    Make(#[from] CertificateError),
    /// The operator's own certificate is not one.
    #[error("the operator's own certificate is of no use")]
    Own(#[from] IdentityError),
}

/// A certificate that is to stand.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// Name of its Secret.
    pub secret: String,
    /// Whose it is.
    pub name: Name,
    /// Labels of its Secret.
    pub labels: Value,
    /// What its Secret goes with.
    pub owners: Vec<OwnerReference>,
}

/// Issues certificates while this process leads.
pub struct Issuer {
    client: Client,
    namespace: String,
    lifetimes: Lifetimes,
    /// As they are stored.
    authorities: RwLock<Arc<Authorities>>,
    /// The operator itself, and when its certificate was made.
    own: (Identity, RwLock<Note>),
    expiries: Expiries,
    metrics: Arc<Metrics>,
    /// Secrets that stood when they were looked at last.
    looked: Mutex<Looked>,
}

/// Secrets that stood, by namespace and name.
#[derive(Default)]
struct Looked {
    secrets: HashMap<(String, String), Stood>,
    /// When those that nobody asks for any more were forgotten.
    swept: Option<Instant>,
}

/// How a Secret stood.
struct Stood {
    note: Note,
    /// Unique ids of what it goes with, in order.
    owners: Vec<String>,
    at: Instant,
}

/// Seconds since 1970.
fn now() -> i64 {
    Timestamp::now().as_second()
}

fn api_failed(action: &'static str, name: &str) -> impl FnOnce(kube::Error) -> IssueError {
    move |source| IssueError::Api { action, name: name.to_owned(), source }
}

fn texts(files: &Files) -> [&str; 3] {
    [&files.certificate, &files.key, &files.trusted]
}

impl Issuer {
    /// Reads the authorities in `namespace`, or makes the first one, and has it sign for the operator.
    ///
    /// # Errors
    /// When the API server does not answer, or what it keeps is damaged.
    pub async fn begin(client: Client, namespace: &str, lifetimes: Lifetimes, metrics: Arc<Metrics>) -> Result<Self, IssueError> {
        let authorities = turned(&client, namespace, &Authorities::default(), &lifetimes).await?;
        let files = authorities.issue(&Name::Operator, now(), &lifetimes)?;
        let own = (Identity::given(texts(&files))?, RwLock::new(files.note));
        let authorities = RwLock::new(Arc::new(authorities));
        let (namespace, expiries, looked) = (namespace.to_owned(), Expiries::default(), Mutex::default());
        let issuer = Self { client, namespace, lifetimes, authorities, own, expiries, metrics, looked };
        issuer.tell();
        Ok(issuer)
    }

    /// What the operator is.
    pub fn identity(&self) -> &Identity {
        &self.own.0
    }

    /// Adds and forgets authorities, and renews the operator's own certificate, as their time comes. Whether others are to be trusted.
    ///
    /// # Errors
    /// As [`Issuer::begin`]; it can be tried again.
    async fn turn(&self) -> Result<bool, IssueError> {
        let known = self.authorities();
        let authorities = turned(&self.client, &self.namespace, &known, &self.lifetimes).await?;
        let changed = *known != authorities;
        if changed {
            info!("the authorities have changed: every process is given others to trust");
            *self.authorities.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(authorities);
        }
        let (authorities, now) = (self.authorities(), now());
        if authorities.due(&Name::Operator, Some(&self.note()), now, &self.lifetimes) {
            let files = authorities.issue(&Name::Operator, now, &self.lifetimes)?;
            self.own.0.replace(texts(&files))?;
            *self.own.1.write().unwrap_or_else(PoisonError::into_inner) = files.note;
        }
        self.tell();
        Ok(changed)
    }

    /// Keeps authorities and the operator's own certificate current; completes whenever others are to be trusted, which is due to all.
    pub async fn changed(&self) {
        loop {
            let again = match self.turn().await {
                Ok(true) => return,
                Ok(false) => {
                    let due = Duration::from_secs((self.note().due(&self.lifetimes) - now()).max(1).unsigned_abs());
                    LOOK.0.min(due).min(self.authorities().next(now(), &self.lifetimes))
                }
                Err(error) => {
                    warn!(error = chain(&error), "the authorities are not looked after");
                    LOOK.1
                }
            };
            sleep(again).await;
        }
    }

    /// Sees to it that certificates stand which are valid for long enough and trust whom they should.
    ///
    /// # Errors
    /// When one cannot be made, read or written; others may stand.
    pub async fn certify(&self, namespace: &str, wanted: Vec<Wanted>) -> Result<Option<Certified>, IssueError> {
        let notes = stream::iter(wanted).map(|wanted| async move { self.stand(namespace, &wanted).await }).buffer_unordered(CONCURRENCY);
        let issued: Vec<i64> = notes.try_collect().await?;
        Ok(issued.into_iter().min().map(|oldest| {
            let due = oldest + seconds(self.lifetimes.renew);
            Certified {
                again: Duration::from_secs((due - now()).max(1).unsigned_abs()),
                expires: oldest + seconds(self.lifetimes.certificate),
            }
        }))
    }

    /// Notes in the metrics when the first certificate of `kind` of an object expires; `None` when it has none any more.
    pub fn note_expiry(&self, kind: &'static str, (namespace, name): (&str, &str), expires: Option<i64>) {
        self.expiries.note(kind, (namespace, name), expires);
        self.tell();
    }

    /// One Secret; when its certificate was made.
    async fn stand(&self, namespace: &str, wanted: &Wanted) -> Result<i64, IssueError> {
        if let Some(issued) = self.stood(namespace, wanted) {
            return Ok(issued);
        }
        let note = self.look(namespace, wanted).await?;
        let issued = note.issued;
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if looked.swept.is_none_or(|at| at + TRUSTED_FOR < now) {
            looked.swept = Some(now);
            looked.secrets.retain(|_, stood| now < stood.at + 2 * TRUSTED_FOR);
        }
        let stood = Stood { note, owners: uids(&wanted.owners), at: now };
        looked.secrets.insert((namespace.to_owned(), wanted.secret.clone()), stood);
        Ok(issued)
    }

    /// When the certificate of a Secret was made that stood as it should not long ago, and is not due.
    fn stood(&self, namespace: &str, wanted: &Wanted) -> Option<i64> {
        let looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        let stood = looked.secrets.get(&(namespace.to_owned(), wanted.secret.clone()))?;
        let fresh = Instant::now() < stood.at + TRUSTED_FOR && stood.owners == uids(&wanted.owners);
        (fresh && !self.authorities().due(&wanted.name, Some(&stood.note), now(), &self.lifetimes)).then_some(stood.note.issued)
    }

    /// Forgets how Secrets stood, as time does.
    #[cfg(test)]
    pub(crate) fn forget(&self) {
        self.looked.lock().unwrap_or_else(PoisonError::into_inner).secrets.clear();
    }

    /// Looks at one Secret, and sees to it that it is as it should; what is noted of it then.
    async fn look(&self, namespace: &str, wanted: &Wanted) -> Result<Note, IssueError> {
        let api = Api::<Secret>::namespaced(self.client.clone(), namespace);
        let found = api.get_metadata_opt(&wanted.secret).await.map_err(api_failed("read", &wanted.secret))?;
        let metadata = found.map(|found| found.metadata);
        let note = metadata.as_ref().and_then(read_note);
        let (authorities, now) = (self.authorities(), now());
        match note.filter(|note| !authorities.due(&wanted.name, Some(note), now, &self.lifetimes)) {
            Some(note) => {
                if !belongs(metadata.as_ref(), &wanted.owners) {
                    let owners = json!({ "metadata": { "ownerReferences": wanted.owners } });
                    let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
                    let patched = api.patch_metadata(&wanted.secret, &params, &Patch::Merge(owners)).await;
                    patched.map_err(api_failed("hand over", &wanted.secret))?;
                }
                Ok(note)
            }
            None => {
                let files = authorities.issue(&wanted.name, now, &self.lifetimes)?;
                write::<Secret>(&self.client, namespace, &object(wanted, &files), Conflicts::Ours).await?;
                info!(namespace, secret = wanted.secret, name = %wanted.name, "issued a certificate");
                Ok(files.note)
            }
        }
    }

    fn authorities(&self) -> Arc<Authorities> {
        self.authorities.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note(&self) -> Note {
        self.own.1.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Tells the metrics.
    fn tell(&self) {
        let mut all = self.expiries.first();
        all.insert("operator", self.note().issued + seconds(self.lifetimes.certificate));
        all.extend(self.authorities().expires(&self.lifetimes).map(|at| ("authority", at)));
        self.metrics.expiries(&all);
    }
}

/// How certificates stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Certified {
    /// When the first of them is to be looked at again.
    pub again: Duration,
    /// When the first of them expires unless it is, in seconds since 1970.
    pub expires: i64,
}

fn seconds(duration: Duration) -> i64 {
    duration.as_secs().try_into().unwrap_or(i64::MAX)
}

/// The stored authorities, turned over when their time has come; where none are stored, `known`, or a first one.
async fn turned(client: &Client, namespace: &str, known: &Authorities, lifetimes: &Lifetimes) -> Result<Authorities, IssueError> {
    let api = Api::<Secret>::namespaced(client.clone(), namespace);
    loop {
        let stored = api.get_opt(AUTHORITIES).await.map_err(api_failed("read", AUTHORITIES))?;
        let mut authorities = match &stored {
            None => known.clone(),
            Some(secret) => {
                let text = secret.data.as_ref().and_then(|data| data.get(KEPT)).map(|text| text.0.as_slice()).unwrap_or_default();
                serde_json::from_slice(text).map_err(IssueError::Damaged)?
            }
        };
        let changed = authorities.turn(now(), lifetimes)?;
        if !changed && stored.is_some() {
            return Ok(authorities);
        }
        let params = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
        let written = match stored {
            None => api.create(&params, &kept(&authorities, ObjectMeta::default())).await,
            // Replaced only if it is still what was read.
            Some(secret) => api.replace(AUTHORITIES, &params, &kept(&authorities, secret.metadata)).await,
        };
        match written {
            Ok(_) => return Ok(authorities),
            // Another operator was faster: what it wrote counts.
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(source) => return Err(api_failed("write", AUTHORITIES)(source)),
        }
    }
}

/// The Secret of the authorities.
fn kept(authorities: &Authorities, before: ObjectMeta) -> Secret {
    let text = serde_json::to_vec(authorities).unwrap_or_else(|error| unreachable!("authorities are plain data: {error}"));
    let labels = serde_json::from_value(crate::names::labels("operator")).unwrap_or_else(|error| unreachable!("labels are text: {error}"));
    Secret {
        metadata: ObjectMeta { name: Some(AUTHORITIES.to_owned()), labels: Some(labels), ..before },
        data: Some(BTreeMap::from([(KEPT.to_owned(), ByteString(text))])),
        type_: Some("Opaque".to_owned()),
        ..Secret::default()
    }
}

/// The Secret of a certificate.
fn object(wanted: &Wanted, files: &Files) -> Object {
    let [certificate, key, trusted] = texts(files).map(|text| json!(ByteString(text.as_bytes().to_vec())));
    let data = json!({ CERTIFICATE: certificate, KEY: key, TRUSTED: trusted });
    let rest = json!({ "type": "kubernetes.io/tls", "data": data });
    let mut object = owned(("v1", "Secret"), wanted.secret.clone(), wanted.labels.clone(), &wanted.owners, rest);
    let Note { name, issued, trusted } = &files.note;
    object.body["metadata"]["annotations"] = json!({ NOTE[0]: name, NOTE[1]: issued.to_string(), NOTE[2]: trusted });
    object
}

/// What is noted of a certificate in its Secret.
fn read_note(metadata: &ObjectMeta) -> Option<Note> {
    let [name, issued, trusted] = NOTE.map(|key| metadata.annotations.as_ref()?.get(key).cloned());
    Some(Note { name: name?, issued: issued?.parse().ok()?, trusted: trusted? })
}

/// Unique ids of owners, in order.
fn uids(owners: &[OwnerReference]) -> Vec<String> {
    let mut uids: Vec<String> = owners.iter().map(|owner| owner.uid.clone()).collect();
    uids.sort();
    uids
}

/// Whether a Secret goes with `owners`, and with nothing else.
fn belongs(metadata: Option<&ObjectMeta>, owners: &[OwnerReference]) -> bool {
    uids(metadata.and_then(|m| m.owner_references.as_deref()).unwrap_or_default()) == uids(owners)
}
