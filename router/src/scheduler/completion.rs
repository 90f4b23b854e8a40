//! Taking in a step's results: tokens, scores, ends; blocks that are now known or passed.

use plan::{
    shard::BLOCK_TOKENS,
    step::{Output, OutputValue},
};

use super::{
    Entry, Event, EventKind, Purpose, ReplyError, Scheduler, blocks::BlockPool, prefix::first_needed, sequence::Admission, worth::ROWS,
};
use crate::edge::FinishReason;

impl Scheduler {
    /// Takes the results of the oldest step in flight.
    ///
    /// Results of sequences that ended or were sent back meanwhile are dropped.
    ///
    /// # Errors
    /// When the reply does not answer that step. The scheduler is then of no more use.
    pub fn reply(&mut self, step: u64, outputs: Vec<Output>) -> Result<(), ReplyError> {
        let expected = self.in_flight.front().map(|s| s.id);
        let record = match self.in_flight.pop_front() {
            Some(record) if record.id == step => record,
            _ => return Err(ReplyError::Order { got: step, expected }),
        };
        let mut outputs = outputs.into_iter().peekable();
        for entry in record.entries {
            let mut own = Vec::with_capacity(entry.wanted());
            while let Some(output) = outputs.next_if(|o| o.sequence == entry.sequence) {
                own.push(output);
            }
            self.apply(step, entry, own)?;
        }
        match outputs.next() {
            Some(extra) => {
                let detail = format!("result for sequence {}, which wanted none there", extra.sequence);
                Err(ReplyError::Outputs { step, detail })
            }
            None => Ok(()),
        }
    }

    fn apply(&mut self, step: u64, entry: Entry, outputs: Vec<Output>) -> Result<(), ReplyError> {
        if self.running.get(&entry.arrival).is_none_or(|(_, a)| a.id != entry.sequence) {
            return Ok(());
        }
        if let Some(message) = outputs.iter().find_map(|o| match &o.value {
            OutputValue::Failed(message) => Some(message.clone()),
            _ => None,
        }) {
            self.fail(entry.arrival, message);
            return Ok(());
        }
        let wanted = entry.wanted();
        if outputs.len() != wanted {
            let detail = format!("{} results for sequence {}, expected {wanted}", outputs.len(), entry.sequence);
            return Err(ReplyError::Outputs { step, detail });
        }
        let running = self.running.len();
        let Some((sequence, admission)) = self.running.get_mut(&entry.arrival) else { return Ok(()) };
        let mut drawn = Vec::new();
        for (i, output) in outputs.into_iter().enumerate() {
            match (entry.results.get(i), output.value) {
                (Some(Purpose::Score), OutputValue::Score(logprobs)) => sequence.scores.push(logprobs),
                (Some(Purpose::Want), value) => {
                    sequence.next_want += 1;
                    let output = Output { value, ..output };
                    self.events.push(Event { ticket: sequence.ticket, kind: EventKind::Output(output) });
                }
                (Some(Purpose::Logits), value @ OutputValue::Logits(_)) => {
                    let output = Output { value, ..output };
                    self.events.push(Event { ticket: sequence.ticket, kind: EventKind::Output(output) });
                }
                (None, OutputValue::Token { id, logprobs }) => drawn.push((id, logprobs)),
                _ => {
                    let detail = format!("result {i} of sequence {} is of another kind than wanted", entry.sequence);
                    return Err(ReplyError::Outputs { step, detail });
                }
            }
        }
        admission.confirmed = entry.end;
        if !sequence.prompt_reported && entry.end >= sequence.submission.prompt.len() {
            sequence.prompt_reported = true;
            let kind = EventKind::Prompt { cached_tokens: sequence.cached as u32, scores: std::mem::take(&mut sequence.scores) };
            self.events.push(Event { ticket: sequence.ticket, kind });
        }
        let mut end = None;
        if entry.draws {
            admission.pending -= 1;
            let before = sequence.ids.len();
            // What was drawn counts up to the first token that is not the draft behind it: those after it were drawn of another text.
            let mut drafts = entry.drafts.iter();
            for (id, logprobs) in drawn {
                sequence.ids.push(id);
                self.events.push(Event { ticket: sequence.ticket, kind: EventKind::Token { id, logprobs } });
                if sequence.submission.end_ids.contains(&id) {
                    end = Some(FinishReason::Stop);
                } else if sequence.room(0, self.options.limits.max_context) == 0 {
                    end = Some(FinishReason::Length);
                }
                if end.is_some() || drafts.next() != Some(&id) {
                    break;
                }
            }
            if !entry.drafts.is_empty() {
                let accepted = sequence.ids.len() - before - 1;
                if entry.by_model {
                    sequence.trust.learn(accepted, end.is_none() && accepted < entry.drafts.len());
                }
                admission.go_back(entry.end + accepted, &mut self.pools);
                self.counters.drafts += 1;
                self.counters.draft_tokens += entry.drafts.len() as u64;
                self.counters.accepted_tokens += accepted as u64;
            }
            if self.prompt_lookup > 0 && end.is_none() && running < ROWS * self.options.stages && sequence.may_be_drafted() {
                sequence.lookup.follow(&sequence.ids);
            }
        } else if entry.end == sequence.ids.len() && admission.pending == 0 {
            end = Some(FinishReason::Length);
        }
        self.settle(entry.arrival);
        if let Some(reason) = end
            && let Some(sequence) = self.evict(entry.arrival)
        {
            self.tickets.remove(&sequence.ticket);
            self.events.push(Event { ticket: sequence.ticket, kind: EventKind::Finished(reason) });
        }
        Ok(())
    }

    /// Offers blocks that are now whole and known to the cache, and gives back those of window groups that are passed.
    fn settle(&mut self, arrival: u64) {
        let Some((sequence, admission)) = self.running.get_mut(&arrival) else { return };
        if self.options.limits.prefix_caching {
            let whole = admission.confirmed / BLOCK_TOKENS;
            sequence.hash_blocks(whole);
            for block in admission.hashed..whole {
                let hash = sequence.hashes[block];
                for (table, pool) in admission.tables.iter().zip(&mut self.pools) {
                    if let Some(id) = block.checked_sub(table.first).and_then(|i| table.blocks.get(i)) {
                        pool.register(*id, hash);
                    }
                }
                if self.computing.get(&hash) == Some(&admission.id) {
                    self.computing.remove(&hash);
                }
            }
            admission.hashed = admission.hashed.max(whole);
        }
        for ((group, pool), table) in self.options.limits.kv.groups.iter().zip(&mut self.pools).zip(&mut admission.tables) {
            let needed = first_needed(group, admission.confirmed);
            while table.first < needed {
                let Some(block) = table.blocks.pop_front() else { break };
                table.first += 1;
                pool.release(block);
            }
        }
    }
}

impl Entry {
    /// Number of results.
    fn wanted(&self) -> usize {
        self.results.len() + if self.draws { 1 + self.drafts.len() } else { 0 }
    }
}

impl Admission {
    /// Goes on at `position` after the step with its drafts. Those behind were refused: their entries are overwritten, and blocks that held
    /// nothing else are given back.
    fn go_back(&mut self, position: usize, pools: &mut [BlockPool]) {
        (self.sent, self.confirmed, self.drafted) = (position, position, 0);
        let end = (position + 1).div_ceil(BLOCK_TOKENS);
        for (table, pool) in self.tables.iter_mut().zip(pools) {
            while table.end() > end {
                let Some(block) = table.blocks.pop_back() else { break };
                pool.release(block);
            }
            table.announced = table.announced.min(table.end());
        }
    }
}
