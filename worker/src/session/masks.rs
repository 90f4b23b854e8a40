//! Masks of constrained sequences, as the engine asks for them.

use std::{
    error::Error,
    time::{Duration, Instant},
};

use engine::MaskSource;
use plan::step::{Mask, SequenceId};

use super::{Live, Stop};

/// Hands over masks as they come in a session.
pub(crate) struct Masks<'a> {
    live: &'a Live,
    limit: Duration,
}

impl<'a> Masks<'a> {
    pub(crate) fn new(live: &'a Live, limit: Duration) -> Self {
        Self { live, limit }
    }
}

impl MaskSource for Masks<'_> {
    fn mask(&mut self, step: u64, sequence: SequenceId) -> Result<Mask, Box<dyn Error + Send + Sync>> {
        match self.live.inbox.mask(step, sequence, Instant::now() + self.limit) {
            Ok(Some(mask)) => Ok(mask),
            Ok(None) => Err(format!("nothing came within {} ms", self.limit.as_millis()).into()),
            Err(Stop::Over) => Err("the session is over".into()),
            Err(Stop::Failed(failure)) => Err(failure.into()),
        }
    }
}
