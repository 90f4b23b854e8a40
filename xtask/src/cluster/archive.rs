//! Writing a container image as a tar archive of an OCI image layout (image-spec 1.1, `image-layout.md`).

use std::{
    fs::{self, File},
    io::{self, BufWriter, Read, Seek, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

/// An image to be written.
pub(crate) struct Image {
    /// Full name with registry and tag.
    pub(crate) reference: String,
    /// Files of each layer, lowest layer first.
    pub(crate) layers: Vec<Vec<Entry>>,
    /// What a container of it runs, in the words of the image configuration.
    pub(crate) config: Value,
}

/// A file or folder of a layer; its owner is root and its time 0, so that the same contents give the same digest.
pub(crate) struct Entry {
    path: String,
    mode: u32,
    contents: Contents,
}

enum Contents {
    Folder,
    Text(String),
    File(PathBuf),
}

impl Entry {
    /// A folder; the parents of files need no entry.
    pub(crate) fn folder(path: &str, mode: u32) -> Self {
        Self { path: path.to_owned(), mode, contents: Contents::Folder }
    }

    /// A file that anyone reads.
    pub(crate) fn text(path: &str, text: String) -> Self {
        Self { path: path.to_owned(), mode: 0o644, contents: Contents::Text(text) }
    }

    /// A copy of a file that anyone reads and, as libraries and loaders are, maps or runs.
    pub(crate) fn file(path: &str, from: PathBuf) -> Self {
        Self { path: path.to_owned(), mode: 0o755, contents: Contents::File(from) }
    }

    /// A copy of a program.
    pub(crate) fn program(path: &str, from: PathBuf) -> Self {
        Self::file(path, from)
    }
}

/// Something that is stored under its digest.
struct Blob {
    media_type: &'static str,
    digest: String,
    bytes: u64,
}

impl Blob {
    fn of(media_type: &'static str, contents: &[u8]) -> Self {
        Self { media_type, digest: hex(&Sha256::digest(contents)), bytes: contents.len() as u64 }
    }

    fn descriptor(&self) -> Value {
        json!({"mediaType": self.media_type, "digest": format!("sha256:{}", self.digest), "size": self.bytes})
    }

    fn path(&self) -> String {
        format!("blobs/sha256/{}", self.digest)
    }
}

/// Writes the image's archive into `folder` and returns its path.
///
/// Layers are stored as they are: the archive is read once, on this machine, and compressing would take longer than that.
///
/// # Errors
/// If a file cannot be read or written.
pub(crate) fn write(folder: &Path, image: &Image) -> Result<PathBuf> {
    let name: String = image.reference.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let path = folder.join(format!("{name}.tar"));
    let out = File::create(&path).with_context(|| format!("failed to create {}", path.display()))?;
    let mut archive = Builder::new(BufWriter::new(out));

    append(&mut archive, "oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let mut layers = Vec::new();
    for (at, entries) in image.layers.iter().enumerate() {
        let scratch = folder.join(format!("{name}.layer{at}"));
        let (blob, mut file) = layer(&scratch, entries)?;
        archive.append_data(&mut header(EntryType::Regular, 0o644, blob.bytes), blob.path(), &mut file)?;
        fs::remove_file(&scratch).with_context(|| format!("failed to remove {}", scratch.display()))?;
        layers.push(blob);
    }
    // The digest of an uncompressed layer is also that of its contents.
    let contents: Vec<String> = layers.iter().map(|l| format!("sha256:{}", l.digest)).collect();
    let config = json!({
        "architecture": architecture(),
        "os": "linux",
        "config": image.config,
        "rootfs": {"type": "layers", "diff_ids": contents},
    });
    let config_text = config.to_string();
    let config = Blob::of("application/vnd.oci.image.config.v1+json", config_text.as_bytes());
    append(&mut archive, &config.path(), 0o644, config_text.as_bytes())?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config.descriptor(),
        "layers": layers.iter().map(Blob::descriptor).collect::<Vec<_>>(),
    });
    let manifest_text = manifest.to_string();
    let manifest = Blob::of("application/vnd.oci.image.manifest.v1+json", manifest_text.as_bytes());
    append(&mut archive, &manifest.path(), 0o644, manifest_text.as_bytes())?;
    let mut named = manifest.descriptor();
    named["annotations"] = json!({"io.containerd.image.name": image.reference});
    let index = json!({"schemaVersion": 2, "manifests": [named]});
    append(&mut archive, "index.json", 0o644, index.to_string().as_bytes())?;

    archive.into_inner()?.flush().with_context(|| format!("failed to write {}", path.display()))?;
    Ok(path)
}

/// Writes a layer to `scratch`; returns what describes it and the file, to be read from its beginning.
fn layer(scratch: &Path, entries: &[Entry]) -> Result<(Blob, File)> {
    let file = File::options().create(true).truncate(true).read(true).write(true).open(scratch);
    let file = file.with_context(|| format!("failed to create {}", scratch.display()))?;
    let mut layer = Builder::new(Hashed { inner: BufWriter::new(file), hash: Sha256::new(), bytes: 0 });
    for entry in entries {
        match &entry.contents {
            Contents::Folder => {
                layer.append_data(&mut header(EntryType::Directory, entry.mode, 0), format!("{}/", entry.path), io::empty())?;
            }
            Contents::Text(text) => append(&mut layer, &entry.path, entry.mode, text.as_bytes())?,
            Contents::File(from) => {
                let file = File::open(from).with_context(|| format!("failed to open {}", from.display()))?;
                let bytes = file.metadata().with_context(|| format!("failed to look at {}", from.display()))?.len();
                // No more than the header says, should the file grow meanwhile.
                layer
                    .append_data(&mut header(EntryType::Regular, entry.mode, bytes), &entry.path, file.take(bytes))
                    .with_context(|| format!("failed to copy {}", from.display()))?;
            }
        }
    }
    let hashed = layer.into_inner()?;
    let blob = Blob { media_type: "application/vnd.oci.image.layer.v1.tar", digest: hex(&hashed.hash.finalize()), bytes: hashed.bytes };
    let mut file = hashed.inner.into_inner().map_err(io::IntoInnerError::into_error).context("failed to write a layer")?;
    file.rewind().context("failed to read a layer back")?;
    Ok((blob, file))
}

fn append(archive: &mut Builder<impl Write>, path: &str, mode: u32, contents: &[u8]) -> Result<()> {
    let mut header = header(EntryType::Regular, mode, contents.len() as u64);
    archive.append_data(&mut header, path, contents).with_context(|| format!("failed to write {path}"))
}

fn header(kind: EntryType, mode: u32, bytes: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(bytes);
    header
}

/// This machine's architecture, as Go calls it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Hashes and counts what passes through.
struct Hashed<W> {
    inner: W,
    hash: Sha256,
    bytes: u64,
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, part: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(part)?;
        self.hash.update(&part[..n]);
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn image(text: &str) -> Image {
        let layer = vec![Entry::folder("tmp", 0o1777), Entry::text("etc/words", text.to_owned())];
        Image { reference: "docker.io/skein/test:dev".into(), layers: vec![layer], config: json!({"User": "1:1"}) }
    }

    /// The archive's files by path.
    fn read_back(name: &str, image: &Image) -> BTreeMap<String, Vec<u8>> {
        let folder = std::env::temp_dir().join(format!("skein-archive-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let path = write(&folder, image).expect("an archive");
        let mut files = BTreeMap::new();
        for entry in tar::Archive::new(File::open(&path).expect("the archive")).entries().expect("entries") {
            let mut entry = entry.expect("an entry");
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).expect("its bytes");
            files.insert(entry.path().expect("its path").to_string_lossy().into_owned(), bytes);
        }
        fs::remove_dir_all(&folder).expect("cleared");
        files
    }

    #[test]
    fn every_descriptor_leads_to_the_bytes_it_describes() {
        let files = read_back("descriptors", &image("hello\n"));
        let parse = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).expect("JSON");
        let follow = |descriptor: &Value| {
            let digest = descriptor["digest"].as_str().expect("a digest").trim_start_matches("sha256:").to_owned();
            let bytes = files[&format!("blobs/sha256/{digest}")].clone();
            assert_eq!(hex(&Sha256::digest(&bytes)), digest);
            assert_eq!(descriptor["size"], bytes.len());
            bytes
        };
        let index = parse(&files["index.json"]);
        assert_eq!(index["manifests"][0]["annotations"]["io.containerd.image.name"], "docker.io/skein/test:dev");
        let manifest = parse(&follow(&index["manifests"][0]));
        let config = parse(&follow(&manifest["config"]));
        assert_eq!(config["config"]["User"], "1:1");
        assert_eq!(config["rootfs"]["diff_ids"][0], manifest["layers"][0]["digest"]);
        let layer = follow(&manifest["layers"][0]);
        let mut layer = tar::Archive::new(&layer[..]);
        let entries: Vec<_> = layer.entries().expect("entries").map(|e| e.expect("an entry").header().clone()).collect();
        assert_eq!(entries[0].mode().expect("a mode"), 0o1777);
        assert_eq!(entries[1].path().expect("a path").to_string_lossy(), "etc/words");
    }

    #[test]
    fn the_same_contents_give_the_same_archive() {
        assert_eq!(read_back("same-a", &image("x")), read_back("same-b", &image("x")));
        assert_ne!(read_back("other-a", &image("x")), read_back("other-b", &image("y")));
    }
}
