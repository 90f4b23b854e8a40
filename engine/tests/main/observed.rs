//! What goes into products, by column: the textbook's sums, and the same bits however they are computed.

use engine::Observed;
use kernels::Isa;
use plan::step::{TokenId, WantKind};

use crate::{
    model::{self, Model, Recipe},
    naive,
    rig::{Layout, Part, Rig, prompt},
};

/// Sums over a pass over `ids`, fed in chunks, through all stages.
fn observed(model: &Model, layout: Layout, ids: &[TokenId], chunk: usize) -> Observed {
    let mut rig = Rig::new(model, layout);
    rig.engines.iter_mut().flatten().for_each(|engine| engine.observe().expect("a rank alone in its stage"));
    for ids in ids.chunks(chunk) {
        let part = (0..ids.len()).fold(Part::new(1, ids), |part, at| part.want(at, WantKind::Score { target: 0, top: 0 }));
        rig.run(&[part]);
    }
    rig.engines.iter_mut().flatten().flat_map(|engine| engine.observed()).collect()
}

/// How far an engine's sums are from the textbook's, beside the largest of a product; infinite where products or rows differ.
fn distance(engine: &Model, textbook: &Model) -> f64 {
    let ids = prompt(5, 70, engine.header.config.vocab);
    let (got, expected) = (observed(engine, Layout::default(), &ids, 400), naive::squares(textbook, &ids));
    if !got.keys().eq(expected.keys()) || !got.values().zip(expected.values()).all(|(got, (_, rows))| got.rows == *rows) {
        return f64::INFINITY;
    }
    let of = |(got, (expected, _)): (&engine::ColumnSquares, &(Vec<f64>, u64))| {
        assert_eq!(got.sums.len(), expected.len());
        let most = expected.iter().copied().fold(0.0, f64::max);
        got.sums.iter().zip(expected).map(|(g, e)| (g - e).abs() / most).fold(0.0, f64::max)
    };
    got.values().zip(expected.values()).map(of).fold(0.0, f64::max)
}

type Change = fn(&mut Recipe);

/// Models of floats, and for each a change that has to show.
fn recipes() -> [(Recipe, Change); 6] {
    [
        (model::llama(model::floats), |r| r.config.norm_eps = 1e-2),
        (model::gemma(20, model::floats), |r| r.config.layers[1].window = Some(10)),
        (model::gpt2(model::floats), |r| r.config.norm_eps = 1e-2),
        (model::mixture(model::floats), |r| r.config.norm_eps = 1e-2),
        (model::latent_keys(model::floats), |r| r.config.norm_eps = 1e-2),
        (model::latent_apart(model::floats), |r| r.config.norm_eps = 1e-2),
    ]
}

#[test]
fn sums_are_the_textbooks() {
    for (mut recipe, change) in recipes() {
        let model = recipe.build();
        let off = distance(&model, &model);
        assert!(off < 1e-4, "{:?}: off by {off}", recipe.config.architecture);
        change(&mut recipe);
        let off = distance(&recipe.build(), &model);
        assert!(off > 1e-3, "{:?}: a wrong setting goes unseen: off by {off}", recipe.config.architecture);
    }
}

/// An expert's are those of the tokens that reach it.
#[test]
fn rows_of_an_expert_are_the_tokens_that_reach_it() {
    let model = model::mixture(model::floats).build();
    let ids = prompt(5, 70, model.header.config.vocab);
    let sums = observed(&model, Layout::default(), &ids, 400);
    let experts = model.header.config.experts.expect("experts");
    let rows = |layer: u32| sums.iter().filter(move |(id, _)| id.layer == Some(layer) && matches!(id.role, plan::model::Role::ExpertUp(_)));
    let layer = (0..8).find(|&layer| rows(layer).count() > 0).expect("a layer of experts");
    assert_eq!(rows(layer).map(|(_, of)| of.rows).sum::<u64>(), (ids.len() * experts.used) as u64);
    assert!(rows(layer).all(|(_, of)| of.rows < ids.len() as u64));
}

#[test]
fn chunks_threads_instructions_and_stages_change_no_bit() {
    for recipe in [model::llama(model::mixed), model::gemma(20, model::small), model::mixture(model::mixed), model::latent(model::mixed)] {
        let model = recipe.build();
        let mut ids = prompt(1, 90, model.header.config.vocab);
        let whole = observed(&model, Layout::default(), &ids, ids.len());
        assert!(whole.values().all(|columns| columns.rows > 0 && columns.sums.iter().all(|sum| sum.is_finite())));
        for isa in Isa::available() {
            for (threads, pipeline, chunk) in [(1, 1, 7), (3, 2, 64), (2, 1, 90)] {
                let layout = Layout { isa, threads, pipeline, ..Layout::default() };
                assert!(observed(&model, layout, &ids, chunk) == whole, "{isa}, {threads} threads, {pipeline} stages, chunks of {chunk}");
            }
        }
        if model.header.config.tied_embeddings {
            assert!(observed(&model, Layout::spread(2, 1), &ids, 64) == whole, "each state once, whoever multiplies");
        }
        ids[80] ^= 1;
        assert!(observed(&model, Layout::default(), &ids, ids.len()) != whole);
    }
}

#[test]
fn a_rank_that_has_others_is_not_observed() {
    let mut rig = Rig::new(&model::llama(model::floats).build(), Layout { tensor: 2, ..Layout::default() });
    let refused = rig.engines[0][0].observe().expect_err("columns are elsewhere");
    assert!(refused.to_string().contains("ranks"), "{refused}");
    let mut rig = Rig::new(&model::llama(model::floats).build(), Layout::default());
    rig.run(&[Part::new(1, &[1, 2, 3]).all_logits()]);
    assert!(rig.engines[0][0].observed().is_empty(), "nobody asked");
}
