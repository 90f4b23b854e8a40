//! Sources that list their files besides hubs: buckets of object stores, artifacts of registries.

use jiff::{Timestamp, civil::DateTime, tz::TimeZone};
use rusty_s3::{Method, signing};
use url::Url;

use super::*;
use crate::{Credentials, StoreOptions};

const SECOND_PAGE: &str = "/b/?continuation-token=2&delimiter=%2F&encoding-type=url&list-type=2&prefix=";

fn keys(secret: &str) -> AccessKeys {
    AccessKeys {
        id: "someone".into(),
        secret: secret.into(),
        session: Some("a session".into()),
        region: Some("here".into()),
        endpoint: None,
    }
}

/// What `url` asks for, without its signature; `None` where that is not the one that `keys` make for `region`.
pub(super) fn unsigned(url: &str, keys: &AccessKeys, region: &str) -> Option<String> {
    let url: Url = url.parse().ok()?;
    let (added, own): (Vec<_>, Vec<_>) = url.query_pairs().into_owned().partition(|(name, _)| name.starts_with("X-Amz-"));
    let given = |wanted: &str| added.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.clone());
    let date = DateTime::strptime("%Y%m%dT%H%M%SZ", given("X-Amz-Date")?).ok()?.to_zoned(TimeZone::UTC).ok()?.timestamp();
    let (lasts, mut plain) = (given("X-Amz-Expires")?.parse().ok()?, url.clone());
    plain.set_query(None);
    let (query, none) = (own.iter().map(|(n, v)| (n.as_str(), v.as_str())), std::iter::empty::<(&str, &str)>());
    let session = keys.session.as_deref();
    let expected = signing::sign(&date, Method::Get, plain.clone(), &keys.id, &keys.secret, session, region, lasts, query, none);
    let fresh = Timestamp::now().duration_since(date).as_secs() < 60;
    let same = expected.query_pairs().find(|(name, _)| name == "X-Amz-Signature").map(|(_, value)| value.into_owned());
    if !fresh || same != given("X-Amz-Signature") {
        return None;
    }
    if !own.is_empty() {
        plain.query_pairs_mut().extend_pairs(&own);
    }
    Some(format!("{}{}", plain.path(), plain.query().map(|query| format!("?{query}")).unwrap_or_default()))
}

/// The page of a listing with these keys.
fn page(namespace: &str, keys: &[&str], next: Option<&str>) -> Vec<u8> {
    let contents: String = keys.iter().map(|key| format!("<Contents><Key>{key}</Key><Size>1</Size></Contents>")).collect();
    let more = next.map(|next| format!("<NextContinuationToken>{next}</NextContinuationToken>")).unwrap_or_default();
    let truncated = next.is_some();
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?><ListBucketResult xmlns=\"{namespace}\"><Name>b</Name><IsTruncated>{truncated}</IsTruncated>\
         <EncodingType>url</EncodingType>{contents}{more}<CommonPrefixes><Prefix>models%2Fother%2F</Prefix></CommonPrefixes></ListBucketResult>"
    )
    .into_bytes()
}

/// A bucket with a folder of safetensors, whose listing has two pages, and a file of GGUF beside it.
fn bucket(namespace: &str) -> Vec<(String, Vec<u8>)> {
    let first = "/b/?delimiter=%2F&encoding-type=url&list-type=2&prefix=";
    let file = |name: &str| fs::read(fixture("bert").join(name)).unwrap();
    let mut files = vec![
        (format!("{first}models%2Fa+b%2F"), page(namespace, &["models%2Fa%20b%2F", "models%2Fa%20b%2Fconfig.json"], Some("2"))),
        (format!("{SECOND_PAGE}models%2Fa+b%2F"), page(namespace, &["models%2Fa%20b%2Fmodel.safetensors"], None)),
        (format!("{first}models%2F"), page(namespace, &["models%2Fm.gguf"], None)),
        ("/b/models/m.gguf".to_owned(), gguf()),
    ];
    for name in ["config.json", "model.safetensors"] {
        files.push((format!("/b/models/a%20b/{name}"), file(name)));
    }
    files
}

fn start(files: &[(String, Vec<u8>)], behaviour: Behaviour) -> Server {
    Server::start(files.iter().map(|(path, bytes)| (path.as_str(), bytes.clone())).collect(), behaviour)
}

