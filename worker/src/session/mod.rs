//! One session: from the owner's hello to its end.

mod ending;
mod inbox;
mod live;
mod masks;

use std::{sync::Arc, time::Duration};

use plan::worker::Epoch;
use proto::{
    convert::{decode_epoch, decode_load, decode_mask, decode_step, encode_epoch},
    worker::{self as wire, session_reply, session_request::Message},
};
use tokio::{
    runtime::Handle,
    sync::{
        mpsc::{self, error::TrySendError},
        oneshot,
    },
    time::timeout,
};
use tonic::Streaming;
use tracing::{debug, info};

pub(crate) use ending::{Ending, Replies};
pub(crate) use inbox::{Drawn, Stop, Work};
pub(crate) use live::Live;
pub(crate) use masks::Masks;

use crate::{
    adapters,
    collective::{self, Address, Group},
    compute::Job,
    failure::{Failure, Reason, chain},
    link, peer,
    state::Worker,
};

/// Protocol versions spoken here.
const VERSIONS: (u32, u32) = (1, 3);
/// The first with adapters.
const ADAPTERS: u32 = 2;
/// Most adapters that are loaded at a time.
const LOADING: usize = 256;
/// Replies that may wait for the owner to read them, beside one per step: heartbeats of some seconds. A full queue drops heartbeats only.
const HEARTBEATS: usize = 32;

/// Steps that may wait: as many as an owner has in flight (one per stage and one more), twice over for workers that are behind.
pub(crate) fn most_steps(stages: usize) -> usize {
    2 * (stages + 1)
}

/// Starts to serve a session; what comes back is the owner's stream.
pub(crate) fn start(worker: &Arc<Worker>, requests: Streaming<wire::SessionRequest>) -> Replies {
    let (replies, receive) = mpsc::channel(most_steps(worker.spec.shard.stages) + HEARTBEATS);
    let ending = Arc::new(Ending::default());
    worker.tasks.spawn(run(worker.clone(), requests, replies, ending.clone()));
    Replies::new(receive, ending)
}

async fn run(
    worker: Arc<Worker>,
    mut requests: Streaming<wire::SessionRequest>,
    replies: mpsc::Sender<wire::SessionReply>,
    ending: Arc<Ending>,
) {
    let hello = match first(&worker, &mut requests).await {
        Ok(hello) => hello,
        Err(failure) => return refuse(&ending, failure),
    };
    let live = match admit(&worker, hello, replies, &ending) {
        Ok(live) => live,
        Err(failure) => return refuse(&ending, failure),
    };
    let over = ending.clone();
    let opened = tokio::select! {
        () = over.over() => Ok(()),
        opened = open(&worker, &live) => opened,
    };
    match opened {
        Ok(()) => serve(&worker, &live, &mut requests).await,
        Err(failure) => live.fail(failure),
    }
    live.quit();
    match ending.failure() {
        Some(failure) => info!(epoch = %live.epoch, reason = failure.reason.name(), detail = failure.detail, "session ended"),
        None => info!(epoch = %live.epoch, "session closed"),
    }
}

fn refuse(ending: &Ending, failure: Failure) {
    info!(reason = failure.reason.name(), detail = failure.detail, "session refused");
    ending.end(Some(failure));
}

/// The owner's first message.
async fn first(worker: &Worker, requests: &mut Streaming<wire::SessionRequest>) -> Result<wire::Hello, Failure> {
    let protocol = |detail: &str| Failure::new(Reason::Protocol, detail);
    let message = timeout(worker.deadlines.hello, requests.message()).await.map_err(|_| protocol("no hello came in time"))?;
    match message.map_err(|status| Failure::new(Reason::PeerLost, status.to_string()))?.and_then(|m| m.message) {
        Some(Message::Hello(hello)) => Ok(hello),
        _ => Err(protocol("a session begins with something else than a hello")),
    }
}

