//! Questions and parts of logits in frames.

use bytes::Bytes;
use engine::{Need, Question};
use plan::worker::Epoch;
use proto::{
    convert::{encode_epoch, f32s_from_bytes, f32s_to_bytes},
    worker::{self as wire, LinkFrame, link_frame::Message},
};

use super::FRAME;
use crate::failure::{Failure, Reason};

/// The frames of a question, of states of `width` values.
pub(super) fn question_frames(epoch: Epoch, question: &Question, width: usize) -> impl Iterator<Item = LinkFrame> {
    let rows = (FRAME / (4 * width.max(1))).max(1);
    let frames = question.needs.chunks(rows).zip(question.states.chunks(rows * width)).zip((0..).step_by(rows));
    frames.map(move |((needs, states), first)| {
        let frame = wire::QuestionFrame {
            epoch: Some(encode_epoch(epoch)),
            step: question.step,
            first_row: first as u32,
            total_rows: question.needs.len() as u32,
            needs: needs.iter().map(encode_need).collect(),
            data: f32s_to_bytes(states),
        };
        LinkFrame { message: Some(Message::Question(frame)) }
    })
}

/// The frames of a part; one of nothing where it is empty.
pub(super) fn part_frames(epoch: Epoch, step: u64, part: Vec<u8>) -> impl Iterator<Item = LinkFrame> {
    let part = Bytes::from(part);
    (0..part.len().max(1)).step_by(FRAME).map(move |first| {
        let frame = wire::PartFrame {
            epoch: Some(encode_epoch(epoch)),
            step,
            first_byte: first as u64,
            total_bytes: part.len() as u64,
            data: part.slice(first..part.len().min(first + FRAME)),
        };
        LinkFrame { message: Some(Message::Part(frame)) }
    })
}

fn encode_need(need: &Need) -> wire::Need {
    let top = u32::try_from(need.top).unwrap_or(u32::MAX);
    wire::Need { whole: need.whole, total: need.total, top, targets: need.targets.clone(), sparse: need.sparse }
}

fn decode_need(need: wire::Need) -> Need {
    Need { whole: need.whole, total: need.total, top: need.top as usize, targets: need.targets, sparse: need.sparse, draw: None }
}

/// A question that is arriving.
#[derive(Default)]
pub(super) struct Questions(Option<(Question, usize)>);

impl Questions {
    /// Takes a frame of a question of at most `most` rows of `width` values; the question that it completes.
    pub(super) fn take(&mut self, frame: wire::QuestionFrame, width: usize, most: usize) -> Result<Option<Question>, Failure> {
        let broken = |detail: String| Err(Failure::new(Reason::Protocol, format!("the question of step {}: {detail}", frame.step)));
        let total = frame.total_rows as usize;
        if total > most {
            return broken(format!("{total} rows are announced, expected at most {most}"));
        }
        let (mut question, expected) = self.0.take().unwrap_or((Question { step: frame.step, ..Question::default() }, total));
        let (first, rows) = (question.needs.len(), frame.needs.len());
        if (frame.step, total, frame.first_row as usize) != (question.step, expected, first) || rows == 0 || rows > total - first {
            return broken(format!(
                "rows {}..+{rows} of {total} came, expected some from {first} of {expected} of step {}",
                frame.first_row, question.step
            ));
        }
        if frame.data.len() != rows * width * 4 {
            return broken(format!("{} bytes came for {rows} rows of {width} values", frame.data.len()));
        }
        f32s_from_bytes(&frame.data, "question.data", &mut question.states)?;
        question.needs.extend(frame.needs.into_iter().map(decode_need));
        if question.needs.len() < total {
            self.0 = Some((question, total));
            return Ok(None);
        }
        Ok(Some(question))
    }
}

/// A part that is arriving.
#[derive(Default)]
pub(super) struct Parts(Option<(u64, Vec<u8>)>);

