//! Blocks: reused, shared, copied, given back behind a window, and full of NaN where nobody may look.

use engine::NoMasks;
use plan::step::{
    Begin, BlockCopy, BlockId, Input, Output, OutputValue, Sampling, SequenceId, SequenceStep, Step, TableChange, TokenId, Want, WantKind,
};

use crate::{
    model::{self, Model},
    rig::{Layout, Part, Rig, logits, prompt},
};

/// A token whose embedding is NaN.
const BAD: TokenId = 7;
/// Group of the full layers.
const FULL: u32 = 0;
/// Group of the window layers.
const LOCAL: u32 = 1;
const WINDOW: usize = 20;

/// A gemma with a vocabulary matrix of its own, so that a token with a NaN embedding spoils no logits but those behind it.
fn poisonable() -> Model {
    let mut recipe = model::gemma(WINDOW as u32, model::small);
    recipe.config.tied_embeddings = false;
    let mut model = recipe.build();
    let table = model.header.tensors.values().find(|t| t.name.starts_with("Embedding")).expect("a table");
    let row = (table.offset + table.bytes / table.shape[0] as u64 * u64::from(BAD)) as usize;
    model.bytes[row..row + 2].copy_from_slice(&half::f16::NAN.to_le_bytes());
    model
}

/// Ids without the bad one.
fn ids(seed: u64, len: usize) -> Vec<TokenId> {
    prompt(seed, len, 1500).into_iter().map(|id| if id == BAD { BAD + 1 } else { id }).collect()
}

fn failed(outputs: &[Output]) -> bool {
    !outputs.is_empty() && outputs.iter().all(|o| matches!(o.value, OutputValue::Failed(_)))
}

/// The bits of `ids`' logits, alone in a new engine.
fn clean(model: &Model, ids: &[TokenId]) -> Vec<Vec<u32>> {
    logits(&Rig::new(model, Layout::default()).run(&[Part::new(1, ids).all_logits()])).into_iter().map(|(.., bits)| bits).collect()
}

/// One sequence's part of a hand-made step, all logits wanted.
fn part(sequence: SequenceId, all: &[TokenId], range: std::ops::Range<usize>, tables: &[(u32, usize, Vec<BlockId>)]) -> SequenceStep {
    SequenceStep {
        sequence,
        first_position: range.start as u32,
        input: Input::Ids(all[range.clone()].to_vec()),
        tables: tables
            .iter()
            .map(|(group, first, blocks)| TableChange { group: *group, first: *first as u32, blocks: blocks.clone() })
            .collect(),
        wants: (0..range.len() as u32).map(|offset| Want { offset, kind: WantKind::Logits }).collect(),
        begin: Some(Box::new(Begin { ids: all.to_vec(), prompt_len: all.len() as u32, sampling: Sampling::default() })),
        adapter: 0,
        second: 0,
    }
}

fn run(rig: &mut Rig, copies: Vec<BlockCopy>, sequences: Vec<SequenceStep>) -> Vec<Output> {
    rig.steps += 1;
    let step = Step { id: rig.steps, frees: std::mem::take(&mut rig.frees), copies, sequences, ..Step::default() };
    rig.run_step(&step, &mut NoMasks).expect("a valid step")
}

#[test]
fn reused_blocks_full_of_nan_change_no_bit() {
    let model = poisonable();
    for tensor in [1, 2] {
        let mut rig = Rig::new(&model, Layout { tensor, threads: 2, sequences: 3, ..Layout::default() });
        let good = ids(3, 45);
        let expected = clean(&model, &good);
        for round in 0..6 {
            // The bad sequence runs beside the good one, and its blocks are the next ones to be used.
            let (a, b) = (2 * round + 1, 2 * round + 2);
            let outputs = rig.run(&[Part::new(a, &[BAD; 50]).all_logits(), Part::new(b, &good).all_logits()]);
            let (bad, good): (Vec<_>, Vec<_>) = outputs.into_iter().partition(|o| o.sequence == a);
            assert!(failed(&bad), "round {round}");
            assert!(logits(&good).into_iter().map(|(.., bits)| bits).eq(expected.iter().cloned()), "round {round}");
            rig.free(b);
            rig.free(a);
        }
    }
}

