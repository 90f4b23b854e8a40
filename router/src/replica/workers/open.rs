//! Opens a session on every worker of a replica.

use std::{sync::PoisonError, time::Duration};

use futures_util::future::{join_all, try_join_all};
use plan::worker::Epoch;
use proto::{
    convert::{decode_epoch, encode_epoch},
    worker::{self as wire, AcquireRequest, ProbeRequest, SessionReply, SessionRequest, session_reply, session_request::Message},
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};

use super::{Fetching, ReplicaError, Workers, dial::Remote};

/// Protocol versions spoken here.
const VERSIONS: (u32, u32) = (1, 3);
/// Longest wait for an answer to a probe.
const PROBE: Duration = Duration::from_secs(2);
/// Longest wait for a grant: the arbiter probes every worker itself.
const ACQUIRE: Duration = Duration::from_secs(4);
/// A replica whose last owner was lost is free a second later; for so long the grant is asked for again.
const BUSY: (Duration, Duration) = (Duration::from_millis(1500), Duration::from_millis(50));
/// Longest wait for a welcome: the ranks meet, and the engine ends the step of the session before.
const WELCOME: Duration = Duration::from_secs(15);

/// One worker's ends of a session.
pub(super) struct Line {
    pub(super) requests: mpsc::Sender<SessionRequest>,
    pub(super) replies: Streaming<SessionReply>,
    /// Of the protocol.
    pub(super) version: u32,
}

/// A session of all workers, in their order.
pub(super) struct Opened {
    pub(super) epoch: Epoch,
    pub(super) lines: Vec<Line>,
}

/// Probes, acquires an epoch, and is welcomed by every worker.
pub(super) async fn open(replica: &Workers) -> Result<Opened, ReplicaError> {
    let arbiter = replica.first()?;
    let probes = join_all(replica.workers.iter().map(|w| probe(replica, w))).await;
    let mut least = None;
    let known = probes.iter().flatten().map(|said| said.fetching);
    let fetching = known.fold(Fetching::default(), |sum, f| Fetching { done: sum.done + f.done, total: sum.total + f.total });
    *replica.fetching.lock().unwrap_or_else(PoisonError::into_inner) = fetching;
    for (worker, probe) in replica.workers.iter().zip(probes) {
        if let Some(percent) = probe?.percent
            && least.is_none_or(|(_, p)| percent < p)
        {
            least = Some((worker, percent));
        }
    }
    if let Some((worker, percent)) = least {
        return Err(ReplicaError::Loading { worker: worker.name(), percent });
    }
    let (epoch, granted) = acquire(replica, arbiter).await?;
    let lines = replica.workers.iter().map(|w| line(replica, w, epoch, &granted));
    Ok(Opened { epoch, lines: try_join_all(lines).await? })
}

/// What a worker says of its weights.
struct Said {
    /// How much it has loaded, unless that is all.
    percent: Option<u8>,
    fetching: Fetching,
}

/// Whether a worker is there, and is who it should be, and what it says of its weights.
async fn probe(replica: &Workers, worker: &Remote) -> Result<Said, ReplicaError> {
    let mut client = worker.client()?;
    let answer = timeout(PROBE, client.probe(ProbeRequest {})).await;
    let answer = answer.map_err(|_| worker.lost(format!("it did not answer a probe within {} ms", PROBE.as_millis())))?;
    let answer = answer.map_err(|s| worker.refused(&s))?.into_inner();
    let got = answer.identity.unwrap_or_default();
    if (got.replica.as_str(), got.stage as usize, got.rank as usize) != (replica.name.as_str(), worker.stage, worker.rank) {
        let detail = format!("it is stage {} rank {} of {}, expected one of {}", got.stage, got.rank, got.replica, replica.name);
        return Err(worker.protocol(detail));
    }
    // Rounded down: 100 is for what is loaded.
    let percent = (!answer.loaded).then_some((answer.progress.clamp(0.0, 0.99) * 100.0) as u8);
    Ok(Said { percent, fetching: Fetching { done: answer.fetched_bytes.min(answer.fetch_bytes), total: answer.fetch_bytes } })
}

