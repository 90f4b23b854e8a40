//! Text to ids and back: tokenizers of GGUF files and tokenizer.json, chat templates, generation defaults.

mod card;
mod carry;
mod compare;
mod error;
mod gguf;
mod guard;
mod json;
mod normalizer;
mod pieces;
mod pipeline;
mod sentencepiece;
mod specials;
mod spm;
mod template;
mod unigram;
mod vectors;
mod vocabulary;
mod wordpiece;

use plan::card::{CardFile, GGUF_HEADER, ModelCard};
use plan::fleet::ChatTemplate;
use plan::step::TokenId;
use serde_json::{Map, Value};

pub use carry::{files as tokenizer_files, gguf_entries};
pub use compare::{CompareError, same_tokens};
pub use error::{ChatError, EncodeError, TokenizerError};
pub use plan::generation::Defaults as GenerationDefaults;
pub use vectors::{Activation, Classes, Embedding, VectorSettings, vector_entries, vector_files};

use card::TokenizerConfig;
use guard::Guard;
use specials::Parse;
use template::{Context, Template};
use vocabulary::{Encoder, Vocabulary};

/// A model's tokenizer with its chat template. Encoding is computation: long texts belong on a thread of their own.
pub struct Tokenizer {
    vocabulary: Vocabulary,
    end_ids: Vec<TokenId>,
    defaults: GenerationDefaults,
    /// The model's own, or what replaced it. An invalid one is reported when it is used.
    template: Option<Result<Template, String>>,
    /// The model's files hold one.
    own_template: bool,
    tool_template: Option<Result<Template, String>>,
    guard: Guard,
    /// Bytes of the longest piece.
    longest: usize,
}

/// How messages become a prompt.
#[derive(Clone, Copy, Debug)]
pub struct ChatOptions<'a> {
    /// Function descriptions for templates that know tools; null for none.
    pub tools: &'a Value,
    /// End with the opening of the assistant's turn.
    pub add_generation_prompt: bool,
    /// More template variables.
    pub variables: Option<&'a Map<String, Value>>,
}

impl Default for ChatOptions<'_> {
    fn default() -> Self {
        Self { tools: &Value::Null, add_generation_prompt: true, variables: None }
    }
}

impl Tokenizer {
    /// Builds the tokenizer of a model: tokenizer.json where there is one, else the GGUF header's, else tokenizer.model, else
    /// vocab.txt.
    ///
    /// # Errors
    /// When the card has neither, a file cannot be read, or the tokenizer is of a kind that is not known.
    pub fn from_card(card: &ModelCard) -> Result<Self, TokenizerError> {
        let mut config = TokenizerConfig::read(card)?;
        let mut defaults = card::defaults(card)?;
        let vocabulary = if let Some(bytes) = card.file("tokenizer.json") {
            json::vocabulary(bytes, &config)?
        } else if let Some(bytes) = card.file(GGUF_HEADER) {
            let wrong = |e: plan::gguf::GgufError| TokenizerError::File { file: GGUF_HEADER, problem: e.to_string() };
            let mut stored = plan::gguf::Tokenizer::parse(bytes).map_err(wrong)?;
            config.template = config.template.or(stored.chat_template.take()).or_else(|| stored.named_templates.remove("default"));
            config.tool_template = config.tool_template.or_else(|| stored.named_templates.remove("tool_use"));
            if let Some(settings) = stored.generation.take() {
                let file = CardFile { name: "generation_config.json".to_owned(), bytes: settings.into_bytes() };
                defaults = card::defaults(&ModelCard { files: vec![file] })?;
            }
            match stored.huggingface.take() {
                Some(json) => json::of_gguf(&json, &stored, config.clone())?,
                None if stored.model == wordpiece::MODEL => wordpiece::from_gguf(&stored, &config)?,
                None if stored.model == sentencepiece::LIKELIEST => sentencepiece::from_gguf(stored)?,
                None => gguf::vocabulary(stored)?,
            }
        } else if let Some(bytes) = card.file(sentencepiece::FILE) {
            sentencepiece::vocabulary(bytes, card, &config)?
        } else if let Some(bytes) = card.file(wordpiece::FILE) {
            wordpiece::from_lines(bytes, card, &config)?
        } else {
            let names: Vec<&str> = card.files.iter().map(|f| f.name.as_str()).collect();
            return Err(TokenizerError::Missing(if names.is_empty() { "no files".to_owned() } else { names.join(", ") }));
        };
        let mut end_ids = vocabulary.ends.clone();
        end_ids.extend(&defaults.eos);
        end_ids.retain(|&id| (id as usize) < vocabulary.pieces.len());
        end_ids.sort_unstable();
        end_ids.dedup();
        let compile = |source: Option<String>| source.map(|s| Template::new(&s).map_err(|e| e.to_string()));
        let controls = vocabulary.control.iter().enumerate().filter(|&(_, &control)| control);
        let texts = controls.filter_map(|(id, _)| std::str::from_utf8(vocabulary.pieces.get(id as TokenId)).ok());
        let longest = (0..vocabulary.pieces.len()).map(|id| vocabulary.pieces.get(id as TokenId).len()).max().unwrap_or(0);
        Ok(Self {
            guard: Guard::new(texts),
            end_ids,
            defaults,
            own_template: config.template.is_some(),
            template: compile(config.template),
            tool_template: compile(config.tool_template),
            longest,
            vocabulary,
        })
    }