/// Checks a hello and enters its epoch.
fn admit(
    worker: &Arc<Worker>,
    hello: wire::Hello,
    replies: mpsc::Sender<wire::SessionReply>,
    ending: &Arc<Ending>,
) -> Result<Arc<Live>, Failure> {
    let version = hello.version_max.min(VERSIONS.1);
    if version < hello.version_min.max(VERSIONS.0) {
        let detail =
            format!("versions {} to {} came, expected some of {} to {}", hello.version_min, hello.version_max, VERSIONS.0, VERSIONS.1);
        return Err(Failure::new(Reason::Version, detail));
    }
    let epoch = decode_epoch(hello.epoch, "hello.epoch")?;
    let shard = &worker.spec.shard;
    peer::complete(&hello.workers, shard.stages, shard.stage, shard.ranks).map_err(|e| Failure::new(Reason::Protocol, e))?;
    let own = hello.workers.iter().find(|w| (w.stage as usize, w.rank as usize) == (shard.stage, shard.rank));
    for granted in [Some(hello.incarnation), own.map(|w| w.incarnation)] {
        if granted != Some(worker.incarnation) {
            let detail =
                format!("the epoch was granted for incarnation {:016x}, this is {:016x}", granted.unwrap_or(0), worker.incarnation);
            return Err(Failure::new(Reason::Incarnation, detail));
        }
    }
    let Some(progress) = worker.loading.progress() else {
        return Err(Failure::new(Reason::Engine, "the weights are not loaded yet"));
    };
    let live = Live::new(epoch, version, hello.workers, most_steps(shard.stages), replies, ending.clone(), progress.clone());
    let live = Arc::new(live);
    worker.gate.enter(&live)?;
    worker.lobby.enter(epoch);
    debug!(%epoch, "session begins");
    Ok(live)
}

/// Joins the other workers, waits for the engine, and welcomes the owner.
async fn open(worker: &Arc<Worker>, live: &Arc<Live>) -> Result<(), Failure> {
    let join = async {
        let group = group(worker, live.epoch, &live.workers)?;
        let joined = collective::join(group, &worker.lobby, worker.identity.as_ref(), worker.waits()).await;
        joined.map_err(|e| Failure::new(Reason::Collective, chain(&e)))
    };
    let (joined, links) = tokio::try_join!(join, link::dial(worker, live))?;
    if let Some(interrupt) = &joined.interrupt {
        live.interrupt_with(interrupt.clone());
    }
    let (ready, taken) = oneshot::channel();
    worker.jobs.put(Job { live: live.clone(), collective: joined.collective, links, ready });
    // A step of the session before may still be running; it cannot be cut short, only waited for.
    taken.await.map_err(|_| Failure::new(Reason::Superseded, "a later session came before this one began"))?;
    let welcome = wire::Welcome {
        version: live.version,
        identity: Some(worker.identity()),
        epoch: Some(encode_epoch(live.epoch)),
        weight_bytes: worker.spec.shard.weight_bytes,
        kv_bytes: worker.spec.shard.kv_bytes,
    };
    live.say(session_reply::Message::Welcome(welcome)).await;
    Ok(())
}

/// The ranks of this worker's stage.
fn group(worker: &Worker, epoch: Epoch, workers: &[wire::WorkerAddress]) -> Result<Group, Failure> {
    let mut ranks: Vec<&wire::WorkerAddress> = workers.iter().filter(|w| w.stage as usize == worker.stage()).collect();
    ranks.sort_by_key(|w| w.rank);
    let peer = |w: &&wire::WorkerAddress| {
        let address = w.collective_address.parse::<Address>().map_err(|e| Failure::new(Reason::Protocol, e))?;
        Ok(collective::Peer { address: address.seen_at(&w.address), incarnation: w.incarnation })
    };
    let peers = ranks.iter().map(peer).collect::<Result<_, Failure>>()?;
    Ok(Group { kind: worker.spec.collective, epoch, stage: worker.stage(), rank: worker.rank(), peers })
}

/// Takes the owner's messages until the session is over.
async fn serve(worker: &Arc<Worker>, live: &Arc<Live>, requests: &mut Streaming<wire::SessionRequest>) {
    let mut closed = false;
    loop {
        let message = tokio::select! {
            biased;
            () = live.ending.over() => return,
            message = requests.message() => message,
        };
        let lost = |detail: String| Failure::new(Reason::PeerLost, detail);
        let taken = match message {
            Ok(Some(message)) => {
                live.heard();
                take(worker, live, message.message, &mut closed)
            }
            // It waits for its last replies.
            Ok(None) if closed => {
                live.ending.over().await;
                return;
            }
            Ok(None) => Err(lost("the owner ended its stream without closing the session".into())),
            Err(status) => Err(lost(format!("the owner's stream broke: {}", status.message()))),
        };
        if let Err(failure) = taken {
            live.fail(failure);
            return;
        }
    }
}