const AMAZON: &str = "http://s3.amazonaws.com/doc/2006-03-01/";
const GOOGLE: &str = "http://doc.s3.amazonaws.com/2006-03-01";

#[test]
fn buckets_are_read_by_signed_requests() {
    let signed = Some((keys("hidden"), "here"));
    let server = start(&bucket(AMAZON), Behaviour { ranges: true, signed, ..Behaviour::default() });
    let with = |keys: AccessKeys| SourceOptions {
        backoff: Duration::ZERO,
        s3: StoreOptions { endpoint: Some(server.url.clone()), region: None, keys: Some(keys) },
        ..SourceOptions::default()
    };
    let local = Source::open(&fixture("bert").join("model.safetensors").display().to_string(), SourceOptions::default()).unwrap();
    for uri in ["s3://b/models/a b", "s3://b/models/a b/", "s3://b/models/a b/model.safetensors"] {
        let source = Source::open(uri, with(keys("hidden"))).unwrap();
        assert!(whole(&source) == whole(&local), "{uri}");
        assert_eq!(source.header().unwrap().tensors.len(), local.header().unwrap().tensors.len());
    }
    assert_eq!(whole(&Source::open("s3://b/models/m.gguf", with(keys("hidden"))).unwrap()), gguf());
    // Keys of the source itself, with an endpoint of their own, go first.
    let own = AccessKeys { endpoint: Some(server.url.clone()), ..keys("hidden") };
    let options = SourceOptions { credentials: Some(own.into()), ..with(keys("wrong")) };
    assert_eq!(whole(&Source::open("s3://b/models/m.gguf", options).unwrap()), gguf());

    let elsewhere = AccessKeys { region: Some("elsewhere".into()), ..keys("hidden") };
    for wrong in [keys("wrong"), elsewhere, AccessKeys { session: None, ..keys("hidden") }] {
        let error = Source::open("s3://b/models/m.gguf", with(wrong)).unwrap_err();
        assert!(matches!(&error, SourceError::Unauthorized { status: 403, .. }), "{error}");
        let said = error.to_string();
        assert!(said.contains("/b/?") && !said.contains("X-Amz") && !said.contains("someone"), "{said}");
    }
    let absent = Source::open("s3://b/models/absent", with(keys("hidden"))).unwrap_err();
    assert!(matches!(absent, SourceError::NotFound { .. }), "{absent}");
}

#[test]
fn a_file_of_a_bucket_is_kept_and_found_again_by_its_digest() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(&bucket(AMAZON), Behaviour { ranges: true, ..Behaviour::default() });
    let s3 = StoreOptions { endpoint: Some(server.url.clone()), ..StoreOptions::default() };
    let pinned = SourceOptions { s3, digest: Some(digest(&gguf())), ..options(dir.path()) };
    assert_eq!(whole(&Source::open("s3://b/models/m.gguf", pinned.clone()).unwrap()), gguf());
    let before = server.requests();
    assert_eq!(whole(&Source::open("s3://b/models/m.gguf", pinned.clone()).unwrap()), gguf());
    assert_eq!(server.requests(), before);
    let other = SourceOptions { digest: Some(digest(b"other")), ..pinned };
    assert!(matches!(Source::open("s3://b/models/m.gguf", other), Err(SourceError::DigestMismatch { .. })));
}

#[test]
fn buckets_of_google_are_read_with_a_token() {
    let authorization = Some("Bearer of an hour".to_owned());
    let server = start(&bucket(GOOGLE), Behaviour { ranges: true, authorization, ..Behaviour::default() });
    let endpoint = AccessKeys { endpoint: Some(server.url.clone()), ..keys("hidden") };
    // What is in the environment is for the other store.
    let s3 = StoreOptions { endpoint: None, region: None, keys: Some(endpoint.clone()) };
    let bucket =
        crate::bucket::Bucket::new(crate::bucket::Provider::Google, "b", &SourceOptions { s3, ..SourceOptions::default() }).unwrap();
    assert!(crate::listing::Store::place(&bucket, "k").starts_with("https://storage.googleapis.com/b/k/"));
    let s3 = StoreOptions { endpoint: Some(server.url.clone()), ..StoreOptions::default() };
    let shown =
        |token: &str| SourceOptions { s3: s3.clone(), credentials: Some(Credentials::bearer(token).unwrap()), ..SourceOptions::default() };
    // The listing is Google's, asked for at an endpoint that a test can have.
    assert_eq!(whole(&Source::open("s3://b/models/m.gguf", shown("of an hour")).unwrap()), gguf());
    assert!(matches!(Source::open("s3://b/models/m.gguf", shown("wrong")), Err(SourceError::Unauthorized { .. })));
    let signed = start(&self::bucket(GOOGLE), Behaviour { ranges: true, signed: Some((keys("hidden"), "here")), ..Behaviour::default() });
    let own = AccessKeys { endpoint: Some(signed.url.clone()), ..keys("hidden") };
    let options = SourceOptions { credentials: Some(own.into()), ..SourceOptions::default() };
    assert_eq!(whole(&Source::open("gs://b/models/m.gguf", options).unwrap()), gguf());
}

