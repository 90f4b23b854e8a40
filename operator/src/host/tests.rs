//! Which paths of nodes are in which folders, and what a namespace says.

use serde_json::{Value, json};

use super::*;
use crate::mock::{self, Objects};

/// A folder of models, one in it, and one of caches.
pub(crate) fn folders() -> Folders {
    Folders::new(&["/srv/models".to_owned(), "/srv//models/./team/".to_owned()], Some("/srv/cache")).expect("folders")
}

pub(crate) fn privileged() -> Enforced {
    Enforced::Level(Some("privileged".to_owned()))
}

pub(crate) fn access(folders: Folders, enforced: Enforced) -> Access {
    Access { namespace: "models".to_owned(), folders, enforced }
}

#[test]
fn a_path_is_in_a_folder_by_whole_components() {
    let access = access(folders(), privileged());
    let place = |uri: &str| access.place(uri).map(|place| place.map(|place| (place.volume, place.path)));
    let folder = |folder: &str, path: &str| Some((Volume::Folder(folder.to_owned()), path.to_owned()));
    for (uri, expected) in [
        ("file:/srv/models/a.gguf", folder("/srv/models", "a.gguf")),
        ("file:///srv/models/a/b/", folder("/srv/models", "a/b")),
        ("file:/srv/./models//..a/b c", folder("/srv/models", "..a/b c")),
        // The smallest of several: as little as possible is shown to a pod.
        ("file:/srv/models/team/a", folder("/srv/models/team", "a")),
        ("file:/srv/models/teams/a", folder("/srv/models", "teams/a")),
        // A folder may be a model.
        ("file:/srv/models", folder("/srv/models", "")),
        ("pvc://claim/a/b", Some((Volume::Claim("claim".to_owned()), "a/b".to_owned()))),
        ("hf://org/name", None),
    ] {
        assert_eq!(place(uri), Ok(expected), "{uri}");
    }
    for uri in
        ["file:/srv/models-private/a", "file:/srv", "file:/", "file:/etc/passwd", "file:/srv/cache/other/parts/0", "file:/Srv/models/a"]
    {
        let refused = place(uri).expect_err(uri);
        assert_eq!((refused.reason, refused.until), ("HostPathForbidden", Until::Changed), "{uri}");
        assert!(refused.message.contains("was told of /srv/models, /srv/models/team alone"), "{}", refused.message);
    }
    for uri in [
        "file:srv/models/a",
        "file://srv/models/a",
        "file:",
        "file:/srv/models/../../etc/passwd",
        "file:/srv/models/..",
        "file:/srv/models/a\n",
    ] {
        let refused = place(uri).expect_err(uri);
        assert_eq!((refused.reason, refused.until), ("InvalidSpec", Until::Changed), "{uri}");
        assert!(refused.message.contains("absolute path without .."), "{}", refused.message);
    }
}

#[test]
fn folders_of_the_operator_are_absolute_and_apart() {
    let new = |models: &[&str], cache: Option<&str>| {
        Folders::new(&models.iter().map(|&m| m.to_owned()).collect::<Vec<_>>(), cache).map_err(|error| error.to_string())
    };
    assert_eq!(new(&[], None), Ok(Folders::default()));
    assert!(new(&["/srv/models", "/srv/cached"], Some("/srv/cache")).is_ok(), "names that begin alike are not within each other");
    for folder in ["", "models", "./models", "/", "//", "/.", "/srv/../etc", "/srv/\0"] {
        let refused = new(&[folder], None).expect_err(folder);
        assert!(refused.contains("--host-path") && refused.contains("absolute path below /"), "{refused}");
        assert!(new(&[], Some(folder)).expect_err(folder).contains("--node-cache"));
    }
    for (models, cache) in [("/srv", "/srv/cache"), ("/srv/cache/models", "/srv/cache"), ("/srv/cache", "/srv/cache/")] {
        let refused = new(&["/other", models], Some(cache)).expect_err(models);
        assert!(refused.contains("neither is in the other"), "{refused}");
    }
}

async fn look(namespace: Value, folders: &Folders, spec: Value) -> Enforced {
    let objects = Objects::default();
    objects.lock().expect("nobody panics with it").insert("/api/v1/namespaces/models".to_owned(), namespace);
    Access::of(&mock::client(&objects), folders, "models", &spec).await.expect("an API server").enforced
}

#[tokio::test]
async fn a_namespace_is_looked_at_where_it_matters() {
    let labelled = |labels: Value| json!({ "metadata": { "name": "models", "labels": labels } });
    let on_node = json!({ "model": { "uri": "file:/srv/models/a" } });
    let level = |name: &str| Enforced::Level(Some(name.to_owned()));
    for (labels, expected) in [
        (json!({ ENFORCE: "privileged" }), privileged()),
        (json!({ ENFORCE: "restricted" }), level("restricted")),
        // What is only warned of or written down says nothing of what is let in.
        (json!({ "pod-security.kubernetes.io/warn": "privileged" }), Enforced::Level(None)),
        (Value::Null, Enforced::Level(None)),
    ] {
        assert_eq!(look(labelled(labels.clone()), &folders(), on_node.clone()).await, expected, "{labels}");
    }
    let cached = json!({ "model": { "uri": "hf://a/b" }, "cache": { "policy": "NodeLocal" } });
    assert_eq!(look(labelled(json!({ ENFORCE: "privileged" })), &folders(), cached.clone()).await, privileged());
    // Control: the namespace would be said to have a label.
    let seen = labelled(json!({ ENFORCE: "privileged" }));
    for (spec, folders) in [
        (json!({ "model": { "uri": "hf://a/b" } }), folders()),
        (json!({ "model": { "uri": "pvc://a/srv/models" } }), folders()),
        (json!({ "model": { "uri": "file:/etc/passwd" } }), folders()),
        (json!({ "model": { "uri": "file:/srv/models/../a" } }), folders()),
        (on_node, Folders::default()),
        (cached, Folders::default()),
    ] {
        assert_eq!(look(seen.clone(), &folders, spec.clone()).await, Enforced::Unknown, "{spec}");
    }
}

#[tokio::test]
async fn an_operator_that_may_not_look_says_so() {
    let objects = Objects::default();
    objects.lock().expect("nobody panics with it").insert(mock::HIDDEN.to_owned(), json!("/namespaces/models"));
    let spec = json!({ "model": { "uri": "file:/srv/models/a" } });
    let access = Access::of(&mock::client(&objects), &folders(), "models", &spec).await.expect("an API server");
    assert_eq!(access.enforced, Enforced::Hidden);
    let refused = access.place("file:/srv/models/a").expect_err("nothing allows it");
    assert_eq!((refused.reason, refused.until), ("HostPathForbidden", Until::Elsewhere));
    assert!(refused.message.contains("let its service account get namespaces"), "{}", refused.message);
}
