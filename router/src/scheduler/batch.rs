//! Composing a step: decodes first, then prompts under way and from the queue, within the token budget.

use plan::{
    shard::BLOCK_TOKENS,
    step::{Begin, Input, Mask, SequenceStep, Step, TableChange, Want, WantKind},
};

use super::{
    Admission, Entry, Event, EventKind, Purpose, Scheduler, Sequence, StepRecord, Table,
    drafts::Drafts,
    prefix::{first_needed, longest_hit},
    worth::Worth,
};

/// Fewest tokens that a prompt is cut into for the sake of a pipeline: below this the products get slower than the pipeline gains.
const LEAST_PIECE: usize = 128;

/// What a step is built in.
struct Outline {
    step: Step,
    entries: Vec<Entry>,
    budget: usize,
    /// A running sequence found no block for its next token.
    blocked: bool,
    /// Some sequence waits for the draft model.
    held: bool,
}

impl Scheduler {
    /// The next step to send, or `None` when nothing can run until a reply or a submission comes.
    ///
    /// The step is considered sent.
    pub fn next_step(&mut self) -> Option<Step> {
        if self.in_flight.len() > self.options.stages {
            return None;
        }
        let id = self.last_step + 1;
        let budget = self.options.limits.max_batch_tokens;
        let mut outline = loop {
            let mut outline = Outline { step: Step { id, ..Step::default() }, entries: Vec::new(), budget, blocked: false, held: false };
            self.add_decodes(&mut outline);
            self.add_prompts(&mut outline);
            self.starved = outline.blocked;
            if !outline.entries.is_empty() {
                break outline;
            }
            if outline.held || !self.fail_what_never_fits() {
                return None;
            }
        };
        self.last_step = id;
        self.counters.sizes.record(outline.step.tokens());
        outline.step.frees = std::mem::take(&mut self.frees);
        let slots = outline.step.sequences.iter().map(|part| part.adapter).filter(|slot| *slot > 0).collect();
        self.in_flight.push_back(StepRecord { id, entries: outline.entries, slots });
        Some(outline.step)
    }

    /// Sequences with one token to run. With several stages a step takes its share of them, those that waited longest first,
    /// so that every stage has a micro-batch to work on.
    fn add_decodes(&mut self, outline: &mut Outline) {
        let (context, stages) = (self.options.limits.max_context, self.options.stages);
        let mut decoding = 0;
        let mut ready: Vec<(u64, u64)> = Vec::new();
        let mut early: Vec<(u64, u64)> = Vec::new();
        for (arrival, (sequence, admission)) in &self.running {
            if sequence.ids.len() > admission.sent + 1 {
                continue;
            }
            decoding += 1;
            if is_ready(sequence, admission, context) {
                // A token drawn less than a pipeline's length ago would hold up the whole step.
                let soon = admission.pending > 0 && admission.last_step + stages as u64 > outline.step.id;
                if soon { &mut early } else { &mut ready }.push((admission.last_step, *arrival));
            }
        }
        let share = usize::div_ceil(decoding, stages).min(self.options.limits.max_batch_sequences);
        let mut worth = self.may_draft(decoding, share).then(|| Worth::of(share));
        if let Some(worth) = worth {
            self.follow_with_model(outline.step.id);
            self.hold_for_drafts(worth, share, &mut ready);
            self.hold_for_drafts(worth, share, &mut early);
            outline.held = self.ask_model(worth, share, outline.step.id, &mut ready);
            if outline.held && stages == 1 {
                // They read the weights together.
                return;
            }
        }
        // A mask takes less than the step that is running: whoever waits for it can be in the next one, which is not urgent yet.
        let awaited = || self.running.values().any(|(sequence, admission)| sequence.lacks_mask() && admission.pending == 0);
        if ready.is_empty() && (self.in_flight.is_empty() || !awaited()) {
            ready = early;
        }
        ready.sort_unstable();
        // The oldest of them first: blocks that run out are taken from the youngest, which are not in the step yet. Those behind
        // the share step in for what finds no block.
        let turn = share.min(ready.len());
        ready[..turn].sort_unstable_by_key(|(_, arrival)| *arrival);
        ready[turn..].sort_unstable_by_key(|(_, arrival)| *arrival);
        for (_, arrival) in ready {
            if outline.budget == 0 || outline.entries.len() >= share {
                return;
            }
            if !self.running.contains_key(&arrival) {
                continue;
            }
            if self.make_room(arrival, 1, outline.step.id) == 1 {
                let others = turn.saturating_sub(outline.entries.len());
                let drafts = match &mut worth {
                    Some(worth) => self.draft(arrival, worth, share, outline.budget.saturating_sub(others.max(1))),
                    None => Drafts::default(),
                };
                self.add(outline, arrival, 1, drafts);
            } else {
                outline.blocked = true;
            }
        }
    }

