//! The folder of a process: its certificate, its key, and whom it trusts; read again when it changes.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{CryptoProvider, ring, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::{ParsedCertificate, WebPkiClientVerifier},
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};
use tracing::{info, warn};

use crate::name::Name;

/// File of the process's certificate, with those that lead to an authority after it.
pub const CERTIFICATE: &str = "tls.crt";
/// File of its key.
pub const KEY: &str = "tls.key";
/// File of the authorities it trusts: while one is replaced by another, both.
pub const TRUSTED: &str = "ca.crt";

/// How often the folder is looked at, at most. New connections alone look.
const LOOK: Duration = Duration::from_secs(1);

/// What is spoken on a connection, agreed upon in its handshake: one kind of listener takes no connection of the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/2 with gRPC.
    Grpc,
    /// Frames of a collective.
    Collective,
}

impl Protocol {
    pub(crate) fn id(self) -> Vec<u8> {
        match self {
            Self::Grpc => b"h2".to_vec(),
            Self::Collective => b"skein-collective/1".to_vec(),
        }
    }
}

/// Why there is no identity in a folder.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file cannot be read.
    #[error("failed to read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file holds something else than it should.
    #[error("{path} holds no {expected}: {detail}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        expected: &'static str,
        /// What is wrong.
        detail: String,
    },
    /// The files do not belong together.
    #[error("the certificate and the key in {folder} do not belong together")]
    Mismatch {
        /// The folder.
        folder: PathBuf,
        /// How.
        source: rustls::Error,
    },
    /// The files changed while they were read.
    #[error("the files in {folder} changed while they were read")]
    Changing {
        /// The folder.
        folder: PathBuf,
    },
}

/// What a process is, and the proof. A cheap clone.
#[derive(Clone)]
pub struct Identity(Arc<Inner>);

struct Inner {
    /// `None` where the files are handed over.
    folder: Option<PathBuf>,
    provider: Arc<CryptoProvider>,
    state: Mutex<State>,
}

struct State {
    material: Arc<Material>,
    looked: Instant,
    /// What was read last, good or not.
    stamp: Stamp,
}

/// What was read from the folder at one time.
pub(crate) struct Material {
    pub(crate) name: Name,
    key: Arc<CertifiedKey>,
    roots: Arc<RootCertStore>,
}

/// Tells contents apart without reading them: (modified, bytes) of each file. A mounted Secret is replaced by another folder as a whole.
type Stamp = [(Option<SystemTime>, u64); 3];

impl Identity {
    /// Reads the folder.
    ///
    /// # Errors
    /// When a file is missing, damaged, or does not belong to the others.
    pub fn open(folder: &Path) -> Result<Self, IdentityError> {
        let provider = Arc::new(ring::default_provider());
        let (material, stamp) = read(folder, &provider)?;
        let state = Mutex::new(State { material: Arc::new(material), looked: Instant::now(), stamp });
        Ok(Self(Arc::new(Inner { folder: Some(folder.to_owned()), provider, state })))
    }

    /// Of files that whoever issues certificates has in hand: contents of [`CERTIFICATE`], [`KEY`] and [`TRUSTED`].
    ///
    /// # Errors
    /// As [`Identity::open`].
    pub fn given(files: [&str; 3]) -> Result<Self, IdentityError> {
        let provider = Arc::new(ring::default_provider());
        let material = parse(Path::new(""), files.map(str::as_bytes), &provider)?;
        let state = State { material: Arc::new(material), looked: Instant::now(), stamp: Stamp::default() };
        Ok(Self(Arc::new(Inner { folder: None, provider, state: Mutex::new(state) })))
    }

    /// Puts other files in place of those that were given; for new connections.
    ///
    /// # Errors
    /// As [`Identity::open`]; then nothing changes.
    pub fn replace(&self, files: [&str; 3]) -> Result<(), IdentityError> {
        let material = parse(Path::new(""), files.map(str::as_bytes), &self.0.provider)?;
        self.state().material = Arc::new(material);
        Ok(())
    }

    /// What this process is.
    pub fn name(&self) -> Name {
        self.state().material.name.clone()
    }

    /// What is valid now: read again if the folder changed. A folder that cannot be read, or that makes another process of this one, changes
    /// nothing, and is reported once.
    pub(crate) fn material(&self) -> Arc<Material> {
        let inner = &*self.0;
        let mut state = self.state();
        let Some(folder) = inner.folder.as_deref().filter(|_| state.looked.elapsed() >= LOOK) else { return state.material.clone() };
        state.looked = Instant::now();
        let Ok(now) = stamp(folder) else { return state.material.clone() };
        if now != state.stamp {
            match read(folder, &inner.provider) {
                Ok((material, stamp)) if material.name == state.material.name => {
                    info!(name = %material.name, "took a new certificate");
                    (state.material, state.stamp) = (Arc::new(material), stamp);
                }
                Ok((material, stamp)) => {
                    warn!(name = %material.name, expected = %state.material.name, "the certificate in the folder is for another process; it is not used");
                    state.stamp = stamp;
                }
                // A folder that is being replaced is looked at again.
                Err(IdentityError::Changing { .. }) => {}
                Err(error) => {
                    warn!(error = &error as &dyn std::error::Error, "the certificate in the folder is not used");
                    state.stamp = now;
                }
            }
        }
        state.material.clone()
    }

