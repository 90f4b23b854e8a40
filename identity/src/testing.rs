//! For tests of this crate and others: authorities, and folders of processes that they made.

use std::{fs, io, path::Path, sync::Arc};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, SanType,
    string::Ia5String,
};
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{CERTIFICATE, Identity, KEY, Protocol, TRUSTED};

/// Signs certificates.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Authority")
    }
}

/// A process's folder, and what it holds.
#[derive(Debug)]
pub struct Process {
    /// Its files.
    pub folder: TempDir,
    /// Who it is.
    pub identity: Identity,
}

impl Authority {
    /// A new one.
    ///
    /// # Panics
    /// If the system gives no randomness.
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("an authority"))
    }

    /// Writes the files of a process with `names`, which trusts `trusted`.
    ///
    /// # Panics
    /// If they cannot be written.
    pub fn write(&self, folder: &Path, trusted: &[&Self], names: &[&str]) {
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.subject_alt_names = names.iter().map(|n| SanType::URI(Ia5String::try_from(*n).expect("plain text"))).collect();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.0).expect("a certificate");
        fs::write(folder.join(CERTIFICATE), certificate.pem()).expect("written");
        fs::write(folder.join(KEY), key.serialize_pem()).expect("written");
        fs::write(folder.join(TRUSTED), trusted.iter().map(|a| a.0.pem()).collect::<String>()).expect("written");
    }

    /// A process called `name` that trusts this authority.
    ///
    /// # Panics
    /// If its files cannot be written.
    pub fn process(&self, name: &str) -> Process {
        let folder = TempDir::new().expect("a folder");
        self.write(folder.path(), &[self], &[name]);
        let identity = Identity::open(folder.path()).expect("an identity");
        Process { folder, identity }
    }
}

impl Default for Authority {
    fn default() -> Self {
        Self::new()
    }
}

/// Encrypts a connection as a client that has no certificate and asks for none that it trusts.
///
/// # Errors
/// When the other end breaks off.
pub async fn connect_unnamed(protocol: Protocol, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
    let provider = Arc::new(ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions().map_err(io::Error::other)?;
    let mut config = config.dangerous().with_custom_certificate_verifier(Arc::new(Anybody(provider))).with_no_client_auth();
    config.alpn_protocols = vec![protocol.id()];
    let place = ServerName::IpAddress(stream.peer_addr()?.ip().into());
    TlsConnector::from(Arc::new(config)).connect(place, stream).await
}

/// Whoever answers is welcome.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
