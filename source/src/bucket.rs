//! Buckets of object stores: what lies in them by S3's protocol, which Google's stores speak too, and requests that are signed.

use std::{fmt, time::Duration};

use jiff::Timestamp;
use rusty_s3::{Bucket as Names, Credentials as Keys, Method, S3Action, UrlStyle, actions::ListObjectsV2, signing};
use url::Url;

use crate::{
    Credentials, SourceError, SourceOptions,
    admission::Admission,
    digest::Digest,
    http::Client,
    listing::{Listed, MAX_PAGES, Store, below, endless},
};

/// How long a signed URL is good for: a body that has begun to come is not cut off by its end.
const SIGNED_FOR: Duration = Duration::from_secs(900);
/// Region of Amazon's stores where none is named.
const DEFAULT_REGION: &str = "us-east-1";
/// What Google's stores call themselves in listings.
const GOOGLE_NAMESPACE: &str = "http://doc.s3.amazonaws.com/2006-03-01";
const NAMESPACE: &str = "http://s3.amazonaws.com/doc/2006-03-01/";

/// Whose store a bucket is in, where nothing else is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Provider {
    Amazon,
    Google,
}

impl Provider {
    pub(crate) fn scheme(self) -> &'static str {
        match self {
            Self::Amazon => "s3",
            Self::Google => "gs",
        }
    }
}

/// Signs requests to a bucket.
pub(crate) struct Signer {
    keys: Keys,
    region: String,
}

impl Signer {
    /// `url`, which asks the bucket for something, with a signature.
    pub(crate) fn sign(&self, url: &str) -> Result<String, SourceError> {
        let mut url: Url = url.parse().map_err(|error| SourceError::Uri { uri: url.to_owned(), problem: format!("{error}") })?;
        let mut query: Vec<(String, String)> = url.query_pairs().into_owned().collect();
        query.sort();
        url.set_query(None);
        let query = query.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let (key, secret, token) = (self.keys.key(), self.keys.secret(), self.keys.token());
        let lasts = SIGNED_FOR.as_secs();
        let none = std::iter::empty::<(&str, &str)>();
        Ok(signing::sign(&Timestamp::now(), Method::Get, url, key, secret, token, &self.region, lasts, query, none).into())
    }
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signer({})", self.region)
    }
}

/// A bucket.
#[derive(Debug)]
pub(crate) struct Bucket {
    names: Names,
    admission: Admission,
}

impl Bucket {
    /// The bucket called `name`, as the options say how it is reached.
    ///
    /// # Errors
    /// When the options' endpoint is no URL, or no host has such a name.
    pub(crate) fn new(provider: Provider, name: &str, options: &SourceOptions) -> Result<Self, SourceError> {
        let own = options.credentials.as_ref();
        let keys = own.and_then(Credentials::keys);
        // The environment's keys are for Amazon's protocol on Amazon's terms; a header that was given is shown instead.
        let common = (provider == Provider::Amazon).then_some(&options.s3);
        let keys = keys.or(common.and_then(|s3| s3.keys.as_ref()).filter(|_| own.is_none()));
        let region = keys.and_then(|k| k.region.clone()).or(common.and_then(|s3| s3.region.clone()));
        let endpoint = keys.and_then(|k| k.endpoint.clone()).or(common.and_then(|s3| s3.endpoint.clone()));
        let region = region.unwrap_or_else(|| match provider {
            Provider::Amazon => DEFAULT_REGION.to_owned(),
            Provider::Google => "auto".to_owned(),
        });
        // A bucket's dots are no part of the names that a certificate covers; what another endpoint is called is its own affair.
        let style =
            if endpoint.is_none() && provider == Provider::Amazon && !name.contains('.') { UrlStyle::VirtualHost } else { UrlStyle::Path };
        let endpoint = endpoint.unwrap_or_else(|| match provider {
            Provider::Amazon => format!("https://s3.{region}.amazonaws.com"),
            Provider::Google => "https://storage.googleapis.com".to_owned(),
        });
        let bad = |problem: String| SourceError::Uri { uri: format!("{}://{name}", provider.scheme()), problem };
        let url: Url = endpoint.parse().map_err(|error| bad(format!("its endpoint {endpoint} is no URL: {error}")))?;
        let names = Names::new(url, style, name.to_owned(), region.clone()).map_err(|error| bad(format!("{endpoint}: {error}")))?;
        let admission = match keys {
            Some(keys) => {
                let keys = match &keys.session {
                    Some(session) => Keys::new_with_token(&keys.id, &keys.secret, session),
                    None => Keys::new(&keys.id, &keys.secret),
                };
                Admission::Signed(Signer { keys, region }.into())
            }
            None => Admission::header(own)?,
        };
        Ok(Self { names, admission })
    }

    fn object(&self, key: &str) -> String {
        self.names.object_url(key).into()
    }
}

impl Store for Bucket {
    fn list(&self, client: &Client, folder: &str) -> Result<Vec<Listed>, SourceError> {
        let prefix = below(folder);
        let (mut files, mut page) = (Vec::new(), None::<String>);
        for _ in 0..MAX_PAGES {
            let mut ask = ListObjectsV2::new(&self.names, None);
            ask.with_prefix(&prefix);
            ask.with_delimiter("/");
            if let Some(page) = page.take() {
                ask.with_continuation_token(page);
            }
            let url = String::from(ask.sign(SIGNED_FOR));
            let (bytes, _) = client.small(&url, &self.admission)?;
            let text = String::from_utf8_lossy(&bytes).replace(GOOGLE_NAMESPACE, NAMESPACE);
            let listing = ListObjectsV2::parse_response(&text).map_err(|error| SourceError::Protocol {
                place: url.clone(),
                expected: "a list of objects".to_owned(),
                got: error.to_string(),
            })?;
            let own = listing.contents.into_iter().filter_map(|object| {
                let name = object.key.strip_prefix(&prefix).filter(|name| !name.is_empty() && !name.contains('/'))?.to_owned();
                Some(Listed { url: self.object(&object.key), name, digest: None })
            });
            files.extend(own);
            page = listing.next_continuation_token;
            if page.is_none() {
                return Ok(files);
            }
        }
        Err(endless(self.place(folder)))
    }

    fn url(&self, path: &str, _: &Digest) -> String {
        self.object(path)
    }

    fn place(&self, folder: &str) -> String {
        format!("{}{}", self.names.base_url(), below(folder))
    }

    fn admission(&self) -> &Admission {
        &self.admission
    }
}
