//! Models in several files, and files whose tensors lie otherwise than row by row.

use std::{
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use plan::{header::HeaderError, model::ModelFile, pytorch, safetensors};

use crate::{SourceError, place::Place};

/// Names of all parts of a split GGUF file, if `name` is that of one: `<stem>-00001-of-00003.gguf`.
pub(crate) fn gguf_parts(name: &str) -> Option<Vec<String>> {
    let stem = name.strip_suffix(".gguf")?;
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let digits = |s: &str| if s.len() == 5 { s.parse::<usize>().ok() } else { None };
    let (number, count) = (digits(number)?, digits(count)?);
    ((1..=count).contains(&number) && count <= 1000).then(|| (1..=count).map(|i| format!("{stem}-{i:05}-of-{count:05}.gguf")).collect())
}

/// Whether a file with this name is one of PyTorch's.
pub(crate) fn is_pytorch_name(name: &str) -> bool {
    [".bin", ".pt", ".pth"].iter().any(|end| name.ends_with(end))
}

/// The tensors of PyTorch files as safetensors files list theirs, and the tensors that have to be put in order when they are read.
pub(crate) struct Listed {
    pub(crate) parts: Vec<(ModelFile, safetensors::Header)>,
    pub(crate) rearranged: Vec<Rearranged>,
}

/// Reads what PyTorch files hold.
pub(crate) fn list_pytorch(weights: &[(ModelFile, Place)]) -> Result<Listed, SourceError> {
    let mut listed = Listed { parts: Vec::new(), rearranged: Vec::new() };
    let mut ordered = Vec::new();
    for (base, (file, place)) in weights.iter().enumerate() {
        let mut read = |at: u64, into: &mut [u8]| {
            let range = at..at.saturating_add(into.len() as u64);
            if range.end > place.bytes() {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            place.read(&range, into).map_err(std::io::Error::other)
        };
        let tensors = pytorch::read(&mut read, place.bytes()).map_err(|source| SourceError::Header {
            place: place.name(),
            source: Box::new(HeaderError::Pytorch { file: file.name.clone(), source: Box::new(source) }),
        })?;
        let (mut header, mut other) = (safetensors::Header::default(), Rearranged::new(base, file));
        let mut turned = safetensors::Header::default();
        for tensor in tensors {
            if tensor.is_contiguous() {
                header.tensors.push(tensor.listed(tensor.offset));
            } else {
                turned.tensors.push(tensor.listed(other.file.bytes));
                other.push(tensor);
            }
        }
        listed.parts.push((file.clone(), header));
        if !turned.tensors.is_empty() {
            ordered.push((other.file.clone(), turned));
            listed.rearranged.push(other);
        }
    }
    // Behind the files there are: numbers of files stay what they are.
    listed.parts.append(&mut ordered);
    Ok(listed)
}

/// A file that there is not: tensors of a file that lie otherwise than row by row, one after the other, row by row.
#[derive(Debug)]
pub(crate) struct Rearranged {
    pub(crate) file: ModelFile,
    /// The file that there is.
    pub(crate) base: usize,
    /// Where each begins here.
    tensors: Vec<(u64, pytorch::Tensor)>,
    /// What the tensor read last covers, since it is read in pieces.
    last: Mutex<Option<(usize, Arc<Vec<u8>>)>>,
}

impl Rearranged {
    fn new(base: usize, file: &ModelFile) -> Self {
        let file = ModelFile { name: format!("{} (put in order)", file.name), bytes: 0 };
        Self { file, base, tensors: Vec::new(), last: Mutex::new(None) }
    }

    fn push(&mut self, tensor: pytorch::Tensor) {
        let bytes = tensor.elements() * tensor.element;
        self.tensors.push((self.file.bytes, tensor));
        self.file.bytes += bytes;
    }

    /// Reads bytes `range`, which lie within, from `base`.
    pub(crate) fn read(&self, base: &Place, range: &Range<u64>, into: &mut [u8]) -> Result<(), SourceError> {
        for (index, (begin, tensor)) in self.tensors.iter().enumerate() {
            let end = begin + tensor.elements() * tensor.element;
            let part = range.start.max(*begin)..range.end.min(end);
            if part.start >= part.end {
                continue;
            }
            let covered = self.covered(base, index, tensor)?;
            let out = &mut into[(part.start - range.start) as usize..(part.end - range.start) as usize];
            gather(tensor, &covered, part.start - begin, out);
        }
        Ok(())
    }

    /// The ranges of the file that there is which hold bytes `range`.
    pub(crate) fn covering(&self, range: &Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let touched = self.tensors.iter().filter(|(begin, t)| *begin < range.end && range.start < begin + t.elements() * t.element);
        touched.map(|(_, tensor)| tensor.offset..tensor.offset + tensor.span() * tensor.element)
    }

    /// The bytes from a tensor's first element to its last.
    fn covered(&self, base: &Place, index: usize, tensor: &pytorch::Tensor) -> Result<Arc<Vec<u8>>, SourceError> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, bytes)) = last.as_ref().filter(|(of, _)| *of == index) {
            return Ok(bytes.clone());
        }
        let len = tensor.span() * tensor.element;
        let mut bytes = vec![0; len as usize];
        base.read(&(tensor.offset..tensor.offset + len), &mut bytes)?;
        let bytes = Arc::new(bytes);
        *last = Some((index, bytes.clone()));
        Ok(bytes)
    }
}

