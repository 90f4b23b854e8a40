//! Engines against the textbook.

use plan::step::OutputValue;

use crate::{
    model::{self, Model, Recipe},
    naive,
    rig::{Layout, Part, Rig, prompt},
};

/// Largest distance between an engine's logits and the textbook's, relative to the largest logit.
fn distance(engine: &Model, textbook: &Model) -> f64 {
    let ids = prompt(5, 70, engine.header.config.vocab);
    let expected = naive::logits(textbook, &ids);
    let outputs = Rig::new(engine, Layout::default()).run(&[Part::new(1, &ids).all_logits()]);
    assert_eq!(outputs.len(), ids.len());
    let largest = expected.iter().flatten().fold(0.0, |m: f64, x| m.max(x.abs()));
    let mut most: f64 = 0.0;
    for (output, expected) in outputs.iter().zip(&expected) {
        let OutputValue::Logits(got) = &output.value else { panic!("{output:?}") };
        assert_eq!(got.len(), expected.len());
        most = got.iter().zip(expected).fold(most, |m, (g, e)| m.max((f64::from(*g) - e).abs()));
    }
    most / largest
}

fn agrees(recipe: impl Fn() -> Recipe, wrong: impl Fn(&mut Recipe)) {
    let model = recipe().build();
    let off = distance(&model, &model);
    assert!(off < 1e-5, "off by {off} of the largest logit");
    let mut other = recipe();
    wrong(&mut other);
    let off = distance(&model, &other.build());
    assert!(off > 1e-4, "a wrong setting goes unseen: off by {off}");
}

#[test]
fn llama_with_biases_and_rotary_factors_is_the_textbooks() {
    agrees(|| model::llama(model::floats), |r| r.config.layers.iter_mut().for_each(|l| l.rope.base = 9_000.0));
}

#[test]
fn gemma_with_windows_is_the_textbooks() {
    agrees(|| model::gemma(20, model::floats), |r| r.config.layers[1].window = Some(19));
    agrees(|| model::gemma(1, model::floats), |r| r.config.layers[3].window = Some(2));
}
