//! Prompts, and what this machine's own `skein run` answers to them with the plan of the sample manifest.

use std::sync::OnceLock;

use e2e::program;
use serde_json::{Value, json};

use crate::kubernetes::{SAMPLE, SAMPLE_NAME};

/// A request, as every interface can put it.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) prompt: String,
    pub(crate) tokens: u32,
    pub(crate) temperature: f32,
    pub(crate) seed: u32,
}

impl Request {
    /// The body for `/v1/completions` of the sample's model.
    pub(crate) fn body(&self) -> Value {
        json!({
            "model": SAMPLE_NAME,
            "prompt": self.prompt,
            "max_tokens": self.tokens,
            "temperature": self.temperature,
            "seed": self.seed,
        })
    }

    /// What `skein run` of the sample manifest answers.
    pub(crate) fn answer_here(&self) -> String {
        let (tokens, temperature, seed) = (self.tokens.to_string(), self.temperature.to_string(), self.seed.to_string());
        let args = ["run", "--file", SAMPLE, "--raw", "--quiet", "--json", "--max-tokens", &tokens, "--temperature", &temperature];
        let answer = program::json(&[&args[..], &["--seed", &seed, &self.prompt]].concat());
        answer["text"].as_str().expect("a text").to_owned()
    }
}

const SUBJECTS: [&str; 20] = [
    "The capital of France is",
    "Kubernetes is an open source",
    "def fibonacci(n):\n",
    "Once upon a time there was a goose",
    "The three laws of thermodynamics are",
    "Die Hauptstadt von Deutschland ist",
    "1, 1, 2, 3, 5, 8,",
    "To be, or not to be,",
    "SELECT name FROM users WHERE",
    "Water boils at",
    "La tour Eiffel se trouve",
    "The opposite of cold is",
    "My favourite recipe for bread begins with",
    "In 1969, the first human",
    "{\"name\": \"skein\", \"kind\":",
    "東京は",
    "A prime number is a number that",
    "Dear Sir or Madam,",
    "The quick brown fox",
    "Geese fly in a V because",
];

/// Twenty requests, every second one drawn with a seed, and their answers here.
pub(crate) fn twenty() -> &'static [(Request, String)] {
    static ANSWERS: OnceLock<Vec<(Request, String)>> = OnceLock::new();
    ANSWERS.get_or_init(|| {
        let request = |(at, prompt): (usize, &&str)| {
            let temperature = if at % 2 == 0 { 0.0 } else { 0.9 };
            let request = Request { prompt: (*prompt).to_owned(), tokens: 24, temperature, seed: 1000 + at as u32 };
            let answer = request.answer_here();
            (request, answer)
        };
        SUBJECTS.iter().enumerate().map(request).collect()
    })
}

/// The same requests as bodies for the HTTP API.
pub(crate) fn requests() -> Vec<(Value, String)> {
    twenty().iter().map(|(request, answer)| (request.body(), answer.clone())).collect()
}
