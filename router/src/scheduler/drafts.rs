//! Which sequences have drafts in a step, from where, and which wait for them.

use plan::{shard::BLOCK_TOKENS, step::TokenId};

use super::{
    Admission, BlockPool, Scheduler, Sequence, Table,
    drafter::MOST,
    worth::{Prospect, ROW, ROWS, Worth, drawn},
};

/// Ids that are guessed to follow a sequence, and whether the draft model guessed them.
#[derive(Default)]
pub(super) struct Drafts {
    pub(super) ids: Vec<TokenId>,
    pub(super) by_model: bool,
}

/// Whether a draft of a sequence that is alone brings more than it and waiting for it take.
pub(super) fn repays(trust: f32, cost: f32) -> bool {
    Worth::of(1).repays_waiting(Prospect { trust, price: drawn(cost, 1), most: MOST })
}

impl Scheduler {
    /// Whether drafts may be in a step for `share` of all `decoding` sequences: none take the place of a prompt, or of what a prompt waits for.
    pub(super) fn may_draft(&self, decoding: usize, share: usize) -> bool {
        let guesses = self.prompt_lookup > 0 || self.drafter.is_some();
        guesses && share < ROWS && decoding == self.running.len() && self.waiting.is_empty()
    }

    /// Has the draft model keep up with all whom it may guess for. Where a guess would not even repay a sequence that is alone, it pauses.
    pub(super) fn follow_with_model(&mut self, now: u64) {
        let Some(drafter) = &mut self.drafter else { return };
        for (arrival, (sequence, _)) in &mut self.running {
            let known = sequence.ids.len();
            let Some(trust) = sequence.trust.of(known).filter(|_| sequence.may_be_drafted()) else { continue };
            if repays(trust, drafter.cost) {
                drafter.follow(*arrival, known, now);
            } else {
                sequence.trust.pause(known);
            }
        }
    }

    /// Takes out of `ready` those that rather wait for the token being drawn, since drafts can only follow one that is known. With one stage
    /// all others wait with them, and read the weights together.
    pub(super) fn hold_for_drafts(&self, worth: Worth, share: usize, ready: &mut Vec<(u64, u64)>) {
        let drawing = |arrival: &u64| self.running.get(arrival).filter(|(_, admission)| admission.pending > 0);
        let waits = |arrival: &u64| {
            let prospect = drawing(arrival).and_then(|(sequence, _)| self.prospect(*arrival, sequence, share));
            prospect.is_some_and(|(prospect, _)| worth.repays_waiting(prospect))
        };
        let together = self.options.stages == 1
            && (self.running.values().any(|(_, admission)| admission.drafted > 0) || ready.iter().any(|(_, arrival)| waits(arrival)));
        ready.retain(|(_, arrival)| if together { drawing(arrival).is_none() } else { !waits(arrival) });
    }

    /// Asks the draft model for what may follow those of `ready` whose next token is known, and takes out of it those that wait for the answer;
    /// returns whether there are any.
    pub(super) fn ask_model(&mut self, mut worth: Worth, share: usize, now: u64, ready: &mut Vec<(u64, u64)>) -> bool {
        let before = ready.len();
        ready.retain(|(_, arrival)| !self.waits_for_model(*arrival, &mut worth, share, now));
        ready.len() < before
    }

    fn waits_for_model(&mut self, arrival: u64, worth: &mut Worth, share: usize, now: u64) -> bool {
        let Some((sequence, admission)) = self.running.get(&arrival) else { return false };
        let known = sequence.ids.len();
        let Some((prospect, by_model)) = self.prospect(arrival, sequence, share).filter(|_| admission.sent + 1 == known) else {
            return false;
        };
        let most = prospect.most.min(self.room_for_drafts(sequence, admission));
        let Some(drafter) = self.drafter.as_mut().filter(|_| by_model) else {
            worth.add(Prospect { most, ..prospect });
            return false;
        };
        if let Some(guess) = drafter.guess(arrival, known) {
            worth.add(Prospect { price: ROW, most: most.min(guess.len()), ..prospect });
            return false;
        }
        if drafter.is_drawing(arrival, known) {
            worth.add(Prospect { most, ..prospect });
            return true;
        }
        let n = worth.add(Prospect { most, ..prospect });
        n > 0 && drafter.ask(arrival, &sequence.ids, n, now)
    }

    /// What may be drafted for a sequence, and whether by the draft model: by whom it is trusted more, and by the lookup where there is no
    /// difference, since that takes no time.
    fn prospect(&self, arrival: u64, sequence: &Sequence, share: usize) -> Option<(Prospect, bool)> {
        let looked_up = sequence.lookup.trust(&sequence.ids).filter(|_| self.prompt_lookup > 0);
        let looked_up = looked_up.map(|trust| (Prospect { trust, price: ROW, most: self.prompt_lookup }, false));
        let by_model = self.drafter.as_ref().filter(|_| sequence.may_be_drafted()).and_then(|drafter| {
            let (trust, most) = (sequence.trust.of(sequence.ids.len())?, drafter.most(arrival, sequence.ids.len()));
            (most > 0).then_some((Prospect { trust, price: drawn(drafter.cost, share), most }, true))
        });
        match (looked_up, by_model) {
            (Some(looked_up), Some(by_model)) => Some(if by_model.0.trust > looked_up.0.trust { by_model } else { looked_up }),
            (one, other) => one.or(other),
        }
    }

    /// Most drafts that may follow a sequence's next token: behind the last one more token is drawn, and a block more is taken only where
    /// every sequence could have one.
    fn room_for_drafts(&self, sequence: &Sequence, admission: &Admission) -> usize {
        let (context, sequences) = (self.options.limits.max_context, self.running.len());
        let room = sequence.room(0, context).saturating_sub(1);
        let most = room.min(sequence.submission.chunk.map_or(usize::MAX, |most| most.saturating_sub(1)));
        let held = |(table, pool): (&Table, &BlockPool)| {
            ((table.end() + usize::from(pool.available() > sequences)) * BLOCK_TOKENS).saturating_sub(admission.sent + 1)
        };
        admission.tables.iter().zip(&self.pools).map(held).fold(most, usize::min)
    }

    /// Drafts that follow a sequence's next token, at most `most`; allocates their blocks.
    pub(super) fn draft(&mut self, arrival: u64, worth: &mut Worth, share: usize, most: usize) -> Drafts {
        let Some((sequence, admission)) = self.running.get(&arrival) else { return Drafts::default() };
        let known = sequence.ids.len();
        let Some((prospect, by_model)) = self.prospect(arrival, sequence, share).filter(|_| admission.sent + 1 == known) else {
            return Drafts::default();
        };
        let most = most.min(prospect.most).min(self.room_for_drafts(sequence, admission));
        let ids = if by_model {
            // What was drawn has been paid for.
            let guess = self.drafter.as_ref().and_then(|drafter| drafter.guess(arrival, known)).unwrap_or_default();
            let n = worth.add(Prospect { price: ROW, most: most.min(guess.len()), ..prospect });
            guess[..n].to_vec()
        } else {
            sequence.lookup.guess(&sequence.ids, worth.add(Prospect { most, ..prospect }))
        };
        self.grow(arrival, 1 + ids.len());
        Drafts { ids, by_model }
    }
}
