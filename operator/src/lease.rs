//! Leader election by a Lease: one operator reconciles, others wait. Its term numbers the fleet's states.
//!
//! The term is the larger of the last term plus one and the seconds since 1970, so that it ascends also when the lease was deleted.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{Api, Client, api::PostParams};
use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};

use crate::models::chain;

/// Name of the lease.
const NAME: &str = "skein-operator";
/// Annotation that holds the term.
const TERM: &str = "skein.dev/term";
/// How long others wait for a holder that says nothing, and how long the holder goes on without having renewed.
const HELD: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(10));
/// How often the lease is renewed, or tried for.
const PERIOD: Duration = Duration::from_secs(2);

/// A candidate for the lease.
pub struct Election {
    api: Api<Lease>,
    identity: String,
}

/// Annotation that holds where a process ended for a test.
const STOPPED: &str = "skein.dev/stopped-at";

/// Notes in the lease, which outlive a process.
pub struct Notes {
    api: Api<Lease>,
}

impl Notes {
    /// In the lease in `namespace`.
    pub fn new(client: Client, namespace: &str) -> Self {
        Self { api: Api::namespaced(client, namespace) }
    }

    /// Notes `text` where it is not noted yet; whether it was not.
    ///
    /// # Errors
    /// When the API server refuses, or does not answer.
    pub async fn first(&self, text: &str) -> Result<bool, kube::Error> {
        loop {
            let mut lease = self.api.get(NAME).await?;
            let notes = lease.metadata.annotations.get_or_insert_default();
            if notes.get(STOPPED).is_some_and(|noted| noted == text) {
                return Ok(false);
            }
            notes.insert(STOPPED.to_owned(), text.to_owned());
            match self.api.replace(NAME, &PostParams::default(), &lease).await {
                Ok(_) => return Ok(true),
                // It was renewed meanwhile.
                Err(kube::Error::Api(status)) if status.code == 409 => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// What a look at the lease shows.
#[derive(Debug, PartialEq, Eq)]
enum View {
    /// Nobody holds it, or this process does.
    Free,
    /// Another holds it; what changes when it is renewed.
    Held(String, String),
}

impl Election {
    /// For the lease in `namespace`.
    pub fn new(client: Client, namespace: &str, identity: String) -> Self {
        Self { api: Api::namespaced(client, namespace), identity }
    }

    /// Waits until this process holds the lease; its term.
    pub async fn win(&self) -> u64 {
        let mut seen: Option<(View, Instant)> = None;
        loop {
            match self.attempt(&mut seen).await {
                Ok(Some(term)) => {
                    info!(identity = self.identity, term, "leading");
                    return term;
                }
                Ok(None) => {}
                Err(error) => warn!(error = chain(&error), "failed to take the lease"),
            }
            sleep(PERIOD).await;
        }
    }

    /// Takes the lease if it is free, or was not renewed for as long as this process has watched it. Clocks are not compared.
    async fn attempt(&self, seen: &mut Option<(View, Instant)>) -> Result<Option<u64>, kube::Error> {
        let lease = self.api.get_opt(NAME).await?;
        let Some(lease) = lease else {
            let term = next_term(0);
            let lease = self.lease(ObjectMeta::default(), term, 0);
            return won(self.api.create(&PostParams::default(), &lease).await, term);
        };
        let view = self.view(&lease);
        let expired = match seen {
            Some((last, since)) if *last == view => since.elapsed() >= HELD.0,
            _ => {
                *seen = Some((view, Instant::now()));
                false
            }
        };
        let free = matches!(seen, Some((View::Free, _)));
        if !free && !expired {
            return Ok(None);
        }
        let (term, transitions) = (next_term(term(&lease)), lease.spec.as_ref().and_then(|s| s.lease_transitions).unwrap_or(0) + 1);
        let next = self.lease(lease.metadata.clone(), term, transitions);
        won(self.api.replace(NAME, &PostParams::default(), &next).await, term)
    }

    fn view(&self, lease: &Lease) -> View {
        let spec = lease.spec.clone().unwrap_or_default();
        match spec.holder_identity.filter(|holder| !holder.is_empty() && *holder != self.identity) {
            None => View::Free,
            Some(holder) => View::Held(holder, spec.renew_time.map(|t| t.0.to_string()).unwrap_or_default()),
        }
    }

    fn lease(&self, before: ObjectMeta, term: u64, transitions: i32) -> Lease {
        let now = MicroTime(Timestamp::now());
        let mut annotations = before.annotations.unwrap_or_default();
        annotations.insert(TERM.to_owned(), term.to_string());
        Lease {
            metadata: ObjectMeta {
                name: Some(NAME.to_owned()),
                resource_version: before.resource_version,
                annotations: Some(annotations),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(self.identity.clone()),
                lease_duration_seconds: Some(HELD.0.as_secs() as i32),
                acquire_time: Some(now.clone()),
                renew_time: Some(now),
                lease_transitions: Some(transitions),
                ..LeaseSpec::default()
            }),
        }
    }

    /// Renews the lease for as long as this process holds it; completes when it does not any more.
    pub async fn keep(&self) {
        let mut renewed = Instant::now();
        loop {
            sleep(PERIOD).await;
            // This process may have been stopped meanwhile, and another may lead.
            if renewed.elapsed() >= HELD.1 {
                warn!("the lease was not renewed in time");
                return;
            }
            match timeout(HELD.1.saturating_sub(renewed.elapsed()), self.renew()).await {
                Ok(Ok(true)) => renewed = Instant::now(),
                Ok(Ok(false)) => {
                    warn!("another operator holds the lease");
                    return;
                }
                Ok(Err(error)) => warn!(error = chain(&error), "failed to renew the lease"),
                Err(_) => warn!("renewing the lease takes too long"),
            }
        }
    }

    async fn renew(&self) -> Result<bool, kube::Error> {
        let mut lease = self.api.get(NAME).await?;
        let Some(spec) = lease.spec.as_mut().filter(|s| s.holder_identity.as_ref() == Some(&self.identity)) else { return Ok(false) };
        spec.renew_time = Some(MicroTime(Timestamp::now()));
        self.api.replace(NAME, &PostParams::default(), &lease).await.map(|_| true)
    }

    /// Gives the lease back, so that the next one need not wait.
    ///
    /// # Errors
    /// When the API server refuses, or does not answer.
    pub async fn release(&self) -> Result<(), kube::Error> {
        let mut lease = self.api.get(NAME).await?;
        let Some(spec) = lease.spec.as_mut().filter(|s| s.holder_identity.as_ref() == Some(&self.identity)) else { return Ok(()) };
        spec.holder_identity = None;
        self.api.replace(NAME, &PostParams::default(), &lease).await.map(drop)
    }
}

/// Somebody else was faster: that is no error.
fn won(written: Result<Lease, kube::Error>, term: u64) -> Result<Option<u64>, kube::Error> {
    match written {
        Ok(_) => Ok(Some(term)),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(None),
        Err(error) => Err(error),
    }
}

fn term(lease: &Lease) -> u64 {
    lease.metadata.annotations.as_ref().and_then(|a| a.get(TERM)?.parse().ok()).unwrap_or(0)
}

fn next_term(last: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    now.max(last + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::{self, Objects, REFUSED};

    const LEASE: &str = "/apis/coordination.k8s.io/v1/namespaces/skein-system/leases/skein-operator";

    fn election(objects: &Objects, identity: &str) -> Election {
        Election::new(mock::client(objects), "skein-system", identity.to_owned())
    }

    fn holder(objects: &Objects) -> Option<String> {
        let objects = objects.lock().expect("nobody panics with it");
        objects.get(LEASE)?["spec"]["holderIdentity"].as_str().map(str::to_owned)
    }

    #[tokio::test(start_paused = true)]
    async fn of_two_candidates_one_wins() {
        let objects = Objects::default();
        let (a, b) = (election(&objects, "a"), election(&objects, "b"));
        let (mut seen_a, mut seen_b) = (None, None);
        let (of_a, of_b) = tokio::join!(a.attempt(&mut seen_a), b.attempt(&mut seen_b));
        let won = [of_a.expect("an answer").is_some(), of_b.expect("an answer").is_some()];
        assert_eq!(won.iter().filter(|won| **won).count(), 1, "{won:?}");
        assert_eq!(holder(&objects).as_deref(), Some(if won[0] { "a" } else { "b" }));
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_is_given_back_is_taken_at_once_and_one_that_is_kept_never() {
        let objects = Objects::default();
        let (a, b) = (election(&objects, "a"), election(&objects, "b"));
        let first = a.win().await;
        tokio::select! {
            () = a.keep() => panic!("the lease was held"),
            _ = b.win() => panic!("the lease was taken from one that renews it"),
            () = sleep(HELD.0 * 10) => {}
        }
        a.release().await.expect("it is given back");
        let begun = Instant::now();
        assert!(b.win().await > first);
        assert!(begun.elapsed() <= PERIOD, "nobody waits for a lease that is free");
        assert_eq!(holder(&objects).as_deref(), Some("b"));
        // What is another's is not given back by the one that had it.
        a.release().await.expect("nothing to do");
        assert_eq!(holder(&objects).as_deref(), Some("b"));
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_cannot_renew_ends_before_another_may_begin() {
        let objects = Objects::default();
        let (a, b) = (election(&objects, "a"), election(&objects, "b"));
        a.win().await;
        let begun = Instant::now();
        let waiting = async {
            let term = b.win().await;
            (term, begun.elapsed())
        };
        let keeping = async {
            objects.lock().expect("nobody panics with it").insert(REFUSED.to_owned(), "/leases/".into());
            a.keep().await;
            let ended = begun.elapsed();
            objects.lock().expect("nobody panics with it").remove(REFUSED);
            ended
        };
        let ((_, began), ended) = tokio::join!(waiting, keeping);
        assert!(ended <= HELD.1 + PERIOD, "it went on for {ended:?}");
        assert!(began >= HELD.0 && began > ended, "the other began after {began:?}, and this one ended after {ended:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn one_whose_lease_is_another_s_ends_with_its_next_look() {
        let objects = Objects::default();
        let a = election(&objects, "a");
        a.win().await;
        objects.lock().expect("nobody panics with it").get_mut(LEASE).expect("a lease")["spec"]["holderIdentity"] = "b".into();
        let begun = Instant::now();
        a.keep().await;
        assert!(begun.elapsed() <= PERIOD);
    }

    #[test]
    fn terms_ascend_with_any_clock() {
        let now = next_term(0);
        assert!(now > 1_700_000_000);
        assert_eq!(next_term(u64::from(u32::MAX)), u64::from(u32::MAX) + 1);
    }
}
