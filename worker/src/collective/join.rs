//! The ranks of a stage meet for an epoch.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use engine::collective::{Collective, Solo};
use identity::{Identity, Protocol};
use plan::worker::{CollectiveKind, Epoch};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::timeout_at,
};

use super::{
    Address, Interrupt, Lobby,
    frame::{HEADER, HELLO, Header, Hello, Kind},
    shared::{SharedMemory, Unmet},
    sockets::Sockets,
    stream::Stream,
};

/// Longest reason of a refusal that is read.
const REASON: usize = 1024;

/// The ranks of one stage in one epoch, as one of them sees them.
#[derive(Clone, Debug)]
pub struct Group {
    /// How they talk.
    pub kind: CollectiveKind,
    /// The epoch they meet for.
    pub epoch: Epoch,
    /// Their stage.
    pub stage: usize,
    /// This one.
    pub rank: usize,
    /// All of them, in order.
    pub peers: Vec<Peer>,
}

/// One rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Where its collective socket is.
    pub address: Address,
    /// The process it is.
    pub incarnation: u64,
}

/// How long ranks wait for each other.
#[derive(Clone, Copy, Debug)]
pub struct Waits {
    /// Until all have met.
    pub meet: Duration,
    /// In an exchange, for anything to move.
    pub exchange: Duration,
    /// Of that, awake (shared memory only); nothing where ranks exceed cores.
    pub spin: Duration,
}

/// A collective, and what ends its waits.
pub struct Joined {
    /// For the engine.
    pub collective: Box<dyn Collective>,
    /// For whoever ends the session; nothing for a single rank.
    pub interrupt: Option<Arc<dyn Interrupt>>,
}

impl std::fmt::Debug for Joined {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Joined(rank {} of {})", self.collective.rank(), self.collective.ranks())
    }
}

/// Why the ranks did not meet.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// A rank did not come.
    #[error("rank {rank} did not come within {millis} ms")]
    Missing {
        /// The rank.
        rank: usize,
        /// How long it was waited for.
        millis: u64,
    },
    /// A rank sent this one away.
    #[error("rank {rank} refused: {reason}")]
    Refused {
        /// The rank.
        rank: usize,
        /// What it said.
        reason: String,
    },
    /// A connection could not be made or broke.
    #[error("failed to reach rank {rank}")]
    Io {
        /// The rank.
        rank: usize,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// A rank's address is of another kind, or there are more ranks than a frame can name.
    #[error("{what} is {got}, expected {expected}")]
    Group {
        /// The quantity.
        what: &'static str,
        /// What came.
        got: String,
        /// What was expected.
        expected: &'static str,
    },
}

/// Meets the other ranks of `group`; over TCP, each proves that it is of the same stage, where there is an identity. For sockets, [`Lobby::enter`] has been called with the epoch, so that higher ranks may come in.
///
/// # Errors
/// If one of them does not come, refuses, or cannot be reached.
pub async fn join(group: Group, lobby: &Lobby, identity: Option<&Identity>, waits: Waits) -> Result<Joined, JoinError> {
    let ranks = group.peers.len();
    if ranks == 1 {
        return Ok(Joined { collective: Box::new(Solo), interrupt: None });
    }
    if ranks > usize::from(u8::MAX) {
        return Err(JoinError::Group { what: "the number of ranks", got: ranks.to_string(), expected: "at most 255" });
    }
    match group.kind {
        CollectiveKind::SharedMemory => shared(group, waits).await,
        CollectiveKind::Unix | CollectiveKind::Tcp => sockets(group, lobby, identity, waits).await,
    }
}

