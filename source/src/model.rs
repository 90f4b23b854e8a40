//! An opened model: its weight files, its header and its card.

use std::{
    collections::BTreeMap,
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use plan::{
    adapter::AdapterHeader,
    card::{CardFile, GGUF_HEADER, ModelCard},
    gguf,
    header::{HeaderError, adapter_from_gguf, adapter_from_peft, from_gguf_parts, from_safetensors},
    model::{ModelConfig, ModelFile, ModelHeader},
    safetensors,
};

use crate::{
    Cache, SourceError, SourceOptions, cache,
    digest::Digest,
    http::{Client, Remote},
    hub::{HubFile, Repository},
    layout::{ADAPTER_PYTORCH, ADAPTER_SINGLE, INDEX, Kind, Layout, PYTORCH_INDEX, SINGLE},
    locate::Location,
    place::Place,
    split::{self, Rearranged},
};

/// The headers of a model's files as read, before they are understood.
#[derive(Clone, Debug)]
pub enum RawHeader {
    /// A GGUF file, or all parts of one.
    Gguf {
        /// Files and their headers; vocabularies skipped.
        parts: Vec<(ModelFile, gguf::Header)>,
    },
    /// One or more safetensors files, or PyTorch files that list their tensors as those do.
    Safetensors {
        /// `config.json`.
        config: Vec<u8>,
        /// Files and their headers.
        parts: Vec<(ModelFile, safetensors::Header)>,
    },
}

impl RawHeader {
    /// The model they describe.
    ///
    /// # Errors
    /// When it is not one that Skein supports.
    pub fn model_header(&self) -> Result<ModelHeader, HeaderError> {
        match self {
            Self::Gguf { parts } => from_gguf_parts(parts),
            Self::Safetensors { config, parts } => from_safetensors(config, parts),
        }
    }

    /// The adapter that they describe, for a model of shape `base`.
    ///
    /// # Errors
    /// When it is not one that Skein supports, or not for such a model.
    pub fn adapter_header(&self, base: &ModelConfig) -> Result<AdapterHeader, HeaderError> {
        match self {
            Self::Gguf { parts } => match parts.as_slice() {
                [(file, header)] => adapter_from_gguf(file.clone(), header, base),
                parts => Err(HeaderError::Field {
                    file: parts.first().map_or_else(String::new, |(file, _)| file.name.clone()),
                    field: "split.count".to_owned(),
                    expected: "an adapter in one file".to_owned(),
                    got: parts.len().to_string(),
                }),
            },
            Self::Safetensors { config, parts } => adapter_from_peft(config, parts, base),
        }
    }
}

/// A model's files, opened. Reads may come from several threads at once.
#[derive(Debug)]
pub struct Source {
    uri: String,
    weights: Vec<(ModelFile, Place)>,
    kind: Kind,
    /// Small files beside the weights; empty for GGUF.
    small: BTreeMap<&'static str, Vec<u8>>,
    is_gguf: bool,
    raw: OnceLock<RawHeader>,
    /// Files that there are not, numbered behind the weights.
    rearranged: Vec<Rearranged>,
    bytes_read: AtomicU64,
}

impl Source {
    /// Opens the model at `uri`: a path, `file:`, `http(s)://` (a file, or a folder with a trailing slash) or `hf://`.
    ///
    /// A file whose digest is given and in the cache is not looked for anywhere else. A remote file with a known digest is downloaded into
    /// the cache first, unless [`SourceOptions::whole`] is off and the digest is not pinned.
    ///
    /// # Errors
    /// When the URI has another form, the model is not there, cannot be fetched, or has another digest.
    pub fn open(uri: &str, options: SourceOptions) -> Result<Self, SourceError> {
        Self::open_kind(uri, options, Kind::Model)
    }

    /// Opens the low-rank adapter at `uri`, as [`Source::open`] does a model: a folder of PEFT, or a GGUF file.
    ///
    /// # Errors
    /// As [`Source::open`].
    pub fn open_adapter(uri: &str, options: SourceOptions) -> Result<Self, SourceError> {
        Self::open_kind(uri, options, Kind::Adapter)
    }

    fn open_kind(uri: &str, options: SourceOptions, kind: Kind) -> Result<Self, SourceError> {
        let location = Location::parse(uri)?;
        let pinned = options.digest.as_deref().map(str::parse::<Digest>).transpose()?;
        let opener = Opener { client: Client::new(&options), cache: options.cache.clone().map(Cache::new), pinned, options, kind };
        let cached = opener.pinned.as_ref().and_then(|d| opener.cache.as_ref()?.blob(d));
        let (weights, small, is_gguf) = opener.open(uri, &location, cached)?;
        if let (Some(digest), Some(cache), false, Location::Http(_) | Location::Hub { .. }) =
            (&opener.pinned, &opener.cache, is_gguf, &location)
        {
            cache.keep_beside(digest, uri, &small)?;
        }
        let (mut raw, mut rearranged) = (OnceLock::new(), Vec::new());
        if !is_gguf && weights.first().is_some_and(|(file, _)| split::is_pytorch_name(&file.name)) {
            // Read at once: numbers of files depend on what is in them.
            let listed = split::list_pytorch(&weights)?;
            let config = small.get(kind.config()).cloned().unwrap_or_default();
            (raw, rearranged) = (OnceLock::from(RawHeader::Safetensors { config, parts: listed.parts }), listed.rearranged);
        }
        Ok(Self { uri: uri.to_owned(), weights, kind, small, is_gguf, raw, rearranged, bytes_read: AtomicU64::new(0) })
    }

    /// The URI it was opened by.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The weight files, as [`ModelHeader::files`] numbers them.
    pub fn files(&self) -> Vec<ModelFile> {
        self.weights.iter().map(|w| w.0.clone()).chain(self.rearranged.iter().map(|r| r.file.clone())).collect()
    }

    /// The path of weight file `file` when it lies on this machine (for mapping it).
    pub fn local_path(&self, file: usize) -> Option<&Path> {
        self.weights.get(file).and_then(|w| w.1.path())
    }

    /// Reads bytes `range` of weight file `file`; `into` has the length of the range.
    ///
    /// # Errors
    /// When the range lies outside the file or the bytes cannot be fetched.
    ///
    /// # Panics
    /// If `into` has another length than `range`.
    pub fn read(&self, file: usize, range: Range<u64>, into: &mut [u8]) -> Result<(), SourceError> {
        let files = self.weights.len() + self.rearranged.len();
        let rearranged = file.checked_sub(self.weights.len()).and_then(|index| self.rearranged.get(index));
        let base = rearranged.map_or(file, |r| r.base);
        let (model_file, place) = self.weights.get(base).ok_or(SourceError::FileIndex { index: file, files })?;
        let (name, bytes) = rearranged.map_or((&model_file.name, place.bytes()), |r| (&r.file.name, r.file.bytes));
        if range.start > range.end || range.end > bytes {
            return Err(SourceError::Range { name: name.clone(), begin: range.start, end: range.end, bytes });
        }
        assert_eq!(into.len() as u64, range.end - range.start, "the buffer has the length of the range");
        match rearranged {
            Some(rearranged) => rearranged.read(place, &range, into)?,
            None => place.read(&range, into)?,
        }
        self.bytes_read.fetch_add(into.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Bytes handed out by [`Source::read`] so far; headers and small files do not count.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// The headers as read; fetched once.
    ///
    /// # Errors
    /// When a header cannot be read or is damaged.
    pub fn raw_header(&self) -> Result<&RawHeader, SourceError> {
        if let Some(raw) = self.raw.get() {
            return Ok(raw);
        }
        let raw = if self.is_gguf { self.read_gguf()? } else { self.read_safetensors()? };
        Ok(self.raw.get_or_init(|| raw))
    }

    fn read_gguf(&self) -> Result<RawHeader, SourceError> {
        let part = |(file, place): &(ModelFile, Place)| {
            let header = gguf::read(&mut *place.stream()?, place.bytes(), gguf::Keep::Short, true)
                .map_err(|source| self.unusable(place, HeaderError::Gguf { file: file.name.clone(), source: Box::new(source) }))?;
            Ok((file.clone(), header))
        };
        Ok(RawHeader::Gguf { parts: self.weights.iter().map(part).collect::<Result<_, SourceError>>()? })
    }

    fn read_safetensors(&self) -> Result<RawHeader, SourceError> {
        let part = |(file, place): &(ModelFile, Place)| {
            let header = safetensors::read(&mut *place.stream()?, place.bytes())
                .map_err(|source| self.unusable(place, HeaderError::Safetensors { file: file.name.clone(), source: Box::new(source) }))?;
            Ok((file.clone(), header))
        };
        let parts = self.weights.iter().map(part).collect::<Result<_, SourceError>>()?;
        Ok(RawHeader::Safetensors { config: self.small.get(self.kind.config()).cloned().unwrap_or_default(), parts })
    }

    fn unusable(&self, place: &Place, source: HeaderError) -> SourceError {
        SourceError::Header { place: place.name(), source: Box::new(source) }
    }

    /// The model's shape and the place of each tensor.
    ///
    /// # Errors
    /// When a header cannot be read, or the model is not one that Skein supports.
    pub fn header(&self) -> Result<ModelHeader, SourceError> {
        self.raw_header()?.model_header().map_err(|source| SourceError::Header { place: self.uri.clone(), source: Box::new(source) })
    }

    /// What the adapter changes of a model of shape `base`, and the place of each tensor.
    ///
    /// # Errors
    /// When a header cannot be read, or the adapter is not one that Skein supports, or not for such a model.
    pub fn adapter_header(&self, base: &ModelConfig) -> Result<AdapterHeader, SourceError> {
        let unusable = |source| SourceError::Adapter { place: self.uri.clone(), source: Box::new(source) };
        self.raw_header()?.adapter_header(base).map_err(unusable)
    }

    /// What a router needs of the model.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn card(&self) -> Result<ModelCard, SourceError> {
        if let (RawHeader::Gguf { parts }, Some((_, place))) = (self.raw_header()?, self.weights.first())
            && let Some((_, header)) = parts.first()
        {
            let end = header.data_offset.min(place.bytes());
            let mut bytes = vec![0; end as usize];
            place.read(&(0..end), &mut bytes)?;
            return Ok(ModelCard { files: vec![CardFile { name: GGUF_HEADER.to_owned(), bytes }] });
        }
        let files = self.small.iter().map(|(name, bytes)| CardFile { name: (*name).to_owned(), bytes: bytes.clone() });
        Ok(ModelCard { files: files.collect() })
    }
}

type Opened = (Vec<(ModelFile, Place)>, BTreeMap<&'static str, Vec<u8>>, bool);

/// Where the files beside a weight file are.
enum Folder<'a> {
    Local(PathBuf),
    Http(String),
    Hub { repository: Repository<'a>, folder: String, files: Vec<HubFile> },
}

struct Opener {
    client: Client,
    cache: Option<Cache>,
    pinned: Option<Digest>,
    options: SourceOptions,
    kind: Kind,
}

impl Opener {
    fn open(&self, uri: &str, location: &Location, cached: Option<PathBuf>) -> Result<Opened, SourceError> {
        if let Some(path) = cached {
            let place = Place::local(&path)?;
            if is_gguf(&place)? {
                return Ok((vec![(ModelFile { name: location.name(), bytes: place.bytes() }, place)], BTreeMap::new(), true));
            }
            let beside = self.cache.as_ref().zip(self.pinned.as_ref()).map(|(cache, digest)| cache.beside(digest, uri, self.kind.beside()));
            if let Some(small) = beside.transpose()?.flatten() {
                let name = match self.kind {
                    Kind::Model => location.name(),
                    // The folder's name says nothing of the form.
                    Kind::Adapter if begins_with(&place, b"PK")? => ADAPTER_PYTORCH.to_owned(),
                    Kind::Adapter => ADAPTER_SINGLE.to_owned(),
                };
                return Ok((vec![(ModelFile { name, bytes: place.bytes() }, place)], small, false));
            }
        }
        match location {
            Location::Path(path) if path.is_dir() => self.folder(uri, &Folder::Local(path.clone())),
            Location::Path(path) => {
                let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
                self.single(&Folder::Local(parent.to_owned()), &location.name())
            }
            Location::Http(url) if url.ends_with('/') => self.folder(uri, &Folder::Http(url.clone())),
            Location::Http(url) => {
                let name = location.name();
                let base = url.rfind('/').map_or("", |i| &url[..=i]);
                // The name is looked up in the folder again, so a query string stays with it.
                let own = &url[base.len()..];
                self.single(&Folder::Http(base.to_owned()), if own.is_empty() { &name } else { own })
            }
            Location::Hub { repo, revision, file } => {
                let repository = Repository { client: &self.client, options: &self.options, repo, revision };
                let (folder, name) = match file.as_deref().map(|f| f.rsplit_once('/').unwrap_or(("", f))) {
                    Some((folder, name)) => (folder.to_owned(), Some(name.to_owned())),
                    None => (String::new(), None),
                };
                let files = repository.list(&folder)?;
                let listed = file.as_ref().is_some_and(|f| files.iter().any(|h| h.path == *f));
                match (name, file) {
                    (Some(name), _) if listed => self.single(&Folder::Hub { repository, folder, files }, &name),
                    (_, Some(folder)) => {
                        let files = repository.list(folder)?;
                        self.folder(uri, &Folder::Hub { repository, folder: folder.clone(), files })
                    }
                    _ => self.folder(uri, &Folder::Hub { repository, folder, files }),
                }
            }
        }
    }

    /// Opens the model in a folder.
    fn folder(&self, uri: &str, folder: &Folder<'_>) -> Result<Opened, SourceError> {
        let no_model = |problem| SourceError::NoModel { folder: uri.to_owned(), problem };
        let layout = match self.names(folder)? {
            Some(names) => Layout::find(&names, self.kind).map_err(no_model)?,
            // A server that lists nothing is asked for the one and, without an answer, for the other.
            None if self.kind == Kind::Adapter => {
                return match self.single(folder, ADAPTER_SINGLE) {
                    Err(SourceError::NotFound { .. }) => self.single(folder, ADAPTER_PYTORCH),
                    opened => opened,
                };
            }
            None if self.small(folder, INDEX)?.is_some() => Layout::Index(INDEX.to_owned()),
            None if self.small(folder, PYTORCH_INDEX)?.is_some() => Layout::Index(PYTORCH_INDEX.to_owned()),
            None => Layout::Single(SINGLE.to_owned()),
        };
        let index = match layout {
            Layout::Gguf(name) | Layout::Single(name) | Layout::Pytorch(name) => return self.single(folder, &name),
            Layout::Index(name) => name,
        };
        if self.pinned.is_some() {
            return Err(no_model("a digest pins one weight file, the model has several".to_owned()));
        }
        let json = self.small(folder, &index)?.ok_or_else(|| no_model(format!("{index} is missing")))?;
        let unusable = |source| HeaderError::Safetensors { file: index.clone(), source: Box::new(source) };
        let index =
            safetensors::Index::parse(&json).map_err(|e| SourceError::Header { place: uri.to_owned(), source: Box::new(unusable(e)) })?;
        let open = |name: String| {
            let place = self.place(folder, &name)?;
            Ok((ModelFile { name, bytes: place.bytes() }, place))
        };
        let weights = index.files().into_iter().map(open).collect::<Result<Vec<_>, SourceError>>()?;
        Ok((weights, self.card_files(folder)?, false))
    }

    /// Opens a model in one file.
    fn single(&self, folder: &Folder<'_>, name: &str) -> Result<Opened, SourceError> {
        let place = self.place(folder, name)?;
        let file = ModelFile { name: name.split(['?', '#']).next().unwrap_or(name).to_owned(), bytes: place.bytes() };
        let is_gguf = is_gguf(&place)? || !(file.name.ends_with(".safetensors") || split::is_pytorch_name(&file.name));
        let small = if is_gguf { BTreeMap::new() } else { self.card_files(folder)? };
        let Some(names) = split::gguf_parts(name).filter(|names| is_gguf && names.len() > 1) else {
            return Ok((vec![(file, place)], small, is_gguf));
        };
        if self.pinned.is_some() {
            let problem = "a digest pins one weight file, the model has several".to_owned();
            return Err(SourceError::NoModel { folder: name.to_owned(), problem });
        }
        let part = |name: String| {
            let place = self.place(folder, &name)?;
            Ok((ModelFile { name, bytes: place.bytes() }, place))
        };
        Ok((names.into_iter().map(part).collect::<Result<_, SourceError>>()?, small, true))
    }

    fn card_files(&self, folder: &Folder<'_>) -> Result<BTreeMap<&'static str, Vec<u8>>, SourceError> {
        let mut files = BTreeMap::new();
        for &name in self.kind.beside() {
            if let Some(bytes) = self.small(folder, name)? {
                files.insert(name, bytes);
            }
        }
        let config = self.kind.config();
        if files.contains_key(config) {
            return Ok(files);
        }
        let place = match folder {
            Folder::Local(path) => path.join(config).display().to_string(),
            Folder::Http(base) => format!("{base}{config}"),
            Folder::Hub { repository, folder, .. } => repository.url(&join(folder, config)),
        };
        Err(SourceError::NotFound { place })
    }

    /// Names of the files in a folder; `None` where a server has no listing.
    fn names(&self, folder: &Folder<'_>) -> Result<Option<Vec<String>>, SourceError> {
        match folder {
            Folder::Local(path) => {
                let list = || -> std::io::Result<Vec<String>> {
                    std::fs::read_dir(path)?.map(|e| Ok(e?.file_name().to_string_lossy().into_owned())).collect()
                };
                let mut names = list().map_err(|e| SourceError::file("list", path, e))?;
                names.sort();
                Ok(Some(names))
            }
            Folder::Http(_) => Ok(None),
            Folder::Hub { files, .. } => Ok(Some(files.iter().map(|f| f.path.rsplit('/').next().unwrap_or(&f.path).to_owned()).collect())),
        }
    }

    /// The whole of a small file, unless it is not there.
    fn small(&self, folder: &Folder<'_>, name: &str) -> Result<Option<Vec<u8>>, SourceError> {
        let read = match folder {
            Folder::Local(path) => {
                let path = path.join(name);
                std::fs::read(&path).map_err(|e| SourceError::file("read", path, e))
            }
            Folder::Http(base) => self.client.small(&format!("{base}{name}"), None).map(|r| r.0),
            Folder::Hub { repository, folder, files } => {
                let path = join(folder, name);
                if !files.iter().any(|f| f.path == path) {
                    return Ok(None);
                }
                self.client.small(&repository.url(&path), self.options.token.as_deref()).map(|r| r.0)
            }
        };
        match read {
            Ok(bytes) => Ok(Some(bytes)),
            Err(SourceError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Opens a weight file, downloading it first where it has to be.
    fn place(&self, folder: &Folder<'_>, name: &str) -> Result<Place, SourceError> {
        match folder {
            Folder::Local(path) => {
                let place = Place::local(&path.join(name))?;
                if let (Some(digest), Some(path)) = (&self.pinned, place.path()) {
                    match &self.cache {
                        Some(cache) => cache.check_file(path, digest)?,
                        None => cache::check_file(path, digest)?,
                    }
                }
                Ok(place)
            }
            Folder::Http(base) => self.remote(name, &format!("{base}{name}"), None, None),
            Folder::Hub { repository, folder, files } => {
                let path = join(folder, name);
                let listed = files.iter().find(|f| f.path == path).and_then(|f| f.digest.clone());
                self.remote(name, &repository.url(&path), self.options.token.as_deref(), listed)
            }
        }
    }

    fn remote(&self, name: &str, url: &str, token: Option<&str>, listed: Option<Digest>) -> Result<Place, SourceError> {
        if let (Some(pinned), Some(listed)) = (&self.pinned, &listed)
            && pinned != listed
        {
            let (expected, got) = (pinned.hex().to_owned(), listed.hex().to_owned());
            return Err(SourceError::DigestMismatch { place: url.to_owned(), expected, got });
        }
        let digest = self.pinned.clone().or(listed.filter(|_| self.options.whole && self.cache.is_some()));
        if let (Some(digest), Some(cache)) = (&digest, &self.cache)
            && let Some(path) = cache.blob(digest)
        {
            return Place::local(&path);
        }
        let remote: Remote = self.client.probe(name, url, token)?;
        if let (None, true, Some(bytes)) = (&digest, remote.has_ranges(), remote.bytes()) {
            return Ok(Place::Remote { remote, bytes });
        }
        let cache = self.cache.as_ref().ok_or_else(|| SourceError::NoCache { place: url.to_owned() })?;
        Place::local(&cache.fetch(&remote, digest.as_ref(), &self.options)?)
    }
}

fn join(folder: &str, name: &str) -> String {
    if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") }
}

/// Whether a file begins as GGUF does.
fn is_gguf(place: &Place) -> Result<bool, SourceError> {
    begins_with(place, b"GGUF")
}

fn begins_with<const N: usize>(place: &Place, magic: &[u8; N]) -> Result<bool, SourceError> {
    if place.bytes() < N as u64 {
        return Ok(false);
    }
    let mut begin = [0; N];
    place.read(&(0..N as u64), &mut begin)?;
    Ok(&begin == magic)
}