impl Parts {
    /// Takes a frame of a part of `expected` bytes; the step and the part that it completes.
    pub(super) fn take(&mut self, frame: &wire::PartFrame, expected: usize) -> Result<Option<(u64, Vec<u8>)>, Failure> {
        let (step, mut part) = self.0.take().unwrap_or((frame.step, Vec::new()));
        let (came, total, first) = (frame.data.len() as u64, frame.total_bytes, part.len() as u64);
        let fits = (came > 0 || total == 0) && came <= total.saturating_sub(first);
        if (frame.step, total, frame.first_byte) != (step, expected as u64, first) || !fits {
            let detail = format!(
                "bytes {}..+{came} of {total} of a part of step {} came, expected some from {first} of {expected} of step {step}",
                frame.first_byte, frame.step
            );
            return Err(Failure::new(Reason::Protocol, detail));
        }
        part.extend_from_slice(&frame.data);
        if part.len() < expected {
            self.0 = Some((step, part));
            return Ok(None);
        }
        Ok(Some((step, part)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EPOCH: Epoch = Epoch { number: 3, session: 4 };

    /// More rows than a frame holds.
    fn question() -> Question {
        let need = |row: usize| Need { total: row.is_multiple_of(2), top: row, targets: vec![row as u32; row % 3], ..Need::default() };
        let rows = FRAME / (4 * 1000) + 3;
        Question { step: 9, needs: (0..rows).map(need).collect(), states: (0..rows * 1000).map(|at| at as f32 * 0.5).collect() }
    }

    fn frames(question: &Question) -> Vec<wire::QuestionFrame> {
        let frame = |frame: LinkFrame| match frame.message {
            Some(Message::Question(frame)) => frame,
            other => panic!("{other:?}"),
        };
        question_frames(EPOCH, question, 1000).map(frame).collect()
    }

    fn part(step: u64, part: &[u8]) -> Vec<wire::PartFrame> {
        let frame = |frame: LinkFrame| match frame.message {
            Some(Message::Part(frame)) => frame,
            other => panic!("{other:?}"),
        };
        part_frames(EPOCH, step, part.to_vec()).map(frame).collect()
    }

    #[test]
    fn questions_survive_their_frames() {
        let (question, mut taken) = (question(), Questions::default());
        let sent = frames(&question);
        assert_eq!(sent.len(), 2);
        let mut take = |frame: &wire::QuestionFrame| taken.take(frame.clone(), 1000, 400).expect("a frame that fits");
        for _ in 0..2 {
            assert_eq!(take(&sent[0]), None);
            assert_eq!(take(&sent[1]), Some(question.clone()));
        }
    }

    #[test]
    fn frames_of_questions_that_do_not_fit_are_refused() {
        let sent = frames(&question());
        type Change = fn(&mut wire::QuestionFrame);
        let changes: [(Change, &str); 6] = [
            (|f| f.total_rows = 401, "at most 400"),
            (|f| f.first_row += 1, "expected some from"),
            (|f| f.step = 8, "of step"),
            (|f| f.needs.clear(), "expected some from"),
            (|f| f.data = f.data.slice(4..), "bytes came for"),
            (|f| f.total_rows = 1, "expected some from"),
        ];
        for (change, said) in changes {
            let mut questions = Questions::default();
            assert!(questions.take(sent[0].clone(), 1000, 400).expect("a frame that fits").is_none());
            let mut frame = sent[1].clone();
            change(&mut frame);
            let refused = questions.take(frame, 1000, 400).expect_err("it does not fit");
            assert!(refused.reason == Reason::Protocol && refused.detail.contains(said), "{refused}");
        }
    }

    #[test]
    fn parts_survive_their_frames_and_others_are_refused() {
        let bytes: Vec<u8> = (0..FRAME + 5).map(|at| at as u8).collect();
        let (sent, mut parts) = (part(9, &bytes), Parts::default());
        assert_eq!(sent.len(), 2);
        assert_eq!(parts.take(&sent[0], bytes.len()), Ok(None));
        assert_eq!(parts.take(&sent[1], bytes.len()), Ok(Some((9, bytes.clone()))));
        // Of no rows nothing comes, in a frame.
        assert_eq!(parts.take(&part(10, &[])[0], 0), Ok(Some((10, Vec::new()))));
        type Change = fn(&mut wire::PartFrame);
        let changes: [Change; 5] = [
            |f| f.step = 8,
            |f| f.first_byte -= 1,
            |f| f.total_bytes += 1,
            |f| f.data = Bytes::new(),
            |f| f.data = Bytes::from_static(b"more than five"),
        ];
        for change in changes {
            let mut parts = Parts::default();
            assert_eq!(parts.take(&sent[0], bytes.len()), Ok(None));
            let mut frame = sent[1].clone();
            change(&mut frame);
            assert_eq!(parts.take(&frame, bytes.len()).expect_err("it does not fit").reason, Reason::Protocol);
        }
        assert!(Parts::default().take(&sent[0], 7).is_err());
    }
}
