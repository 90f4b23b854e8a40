//! Links that this worker opens.

use std::sync::Arc;

use engine::Question;
use futures_util::future::try_join_all;
use plan::worker::Epoch;
use proto::{
    convert::{encode_epoch, f32s_to_bytes},
    worker::{self as wire, LinkAck, LinkFrame, link_frame::Message},
};
use tokio::{runtime::Handle, sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::{
    Cargo, FRAME, targets,
    vocabulary::{part_frames, question_frames},
};
use crate::{
    failure::{Failure, Reason},
    peer,
    session::{Drawn, Ending, Live, Stop, send},
    state::Worker,
};

/// Frames that may wait for a link: a megabyte is on the wire while the next is made. A link that is slower makes the engine wait.
const FRAMES: usize = 2;

struct Edge {
    cargo: Cargo,
    frames: mpsc::Sender<LinkFrame>,
}

/// The links of one session.
pub(crate) struct Outbound {
    epoch: Epoch,
    runtime: Handle,
    ending: Arc<Ending>,
    edges: Vec<Edge>,
}

impl Outbound {
    /// Sends the hidden states of a step, `[rows, hidden]`, to the next stage. Blocks while the links are full.
    pub(crate) fn hidden(&self, step: u64, rows: usize, values: &[f32]) -> Result<(), Stop> {
        let width = values.len() / rows;
        let rows_of_frame = (FRAME / (4 * width.max(1))).max(1);
        for first in (0..rows).step_by(rows_of_frame) {
            let end = rows.min(first + rows_of_frame);
            let frame = wire::HiddenFrame {
                epoch: Some(encode_epoch(self.epoch)),
                step,
                first_row: first as u32,
                rows: (end - first) as u32,
                total_rows: rows as u32,
                data: f32s_to_bytes(&values[first * width..end * width]),
            };
            self.send(Cargo::Hidden, &LinkFrame { message: Some(Message::Hidden(frame)) })?;
        }
        Ok(())
    }

    /// Sends the tokens of a step to the first stage.
    pub(crate) fn tokens(&self, drawn: &Drawn) -> Result<(), Stop> {
        let mut frame = wire::TokensFrame { epoch: Some(encode_epoch(self.epoch)), step: drawn.step, ..wire::TokensFrame::default() };
        for (sequence, token) in &drawn.tokens {
            match token {
                Some(id) => {
                    frame.sequences.push(*sequence);
                    frame.ids.push(*id);
                }
                None => frame.failed.push(*sequence),
            }
        }
        self.send(Cargo::Tokens, &LinkFrame { message: Some(Message::Tokens(frame)) })
    }

    /// Asks the first stage for its part of logits.
    pub(crate) fn question(&self, question: &Question, width: usize) -> Result<(), Stop> {
        question_frames(self.epoch, question, width).try_for_each(|frame| self.send(Cargo::Tokens, &frame))
    }

    /// Sends the part of logits of this rank, `rank` of the first stage, to the sampler.
    pub(crate) fn part(&self, step: u64, rank: usize, part: Vec<u8>) -> Result<(), Stop> {
        part_frames(self.epoch, step, part).try_for_each(|frame| self.send(Cargo::Parts(rank), &frame))
    }

    fn send(&self, cargo: Cargo, frame: &LinkFrame) -> Result<(), Stop> {
        for edge in self.edges.iter().filter(|e| e.cargo == cargo) {
            send(&self.runtime, &self.ending, &edge.frames, frame.clone())?;
        }
        Ok(())
    }
}

/// Opens all links of this worker; each is accepted before this returns.
pub(crate) async fn dial(worker: &Arc<Worker>, live: &Arc<Live>) -> Result<Outbound, Failure> {
    let edges = targets(worker, &live.workers).into_iter().map(|(to, cargo)| {
        let opened = timeout(worker.deadlines.meet, open(worker, live, to, cargo));
        async move { opened.await.unwrap_or_else(|_| Err(Failure::new(Reason::Link, format!("{} took no link in time", peer::name(to))))) }
    });
    let edges = try_join_all(edges).await?;
    Ok(Outbound { epoch: live.epoch, runtime: worker.runtime.clone(), ending: live.ending.clone(), edges })
}

async fn open(worker: &Arc<Worker>, live: &Arc<Live>, to: &wire::WorkerAddress, cargo: Cargo) -> Result<Edge, Failure> {
    let failed = |status: tonic::Status| Failure::new(Reason::Link, format!("{} took no link: {}", peer::name(to), status.message()));
    let mut client = peer::dial(worker, to.stage, &to.address, worker.deadlines.meet).await.map_err(failed)?;
    let (frames, outgoing) = mpsc::channel(FRAMES);
    let hello = wire::LinkHello {
        epoch: Some(encode_epoch(live.epoch)),
        from: Some(worker.identity()),
        to_incarnation: to.incarnation,
        parts: matches!(cargo, Cargo::Parts(_)),
    };
    let greeted = frames.try_send(LinkFrame { message: Some(Message::Hello(hello)) });
    greeted.map_err(|e| Failure::new(Reason::Link, e.to_string()))?;
    let acks = client.link(ReceiverStream::new(outgoing)).await.map_err(failed)?.into_inner();
    worker.tasks.spawn(watch(worker.clone(), live.clone(), peer::name(to), acks));
    Ok(Edge { cargo, frames })
}

/// Holds a link open: until the session fails, or everything sent in it was received.
async fn watch(worker: Arc<Worker>, live: Arc<Live>, to: String, mut acks: Streaming<LinkAck>) {
    let late = async {
        live.ending.over().await;
        tokio::time::sleep(worker.deadlines.stop).await;
    };
    tokio::pin!(late);
    loop {
        tokio::select! {
            biased;
            () = live.ending.failed() => return,
            () = &mut late => return,
            ack = acks.message() => match ack {
                Ok(Some(_)) => {}
                Ok(None) if live.is_over() => return,
                Ok(None) => return live.fail(Failure::new(Reason::PeerLost, format!("{to} ended its link"))),
                Err(status) => return live.fail(Failure::new(Reason::PeerLost, format!("the link to {to} broke: {}", status.message()))),
            }
        }
    }
}
