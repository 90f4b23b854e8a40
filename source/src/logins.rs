//! Logins of registries, as container tools keep them: the key `.dockerconfigjson` of a Secret of type `kubernetes.io/dockerconfigjson`.

use std::collections::BTreeMap;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::Deserialize;

/// What registries are shown, by registry, or by registry and the beginning of a repository's name.
#[derive(Deserialize)]
struct Logins {
    auths: BTreeMap<String, Login>,
}

/// One of them.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Login {
    /// Name and password, behind a colon, in base64.
    auth: String,
    username: String,
    password: String,
    registrytoken: String,
    identitytoken: String,
}

/// The value of the header `Authorization` for the artifact at `uri`.
///
/// # Errors
/// In words that tell nothing of the logins: when there is none for its registry, or one of a kind that is not supported.
pub(crate) fn header(json: &[u8], uri: &str) -> Result<String, String> {
    let artifact = uri.strip_prefix("oci://").ok_or("logins of registries are for oci:// sources")?;
    // What is wrong with it is not said more closely: it is secret.
    let logins: Logins =
        serde_json::from_slice(json).map_err(|_| "its .dockerconfigjson is no list of logins: expected an object with auths")?;
    let fits = |key: &&String| {
        let place = place(key);
        artifact.strip_prefix(&*place).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    // Of several the one that says most of the repository.
    let found = logins.auths.iter().filter(|(key, _)| fits(key)).max_by_key(|(key, _)| place(key).len());
    let registry = artifact.split('/').next().unwrap_or(artifact);
    let Some((_, login)) = found else {
        let known: Vec<String> = logins.auths.keys().map(|key| place(key)).collect();
        return Err(format!(
            "it has no login for {registry}, only for {}",
            if known.is_empty() { "none".to_owned() } else { known.join(", ") }
        ));
    };
    match login {
        Login { registrytoken, .. } if !registrytoken.is_empty() => Ok(format!("Bearer {registrytoken}")),
        Login { auth, .. } if !auth.is_empty() => Ok(format!("Basic {auth}")),
        Login { username, password, .. } if !username.is_empty() => {
            Ok(format!("Basic {}", BASE64_STANDARD.encode(format!("{username}:{password}"))))
        }
        Login { identitytoken, .. } if !identitytoken.is_empty() => {
            Err(format!("its login for {registry} is an identity token, which is not supported; expected a name and a password"))
        }
        _ => Err(format!("its login for {registry} has no name and password")),
    }
}

/// The registry, and what else of a name, that a key of the list is for.
fn place(key: &str) -> String {
    let plain = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key).trim_end_matches('/');
    // Versions of protocols are no part of a name.
    ["/v1", "/v2"].iter().find_map(|version| plain.strip_suffix(version)).unwrap_or(plain).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &[u8] = br#"{"auths": {
        "registry.example": {"username": "u", "password": "p", "email": "e", "auth": "dTpw"},
        "registry.example/models/large": {"username": "large", "password": "of:it"},
        "https://tokens.example:5000/v2/": {"registrytoken": "abc"},
        "https://old.example/v1/": {"auth": "b2xkOnNlY3JldA=="},
        "identity.example": {"identitytoken": "secret"},
        "empty.example": {}
    }}"#;

    #[test]
    fn the_login_of_the_artifacts_registry_is_shown() {
        for (uri, shown) in [
            ("oci://registry.example/models/small:v1", "Basic dTpw"),
            ("oci://registry.example/models/large:v1", "Basic dTpw"),
            ("oci://registry.example/models/large/one:v1", "Basic bGFyZ2U6b2Y6aXQ="),
            ("oci://registry.example/models/larger:v1", "Basic dTpw"),
            ("oci://tokens.example:5000/m@sha256:0", "Bearer abc"),
            ("oci://old.example/o/m:v1", "Basic b2xkOnNlY3JldA=="),
        ] {
            assert_eq!(header(LIST, uri).as_deref(), Ok(shown), "{uri}");
        }
    }

    #[test]
    fn no_other_is_shown_anything() {
        for (uri, said) in [
            ("oci://registry.example.evil/m:v1", "no login for registry.example.evil"),
            ("oci://tokens.example/m:v1", "no login for tokens.example,"),
            ("oci://identity.example/m:v1", "identity token"),
            ("oci://empty.example/m:v1", "no name and password"),
            ("https://registry.example/m.gguf", "for oci:// sources"),
        ] {
            let error = header(LIST, uri).unwrap_err();
            assert!(error.contains(said) && !error.contains("secret") && !error.contains("dTpw"), "{uri}: {error}");
        }
        for json in [&b"secret"[..], b"{}", br#"{"auths": {"a": "secret"}}"#, br#"{"auths": []}"#] {
            let error = header(json, "oci://a/m:v1").unwrap_err();
            assert!(error.contains("no list of logins") && !error.contains("secret"), "{error}");
        }
        assert!(header(br#"{"auths": {}}"#, "oci://a/m:v1").unwrap_err().contains("only for none"));
    }
}
