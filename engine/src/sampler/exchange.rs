//! What the ranks hand to rank 0.

use std::ops::Range;

use kernels::{
    bytes,
    vocab::{self, Candidate, TileSum, VOCAB_TILE},
};
use plan::step::{TokenId, WantKind};

use super::{
    Session,
    results::{Row, direct},
    wants,
};
use crate::{batch::Wanted, collective::CollectiveError, compute::Compute, ranks::Ranks};

/// What rank 0 needs of a row of logits; every rank comes to the same answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Need {
    /// All logits.
    pub(super) whole: bool,
    /// The softmax sum.
    pub(super) total: bool,
    /// So many of the likeliest.
    pub(super) top: usize,
    /// Tokens whose logits are needed.
    pub(super) targets: Vec<TokenId>,
    /// Nothing but the targets' logits is needed, not even whether the others are finite.
    pub(super) sparse: bool,
}

impl Need {
    /// What a row's wants need.
    pub(super) fn of(session: &Session<'_>, wanted: &Wanted, vocab: usize) -> Self {
        let part = &session.step.sequences[wanted.part];
        let mut need = Self::default();
        for want in wants(session.step, wanted) {
            match want.kind {
                WantKind::Score { target, top } => {
                    need.targets.push(target);
                    need.total = true;
                    need.top = need.top.max(top as usize);
                }
                WantKind::Logits => need.whole = true,
                WantKind::Sample => {
                    let Some(history) = session.histories.get(&part.sequence) else { continue };
                    let s = &history.sampling;
                    if let Some(few) = history.few().filter(|_| s.logprobs.is_none() && wanted.wants.len() == 1) {
                        need.targets.extend_from_slice(few);
                        need.sparse = true;
                        break;
                    }
                    need.total |= s.logprobs.is_some();
                    need.top = need.top.max(s.logprobs.unwrap_or(0) as usize);
                    match direct(s, vocab) {
                        Some(k) if !history.changes_logits((part.first_position + want.offset) as usize) => need.top = need.top.max(k),
                        _ => need.whole = true,
                    }
                }
                WantKind::Pooled(_) | WantKind::Classes => {}
            }
        }
        need.top = need.top.min(vocab);
        need
    }

    /// Bytes that a rank with `rows` rows of the vocabulary sends.
    fn bytes(&self, rows: usize) -> usize {
        if self.whole {
            return 4 * rows;
        }
        let sums = if self.total { 8 * rows.div_ceil(VOCAB_TILE) } else { 4 };
        sums + 8 * self.top.min(rows) + 4 * self.targets.len()
    }
}

/// Buffers of the exchange.
#[derive(Debug, Default)]
pub(super) struct Exchange {
    buffer: Vec<u8>,
    parts: Vec<Range<usize>>,
    row: Vec<f32>,
}

impl Exchange {
    /// Hands this rank's part of every row to rank 0.
    pub(super) fn run(
        &mut self,
        compute: &Compute,
        vocab: &[Range<usize>],
        needs: &[Need],
        logits: &[f32],
        ranks: &mut Ranks<'_>,
    ) -> Result<(), CollectiveError> {
        self.parts.clear();
        let mut end = 0;
        for rows in vocab {
            let start = end;
            end += needs.iter().map(|need| need.bytes(rows.len())).sum::<usize>();
            self.parts.push(start..end);
        }
        self.buffer.resize(end, 0);
        let own = &vocab[ranks.rank()];
        let mut writer = Writer(&mut self.buffer[self.parts[ranks.rank()].clone()]);
        if !own.is_empty() {
            for (logits, need) in logits.chunks_exact(own.len()).zip(needs) {
                writer.row(compute, logits, own.start, need);
            }
        }
        if end > 0 { ranks.gather(&mut self.buffer, &self.parts) } else { Ok(()) }
    }

    /// Reads what came, on rank 0.
    pub(super) fn reader<'a>(&'a mut self, vocab: &'a [Range<usize>]) -> Reader<'a> {
        let places = self.parts.iter().map(|part| part.start).collect();
        Reader { vocab, buffer: &self.buffer, places, row: &mut self.row }
    }
}

