//! The files a router needs to tokenize for the model.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use plan::card::ModelCard;
use proto::worker::CardChunk;
use sha2::{Digest, Sha256};
use source::Source;
use tokio::time::timeout;
use tonic::Status;

use crate::{failure::chain, state::Worker};

/// Bytes of a chunk.
const CHUNK: usize = 1 << 20;
/// How long the model's files may take to be opened (downloaded, perhaps) before a router is told to ask again.
const OPENING: Duration = Duration::from_secs(10);

/// The card in chunks: each file has at least one.
pub(crate) async fn chunks(worker: &Worker) -> Result<Vec<CardChunk>, Status> {
    let source = opened(worker).await.ok_or_else(|| Status::unavailable("the model's files are not open yet"))?;
    let card = tokio::task::spawn_blocking(move || source.card()).await.map_err(|e| Status::internal(e.to_string()))?;
    Ok(split(card.map_err(|e| Status::internal(chain(&e)))?))
}

async fn opened(worker: &Worker) -> Option<Arc<Source>> {
    let mut source = worker.loading.source.subscribe();
    timeout(OPENING, source.wait_for(Option::is_some)).await.ok()?.ok()?.clone()
}

fn split(card: ModelCard) -> Vec<CardChunk> {
    let mut hash = Sha256::new();
    for file in &card.files {
        hash.update(file.name.as_bytes());
        hash.update([0]);
        hash.update((file.bytes.len() as u64).to_le_bytes());
        hash.update(&file.bytes);
    }
    let hash = Bytes::copy_from_slice(&hash.finalize());
    let mut chunks = Vec::new();
    for file in card.files {
        let bytes = Bytes::from(file.bytes);
        let mut first = 0;
        loop {
            let end = bytes.len().min(first + CHUNK);
            chunks.push(CardChunk { file: file.name.clone(), data: bytes.slice(first..end), hash: hash.clone() });
            first = end;
            if first == bytes.len() {
                break;
            }
        }
    }
    chunks
}