    /// Replaces the model's chat template.
    #[must_use]
    pub fn with_template(mut self, template: &ChatTemplate) -> Self {
        let source = match template {
            ChatTemplate::Gemma => template::GEMMA,
            ChatTemplate::ChatML => template::CHATML,
            ChatTemplate::Llama3 => template::LLAMA3,
            ChatTemplate::Inline(source) => source,
        };
        self.template = Some(Template::new(source).map_err(|e| e.to_string()));
        self.tool_template = None;
        self
    }

    /// Ids of `text` alone, without BOS or EOS. Control tokens spelled in it are parsed only if `parse_special`.
    ///
    /// # Errors
    /// When the tokenizer's own rules fail on the text.
    pub fn encode(&self, text: &str, parse_special: bool) -> Result<Vec<TokenId>, EncodeError> {
        self.run(text, if parse_special { Parse::Always } else { Parse::Never })
    }

    /// Ids of a whole prompt: `text` between the tokens that the model wants around a text. A BOS that the text
    /// already begins with is not put there twice.
    ///
    /// # Errors
    /// When the tokenizer's own rules fail on the text.
    pub fn encode_prompt(&self, text: &str, parse_special: bool) -> Result<Vec<TokenId>, EncodeError> {
        let mut ids = self.with_prefix(self.encode(text, parse_special)?);
        ids.extend_from_slice(&self.vocabulary.suffix);
        Ok(ids)
    }

    /// Ids of two texts that are read together, between the tokens that the model wants around them, and where the second one begins.
    /// Control tokens spelled in them are parsed only if `parse_special`.
    ///
    /// # Errors
    /// When the model's files do not say how two texts are put together, or the tokenizer's own rules fail on them.
    pub fn encode_pair(&self, first: &str, second: &str, parse_special: bool) -> Result<(Vec<TokenId>, usize), EncodeError> {
        let unsaid = || EncodeError("the model's files do not say how two texts are put together".to_owned());
        let around = self.vocabulary.pair.as_ref().ok_or_else(unsaid)?;
        let mut ids = around.before.clone();
        ids.extend(self.encode(first, parse_special)?);
        ids.extend_from_slice(&around.between);
        let begin = ids.len();
        ids.extend(self.encode(second, parse_special)?);
        ids.extend_from_slice(&around.after);
        Ok((ids, begin))
    }

