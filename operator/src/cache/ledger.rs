//! What this process wrote last of each object, so that what stands already is not written again.
//!
//! The API server notes with an object which fields each writer owns. Another writer who changes a field of ours takes it out of our note; so an
//! object stands as it was written for as long as our note is what it was when it was written.

use std::{
    collections::{HashMap, HashSet},
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Mutex, MutexGuard, PoisonError},
};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::Value;

use super::{index::Owner, version};
use crate::names::MANAGER;

/// Objects by kind, namespace and name.
#[derive(Debug, Default)]
pub struct Ledger(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    entries: HashMap<Key, Entry>,
    /// What lists under way have had so far, by kind.
    listed: HashMap<String, HashSet<Key>>,
}

/// Kind, namespace and name, in one text.
type Key = Box<str>;

/// One object.
#[derive(Clone, Debug, Default)]
struct Entry {
    owner: Owner,
    /// Digest of what was written; `None` for what this process has not written.
    body: Option<u64>,
    /// As it was when this process wrote it.
    wrote: Mark,
    /// As a watch told of it last.
    seen: Mark,
}

/// A version of an object, and the digest of our note in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Mark {
    version: u64,
    note: u64,
}

impl Entry {
    /// Whether another has changed what this process wrote.
    fn drifted(&self) -> bool {
        self.body.is_some() && self.seen.version > self.wrote.version && self.seen.note != self.wrote.note
    }
}

fn key(kind: &str, namespace: &str, name: &str) -> Key {
    format!("{kind}/{namespace}/{name}").into_boxed_str()
}

