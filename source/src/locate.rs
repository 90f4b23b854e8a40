//! What a URI means.

use std::path::PathBuf;

use crate::SourceError;

/// A parsed URI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Location {
    /// A file or folder on this machine.
    Path(PathBuf),
    /// A file, or with a trailing slash a folder, on a server.
    Http(String),
    /// A repository of the hub, and a file in it.
    Hub { repo: String, revision: String, file: Option<String> },
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
            return hub(rest).ok_or_else(|| fail("expected hf://org/repo, hf://org/repo@revision or hf://org/repo@revision/file"));
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
            Self::Hub { repo, file, .. } => last(file.as_deref().unwrap_or(repo)),
        }
    }
}

fn hub(rest: &str) -> Option<Location> {
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
    valid.then(|| Location::Hub { repo: format!("{org}/{repo}"), revision: revision.to_owned(), file })
}

#[cfg(test)]
mod tests {
    use super::Location;

    fn hub(repo: &str, revision: &str, file: Option<&str>) -> Location {
        Location::Hub { repo: repo.into(), revision: revision.into(), file: file.map(Into::into) }
    }

    #[test]
    fn uris() {
        let cases = [
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
        for uri in
            ["", "file:", "s3://b/k", "pvc://c/k", "hf://o", "hf:///r", "hf://o/..", "hf://o/r@main/../x", "hf://o/r@/x", "hf://o/r@a b/x"]
        {
            assert!(Location::parse(uri).is_err(), "{uri}");
        }
    }
}
