//! When certificates expire, by whose they are, for metrics.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

/// The first certificate to expire of each object.
#[derive(Debug, Default)]
pub(super) struct Expiries(Mutex<BTreeMap<Key, i64>>);

/// Kind of the processes, namespace and name of the object that they are of.
type Key = (&'static str, String, String);

impl Expiries {
    /// Notes an object's, or that it has none.
    pub(super) fn note(&self, kind: &'static str, (namespace, name): (&str, &str), expires: Option<i64>) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (kind, namespace.to_owned(), name.to_owned());
        match expires {
            Some(at) => drop(all.insert(key, at)),
            None => drop(all.remove(&key)),
        }
    }

    /// The first of each kind.
    pub(super) fn first(&self) -> BTreeMap<&'static str, i64> {
        let mut first = BTreeMap::new();
        for ((kind, ..), at) in &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            let known = first.entry(*kind).or_insert(*at);
            *known = (*at).min(*known);
        }
        first
    }
}
