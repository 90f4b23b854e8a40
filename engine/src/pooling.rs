//! Vectors in place of tokens: the states of single tokens and of whole sequences, and what a classifier makes of them.

use kernels::{Isa, pooling};
use plan::step::{Output, OutputValue, Pooled, Pooling, Step, WantKind};

use crate::{backend::Backend, batch::Batch};

/// A vector as it is asked for, made of the state, or the mean of states, that it is of.
pub(crate) fn vector(isa: Isa, mut state: Vec<f32>, pooled: &Pooled) -> OutputValue {
    if !state.iter().all(|x| x.is_finite()) {
        return OutputValue::Failed("the hidden state is not finite".to_owned());
    }
    if pooled.dimensions > 0 {
        state.truncate(pooled.dimensions as usize);
    }
    if pooled.normalize {
        pooling::normalize(isa, &mut state);
    }
    OutputValue::Vector(state)
}

/// Results of an encoder's step, in the order of its wants. The backend's rows are those of the whole batch.
pub(crate) fn run(step: &Step, batch: &Batch<'_>, isa: Isa, backend: &mut dyn Backend) -> Vec<Output> {
    let rows = backend.rows();
    let Some(width) = rows.len().checked_div(batch.tokens) else { return Vec::new() };
    let state = |row: usize| &rows[row * width..(row + 1) * width];
    let classified = step.sequences.iter().zip(&batch.spans).filter(|(part, _)| part.wants.iter().any(|w| w.kind == WantKind::Classes));
    let firsts: Vec<f32> = classified.flat_map(|(_, span)| state(span.rows.start)).copied().collect();

    let mut outputs = Vec::new();
    for (part, span) in step.sequences.iter().zip(&batch.spans) {
        for want in &part.wants {
            let value = match want.kind {
                WantKind::Pooled(pooled) => {
                    let state = match pooled.over {
                        Pooling::Token => state(span.rows.start + want.offset as usize).to_vec(),
                        Pooling::First => state(span.rows.start).to_vec(),
                        Pooling::Mean => {
                            let mut mean = vec![0.0; width];
                            pooling::mean(isa, &rows[span.rows.start * width..span.rows.end * width], &mut mean);
                            mean
                        }
                    };
                    vector(isa, state, &pooled)
                }
                // Filled in below.
                _ => OutputValue::Vector(Vec::new()),
            };
            outputs.push(Output { sequence: part.sequence, position: want.offset, value });
        }
    }
    if !firsts.is_empty() {
        let count = firsts.len() / width;
        let labels = backend.classify(&firsts, count);
        let mut labels = labels.chunks_exact((labels.len() / count).max(1));
        let wants = step.sequences.iter().flat_map(|part| part.wants.iter().map(|want| (part.sequence, want)));
        let (mut current, mut own) = (None, &[][..]);
        for (output, (sequence, want)) in outputs.iter_mut().zip(wants) {
            if want.kind == WantKind::Classes {
                if current != Some(sequence) {
                    (current, own) = (Some(sequence), labels.next().unwrap_or_default());
                }
                output.value = if own.iter().all(|x| x.is_finite()) {
                    OutputValue::Vector(own.to_vec())
                } else {
                    OutputValue::Failed("what the classifier made of it is not finite".to_owned())
                };
            }
        }
    }
    outputs
}
