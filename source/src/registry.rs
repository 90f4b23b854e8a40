//! Artifacts of a registry (OCI distribution): their files by the manifest, and where each is downloaded.
//!
//! A file is a layer with a name: the title that ORAS gives, or the path of a model specification. A layer of GGUF that has none, as other
//! runners push it, is called `model.gguf`. Layers that are archives are not read.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Mutex, OnceLock, PoisonError},
};

use serde::Deserialize;
use ureq::{
    Body,
    http::{HeaderName, Response, header},
};

use crate::{
    Credentials, SourceError,
    admission::Admission,
    digest::Digest,
    http::{Client, Failure},
    listing::{Listed, Store, below},
};

/// Kinds of manifest that are understood, then anything, for layers.
const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json, \
                      application/vnd.oci.image.index.v1+json, */*";
/// Annotations by which a layer is a file.
const NAMES: [&str; 2] = ["org.opencontainers.image.title", "org.cncf.model.filepath"];
/// Layers that are a model in one file.
const GGUF: [&str; 2] = ["application/vnd.docker.ai.gguf.v3", "application/vnd.ollama.image.model"];
/// The file that such a layer is.
const GGUF_NAME: &str = "model.gguf";

/// What a registry is shown.
pub(crate) struct Login {
    /// Base of the registry, without a slash at its end.
    base: String,
    shown: Option<Credentials>,
    /// The token that the registry asked for.
    token: Mutex<Option<String>>,
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Login({})", self.base)
    }
}

impl Login {
    pub(crate) fn headers(&self) -> Vec<(HeaderName, String)> {
        let token = self.token.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let shown = token.or_else(|| self.shown.as_ref().and_then(Credentials::header).map(str::to_owned));
        [(header::ACCEPT, ACCEPT.to_owned())].into_iter().chain(shown.map(|value| (header::AUTHORIZATION, value))).collect()
    }

    /// Fetches the token that `response` asks for. Whether it asks for one.
    pub(crate) fn answer(&self, client: &Client, response: &Response<Body>) -> Result<bool, Failure> {
        #[derive(Deserialize)]
        struct Answer {
            #[serde(alias = "access_token")]
            token: String,
        }
        let asked = response.headers().get(header::WWW_AUTHENTICATE).and_then(|value| value.to_str().ok());
        let Some(parameters) = asked.and_then(challenge) else { return Ok(false) };
        let Some(realm) = parameters.get("realm") else { return Ok(false) };
        let wrong = |expected: &str, got: String| {
            Failure::Final(SourceError::Protocol { place: self.base.clone(), expected: expected.to_owned(), got })
        };
        let mut url: url::Url = realm.parse().map_err(|_| wrong("a service that hands out tokens", realm.clone()))?;
        // A password goes there.
        if url.scheme() != "https" && !self.base.starts_with("http://") {
            return Err(wrong("a service at https:// that hands out tokens", realm.clone()));
        }
        for name in ["service", "scope"] {
            if let Some(value) = parameters.get(name) {
                url.query_pairs_mut().append_pair(name, value);
            }
        }
        // A bearer token is for the registry itself.
        let basic = self.shown.as_ref().filter(|shown| shown.header().is_some_and(|value| value.starts_with("Basic ")));
        let bytes = client.token(url.as_str(), &Admission::header(basic).map_err(Failure::Final)?)?;
        let answer: Answer = serde_json::from_slice(&bytes).map_err(|error| wrong("a token", error.to_string()))?;
        *self.token.lock().unwrap_or_else(PoisonError::into_inner) = Some(format!("Bearer {}", answer.token));
        Ok(true)
    }
}

/// The parameters of a challenge `Bearer name="value",…`.
fn challenge(text: &str) -> Option<BTreeMap<String, String>> {
    let scheme = text.get(..7)?;
    let mut rest = if scheme.eq_ignore_ascii_case("bearer ") { text.get(7..)? } else { return None };
    let mut parameters = BTreeMap::new();
    while let Some((name, after)) = rest.split_once('=') {
        let (value, after) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"')?,
            None => after.split_at(after.find(',').unwrap_or(after.len())),
        };
        parameters.insert(name.trim_matches([' ', ',']).to_ascii_lowercase(), value.to_owned());
        rest = after;
    }
    Some(parameters)
}

#[derive(Deserialize)]
struct Manifest {
    #[serde(default)]
    layers: Vec<Layer>,
    /// Those of an index.
    #[serde(default)]
    manifests: Vec<Layer>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Layer {
    #[serde(default)]
    media_type: String,
    digest: String,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

impl Layer {
    /// The path of the file that it is.
    fn path(&self) -> Option<&str> {
        if ["tar", "gzip", "zstd"].iter().any(|archive| self.media_type.contains(archive)) {
            return None;
        }
        let named = NAMES.iter().find_map(|name| self.annotations.get(*name));
        named.map(String::as_str).or_else(|| GGUF.contains(&self.media_type.as_str()).then_some(GGUF_NAME))
    }
}

/// An artifact: a repository of a registry at a tag or a digest.
#[derive(Debug)]
pub(crate) struct Artifact {
    uri: String,
    /// Base of the repository, without a slash at its end.
    base: String,
    reference: String,
    admission: Admission,
    /// Paths and files, once read.
    files: OnceLock<Vec<(String, Listed)>>,
}

impl Artifact {
    /// # Errors
    /// When credentials are given that no registry takes.
    pub(crate) fn new(registry: &str, repository: &str, reference: &str, shown: Option<&Credentials>) -> Result<Self, SourceError> {
        Admission::header(shown)?;
        let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
        let scheme = if matches!(host, "localhost" | "127.0.0.1" | "[::1]") { "http" } else { "https" };
        let base = format!("{scheme}://{registry}");
        let login = Login { base: base.clone(), shown: shown.cloned(), token: Mutex::default() };
        let separator = if reference.starts_with("sha256:") { '@' } else { ':' };
        Ok(Self {
            uri: format!("oci://{registry}/{repository}{separator}{reference}"),
            base: format!("{base}/v2/{repository}"),
            reference: reference.to_owned(),
            admission: Admission::Registry(login.into()),
            files: OnceLock::new(),
        })
    }

    /// The manifest called `reference`, which has that digest if it is one.
    fn manifest(&self, client: &Client, reference: &str) -> Result<Manifest, SourceError> {
        let url = format!("{}/manifests/{reference}", self.base);
        let (bytes, _) = client.small(&url, &self.admission)?;
        if reference.starts_with("sha256:") {
            let (expected, got): (Digest, _) = (reference.parse()?, Digest::of_bytes(&bytes));
            if expected != got {
                let (expected, got) = (expected.hex().to_owned(), got.hex().to_owned());
                return Err(SourceError::DigestMismatch { place: url, expected, got });
            }
        }
        serde_json::from_slice(&bytes).map_err(|error| SourceError::Protocol {
            place: url,
            expected: "a manifest".to_owned(),
            got: error.to_string(),
        })
    }

    fn read(&self, client: &Client) -> Result<Vec<(String, Listed)>, SourceError> {
        let unusable = |problem: String| Err(SourceError::NoModel { folder: self.uri.clone(), problem });
        let mut manifest = self.manifest(client, &self.reference)?;
        if let [only] = manifest.manifests.as_slice() {
            manifest = self.manifest(client, &only.digest.clone())?;
        }
        if !manifest.manifests.is_empty() {
            let digests: Vec<&str> = manifest.manifests.iter().map(|m| m.digest.as_str()).take(4).collect();
            return unusable(format!("it is an index of several artifacts; name one of them by its digest: {}", digests.join(", ")));
        }
        let mut files = Vec::new();
        for layer in &manifest.layers {
            let Some(path) = layer.path() else { continue };
            let digest: Digest = layer.digest.parse()?;
            let name = path.rsplit('/').next().unwrap_or(path).to_owned();
            files.push((path.to_owned(), Listed { name, url: self.blob(&digest), digest: Some(digest) }));
        }
        if files.is_empty() {
            let kinds: Vec<&str> = manifest.layers.iter().map(|l| l.media_type.as_str()).take(4).collect();
            return unusable(format!("none of its {} layers is a file with a name: {}", manifest.layers.len(), kinds.join(", ")));
        }
        Ok(files)
    }

    fn blob(&self, digest: &Digest) -> String {
        format!("{}/blobs/sha256:{}", self.base, digest.hex())
    }
}

impl Store for Artifact {
    fn list(&self, client: &Client, folder: &str) -> Result<Vec<Listed>, SourceError> {
        let files = match self.files.get() {
            Some(files) => files,
            None => {
                let files = self.read(client)?;
                self.files.get_or_init(|| files)
            }
        };
        let within = |path: &str| path.rsplit_once('/').map_or("", |(folder, _)| folder) == folder;
        Ok(files.iter().filter(|(path, _)| within(path)).map(|(_, file)| file.clone()).collect())
    }

    fn url(&self, _: &str, digest: &Digest) -> String {
        self.blob(digest)
    }

    fn place(&self, folder: &str) -> String {
        format!("{}/{}", self.uri, below(folder))
    }

    fn admission(&self) -> &Admission {
        &self.admission
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges() {
        let read = |text: &str| challenge(text).map(|p| p.into_iter().collect::<Vec<_>>());
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let text = r#"Bearer realm="https://auth.example/token",service="registry.example", scope="repository:a/b:pull,push""#;
        let expected = vec![
            pair("realm", "https://auth.example/token"),
            pair("scope", "repository:a/b:pull,push"),
            pair("service", "registry.example"),
        ];
        assert_eq!(read(text), Some(expected));
        assert_eq!(read("bearer Realm=x,y=z"), Some(vec![pair("realm", "x"), pair("y", "z")]));
        assert_eq!(read(r#"Basic realm="x""#), None);
        assert_eq!(read("Bea"), None);
        assert_eq!(read(r#"Bearer realm="x"#), None);
    }

    #[test]
    fn layers_that_are_files() {
        let layer = |kind: &str, annotation: Option<(&str, &str)>| {
            let annotations = annotation.map(|(k, v)| (k.to_owned(), v.to_owned())).into_iter().collect();
            Layer { media_type: kind.to_owned(), digest: String::new(), annotations }
        };
        let title = Some(("org.opencontainers.image.title", "config.json"));
        assert_eq!(layer("application/octet-stream", title).path(), Some("config.json"));
        let path = Some(("org.cncf.model.filepath", "weights/model.safetensors"));
        assert_eq!(layer("application/vnd.cncf.model.weight.v1.raw", path).path(), Some("weights/model.safetensors"));
        assert_eq!(layer("application/vnd.cncf.model.weight.v1.tar", path).path(), None);
        assert_eq!(layer("application/vnd.oci.image.layer.v1.tar+gzip", title).path(), None);
        assert_eq!(layer("application/vnd.docker.ai.gguf.v3", None).path(), Some("model.gguf"));
        assert_eq!(layer("application/vnd.docker.ai.license", None).path(), None);
    }
}
