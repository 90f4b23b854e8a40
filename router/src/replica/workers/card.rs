//! Fetches the model card from a worker.

use std::time::Duration;

use plan::card::{CardFile, ModelCard};
use proto::worker::{CardChunk, CardRequest};
use sha2::{Digest, Sha256};
use tokio::time::timeout;

use super::{ReplicaError, dial::Remote};

/// Longest wait for a chunk. The first comes when the worker has opened the model's files.
const CHUNK: Duration = Duration::from_secs(15);
/// Largest card: a tokenizer is tens of megabytes at most.
const CARD: usize = 512 << 20;

/// All files of the card, checked against their hash.
pub(super) async fn fetch(worker: &Remote) -> Result<ModelCard, ReplicaError> {
    let late = |_| worker.lost(format!("it sent no card within {} ms", CHUNK.as_millis()));
    let mut client = worker.client()?;
    let chunks = timeout(CHUNK, client.card(CardRequest {})).await.map_err(late)?;
    let mut chunks = chunks.map_err(|s| worker.refused(&s))?.into_inner();
    let mut assembly = Assembly::default();
    while let Some(chunk) = timeout(CHUNK, chunks.message()).await.map_err(late)?.map_err(|s| worker.refused(&s))? {
        assembly.add(chunk).map_err(|e| worker.protocol(e))?;
    }
    assembly.finish().map_err(|e| worker.protocol(e))
}

#[derive(Default)]
struct Assembly {
    card: ModelCard,
    bytes: usize,
    hash: Vec<u8>,
}

impl Assembly {
    fn add(&mut self, chunk: CardChunk) -> Result<(), String> {
        self.bytes += chunk.data.len();
        if self.bytes > CARD {
            return Err(format!("its card has more than {CARD} bytes"));
        }
        match self.card.files.last_mut() {
            Some(file) if file.name == chunk.file => file.bytes.extend_from_slice(&chunk.data),
            _ => self.card.files.push(CardFile { name: chunk.file, bytes: chunk.data.to_vec() }),
        }
        self.hash = chunk.hash.to_vec();
        Ok(())
    }

    fn finish(self) -> Result<ModelCard, String> {
        let mut hash = Sha256::new();
        for file in &self.card.files {
            hash.update(file.name.as_bytes());
            hash.update([0]);
            hash.update((file.bytes.len() as u64).to_le_bytes());
            hash.update(&file.bytes);
        }
        if hash.finalize().as_slice() != self.hash {
            return Err("its card does not have the hash it says".into());
        }
        Ok(self.card)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(file: &str, data: &'static [u8], hash: &[u8]) -> CardChunk {
        CardChunk { file: file.into(), data: data.into(), hash: hash.to_vec().into() }
    }

    #[test]
    fn a_card_is_put_together_and_checked() {
        let mut hash = Sha256::new();
        hash.update(b"a\0\x04\0\0\0\0\0\0\0onetb\0\0\0\0\0\0\0\0\0");
        let hash = hash.finalize();
        let card = |parts: &[(&str, &'static [u8])]| {
            let mut assembly = Assembly::default();
            parts.iter().try_for_each(|(file, data)| assembly.add(chunk(file, data, &hash)))?;
            assembly.finish()
        };
        let whole = card(&[("a", b"one"), ("a", b"t"), ("b", b"")]).expect("a card");
        assert_eq!((whole.file("a"), whole.file("b")), (Some(&b"onet"[..]), Some(&b""[..])));
        assert!(card(&[("a", b"one"), ("b", b"")]).is_err());
        assert!(card(&[("a", b"onet")]).is_err());
    }
}