/// Copies a tensor's bytes from byte `from` of its row-major form on.
fn gather(tensor: &pytorch::Tensor, covered: &[u8], from: u64, out: &mut [u8]) {
    let width = tensor.element;
    for (i, out) in out.iter_mut().enumerate() {
        let at = from + i as u64;
        let mut element = at / width;
        let mut place = 0;
        for (extent, stride) in tensor.shape.iter().zip(&tensor.strides).rev() {
            place += element % extent * stride;
            element /= extent;
        }
        *out = covered[(place * width + at % width) as usize];
    }
}

#[cfg(test)]
mod tests {
    use plan::{model::ModelFile, pytorch::Tensor};

    use super::{Rearranged, gguf_parts};
    use crate::place::Place;

    #[test]
    fn turned_tensors_are_read_row_by_row() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.bin");
        let values: Vec<u8> = (0..24_u16).flat_map(u16::to_le_bytes).collect();
        std::fs::write(&path, [&[9; 6][..], &values].concat()).unwrap();
        let tensor = |shape: &[u64], strides: &[u64], first: u64| Tensor {
            name: "w".into(),
            dtype: "F16",
            element: 2,
            shape: shape.to_vec(),
            strides: strides.to_vec(),
            offset: 6 + 2 * first,
            entry_offset: 0,
        };
        let mut file = Rearranged::new(0, &ModelFile { name: "t.bin".into(), bytes: 54 });
        file.push(tensor(&[4, 6], &[1, 4], 0));
        file.push(tensor(&[2, 3], &[12, 2], 1));
        let expected: Vec<u8> = (0..4_u16)
            .flat_map(|r| (0..6).map(move |c| r + 4 * c))
            .chain((0..2_u16).flat_map(|r| (0..3).map(move |c| 1 + 12 * r + 2 * c)))
            .flat_map(u16::to_le_bytes)
            .collect();
        assert_eq!(file.file.bytes, 60);
        let place = Place::local(&path).unwrap();
        for range in [0..60, 12..24, 13..15, 40..55, 48..60, 59..60, 7..7] {
            let mut got = vec![0; (range.end - range.start) as usize];
            file.read(&place, &range, &mut got).unwrap();
            assert_eq!(got, expected[range.start as usize..range.end as usize], "{range:?}");
        }
    }

    #[test]
    fn parts_of_a_split_file() {
        let names = ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf"].map(str::to_owned);
        assert_eq!(gguf_parts("m-00002-of-00003.gguf").as_deref(), Some(&names[..]));
        for name in
            ["m.gguf", "m-00004-of-00003.gguf", "m-00000-of-00003.gguf", "m-1-of-3.gguf", "m-00001-of-00003.bin", "m-00001-of-99999.gguf"]
        {
            assert_eq!(gguf_parts(name), None, "{name}");
        }
    }
}
