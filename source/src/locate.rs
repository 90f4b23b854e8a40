//! What a URI means.

use std::path::PathBuf;

use crate::{SourceError, bucket::Provider};

/// A parsed URI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Location {
    /// A file or folder on this machine.
    Path(PathBuf),
    /// A file, or with a trailing slash a folder, on a server.
    Http(String),
    /// A file or a folder where files are listed.
    Stored(Stored),
}

/// A place in a store that lists its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stored {
    /// A repository of the hub, and a file in it.
    Hub { repo: String, revision: String, file: Option<String> },
    /// A file, or with a trailing slash a folder, in a bucket of an object store.
    Bucket { provider: Provider, bucket: String, key: String },
    /// An artifact of a registry, at a tag or a digest, and a file in it.
    Artifact { registry: String, repository: String, reference: String, file: Option<String> },
}

impl Location {
    pub(crate) fn parse(uri: &str) -> Result<Self, SourceError> {
        let fail = |problem: &str| SourceError::Uri { uri: uri.to_owned(), problem: problem.to_owned() };
        if uri.is_empty() {
            return Err(fail("it is empty"));
        }
        if let Some(path) = uri.strip_prefix("file:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return if path.is_empty() { Err(fail("the path is empty")) } else { Ok(Self::Path(path.into())) };
        }
        if uri.starts_with("http://") || uri.starts_with("https://") {
            return Ok(Self::Http(uri.to_owned()));
        }
        if let Some(rest) = uri.strip_prefix("hf://") {
            return hub(rest)
                .map(Self::Stored)
                .ok_or_else(|| fail("expected hf://org/repo, hf://org/repo@revision or hf://org/repo@revision/file"));
        }
        for provider in [Provider::Amazon, Provider::Google] {
            if let Some(rest) = uri.strip_prefix(provider.scheme()).and_then(|rest| rest.strip_prefix("://")) {
                return bucket(provider, rest)
                    .map(Self::Stored)
                    .ok_or_else(|| fail("expected a bucket and a key without empty parts, . and .."));
            }
        }
        if let Some(rest) = uri.strip_prefix("oci://") {
            return artifact(rest)
                .map(Self::Stored)
                .ok_or_else(|| fail("expected oci://registry/repository:tag or oci://registry/repository@sha256:digest"));
        }
        if uri.starts_with("pvc://") {
            return Err(fail("a claim is a volume of a cluster, and is read there alone"));
        }
        match uri.split_once("://") {
            Some((scheme, _)) => Err(fail(&format!("scheme {scheme} is not supported"))),
            None => Ok(Self::Path(uri.into())),
        }
    }

    /// The last segment, for messages and file names.
    pub(crate) fn name(&self) -> String {
        let last = |s: &str| {
            let s = s.split(['?', '#']).next().unwrap_or(s);
            s.trim_end_matches('/').rsplit('/').next().unwrap_or(s).to_owned()
        };
        match self {
            Self::Path(path) => path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned()),
            Self::Http(url) => last(url),
            Self::Stored(Stored::Hub { repo, file, .. }) => last(file.as_deref().unwrap_or(repo)),
            Self::Stored(Stored::Bucket { bucket, key, .. }) => last(if key.is_empty() { bucket } else { key }),
            Self::Stored(Stored::Artifact { repository, file, .. }) => last(file.as_deref().unwrap_or(repository)),
        }
    }
}

fn hub(rest: &str) -> Option<Stored> {
    let (org, rest) = rest.split_once('/')?;
    let (repo, tail) = match rest.find(['@', '/']) {
        Some(i) => rest.split_at(i),
        None => (rest, ""),
    };
    let (revision, file) = match tail.strip_prefix('@') {
        Some(tail) => match tail.split_once('/') {
            Some((revision, file)) => (revision, file),
            None => (tail, ""),
        },
        None => ("main", tail.trim_start_matches('/')),
    };
    let plain = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.%".contains(&b)) && s != ".." && s != ".";
    let path = |s: &str| s.split('/').all(|p| !p.is_empty() && p != "." && p != ".." && !p.contains(['?', '#', '\\']));
    let file = file.trim_end_matches('/');
    let valid = plain(org) && plain(repo) && plain(revision) && (file.is_empty() || path(file));
    let file = (!file.is_empty()).then(|| file.to_owned());
    valid.then(|| Stored::Hub { repo: format!("{org}/{repo}"), revision: revision.to_owned(), file })
}

/// Whether the parts of a path lead nowhere else.
fn stays(path: &str) -> bool {
    path.split('/').all(|part| !matches!(part, "" | "." | "..")) && !path.contains(char::is_control)
}

