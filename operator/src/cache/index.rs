//! Objects of one kind, by the deployment they are of.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// How long what was written is waited for; a watch tells of it within milliseconds.
const LATE: Duration = Duration::from_secs(30);

/// A deployment, or its own routers; without a name, all that is the namespace's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Owner {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its own routers are meant, and nothing else of it.
    pub routers: bool,
}

impl Owner {
    /// The deployment `name`.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.to_owned(), name: name.to_owned(), routers: false }
    }

    /// The own routers of the deployment `name`.
    pub fn routers_of(namespace: &str, name: &str) -> Self {
        Self { routers: true, ..Self::new(namespace, name) }
    }
}

/// Objects by owner and name.
#[derive(Debug)]
pub struct Index<V>(Mutex<Inner<V>>);

#[derive(Debug)]
struct Inner<V> {
    objects: HashMap<Owner, BTreeMap<String, (u64, Arc<V>)>>,
    /// Versions that this process wrote and was not told of yet, and since when.
    awaited: HashMap<Owner, HashMap<String, (u64, Instant)>>,
    /// What a list under way has had so far.
    listed: Option<HashSet<(Owner, String)>>,
}

impl<V> Default for Index<V> {
    fn default() -> Self {
        Self(Mutex::new(Inner { objects: HashMap::new(), awaited: HashMap::new(), listed: None }))
    }
}

impl<V> Index<V> {
    fn lock(&self) -> MutexGuard<'_, Inner<V>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The objects of an owner, by name.
    pub fn of(&self, owner: &Owner) -> Vec<Arc<V>> {
        self.lock().objects.get(owner).map(|all| all.values().map(|(_, object)| object.clone()).collect()).unwrap_or_default()
    }

    /// Their names.
    pub fn names(&self, owner: &Owner) -> Vec<String> {
        self.lock().objects.get(owner).map(|all| all.keys().cloned().collect()).unwrap_or_default()
    }

    /// Notes that this process wrote `version` of an object, and is to see it before it goes by what is here.
    pub fn wrote(&self, owner: &Owner, name: &str, version: u64) {
        let mut inner = self.lock();
        let seen = inner.objects.get(owner).and_then(|all| all.get(name)).map_or(0, |(version, _)| *version);
        if seen < version {
            inner.awaited.entry(owner.clone()).or_default().insert(name.to_owned(), (version, Instant::now()));
        }
    }

    /// Whether something that this process wrote has not come here yet.
    pub fn awaits(&self, owner: &Owner) -> bool {
        let mut inner = self.lock();
        let Some(awaited) = inner.awaited.get_mut(owner) else { return false };
        // What another has deleted since does not come any more.
        awaited.retain(|_, (_, since)| since.elapsed() < LATE);
        let any = !awaited.is_empty();
        if !any {
            inner.awaited.remove(owner);
        }
        any
    }

    pub(super) fn begin(&self) {
        self.lock().listed = Some(HashSet::new());
    }

    /// Forgets what the list that has ended did not have; whose that was.
    pub(super) fn end(&self) -> Vec<Owner> {
        let mut inner = self.lock();
        let Some(listed) = inner.listed.take() else { return Vec::new() };
        let mut news = Vec::new();
        inner.objects.retain(|owner, all| {
            let before = all.len();
            all.retain(|name, _| listed.contains(&(owner.clone(), name.clone())));
            if all.len() < before {
                news.push(owner.clone());
            }
            !all.is_empty()
        });
        news
    }

    pub(super) fn remove(&self, owner: &Owner, name: &str) -> bool {
        let mut inner = self.lock();
        inner.forget(owner, name, u64::MAX);
        let Some(all) = inner.objects.get_mut(owner) else { return false };
        let there = all.remove(name).is_some();
        if all.is_empty() {
            inner.objects.remove(owner);
        }
        there
    }
}

impl<V> Inner<V> {
    /// `version` of an object has come.
    fn forget(&mut self, owner: &Owner, name: &str, version: u64) {
        let Some(awaited) = self.awaited.get_mut(owner) else { return };
        if awaited.get(name).is_some_and(|(wanted, _)| *wanted <= version) {
            awaited.remove(name);
        }
        if awaited.is_empty() {
            self.awaited.remove(owner);
        }
    }
}

impl<V: PartialEq> Index<V> {
    /// Keeps an object; whether it is another than before.
    pub(super) fn put(&self, owner: &Owner, name: String, version: u64, object: V) -> bool {
        let mut inner = self.lock();
        if let Some(listed) = &mut inner.listed {
            listed.insert((owner.clone(), name.clone()));
        }
        inner.forget(owner, &name, version);
        let all = inner.objects.entry(owner.clone()).or_default();
        match all.get_mut(&name) {
            Some((seen, same)) if **same == object => {
                *seen = version;
                false
            }
            _ => {
                all.insert(name, (version, Arc::new(object)));
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(name: &str) -> Owner {
        Owner::new("n", name)
    }

    #[test]
    fn only_what_differs_is_news() {
        let index = Index::default();
        assert!(index.put(&owner("a"), "x".into(), 1, 7));
        assert!(!index.put(&owner("a"), "x".into(), 2, 7), "another version of the same is not");
        assert!(index.put(&owner("a"), "x".into(), 3, 8));
        assert_eq!(index.of(&owner("a")), [Arc::new(8)]);
        assert!(index.of(&owner("b")).is_empty());
        assert!(index.remove(&owner("a"), "x") && !index.remove(&owner("a"), "x"));
    }

    #[test]
    fn what_a_list_does_not_have_is_gone() {
        let index = Index::default();
        for (of, name) in [("a", "x"), ("a", "y"), ("b", "z")] {
            index.put(&owner(of), name.into(), 1, ());
        }
        index.begin();
        index.put(&owner("a"), "x".into(), 2, ());
        assert_eq!(index.names(&owner("b")), ["z"], "until the list has ended nothing is");
        let mut news = index.end();
        news.sort();
        assert_eq!(news, [owner("a"), owner("b")]);
        assert_eq!((index.names(&owner("a")), index.names(&owner("b"))), (vec!["x".to_owned()], vec![]));
        assert!(index.end().is_empty(), "no list is under way");
    }

    #[test]
    fn what_was_written_is_awaited_until_it_comes() {
        let index = Index::default();
        index.wrote(&owner("a"), "x", 5);
        assert!(index.awaits(&owner("a")) && !index.awaits(&owner("b")));
        index.put(&owner("a"), "x".into(), 4, ());
        assert!(index.awaits(&owner("a")), "an older version is not it");
        index.put(&owner("a"), "x".into(), 5, ());
        assert!(!index.awaits(&owner("a")));
        index.wrote(&owner("a"), "x", 5);
        assert!(!index.awaits(&owner("a")), "it is there already");
        index.wrote(&owner("a"), "x", 6);
        index.remove(&owner("a"), "x");
        assert!(!index.awaits(&owner("a")), "what is gone comes no more");
    }
}
