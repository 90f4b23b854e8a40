//! Keys and certificates of the cluster, made anew for each.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose};

use super::{
    folder::Cluster,
    network::{API_SERVICE, NODE},
};

/// Folder of the certificates in the run folder.
pub(crate) const FOLDER: &str = "pki";

/// Who a certificate is for.
pub(crate) struct Subject<'a> {
    /// Name of its files.
    pub(crate) file: &'a str,
    /// The user, or the server's name.
    pub(crate) name: &'a str,
    /// The user's group.
    pub(crate) group: Option<&'a str>,
    /// Addresses and names of a server; a client has none.
    pub(crate) served_at: &'a [String],
}

impl<'a> Subject<'a> {
    fn client(file: &'a str, name: &'a str, group: Option<&'a str>) -> Self {
        Self { file, name, group, served_at: &[] }
    }
}

/// Where the files of a key pair lie.
pub(crate) struct Files {
    /// The certificate.
    pub(crate) certificate: PathBuf,
    /// The private key.
    pub(crate) key: PathBuf,
}

/// The files called `name`, whether written or not.
pub(crate) fn files(cluster: &Cluster, name: &str) -> Files {
    let folder = cluster.path(FOLDER);
    Files { certificate: folder.join(format!("{name}.crt")), key: folder.join(format!("{name}.key")) }
}

/// Writes every key and certificate that the cluster's programs use.
///
/// # Errors
/// If one cannot be made or written.
pub(crate) fn create(cluster: &Cluster, node: &str) -> Result<()> {
    let authority = Authority::create(cluster, "ca", cluster.id())?;
    let node_user = format!("system:node:{node}");
    let api =
        ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local", "localhost", "127.0.0.1"];
    let api: Vec<String> = api.iter().map(ToString::to_string).chain([NODE.to_string(), API_SERVICE.to_string()]).collect();
    let kubelet = [node.to_owned(), NODE.to_string()];
    let subjects = [
        Subject { file: "apiserver", name: "kube-apiserver", group: None, served_at: &api },
        Subject { file: "kubelet-server", name: &node_user, group: Some("system:nodes"), served_at: &kubelet },
        Subject::client("admin", "admin", Some("system:masters")),
        Subject::client("apiserver-kubelet", "apiserver-kubelet", Some("system:masters")),
        Subject::client("kubelet", &node_user, Some("system:nodes")),
        Subject::client("controller-manager", "system:kube-controller-manager", None),
        Subject::client("scheduler", "system:kube-scheduler", None),
        Subject::client("proxy", "system:kube-proxy", None),
    ];
    for subject in &subjects {
        authority.issue(cluster, subject)?;
    }
    // Aggregated API servers trust the front proxy's authority alone to name users in headers.
    let front = Authority::create(cluster, "front-proxy-ca", "front-proxy")?;
    front.issue(cluster, &Subject::client("front-proxy", "front-proxy", None))?;

    let tokens = KeyPair::generate().context("failed to make the key of service accounts")?;
    write(cluster, "service-accounts.key", &tokens.serialize_pem())?;
    write(cluster, "service-accounts.pub", &tokens.public_key_pem())
}

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn create(cluster: &Cluster, file: &str, name: &str) -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new()).context("failed to describe a certificate")?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate().context("failed to make a key")?;
        write(cluster, &format!("{file}.key"), &key.serialize_pem())?;
        let issuer = CertifiedIssuer::self_signed(params, key).context("failed to make an authority")?;
        write(cluster, &format!("{file}.crt"), &issuer.pem())?;
        Ok(Self(issuer))
    }

    fn issue(&self, cluster: &Cluster, subject: &Subject<'_>) -> Result<()> {
        let mut params =
            CertificateParams::new(subject.served_at.to_vec()).with_context(|| format!("failed to describe {}", subject.name))?;
        params.distinguished_name.push(DnType::CommonName, subject.name);
        if let Some(group) = subject.group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if !subject.served_at.is_empty() {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        let key = KeyPair::generate().context("failed to make a key")?;
        let certificate = params.signed_by(&key, &self.0).with_context(|| format!("failed to sign for {}", subject.name))?;
        write(cluster, &format!("{}.crt", subject.file), &certificate.pem())?;
        write(cluster, &format!("{}.key", subject.file), &key.serialize_pem())
    }
}

/// Writes a file that only its owner can read.
fn write(cluster: &Cluster, name: &str, text: &str) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;

    let path = cluster.write(&format!("{FOLDER}/{name}"), text)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).with_context(|| format!("failed to protect {}", path.display()))
}
