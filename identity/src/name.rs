//! Names: what a process is.

use std::{fmt, str::FromStr};

/// What every name begins with.
const PREFIX: &str = "spiffe://skein/";

/// What a process is, as its certificate says in a URI.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Name {
    /// The operator: `spiffe://skein/operator`.
    Operator,
    /// A router of a namespace's pool: `spiffe://skein/ns/NAMESPACE/router`.
    Router {
        /// The namespace.
        namespace: String,
    },
    /// A worker: `spiffe://skein/ns/NAMESPACE/replica/REPLICA/stage/STAGE`. Its rank is claimed in each session, and held by one worker of it.
    Worker {
        /// The namespace.
        namespace: String,
        /// Name of the replica, which is unique over deployments and revisions.
        replica: String,
        /// The stage.
        stage: usize,
    },
}

/// A text is no name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no name of a router, a worker or the operator")]
pub struct NameError {
    text: String,
}

impl Name {
    /// The namespace it belongs to; the operator belongs to none.
    pub fn namespace(&self) -> Option<&str> {
        match self {
            Self::Operator => None,
            Self::Router { namespace } | Self::Worker { namespace, .. } => Some(namespace),
        }
    }

    /// A router of the same namespace.
    pub fn router(&self) -> Option<Self> {
        self.namespace().map(|namespace| Self::Router { namespace: namespace.to_owned() })
    }

    /// A worker of the same namespace.
    pub fn worker(&self, replica: &str, stage: usize) -> Option<Self> {
        self.namespace().map(|namespace| Self::Worker { namespace: namespace.to_owned(), replica: replica.to_owned(), stage })
    }

    /// Whether a process of this name takes calls of `peer` at all: the operator those of routers; routers and workers those of their own
    /// namespace's routers and workers, where workers of different replicas have nothing to say to each other.
    pub fn admits(&self, peer: &Self) -> bool {
        match (self, peer) {
            (Self::Operator, Self::Router { .. }) => true,
            (Self::Worker { replica, namespace, .. }, Self::Worker { replica: other, namespace: of, .. }) => {
                namespace == of && replica == other
            }
            (Self::Router { namespace } | Self::Worker { namespace, .. }, Self::Router { namespace: of })
            | (Self::Router { namespace }, Self::Worker { namespace: of, .. }) => namespace == of,
            (_, Self::Operator) | (Self::Operator, Self::Worker { .. }) => false,
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Operator => write!(f, "{PREFIX}operator"),
            Self::Router { namespace } => write!(f, "{PREFIX}ns/{namespace}/router"),
            Self::Worker { namespace, replica, stage } => write!(f, "{PREFIX}ns/{namespace}/replica/{replica}/stage/{stage}"),
        }
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let parts: Vec<&str> = text.strip_prefix(PREFIX).unwrap_or_default().split('/').collect();
        let name = match parts[..] {
            ["operator"] => Some(Self::Operator),
            ["ns", namespace, "router"] => Some(Self::Router { namespace: namespace.to_owned() }),
            ["ns", namespace, "replica", replica, "stage", stage] => {
                stage.parse().ok().map(|stage| Self::Worker { namespace: namespace.to_owned(), replica: replica.to_owned(), stage })
            }
            _ => None,
        };
        // Written back, so that `stage/01` or an empty part is not taken for something else.
        name.filter(|name| name.to_string() == text && parts.iter().all(|p| !p.is_empty()))
            .ok_or_else(|| NameError { text: text.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        text.parse().expect("a name")
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        let worker = Name::Worker { namespace: "a".into(), replica: "m-1234-r0".into(), stage: 1 };
        assert_eq!(worker.to_string(), "spiffe://skein/ns/a/replica/m-1234-r0/stage/1");
        for name in [Name::Operator, Name::Router { namespace: "a".into() }, worker] {
            assert_eq!(name.to_string().parse(), Ok(name));
        }
        let wrong =
            ["", "spiffe://skein/", "spiffe://other/operator", "spiffe://skein/ns//router", "spiffe://skein/ns/a/replica/r/stage/01"];
        for text in wrong {
            assert!(text.parse::<Name>().is_err(), "{text}");
        }
    }

    #[test]
    fn calls_stay_within_a_namespace_and_a_replica() {
        let operator = Name::Operator;
        let (router, other) = (name("spiffe://skein/ns/a/router"), name("spiffe://skein/ns/b/router"));
        let worker = |text: &str| name(&format!("spiffe://skein/ns/{text}"));
        let (first, second) = (worker("a/replica/r0/stage/0"), worker("a/replica/r0/stage/1"));
        let (stranger, foreign) = (worker("a/replica/r1/stage/0"), worker("b/replica/r0/stage/0"));
        let admitted =
            [(&operator, &router), (&router, &router), (&router, &first), (&first, &router), (&first, &second), (&second, &first)];
        for (server, client) in admitted {
            assert!(server.admits(client), "{server} refuses {client}");
        }
        let refused = [
            (&operator, &operator),
            (&operator, &first),
            (&router, &operator),
            (&router, &other),
            (&router, &foreign),
            (&first, &operator),
            (&first, &other),
            (&first, &stranger),
            (&first, &foreign),
        ];
        for (server, client) in refused {
            assert!(!server.admits(client), "{server} admits {client}");
        }
        assert_eq!(router.worker("r0", 1), Some(second));
        assert_eq!(stranger.router(), Some(router));
        assert_eq!(operator.router(), None);
    }
}
