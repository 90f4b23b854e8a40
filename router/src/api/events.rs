//! Server-sent events of a run: chunks as they come, and a comment where nothing comes for long.

use std::convert::Infallible;
use std::pin::Pin;
use std::time::Duration;

use axum::body::Bytes;
use bytes::BytesMut;
use futures_util::stream::{self, Stream};
use tokio::time::{Instant, Sleep};

use super::answer::Answer;
use super::run::Run;
use super::sent::Due;

/// How long an event stream may be silent before a comment keeps it alive.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Bytes that there is room for; most events are shorter.
const EVENT: usize = 256;

/// An event stream under way. Dropping it, which a disconnect does, drops the run.
struct Events {
    answer: Answer,
    run: Run,
    /// What is handed over is due on this connection.
    due: Option<Due>,
    progress: Progress,
    silence: Silence,
    /// What is written next; its memory is used again when it was written.
    out: BytesMut,
}

enum Progress {
    Opening,
    Running,
    Done,
}

/// The events of a run, whose tokens are `due` on a connection when they are handed over.
pub(super) fn stream(answer: Answer, run: Run, due: Option<Due>) -> impl Stream<Item = Result<Bytes, Infallible>> {
    let events = Events { answer, run, due, progress: Progress::Opening, silence: Silence::begin(), out: BytesMut::new() };
    stream::unfold(Box::new(events), |mut events| async move { Some((Ok(events.next().await?), events)) })
}

impl Events {
    /// What is to be written next; `None` after the end.
    async fn next(&mut self) -> Option<Bytes> {
        match self.progress {
            Progress::Done => return None,
            Progress::Opening => {
                self.answer.opening(self.run.choices()).iter().for_each(|chunk| event(chunk, &mut self.out));
                if self.out.is_empty() {
                    self.out.extend_from_slice(b": open\n\n");
                }
                self.progress = Progress::Running;
            }
            Progress::Running => self.advance().await,
        }
        Some(self.out.split().freeze())
    }

    async fn advance(&mut self) {
        let out = &mut self.out;
        out.reserve(EVENT);
        let news = tokio::select! {
            biased;
            news = self.run.advance() => news,
            () = self.silence.lasts() => return out.extend_from_slice(b": waiting\n\n"),
        };
        self.silence.ends();
        match news {
            Some(Ok(())) => {
                let delta = self.run.delta();
                out.extend_from_slice(b"data: ");
                self.answer.delta(delta, out);
                out.extend_from_slice(b"\n\n");
                if let (Some(due), Some(arrived)) = (&self.due, delta.arrived) {
                    due.add(arrived);
                }
                return;
            }
            Some(Err(e)) => event(&e.body().to_string(), out),
            None => self.answer.closing(self.run.usage()).iter().for_each(|chunk| event(chunk, out)),
        }
        event("[DONE]", out);
        self.progress = Progress::Done;
    }
}

fn event(text: &str, out: &mut BytesMut) {
    out.extend_from_slice(b"data: ");
    out.extend_from_slice(text.as_bytes());
    out.extend_from_slice(b"\n\n");
}

/// Watches that a stream is not silent for longer than [`KEEP_ALIVE`]. One timer does for all of it: it is not set anew for each event.
struct Silence {
    timer: Pin<Box<Sleep>>,
    /// When it began.
    since: Instant,
}

impl Silence {
    fn begin() -> Self {
        let since = Instant::now();
        Self { timer: Box::pin(tokio::time::sleep_until(since + KEEP_ALIVE)), since }
    }

    /// Something was said.
    fn ends(&mut self) {
        self.since = Instant::now();
    }

    /// Completes when it has lasted for [`KEEP_ALIVE`], and begins again. Cancel-safe.
    async fn lasts(&mut self) {
        loop {
            self.timer.as_mut().await;
            let (now, until) = (Instant::now(), self.since + KEEP_ALIVE);
            if now >= until {
                self.since = now;
                self.timer.as_mut().reset(now + KEEP_ALIVE);
                return;
            }
            self.timer.as_mut().reset(until);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn silence_counts_from_what_was_said_last() {
        let mut silence = Silence::begin();
        let begun = Instant::now();
        for seconds in [10, 14, 1] {
            let said = tokio::time::sleep(Duration::from_secs(seconds));
            tokio::select! {
                () = silence.lasts() => panic!("it is not silent for so long"),
                () = said => silence.ends(),
            }
        }
        silence.lasts().await;
        assert_eq!(begun.elapsed().as_secs(), 25 + KEEP_ALIVE.as_secs());
        silence.lasts().await;
        assert_eq!(begun.elapsed().as_secs(), 25 + 2 * KEEP_ALIVE.as_secs(), "and again");
    }
}
