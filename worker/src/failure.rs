//! Why a session was refused or ended.

use std::error::Error;

use engine::StepError;
use proto::{convert::ConvertError, worker as wire};

/// The closed list of `worker.proto`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A later epoch was seen, or it was not granted here.
    StaleEpoch,
    /// No common protocol version.
    Version,
    /// The epoch was granted for another process at this address.
    Incarnation,
    /// A later session took over.
    Superseded,
    /// The owner, or another worker, is gone.
    PeerLost,
    /// An exchange between ranks failed.
    Collective,
    /// A hidden state or token did not get through.
    Link,
    /// A mask did not come.
    Mask,
    /// The engine refused a step.
    Engine,
    /// A message that cannot be.
    Protocol,
    /// The worker stops.
    Shutdown,
}

impl Reason {
    /// As it crosses the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::StaleEpoch => "stale_epoch",
            Self::Version => "version",
            Self::Incarnation => "incarnation",
            Self::Superseded => "superseded",
            Self::PeerLost => "peer_lost",
            Self::Collective => "collective",
            Self::Link => "link",
            Self::Mask => "mask",
            Self::Engine => "engine",
            Self::Protocol => "protocol",
            Self::Shutdown => "shutdown",
        }
    }
}

/// A reason, and the rest for a person.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {detail}", reason.name())]
pub(crate) struct Failure {
    pub(crate) reason: Reason,
    pub(crate) detail: String,
}

impl Failure {
    pub(crate) fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into() }
    }

    pub(crate) fn encode(&self) -> wire::Failure {
        wire::Failure { reason: self.reason.name().to_owned(), detail: self.detail.clone() }
    }
}

impl From<ConvertError> for Failure {
    fn from(error: ConvertError) -> Self {
        Self::new(Reason::Protocol, error.to_string())
    }
}

impl From<StepError> for Failure {
    fn from(error: StepError) -> Self {
        let reason = match &error {
            StepError::Invalid { .. } => Reason::Engine,
            StepError::Collective(_) => Reason::Collective,
            StepError::Mask { .. } => Reason::Mask,
        };
        Self::new(reason, chain(&error))
    }
}

/// An error and what caused it, in one line.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