#[test]
fn endpoints_and_names() {
    use crate::{
        bucket::{Bucket, Provider},
        listing::Store,
    };
    let place = |provider, name: &str, region: Option<&str>| {
        let s3 = StoreOptions { region: region.map(str::to_owned), ..StoreOptions::default() };
        Bucket::new(provider, name, &SourceOptions { s3, ..SourceOptions::default() }).unwrap().place("")
    };
    assert_eq!(place(Provider::Amazon, "b", None), "https://b.s3.us-east-1.amazonaws.com/");
    assert_eq!(place(Provider::Amazon, "b.c", Some("eu-west-1")), "https://s3.eu-west-1.amazonaws.com/b.c/");
    assert_eq!(place(Provider::Google, "b.c", Some("eu-west-1")), "https://storage.googleapis.com/b.c/");
    let s3 = StoreOptions { endpoint: Some("store:9000".into()), ..StoreOptions::default() };
    let error = Bucket::new(Provider::Amazon, "b", &SourceOptions { s3, ..SourceOptions::default() }).unwrap_err();
    assert!(error.to_string().contains("store:9000"), "{error}");
    // Keys are for stores alone.
    let shown = SourceOptions { credentials: Some(keys("hidden").into()), ..SourceOptions::default() };
    for uri in ["hf://o/r", "http://127.0.0.1:1/m.gguf", "oci://127.0.0.1:1/m:v1"] {
        let error = Source::open(uri, shown.clone()).unwrap_err();
        assert!(error.to_string().contains("access keys are for s3:// and gs://"), "{uri}: {error}");
    }
}

/// A registry with an artifact of safetensors at `v1`, one of a GGUF file without a name at `gguf`, an index of the latter at `index`.
fn registry() -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    let mut layer = |kind: &str, title: Option<&str>, bytes: Vec<u8>| {
        let digest = digest(&bytes);
        files.push((format!("/v2/o/m/blobs/{digest}"), bytes));
        let annotations = title.map(|title| serde_json::json!({ "org.opencontainers.image.title": title })).unwrap_or_default();
        serde_json::json!({ "mediaType": kind, "digest": digest, "size": 1, "annotations": if annotations.is_null() { serde_json::json!({}) } else { annotations } })
    };
    let manifest = |layers: Vec<serde_json::Value>| {
        serde_json::json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "layers": layers })
            .to_string()
            .into_bytes()
    };
    let file = |name: &str| fs::read(fixture("bert").join(name)).unwrap();
    let plain = "application/octet-stream";
    let v1 = manifest(vec![
        layer(plain, Some("config.json"), file("config.json")),
        layer(plain, Some("model.safetensors"), file("model.safetensors")),
        layer(plain, Some("more/m.gguf"), gguf()),
        layer("application/vnd.oci.image.layer.v1.tar+gzip", Some("docs"), b"an archive".to_vec()),
    ]);
    let one = manifest(vec![
        layer("application/vnd.docker.ai.gguf.v3", None, gguf()),
        layer("application/vnd.docker.ai.license", None, b"free".to_vec()),
    ]);
    let archive = manifest(vec![layer("application/vnd.oci.image.layer.v1.tar+gzip", Some("model"), b"an archive".to_vec())]);
    let of = |digests: &[&str]| {
        let all: Vec<_> = digests.iter().map(|digest| serde_json::json!({ "digest": digest })).collect();
        serde_json::json!({ "schemaVersion": 2, "manifests": all }).to_string().into_bytes()
    };
    let known = digest(&one);
    files.push(("/v2/o/m/manifests/index".to_owned(), of(&[&known])));
    files.push(("/v2/o/m/manifests/many".to_owned(), of(&[&known, &known])));
    files.push((format!("/v2/o/m/manifests/{known}"), one.clone()));
    files.push((format!("/v2/o/m/manifests/{}", digest(b"other")), one.clone()));
    for (tag, manifest) in [("v1", v1), ("gguf", one), ("archive", archive)] {
        files.push((format!("/v2/o/m/manifests/{tag}"), manifest));
    }
    files
}

