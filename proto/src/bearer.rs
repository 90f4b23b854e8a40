//! The token that calls between routers and workers carry: `authorization: Bearer <token>`.

use tonic::{Request, Status, metadata::MetadataValue, service::Interceptor};

/// Name of the metadata entry.
const KEY: &str = "authorization";
/// What precedes the token.
const SCHEME: &str = "Bearer ";

/// Puts the token, where there is one, on every call of a client.
#[derive(Clone)]
pub struct Bearer(Option<String>);

impl std::fmt::Debug for Bearer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "Bearer(…)" } else { "Bearer(none)" })
    }
}

impl Bearer {
    /// For calls with `token`, or with none.
    pub fn new(token: Option<String>) -> Self {
        Self(token)
    }

    /// Refuses a call that does not carry the token. Takes the same time whatever the difference.
    ///
    /// # Errors
    /// `unauthenticated`.
    pub fn check<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let Some(expected) = &self.0 else { return Ok(()) };
        let got = request.metadata().get(KEY).and_then(|v| v.as_bytes().strip_prefix(SCHEME.as_bytes()));
        let same = |got: &[u8]| got.len() == expected.len() && got.iter().zip(expected.bytes()).fold(0, |d, (a, b)| d | (a ^ b)) == 0;
        if got.is_some_and(same) { Ok(()) } else { Err(Status::unauthenticated("the call does not carry this replica's token")) }
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            let value = MetadataValue::try_from(format!("{SCHEME}{token}"));
            let value = value.map_err(|_| Status::invalid_argument("the token has characters that no header may have"))?;
            request.metadata_mut().insert(KEY, value);
        }
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_token_passes() {
        let call = |token: Option<&str>| Bearer::new(token.map(str::to_owned)).call(Request::new(())).expect("a token for headers");
        let server = Bearer::new(Some("secret".into()));
        assert!(server.check(&call(Some("secret"))).is_ok());
        for other in [None, Some(""), Some("secre"), Some("secrets"), Some("Secret")] {
            assert!(server.check(&call(other)).is_err(), "{other:?} passed");
        }
        assert!(Bearer::new(None).check(&call(None)).is_ok());
    }
}
