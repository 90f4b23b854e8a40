//! Authorities and the certificates they sign. Pure: the time is an argument, and nothing is stored here.
//!
//! A new authority is trusted before it signs, for as long as it takes to reach every process (`settle`), and is trusted until the last
//! certificate it signed has run out. So at any time everybody trusts everybody, whichever of their files are on the way.

use std::time::Duration;

use identity::Name;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
    string::Ia5String,
};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::names;

/// Clocks of nodes may be this far apart.
const SKEW: Duration = Duration::from_secs(300);

/// How long things last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetimes {
    /// A certificate is valid for.
    pub certificate: Duration,
    /// A certificate is replaced after; less than it is valid for, by what a Secret takes to reach a process.
    pub renew: Duration,
    /// An authority is replaced after.
    pub authority: Duration,
    /// A new authority is trusted, and does not sign, for: what a Secret takes to reach every process.
    pub settle: Duration,
}

/// Signs certificates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authority {
    /// When it was made, in seconds since 1970. Its name has it.
    created: i64,
    /// PEM.
    certificate: String,
    /// PEM.
    key: String,
}

/// Every authority that is trusted, the oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authorities(Vec<Authority>);

/// A process's files, as in [`identity::CERTIFICATE`], [`identity::KEY`] and [`identity::TRUSTED`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// The certificate.
    pub certificate: String,
    /// Its key.
    pub key: String,
    /// The authorities.
    pub trusted: String,
    /// What is noted beside them.
    pub note: Note,
}

/// What is known of files without reading them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Whose they are.
    pub name: String,
    /// When they were made, in seconds since 1970.
    pub issued: i64,
    /// Digest of the authorities in them.
    pub trusted: String,
}

/// Files could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// Nobody signs.
    #[error("there is no authority yet")]
    NoAuthority,
    /// A key or a certificate cannot be made, or is stored damaged.
    #[error("failed to make {what}")]
    Make {
        /// What.
        what: String,
        /// Why not.
        source: rcgen::Error,
    },
}

impl Note {
    /// When the certificate is to be replaced though whom it trusts does not change, in seconds since 1970.
    pub fn due(&self, lifetimes: &Lifetimes) -> i64 {
        self.issued + seconds(lifetimes.renew)
    }
}

fn failed(what: impl Into<String>) -> impl FnOnce(rcgen::Error) -> CertificateError {
    let what = what.into();
    |source| CertificateError::Make { what, source }
}

fn seconds(duration: Duration) -> i64 {
    duration.as_secs().try_into().unwrap_or(i64::MAX)
}