fn oci(server: &Server, rest: &str) -> String {
    server.url.replace("http://", "oci://") + "/o/m" + rest
}

#[test]
fn artifacts_of_registries() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(&registry(), Behaviour { ranges: true, ..Behaviour::default() });
    let local = Source::open(&fixture("bert").display().to_string(), SourceOptions::default()).unwrap();
    let open = |rest: &str| Source::open(&oci(&server, rest), SourceOptions { keep: Keep::Parts, ..options(dir.path()) });
    assert!(whole(&open(":v1").unwrap()) == whole(&local));
    assert!(open(":v1").unwrap().header().unwrap() == local.header().unwrap());
    let known = registry().iter().find_map(|(path, _)| Some(path.strip_prefix("/v2/o/m/manifests/sha256:")?.to_owned())).unwrap();
    for rest in [":v1/more/m.gguf", ":v1/more", ":gguf", ":index", &format!("@sha256:{known}")] {
        assert_eq!(whole(&open(rest).unwrap()), gguf(), "{rest}");
    }
    for (rest, said) in [
        (":many", "name one of them by its digest"),
        (":archive", "none of its 1 layers is a file with a name: application/vnd.oci.image.layer.v1.tar+gzip"),
        (":v2", "/v2/o/m/manifests/v2 does not exist"),
        (&format!("@{}", digest(b"other")), "expected sha256:"),
    ] {
        let error = open(rest).unwrap_err().to_string();
        assert!(error.contains(said), "{rest}: {error}");
    }
    // What is pinned is asked of nobody again.
    let pinned = SourceOptions { digest: Some(digest(&gguf())), ..options(dir.path()) };
    assert_eq!(whole(&Source::open(&oci(&server, ":gguf"), pinned.clone()).unwrap()), gguf());
    let before = server.requests();
    assert_eq!(whole(&Source::open(&oci(&server, ":gguf"), pinned).unwrap()), gguf());
    assert_eq!(server.requests(), before);
}

#[test]
fn a_registry_is_shown_the_token_that_it_asks_for() {
    let ask = "Bearer realm=\"SERVER/token\",service=\"it\",scope=\"repository:o/m:pull\"";
    let mut files = registry();
    files.push(("/token?service=it&scope=repository%3Ao%2Fm%3Apull".to_owned(), br#"{"token": "of a minute", "expires_in": 60}"#.to_vec()));
    let behaviour = Behaviour {
        ranges: true,
        authorization: Some("Bearer of a minute".into()),
        challenge: Some((ask, "/token")),
        ..Behaviour::default()
    };
    let server = start(&files, behaviour.clone());
    assert_eq!(whole(&Source::open(&oci(&server, ":gguf"), SourceOptions::default()).unwrap()), gguf());
    // A token that is not the one: asked for once more, and then no more.
    let other = start(&files, Behaviour { authorization: Some("Bearer of another".into()), ..behaviour.clone() });
    let error = Source::open(&oci(&other, ":gguf"), SourceOptions::default()).unwrap_err();
    assert!(matches!(error, SourceError::Unauthorized { status: 401, .. }), "{error}");
    assert_eq!(other.requests(), 3);
    // One that asks for a password is not answered.
    let basic = start(&files, Behaviour { challenge: Some(("Basic realm=\"it\"", "/token")), ..behaviour });
    assert!(matches!(Source::open(&oci(&basic, ":gguf"), SourceOptions::default()), Err(SourceError::Unauthorized { .. })));
    let shown = |value: &str| SourceOptions { credentials: Some(Credentials::authorization(value).unwrap()), ..SourceOptions::default() };
    assert_eq!(whole(&Source::open(&oci(&basic, ":gguf"), shown("Bearer of a minute")).unwrap()), gguf());
}