    /// What of prompts fits the budget that decodes left: see the module's policy.
    fn add_prompts(&mut self, outline: &mut Outline) {
        let left =
            self.running.iter().map(|(arrival, (s, a))| (s.ids.len().saturating_sub(a.sent), *arrival)).filter(|(left, _)| *left > 1);
        let mut prompts: Vec<(usize, u64)> = left.collect();
        // A sequence that lacks blocks gets those that come free before any younger one does.
        let long = prompts.first().is_some_and(|(left, _)| *left > outline.budget) && !self.starved && !outline.blocked;
        if long {
            let others = outline.budget / 2;
            let own = outline.budget - others;
            outline.budget = others;
            self.admit(outline);
            prompts[1..].sort_unstable();
            self.add_prefills(outline, &prompts[1..]);
            outline.budget += own;
            self.add_prefills(outline, &prompts[..1]);
        } else {
            self.add_prefills(outline, &prompts);
            if !outline.blocked {
                self.admit(outline);
            }
        }
    }

    /// The next chunks of sequences whose prompt is not through.
    fn add_prefills(&mut self, outline: &mut Outline, prompts: &[(usize, u64)]) {
        for &(_, arrival) in prompts {
            if outline.budget == 0 || outline.entries.len() >= self.options.limits.max_batch_sequences {
                return;
            }
            let Some(tokens) = self.chunk(arrival, outline.budget) else { continue };
            let tokens = self.make_room(arrival, tokens, outline.step.id);
            if tokens > 0 {
                self.add(outline, arrival, tokens, Drafts::default());
            } else {
                outline.blocked = true;
            }
        }
    }

    /// Takes sequences from the queue, in order, while they fit.
    fn admit(&mut self, outline: &mut Outline) {
        let limits = &self.options.limits;
        let (most, batch) = (limits.max_batch_sequences * self.options.stages, limits.max_batch_sequences);
        while outline.budget > 0 && outline.entries.len() < batch && self.running.len() < most {
            let Some(arrival) = self.waiting.first_key_value().map(|(arrival, _)| *arrival) else { return };
            if !self.try_admit(arrival, outline.budget) {
                return;
            }
            let Some(tokens) = self.chunk(arrival, outline.budget) else { continue };
            let tokens = self.fit(arrival, tokens);
            if tokens > 0 {
                self.grow(arrival, tokens);
                self.add(outline, arrival, tokens, Drafts::default());
            }
        }
    }

    /// Moves a waiting sequence to the running ones with its cached prefix, when there are blocks for its prompt.
    fn try_admit(&mut self, arrival: u64, budget: usize) -> bool {
        let whole_only = self.reads_whole();
        let Some(sequence) = self.waiting.get_mut(&arrival) else { return false };
        let known = sequence.ids.len();
        if (whole_only && known > budget) || sequence.lacks_mask() {
            return false;
        }
        let groups = &self.options.limits.kv.groups;
        let caching = self.options.limits.prefix_caching;
        // The last token is always run, since its result is what the sequence is here for.
        let limit = if caching { (known - 1).min(sequence.first_wanted()) / BLOCK_TOKENS } else { 0 };
        let whole = if caching { known / BLOCK_TOKENS } else { 0 };
        sequence.hash_blocks(whole);
        let hit = longest_hit(groups, &self.pools, &sequence.hashes, limit);
        if hit < limit && self.computing.contains_key(&sequence.hashes[hit]) {
            return false;
        }
        let mut tables = Vec::with_capacity(groups.len());
        for (group, pool) in groups.iter().zip(&mut self.pools) {
            let first = first_needed(group, hit * BLOCK_TOKENS);
            let blocks = sequence.hashes[first..hit].iter().filter_map(|h| pool.find(*h)).collect::<std::collections::VecDeque<_>>();
            blocks.iter().for_each(|b| pool.share(*b));
            tables.push(Table { first, blocks, announced: first });
        }
        let enough = groups.iter().zip(&self.pools).zip(&tables).all(|((group, pool), table)| {
            let last = match group.window {
                None => known + 1,
                // Chunks shrink to what there is; the first must not be tiny.
                Some(w) => known.min(hit * BLOCK_TOKENS + budget.min(w as usize)),
            };
            let need = last.div_ceil(BLOCK_TOKENS).saturating_sub(table.end());
            need <= pool.available() || (group.window.is_some() && self.running.is_empty())
        });
        if !enough {
            for (table, pool) in tables.iter().zip(&mut self.pools) {
                table.blocks.iter().rev().for_each(|b| pool.release(*b));
            }
            return false;
        }
        let Some(mut sequence) = self.waiting.remove(&arrival) else { return false };
        // All of the prompt's full-attention blocks at once, so that two half-read prompts never starve each other.
        for ((group, pool), table) in groups.iter().zip(&mut self.pools).zip(&mut tables) {
            while group.window.is_none() && table.end() < known.div_ceil(BLOCK_TOKENS) {
                let Some(block) = pool.allocate() else { break };
                table.blocks.push_back(block);
            }
        }
        self.last_sequence += 1;
        let id = self.last_sequence;
        for hash in &sequence.hashes[hit..whole] {
            self.computing.entry(*hash).or_insert(id);
        }
        let sent = hit * BLOCK_TOKENS;
        if !sequence.readmitted {
            sequence.cached = sent.min(sequence.submission.prompt.len());
            self.counters.prompt_tokens += known as u64;
            if caching {
                self.counters.prefix_query_tokens += known as u64;
                self.counters.prefix_hit_tokens += sent as u64;
            }
            self.events.push(Event { ticket: sequence.ticket, kind: EventKind::Started });
        }
        let admission =
            Admission { id, tables, sent, confirmed: sent, hashed: hit, begun: false, pending: 0, drafted: 0, last_step: 0, mask: None };
        self.running.insert(arrival, (sequence, admission));
        true
    }

