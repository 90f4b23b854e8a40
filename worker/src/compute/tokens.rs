//! The tokens drawn last, by sequence, so that a step may continue from them before its owner has seen them.

use std::collections::HashMap;

use plan::step::{Input, Output, OutputValue, SequenceId, Step, TokenId};

use crate::{
    failure::{Failure, Reason},
    session::{Drawn, Stop},
};

/// Stands for a token whose draw failed. What is computed from it is discarded by the owner, but the other rows of the step need the row.
const PLACEHOLDER: TokenId = 0;

/// Each live sequence's last token.
#[derive(Debug, Default)]
pub(super) struct Tokens {
    /// The step that drew it and the token; nothing before the first draw.
    last: HashMap<SequenceId, Option<(u64, Option<TokenId>)>>,
    /// The last step whose tokens came.
    heard: u64,
}

impl Tokens {
    /// Notes the sequences that a step ends and goes on with.
    pub(super) fn follow(&mut self, step: &Step) {
        for sequence in &step.frees {
            self.last.remove(sequence);
        }
        for part in &step.sequences {
            self.last.entry(part.sequence).or_default();
        }
    }

    /// Takes tokens in the order of their steps. Those of sequences that have ended meanwhile are dropped.
    pub(super) fn hear(&mut self, drawn: Drawn) {
        self.heard = drawn.step;
        for (sequence, token) in drawn.tokens {
            if let Some(last) = self.last.get_mut(&sequence) {
                *last = Some((drawn.step, token));
            }
        }
    }

    /// Whether the tokens that a step continues from have been drawn, as far as they will be.
    pub(super) fn are_heard(&self, step: &Step) -> bool {
        step.sequences.iter().all(|part| match part.input {
            Input::Sampled { step: from, .. } => self.heard >= from || self.has(part.sequence, from),
            Input::Ids(_) => true,
        })
    }

    /// Puts ids in the place of "the token sampled in step s".
    pub(super) fn resolve(&self, step: &mut Step) -> Result<(), Stop> {
        for part in &mut step.sequences {
            let Input::Sampled { step: from, drafts } = &mut part.input else { continue };
            let Some(Some((_, token))) = self.last.get(&part.sequence).filter(|_| self.has(part.sequence, *from)) else {
                let detail = format!("step {} continues sequence {} from step {from}, which drew nothing for it", step.id, part.sequence);
                return Err(Failure::new(Reason::Protocol, detail).into());
            };
            let mut ids = vec![token.unwrap_or(PLACEHOLDER)];
            ids.append(drafts);
            part.input = Input::Ids(ids);
        }
        Ok(())
    }

    fn has(&self, sequence: SequenceId, step: u64) -> bool {
        matches!(self.last.get(&sequence), Some(Some((drawn, _))) if *drawn == step)
    }
}

/// The tokens among the outputs of a step; `None` when it drew none. A sequence's last draw counts.
pub(super) fn drawn(step: &Step, outputs: &[Output]) -> Option<Drawn> {
    let mut tokens: Vec<(SequenceId, Option<TokenId>)> = Vec::new();
    for output in outputs {
        let token = match output.value {
            OutputValue::Token { id, .. } => Some(id),
            OutputValue::Failed(_) => None,
            _ => continue,
        };
        match tokens.last_mut() {
            Some(last) if last.0 == output.sequence => last.1 = token,
            _ => tokens.push((output.sequence, token)),
        }
    }
    (!tokens.is_empty()).then_some(Drawn { step: step.id, tokens })
}

#[cfg(test)]
mod tests {
    use plan::step::SequenceStep;

    use super::*;

    fn step(id: u64, sequence: SequenceId, input: Input) -> Step {
        let part = SequenceStep { sequence, first_position: 0, input, tables: vec![], wants: vec![], begin: None, adapter: 0, second: 0 };
        Step { id, sequences: vec![part], ..Step::default() }
    }

    fn sampled(step: u64) -> Input {
        Input::Sampled { step, drafts: vec![8, 9] }
    }

    #[test]
    fn a_step_continues_from_the_token_of_the_step_it_names() {
        let mut tokens = Tokens::default();
        tokens.follow(&step(1, 7, Input::Ids(vec![1])));
        let mut next = step(2, 7, sampled(1));
        tokens.follow(&next);
        assert!(!tokens.are_heard(&next));
        tokens.hear(Drawn { step: 1, tokens: vec![(6, Some(5)), (7, Some(42))] });
        assert!(tokens.are_heard(&next));
        tokens.resolve(&mut next).expect("a token");
        assert_eq!(next.sequences[0].input, Input::Ids(vec![42, 8, 9]));
    }

    #[test]
    fn a_failed_draw_leaves_a_row_and_a_missing_one_ends_the_session() {
        let mut tokens = Tokens::default();
        tokens.follow(&step(1, 7, Input::Ids(vec![1])));
        tokens.hear(Drawn { step: 1, tokens: vec![(7, None)] });
        let mut next = step(2, 7, sampled(1));
        tokens.resolve(&mut next).expect("a placeholder");
        assert_eq!(next.sequences[0].input, Input::Ids(vec![PLACEHOLDER, 8, 9]));
        tokens.hear(Drawn { step: 3, tokens: vec![(6, Some(1))] });
        let mut missing = step(4, 7, sampled(3));
        assert!(tokens.are_heard(&missing), "no later step draws it");
        let missing = tokens.resolve(&mut missing);
        assert!(matches!(missing, Err(Stop::Failed(failure)) if failure.reason == Reason::Protocol));
    }

    #[test]
    fn tokens_of_ended_sequences_are_forgotten() {
        let mut tokens = Tokens::default();
        tokens.follow(&step(1, 7, Input::Ids(vec![1])));
        tokens.follow(&Step { id: 2, frees: vec![7], ..Step::default() });
        tokens.hear(Drawn { step: 1, tokens: vec![(7, Some(3))] });
        assert!(tokens.last.is_empty());
    }
}