    /// As if the folder had not been looked at for long.
    #[cfg(test)]
    pub(crate) fn look_now(&self) {
        let mut state = self.state();
        state.looked = state.looked.checked_sub(LOOK).expect("the clock began earlier");
    }

    /// For connections that others open: they must prove a name.
    pub(crate) fn server(&self, material: &Material, protocol: Protocol) -> Result<Arc<ServerConfig>, rustls::Error> {
        let provider = self.0.provider.clone();
        let verifier = WebPkiClientVerifier::builder_with_provider(material.roots.clone(), provider.clone())
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(material.key.clone())));
        config.alpn_protocols = vec![protocol.id()];
        // A session that is taken up again would skip the proof, and outlive a certificate.
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    /// For connections that this process opens to one that is called `expected`.
    pub(crate) fn client(&self, material: &Material, protocol: Protocol, expected: Name) -> Result<Arc<ClientConfig>, rustls::Error> {
        let provider = self.0.provider.clone();
        let verifier = Arc::new(Expects { expected, roots: material.roots.clone(), provider: provider.clone() });
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(material.key.clone())));
        config.alpn_protocols = vec![protocol.id()];
        config.resumption = rustls::client::Resumption::disabled();
        config.enable_sni = false;
        Ok(Arc::new(config))
    }

    /// Nothing panics while it is held.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.name())
    }
}

/// The server must be called `expected`, wherever it is.
#[derive(Debug)]
struct Expects {
    expected: Name,
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Expects {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&certificate, &self.roots, intermediates, now, algorithms)?;
        let got = name_of(end_entity).map_err(rustls::Error::General)?;
        if got != self.expected {
            return Err(rustls::Error::General(format!("{got} answered, expected {}", self.expected)));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("only TLS 1.3 is spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        None
    }
}

/// The one name in a certificate.
pub(crate) fn name_of(certificate: &CertificateDer<'_>) -> Result<Name, String> {
    let parsed = webpki::EndEntityCert::try_from(certificate).map_err(|error| format!("the certificate cannot be read: {error}"))?;
    let mut names = parsed.valid_uri_names();
    match (names.next(), names.next()) {
        (Some(name), None) => name.parse().map_err(|error: crate::NameError| error.to_string()),
        (None, _) => Err("the certificate has no URI name".to_owned()),
        (Some(_), Some(_)) => Err("the certificate has several URI names, expected one".to_owned()),
    }
}

fn read(folder: &Path, provider: &CryptoProvider) -> Result<(Material, Stamp), IdentityError> {
    let before = stamp(folder)?;
    let path = |file: &str| folder.join(file);
    let bytes = |file: &str| fs::read(path(file)).map_err(|source| IdentityError::Read { path: path(file), source });
    let (certificate, key, trusted) = (bytes(CERTIFICATE)?, bytes(KEY)?, bytes(TRUSTED)?);
    if stamp(folder)? != before {
        return Err(IdentityError::Changing { folder: folder.to_owned() });
    }
    Ok((parse(folder, [&certificate, &key, &trusted], provider)?, before))
}

/// What the files of `folder` say.
fn parse(folder: &Path, [certificate, key, trusted]: [&[u8]; 3], provider: &CryptoProvider) -> Result<Material, IdentityError> {
    let wrong = |file: &str, expected: &'static str| {
        let path = folder.join(file);
        move |detail: String| IdentityError::Content { path, expected, detail }
    };
    let chain = certificates(certificate).map_err(wrong(CERTIFICATE, "certificate"))?;
    let name =
        chain.first().ok_or_else(|| "it is empty".to_owned()).and_then(name_of).map_err(wrong(CERTIFICATE, "certificate of ours"))?;
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| wrong(KEY, "private key")(error.to_string()))?;
    let key =
        CertifiedKey::from_der(chain, key, provider).map_err(|source| IdentityError::Mismatch { folder: folder.to_owned(), source })?;
    let mut roots = RootCertStore::empty();
    for authority in certificates(trusted).map_err(wrong(TRUSTED, "certificate"))? {
        roots.add(authority).map_err(|error| wrong(TRUSTED, "certificate of an authority")(error.to_string()))?;
    }
    if roots.is_empty() {
        return Err(wrong(TRUSTED, "certificate")("it is empty".to_owned()));
    }
    Ok(Material { name, key: Arc::new(key), roots: Arc::new(roots) })
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|error| error.to_string())
}

fn stamp(folder: &Path) -> Result<Stamp, IdentityError> {
    let one = |file: &str| {
        let path = folder.join(file);
        let meta = fs::metadata(&path).map_err(|source| IdentityError::Read { path, source })?;
        Ok((meta.modified().ok(), meta.len()))
    };
    Ok([one(CERTIFICATE)?, one(KEY)?, one(TRUSTED)?])
}
