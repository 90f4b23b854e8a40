//! The three collectives gather the same bytes, and none of them hangs.

use std::{
    net::{IpAddr, Ipv4Addr},
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use engine::collective::CollectiveError;
use identity::testing::{Authority, Process};
use plan::worker::{CollectiveKind, Epoch};
use tokio_util::sync::CancellationToken;
use worker::collective::{Address, Group, JoinError, Joined, Listener, Lobby, Peer, Waits, Who, join};

use crate::fleet::LONG;

/// How ranks talk, and whether they prove who they are.
#[derive(Clone, Copy, Debug)]
struct Way {
    kind: CollectiveKind,
    proven: bool,
}

const WAYS: [Way; 4] = [
    Way { kind: CollectiveKind::SharedMemory, proven: false },
    Way { kind: CollectiveKind::Unix, proven: false },
    Way { kind: CollectiveKind::Tcp, proven: false },
    Way { kind: CollectiveKind::Tcp, proven: true },
];

const STAGE: &str = "spiffe://skein/ns/a/replica/r0/stage/5";

/// Numbers that are used once, so that tests in parallel do not meet.
fn unique() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    u64::from(std::process::id()) << 32 | NEXT.fetch_add(1, Ordering::Relaxed)
}

/// The ranks of a stage, each with its socket and lobby.
struct Ranks {
    group: Group,
    lobbies: Vec<Arc<Lobby>>,
    process: Option<Process>,
    stop: CancellationToken,
}

impl Drop for Ranks {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Ranks {
    async fn new(Way { kind, proven }: Way, ranks: usize) -> Self {
        Self::with(kind, proven.then(|| Authority::new().process(STAGE)), ranks).await
    }

    async fn with(kind: CollectiveKind, process: Option<Process>, ranks: usize) -> Self {
        let identity = process.as_ref().map(|p| p.identity.clone());
        let (stop, epoch) = (CancellationToken::new(), Epoch { number: 3, session: unique() });
        let (mut peers, mut lobbies) = (Vec::new(), Vec::new());
        for rank in 0..ranks {
            let lobby = Arc::new(Lobby::default());
            let listener = Listener::bind(kind, IpAddr::V4(Ipv4Addr::LOCALHOST), unique()).await.expect("a socket");
            let address = listener.as_ref().map_or(Address::None, |l| l.address().clone());
            let incarnation = unique();
            if let Some(listener) = listener {
                let who = Who { stage: 5, rank, ranks, incarnation };
                tokio::spawn(listener.serve(lobby.clone(), who, identity.clone(), LONG, stop.clone()));
            }
            peers.push(Peer { address, incarnation });
            lobbies.push(lobby);
        }
        Self { group: Group { kind, epoch, stage: 5, rank: 0, peers }, lobbies, process, stop }
    }

    async fn join(&self, rank: usize, meet: Duration, exchange: Duration) -> Result<Joined, JoinError> {
        let group = Group { rank, ..self.group.clone() };
        self.lobbies[rank].enter(group.epoch);
        join(group, &self.lobbies[rank], self.process.as_ref().map(|p| &p.identity), Waits { meet, exchange, spin: Duration::ZERO }).await
    }

