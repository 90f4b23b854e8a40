//! Draws from all logits, as they are.
//!
//! Where ranks share the vocabulary, every rank gets the softmax sums of all tiles and sees in which of them a draw falls; whoever has that
//! tile hands its logits to rank 0. So a draw costs some kilobytes on the way in place of a row of logits, and each rank sums its own.

use std::ops::Range;

use kernels::{
    bytes,
    vocab::{self, TileSum, Total, VOCAB_TILE},
};
use plan::step::TokenId;

use crate::{
    collective::CollectiveError,
    question::{Draw, Need, Row},
    ranks::Ranks,
};

/// What a draw came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Drawn {
    /// A token; none where every logit is minus infinity.
    Token(Option<TokenId>),
    /// A logit is NaN or infinity.
    Broken,
}

/// Where a draw falls.
enum Place {
    /// A tile, and where in it, in `0 .. 1`.
    Tile(usize, f64),
    Nowhere,
    Broken,
}

/// Buffers of draws.
#[derive(Debug, Default)]
pub(super) struct Draws {
    /// `(max, sum)` of tiles: of each rank, for each draw, those of its tiles.
    sums: Vec<f32>,
    /// Logits of the tiles that are drawn from: of each rank, those that it has, in the order of the draws.
    tiles: Vec<f32>,
}

impl Draws {
    /// What the draws among `needs` come to, in order; nothing on ranks other than 0. `found`: in this rank's part, of each row.
    pub(super) fn run(
        &mut self,
        vocab: &[Range<usize>],
        needs: &[Need],
        found: &[Row<'_>],
        ranks: &mut Ranks<'_>,
    ) -> Result<Vec<Drawn>, CollectiveError> {
        let draws: Vec<(usize, Draw)> = needs.iter().enumerate().filter_map(|(row, need)| Some((row, need.draw?))).collect();
        if draws.is_empty() {
            return Ok(Vec::new());
        }
        let own = &vocab[ranks.rank()];
        let tiles: Vec<Range<usize>> = vocab.iter().map(tiles_of).collect();
        let all = tiles.iter().map(|tiles| tiles.end).max().unwrap_or(0);

        self.sums.resize(2 * all * draws.len(), 0.0);
        let mine = &tiles[ranks.rank()];
        let into = &mut self.sums[2 * mine.start * draws.len()..2 * mine.end * draws.len()];
        for (&(at, _), into) in draws.iter().zip(into.chunks_exact_mut((2 * mine.len()).max(1))) {
            into.as_chunks_mut().0.iter_mut().zip(&found[at].tiles).for_each(|(pair, tile)| *pair = [tile.max, tile.sum]);
        }
        let pair = 2 * size_of::<f32>();
        ranks.all_gather(bytes::of_mut(&mut self.sums), &tiles, pair * draws.len())?;
        let places: Vec<Place> = (0..).zip(&draws).map(|(at, (_, draw))| self.place(at, draws.len(), &tiles, *draw)).collect();

        let vocab_end = vocab.iter().map(|rows| rows.end).max().unwrap_or(0);
        let rows_of = |tile: usize| tile * VOCAB_TILE..((tile + 1) * VOCAB_TILE).min(vocab_end);
        let mut parts = Vec::with_capacity(vocab.len());
        let mut spans = vec![0..0; draws.len()];
        let mut end = 0;
        for tiles in &tiles {
            let start = end;
            for (place, span) in places.iter().zip(&mut spans) {
                if let Place::Tile(tile, _) = place
                    && tiles.contains(tile)
                {
                    *span = end..end + rows_of(*tile).len();
                    end = span.end;
                }
            }
            parts.push(start * size_of::<f32>()..end * size_of::<f32>());
        }
        self.tiles.resize(end, 0.0);
        for ((place, span), &(at, _)) in places.iter().zip(&spans).zip(&draws) {
            if let Place::Tile(tile, _) = place
                && mine.contains(tile)
            {
                let rows = rows_of(*tile);
                self.tiles[span.clone()].copy_from_slice(&found[at].logits[rows.start - own.start..rows.end - own.start]);
            }
        }
        if end > 0 {
            ranks.gather(bytes::of_mut(&mut self.tiles), &parts)?;
        }
        if ranks.rank() > 0 {
            return Ok(Vec::new());
        }
        let drawn = places.iter().zip(spans).zip(&draws).map(|((place, span), (_, draw))| match *place {
            Place::Tile(tile, point) => {
                let row = vocab::row_at(&self.tiles[span], draw.factor, point);
                Drawn::Token(row.map(|row| (tile * VOCAB_TILE + row) as TokenId))
            }
            Place::Nowhere => Drawn::Token(None),
            Place::Broken => Drawn::Broken,
        });
        Ok(drawn.collect())
    }

    /// Where draw `at` of `draws` falls, by the sums of all tiles.
    fn place(&self, at: usize, draws: usize, tiles: &[Range<usize>], draw: Draw) -> Place {
        let of_rank = |tiles: &Range<usize>| {
            let first = tiles.start * draws + at * tiles.len();
            &self.sums[2 * first..2 * (first + tiles.len())]
        };
        let sums = tiles.iter().flat_map(|tiles| of_rank(tiles).as_chunks().0);
        let sums: Vec<TileSum> = sums.map(|&[max, sum]| TileSum { max, sum }).collect();
        if sums.iter().any(|tile| tile.sum.is_nan()) {
            return Place::Broken;
        }
        let place = Total::of(&sums, draw.factor).tile_at(&sums, draw.uniform);
        place.map_or(Place::Nowhere, |(tile, point)| Place::Tile(tile, point))
    }
}

/// The tiles of whole ones that a rank's rows are, one after the other from row 0.
fn tiles_of(rows: &Range<usize>) -> Range<usize> {
    let start = rows.start.div_ceil(VOCAB_TILE);
    start..rows.end.div_ceil(VOCAB_TILE).max(start)
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, sync::Arc, thread, time::Duration};

