//! The steps of a session, one after the other.

use std::time::{Duration, Instant};

use engine::{Engine, StageOutput};
use proto::{
    convert::encode_output,
    worker::{self as wire, session_reply::Message},
};
use tracing::trace;

use super::{
    slots::Slots,
    tokens::{self, Tokens},
};
use crate::{
    failure::{Failure, Reason},
    link::Outbound,
    session::{Live, Masks, Stop, Work},
    state::Worker,
};

/// Runs steps until the owner has closed the session and the last one is answered.
pub(super) fn run(worker: &Worker, engine: &mut Engine, live: &Live, links: &Outbound, slots: &mut Slots) -> Result<(), Stop> {
    let shard = &worker.spec.shard;
    // The first stage embeds the tokens, the sampler keeps them for penalties.
    let resolves = shard.is_first() || worker.samples();
    let mut tokens = Tokens::default();
    while let Some(work) = live.inbox.work()? {
        let mut step = match work {
            Work::Step(step) => step,
            Work::Change(change) => {
                slots.change(worker, engine, live, change)?;
                continue;
            }
        };
        let begun = Instant::now();
        if resolves {
            tokens.follow(&step);
            live.inbox.waiting_tokens().into_iter().for_each(|drawn| tokens.hear(drawn));
            tokens.resolve(&mut step, || live.inbox.tokens())?;
        }
        let hidden = if shard.is_first() || step.tokens() == 0 { Vec::new() } else { live.inbox.hidden(step.id)? };
        let waited = begun.elapsed();
        let gathered = engine.timings().collective;
        let output = engine.run(&step, &hidden, &mut Masks::new(live, worker.deadlines.mask)).map_err(Failure::from)?;
        let collective = engine.timings().collective.saturating_sub(gathered);
        let compute = begun.elapsed().saturating_sub(waited + collective);
        let sending = Instant::now();
        let mut outputs = Vec::new();
        match output {
            StageOutput::Hidden(values) if !shard.is_last() => {
                if step.tokens() > 0 {
                    links.hidden(step.id, step.tokens(), &values)?;
                }
            }
            StageOutput::Outputs(results) if shard.is_last() => {
                if let Some(drawn) = tokens::drawn(&step, &results).filter(|_| worker.samples()) {
                    links.tokens(&drawn)?;
                    tokens.hear(drawn);
                }
                outputs = results.iter().map(encode_output).collect();
            }
            _ => return Err(Failure::new(Reason::Engine, "the engine's output is not that of its stage").into()),
        }
        let sent = sending.elapsed();
        trace!(step = step.id, tokens = step.tokens(), ?waited, ?collective, ?compute, ?sent, "step");
        let timing =
            wire::Timing { compute_us: micros(compute), collective_us: micros(collective), wait_us: micros(waited), link_us: micros(sent) };
        live.answer(&worker.runtime, Message::Step(wire::StepReply { step: step.id, outputs, timing: Some(timing) }))?;
    }
    Ok(())
}

fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}
