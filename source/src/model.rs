//! An opened model: its weight files, its header and its card.

use std::{
    ops::Range,
    path::Path,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use plan::{
    adapter::AdapterHeader,
    card::{CardFile, GGUF_HEADER, ModelCard},
    gguf,
    header::{HeaderError, adapter_from_gguf, adapter_from_peft, from_gguf_parts, from_safetensors, take_packed},
    model::{ModelConfig, ModelFile, ModelHeader},
    safetensors,
};

use serde::{Deserialize, Serialize};

use crate::{
    SourceError, SourceOptions,
    beside::Beside,
    layout::Kind,
    open::{Opened, Opener},
    packed::Unpacked,
    place::Place,
    ranges::Ranges,
    split::{self, Rearranged},
};

/// The headers of a model's files as read, before they are understood.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum RawHeader {
    /// A GGUF file, or all parts of one.
    Gguf {
        /// Files and their headers; vocabularies skipped.
        parts: Vec<(ModelFile, gguf::Header)>,
    },
    /// One or more safetensors files, or PyTorch files that list their tensors as those do.
    Safetensors {
        /// `config.json`.
        #[serde(with = "text")]
        config: Vec<u8>,
        /// Files and their headers.
        parts: Vec<(ModelFile, safetensors::Header)>,
    },
}

impl RawHeader {
    /// Whether every tensor lies in its file: what else is said of them is checked when they are understood.
    pub(crate) fn is_whole(&self) -> bool {
        let within = |file: &ModelFile, offset: u64, bytes: u64| offset.checked_add(bytes).is_some_and(|end| end <= file.bytes);
        match self {
            Self::Gguf { parts } => parts.iter().all(|(file, header)| header.tensors.iter().all(|t| within(file, t.offset, t.bytes))),
            Self::Safetensors { parts, .. } => {
                parts.iter().all(|(file, header)| header.tensors.iter().all(|t| within(file, t.offset, t.bytes)))
            }
        }
    }

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

/// Checks that a range lies in a file, and that there is room for it.
fn within(file: &ModelFile, bytes: u64, range: &Range<u64>, into: &[u8]) -> Result<(), SourceError> {
    if range.start > range.end || range.end > bytes {
        return Err(SourceError::Range { name: file.name.clone(), begin: range.start, end: range.end, bytes });
    }
    assert_eq!(into.len() as u64, range.end - range.start, "the buffer has the length of the range");
    Ok(())
}

/// Small files of JSON, written down as text.
mod text {
    use serde::{Deserialize, Deserializer, Serializer, ser::Error};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(std::str::from_utf8(bytes).map_err(S::Error::custom)?)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        String::deserialize(from).map(String::into_bytes)
    }
}

/// A model's files, opened. Reads may come from several threads at once.
#[derive(Debug)]
pub struct Source {
    uri: String,
    weights: Vec<(ModelFile, Place)>,
    /// Small files beside the weights; none for GGUF.
    beside: Beside,
    is_gguf: bool,
    raw: OnceLock<RawHeader>,
    /// Files that there are not, numbered behind the weights: of PyTorch, or of packed matrices.
    rearranged: Vec<Rearranged>,
    unpacked: Option<Unpacked>,
    bytes_read: AtomicU64,
}

impl Source {
    /// Opens the model at `uri`: a path, `file:`, `http(s)://` (a file, or a folder with a trailing slash) or `hf://`.
    ///
    /// A file whose digest is given and in the cache is not looked for anywhere else. What is kept of others is [`SourceOptions::keep`]'s to say.
    ///
    /// # Errors
    /// When the URI has another form, the model is not there, cannot be fetched, or has another digest.
    pub fn open(uri: &str, options: SourceOptions) -> Result<Self, SourceError> {
        Self::open_kind(uri, &options, Kind::Model)
    }

    /// Opens the low-rank adapter at `uri`, as [`Source::open`] does a model: a folder of PEFT, or a GGUF file.
    ///
    /// # Errors
    /// As [`Source::open`].
    pub fn open_adapter(uri: &str, options: SourceOptions) -> Result<Self, SourceError> {
        Self::open_kind(uri, &options, Kind::Adapter)
    }

    fn open_kind(uri: &str, options: &SourceOptions, kind: Kind) -> Result<Self, SourceError> {
        let Opened { weights, beside, is_gguf } = Opener::new(uri, options, kind)?.open()?;
        let (mut raw, mut rearranged) = (OnceLock::new(), Vec::new());
        if !is_gguf && weights.first().is_some_and(|(file, _)| split::is_pytorch_name(&file.name)) {
            // Read at once: numbers of files depend on what is in them.
            let listed = split::list_pytorch(&weights)?;
            let config = beside.config()?.to_vec();
            (raw, rearranged) = (OnceLock::from(RawHeader::Safetensors { config, parts: listed.parts }), listed.rearranged);
        }
        let bytes_read = AtomicU64::new(0);
        let mut source = Self { uri: uri.to_owned(), weights, beside, is_gguf, raw, rearranged, unpacked: None, bytes_read };
        source.unpack(kind)?;
        Ok(source)
    }