fn at(time: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(time).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

impl Authority {
    fn new(now: i64, lifetimes: &Lifetimes) -> Result<Self, CertificateError> {
        let key = KeyPair::generate().map_err(failed("the key of an authority"))?;
        let mut params = Self::params(now);
        params.not_before = at(now - seconds(SKEW));
        let mut authority = Self { created: now, certificate: String::new(), key: key.serialize_pem() };
        params.not_after = at(authority.expires(lifetimes));
        authority.certificate = params.self_signed(&key).map_err(failed("an authority"))?.pem();
        Ok(authority)
    }

    /// Once the one after it signs, and what it signed last has run out.
    fn expires(&self, lifetimes: &Lifetimes) -> i64 {
        self.created + seconds(2 * (lifetimes.authority + lifetimes.settle) + lifetimes.certificate)
    }

    /// What its certificate and those that it signs have in common.
    fn params(created: i64) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, format!("skein authority {created}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
    }
}

impl Authorities {
    /// Adds an authority when there is none or the newest is old enough, and forgets those that nothing valid was signed by. Whether anything
    /// changed.
    ///
    /// # Errors
    /// When a key cannot be made.
    pub fn turn(&mut self, now: i64, lifetimes: &Lifetimes) -> Result<bool, CertificateError> {
        let before = self.0.len();
        let gone = |newer: &Authority| newer.created + seconds(lifetimes.settle + lifetimes.certificate) <= now;
        if let Some(newest) = self.0.iter().rposition(gone) {
            self.0.drain(..newest);
        }
        let mut changed = self.0.len() != before;
        if self.0.last().is_none_or(|newest| newest.created + seconds(lifetimes.authority) <= now) {
            self.0.push(Authority::new(now, lifetimes)?);
            changed = true;
        }
        Ok(changed)
    }

    /// The newest authority that everybody trusts by now; the only one at the beginning.
    fn signing(&self, now: i64, lifetimes: &Lifetimes) -> Option<&Authority> {
        let settled = |a: &&Authority| a.created + seconds(lifetimes.settle) <= now;
        self.0.iter().rev().find(settled).or(self.0.first())
    }

    /// Certificates of all, PEM.
    pub fn trusted(&self) -> String {
        self.0.iter().map(|a| a.certificate.as_str()).collect()
    }

    /// When the newest expires, in seconds since 1970.
    pub fn expires(&self, lifetimes: &Lifetimes) -> Option<i64> {
        self.0.last().map(|newest| newest.expires(lifetimes))
    }

    fn digest(&self) -> String {
        names::digest(&[&self.trusted()], 16)
    }

    /// Whether a process called `name` needs other files than those that `note` was written beside.
    pub fn due(&self, name: &Name, note: Option<&Note>, now: i64, lifetimes: &Lifetimes) -> bool {
        note.is_none_or(|n| n.name != name.to_string() || n.trusted != self.digest() || n.due(lifetimes) <= now)
    }

    /// Seconds until [`Authorities::turn`] changes something or a certificate that is issued now is due.
    pub fn next(&self, now: i64, lifetimes: &Lifetimes) -> Duration {
        let newest = self.0.last().map_or(now, |a| a.created);
        let times = self.0.iter().skip(1).map(|a| a.created + seconds(lifetimes.settle + lifetimes.certificate));
        let times = times.chain([newest + seconds(lifetimes.authority), now + seconds(lifetimes.renew)]);
        Duration::from_secs(times.filter(|t| *t > now).map(|t| t.abs_diff(now)).min().unwrap_or(1))
    }

    /// Files for a process called `name`.
    ///
    /// # Errors
    /// When there is no authority, or a key or certificate cannot be made.
    pub fn issue(&self, name: &Name, now: i64, lifetimes: &Lifetimes) -> Result<Files, CertificateError> {
        let broken = || failed(format!("a certificate for {name}"));
        let authority = self.signing(now, lifetimes).ok_or(CertificateError::NoAuthority)?;
        let signer = KeyPair::from_pem(&authority.key).map_err(failed("the key of the authority from what is stored"))?;
        let issuer = Issuer::new(Authority::params(authority.created), signer);
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(name.to_string()).map_err(broken())?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        params.not_before = at(now - seconds(SKEW));
        params.not_after = at(now + seconds(lifetimes.certificate));
        let key = KeyPair::generate().map_err(broken())?;
        let certificate = params.signed_by(&key, &issuer).map_err(broken())?;
        Ok(Files {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
            trusted: self.trusted(),
            note: Note { name: name.to_string(), issued: now, trusted: self.digest() },
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use identity::{CERTIFICATE, Identity, KEY, Protocol, TRUSTED, accept, connect};
    use tempfile::TempDir;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
    };

    use super::*;

    const LIFETIMES: Lifetimes = Lifetimes {
        certificate: Duration::from_secs(600),
        renew: Duration::from_secs(60),
        authority: Duration::from_secs(3600),
        settle: Duration::from_secs(200),
    };
    const START: i64 = 1_700_000_000;

    fn name(text: &str) -> Name {
        format!("spiffe://skein/ns/a/{text}").parse().expect("a name")
    }

    #[test]
    fn an_authority_is_trusted_before_it_signs_and_until_nothing_of_it_is_valid() {
        let (mut all, mut now) = (Authorities::default(), START);
        assert!(all.turn(now, &LIFETIMES).expect("an authority"));
        assert!(!all.turn(now + 1, &LIFETIMES).expect("nothing"));
        let first = all.0[0].clone();
        assert_eq!(all.signing(now, &LIFETIMES), Some(&first), "the first one signs at once");
        now += 3600;
        assert!(all.turn(now, &LIFETIMES).expect("an authority"));
        assert_eq!((all.0.len(), all.signing(now + 199, &LIFETIMES)), (2, Some(&first)));
        let second = all.0[1].clone();
        assert_eq!(all.signing(now + 200, &LIFETIMES), Some(&second));
        // The first one signed for 200 s more, and what it signed last is valid for 600.
        assert!(!all.turn(now + 799, &LIFETIMES).expect("nothing"));
        assert!(all.turn(now + 800, &LIFETIMES).expect("one goes"));
        assert_eq!(all.0, [second]);
    }

    #[test]
    fn files_are_due_when_old_or_when_trust_changes() {
        let mut all = Authorities::default();
        let router = name("router");
        assert!(all.issue(&router, START, &LIFETIMES).is_err(), "nobody signs yet");
        all.turn(START, &LIFETIMES).expect("an authority");
        let note = all.issue(&router, START, &LIFETIMES).expect("files").note;
        assert!(all.due(&router, None, START, &LIFETIMES));
        assert!(!all.due(&router, Some(&note), START + 59, &LIFETIMES));
        assert!(all.due(&router, Some(&note), START + 60, &LIFETIMES));
        assert!(all.due(&name("replica/r/stage/0"), Some(&note), START, &LIFETIMES));
        all.turn(START + 3600, &LIFETIMES).expect("an authority");
        let fresh = Note { issued: START + 3600, ..note };
        assert!(all.due(&router, Some(&fresh), START + 3600, &LIFETIMES), "the new authority is to be trusted");
        assert_eq!(all.next(START + 3600, &LIFETIMES), LIFETIMES.renew);
    }

    /// Files as a process sees them.
    fn process(files: &Files) -> (TempDir, Identity) {
        let folder = TempDir::new().expect("a folder");
        for (file, text) in [(CERTIFICATE, &files.certificate), (KEY, &files.key), (TRUSTED, &files.trusted)] {
            fs::write(folder.path().join(file), text).expect("written");
        }
        let identity = Identity::open(folder.path()).expect("an identity");
        (folder, identity)
    }

    async fn talk(client: &Identity, server: &Identity) -> std::io::Result<u8> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let server = server.clone();
        let expected = server.name();
        let served = tokio::spawn(async move {
            let (stream, _) = listener.accept().await?;
            let (mut stream, _) = accept(&server, Protocol::Grpc, stream).await.map_err(std::io::Error::other)?;
            stream.write_all(&[7]).await
        });
        let mut stream = connect(client, &expected, Protocol::Grpc, TcpStream::connect(address).await?).await?;
        let byte = stream.read_u8().await;
        served.await.expect("no panic")?;
        byte
    }

    /// Through two changes of authority, whoever has files that are not due talks to whoever else has.
    #[tokio::test]
    async fn everybody_trusts_everybody_while_authorities_change() {
        // Real time, since handshakes look at the clock: the past is made of older authorities.
        let now = OffsetDateTime::now_utc().unix_timestamp();
        let mut all = Authorities::default();
        all.turn(now - 3600, &LIFETIMES).expect("an authority");
        let old = process(&all.issue(&name("router"), now, &LIFETIMES).expect("files"));
        all.turn(now, &LIFETIMES).expect("an authority");
        assert_eq!(all.0.len(), 2);
        let told = process(&all.issue(&name("replica/r/stage/0"), now, &LIFETIMES).expect("files"));
        assert_eq!(talk(&old.1, &told.1).await.expect("trust"), 7);
        assert_eq!(talk(&told.1, &old.1).await.expect("trust"), 7);
        let signed = LIFETIMES.settle + Duration::from_secs(1);
        let new = process(&all.issue(&name("replica/r/stage/0"), now + seconds(signed), &LIFETIMES).expect("files"));
        let renewed = process(&all.issue(&name("router"), now, &LIFETIMES).expect("files"));
        assert_eq!(talk(&renewed.1, &new.1).await.expect("trust"), 7);
        // Control: a process that never heard of the new authority does not trust it.
        talk(&old.1, &new.1).await.expect_err("an authority that it does not know");
    }

    #[test]
    fn what_is_stored_is_read_again() {
        let mut all = Authorities::default();
        all.turn(START, &LIFETIMES).expect("an authority");
        let text = serde_json::to_string(&all).expect("plain data");
        assert_eq!(serde_json::from_str::<Authorities>(&text).expect("authorities"), all);
    }
}
