//! A step laid out for computation: one row per input token, and the rows whose results are wanted.

use std::{collections::HashMap, ops::Range, sync::Arc};

use plan::step::{BlockId, Input, SequenceId, Step, TokenId};

use crate::{Adapter, cpu::Adapted, sequences::Sequence};

/// Consecutive rows of one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// Rows of the hidden state.
    pub(crate) rows: Range<usize>,
    /// Absolute position of the first.
    pub(crate) first: usize,
}

/// One step's rows.
#[derive(Debug)]
pub(crate) struct Batch<'a> {
    /// Number of rows.
    pub(crate) tokens: usize,
    /// The sequences, in the step's order.
    pub(crate) spans: Vec<Span>,
    /// Absolute position of each row.
    pub(crate) positions: Vec<u32>,
    /// Input id of each row, where this rank needs them.
    pub(crate) ids: Vec<TokenId>,
    /// The rows that run with each adapter; those of none are in none.
    pub(crate) adapted: Vec<Adapted>,
    /// Token type of each row.
    pub(crate) types: Vec<u8>,
    /// Block tables, `[group][sequence]`.
    pub(crate) tables: Vec<Vec<&'a [BlockId]>>,
    /// Rows with wanted results, ascending: those with logits and those without. Empty unless this is the last stage of a decoder.
    pub(crate) wanted: Vec<Wanted>,
}

/// A row whose result is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Row of the batch.
    pub(crate) row: usize,
    /// The sequence's place in the step.
    pub(crate) part: usize,
    /// The wants of that row, in the sequence's list.
    pub(crate) wants: Range<usize>,
    /// Whether any of them needs logits.
    pub(crate) logits: bool,
}

impl<'a> Batch<'a> {
    /// Lays out a valid step that was applied to `sequences`; `decides`: this is the last stage of a decoder.
    pub(crate) fn new(
        step: &Step,
        sequences: &'a HashMap<SequenceId, Sequence>,
        adapters: &HashMap<u32, Arc<Adapter>>,
        groups: usize,
        decides: bool,
    ) -> Self {
        let tokens = step.tokens();
        let mut batch = Self {
            tokens,
            spans: Vec::with_capacity(step.sequences.len()),
            positions: Vec::with_capacity(tokens),
            ids: Vec::with_capacity(tokens),
            adapted: Vec::new(),
            types: Vec::with_capacity(tokens),
            tables: vec![Vec::with_capacity(step.sequences.len()); groups],
            wanted: Vec::new(),
        };
        for (index, part) in step.sequences.iter().enumerate() {
            let (start, len) = (batch.positions.len(), part.input.len());
            batch.spans.push(Span { rows: start..start + len, first: part.first_position as usize });
            batch.positions.extend((part.first_position..).take(len));
            let second = if part.second == 0 { len } else { part.second as usize };
            batch.types.extend((0..len).map(|at| u8::from(at >= second)));
            if let Input::Ids(ids) = &part.input {
                batch.ids.extend(ids);
            }
            if let Some(adapter) = adapters.get(&part.adapter) {
                let known = batch.adapted.iter().position(|of| Arc::ptr_eq(&of.adapter, adapter)).unwrap_or_else(|| {
                    batch.adapted.push(Adapted { adapter: adapter.clone(), rows: Vec::new() });
                    batch.adapted.len() - 1
                });
                batch.adapted[known].rows.extend(start..start + len);
            }
            let sequence = sequences.get(&part.sequence);
            for (group, tables) in batch.tables.iter_mut().enumerate() {
                tables.push(sequence.and_then(|s| s.tables.get(group)).map_or(&[], Vec::as_slice));
            }
            if !decides {
                continue;
            }
            let mut first = 0;
            for same in part.wants.chunk_by(|a, b| a.offset == b.offset) {
                let wants = first..first + same.len();
                first = wants.end;
                let logits = same.iter().any(|w| !w.kind.is_vector());
                batch.wanted.push(Wanted { row: start + same[0].offset as usize, part: index, wants, logits });
            }
        }
        batch
    }
}
