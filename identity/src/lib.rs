//! Who is who among routers, workers and the operator: names in certificates, and connections that prove them.
//!
//! A process holds a folder with its certificate, its key and the authorities it trusts ([`Identity`]). The name in a certificate is a URI
//! ([`Name`]) and says what a process is, not where: addresses change, names do not. Each side of a connection proves its own name and checks
//! the other's. The folder is read again when it changes, so that certificates are replaced under running processes; connections that stand
//! are not disturbed.
//!
//! Without an identity connections are plain TCP: processes of one machine, which carry a token of their run.

mod accept;
mod dial;
mod material;
mod name;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;

pub use accept::{Accepted, Incoming, Peer, accept};
pub use dial::{Dialer, connect};
pub use material::{CERTIFICATE, Identity, IdentityError, KEY, Protocol, TRUSTED};
pub use name::{Name, NameError};