async fn shared(group: Group, waits: Waits) -> Result<Joined, JoinError> {
    /// Ends the meeting when the caller no longer waits for it.
    struct Abandon(Arc<AtomicBool>);
    impl Drop for Abandon {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let abandon = Abandon(Arc::default());
    let abandoned = abandon.0.clone();
    let (rank, ranks) = (group.rank, group.peers.len());
    let deadline = Instant::now() + waits.meet;
    let meet = move || SharedMemory::meet(group.epoch, group.stage, (rank, ranks), deadline, (waits.exchange, waits.spin), &abandoned);
    let met = tokio::task::spawn_blocking(meet).await.map_err(|e| JoinError::Io { rank, source: io::Error::other(e) })?;
    let met = met.map_err(|unmet| match unmet {
        Unmet::Io(source) => JoinError::Io { rank: 0, source },
        Unmet::Missing(rank) => missing(rank, waits),
        Unmet::Interrupted => JoinError::Refused { rank: 0, reason: "the session was ended".into() },
    })?;
    let interrupt = met.shared();
    Ok(Joined { collective: Box::new(met), interrupt: Some(interrupt) })
}

async fn sockets(group: Group, lobby: &Lobby, identity: Option<&Identity>, waits: Waits) -> Result<Joined, JoinError> {
    let deadline = tokio::time::Instant::now() + waits.meet;
    let ranks = group.peers.len();
    let mut streams: Vec<Option<Stream>> = (0..ranks).map(|_| None).collect();
    // Lower ranks are called, higher ones call.
    let call = async {
        for (rank, peer) in group.peers.iter().enumerate().take(group.rank) {
            streams[rank] = Some(timeout_at(deadline, call(&group, identity, rank, peer)).await.map_err(|_| missing(rank, waits))??);
        }
        Ok::<_, JoinError>(())
    };
    let higher = group.rank + 1..ranks;
    let come = async {
        match timeout_at(deadline, lobby.collect(group.epoch, higher.clone())).await {
            Ok(Ok(come)) => Ok(come),
            Ok(Err(rank)) => Err(JoinError::Refused { rank, reason: "this worker is in another epoch by now".into() }),
            Err(_) => Err(missing(lobby.missing(higher.clone()).unwrap_or(group.rank), waits)),
        }
    };
    let ((), come) = tokio::try_join!(call, come)?;
    for (rank, stream) in come {
        streams[rank] = Some(stream);
    }
    let collective = Sockets::new(group.rank, group.epoch.session, streams, waits.exchange);
    let interrupt = collective.wires();
    Ok(Joined { collective: Box::new(collective), interrupt: Some(interrupt) })
}

fn missing(rank: usize, waits: Waits) -> JoinError {
    JoinError::Missing { rank, millis: waits.meet.as_millis() as u64 }
}

/// Connects to a lower rank and introduces this one.
async fn call(group: &Group, identity: Option<&Identity>, rank: usize, peer: &Peer) -> Result<Stream, JoinError> {
    let broken = |source| JoinError::Io { rank, source };
    let stream = match &peer.address {
        Address::Tcp(host, port) => {
            let mut s = tokio::net::TcpStream::connect((host.as_str(), *port)).await.map_err(broken)?;
            match identity {
                None => {
                    introduce(&mut s, group, rank, peer).await?;
                    s.into_std().map(Stream::Tcp)
                }
                Some(identity) => {
                    let mut s = identity::connect(identity, &identity.name(), Protocol::Collective, s).await.map_err(broken)?;
                    introduce(&mut s, group, rank, peer).await?;
                    let (s, connection) = s.into_inner();
                    s.into_std().map(|s| Stream::tls(s, connection.into()))
                }
            }
        }
        Address::Unix(path) => {
            let mut s = tokio::net::UnixStream::connect(path).await.map_err(broken)?;
            introduce(&mut s, group, rank, peer).await?;
            s.into_std().map(Stream::Unix)
        }
        Address::UnixAbstract(name) => {
            let mut s = connect_abstract(name).map_err(broken)?;
            introduce(&mut s, group, rank, peer).await?;
            s.into_std().map(Stream::Unix)
        }
        Address::None => {
            let expected = "the address of a socket";
            return Err(JoinError::Group { what: "the collective address of a rank", got: "empty".into(), expected });
        }
    };
    stream.and_then(|s| s.prepare().map(|()| s)).map_err(broken)
}

#[cfg(target_os = "linux")]
fn connect_abstract(name: &str) -> io::Result<tokio::net::UnixStream> {
    use std::os::linux::net::SocketAddrExt;
    // Connecting to a unix socket takes no time: it is queued, or refused.
    let stream = std::os::unix::net::UnixStream::connect_addr(&std::os::unix::net::SocketAddr::from_abstract_name(name)?)?;
    stream.set_nonblocking(true)?;
    tokio::net::UnixStream::from_std(stream)
}

#[cfg(not(target_os = "linux"))]
fn connect_abstract(_name: &str) -> io::Result<tokio::net::UnixStream> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "this system has no abstract unix sockets"))
}

/// Says hello and waits for the answer.
async fn introduce<S: AsyncRead + AsyncWrite + Unpin>(s: &mut S, group: &Group, rank: usize, peer: &Peer) -> Result<(), JoinError> {
    let broken = |source| JoinError::Io { rank, source };
    let hello = Hello { stage: group.stage as u32, to: rank as u32, to_incarnation: peer.incarnation }.encode();
    let epoch = group.epoch;
    let header = Header { kind: Kind::Hello, rank: group.rank as u8, session: epoch.session, sequence: epoch.number, bytes: HELLO as u32 };
    let mut frame = header.encode(&hello).to_vec();
    frame.extend(hello);
    s.write_all(&frame).await.map_err(broken)?;
    s.flush().await.map_err(broken)?;
    let mut answer = [0; HEADER];
    s.read_exact(&mut answer).await.map_err(broken)?;
    let refused = |reason| JoinError::Refused { rank, reason };
    let (answer, ..) = Header::decode(&answer).map_err(refused)?;
    match answer.kind {
        Kind::Welcome if answer == (Header { kind: Kind::Welcome, rank: rank as u8, bytes: 0, ..header }) => Ok(()),
        Kind::Refused => {
            let mut reason = vec![0; (answer.bytes as usize).min(REASON)];
            s.read_exact(&mut reason).await.map_err(broken)?;
            Err(refused(String::from_utf8_lossy(&reason).into_owned()))
        }
        _ => Err(refused(format!("it answered with {answer:?}"))),
    }
}