fn take(worker: &Arc<Worker>, live: &Arc<Live>, message: Option<Message>, closed: &mut bool) -> Result<(), Failure> {
    let own = |epoch: Option<wire::Epoch>, field| match decode_epoch(epoch, field) {
        Ok(epoch) if epoch == live.epoch => Ok(()),
        Ok(epoch) => Err(Failure::new(Reason::StaleEpoch, format!("{field} is {epoch}, expected {}", live.epoch))),
        Err(error) => Err(error.into()),
    };
    match message {
        Some(Message::Step(_)) if *closed => Err(Failure::new(Reason::Protocol, "a step came after the close")),
        Some(Message::Step(step)) => {
            own(step.epoch, "step.epoch")?;
            live.inbox.push_step(decode_step(step)?)
        }
        Some(Message::Mask(update)) => {
            own(update.epoch, "mask.epoch")?;
            let (step, sequence, mask) = decode_mask(update)?;
            live.inbox.push_mask(step, sequence, mask)
        }
        Some(Message::Close(_)) => {
            *closed = true;
            live.inbox.close();
            Ok(())
        }
        Some(Message::LoadAdapter(_) | Message::UnloadAdapter(_)) if live.version < ADAPTERS => {
            Err(Failure::new(Reason::Protocol, format!("an adapter came in a session of version {}", live.version)))
        }
        Some(Message::LoadAdapter(load)) => {
            if worker.tasks.len() > LOADING {
                return Err(Failure::new(Reason::Protocol, format!("more than {LOADING} adapters are to be loaded at a time")));
            }
            let (slot, adapter) = decode_load(load)?;
            worker.tasks.spawn(adapters::bring(worker.clone(), live.clone(), slot, adapter));
            Ok(())
        }
        Some(Message::UnloadAdapter(wire::UnloadAdapter { slot })) => {
            live.inbox.push_change(adapters::Change::Unbind { slot });
            Ok(())
        }
        Some(Message::Alive(_)) => Ok(()),
        Some(Message::Hello(_)) => Err(Failure::new(Reason::Protocol, "a second hello came")),
        None => Err(Failure::new(Reason::Protocol, "a message of no known kind came")),
    }
}

/// Sends from the engine thread; waits while the receiver is full, but not beyond the session's end. (The receiver itself may outlive that: a
/// stopped peer does not even let go of what was meant for it.)
pub(crate) fn send<T: Send>(runtime: &Handle, ending: &Ending, to: &mpsc::Sender<T>, value: T) -> Result<(), Stop> {
    match to.try_send(value) {
        Ok(()) => Ok(()),
        // Whoever closed it has ended the session.
        Err(TrySendError::Closed(_)) => Err(Stop::Over),
        Err(TrySendError::Full(value)) => runtime.block_on(async {
            tokio::select! {
                biased;
                () = ending.over() => Err(Stop::Over),
                sent = to.send(value) => sent.map_err(|_| Stop::Over),
            }
        }),
    }
}

/// Time between two heartbeats.
pub(crate) const BEAT: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_receiver_holds_the_sender_until_the_end_of_the_session() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().expect("a runtime");
        let (ending, (to, from)) = (Ending::default(), mpsc::channel(1));
        let send = |value| send(runtime.handle(), &ending, &to, value);
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| [send(1), send(2)]);
            while to.capacity() > 0 {
                std::thread::yield_now();
            }
            // The receiver lives, and takes nothing: only the end lets the sender go.
            assert!(!sender.is_finished());
            ending.end(None);
            assert_eq!(sender.join().expect("no panic"), [Ok(()), Err(Stop::Over)]);
        });
        drop(from);
        assert_eq!(send(3), Err(Stop::Over));
    }
}