fn digest(text: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

/// Our note in an object.
fn mark(metadata: &ObjectMeta) -> Mark {
    let ours = metadata.managed_fields.iter().flatten().find(|entry| {
        entry.manager.as_deref() == Some(MANAGER) && entry.operation.as_deref() == Some("Apply") && entry.subresource.is_none()
    });
    let fields = ours.and_then(|entry| entry.fields_v1.as_ref());
    Mark { version: version(metadata), note: fields.map_or(0, |fields| digest(fields.0.to_string())) }
}

impl Ledger {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the object stands as `body`, as this process wrote it.
    pub fn stands(&self, kind: &str, namespace: &str, name: &str, body: &Value) -> bool {
        let inner = self.lock();
        let entry = inner.entries.get(&key(kind, namespace, name));
        entry.is_some_and(|entry| entry.body == Some(digest(body.to_string())) && !entry.drifted())
    }

    /// Whether there is such an object, whoever wrote it.
    pub fn has(&self, kind: &str, namespace: &str, name: &str) -> bool {
        self.lock().entries.contains_key(&key(kind, namespace, name))
    }

    /// Notes what this process wrote, and what the API server made of it.
    pub fn wrote(&self, (kind, owner, name): (&str, Owner, &str), body: &Value, made: &ObjectMeta) {
        let key = key(kind, &owner.namespace, name);
        let mut inner = self.lock();
        let entry = inner.entries.entry(key).or_default();
        (entry.owner, entry.body, entry.wrote) = (owner, Some(digest(body.to_string())), mark(made));
    }

    /// Forgets what this process has deleted.
    pub fn forget(&self, kind: &str, namespace: &str, name: &str) {
        self.lock().entries.remove(&key(kind, namespace, name));
    }

    /// Takes an object as a watch tells of it; whether another has changed what this process wrote.
    pub(super) fn saw(&self, kind: &str, owner: &Owner, metadata: &ObjectMeta) -> bool {
        let key = key(kind, &owner.namespace, metadata.name.as_deref().unwrap_or_default());
        let mut inner = self.lock();
        if let Some(listed) = inner.listed.get_mut(kind) {
            listed.insert(key.clone());
        }
        let entry = inner.entries.entry(key).or_insert_with(|| Entry { owner: owner.clone(), ..Entry::default() });
        entry.seen = mark(metadata);
        entry.drifted()
    }

    /// Takes the end of an object; whether this process wrote it, and has not deleted it.
    pub(super) fn gone(&self, kind: &str, owner: &Owner, metadata: &ObjectMeta) -> bool {
        let key = key(kind, &owner.namespace, metadata.name.as_deref().unwrap_or_default());
        let mut inner = self.lock();
        match inner.entries.get(&key) {
            // It was made anew since.
            Some(entry) if entry.wrote.version > version(metadata) => false,
            Some(_) => inner.entries.remove(&key).is_some_and(|entry| entry.body.is_some()),
            None => false,
        }
    }

    pub(super) fn begin(&self, kind: &str) {
        self.lock().listed.insert(kind.to_owned(), HashSet::new());
    }

    /// Forgets what the list of `kind` that has ended did not have; whose that was.
    pub(super) fn end(&self, kind: &str) -> Vec<Owner> {
        let mut inner = self.lock();
        let Some(listed) = inner.listed.remove(kind) else { return Vec::new() };
        let mut missed = Vec::new();
        inner.entries.retain(|key, entry| {
            let stays = key.split('/').next() != Some(kind) || listed.contains(key);
            if !stays && entry.body.is_some() {
                missed.push(entry.owner.clone());
            }
            stays
        });
        missed
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// An object at `version` of which we own `fields`.
    fn object(version: u64, fields: &str) -> ObjectMeta {
        let note = json!({ "manager": MANAGER, "operation": "Apply", "fieldsV1": { fields: {} } });
        let theirs = json!({ "manager": "kube", "operation": "Update", "subresource": "status", "fieldsV1": { "f:status": version } });
        serde_json::from_value(
            json!({ "name": "x", "namespace": "n", "resourceVersion": version.to_string(), "managedFields": [theirs, note] }),
        )
        .expect("metadata")
    }

    fn owner() -> Owner {
        Owner::new("n", "a")
    }

    fn write(ledger: &Ledger, body: &Value, made: &ObjectMeta) {
        ledger.wrote(("Service", owner(), "x"), body, made);
    }

    #[test]
    fn what_was_written_stands_until_another_changes_it() {
        let (ledger, body) = (Ledger::default(), json!({ "a": 1 }));
        let stands = |body: &Value| ledger.stands("Service", "n", "x", body);
        assert!(!stands(&body), "it was never written");
        // A watch may be faster than the answer to the write.
        assert!(!ledger.saw("Service", &owner(), &object(5, "f:a")));
        write(&ledger, &body, &object(5, "f:a"));
        assert!(stands(&body) && !stands(&json!({ "a": 2 })) && !ledger.stands("Service", "n", "y", &body));
        assert!(!ledger.saw("Service", &owner(), &object(6, "f:a")), "somebody wrote a status");
        assert!(stands(&body));
        assert!(ledger.saw("Service", &owner(), &object(7, "f:other")), "a field is not ours any more");
        assert!(!stands(&body));
        write(&ledger, &body, &object(8, "f:a"));
        assert!(stands(&body), "it was written again");
        assert!(!ledger.saw("Service", &owner(), &object(7, "f:other")), "that was before");
        assert!(stands(&body));
    }

    #[test]
    fn a_change_that_was_seen_before_the_answer_to_our_write_counts() {
        let (ledger, body) = (Ledger::default(), json!({ "a": 1 }));
        ledger.saw("Service", &owner(), &object(6, "f:other"));
        write(&ledger, &body, &object(5, "f:a"));
        assert!(!ledger.stands("Service", "n", "x", &body));
    }

    #[test]
    fn what_is_deleted_does_not_stand() {
        let (ledger, body) = (Ledger::default(), json!({ "a": 1 }));
        write(&ledger, &body, &object(5, "f:a"));
        assert!(!ledger.gone("Service", &owner(), &object(4, "f:a")), "that was one before it");
        assert!(ledger.stands("Service", "n", "x", &body));
        assert!(ledger.gone("Service", &owner(), &object(6, "f:a")));
        assert!(!ledger.stands("Service", "n", "x", &body));
        // What this process deleted itself is no news.
        write(&ledger, &body, &object(7, "f:a"));
        ledger.forget("Service", "n", "x");
        assert!(!ledger.gone("Service", &owner(), &object(8, "f:a")));
        // What a list does not have is gone too; other kinds are none of its business.
        write(&ledger, &body, &object(9, "f:a"));
        ledger.begin("ConfigMap");
        assert!(ledger.end("ConfigMap").is_empty() && ledger.stands("Service", "n", "x", &body));
        ledger.begin("Service");
        assert_eq!(ledger.end("Service"), [owner()]);
        assert!(!ledger.stands("Service", "n", "x", &body));
    }
}