    /// Lists packed matrices as blocks, where there are any.
    fn unpack(&mut self, kind: Kind) -> Result<(), SourceError> {
        // Whether files beside the weights are missing is for those to say who need them.
        let packed = |config: &[u8]| String::from_utf8_lossy(config).contains("\"quantization_config\"");
        let safetensors = !self.is_gguf && self.raw.get().is_none() && kind == Kind::Model;
        if !safetensors || !self.beside.config().is_ok_and(packed) {
            return Ok(());
        }
        // Read at once: numbers of files depend on what is in them.
        let RawHeader::Safetensors { config, mut parts } = self.read_safetensors()? else { return Ok(()) };
        let matrices =
            take_packed(&config, &mut parts).map_err(|source| SourceError::Header { place: self.uri.clone(), source: Box::new(source) })?;
        if let Some((file, _)) = parts.get(self.weights.len()) {
            self.unpacked = Some(Unpacked::new(file.clone(), matrices));
        }
        self.raw = OnceLock::from(RawHeader::Safetensors { config, parts });
        Ok(())
    }

    /// The URI it was opened by.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The weight files, as [`ModelHeader::files`] numbers them.
    pub fn files(&self) -> Vec<ModelFile> {
        let others = self.rearranged.iter().map(|r| r.file.clone()).chain(self.unpacked.iter().map(|u| u.file.clone()));
        self.weights.iter().map(|w| w.0.clone()).chain(others).collect()
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
        if let Some(unpacked) = self.unpacked.as_ref().filter(|_| file == self.weights.len()) {
            within(&unpacked.file, unpacked.file.bytes, &range, into)?;
            unpacked.read(&self.weights, &range, into)?;
            self.bytes_read.fetch_add(into.len() as u64, Ordering::Relaxed);
            return Ok(());
        }
        let files = self.weights.len() + self.rearranged.len();
        let rearranged = file.checked_sub(self.weights.len()).and_then(|index| self.rearranged.get(index));
        let base = rearranged.map_or(file, |r| r.base);
        let (model_file, place) = self.weights.get(base).ok_or(SourceError::FileIndex { index: file, files })?;
        let (shown, bytes) = rearranged.map_or((model_file, place.bytes()), |r| (&r.file, r.file.bytes));
        within(shown, bytes, &range, into)?;
        match rearranged {
            Some(rearranged) => rearranged.read(place, &range, into)?,
            None => place.read(&range, into)?,
        }
        self.bytes_read.fetch_add(into.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Whether bytes `range` of weight file `file` lie on this machine as they are read: none of them is fetched or rearranged.
    pub fn is_at_hand(&self, file: usize, range: &Range<u64>) -> bool {
        self.weights.get(file).is_some_and(|(_, place)| place.is_at_hand(range))
    }

    /// Brings ranges of weight files, by number of file, into the cache where it keeps files in part; others are read when they are read.
    ///
    /// There are few requests, since ranges that nearly touch are joined, and several in flight. `report` is told how many of the bytes are
    /// here and how many there are, and says whether to go on.
    ///
    /// # Errors
    /// When something cannot be fetched, or `report` says to stop.
    pub fn fetch(
        &self,
        ranges: impl IntoIterator<Item = (usize, Range<u64>)>,
        report: &(dyn Fn(u64, u64) -> bool + Sync),
    ) -> Result<(), SourceError> {
        let mut wanted = vec![Ranges::default(); self.weights.len()];
        for (file, range) in ranges {
            if let Some(unpacked) = self.unpacked.as_ref().filter(|_| file == self.weights.len()) {
                unpacked.covering(&range).into_iter().for_each(|(file, range)| wanted[file].insert(range));
                continue;
            }
            match file.checked_sub(self.weights.len()).and_then(|index| self.rearranged.get(index)) {
                Some(rearranged) => rearranged.covering(&range).for_each(|range| wanted[rearranged.base].insert(range)),
                None if file < self.weights.len() => wanted[file].insert(range),
                None => return Err(SourceError::FileIndex { index: file, files: self.files().len() }),
            }
        }
        let parts = self.weights.iter().zip(&wanted).filter_map(|((_, place), wanted)| match place {
            Place::Parts(parts) => Some((parts, parts.joined(wanted))),
            Place::Local { .. } | Place::Remote { .. } => None,
        });
        let parts: Vec<_> = parts.collect();
        let total = parts.iter().map(|(_, (joined, _))| joined.bytes()).sum();
        let done = AtomicU64::new(parts.iter().map(|(_, (_, here))| here).sum());
        let came = |bytes: u64| report(done.fetch_add(bytes, Ordering::Relaxed) + bytes, total);
        for (parts, (wanted, _)) in &parts {
            if !came(0) {
                return Err(SourceError::Stopped { place: parts.place() });
            }
            parts.fetch(wanted, &came)?;
        }
        Ok(())
    }

    /// Bytes of files kept in part that came over the network so far.
    pub fn bytes_fetched(&self) -> u64 {
        let of = |place: &Place| if let Place::Parts(parts) = place { parts.fetched() } else { 0 };
        self.weights.iter().map(|(_, place)| of(place)).sum()
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
        Ok(RawHeader::Safetensors { config: self.beside.config()?.to_vec(), parts })
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
        let files = self.beside.all()?.iter().map(|(name, bytes)| CardFile { name: (*name).to_owned(), bytes: bytes.clone() });
        Ok(ModelCard { files: files.collect() })
    }
}