fn bucket(provider: Provider, rest: &str) -> Option<Stored> {
    let (bucket, key) = rest.split_once('/').unwrap_or((rest, ""));
    let plain = bucket.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) && bucket.bytes().any(|b| b != b'.');
    let valid = plain && (key.is_empty() || stays(key.strip_suffix('/').unwrap_or(key)));
    valid.then(|| Stored::Bucket { provider, bucket: bucket.to_owned(), key: key.to_owned() })
}

fn artifact(rest: &str) -> Option<Stored> {
    let (registry, rest) = rest.split_once('/')?;
    let (repository, tail) = rest.split_at(rest.find([':', '@']).unwrap_or(rest.len()));
    let (reference, file) = tail.get(1..).unwrap_or("latest").split_once('/').unwrap_or((tail.get(1..).unwrap_or("latest"), ""));
    let plain = |s: &str| s.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    let digest = reference.strip_prefix("sha256:").is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()));
    let named = if tail.starts_with('@') { digest } else { plain(reference) && !reference.is_empty() };
    let host = registry.rsplit_once(':').map_or(registry, |(host, port)| if port.parse::<u16>().is_ok() { host } else { "" });
    let host = !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.[]:".contains(&b));
    let repository_plain = stays(repository) && repository.split('/').all(plain);
    let file = file.trim_end_matches('/');
    let valid = host && repository_plain && named && (file.is_empty() || stays(file));
    valid.then(|| Stored::Artifact {
        registry: registry.to_owned(),
        repository: repository.to_owned(),
        reference: reference.to_owned(),
        file: (!file.is_empty()).then(|| file.to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use super::{Location, Provider, Stored};

    fn bucket(provider: Provider, bucket: &str, key: &str) -> Location {
        Location::Stored(Stored::Bucket { provider, bucket: bucket.into(), key: key.into() })
    }

    fn artifact(registry: &str, repository: &str, reference: &str, file: Option<&str>) -> Location {
        Location::Stored(Stored::Artifact {
            registry: registry.into(),
            repository: repository.into(),
            reference: reference.into(),
            file: file.map(Into::into),
        })
    }

    fn hub(repo: &str, revision: &str, file: Option<&str>) -> Location {
        Location::Stored(Stored::Hub { repo: repo.into(), revision: revision.into(), file: file.map(Into::into) })
    }

    #[test]
    fn uris() {
        let digest = format!("sha256:{}", "a".repeat(64));
        let pinned = format!("oci://h:5000/r@{digest}/a.gguf");
        let cases = [
            ("s3://b/k/m.gguf", bucket(Provider::Amazon, "b", "k/m.gguf")),
            ("s3://b", bucket(Provider::Amazon, "b", "")),
            ("gs://b.c/k/", bucket(Provider::Google, "b.c", "k/")),
            ("oci://r.io/o/m:v1", artifact("r.io", "o/m", "v1", None)),
            ("oci://r.io/o/m", artifact("r.io", "o/m", "latest", None)),
            ("oci://r.io/m:v1/w/a.gguf", artifact("r.io", "m", "v1", Some("w/a.gguf"))),
            (&pinned, artifact("h:5000", "r", &digest, Some("a.gguf"))),
            ("hf://o/r", hub("o/r", "main", None)),
            ("hf://o/r@v1.0", hub("o/r", "v1.0", None)),
            ("hf://o/r@main/a/b.gguf", hub("o/r", "main", Some("a/b.gguf"))),
            ("hf://o/r/b.gguf", hub("o/r", "main", Some("b.gguf"))),
            ("file:///a/b", Location::Path("/a/b".into())),
            ("file:/a/b", Location::Path("/a/b".into())),
            ("file:b.gguf", Location::Path("b.gguf".into())),
            ("./b", Location::Path("./b".into())),
            ("http://h:1/x", Location::Http("http://h:1/x".into())),
        ];
        for (uri, expected) in cases {
            assert_eq!(Location::parse(uri).unwrap(), expected, "{uri}");
        }
        for uri in [
            "",
            "file:",
            "pvc://c/k",
            "s3://",
            "s3:///k",
            "s3://b//k",
            "s3://b/../k",
            "gs://b/.",
            "oci://r",
            "oci://r/m@v1",
            "oci://r/m:",
            "oci://r:x/m",
            "oci://r/../m",
            "ftp://h/x",
            "hf://o",
            "hf:///r",
            "hf://o/..",
            "hf://o/r@main/../x",
            "hf://o/r@/x",
            "hf://o/r@a b/x",
        ] {
            assert!(Location::parse(uri).is_err(), "{uri}");
        }
    }
}
