//! How a request is let in: by a header, by a signature in its URL, or by a token that a registry hands out.

use std::sync::Arc;

use ureq::{
    Body,
    http::{HeaderName, Response, header},
};

use crate::{
    Credentials, SourceError,
    bucket::Signer,
    http::{Client, Failure},
    registry::Login,
};

/// What a request carries beyond its URL.
#[derive(Clone, Debug)]
pub(crate) enum Admission {
    /// Nothing.
    Open,
    /// A header, shown to the URL's own host alone.
    Header(Arc<Credentials>),
    /// A signature, made anew for each request: it lasts for minutes.
    Signed(Arc<Signer>),
    /// A token, once the registry has asked for one.
    Registry(Arc<Login>),
}

impl Admission {
    /// By a header, where there is one to show.
    ///
    /// # Errors
    /// When the credentials are keys, which sign requests to object stores alone.
    pub(crate) fn header(shown: Option<&Credentials>) -> Result<Self, SourceError> {
        match shown {
            None => Ok(Self::Open),
            Some(shown) if shown.header().is_some() => Ok(Self::Header(shown.clone().into())),
            Some(_) => {
                Err(SourceError::Credentials { problem: "access keys are for s3:// and gs://, expected a token or a header".to_owned() })
            }
        }
    }

    /// The URL that is asked in place of `url`, and headers.
    ///
    /// # Errors
    /// When `url` cannot be signed.
    pub(crate) fn admit(&self, url: &str) -> Result<(String, Vec<(HeaderName, String)>), SourceError> {
        let plain = |headers| Ok((url.to_owned(), headers));
        match self {
            Self::Open => plain(Vec::new()),
            Self::Header(shown) => plain(shown.header().map(|value| (header::AUTHORIZATION, value.to_owned())).into_iter().collect()),
            Self::Signed(signer) => Ok((signer.sign(url)?, Vec::new())),
            Self::Registry(login) => plain(login.headers()),
        }
    }

    /// Whether the request is worth another attempt after it was refused with `response`.
    pub(crate) fn refused(&self, client: &Client, response: &Response<Body>) -> Result<bool, Failure> {
        match self {
            Self::Registry(login) => login.answer(client, response),
            Self::Open | Self::Header(_) | Self::Signed(_) => Ok(false),
        }
    }
}