/// Runs 120 tokens in chunks of 10 with 4 blocks in the window's ring; blocks that were passed are filled with NaN at once.
fn behind_the_window(model: &Model, passed: impl Fn(usize, usize) -> bool) -> Vec<Output> {
    let mut rig = Rig::new(model, Layout { sequences: 3, ..Layout::default() });
    let good = ids(4, 120);
    let mut outputs = Vec::new();
    for first in (0..good.len()).step_by(10) {
        let end = first + 10;
        let entries = first.div_ceil(16)..end.div_ceil(16);
        let tables: Vec<_> =
            entries.flat_map(|entry| [(FULL, entry, vec![entry as BlockId]), (LOCAL, entry, vec![(entry % 4) as BlockId])]).collect();
        outputs.extend(run(&mut rig, Vec::new(), vec![part(1, &good, first..end, &tables)]));
        for entry in (0..end.div_ceil(16)).rev().take(4).filter(|&entry| passed(entry, end)) {
            let tables = [(FULL, 0, vec![20]), (LOCAL, 0, vec![(entry % 4) as BlockId])];
            assert!(failed(&run(&mut rig, Vec::new(), vec![part(1000, &[BAD; 16], 0..16, &tables)])));
            rig.frees.push(1000);
        }
    }
    outputs
}

#[test]
fn what_the_window_has_passed_may_be_given_away() {
    let model = poisonable();
    let expected = clean(&model, &ids(4, 120));
    // The next position is `end`; it sees those from `end + 1 - WINDOW` on.
    let outputs = behind_the_window(&model, |entry, end| (entry + 1) * 16 <= (end + 1).saturating_sub(WINDOW));
    assert!(logits(&outputs).into_iter().map(|(.., bits)| bits).eq(expected));
    // Control: one position more is one too many.
    let outputs = behind_the_window(&model, |entry, end| (entry + 1) * 16 <= (end + 2).saturating_sub(WINDOW));
    assert!(outputs.iter().any(|o| matches!(o.value, OutputValue::Failed(_))));
}

/// Logits of the rest of a sequence whose first 48 tokens another one has computed; `copies`: into blocks of its own first.
fn from_prefix(model: &Model, copies: bool, local: Vec<BlockId>) -> Vec<Vec<u32>> {
    let mut rig = Rig::new(model, Layout { sequences: 3, ..Layout::default() });
    let all = ids(6, 70);
    run(&mut rig, Vec::new(), vec![part(1, &all, 0..60, &[(FULL, 0, vec![0, 1, 2, 3]), (LOCAL, 0, vec![5, 6, 7, 8])])]);
    rig.frees.push(1);
    // A hit at 48 needs all full blocks, and of the window's those of 29 to 47; entry 0 stays a hole.
    let copy = |group, from: BlockId| BlockCopy { group, from, to: from + 10 };
    let (full, moved) = if copies {
        let made = (0..3).map(|b| copy(FULL, b)).chain(local.iter().map(|&b| copy(LOCAL, b))).collect();
        (vec![10, 11, 12], made)
    } else {
        (vec![0, 1, 2], Vec::new())
    };
    let local: Vec<BlockId> = local.iter().map(|b| b + if copies { 10 } else { 0 }).collect();
    let tables = [(FULL, 0, full), (LOCAL, 1, local), (FULL, 3, vec![30, 31]), (LOCAL, 3, vec![30, 31])];
    logits(&run(&mut rig, moved, vec![part(2, &all, 48..70, &tables)])).into_iter().map(|(.., bits)| bits).collect()
}

#[test]
fn a_prefix_in_shared_or_copied_blocks_is_as_good_as_ones_own() {
    let model = poisonable();
    let expected = &clean(&model, &ids(6, 70))[48..];
    assert!(from_prefix(&model, false, vec![6, 7]) == expected);
    assert!(from_prefix(&model, true, vec![6, 7]) == expected);
    // Control: blocks in another order.
    assert!(from_prefix(&model, false, vec![7, 6]) != expected);
    assert!(from_prefix(&model, true, vec![7, 6]) != expected);
}

#[test]
fn a_window_layer_is_no_full_layer() {
    let ids = ids(8, 60);
    let run = |window| {
        let mut recipe = model::gemma(window, model::small);
        recipe.config.tied_embeddings = false;
        clean(&recipe.build(), &ids)
    };
    let (narrow, wide, whole) = (run(20), run(60), run(61));
    assert!(wide == whole, "a window as long as the sequence sees everything");
    assert!(narrow[..20] == whole[..20] && narrow[20..].iter().zip(&whole[20..]).all(|(a, b)| a != b));
}