    /// The prompt of a conversation: `{role, content, …}` objects rendered by the chat template. Control tokens are
    /// parsed from the template's own text alone, never from what the messages say.
    ///
    /// # Errors
    /// When there is no template, it refuses the messages, or exceeds its limits.
    pub fn chat(&self, messages: &[Value], options: ChatOptions<'_>) -> Result<Vec<TokenId>, ChatError> {
        let template = match &self.tool_template {
            Some(template) if !options.tools.is_null() => template,
            _ => self.template.as_ref().ok_or(ChatError::NoTemplate)?,
        };
        let template = template.as_ref().map_err(|e| ChatError::Template(e.clone()))?;
        let (mut messages, mut tools) = (Value::Array(messages.to_vec()), options.tools.clone());
        let mut variables = Value::Object(options.variables.cloned().unwrap_or_default());
        let mark = guard::free_mark(&[&messages, &tools, &variables], template.source());
        let mark = mark.ok_or(ChatError::Limit("characters: every private-use character occurs in the messages"))?;
        for value in [&mut messages, &mut tools, &mut variables] {
            self.guard.mark(value, mark);
        }
        let none = Map::new();
        let text = |id: Option<TokenId>| id.map_or_else(String::new, |id| String::from_utf8_lossy(self.piece(id)).into_owned());
        let rendered = template.render(&Context {
            messages: &messages,
            tools: &tools,
            add_generation_prompt: options.add_generation_prompt,
            bos_token: &text(self.vocabulary.bos),
            eos_token: &text(self.vocabulary.eos),
            more: variables.as_object().unwrap_or(&none),
        })?;
        let (plain, barriers) = guard::unmark(&rendered, mark);
        Ok(self.with_prefix(self.run(&plain, Parse::Between(&barriers))?))
    }

    /// Whether conversations can be rendered.
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// Whether the model came with a chat template, whatever replaced it.
    pub fn has_own_template(&self) -> bool {
        self.own_template
    }

    /// The bytes of a token: text as it stands in a sequence, a control token's name. Empty for ids outside the vocabulary.
    pub fn piece(&self, id: TokenId) -> &[u8] {
        self.vocabulary.pieces.get(id)
    }

    /// Whether a token is control, which is not part of text.
    pub fn is_control(&self, id: TokenId) -> bool {
        self.vocabulary.control.get(id as usize).copied().unwrap_or(false)
    }

    /// Whether the first piece of a text loses one leading space, which encoding had put there.
    pub fn strips_space(&self) -> bool {
        self.vocabulary.strip_space
    }

    /// Number of ids.
    pub fn vocab(&self) -> usize {
        self.vocabulary.pieces.len()
    }

    /// Bytes of the longest token.
    pub fn longest_piece(&self) -> usize {
        self.longest
    }

    /// First token of a text.
    pub fn bos(&self) -> Option<TokenId> {
        self.vocabulary.bos
    }

    /// Last token of a text.
    pub fn eos(&self) -> Option<TokenId> {
        self.vocabulary.eos
    }

    /// Whether a whole text starts with BOS.
    pub fn adds_bos(&self) -> bool {
        !self.vocabulary.prefix.is_empty()
    }

    /// Ids that end a generation, ascending.
    pub fn end_ids(&self) -> &[TokenId] {
        &self.end_ids
    }

    /// Generation settings of the model's makers.
    pub fn defaults(&self) -> &GenerationDefaults {
        &self.defaults
    }

    fn with_prefix(&self, mut ids: Vec<TokenId>) -> Vec<TokenId> {
        let prefix = &self.vocabulary.prefix;
        if !prefix.is_empty() && !ids.starts_with(prefix) {
            ids.splice(0..0, prefix.iter().copied());
        }
        ids
    }

    fn run(&self, text: &str, parse: Parse<'_>) -> Result<Vec<TokenId>, EncodeError> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        match &self.vocabulary.encoder {
            Encoder::Spm(spm) => spm.encode(text, parse, &mut ids),
            Encoder::Pipeline(pipeline) => pipeline.encode(text, parse, &mut ids)?,
        }
        Ok(ids)
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab", &self.vocab()).field("end_ids", &self.end_ids).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
