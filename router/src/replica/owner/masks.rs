//! Masks of constrained sequences, made off the event loop: one at a time for each sequence, as many at once as there are processors.

use std::{
    collections::{HashMap, VecDeque},
    future::{Future, pending},
    sync::Arc,
    thread,
};

use plan::step::{Mask, TokenId};
use tokio::{
    sync::OnceCell,
    task::{JoinSet, spawn_blocking},
};

use crate::{
    encode::Tokenizer,
    grammar::{Constraint, GrammarError, Grammars, Matcher},
    replica::Replica,
    scheduler::Submission,
};

/// A mask that was asked for.
pub(super) struct Made {
    pub(super) ticket: u64,
    /// Tokens emitted before the draw that it is of.
    pub(super) emitted: usize,
    /// The sequence, with its first mask.
    pub(super) submission: Option<Box<Submission>>,
    /// The mask, or why the sequence cannot go on.
    pub(super) result: Result<Mask, String>,
}

/// Where the making of a sequence's masks stands.
struct Course {
    emitted: usize,
    /// Until its first mask is there.
    submission: Option<Box<Submission>>,
    /// Between two masks.
    matcher: Option<Matcher>,
}

/// What is to be done for a mask.
enum Job {
    Begin(Constraint, Vec<TokenId>),
    GoOn(Matcher, TokenId),
}

type Done = (u64, Result<(Matcher, Mask), String>);

/// The constrained sequences of a session.
pub(super) struct Masks {
    replica: Arc<dyn Replica>,
    grammars: Arc<OnceCell<Grammars>>,
    courses: HashMap<u64, Course>,
    /// At most one job of each sequence.
    waiting: VecDeque<(u64, Job)>,
    running: JoinSet<Done>,
    /// Most that run at once.
    most: usize,
}

impl Masks {
    pub(super) fn new(replica: Arc<dyn Replica>, grammars: Arc<OnceCell<Grammars>>) -> Self {
        let most = thread::available_parallelism().map_or(1, usize::from);
        Self { replica, grammars, courses: HashMap::new(), waiting: VecDeque::new(), running: JoinSet::new(), most }
    }

    /// Takes a sequence in; it comes back with its first mask.
    pub(super) fn begin(&mut self, ticket: u64, submission: Box<Submission>) {
        let Some(constraint) = submission.constraint.clone() else { return };
        let job = Job::Begin(constraint, submission.emitted.clone());
        self.courses.insert(ticket, Course { emitted: submission.emitted.len(), submission: Some(submission), matcher: None });
        self.start(ticket, job);
    }

    /// A token was drawn: if the sequence is constrained, its next mask is made.
    pub(super) fn follow(&mut self, ticket: u64, id: TokenId) {
        let Some(course) = self.courses.get_mut(&ticket) else { return };
        course.emitted += 1;
        if let Some(matcher) = course.matcher.take() {
            self.start(ticket, Job::GoOn(matcher, id));
        }
    }

    /// A sequence has ended.
    pub(super) fn forget(&mut self, ticket: u64) {
        if self.courses.remove(&ticket).is_some() {
            self.waiting.retain(|(of, _)| *of != ticket);
        }
    }

    /// The next mask; waits for one. Cancel-safe.
    pub(super) async fn next(&mut self) -> Option<Made> {
        loop {
            let Some(done) = self.running.join_next().await else { return pending().await };
            if let Some((ticket, job)) = self.waiting.pop_front() {
                self.spawn(ticket, job);
            }
            // What runs on the threads below is joined there; these tasks themselves do nothing that panics.
            let Ok((ticket, result)) = done else { continue };
            let Some(course) = self.courses.get_mut(&ticket) else { continue };
            let (emitted, submission) = (course.emitted, course.submission.take());
            let result = result.map(|(matcher, mask)| {
                course.matcher = Some(matcher);
                mask
            });
            return Some(Made { ticket, emitted, submission, result });
        }
    }

    fn start(&mut self, ticket: u64, job: Job) {
        if self.running.len() < self.most {
            self.spawn(ticket, job);
        } else {
            self.waiting.push_back((ticket, job));
        }
    }

    fn spawn(&mut self, ticket: u64, job: Job) {
        match job {
            Job::GoOn(mut matcher, id) => {
                let made = on_a_thread(move || {
                    matcher.advance(&[id])?;
                    let mask = matcher.mask()?;
                    Ok((matcher, mask))
                });
                self.running.spawn(async move { (ticket, made.await) });
            }
            Job::Begin(constraint, emitted) => {
                let (replica, grammars) = (self.replica.clone(), self.grammars.clone());
                self.running.spawn(async move { (ticket, begin(replica.as_ref(), &grammars, constraint, emitted).await) });
            }
        }
    }
}

/// The matcher of a sequence behind what it emitted, and the mask of its next draw.
async fn begin(
    replica: &dyn Replica,
    grammars: &Arc<OnceCell<Grammars>>,
    constraint: Constraint,
    emitted: Vec<TokenId>,
) -> Result<(Matcher, Mask), String> {
    if constraint.grammar.is_none() {
        grammars.get_or_try_init(|| read(replica)).await?;
    }
    let grammars = grammars.clone();
    on_a_thread(move || {
        let grammar = match (constraint.grammar, grammars.get()) {
            (Some(grammar), _) => grammar,
            (None, Some(grammars)) => grammars.compile(&constraint.source)?,
            (None, None) => return Err(GrammarError("the vocabulary is not known".to_owned())),
        };
        let mut matcher = grammar.matcher(&emitted)?;
        let mask = matcher.mask()?;
        Ok((matcher, mask))
    })
    .await
}

/// The vocabulary of a replica's model.
async fn read(replica: &dyn Replica) -> Result<Grammars, String> {
    let card = replica.card().await.map_err(|error| format!("the tokenizer did not come: {error}"))?;
    let built = spawn_blocking(move || Tokenizer::from_card(&card)).await.map_err(|error| error.to_string())?;
    built.map(|tokenizer| Grammars::new(Arc::new(tokenizer))).map_err(|error| error.to_string())
}

/// Runs what computes on a thread of its own.
fn on_a_thread<T: Send + 'static>(
    run: impl FnOnce() -> Result<T, GrammarError> + Send + 'static,
) -> impl Future<Output = Result<T, String>> {
    let running = spawn_blocking(run);
    async move {
        let result = running.await.map_err(|error| format!("the constraint cannot be followed: {error}"))?;
        result.map_err(|error| format!("the constraint cannot be followed: {error}"))
    }
}
