//! Engines against the textbook.

use plan::{
    model::{Rope, RopeScaling},
    step::OutputValue,
};

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

#[test]
fn gpt2_is_the_textbooks() {
    agrees(|| model::gpt2(model::floats), |r| r.config.norm_eps = 1e-2);
}

#[test]
fn a_mixture_of_experts_is_the_textbooks() {
    agrees(
        || model::mixture(model::floats),
        |r| r.config.experts = r.config.experts.map(|e| plan::model::Experts { normalize: false, ..e }),
    );
}

#[test]
fn latent_attention_and_its_mixtures_are_the_textbooks() {
    agrees(|| model::latent(model::floats), |r| r.config.latent = r.config.latent.map(|l| plan::model::Latent { norm_eps: 1e-2, ..l }));
    agrees(
        || model::latent_keys(model::floats),
        |r| r.config.layers.iter_mut().for_each(|l| l.rope.layout = plan::model::RopeLayout::Adjacent),
    );
    agrees(
        || model::latent_apart(model::floats),
        |r| r.config.latent = r.config.latent.map(|l| plan::model::Latent { norm_eps: 1e-2, ..l }),
    );
    let groups = |used| plan::model::ExpertGroups { count: 4, used, best: 1 };
    let wrong = |r: &mut Recipe, change: fn(plan::model::Experts) -> plan::model::Experts| r.config.experts = r.config.experts.map(change);
    for change in [
        |e| plan::model::Experts { groups: None, ..e },
        |e| plan::model::Experts { scale: 1.0, ..e },
        |e| plan::model::Experts { normalize: !e.normalize, ..e },
    ] as [fn(plan::model::Experts) -> plan::model::Experts; 3]
    {
        agrees(|| model::latent(model::floats), |r| wrong(r, change));
        agrees(|| model::latent_keys(model::floats), |r| wrong(r, change));
    }
    agrees(
        || model::latent_keys(model::floats),
        |r| r.config.experts = r.config.experts.map(|e| plan::model::Experts { groups: Some(groups(1)), used: 2, ..e }),
    );
}

/// A base that grows with the longest sequence: 400 tokens where 64 were trained.
#[test]
fn dynamic_scaling_goes_by_the_longest_sequence() {
    let stretched = 10_000.0 * (2.0 * 400.0 / 64.0 - 1.0_f64).powf(64.0 / 62.0);
    let recipe = |base, scaling: RopeScaling| {
        let mut recipe = model::mixture(model::floats);
        for layer in &mut recipe.config.layers {
            layer.rope = Rope { base, scaling: scaling.clone(), ..layer.rope.clone() };
        }
        recipe.build()
    };
    let dynamic = |trained_context| recipe(10_000.0, RopeScaling::Dynamic { factor: 2.0, trained_context });
    let textbook = recipe(stretched, RopeScaling::None);
    assert!(distance(&dynamic(64.0), &textbook) < 1e-5);
    assert!(distance(&dynamic(128.0), &textbook) > 1e-4, "another trained context went unseen");
}

/// Of two lists of divisors the one for the longest sequence that is served.
#[test]
fn long_rope_goes_by_the_longest_sequence() {
    let recipe = |scaling: RopeScaling| {
        let mut recipe = model::mixture(model::floats);
        for layer in &mut recipe.config.layers {
            layer.rope = Rope { scaling: scaling.clone(), ..layer.rope.clone() };
        }
        recipe.build()
    };
    let lists = |original_context| recipe(RopeScaling::LongRope { short: vec![2.0; 32], long: vec![8.0; 32], original_context });
    let linear = |factor| recipe(RopeScaling::Linear { factor });
    assert!(distance(&lists(399.0), &linear(8.0)) < 1e-5);
    assert!(distance(&lists(400.0), &linear(2.0)) < 1e-5);
    assert!(distance(&lists(400.0), &linear(8.0)) > 1e-4);
}
