//! Constrained sequences whose masks another router makes.

use super::*;
use crate::grammar::{
    GrammarSource,
    tests::{constraint, fixture, mask_behind},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn constrained_streams_of_other_routers_match_and_outlive_them() {
    let (_, grammars) = fixture();
    let of = constraint(&grammars, GrammarSource::Regex("([a-z]{1,6} ){30,50}".to_owned()));
    let (_connector, mut first, second) = pair().await;
    let generations: Vec<Generation> = (0..9)
        .map(|i| {
            let mut generation = Generation { end_ids: Arc::new([1, 4]), constraint: Some(of.clone()), ..generation(i, 100) };
            generation.sampling.masked = true;
            generation
        })
        .collect();
    let mut streams = Vec::new();
    for generation in &generations {
        let mut stream = second.edge.submit("tiny", generation.clone()).expect("admitted");
        let begun = head(&mut stream, 2).await;
        streams.push((stream, begun));
    }
    let lost = first.drives();
    assert!(second.replicas().iter().any(|r| lost.contains(&r.name) && r.sequences > 0), "some are on the router that dies");
    first.kill();
    for ((stream, begun), g) in streams.into_iter().zip(&generations) {
        let (tokens, end) = rest(stream).await;
        let solo = MODEL.solo_under(&g.prompt, &g.sampling, 100, &g.end_ids, |emitted| mask_behind(&of, emitted));
        assert_eq!([begun, tokens].concat(), solo);
        assert!(end.is_ok());
        assert_ne!(MODEL.solo(&g.prompt, &g.sampling, 100, &g.end_ids), solo, "the grammar changes what is drawn");
    }
}