    /// Tokens of a sequence's next prefill chunk.
    fn chunk(&self, arrival: u64, budget: usize) -> Option<usize> {
        let (sequence, admission) = self.running.get(&arrival)?;
        let left = sequence.ids.len().checked_sub(admission.sent).filter(|left| *left > 0)?;
        if self.reads_whole() {
            return Some(left);
        }
        Some(left.min(budget).min(self.piece(left)).min(sequence.submission.chunk.unwrap_or(usize::MAX).max(1)))
    }

    /// Most tokens of a chunk of a prompt that has the pipeline to itself and lacks `left` tokens: so few that every stage soon has a chunk
    /// to work on, where one chunk of them all would have the stages work one after the other.
    fn piece(&self, left: usize) -> usize {
        let stages = self.options.stages;
        let alone = self.running.len() == 1 && self.waiting.is_empty();
        if stages > 1 && alone { (left / (2 * stages)).max(LEAST_PIECE) } else { usize::MAX }
    }

    /// Allocates blocks for the next `tokens` tokens of a sequence, pre-empting younger ones; returns how many tokens fit.
    fn make_room(&mut self, arrival: u64, tokens: usize, step: u64) -> usize {
        loop {
            let fits = self.fit(arrival, tokens);
            if fits > 0 {
                self.grow(arrival, fits);
                return fits;
            }
            if !self.preempt_younger(arrival, step) {
                return 0;
            }
        }
    }

    /// How many of the next `tokens` tokens there are blocks for, in every group.
    fn fit(&self, arrival: u64, tokens: usize) -> usize {
        let Some((_, admission)) = self.running.get(&arrival) else { return 0 };
        let room =
            |(table, pool): (&Table, &super::BlockPool)| ((table.end() + pool.available()) * BLOCK_TOKENS).saturating_sub(admission.sent);
        admission.tables.iter().zip(&self.pools).map(room).fold(tokens, usize::min)
    }

    /// Allocates the blocks that [`Scheduler::fit`] found.
    pub(super) fn grow(&mut self, arrival: u64, tokens: usize) {
        let Some((_, admission)) = self.running.get_mut(&arrival) else { return };
        let end = (admission.sent + tokens).div_ceil(BLOCK_TOKENS);
        for (table, pool) in admission.tables.iter_mut().zip(&mut self.pools) {
            while table.end() < end {
                let Some(block) = pool.allocate() else { return };
                table.blocks.push_back(block);
            }
        }
    }

