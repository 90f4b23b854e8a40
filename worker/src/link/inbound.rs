//! The link that comes into this worker.

use std::sync::Arc;

use proto::{
    convert::{decode_epoch, f32s_from_bytes},
    worker::{self as wire, LinkAck, LinkFrame, link_frame::Message},
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::{
    Cargo, source,
    vocabulary::{Parts, Questions},
};
use crate::{
    failure::{Failure, Reason},
    session::{Drawn, Live},
    state::Worker,
};

/// Acknowledgements that may wait: each says all that those before it say, so more are dropped.
const ACKS: usize = 4;

type Acks = ReceiverStream<Result<LinkAck, Status>>;

fn refused(failure: &Failure) -> Status {
    Status::failed_precondition(failure.to_string())
}

/// Takes a link of the present epoch, or of one that begins shortly.
pub(crate) async fn accept(worker: Arc<Worker>, mut frames: Streaming<LinkFrame>) -> Result<Acks, Status> {
    let protocol = |detail: &str| refused(&Failure::new(Reason::Protocol, detail));
    let first = timeout(worker.deadlines.hello, frames.message()).await.map_err(|_| protocol("no hello came in time"))??;
    let Some(Message::Hello(hello)) = first.and_then(|f| f.message) else {
        return Err(protocol("a link begins with something else than a hello"));
    };
    let epoch = decode_epoch(hello.epoch, "hello.epoch").map_err(|e| refused(&e.into()))?;
    if hello.to_incarnation != worker.incarnation {
        let detail = format!("the link is for incarnation {:016x}, this is {:016x}", hello.to_incarnation, worker.incarnation);
        return Err(refused(&Failure::new(Reason::Incarnation, detail)));
    }
    let live = worker.gate.session(epoch, worker.deadlines.hello).await.map_err(|f| refused(&f))?;
    let cargo = expected(&worker, &live, &hello).map_err(|f| refused(&f))?;
    let (send, acks) = mpsc::channel(ACKS);
    worker.tasks.spawn(run(worker.clone(), live, frames, cargo, send));
    Ok(ReceiverStream::new(acks))
}

/// What the link brings, if it is the one that is expected.
fn expected(worker: &Worker, live: &Live, hello: &wire::LinkHello) -> Result<Cargo, Failure> {
    let failed = |detail: String| Err(Failure::new(Reason::Link, detail));
    let Some(from) = &hello.from else { return failed("the link does not say whom it is from".into()) };
    let parts = hello.parts.then_some(from.rank as usize);
    let Some(((stage, rank), cargo)) = source(worker, &live.workers, parts) else { return failed("no link is expected here".into()) };
    let granted = live.workers.iter().find(|w| (w.stage as usize, w.rank as usize) == (stage, rank));
    let known = granted.is_some_and(|w| (w.stage, w.rank, w.incarnation) == (from.stage, from.rank, from.incarnation));
    if !known || from.replica != worker.spec.replica {
        return failed(format!(
            "a link came from stage {} rank {} of {}, expected one from stage {stage} rank {rank} of {} as granted",
            from.stage, from.rank, from.replica, worker.spec.replica
        ));
    }
    if !live.claim_link(cargo) {
        return failed("there is a link already".into());
    }
    Ok(cargo)
}

async fn run(
    worker: Arc<Worker>,
    live: Arc<Live>,
    mut frames: Streaming<LinkFrame>,
    cargo: Cargo,
    acks: mpsc::Sender<Result<LinkAck, Status>>,
) {
    let mut receiver =
        Receiver { worker: &worker, live: &live, cargo, partial: None, questions: Questions::default(), parts: Parts::default() };
    loop {
        let frame = tokio::select! {
            biased;
            () = live.ending.over() => return,
            frame = frames.message() => frame,
        };
        match frame {
            Ok(Some(frame)) => match receiver.take(frame) {
                // A full queue holds an older number; the next one says this too.
                Ok(Some(step)) => {
                    let _ = acks.try_send(Ok(LinkAck { step }));
                }
                Ok(None) => {}
                Err(failure) => return live.fail(failure),
            },
            Ok(None) => return live.inbox.unlink(cargo),
            Err(status) => return live.fail(Failure::new(Reason::PeerLost, format!("the inbound link broke: {}", status.message()))),
        }
    }
}

struct Receiver<'a> {
    worker: &'a Worker,
    live: &'a Live,
    cargo: Cargo,
    /// The hidden state that is arriving: step, rows in all, rows so far, values.
    partial: Option<(u64, u32, u32, Vec<f32>)>,
    questions: Questions,
    parts: Parts,
}

