//! SHA-256 digests of files.

use std::{fmt, io::Read, path::Path, str::FromStr};

use sha2::{Digest as _, Sha256};

use crate::SourceError;

/// A SHA-256 digest, written `sha256:<hex>`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Digest {
    hex: String,
}

impl Digest {
    /// The 64 hexadecimal digits, lower case.
    pub fn hex(&self) -> &str {
        &self.hex
    }

    /// The digest of what was hashed.
    pub(crate) fn of(hash: Sha256) -> Self {
        Self { hex: hash.finalize().iter().map(|b| format!("{b:02x}")).collect() }
    }

    /// The digest of bytes that are here, such as the text that names an entry of the cache.
    pub(crate) fn of_bytes(bytes: impl AsRef<[u8]>) -> Self {
        Self::of(Sha256::new().chain_update(bytes))
    }

    /// The digest of a file's bytes.
    pub(crate) fn of_file(path: &Path) -> Result<Self, SourceError> {
        let mut hash = Sha256::new();
        hash_file(path, &mut hash)?;
        Ok(Self::of(hash))
    }
}

/// Adds a file's bytes to `hash`; returns how many.
pub(crate) fn hash_file(path: &Path, hash: &mut Sha256) -> Result<u64, SourceError> {
    let fail = |e| SourceError::file("read", path, e);
    let mut file = std::fs::File::open(path).map_err(fail)?;
    let mut piece = vec![0; 1 << 20];
    let mut total = 0;
    loop {
        match file.read(&mut piece).map_err(fail)? {
            0 => return Ok(total),
            n => {
                hash.update(&piece[..n]);
                total += n as u64;
            }
        }
    }
}

impl FromStr for Digest {
    type Err = SourceError;

    fn from_str(text: &str) -> Result<Self, SourceError> {
        let hex = text.strip_prefix("sha256:").filter(|h| h.len() == 64 && h.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')));
        hex.map(|hex| Self { hex: hex.to_owned() }).ok_or_else(|| SourceError::Digest { got: text.to_owned() })
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