    /// Puts a sequence's next `tokens` tokens into the step, and drafts behind them.
    fn add(&mut self, outline: &mut Outline, arrival: u64, tokens: usize, Drafts { ids: drafts, by_model }: Drafts) {
        let (context, encoder) = (self.options.limits.max_context, self.reads_whole());
        let Some((sequence, admission)) = self.running.get_mut(&arrival) else { return };
        let (first, end) = (admission.sent, admission.sent + tokens);
        let known = sequence.ids.len();
        let input = if first < known {
            Input::Ids([&sequence.ids[first..end], &drafts].concat())
        } else {
            Input::Sampled { step: admission.last_step, drafts: drafts.clone() }
        };
        let (mut wants, mut results) = (Vec::new(), Vec::new());
        if first < sequence.submission.prompt.len() {
            collect_wants(sequence, first, end, &mut wants, &mut results);
        }
        let draws = end >= known && sequence.room(admission.pending, context) > 0;
        if draws {
            let offset = (tokens - 1) as u32;
            if sequence.submission.logits {
                wants.push(Want { offset, kind: WantKind::Logits });
                results.push(Purpose::Logits);
            }
            wants.extend((0..=drafts.len() as u32).map(|draft| Want { offset: offset + draft, kind: WantKind::Sample }));
            admission.pending += 1;
            if let Some((_, mask)) = &sequence.mask {
                let same = admission.mask.as_ref() == Some(mask);
                outline.step.masks.push((admission.id, if same { Mask::Unchanged } else { Mask::clone(mask) }));
                admission.mask = Some(mask.clone());
            }
        }
        let begin = (!admission.begun && !encoder).then(|| {
            Box::new(Begin {
                ids: sequence.ids.clone(),
                prompt_len: sequence.submission.prompt.len() as u32,
                sampling: sequence.submission.sampling.clone(),
            })
        });
        admission.begun = true;
        let mut tables = Vec::new();
        for (group, table) in admission.tables.iter_mut().enumerate() {
            let from = table.announced.max(table.first);
            if from < table.end() {
                let blocks = table.blocks.iter().skip(from - table.first).copied().collect();
                tables.push(TableChange { group: group as u32, first: from as u32, blocks });
                table.announced = table.end();
            }
        }
        outline.step.sequences.push(SequenceStep {
            sequence: admission.id,
            first_position: first as u32,
            input,
            tables,
            wants,
            begin,
            adapter: sequence.slot,
            second: sequence.submission.second,
        });
        outline.budget -= tokens + drafts.len();
        admission.sent = end + drafts.len();
        admission.drafted = drafts.len();
        outline.entries.push(Entry { arrival, sequence: admission.id, end, results, draws, drafts, by_model });
        admission.last_step = outline.step.id;
    }

    /// With nothing in flight and nothing to send, the oldest sequence needs more blocks than there are. Returns whether there
    /// was one.
    fn fail_what_never_fits(&mut self) -> bool {
        let mut all = self.running.values().map(|(sequence, _)| sequence).chain(self.waiting.values());
        if !self.in_flight.is_empty() || all.any(Sequence::lacks_mask) {
            return false;
        }
        let stuck = self.running.first_key_value().map(|(arrival, _)| *arrival);
        let Some(arrival) = stuck.or_else(|| self.waiting.first_key_value().map(|(arrival, _)| *arrival)) else { return false };
        let blocks: Vec<usize> = self.pools.iter().map(super::BlockPool::total).collect();
        self.fail(arrival, format!("the sequence needs more KV blocks than there are ({blocks:?} in the groups)"));
        true
    }
}

/// Whether a sequence with one token to run can run it now: its id is known, or is being drawn in a step before.
fn is_ready(sequence: &Sequence, admission: &Admission, context: usize) -> bool {
    if admission.sent < sequence.ids.len() {
        return !sequence.lacks_mask();
    }
    if sequence.submission.constraint.is_some() {
        return false;
    }
    // At the end of a prompt that nothing is drawn after, or of what may be drawn, there is no next token.
    admission.pending == 1 && admission.sent == sequence.ids.len() && sequence.room(1, context) > 0
}

/// What is wanted of prompt positions `first..end`, ascending, and where each result goes.
fn collect_wants(sequence: &Sequence, first: usize, end: usize, wants: &mut Vec<Want>, results: &mut Vec<Purpose>) {
    let mut found: Vec<(Want, Purpose)> = Vec::new();
    if let Some(top) = sequence.submission.score_prompt.filter(|_| !sequence.prompt_reported) {
        let last = end.min(sequence.submission.prompt.len().saturating_sub(1));
        for position in first.max(sequence.scores.len())..last {
            let kind = WantKind::Score { target: sequence.ids[position + 1], top };
            found.push((Want { offset: (position - first) as u32, kind }, Purpose::Score));
        }
    }
    for want in &sequence.submission.wants[sequence.next_want..] {
        let position = want.offset as usize;
        if (first..end).contains(&position) {
            found.push((Want { offset: (position - first) as u32, kind: want.kind.clone() }, Purpose::Want));
        }
    }
    found.sort_by_key(|(want, _)| want.offset);
    for (want, purpose) in found {
        wants.push(want);
        results.push(purpose);
    }
}
