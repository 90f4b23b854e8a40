//! The collective over connected sockets, one between any two ranks.
//!
//! An exchange sends each peer one frame: a header and this rank's part. Parts travel in chunks: every rank sends a chunk to each peer, then
//! receives that chunk from each. A connection's buffers hold two chunks, so a rank that must wait to write waits for one that is at an
//! earlier chunk, and the rank at the earliest never waits to write: all of them go on. A small part is one chunk, hence one-shot.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use engine::collective::{Collective, CollectiveError};

use super::{
    Interrupt,
    frame::{Checksum, HEADER, Header, Kind},
    stream::{Broken, Stream},
};

/// Bytes of a part that travel at once. Two of them fit into any socket's buffers.
const CHUNK: usize = 16 << 10;

/// The connections, shared with whoever may interrupt.
pub(super) struct Wires {
    /// By rank; none at the own one.
    streams: Vec<Option<Stream>>,
    interrupted: AtomicBool,
}

impl Interrupt for Wires {
    fn interrupt(&self) {
        if !self.interrupted.swap(true, Ordering::Relaxed) {
            self.streams.iter().flatten().for_each(Stream::close);
        }
    }
}

/// Ranks joined by sockets.
pub(super) struct Sockets {
    rank: usize,
    session: u64,
    /// Number of the last exchange.
    sequence: u64,
    wires: Arc<Wires>,
    limit: Duration,
    /// Holds a header and a chunk.
    scratch: Vec<u8>,
    /// What each peer's frame must still prove.
    sums: Vec<Option<(Checksum, u32)>>,
}

impl Sockets {
    pub(super) fn new(rank: usize, session: u64, streams: Vec<Option<Stream>>, limit: Duration) -> Self {
        let sums = streams.iter().map(|_| None).collect();
        let wires = Arc::new(Wires { streams, interrupted: AtomicBool::new(false) });
        Self { rank, session, sequence: 0, wires, limit, scratch: vec![0; HEADER + CHUNK], sums }
    }

    pub(super) fn wires(&self) -> Arc<Wires> {
        Arc::clone(&self.wires)
    }

    /// Sends chunk `index` of `part` to rank `to`, if there is one.
    fn send(&mut self, kind: Kind, to: usize, part: &[u8], index: usize) -> Result<(), CollectiveError> {
        let Some(stream) = &self.wires.streams[to] else { return Ok(()) };
        let chunk = chunk(part, index);
        let sent = if index == 0 {
            let header = Header { kind, rank: self.rank as u8, session: self.session, sequence: self.sequence, bytes: part.len() as u32 };
            self.scratch[..HEADER].copy_from_slice(&header.encode(part));
            self.scratch[HEADER..HEADER + chunk.len()].copy_from_slice(chunk);
            stream.send(&self.scratch[..HEADER + chunk.len()], self.limit, &self.wires.interrupted)
        } else {
            stream.send(chunk, self.limit, &self.wires.interrupted)
        };
        sent.map_err(|broken| self.error(to, broken))
    }

    /// Receives chunk `index` of `part` from rank `from`, if there is one.
    fn receive(&mut self, kind: Kind, from: usize, part: &mut [u8], index: usize) -> Result<(), CollectiveError> {
        let Some(stream) = &self.wires.streams[from] else { return Ok(()) };
        let bytes = part.len();
        let chunks = chunks(bytes);
        let into = &mut part[(index * CHUNK).min(bytes)..((index + 1) * CHUNK).min(bytes)];
        if index == 0 {
            let frame = &mut self.scratch[..HEADER + into.len()];
            stream.receive(frame, self.limit, &self.wires.interrupted).map_err(|broken| self.error(from, broken))?;
            let (header, payload) = self.scratch.split_first_chunk::<HEADER>().unwrap_or((&[0; HEADER], &[]));
            let expected = Header { kind, rank: from as u8, session: self.session, sequence: self.sequence, bytes: bytes as u32 };
            let mismatch = |got: String| CollectiveError::Mismatch { rank: from, got, expected: format!("{expected:?}") };
            let (header, sum, end) = Header::decode(header).map_err(mismatch)?;
            if header != expected {
                return Err(mismatch(format!("{header:?}")));
            }
            into.copy_from_slice(&payload[..into.len()]);
            self.sums[from] = Some((sum, end));
        } else if !into.is_empty() {
            stream.receive(into, self.limit, &self.wires.interrupted).map_err(|broken| self.error(from, broken))?;
        }
        let Some((mut sum, end)) = self.sums[from].take() else { return Ok(()) };
        sum.add(into);
        if index + 1 < chunks {
            self.sums[from] = Some((sum, end));
        } else if !sum.is(end) {
            let (got, expected) = ("another checksum".to_owned(), "the frame's".to_owned());
            return Err(CollectiveError::Mismatch { rank: from, got, expected });
        }
        Ok(())
    }

    fn error(&self, rank: usize, broken: Broken) -> CollectiveError {
        match broken {
            Broken::Deadline => CollectiveError::Deadline { rank, millis: self.limit.as_millis() as u64 },
            Broken::Interrupted => CollectiveError::Lost { rank, detail: "the session was ended".into() },
            Broken::Gone(error) => CollectiveError::Lost { rank, detail: error.to_string() },
        }
    }
}

/// Frames of parts: an empty part is one too.
fn chunks(bytes: usize) -> usize {
    bytes.div_ceil(CHUNK).max(1)
}

fn chunk(part: &[u8], index: usize) -> &[u8] {
    &part[(index * CHUNK).min(part.len())..((index + 1) * CHUNK).min(part.len())]
}

impl Collective for Sockets {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.wires.streams.len()
    }

    fn all_gather(&mut self, buffer: &mut [u8], parts: &[Range<usize>]) -> Result<(), CollectiveError> {
        self.sequence += 1;
        let most = parts.iter().map(|p| chunks(p.len())).max().unwrap_or(0);
        for index in 0..most {
            if index < chunks(parts[self.rank].len()) {
                for to in 0..self.ranks() {
                    self.send(Kind::AllGather, to, &buffer[parts[self.rank].clone()], index)?;
                }
            }
            for (from, part) in parts.iter().enumerate() {
                if index < chunks(part.len()) {
                    self.receive(Kind::AllGather, from, &mut buffer[part.clone()], index)?;
                }
            }
        }
        Ok(())
    }

    fn gather(&mut self, buffer: &mut [u8], parts: &[Range<usize>]) -> Result<(), CollectiveError> {
        self.sequence += 1;
        if self.rank == 0 {
            for (from, part) in parts.iter().enumerate() {
                for index in 0..chunks(part.len()) {
                    self.receive(Kind::Gather, from, &mut buffer[part.clone()], index)?;
                }
            }
            return Ok(());
        }
        let part = &buffer[parts[self.rank].clone()];
        for index in 0..chunks(part.len()) {
            self.send(Kind::Gather, 0, part, index)?;
        }
        Ok(())
    }
}
