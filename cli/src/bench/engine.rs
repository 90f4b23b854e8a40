//! The steps of an engine benchmark, sent straight to a replica: no scheduler, no sampling but the likeliest token.

use std::time::Instant;

use anyhow::bail;
use plan::step::{Begin, Input, Output, OutputValue, Sampling, SequenceId, SequenceStep, Step, TokenId, Want, WantKind};

use crate::{bench::test::BenchTest, blocks::Blocks, drive::Drive};

/// Runs benchmarks on one session.
pub(crate) struct EngineBench {
    drive: Drive,
    /// Stages of the replica: as many micro-batches run at once.
    stages: usize,
    /// Most tokens in a step.
    chunk: usize,
    vocab: usize,
    /// Ids of sequences are never used twice.
    sequences: SequenceId,
    /// Freed with the next step.
    finished: Vec<SequenceId>,
}

/// One sequence of a batch.
struct Lane {
    id: SequenceId,
    /// Its place among the blocks.
    slot: usize,
    /// Its next position.
    position: usize,
    /// The step that drew its last token.
    drawn: Option<u64>,
}

impl EngineBench {
    /// Benchmarks on the session of `drive`.
    pub(crate) fn new(drive: Drive, stages: usize, chunk: usize, vocab: usize) -> Self {
        Self { drive, stages, chunk, vocab, sequences: 0, finished: Vec::new() }
    }

    /// Runs a test once and returns its tokens per second.
    pub(crate) async fn once(&mut self, test: BenchTest, blocks: &Blocks) -> anyhow::Result<f64> {
        let seconds = match test {
            BenchTest::Prefill { tokens } => self.prefill(blocks, tokens).await?,
            BenchTest::Decode { tokens, depth } => self.decode(blocks, 1, depth, tokens).await?,
            BenchTest::Batch { sequences } => self.decode(blocks, sequences, 0, BenchTest::batch_tokens(sequences)).await?,
        };
        Ok(test.counted() as f64 / seconds)
    }

    /// Seconds from the first chunk of a prompt to the token after it.
    async fn prefill(&mut self, blocks: &Blocks, tokens: usize) -> anyhow::Result<f64> {
        let started = Instant::now();
        let sequence = self.feed(blocks, tokens, true).await?;
        let seconds = started.elapsed().as_secs_f64();
        self.finished.push(sequence);
        Ok(seconds)
    }

    /// Seconds that `tokens` decode steps of each of `sequences` sequences take, after `depth` tokens.
    async fn decode(&mut self, blocks: &Blocks, sequences: usize, depth: usize, tokens: usize) -> anyhow::Result<f64> {
        let mut lanes = Vec::with_capacity(sequences);
        for slot in 0..sequences {
            let id = if depth > 0 { self.feed(blocks, depth, false).await? } else { self.next_sequence() };
            lanes.push(Lane { id, slot, position: depth, drawn: None });
        }
        // Each micro-batch is a step of its own, so that every stage has one to work on.
        let width = sequences.div_ceil(self.stages);
        let batches = sequences.div_ceil(width);
        let most = self.stages + 1;
        let started = Instant::now();
        let mut unanswered = 0;
        for round in 0..tokens {
            for batch in 0..batches {
                if unanswered == most {
                    check(&self.drive.receive().await?)?;
                    unanswered -= 1;
                }
                let lanes = &mut lanes[batch * width..sequences.min((batch + 1) * width)];
                let parts = lanes.iter().map(|lane| self.next(blocks, lane, round == 0)).collect();
                let frees = std::mem::take(&mut self.finished);
                let number = self.drive.send(Step { frees, sequences: parts, ..Step::default() }).await?;
                unanswered += 1;
                for lane in lanes {
                    lane.position += 1;
                    lane.drawn = Some(number);
                }
            }
        }
        for _ in 0..unanswered {
            check(&self.drive.receive().await?)?;
        }
        let seconds = started.elapsed().as_secs_f64();
        self.finished.extend(lanes.iter().map(|lane| lane.id));
        Ok(seconds)
    }

    /// A lane's part of its next step. `opening` tells the sampler its settings.
    fn next(&self, blocks: &Blocks, lane: &Lane, opening: bool) -> SequenceStep {
        let input = match lane.drawn {
            Some(step) => Input::Sampled { step, drafts: Vec::new() },
            None => Input::Ids(vec![self.id(lane.position)]),
        };
        SequenceStep {
            sequence: lane.id,
            first_position: lane.position as u32,
            input,
            tables: blocks.changes(lane.slot, lane.position, 1),
            wants: vec![Want { offset: 0, kind: WantKind::Sample }],
            begin: opening.then(|| self.begin(lane.position + 1)),
            adapter: 0,
            second: 0,
        }
    }

    /// Runs a prompt of `tokens` ids in place 0, with a token drawn after it if `sample`; waits for every step.
    async fn feed(&mut self, blocks: &Blocks, tokens: usize, sample: bool) -> anyhow::Result<SequenceId> {
        let sequence = self.next_sequence();
        let mut unanswered = 0;
        for first in (0..tokens).step_by(self.chunk) {
            if unanswered > self.stages {
                self.drive.receive().await?;
                unanswered -= 1;
            }
            let len = self.chunk.min(tokens - first);
            let last = first + len == tokens;
            let part = SequenceStep {
                sequence,
                first_position: first as u32,
                input: Input::Ids((first..first + len).map(|at| self.id(at)).collect()),
                tables: blocks.changes(0, first, len),
                wants: if last && sample { vec![Want { offset: len as u32 - 1, kind: WantKind::Sample }] } else { Vec::new() },
                begin: (first == 0).then(|| self.begin(tokens)),
                adapter: 0,
                second: 0,
            };
            let frees = std::mem::take(&mut self.finished);
            self.drive.send(Step { frees, sequences: vec![part], ..Step::default() }).await?;
            unanswered += 1;
        }
        for _ in 0..unanswered {
            check(&self.drive.receive().await?)?;
        }
        Ok(sequence)
    }

    fn next_sequence(&mut self) -> SequenceId {
        self.sequences += 1;
        self.sequences
    }

    /// An id for a position: spread over the vocabulary, the same in every run.
    fn id(&self, position: usize) -> TokenId {
        // Knuth's multiplicative hash; any fixed spread would do.
        ((position as u64 + 1).wrapping_mul(2_654_435_761) % self.vocab as u64) as TokenId
    }

    fn begin(&self, tokens: usize) -> Box<Begin> {
        let ids = (0..tokens).map(|at| self.id(at)).collect();
        Box::new(Begin { ids, prompt_len: tokens as u32, sampling: Sampling::default() })
    }
}

/// Fails when the engine refused a sequence.
fn check(outputs: &[Output]) -> anyhow::Result<()> {
    for output in outputs {
        if let OutputValue::Failed(reason) = &output.value {
            bail!("the engine failed at position {}: {reason}", output.position);
        }
    }
    Ok(())
}
