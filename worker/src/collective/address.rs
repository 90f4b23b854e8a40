//! Where a rank is reached by the others of its stage.

use std::{fmt, str::FromStr};

/// `tcp:HOST:PORT`, `unix:PATH`, `unix-abstract:NAME`, or nothing for shared memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// Shared memory needs none.
    None,
    /// Host and port.
    Tcp(String, u16),
    /// A socket in the file system.
    Unix(String),
    /// A socket in Linux's abstract namespace, which leaves nothing behind.
    UnixAbstract(String),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => Ok(()),
            Self::Tcp(host, port) if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp(host, port) => write!(f, "tcp:{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{path}"),
            Self::UnixAbstract(name) => write!(f, "unix-abstract:{name}"),
        }
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, rest) = text.split_once(':').unwrap_or((text, ""));
        match kind {
            "" => Ok(Self::None),
            "unix" if !rest.is_empty() => Ok(Self::Unix(rest.to_owned())),
            "unix-abstract" if !rest.is_empty() => Ok(Self::UnixAbstract(rest.to_owned())),
            "tcp" => {
                let (host, port) = rest.rsplit_once(':').ok_or_else(|| format!("{text} has no port"))?;
                let port = port.parse().map_err(|_| format!("{port} in {text} is not a port"))?;
                Ok(Self::Tcp(host.trim_matches(['[', ']']).to_owned(), port))
            }
            _ => Err(format!("{text} is not of the form tcp:HOST:PORT, unix:PATH or unix-abstract:NAME")),
        }
    }
}

impl Address {
    /// The address as seen from elsewhere: a rank that listens on every address is reached where its gRPC server is, at `server` (`HOST:PORT`).
    #[must_use]
    pub fn seen_at(self, server: &str) -> Self {
        match self {
            Self::Tcp(host, port) if matches!(host.as_str(), "0.0.0.0" | "::") => {
                let seen = server.rsplit_once(':').map_or(server, |(host, _)| host);
                Self::Tcp(seen.trim_matches(['[', ']']).to_owned(), port)
            }
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Address;

    #[test]
    fn addresses_survive_their_text() {
        for text in ["", "tcp:127.0.0.1:80", "tcp:[::1]:80", "tcp:host:1", "unix:/a/b:c", "unix-abstract:n"] {
            assert_eq!(text.parse::<Address>().expect(text).to_string(), text);
        }
        for text in ["tcp:", "tcp:host", "tcp:host:port", "unix:", "udp:host:1"] {
            assert!(text.parse::<Address>().is_err(), "{text} was taken");
        }
    }

    #[test]
    fn a_rank_on_every_address_is_where_its_server_is() {
        let seen = |at: &str, server| at.parse::<Address>().expect(at).seen_at(server).to_string();
        assert_eq!(seen("tcp:0.0.0.0:7", "worker-0:9000"), "tcp:worker-0:7");
        assert_eq!(seen("tcp:[::]:7", "[fd00::1]:9000"), "tcp:[fd00::1]:7");
        assert_eq!(seen("tcp:10.0.0.1:7", "worker-0:9000"), "tcp:10.0.0.1:7");
    }
}
