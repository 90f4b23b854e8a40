//! What servers are shown to be let in.

use std::{collections::BTreeMap, fmt, fs, path::Path};

use crate::SourceError;

/// Key of a bearer token.
const TOKEN: &str = "token";
/// Key of the whole value of the header `Authorization`.
const AUTHORIZATION: &str = "authorization";

/// The value of a header `Authorization`, never printed. It is shown to the host that a URI names and no other.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Credentials(String);

impl Credentials {
    /// From the data of a Secret: `token`, a bearer token, or `authorization`, the whole value of the header.
    ///
    /// # Errors
    /// When it has none of the keys or both, or a value that no header can have.
    pub fn from_data(data: &BTreeMap<String, Vec<u8>>) -> Result<Self, SourceError> {
        let fail = |problem: String| Err(SourceError::Credentials { problem });
        let (value, scheme) = match (data.get(TOKEN), data.get(AUTHORIZATION)) {
            (Some(token), None) => (token, "Bearer "),
            (None, Some(value)) => (value, ""),
            (Some(_), Some(_)) => return fail(format!("it has both {TOKEN} and {AUTHORIZATION}, expected one of them")),
            (None, None) => {
                let keys = data.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
                return fail(format!("expected a key {TOKEN} or {AUTHORIZATION}, got {}", if keys.is_empty() { "none" } else { &keys }));
            }
        };
        Self::of(scheme, &String::from_utf8_lossy(value))
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
        // Secrets made from files end in a line feed.
        let value = value.trim_end_matches(['\n', '\r']);
        if value.is_empty() || !value.bytes().all(|b| (b' '..=b'~').contains(&b)) {
            // What is wrong with it is not said more closely: it is secret.
            return Err(SourceError::Credentials { problem: "expected one line of printable ASCII characters".to_owned() });
        }
        Ok(Self(format!("{scheme}{value}")))
    }

    /// From the files of a folder into which a Secret is mounted.
    ///
    /// # Errors
    /// As [`Credentials::from_data`], and when the folder cannot be read.
    pub fn from_folder(folder: &Path) -> Result<Self, SourceError> {
        let mut data = BTreeMap::new();
        for key in [TOKEN, AUTHORIZATION] {
            let path = folder.join(key);
            match fs::read(&path) {
                Ok(value) => drop(data.insert(key.to_owned(), value)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(SourceError::file("read", path, error)),
            }
        }
        Self::from_data(&data)
    }

    /// The value, for the request and for processes that make it.
    pub fn value(&self) -> &str {
        &self.0
    }
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
        Credentials::from_data(&data.iter().map(|(k, v)| ((*k).to_owned(), v.as_bytes().to_vec())).collect())
    }

    #[test]
    fn a_secret_has_a_token_or_a_header() {
        assert_eq!(of(&[("token", "hf_abc\n"), ("other", "x")]).unwrap().value(), "Bearer hf_abc");
        assert_eq!(of(&[("authorization", "Basic eA==")]).unwrap().value(), "Basic eA==");
        for (data, said) in [
            (&[][..], "got none"),
            (&[("Token", "x")], "got Token"),
            (&[("token", "x"), ("authorization", "y")], "both"),
            (&[("token", "secret\r\nX-Other: 1")], "one line"),
            (&[("token", "")], "one line"),
        ] {
            let error = of(data).unwrap_err();
            assert!(error.to_string().contains(said) && !error.to_string().contains("secret"), "{error}");
            assert_eq!(error.reason(), "Unauthorized");
        }
        assert_eq!(format!("{:?}", of(&[("token", "x")]).unwrap()), "Credentials(…)");
    }
}