/// Asks the arbiter for an epoch: it, and the workers it was granted for.
async fn acquire(replica: &Workers, arbiter: &Remote) -> Result<(Epoch, Vec<wire::WorkerAddress>), ReplicaError> {
    let workers: Vec<_> = replica.workers.iter().map(|w| w.wire()).collect();
    let request = AcquireRequest { router: replica.router.clone(), workers, handover: false };
    let begun = Instant::now();
    let mut client = arbiter.client()?;
    loop {
        let answer = timeout(ACQUIRE, client.acquire(request.clone())).await;
        match answer.map_err(|_| arbiter.lost(format!("it granted no epoch within {} ms", ACQUIRE.as_millis())))? {
            Ok(reply) => {
                let reply = reply.into_inner();
                let epoch = decode_epoch(reply.epoch, "reply.epoch").map_err(|e| arbiter.protocol(e.to_string()))?;
                return Ok((epoch, reply.workers));
            }
            Err(status) if status.code() == Code::Aborted && begun.elapsed() < BUSY.0 => sleep(BUSY.1).await,
            Err(status) => return Err(arbiter.refused(&status)),
        }
    }
}

/// Says hello to a worker and waits for its welcome.
async fn line(replica: &Workers, worker: &Remote, epoch: Epoch, granted: &[wire::WorkerAddress]) -> Result<Line, ReplicaError> {
    let own = granted.iter().find(|w| (w.stage as usize, w.rank as usize) == (worker.stage, worker.rank));
    let incarnation = own.ok_or_else(|| worker.protocol("it is not among those the epoch was granted for"))?.incarnation;
    let (version_min, version_max) = VERSIONS;
    let hello = wire::Hello { version_min, version_max, epoch: Some(encode_epoch(epoch)), incarnation, workers: granted.to_vec() };
    let (requests, outgoing) = mpsc::channel(super::drive::requests(replica));
    let said = requests.try_send(SessionRequest { message: Some(Message::Hello(hello)) });
    said.map_err(|e| worker.lost(e.to_string()))?;
    let mut client = worker.client()?;
    let welcome = async {
        let mut replies = client.session(ReceiverStream::new(outgoing)).await.map_err(|s| worker.refused(&s))?.into_inner();
        loop {
            match replies.message().await.map_err(|s| worker.refused(&s))?.and_then(|r| r.message) {
                Some(session_reply::Message::Welcome(welcome)) => {
                    return check(worker, &welcome, epoch).map(|()| (replies, welcome.version));
                }
                Some(session_reply::Message::Failure(failure)) => return Err(failed(worker, failure)),
                Some(session_reply::Message::Heartbeat(_)) => {}
                Some(session_reply::Message::Step(_) | session_reply::Message::Adapter(_)) => {
                    return Err(worker.protocol("it answered before its welcome"));
                }
                None => return Err(worker.lost("it ended the session before its welcome")),
            }
        }
    };
    let replies = timeout(WELCOME, welcome).await;
    let (replies, version) =
        replies.map_err(|_| worker.lost(format!("it did not welcome the session within {} ms", WELCOME.as_millis())))??;
    Ok(Line { requests, replies, version })
}

fn check(worker: &Remote, welcome: &wire::Welcome, epoch: Epoch) -> Result<(), ReplicaError> {
    let got = decode_epoch(welcome.epoch, "welcome.epoch").map_err(|e| worker.protocol(e.to_string()))?;
    if got != epoch || !(VERSIONS.0..=VERSIONS.1).contains(&welcome.version) {
        let detail = format!("it welcomes epoch {got} in version {}, expected {epoch} in {VERSIONS:?}", welcome.version);
        return Err(worker.protocol(detail));
    }
    Ok(())
}

/// A worker's own word for what went wrong.
pub(super) fn failed(worker: &Remote, failure: wire::Failure) -> ReplicaError {
    ReplicaError::Failed { worker: worker.name(), reason: failure.reason, detail: failure.detail }
}
