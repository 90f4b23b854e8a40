//! What becomes of a request's JSON, without a server.

use super::*;
use crate::api::fields::Fields;
use crate::api::parameters::Parameters;

fn parameters(body: Value) -> Parameters {
    let map = body.as_object().expect("an object").clone();
    Parameters::read(&mut Fields::from(map)).unwrap_or_else(|e| panic!("{}", e.message))
}

#[test]
fn biases_are_sorted_and_end_tokens_merged() {
    let tokenizer = Tokenizer::from_card(&card(|_, _| ())).expect("a tokenizer");
    let read = parameters(json!({"logit_bias": {"9": 1, "3": -2.5}, "stop_token_ids": [7, 4], "min_tokens": 2, "seed": -1}));
    let ends = read.end_ids(&tokenizer);
    assert_eq!(*ends, [1, 4, 7]);
    let sampling = read.sampling(&tokenizer, &ends).unwrap_or_else(|e| panic!("{}", e.message));
    assert_eq!(sampling.logit_bias, [(3, -2.5), (9, 1.0)]);
    assert_eq!((sampling.suppress, sampling.min_tokens, sampling.seed), (vec![1, 4, 7], 2, u64::MAX));
    let read = parameters(json!({"ignore_eos": true, "stop_token_ids": [7]}));
    assert_eq!(*read.end_ids(&tokenizer), [7]);
    let sampling = read.sampling(&tokenizer, &[7]).unwrap_or_else(|e| panic!("{}", e.message));
    assert!(sampling.suppress.is_empty(), "nothing is kept back when there is no least number");
    assert_eq!(sampling.temperature, 1.0, "what neither request nor model says is the interface's own default");
}
