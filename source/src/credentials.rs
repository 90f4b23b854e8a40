//! What servers are shown to be let in.

use std::{collections::BTreeMap, fmt, fs, path::Path};

use serde::{Deserialize, Serialize};

use crate::{SourceError, logins};

/// Key of a bearer token.
const TOKEN: &str = "token";
/// Key of the whole value of the header `Authorization`.
const AUTHORIZATION: &str = "authorization";
/// Key of logins of registries.
const LOGINS: &str = ".dockerconfigjson";
/// Keys of what an object store is shown, called as in the environment of other tools.
const ID: &str = "AWS_ACCESS_KEY_ID";
const KEY: &str = "AWS_SECRET_ACCESS_KEY";
const SESSION: &str = "AWS_SESSION_TOKEN";
const REGION: &str = "AWS_REGION";
const ENDPOINT: &str = "AWS_ENDPOINT_URL";

/// What one source is shown, never printed.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Credentials(Kind);

#[derive(Clone, PartialEq, Eq, Hash)]
enum Kind {
    /// The value of a header `Authorization`. It is shown to the host that a URI names and no other.
    Header(String),
    Keys(AccessKeys),
}

/// Keys that sign requests to an object store, and are not sent; never printed.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct AccessKeys {
    /// Whose keys they are.
    pub id: String,
    /// What signs.
    pub secret: String,
    /// Sent with keys that last for a session.
    pub session: Option<String>,
    /// Region of the bucket.
    pub region: Option<String>,
    /// Base URL of the store.
    pub endpoint: Option<String>,
}

impl fmt::Debug for AccessKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AccessKeys").field("region", &self.region).field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

impl Credentials {
    /// From the data of a Secret: `token`, a bearer token, or `authorization`, the whole value of the header; or, for an object store,
    /// `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, and `AWS_SESSION_TOKEN`, `AWS_REGION` and `AWS_ENDPOINT_URL` where they are needed; or,
    /// for an artifact, `.dockerconfigjson`, of which the registry of `uri` is shown its own login.
    ///
    /// # Errors
    /// When it has none of them or two kinds, or a value that cannot be sent, or no login for the registry.
    pub fn from_data(data: &BTreeMap<String, Vec<u8>>, uri: &str) -> Result<Self, SourceError> {
        let fail = |problem: String| Err(SourceError::Credentials { problem });
        if let Some(json) = data.get(LOGINS) {
            if let Some(other) = [TOKEN, AUTHORIZATION, ID, KEY].into_iter().find(|key| data.contains_key(*key)) {
                return fail(format!("it has both {LOGINS} and {other}, expected one of them"));
            }
            return logins::header(json, uri).map_or_else(fail, |value| Self::authorization(&value));
        }
        let value = |key: &str| data.get(key).map(|value| String::from_utf8_lossy(value).into_owned());
        match (value(TOKEN), value(AUTHORIZATION), value(ID), value(KEY)) {
            (Some(token), None, None, None) => Self::of("Bearer ", &token),
            (None, Some(value), None, None) => Self::of("", &value),
            (None, None, Some(id), Some(secret)) => {
                let line = |key: &str| value(key).map(|value| one_line(&value)).transpose();
                let (session, region, endpoint) = (line(SESSION)?, line(REGION)?, line(ENDPOINT)?);
                Ok(Self::from(AccessKeys { id: one_line(&id)?, secret: one_line(&secret)?, session, region, endpoint }))
            }
            (None, None, Some(_), None) => fail(format!("it has {ID} without {KEY}")),
            (None, None, None, Some(_)) => fail(format!("it has {KEY} without {ID}")),
            (None, None, None, None) => {
                let keys = data.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
                let got = if keys.is_empty() { "none" } else { &keys };
                fail(format!("expected a key {TOKEN}, {AUTHORIZATION} or {LOGINS}, or {ID} and {KEY}, got {got}"))
            }
            (token, header, id, _) => {
                let two = [(TOKEN, token), (AUTHORIZATION, header), (ID, id)];
                let two: Vec<&str> = two.iter().filter(|(_, value)| value.is_some()).map(|(key, _)| *key).collect();
                fail(format!("it has both {}, expected one of them", two.join(" and ")))
            }
        }
    }

    /// A bearer token.
    ///
    /// # Errors
    /// When no header can have it.
    pub fn bearer(token: &str) -> Result<Self, SourceError> {
        Self::of("Bearer ", token)
    }

    /// The whole value of the header.
    ///
    /// # Errors
    /// When no header can have it.
    pub fn authorization(value: &str) -> Result<Self, SourceError> {
        Self::of("", value)
    }

    fn of(scheme: &str, value: &str) -> Result<Self, SourceError> {
        Ok(Self(Kind::Header(format!("{scheme}{}", one_line(value)?))))
    }

