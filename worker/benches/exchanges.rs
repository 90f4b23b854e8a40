//! What the ranks of a stage exchange in a layer, as it is done (gathers of slices) and as sums of partial products would do it.
//!
//! `cargo bench --profile dev -p worker --bench exchanges [-- RANKS]`: for each model and number of tokens the bytes that a rank reads in a
//! layer and the time of the exchanges alone, over shared memory and TCP, the ranks being threads of this process: medians of rounds that
//! take turns. Sums are formed in the order of ranks, so that they have the same bits on every one of them.
#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::{
    net::{IpAddr, Ipv4Addr},
    ops::Range,
    sync::{Arc, Barrier},
    thread,
    time::{Duration, Instant},
};

use engine::collective::Collective;
use kernels::bytes;
use plan::worker::{CollectiveKind, Epoch};
use tokio_util::sync::CancellationToken;
use worker::collective::{Address, Group, Listener, Lobby, Peer, Waits, Who, join};

/// Layers that follow each other in one measurement, and measurements of each form.
const LAYERS: usize = 50;
const ROUNDS: usize = 15;
const PATIENCE: Duration = Duration::from_secs(10);

/// Widths of a layer's products: hidden, what goes into the output product, what goes into the down product.
const MODELS: [(&str, [usize; 3]); 2] = [("gemma 270M", [640, 1024, 2048]), ("llama 1.1B", [2048, 2048, 8192])];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let ranks: usize = arguments.iter().find_map(|argument| argument.parse().ok()).unwrap_or(2);
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return println!("no runtime: {error}"),
    };
    for kind in [CollectiveKind::SharedMemory, CollectiveKind::Tcp] {
        let mut joined = runtime.block_on(met(kind, ranks));
        for (name, [hidden, attention, inner]) in MODELS {
            for tokens in [1, 8, 32, 512] {
                // Blocks of 32 bytes with a scale of four.
                let quantized = |width: usize| parts(tokens * width / 32 * 36, ranks, 36);
                let rows = parts(tokens * hidden * 4, ranks, 4);
                let gathers = [quantized(attention), rows.clone(), quantized(inner), rows];
                let whole = tokens * hidden * 4;
                let sums = [0, 1].map(|_| (0..ranks).map(|rank| rank * whole..(rank + 1) * whole).collect::<Vec<_>>());
                let (mut gathered, mut summed) = (Vec::new(), Vec::new());
                for _ in 0..ROUNDS {
                    gathered.push(time(&mut joined, &gathers, None));
                    summed.push(time(&mut joined, &sums, Some(tokens * hidden)));
                }
                println!(
                    "{kind:?}, {ranks} ranks, {name}, {tokens} tokens: gathers {:.1} µs a layer ({:.1} KB), sums {:.1} µs ({:.1} KB)",
                    median(gathered),
                    read(&gathers),
                    median(summed),
                    read(&sums)
                );
            }
        }
    }
}

/// The middle one.
fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Kilobytes that rank 0 reads.
fn read(exchanges: &[Vec<Range<usize>>]) -> f64 {
    exchanges.iter().flat_map(|parts| &parts[1..]).map(|part| part.len() as f64 / 1e3).sum()
}

/// `len` bytes split over the ranks at multiples of `unit`.
fn parts(len: usize, ranks: usize, unit: usize) -> Vec<Range<usize>> {
    let at = |rank: usize| len / unit * rank / ranks * unit;
    (0..ranks).map(|rank| at(rank)..at(rank + 1)).collect()
}

/// Microseconds a layer. `sum`: the parts are vectors of so many floats, which each rank adds up.
fn time(joined: &mut [Box<dyn Collective>], exchanges: &[Vec<Range<usize>>], sum: Option<usize>) -> f64 {
    let start = Barrier::new(joined.len());
    let times: Vec<f64> = thread::scope(|scope| {
        let started: Vec<_> = joined
            .iter_mut()
            .map(|collective| {
                let start = &start;
                scope.spawn(move || {
                    let len = exchanges.iter().flatten().map(|part| part.end).max().unwrap_or(0);
                    let mut buffer = vec![0.0_f32; len.div_ceil(4)];
                    let mut total = vec![0.0_f32; sum.unwrap_or(0)];
                    start.wait();
                    let begin = Instant::now();
                    for parts in std::iter::repeat_n(exchanges, LAYERS).flatten() {
                        let end = parts.last().map_or(0, |part| part.end);
                        if let Err(error) = collective.all_gather(&mut bytes::of_mut(&mut buffer)[..end], parts) {
                            println!("an exchange failed: {error}");
                            std::process::exit(1);
                        }
                        if !total.is_empty() {
                            let values = total.len();
                            total.copy_from_slice(&buffer[..values]);
                            for partial in buffer[values..].chunks_exact(values) {
                                total.iter_mut().zip(partial).for_each(|(total, partial)| *total += partial);
                            }
                        }
                    }
                    std::hint::black_box(&total);
                    begin.elapsed().as_secs_f64()
                })
            })
            .collect();
        started.into_iter().filter_map(|thread| thread.join().ok()).collect()
    });
    times.into_iter().fold(0.0, f64::max) / LAYERS as f64 * 1e6
}

/// Ranks that have met, each of which waits awake.
async fn met(kind: CollectiveKind, ranks: usize) -> Vec<Box<dyn Collective>> {
    let epoch = Epoch { number: 1, session: u64::from(std::process::id()) };
    let (mut peers, mut lobbies) = (Vec::new(), Vec::new());
    let stop = CancellationToken::new();
    for rank in 0..ranks {
        let lobby = Arc::new(Lobby::default());
        let incarnation = rank as u64 + 1;
        let mut address = Address::None;
        match Listener::bind(kind, IpAddr::V4(Ipv4Addr::LOCALHOST), incarnation).await {
            Ok(Some(listener)) => {
                address = listener.address().clone();
                let who = Who { stage: 0, rank, ranks, incarnation };
                tokio::spawn(listener.serve(lobby.clone(), who, None, PATIENCE, stop.clone()));
            }
            Ok(None) => {}
            Err(error) => println!("no socket: {error}"),
        }
        lobby.enter(epoch);
        peers.push(Peer { address, incarnation });
        lobbies.push(lobby);
    }
    let waits = || Waits { meet: PATIENCE, exchange: PATIENCE, spin: Duration::from_millis(1) };
    let joins = lobbies.iter().enumerate().map(|(rank, lobby)| {
        let group = Group { kind, epoch, stage: 0, rank, peers: peers.clone() };
        async move { join(group, lobby, None, waits()).await }
    });
    match futures_util::future::try_join_all(joins).await {
        Ok(joined) => joined.into_iter().map(|joined| joined.collective).collect(),
        Err(error) => {
            println!("ranks that do not meet: {error}");
            std::process::exit(1);
        }
    }
}
