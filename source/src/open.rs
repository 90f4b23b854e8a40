//! Finds a model's files, and opens them in the way that they are to be kept.

use std::path::Path;

use plan::{header::HeaderError, model::ModelFile, safetensors};
use tracing::warn;

use crate::{
    Cache, Credentials, Keep, SourceError, SourceOptions,
    admission::Admission,
    beside::{Beside, Files, Folder},
    bucket::Bucket,
    cache,
    digest::Digest,
    http::{Client, Locator, Remote},
    hub::Repository,
    layout::{ADAPTER_PYTORCH, ADAPTER_SINGLE, INDEX, Kind, Layout, PYTORCH_INDEX, SINGLE},
    listing::Store,
    locate::{Location, Stored},
    parts::Parts,
    place::Place,
    registry::Artifact,
    split,
};

/// A model's files.
pub(crate) struct Opened {
    pub(crate) weights: Vec<(ModelFile, Place)>,
    pub(crate) beside: Beside,
    pub(crate) is_gguf: bool,
}

pub(crate) struct Opener<'a> {
    uri: &'a str,
    client: Client,
    cache: Option<Cache>,
    pinned: Option<Digest>,
    options: &'a SourceOptions,
    kind: Kind,
}

impl<'a> Opener<'a> {
    pub(crate) fn new(uri: &'a str, options: &'a SourceOptions, kind: Kind) -> Result<Self, SourceError> {
        let pinned = options.digest.as_deref().map(str::parse::<Digest>).transpose()?;
        Ok(Self { uri, client: Client::new(options), cache: options.cache.clone().map(Cache::new), pinned, options, kind })
    }

    pub(crate) fn open(&self) -> Result<Opened, SourceError> {
        let location = Location::parse(self.uri)?;
        if let Some(opened) = self.kept(&location)? {
            return Ok(opened);
        }
        match &location {
            Location::Path(path) if path.is_dir() => self.folder(Folder::Local(path.clone())),
            Location::Path(path) => {
                let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
                self.single(Folder::Local(parent.to_owned()), &location.name())
            }
            Location::Http(url) if url.ends_with('/') => self.folder(self.http(url)?),
            Location::Http(url) => {
                let name = location.name();
                let (base, own) = base(url);
                // The name is looked up in the folder again, so a query string stays with it.
                self.single(self.http(base)?, if own.is_empty() { &name } else { own })
            }
            Location::Stored(stored) => {
                let (store, path) = self.store(stored)?;
                self.listed(store.as_ref(), path)
            }
        }
    }

