//! What those who multiply parts of the vocabulary hand to rank 0 of the last stage.

use std::ops::Range;

use kernels::{
    bytes,
    vocab::{self, Candidate, TileSum, VOCAB_TILE},
};
use plan::step::WantKind;

use super::{Session, draw, philox, results::direct, wants};
use crate::{
    batch::Wanted,
    collective::CollectiveError,
    compute::Compute,
    question::{Draw, Need, Row, part_bytes},
    ranks::Ranks,
};

/// What a row's wants need.
pub(super) fn need(session: &Session<'_>, wanted: &Wanted, vocab: usize) -> Need {
    let part = &session.step.sequences[wanted.part];
    let mut need = Need::default();
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
                let position = part.first_position + want.offset;
                match direct(s, vocab) {
                    _ if history.changes_logits(position as usize) => need.whole = true,
                    Some(k) => need.top = need.top.max(k),
                    None if draw::is_plain(s, vocab) && s.logprobs.is_none() && wanted.wants.len() == 1 => {
                        need.draw = Some(Draw { factor: draw::factor(s), uniform: philox::uniform(s.seed, s.choice, position) });
                    }
                    None => need.whole = true,
                }
            }
            WantKind::Pooled(_) | WantKind::Classes => {}
        }
    }
    need.top = need.top.min(vocab);
    need
}

/// The parts of this stage's ranks.
#[derive(Debug, Default)]
pub(super) struct Exchange {
    pub(super) buffer: Vec<u8>,
    /// Where that of each rank lies.
    pub(super) parts: Vec<Range<usize>>,
}

impl Exchange {
    /// Brings all parts to rank 0; `write` fills this rank's.
    pub(super) fn run(
        &mut self,
        vocab: &[Range<usize>],
        needs: &[Need],
        ranks: &mut Ranks<'_>,
        write: impl FnOnce(&mut [u8]),
    ) -> Result<(), CollectiveError> {
        self.parts.clear();
        let mut end = 0;
        for rows in vocab {
            let start = end;
            end += part_bytes(needs, rows);
            self.parts.push(start..end);
        }
        self.buffer.resize(end, 0);
        write(&mut self.buffer[self.parts[ranks.rank()].clone()]);
        if end > 0 { ranks.gather(&mut self.buffer, &self.parts) } else { Ok(()) }
    }
}

/// Writes the part of whoever has `rows` of the vocabulary; `found`: in these, of each row.
pub(crate) fn write(rows: &Range<usize>, needs: &[Need], found: &[Row<'_>], into: &mut [u8]) {
    if !rows.is_empty() {
        let mut writer = Writer(into);
        for (found, need) in found.iter().zip(needs) {
            writer.row(found, need);
        }
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

    fn row(&mut self, found: &Row<'_>, need: &Need) {
        if need.whole {
            return self.put(bytes::of(found.logits));
        }
        if need.draw.is_some() {
            return;
        }
        for tile in &found.tiles {
            self.put(&tile.max.to_le_bytes());
            self.put(&tile.sum.to_le_bytes());
        }
        if !need.total {
            self.put(&u32::from(found.broken).to_le_bytes());
        }
        for candidate in &found.likeliest {
            self.put(&candidate.id.to_le_bytes());
            self.put(&candidate.logit.to_le_bytes());
        }
        for logit in &found.targets {
            self.put(&logit.to_le_bytes());
        }
    }
}

/// Reads row after row from all parts.
pub(super) struct Reader<'a> {
    /// Vocabulary rows of each, in their order, and what is left to read.
    parts: Vec<(Range<usize>, &'a [u8])>,
    row: &'a mut Vec<f32>,
}

impl<'a> Reader<'a> {
    /// Of parts in any order, each of the length that [`part_bytes`] says; `row` holds rows of logits.
    pub(super) fn new(parts: impl Iterator<Item = (Range<usize>, &'a [u8])>, row: &'a mut Vec<f32>) -> Self {
        let mut parts: Vec<_> = parts.filter(|(rows, _)| !rows.is_empty()).collect();
        parts.sort_by_key(|(rows, _)| rows.start);
        Self { parts, row }
    }

    /// The next row.
    pub(super) fn row(&mut self, compute: &Compute, need: &Need) -> Row<'_> {
        if need.whole {
            self.row.resize(self.parts.last().map_or(0, |(rows, _)| rows.end), 0.0);
            for (rows, left) in &mut self.parts {
                let into = bytes::of_mut(&mut self.row[rows.clone()]);
                into.copy_from_slice(take(left, into.len()));
            }
            return of_logits(compute, self.row, need);
        }
        if need.draw.is_some() {
            return Row::default();
        }
        let mut row = Row { targets: vec![0.0; need.targets.len()], ..Row::default() };
        let mut lists = Vec::with_capacity(self.parts.len());
        for (rows, left) in &mut self.parts {
            if need.total {
                for _ in 0..rows.len().div_ceil(VOCAB_TILE) {
                    row.tiles.push(TileSum { max: float(left), sum: float(left) });
                }
            } else {
                row.broken |= u32::from_le_bytes(number(left)) != 0;
            }
            let candidate = |_| Candidate { id: u32::from_le_bytes(number(left)), logit: float(left) };
            lists.push((0..need.top.min(rows.len())).map(candidate).collect());
            for (logit, &target) in row.targets.iter_mut().zip(&need.targets) {
                let came = float(left);
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

/// What is needed of a whole row of logits that came in parts.
fn of_logits<'a>(Compute { pool, isa }: &Compute, logits: &'a [f32], need: &Need) -> Row<'a> {
    let mut tiles = Vec::new();
    let broken = if need.total {
        tiles.resize(logits.len().div_ceil(VOCAB_TILE), TileSum { max: 0.0, sum: 0.0 });
        vocab::tile_sums(pool, *isa, logits, 1.0, &mut tiles);
        tiles.iter().any(|tile| tile.sum.is_nan())
    } else {
        !vocab::bounded(pool, *isa, logits)
    };
    let likeliest = if need.top > 0 { vocab::top_k(pool, *isa, logits, 0, need.top) } else { Vec::new() };
    Row { logits, tiles, broken, likeliest, targets: need.targets.iter().map(|&id| logits[id as usize]).collect() }
}

fn take<'a>(left: &mut &'a [u8], len: usize) -> &'a [u8] {
    let (taken, rest) = left.split_at(len);
    *left = rest;
    taken
}

fn number(left: &mut &[u8]) -> [u8; 4] {
    let mut number = [0; 4];
    number.copy_from_slice(take(left, 4));
    number
}

fn float(left: &mut &[u8]) -> f32 {
    f32::from_le_bytes(number(left))
}
