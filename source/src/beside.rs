//! The small files beside a model's weights, fetched when they are asked for.

use std::{collections::BTreeMap, path::PathBuf, sync::OnceLock};

use crate::{Cache, SourceError, admission::Admission, digest::Digest, http::Client, layout::Kind, listing::Listed};

/// Files by name.
pub(crate) type Files = BTreeMap<&'static str, Vec<u8>>;

/// Where files are that belong together.
#[derive(Clone, Debug)]
pub(crate) enum Folder {
    Local(PathBuf),
    /// A server that lists nothing; `base` ends with a slash.
    Http {
        base: String,
        admission: Admission,
    },
    /// A store that has listed these files; `base` is for messages and ends with a slash.
    Listed {
        base: String,
        admission: Admission,
        files: Vec<Listed>,
    },
}

/// The small files beside a weight file.
#[derive(Debug)]
pub(crate) struct Beside {
    /// Nothing where all are known, or there are none.
    origin: Option<Origin>,
    kind: Kind,
    /// Without it, no header of safetensors is understood.
    config: OnceLock<Vec<u8>>,
    files: OnceLock<Files>,
}

#[derive(Debug)]
struct Origin {
    client: Client,
    kind: Kind,
    folder: Folder,
    /// Where they are kept: with this weight file, of the source of this name.
    kept: Option<(Cache, Digest, String)>,
}

impl Beside {
    /// No files, or those that are known.
    pub(crate) fn known(kind: Kind, files: Files) -> Self {
        Self { origin: None, kind, config: OnceLock::new(), files: files.into() }
    }

    /// Those of `folder`; `kept` beside a weight file of this digest, for the source of this name.
    pub(crate) fn of(client: Client, folder: Folder, kind: Kind, kept: Option<(Cache, Digest, String)>) -> Self {
        Self { origin: Some(Origin { client, kind, folder, kept }), kind, config: OnceLock::new(), files: OnceLock::new() }
    }

    /// What says what the weights are for; empty where there are no files.
    pub(crate) fn config(&self) -> Result<&[u8], SourceError> {
        if let (None, Some(origin)) = (self.files.get(), &self.origin) {
            if let Some(config) = self.config.get() {
                return Ok(config);
            }
            let config = origin.folder.small(&origin.client, self.kind.config())?.ok_or_else(|| origin.missing())?;
            return Ok(self.config.get_or_init(|| config));
        }
        Ok(self.all()?.get(self.kind.config()).map(Vec::as_slice).unwrap_or_default())
    }

    /// All that become the model card.
    pub(crate) fn all(&self) -> Result<&Files, SourceError> {
        if let Some(files) = self.files.get() {
            return Ok(files);
        }
        let files = self.origin.as_ref().map_or_else(|| Ok(Files::new()), Origin::read)?;
        Ok(self.files.get_or_init(|| files))
    }
}

impl Origin {
    fn read(&self) -> Result<Files, SourceError> {
        if let Some((cache, digest, uri)) = &self.kept
            && let Some(files) = cache.beside(digest, uri, self.kind.beside())?
        {
            return Ok(files);
        }
        let mut files = Files::new();
        for &name in self.kind.beside() {
            if let Some(bytes) = self.folder.small(&self.client, name)? {
                files.insert(name, bytes);
            }
        }
        if !files.contains_key(self.kind.config()) {
            return Err(self.missing());
        }
        if let Some((cache, digest, uri)) = &self.kept {
            cache.keep_beside(digest, uri, &files)?;
        }
        Ok(files)
    }

    /// What is said where there is no configuration.
    fn missing(&self) -> SourceError {
        let config = self.kind.config();
        let place = match &self.folder {
            Folder::Local(path) => path.join(config).display().to_string(),
            Folder::Http { base, .. } | Folder::Listed { base, .. } => format!("{base}{config}"),
        };
        SourceError::NotFound { place }
    }
}

impl Folder {
    /// Names of the files; `None` where a server has no listing.
    pub(crate) fn names(&self) -> Result<Option<Vec<String>>, SourceError> {
        match self {
            Self::Local(path) => {
                let list = || -> std::io::Result<Vec<String>> {
                    std::fs::read_dir(path)?.map(|e| Ok(e?.file_name().to_string_lossy().into_owned())).collect()
                };
                let mut names = list().map_err(|e| SourceError::file("list", path, e))?;
                names.sort();
                Ok(Some(names))
            }
            Self::Http { .. } => Ok(None),
            Self::Listed { files, .. } => Ok(Some(files.iter().map(|f| f.name.clone()).collect())),
        }
    }

    /// The whole of a small file, unless it is not there.
    pub(crate) fn small(&self, client: &Client, name: &str) -> Result<Option<Vec<u8>>, SourceError> {
        let read = match self {
            Self::Local(path) => {
                let path = path.join(name);
                std::fs::read(&path).map_err(|e| SourceError::file("read", path, e))
            }
            Self::Http { base, admission } => client.small(&format!("{base}{name}"), admission).map(|r| r.0),
            Self::Listed { admission, files, .. } => {
                let Some(file) = files.iter().find(|f| f.name == name) else { return Ok(None) };
                client.small(&file.url, admission).map(|r| r.0)
            }
        };
        match read {
            Ok(bytes) => Ok(Some(bytes)),
            Err(SourceError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}