    /// From the files of a folder into which a Secret is mounted, for the source at `uri`.
    ///
    /// # Errors
    /// As [`Credentials::from_data`], and when the folder cannot be read.
    pub fn from_folder(folder: &Path, uri: &str) -> Result<Self, SourceError> {
        let mut data = BTreeMap::new();
        for key in [TOKEN, AUTHORIZATION, LOGINS, ID, KEY, SESSION, REGION, ENDPOINT] {
            let path = folder.join(key);
            match fs::read(&path) {
                Ok(value) => drop(data.insert(key.to_owned(), value)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(SourceError::file("read", path, error)),
            }
        }
        Self::from_data(&data, uri)
    }

    /// The value of the header, for the request and for processes that make it; `None` where these are keys.
    pub fn header(&self) -> Option<&str> {
        if let Kind::Header(value) = &self.0 { Some(value) } else { None }
    }

    /// The keys, where these are keys.
    pub fn keys(&self) -> Option<&AccessKeys> {
        if let Kind::Keys(keys) = &self.0 { Some(keys) } else { None }
    }
}

impl From<AccessKeys> for Credentials {
    fn from(keys: AccessKeys) -> Self {
        Self(Kind::Keys(keys))
    }
}

/// A value without the line feed in which Secrets made from files end.
fn one_line(value: &str) -> Result<String, SourceError> {
    let value = value.trim_end_matches(['\n', '\r']);
    if value.is_empty() || !value.bytes().all(|b| (b' '..=b'~').contains(&b)) {
        // What is wrong with it is not said more closely: it is secret.
        return Err(SourceError::Credentials { problem: "expected one line of printable ASCII characters".to_owned() });
    }
    Ok(value.to_owned())
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(data: &[(&str, &str)]) -> Result<Credentials, SourceError> {
        let data = data.iter().map(|(k, v)| ((*k).to_owned(), v.as_bytes().to_vec())).collect();
        Credentials::from_data(&data, "oci://registry.example/m:v1")
    }

    #[test]
    fn a_secret_has_keys_of_a_store() {
        let all = [(ID, "id\n"), (KEY, "hidden"), (SESSION, "of an hour"), (REGION, "eu-west-1"), (ENDPOINT, "http://store:9000")];
        let keys = of(&all).unwrap().keys().cloned().expect("keys");
        assert_eq!((&*keys.id, &*keys.secret, keys.session.as_deref()), ("id", "hidden", Some("of an hour")));
        assert_eq!((keys.region.as_deref(), keys.endpoint.as_deref()), (Some("eu-west-1"), Some("http://store:9000")));
        assert!(!format!("{keys:?}").contains("hidden") && !format!("{keys:?}").contains("hour"), "{keys:?}");
        assert_eq!(of(&all[..2]).unwrap().keys().map(|keys| (&keys.session, &keys.region)), Some((&None, &None)));
        assert_eq!(of(&all[..2]).unwrap().header(), None);
    }

    #[test]
    fn a_secret_has_logins_of_registries() {
        let json = r#"{"auths": {"registry.example": {"auth": "dTpw"}}}"#;
        assert_eq!(of(&[(LOGINS, json)]).unwrap().header(), Some("Basic dTpw"));
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(LOGINS), json).unwrap();
        assert_eq!(Credentials::from_folder(folder.path(), "oci://registry.example/m:v1").unwrap().header(), Some("Basic dTpw"));
        let error = Credentials::from_folder(folder.path(), "oci://other.example/m:v1").unwrap_err();
        assert!(error.to_string().contains("no login for other.example, only for registry.example"), "{error}");
    }

    #[test]
    fn a_secret_has_a_token_or_a_header() {
        assert_eq!(of(&[("token", "hf_abc\n"), ("other", "x")]).unwrap().header(), Some("Bearer hf_abc"));
        assert_eq!(of(&[("authorization", "Basic eA==")]).unwrap().header(), Some("Basic eA=="));
        for (data, said) in [
            (&[][..], "got none"),
            (&[("Token", "x")], "got Token"),
            (&[("token", "x"), ("authorization", "y")], "both"),
            (&[("token", "x"), (LOGINS, "secret")], "both .dockerconfigjson and token"),
            (&[(LOGINS, "secret")], "no list of logins"),
            (&[(LOGINS, r#"{"auths": {"registry.example": {"auth": "secret\nX-Other: 1"}}}"#)], "one line"),
            (&[("token", "secret\r\nX-Other: 1")], "one line"),
            (&[("token", "")], "one line"),
            (&[(ID, "a"), (KEY, "secret\u{7f}")], "one line"),
            (&[(ID, "secret")], "without AWS_SECRET_ACCESS_KEY"),
            (&[(KEY, "secret")], "without AWS_ACCESS_KEY_ID"),
            (&[(ID, "secret"), (KEY, "secret"), ("token", "x")], "both token and AWS_ACCESS_KEY_ID"),
        ] {
            let error = of(data).unwrap_err();
            assert!(error.to_string().contains(said) && !error.to_string().contains("secret"), "{error}");
            assert_eq!(error.reason(), "Unauthorized");
        }
        assert_eq!(format!("{:?}", of(&[("token", "x")]).unwrap()), "Credentials(…)");
    }
}
