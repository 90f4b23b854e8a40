//! Questions and answers in a terminal: requests to the router of this process, and how their text is shown.

pub(crate) mod answer;
pub(crate) mod chat;
pub(crate) mod input;

use router::api::Dialect;
use serde_json::{Map, Value, json};

use crate::args::SamplingArgs;

/// Most tokens of a text that is merely continued, where nothing says otherwise: such a text need not have an end.
pub(crate) const CONTINUED_TOKENS: u32 = 256;

/// The body that a client would send to `/v1/completions`.
pub(crate) fn completion(model: &str, prompt: &str, sampling: &SamplingArgs) -> Value {
    let mut body = parameters(model, sampling);
    body.insert("prompt".into(), prompt.into());
    body.entry("max_tokens").or_insert(CONTINUED_TOKENS.into());
    Value::Object(body)
}

/// The body that a client would send to `/v1/chat/completions`.
pub(crate) fn conversation(model: &str, messages: &[Value], sampling: &SamplingArgs) -> Value {
    let mut body = parameters(model, sampling);
    body.insert("messages".into(), messages.into());
    Value::Object(body)
}

/// A message of a conversation.
pub(crate) fn message(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

/// What a first question is asked as: a conversation with instructions, if there are any, or a text.
pub(crate) fn question(dialect: Dialect, model: &str, prompt: &str, system: Option<&str>, sampling: &SamplingArgs) -> Value {
    match dialect {
        Dialect::Completions => completion(model, prompt, sampling),
        Dialect::Chat => {
            let messages: Vec<Value> = system.map(|text| message("system", text)).into_iter().chain([message("user", prompt)]).collect();
            conversation(model, &messages, sampling)
        }
    }
}

/// The parameters that both interfaces have. Only those that were given: the rest is the model's to say.
fn parameters(model: &str, sampling: &SamplingArgs) -> Map<String, Value> {
    let SamplingArgs { max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop, ignore_eos } = sampling;
    let given = [
        ("max_tokens", max_tokens.map(Value::from)),
        ("temperature", temperature.map(Value::from)),
        ("top_k", top_k.map(Value::from)),
        ("top_p", top_p.map(Value::from)),
        ("min_p", min_p.map(Value::from)),
        ("repetition_penalty", repetition_penalty.map(Value::from)),
        ("seed", seed.map(Value::from)),
        ("stop", (!stop.is_empty()).then(|| stop.as_slice().into())),
        ("ignore_eos", ignore_eos.then_some(Value::Bool(true))),
    ];
    let named = given.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
    [("model".to_owned(), Value::from(model))].into_iter().chain(named).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_given_is_sent() {
        let none = SamplingArgs::default();
        assert_eq!(
            conversation("m", &[message("user", "hi")], &none),
            json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]})
        );
        assert_eq!(completion("m", "hi", &none), json!({"model": "m", "max_tokens": 256, "prompt": "hi"}));
        let some = SamplingArgs { max_tokens: Some(3), temperature: Some(0.7), stop: vec!["a".into()], ignore_eos: true, ..none };
        let expected = json!({"model": "m", "max_tokens": 3, "temperature": 0.7, "stop": ["a"], "ignore_eos": true, "prompt": "hi"});
        assert_eq!(completion("m", "hi", &some), expected);
    }

    #[test]
    fn instructions_come_first_in_a_chat() {
        let body = question(Dialect::Chat, "m", "hi", Some("be brief"), &SamplingArgs::default());
        assert_eq!(body["messages"], json!([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]));
    }

    #[test]
    fn a_bad_value_is_refused_by_the_api_itself() {
        let sampling = SamplingArgs { temperature: Some(-1.0), ..SamplingArgs::default() };
        let refusal = router::api::DirectRequest::parse(Dialect::Completions, &completion("m", "hi", &sampling)).err().unwrap();
        assert!(refusal.request && refusal.message.contains("temperature") && refusal.message.contains("-1"), "{refusal}");
    }
}
