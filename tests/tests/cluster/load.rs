//! A load driver: clients that ask again and again, and an account of every response.

use std::{
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use e2e::client;
use serde_json::Value;

use crate::kubernetes::LIMIT;

/// What became of the requests.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Whole answers, equal to the expected ones.
    pub(crate) answered: usize,
    /// Everything else: what was asked and what came.
    pub(crate) failed: Vec<String>,
    /// The longest time between two pieces of one answer.
    pub(crate) gap: Duration,
}

impl Tally {
    /// Says what was counted.
    ///
    /// # Panics
    /// If a request failed, or none was answered.
    pub(crate) fn assert_whole(&self, what: &str) {
        println!("{what}: {} answers, longest gap {} ms, {} failed", self.answered, self.gap.as_millis(), self.failed.len());
        assert!(
            self.failed.is_empty(),
            "{what}: {} of {} failed: {:#?}",
            self.failed.len(),
            self.answered + self.failed.len(),
            self.failed
        );
        assert!(self.answered > 0, "{what}: nothing was asked");
    }
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    next: AtomicUsize,
    tally: Mutex<Tally>,
    changed: Condvar,
}

/// Clients at work.
pub(crate) struct Load {
    shared: Arc<Shared>,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    /// Starts `clients` that put `requests` (bodies and the answers expected) to `base` in turn, each as a stream on a connection of its own.
    pub(crate) fn start(base: &str, clients: usize, requests: Vec<(Value, String)>) -> Self {
        Self::paced(base, clients, requests, Duration::ZERO)
    }

    /// The same, where each client takes a `pause` between an answer and its next request.
    pub(crate) fn paced(base: &str, clients: usize, requests: Vec<(Value, String)>, pause: Duration) -> Self {
        let (shared, requests) = (Arc::new(Shared::default()), Arc::new(requests));
        let client = |_| {
            let (shared, requests, base) = (shared.clone(), requests.clone(), base.to_owned());
            thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
                while !shared.stop.load(Ordering::SeqCst) {
                    let (body, expected) = &requests[shared.next.fetch_add(1, Ordering::SeqCst) % requests.len()];
                    let came = runtime.block_on(client::stream(&base, body, |_| {}));
                    shared.count(body, expected, came);
                    shared.pause(pause);
                }
            })
        };
        let clients = (0..clients).map(client).collect();
        Self { shared, clients }
    }

    /// Waits until `more` further requests have ended, whatever their end.
    pub(crate) fn more(&self, more: usize) {
        let began = Instant::now();
        let ended = |tally: &Tally| tally.answered + tally.failed.len();
        let mut tally = self.shared.tally.lock().expect("the tally");
        let goal = ended(&tally) + more;
        while ended(&tally) < goal {
            let left = LIMIT.checked_sub(began.elapsed()).unwrap_or_else(|| panic!("no {more} answers within {LIMIT:?}: {tally:?}"));
            tally = self.shared.changed.wait_timeout(tally, left).expect("the tally").0;
        }
    }

    /// Lets every request that is under way end, and returns the account.
    pub(crate) fn stop(mut self) -> Tally {
        self.end();
        std::mem::take(&mut *self.shared.tally.lock().expect("the tally"))
    }

    fn end(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.changed.notify_all();
        for client in self.clients.drain(..) {
            assert!(client.join().is_ok() || thread::panicking(), "a client panicked");
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    /// Waits for so long, or until the load is to stop.
    fn pause(&self, pause: Duration) {
        let until = Instant::now() + pause;
        let mut tally = self.tally.lock().expect("the tally");
        while let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            tally = self.changed.wait_timeout(tally, left).expect("the tally").0;
        }
    }

    fn count(&self, body: &Value, expected: &str, came: anyhow::Result<client::Streamed>) {
        let mut tally = self.tally.lock().expect("the tally");
        match came {
            Ok(streamed) if streamed.text == *expected => {
                tally.answered += 1;
                tally.gap = tally.gap.max(streamed.gap);
            }
            Ok(streamed) => tally.failed.push(format!("{body}: expected {expected:?}, got {:?}", streamed.text)),
            Err(error) => tally.failed.push(format!("{body}: {error:#}")),
        }
        self.changed.notify_all();
    }
}