    async fn all(&self, exchange: Duration) -> Vec<Joined> {
        let joins = (0..self.lobbies.len()).map(|rank| self.join(rank, LONG, exchange));
        futures_util::future::try_join_all(joins).await.expect("ranks that meet")
    }
}

/// Byte `i` of rank `rank` in exchange `round`.
fn byte(round: usize, rank: usize, i: usize) -> u8 {
    (round * 131 + rank * 31 + i * 7 + i / 251) as u8
}

/// Runs the exchanges on every rank at once; even ones are for all, odd ones for rank 0.
fn exchange(joined: Vec<Joined>, rounds: &[Vec<Range<usize>>]) {
    let bytes = |parts: &[Range<usize>]| parts.iter().map(|p| p.end).max().unwrap_or(0);
    thread::scope(|scope| {
        for (rank, mut joined) in joined.into_iter().enumerate() {
            scope.spawn(move || {
                for (round, parts) in rounds.iter().enumerate() {
                    let mut buffer = vec![0; bytes(parts)];
                    parts[rank].clone().for_each(|i| buffer[i] = byte(round, rank, i));
                    let for_all = round % 2 == 0;
                    if for_all {
                        joined.collective.all_gather(&mut buffer, parts).expect("an exchange");
                    } else {
                        joined.collective.gather(&mut buffer, parts).expect("an exchange");
                    }
                    for (from, part) in parts.iter().enumerate().filter(|(from, _)| for_all || rank == 0 || *from == rank) {
                        let wrong = part.clone().find(|i| buffer[*i] != byte(round, from, *i));
                        assert_eq!(wrong, None, "rank {rank} got another byte of rank {from} in round {round}");
                    }
                    // Control: bytes of different ranks and rounds differ, so a mix-up would be seen.
                    assert_ne!(byte(round, 0, 0), byte(round, 1, 0));
                    assert_ne!(byte(round, 0, 0), byte(round + 1, 0, 0));
                }
            });
        }
    });
}

/// Parts of these sizes, one after the other, each at a multiple of `align`.
fn parts(sizes: &[usize]) -> Vec<Range<usize>> {
    let mut start = 0;
    let part = |size: &usize| {
        let range = start..start + size;
        start = range.end;
        range
    };
    sizes.iter().map(part).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_rank_gets_every_part() {
    for way in WAYS {
        for ranks in 2..=4 {
            let sizes = |of: [usize; 4]| parts(&of[..ranks]);
            let large = 700_001;
            let mut rounds = Vec::new();
            for shape in [[1, 1, 1, 1], [680, 680, 680, 680], [0, 5, 0, 17], [3, 0, 0, 0], [0, 0, 0, 0], [16384, 16385, 16383, 40000]] {
                rounds.extend([sizes(shape), sizes(shape)]);
            }
            // Whole buffers of a large prefill, even and uneven, twice in a row for those who only send.
            for shape in [[large, large, large, large], [large, 0, 7, 300_000], [5, large, large, 0]] {
                rounds.extend([sizes(shape), sizes(shape), sizes([64, 64, 64, 64]), sizes(shape)]);
            }
            rounds.extend((0..200).flat_map(|i| [sizes([i, 9, 9, i]), sizes([9, i, i, 9])]));
            let group = Ranks::new(way, ranks).await;
            let joined = group.all(LONG).await;
            tokio::task::spawn_blocking(move || exchange(joined, &rounds)).await.expect("every rank");
        }
    }
}

/// How an exchange of rank 0 ends when the other rank does nothing: the error, and when.
fn alone(joined: &mut Joined, for_all: bool, bytes: usize) -> (Result<(), CollectiveError>, Duration) {
    let begun = Instant::now();
    let mut buffer = vec![1; bytes];
    let parts = [0..bytes / 2, bytes / 2..bytes];
    let result = if for_all { joined.collective.all_gather(&mut buffer, &parts) } else { joined.collective.gather(&mut buffer, &parts) };
    (result, begun.elapsed())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rank_that_stalls_hangs_nobody() {
    let limit = Duration::from_millis(300);
    for way in WAYS {
        // Small, and more than any buffer between the ranks holds.
        for (for_all, bytes) in [(true, 64), (true, 32 << 20), (false, 64)] {
            let group = Ranks::new(way, 2).await;
            let mut joined = group.all(limit).await.into_iter();
            let (mut first, stalled) = (joined.next().expect("rank 0"), joined.next().expect("rank 1"));
            let ended = tokio::task::spawn_blocking(move || alone(&mut first, for_all, bytes)).await.expect("no panic");
            assert!(matches!(ended.0, Err(CollectiveError::Deadline { rank: 1, millis: 300 })), "{way:?}: {:?}", ended.0);
            assert!(ended.1 >= limit && ended.1 < LONG / 4, "{way:?}: after {:?}", ended.1);
            drop(stalled);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupted_exchange_ends_at_once() {
    for way in WAYS {
        let group = Ranks::new(way, 2).await;
        let mut joined = group.all(LONG).await.into_iter();
        let (mut first, mut other) = (joined.next().expect("rank 0"), joined.next().expect("rank 1"));
        let interrupt = first.interrupt.clone().expect("several ranks");
        let waiting = tokio::task::spawn_blocking(move || alone(&mut first, true, 64));
        interrupt.interrupt();
        let ended = waiting.await.expect("no panic");
        assert!(matches!(ended.0, Err(CollectiveError::Lost { .. })), "{way:?}: {:?}", ended.0);
        assert!(ended.1 < LONG / 4, "{way:?}: after {:?}", ended.1);
        // The other rank learns it too, at the latest when it needs more than had been sent.
        let both = move || [alone(&mut other, true, 64), alone(&mut other, true, 64)];
        let [_, ended] = tokio::task::spawn_blocking(both).await.expect("no panic");
        assert!(matches!(ended.0, Err(CollectiveError::Lost { .. })), "{way:?}: {:?}", ended.0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rank_that_does_not_come_is_named() {
    for way in WAYS {
        for (rank, missing) in [(0, 1), (1, 0)] {
            let group = Ranks::new(way, 2).await;
            if missing == 0 && way.kind != CollectiveKind::SharedMemory {
                // It listens, and waits for the epoch that it is never told of.
                assert_eq!(group.lobbies.len(), 2);
            }
            let met = group.join(rank, Duration::from_millis(200), LONG).await;
            assert!(matches!(&met, Err(JoinError::Missing { rank, millis: 200 }) if *rank == missing), "{way:?}: {met:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shared_memory_leaves_no_name_behind() {
    let named = |group: &Ranks| {
        let session = format!("{:016x}", group.group.epoch.session);
        let folder = std::fs::read_dir(kernels::shm::SharedRegion::folder()).expect("a folder");
        folder.filter(|e| e.as_ref().is_ok_and(|e| e.file_name().to_string_lossy().contains(&session))).count()
    };
    let group = Ranks::new(WAYS[0], 3).await;
    let joined = group.all(LONG).await;
    assert_eq!((named(&group), joined.len()), (0, 3));
    // Nor does a meeting that fails.
    let group = Ranks::new(WAYS[0], 2).await;
    group.join(0, Duration::from_millis(50), LONG).await.expect_err("nobody came");
    assert_eq!(named(&group), 0);
}

/// A rank of another stage, of another authority, or that proves nothing, does not meet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranks_that_cannot_prove_their_stage_do_not_meet() {
    let authority = Authority::new();
    let strangers = [
        Some(authority.process("spiffe://skein/ns/a/replica/r0/stage/4")),
        Some(Authority::new().process(STAGE)),
        None,
        // Control: one of the stage.
        Some(authority.process(STAGE)),
    ];
    for (i, stranger) in strangers.into_iter().enumerate() {
        let mut group = Ranks::with(CollectiveKind::Tcp, Some(authority.process(STAGE)), 2).await;
        let first = group.group.clone();
        group.lobbies[0].enter(first.epoch);
        group.process = stranger;
        let met = group.join(1, Duration::from_millis(500), LONG).await;
        assert_eq!(met.is_ok(), i == 3, "stranger {i}: {met:?}");
    }
}