    use plan::step::Sampling;

    use super::*;
    use crate::{collective::Threads, compute::Compute, sampler::draw};

    const VOCAB: usize = 2500;

    /// Rows of logits: some with tokens that cannot come, one without any that can, two that are broken.
    fn rows() -> Vec<Vec<f32>> {
        let mut flat = vec![f32::NEG_INFINITY; VOCAB];
        let mut rows = vec![flat.clone()];
        flat[1400] = -1e30;
        flat[2499] = -1e30;
        rows.push(flat);
        for i in 0..8 {
            let mut row: Vec<f32> = (0..VOCAB).map(|at| (at * 7919 % (2503 + i)) as f32 / 300.0 - 5.0).collect();
            row[100..100 + 300 * i].fill(f32::NEG_INFINITY);
            rows.push(row);
        }
        for (at, broken) in [(3, f32::NAN), (2000, f32::INFINITY)] {
            rows.push(rows[5].clone());
            rows.last_mut().expect("a row")[at] = broken;
        }
        rows
    }

    fn compute() -> Compute {
        Compute { pool: Arc::new(kernels::Pool::new(1)), isa: kernels::Isa::best() }
    }

    /// What ranks with the rows `vocab` draw, each row at its own number.
    fn drawn(vocab: &[Range<usize>], temperature: f32, seed: usize) -> Vec<Drawn> {
        let rows = rows();
        let number = |row: usize| ((row * 37 + seed * 11) % 101) as f64 / 101.0;
        let s = Sampling { temperature, ..Sampling::default() };
        let draw = |row| Some(Draw { factor: draw::factor(&s), uniform: number(row) });
        // Rows of other needs between them.
        let needs: Vec<Need> = (0..rows.len()).flat_map(|row| [Need::default(), Need { draw: draw(row), ..Need::default() }]).collect();
        let run = |rank: &mut Threads, own: &Range<usize>| {
            let mut tiles = vec![TileSum { max: 0.0, sum: 0.0 }; own.len().div_ceil(VOCAB_TILE)];
            let found = rows.iter().flat_map(|row| {
                let logits = &row[own.clone()];
                vocab::tile_sums(&compute().pool, compute().isa, logits, draw::factor(&s), &mut tiles);
                [Row::default(), Row { logits, tiles: tiles.clone(), ..Row::default() }]
            });
            let found: Vec<Row<'_>> = found.collect();
            Draws::default().run(vocab, &needs, &found, &mut Ranks::new(rank)).expect("ranks that answer")
        };
        // They stay until all are done: a rank that goes is lost to the others.
        let mut ranks = Threads::group(vocab.len(), Duration::from_secs(60));
        let found: Vec<Vec<Drawn>> = thread::scope(|scope| {
            let run = &run;
            let running: Vec<_> = ranks.iter_mut().zip(vocab).map(|(rank, own)| scope.spawn(move || run(rank, own))).collect();
            running.into_iter().map(|rank| rank.join().expect("no panic")).collect()
        });
        assert!(found[1..].iter().all(Vec::is_empty), "only rank 0 draws");
        for (row, drawn) in found[0].iter().enumerate() {
            let expected = match row {
                10.. => Drawn::Broken,
                _ => Drawn::Token(draw::from_all(&compute(), &rows[row], &s, number(row))),
            };
            assert_eq!(*drawn, expected, "row {row} at {} of {vocab:?}", number(row));
        }
        found[0].clone()
    }

    #[test]
    fn ranks_draw_what_one_draws_from_all_logits() {
        let mut seen = HashSet::new();
        for vocab in [vec![0..1024, 1024..2500], vec![0..1024, 1024..2048, 2048..2500], vec![0..2048, 2048..2500, 2500..2500]] {
            for temperature in [1e-40, 0.5, 1.0, 3.0] {
                for seed in 0..8 {
                    let drawn = drawn(&vocab, temperature, seed);
                    assert_eq!(drawn[0], Drawn::Token(None), "nothing can come");
                    seen.extend(drawn.iter().filter_map(|drawn| if let Drawn::Token(id) = drawn { *id } else { None }));
                }
            }
        }
        assert!(seen.len() > 60, "{} tokens: the numbers hardly matter", seen.len());
    }

    #[test]
    fn draws_that_leave_tokens_out_need_all_logits() {
        let plain = Sampling { temperature: 1.0, ..Sampling::default() };
        assert!(draw::is_plain(&plain, VOCAB) && draw::is_plain(&Sampling { top_k: VOCAB as u32, ..plain.clone() }, VOCAB));
        for other in [
            Sampling::default(),
            Sampling { top_k: 9, ..plain.clone() },
            Sampling { top_p: 0.99, ..plain.clone() },
            Sampling { min_p: 0.01, ..plain },
        ] {
            assert!(!draw::is_plain(&other, VOCAB), "{other:?}");
        }
    }
}