/// Writes numbers one after the other.
struct Writer<'a>(&'a mut [u8]);

impl Writer<'_> {
    fn put(&mut self, bytes: &[u8]) {
        let (head, tail) = std::mem::take(&mut self.0).split_at_mut(bytes.len());
        head.copy_from_slice(bytes);
        self.0 = tail;
    }

    fn row(&mut self, compute: &Compute, logits: &[f32], first: usize, need: &Need) {
        if need.whole {
            return self.put(bytes::of(logits));
        }
        // Only the rank that has a token knows its logit; nobody reads the others' 0.
        let logit = |target: TokenId| (target as usize).checked_sub(first).and_then(|row| logits.get(row)).copied().unwrap_or(0.0);
        let row = if need.sparse {
            Row { broken: need.targets.iter().any(|&target| !logit(target).is_finite()), ..Row::default() }
        } else {
            Row::of(compute, logits, &Need { targets: Vec::new(), ..need.clone() })
        };
        for tile in &row.tiles {
            self.put(&tile.max.to_le_bytes());
            self.put(&tile.sum.to_le_bytes());
        }
        if !need.total {
            self.put(&u32::from(row.broken).to_le_bytes());
        }
        for candidate in &row.likeliest {
            self.put(&(candidate.id + first as u32).to_le_bytes());
            self.put(&candidate.logit.to_le_bytes());
        }
        for &target in &need.targets {
            self.put(&logit(target).to_le_bytes());
        }
    }
}

/// Reads row after row from the parts of all ranks.
pub(super) struct Reader<'a> {
    vocab: &'a [Range<usize>],
    buffer: &'a [u8],
    /// Where the next number of each rank lies.
    places: Vec<usize>,
    row: &'a mut Vec<f32>,
}

impl Reader<'_> {
    fn number(&mut self, rank: usize) -> [u8; 4] {
        let place = self.places[rank];
        self.places[rank] += 4;
        let mut number = [0; 4];
        number.copy_from_slice(&self.buffer[place..place + 4]);
        number
    }

    fn float(&mut self, rank: usize) -> f32 {
        f32::from_le_bytes(self.number(rank))
    }

    /// The next row.
    pub(super) fn row(&mut self, compute: &Compute, need: &Need) -> Row<'_> {
        if need.whole {
            self.row.resize(self.vocab.last().map_or(0, |rows| rows.end), 0.0);
            for (rows, place) in self.vocab.iter().zip(&mut self.places) {
                let into = bytes::of_mut(&mut self.row[rows.clone()]);
                into.copy_from_slice(&self.buffer[*place..*place + into.len()]);
                *place += into.len();
            }
            return Row::of(compute, self.row, need);
        }
        let mut row = Row { targets: vec![0.0; need.targets.len()], ..Row::default() };
        let mut lists = Vec::with_capacity(self.vocab.len());
        for (rank, rows) in self.vocab.iter().enumerate().filter(|(_, rows)| !rows.is_empty()) {
            if need.total {
                for _ in 0..rows.len().div_ceil(VOCAB_TILE) {
                    row.tiles.push(TileSum { max: self.float(rank), sum: self.float(rank) });
                }
            } else {
                row.broken |= u32::from_le_bytes(self.number(rank)) != 0;
            }
            let candidate = |_| Candidate { id: u32::from_le_bytes(self.number(rank)), logit: self.float(rank) };
            lists.push((0..need.top.min(rows.len())).map(candidate).collect());
            for (logit, &target) in row.targets.iter_mut().zip(&need.targets) {
                let came = self.float(rank);
                if rows.contains(&(target as usize)) {
                    *logit = came;
                }
            }
        }
        row.broken |= row.tiles.iter().any(|tile| tile.sum.is_nan());
        row.likeliest = vocab::merge_top_k(lists, need.top);
        row
    }
}