    /// The store in which a listed source is, and the file or folder in it.
    fn store<'s>(&self, stored: &'s Stored) -> Result<(Box<dyn Store>, &'s str), SourceError> {
        let own = self.options.credentials.as_ref();
        match stored {
            Stored::Hub { repo, revision, file } => {
                let token = self.options.token.as_deref().filter(|_| own.is_none()).map(Credentials::bearer).transpose()?;
                let repository = Repository {
                    hub: self.options.hub.trim_end_matches('/').to_owned(),
                    admission: Admission::header(own.or(token.as_ref()))?,
                    repo: repo.clone(),
                    revision: revision.clone(),
                };
                Ok((Box::new(repository), file.as_deref().unwrap_or_default()))
            }
            Stored::Bucket { provider, bucket, key } => Ok((Box::new(Bucket::new(*provider, bucket, self.options)?), key)),
            Stored::Artifact { registry, repository, reference, file } => {
                Ok((Box::new(Artifact::new(registry, repository, reference, own)?), file.as_deref().unwrap_or_default()))
            }
        }
    }

    /// Opens what is at `path` of a store: a file, else a folder.
    fn listed(&self, store: &dyn Store, path: &str) -> Result<Opened, SourceError> {
        let of = |folder: &str| {
            let (base, admission) = (store.place(folder), store.admission().clone());
            Ok::<_, SourceError>(Folder::Listed { base, admission, files: store.list(&self.client, folder)? })
        };
        if let Some(folder) = path.strip_suffix('/').or(path.is_empty().then_some("")) {
            return self.folder(of(folder)?);
        }
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
        let around = of(folder)?;
        if around.names()?.is_some_and(|names| names.iter().any(|n| n == name)) {
            self.single(around, name)
        } else {
            self.folder(of(path)?)
        }
    }

    /// A folder on a server. The hub's token is for the hub.
    fn http(&self, base: &str) -> Result<Folder, SourceError> {
        Ok(Folder::Http { base: base.to_owned(), admission: Admission::header(self.options.credentials.as_ref())? })
    }

    /// The model whose one weight file is pinned and in the cache, whole or in part: then its source is not asked.
    fn kept(&self, location: &Location) -> Result<Option<Opened>, SourceError> {
        let (Some(cache), Some(digest)) = (&self.cache, &self.pinned) else { return Ok(None) };
        let place = match cache.blob(digest) {
            Some(path) => Some(Place::local(&path)?),
            None if self.options.keep == Keep::Parts => self.kept_part(location, cache, digest)?.map(|parts| Place::Parts(Box::new(parts))),
            None => None,
        };
        let Some(place) = place else { return Ok(None) };
        let file = ModelFile { name: location.name(), bytes: place.bytes() };
        if is_gguf(&place)? {
            return Ok(Some(Opened { weights: vec![(file, place)], beside: Beside::known(self.kind, Files::new()), is_gguf: true }));
        }
        let Some(files) = cache.beside(digest, self.uri, self.kind.beside())? else { return Ok(None) };
        let name = match self.kind {
            Kind::Model => file.name,
            // The folder's name says nothing of the form.
            Kind::Adapter if begins_with(&place, b"PK")? => ADAPTER_PYTORCH.to_owned(),
            Kind::Adapter => ADAPTER_SINGLE.to_owned(),
        };
        let file = ModelFile { name, bytes: file.bytes };
        Ok(Some(Opened { weights: vec![(file, place)], beside: Beside::known(self.kind, files), is_gguf: false }))
    }

    /// The pinned file of which the cache has a part, which it only has where the source had said that this is its digest.
    fn kept_part(&self, location: &Location, cache: &Cache, digest: &Digest) -> Result<Option<Parts>, SourceError> {
        let name = location.name();
        if split::gguf_parts(&name).is_some_and(|names| names.len() > 1) {
            return Ok(None);
        }
        let locator = match location {
            Location::Path(_) => return Ok(None),
            Location::Http(url) if url.ends_with('/') => return Ok(None),
            Location::Http(url) => self.client.locator(&name, url, &Admission::header(self.options.credentials.as_ref())?),
            Location::Stored(stored) => {
                let (store, path) = self.store(stored)?;
                if !path.contains('.') || path.ends_with('/') {
                    return Ok(None);
                }
                self.client.locator(&name, &store.url(path, digest), store.admission())
            }
        };
        cache.part(digest, locator)
    }

    /// Opens the model in a folder.
    fn folder(&self, folder: Folder) -> Result<Opened, SourceError> {
        let no_model = |problem| SourceError::NoModel { folder: self.uri.to_owned(), problem };
        let layout = match folder.names()? {
            Some(names) => Layout::find(&names, self.kind).map_err(no_model)?,
            // A server that lists nothing is asked for the one and, without an answer, for the other.
            None if self.kind == Kind::Adapter => {
                return match self.single(folder.clone(), ADAPTER_SINGLE) {
                    Err(SourceError::NotFound { .. }) => self.single(folder, ADAPTER_PYTORCH),
                    opened => opened,
                };
            }
            None if folder.small(&self.client, INDEX)?.is_some() => Layout::Index(INDEX.to_owned()),
            None if folder.small(&self.client, PYTORCH_INDEX)?.is_some() => Layout::Index(PYTORCH_INDEX.to_owned()),
            None => Layout::Single(SINGLE.to_owned()),
        };
        let index = match layout {
            Layout::Gguf(name) | Layout::Single(name) | Layout::Pytorch(name) => return self.single(folder, &name),
            Layout::Index(name) => name,
        };
        if self.pinned.is_some() {
            return Err(no_model("a digest pins one weight file, the model has several".to_owned()));
        }
        let json = folder.small(&self.client, &index)?.ok_or_else(|| no_model(format!("{index} is missing")))?;
        let unusable = |source| HeaderError::Safetensors { file: index.clone(), source: Box::new(source) };
        let index = safetensors::Index::parse(&json)
            .map_err(|e| SourceError::Header { place: self.uri.to_owned(), source: Box::new(unusable(e)) })?;
        let open = |name: String| {
            let place = self.place(&folder, &name)?;
            Ok((ModelFile { name, bytes: place.bytes() }, place))
        };
        let weights = index.files().into_iter().map(open).collect::<Result<Vec<_>, SourceError>>()?;
        Ok(Opened { weights, beside: self.beside(folder)?, is_gguf: false })
    }

    /// Opens a model in one file.
    fn single(&self, folder: Folder, name: &str) -> Result<Opened, SourceError> {
        let place = self.place(&folder, name)?;
        let file = ModelFile { name: name.split(['?', '#']).next().unwrap_or(name).to_owned(), bytes: place.bytes() };
        let is_gguf = is_gguf(&place)? || !(file.name.ends_with(".safetensors") || split::is_pytorch_name(&file.name));
        let names = split::gguf_parts(name).filter(|names| is_gguf && names.len() > 1);
        let weights = match names {
            None => vec![(file, place)],
            Some(_) if self.pinned.is_some() => {
                let problem = "a digest pins one weight file, the model has several".to_owned();
                return Err(SourceError::NoModel { folder: name.to_owned(), problem });
            }
            Some(names) => {
                let part = |name: String| {
                    let place = self.place(&folder, &name)?;
                    Ok((ModelFile { name, bytes: place.bytes() }, place))
                };
                names.into_iter().map(part).collect::<Result<_, SourceError>>()?
            }
        };
        let beside = if is_gguf { Beside::known(self.kind, Files::new()) } else { self.beside(folder)? };
        Ok(Opened { weights, beside, is_gguf })
    }

    /// The small files: read at once where a person waits for them, when they are asked for where many processes read the same model.
    fn beside(&self, folder: Folder) -> Result<Beside, SourceError> {
        let remote = !matches!(folder, Folder::Local(_));
        let kept = self.cache.clone().zip(self.pinned.clone()).filter(|_| remote);
        let kept = kept.map(|(cache, digest)| (cache, digest, self.uri.to_owned()));
        let beside = Beside::of(self.client.clone(), folder, self.kind, kept);
        match self.options.keep {
            Keep::Whole => drop(beside.all()?),
            Keep::Nothing => drop(beside.config()?),
            Keep::Parts => {}
        }
        Ok(beside)
    }

    /// Opens a weight file, downloading it first where it has to be.
    fn place(&self, folder: &Folder, name: &str) -> Result<Place, SourceError> {
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
            Folder::Http { base, admission } => self.remote(&self.client.locator(name, &format!("{base}{name}"), admission), None),
            Folder::Listed { base, admission, files } => {
                let missing = || SourceError::NotFound { place: format!("{base}{name}") };
                let file = files.iter().find(|f| f.name == name).ok_or_else(missing)?;
                self.remote(&self.client.locator(name, &file.url, admission), file.digest.clone())
            }
        }
    }

    /// A file on a server, of the digest `listed` as a hub says.
    fn remote(&self, locator: &Locator, listed: Option<Digest>) -> Result<Place, SourceError> {
        if let (Some(pinned), Some(listed)) = (&self.pinned, &listed)
            && pinned != listed
        {
            let (expected, got) = (pinned.hex().to_owned(), listed.hex().to_owned());
            return Err(SourceError::DigestMismatch { place: locator.url().to_owned(), expected, got });
        }
        let known = self.pinned.as_ref().or(listed.as_ref().filter(|_| self.options.keep != Keep::Nothing));
        if let (Some(digest), Some(cache)) = (known, &self.cache)
            && let Some(path) = cache.blob(digest)
        {
            return Place::local(&path);
        }
        let remote = locator.probe()?;
        let bytes = remote.bytes().filter(|_| remote.has_ranges());
        match (self.options.keep, bytes, &self.cache) {
            (Keep::Parts, Some(bytes), Some(cache)) if self.pinned.is_none() || listed.is_some() || self.is_vouched(&remote) => {
                return Ok(Place::Parts(Box::new(cache.parts(&remote, bytes, known)?)));
            }
            (Keep::Nothing, Some(bytes), _) if self.pinned.is_none() => return Ok(Place::Remote { remote, bytes }),
            (Keep::Whole, Some(bytes), _) if known.is_none() || (self.pinned.is_none() && self.cache.is_none()) => {
                return Ok(Place::Remote { remote, bytes });
            }
            (Keep::Parts, Some(bytes), None) if self.pinned.is_none() => return Ok(Place::Remote { remote, bytes }),
            (Keep::Parts, None, _) => warn!(place = locator.url(), "the server sends no ranges: the whole file is downloaded"),
            (Keep::Parts, Some(_), _) => {
                warn!(place = locator.url(), "the server does not say which digest the file has: it is downloaded whole to be checked");
            }
            _ => {}
        }
        let cache = self.cache.as_ref().ok_or_else(|| SourceError::NoCache { place: locator.url().to_owned() })?;
        Place::local(&cache.fetch(&remote, known, self.options)?)
    }

    /// Whether a server itself says that its file has the digest that is pinned.
    fn is_vouched(&self, remote: &Remote) -> bool {
        self.pinned.as_ref().is_some_and(|digest| remote.vouches(digest))
    }
}

/// A URL up to the last slash, and what follows.
fn base(url: &str) -> (&str, &str) {
    url.split_at(url.rfind('/').map_or(0, |i| i + 1))
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