impl Receiver<'_> {
    /// Takes a frame; the step that it completes.
    fn take(&mut self, frame: LinkFrame) -> Result<Option<u64>, Failure> {
        match (frame.message, self.cargo) {
            (Some(Message::Hidden(frame)), Cargo::Hidden) => self.hidden(&frame),
            (Some(Message::Tokens(frame)), Cargo::Tokens) => self.tokens(frame).map(Some),
            (Some(Message::Question(frame)), Cargo::Tokens) => self.question(frame),
            (Some(Message::Part(frame)), Cargo::Parts(rank)) => self.part(rank, &frame),
            (_, cargo) => Err(Failure::new(Reason::Protocol, format!("a frame came that is not {cargo:?}"))),
        }
    }

    fn check(&self, epoch: Option<wire::Epoch>) -> Result<(), Failure> {
        let epoch = decode_epoch(epoch, "frame.epoch")?;
        if epoch == self.live.epoch {
            return Ok(());
        }
        Err(Failure::new(Reason::StaleEpoch, format!("a frame of epoch {epoch} came, expected {}", self.live.epoch)))
    }

    fn hidden(&mut self, frame: &wire::HiddenFrame) -> Result<Option<u64>, Failure> {
        self.check(frame.epoch)?;
        let (width, most) = (self.worker.spec.config.hidden, self.worker.spec.max_batch_tokens);
        let broken = |detail: String| Err(Failure::new(Reason::Protocol, format!("hidden state of step {}: {detail}", frame.step)));
        let (step, total, mut rows, mut values) = match self.partial.take() {
            Some(partial) => partial,
            None if frame.total_rows as usize > most => {
                return broken(format!("{} rows are announced, expected at most {most}", frame.total_rows));
            }
            None => (frame.step, frame.total_rows, 0, Vec::with_capacity(frame.total_rows as usize * width)),
        };
        if (frame.step, frame.total_rows, frame.first_row) != (step, total, rows) || frame.rows == 0 || frame.rows > total - rows {
            return broken(format!(
                "rows {}..+{} of {} came, expected some from {rows} of {total} of step {step}",
                frame.first_row, frame.rows, frame.total_rows
            ));
        }
        if frame.data.len() != frame.rows as usize * width * 4 {
            return broken(format!("{} bytes came for {} rows of {width} values", frame.data.len(), frame.rows));
        }
        f32s_from_bytes(&frame.data, "hidden.data", &mut values)?;
        rows += frame.rows;
        if rows < total {
            self.partial = Some((step, total, rows, values));
            return Ok(None);
        }
        self.live.inbox.push_hidden(step, values)?;
        Ok(Some(step))
    }

    fn question(&mut self, frame: wire::QuestionFrame) -> Result<Option<u64>, Failure> {
        self.check(frame.epoch)?;
        let spec = &self.worker.spec;
        let Some(question) = self.questions.take(frame, spec.config.hidden, spec.max_batch_tokens)? else { return Ok(None) };
        let step = question.step;
        self.live.inbox.push_question(question).map(|()| Some(step))
    }

    fn part(&mut self, rank: usize, frame: &wire::PartFrame) -> Result<Option<u64>, Failure> {
        self.check(frame.epoch)?;
        let expected = self.live.inbox.part_bytes(frame.step, rank)?;
        let Some((step, part)) = self.parts.take(frame, expected)? else { return Ok(None) };
        self.live.inbox.push_part(step, rank, part);
        Ok(Some(step))
    }

    fn tokens(&self, frame: wire::TokensFrame) -> Result<u64, Failure> {
        self.check(frame.epoch)?;
        if frame.sequences.len() != frame.ids.len() {
            let detail = format!("tokens of step {}: {} sequences and {} ids", frame.step, frame.sequences.len(), frame.ids.len());
            return Err(Failure::new(Reason::Protocol, detail));
        }
        let drawn = frame.sequences.into_iter().zip(frame.ids.into_iter().map(Some));
        let tokens = drawn.chain(frame.failed.into_iter().map(|sequence| (sequence, None))).collect();
        self.live.inbox.push_tokens(Drawn { step: frame.step, tokens })?;
        Ok(frame.step)
    }
}
