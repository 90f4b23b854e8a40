//! Grammars for the tokens of one tokenizer.

use std::{
    collections::{HashSet, VecDeque},
    sync::{Arc, Mutex, OnceLock, PoisonError},
    thread,
};

use llguidance::{
    ParserFactory,
    api::{ParserLimits, TopLevelGrammar},
    earley::SlicedBiasComputer,
};
use plan::step::TokenId;
use serde_json::{Map, Value, json};
use toktrie::{InferenceCapabilities, TokEnv, TokRxInfo, TokTrie, TokenizerEnv};

use super::{Grammar, GrammarError, GrammarSource};
use crate::encode::Tokenizer;

/// Longest schema in bytes.
const SCHEMA_BYTES: usize = 256 * 1024;
/// Longest regular expression in bytes: the library follows it recursively, also while masks are made.
const REGEX_BYTES: usize = 16 * 1024;
/// Most levels of a schema and of all that it refers to, one after the other: the library follows references recursively.
const LEVELS: usize = 2048;
/// Stack on which grammars are compiled: far more than so many levels take.
const STACK: usize = 256 << 20;
/// Compiled grammars that are kept, those used last.
const KEPT: usize = 64;
/// Bytes of the longest token that a grammar can have drawn: a bound of the trie.
const LONGEST: usize = 1000;
/// White space of JSON where the grammar allows some: a space, or a line's end with what a line is moved in by. Small models go on and on with
/// anything that lets them.
const WHITE_SPACE: &str = r"\x20|\x0D?\x0A(\x20{0,16}|\x09{0,8})";
/// Keyword with which a schema sets options of the library.
const OPTIONS: &str = "x-guidance";

/// Bounds of a grammar and of each mask: the library's own for time (some 20 ms to compile, 15 ms a mask), and fewer states, each of 1 to 2 kB a sequence.
fn limits() -> ParserLimits {
    ParserLimits { max_lexer_states: 32_768, verbose_errors: false, ..ParserLimits::default() }
}

/// Compiles grammars for a tokenizer's tokens, and keeps those used last.
pub struct Grammars {
    tokenizer: Arc<Tokenizer>,
    /// Made when the first grammar is compiled: most models never see one.
    factory: OnceLock<Result<ParserFactory, GrammarError>>,
    kept: Mutex<VecDeque<(Arc<GrammarSource>, Arc<Grammar>)>>,
}

impl Grammars {
    /// For the tokens of `tokenizer`.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self { tokenizer, factory: OnceLock::new(), kept: Mutex::default() }
    }

    /// Compiles a grammar, or finds it. Takes up to a tenth of a second, the first one of a large vocabulary more.
    ///
    /// # Errors
    /// When it is not valid, has features that are not supported, or is too complex; when the model has no end token.
    pub fn compile(&self, source: &Arc<GrammarSource>) -> Result<Arc<Grammar>, GrammarError> {
        if let Some(found) = self.find(source) {
            return Ok(found);
        }
        let grammar = Arc::new(Grammar(on_a_deep_stack(|| self.start(source))?));
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push_front((source.clone(), grammar.clone()));
        kept.truncate(KEPT);
        Ok(grammar)
    }

    fn start(&self, source: &GrammarSource) -> Result<llguidance::Matcher, GrammarError> {
        let top = parse(source)?;
        let factory = self.factory.get_or_init(|| factory(&self.tokenizer)).as_ref().map_err(Clone::clone)?;
        let mut start = llguidance::Matcher::new(factory.create_parser(top));
        // What nothing matches shows in the first mask.
        start.compute_mask().map_err(|e| GrammarError::of(&e))?;
        Ok(start)
    }

    fn find(&self, source: &GrammarSource) -> Option<Arc<Grammar>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let at = kept.iter().position(|(of, _)| **of == *source)?;
        let found = kept.remove(at)?;
        let grammar = found.1.clone();
        kept.push_front(found);
        Some(grammar)
    }
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars").finish_non_exhaustive()
    }
}

/// What the library takes.
fn parse(source: &GrammarSource) -> Result<TopLevelGrammar, GrammarError> {
    let (text, most) = match source {
        GrammarSource::JsonSchema(text) => (text, SCHEMA_BYTES),
        GrammarSource::Regex(text) => (text, REGEX_BYTES),
    };
    if text.len() > most {
        return Err(GrammarError(format!("it has {} bytes, expected at most {most}", text.len())));
    }
    match source {
        GrammarSource::JsonSchema(text) => {
            let value: Value = serde_json::from_str(text).map_err(|e| GrammarError(format!("not JSON: {e}")))?;
            let levels = levels_of_all(&value);
            if levels > LEVELS {
                return Err(GrammarError(format!("it is {levels} levels deep with all that it refers to, expected at most {LEVELS}")));
            }
            let Value::Object(mut schema) = value else { return Err(GrammarError("expected an object".to_owned())) };
            if schema.contains_key(OPTIONS) {
                return Err(GrammarError(format!("{OPTIONS:?} is not supported")));
            }
            schema.insert(OPTIONS.to_owned(), json!({"whitespace_pattern": WHITE_SPACE}));
            Ok(TopLevelGrammar::from_json_schema(Value::Object(schema)))
        }
        GrammarSource::Regex(text) => Ok(TopLevelGrammar::from_regex(text)),
    }
}

/// Levels of a value, and of each part of it that it refers to.
fn levels_of_all(root: &Value) -> usize {
    let mut references = HashSet::new();
    let own = levels(root, &mut references);
    references.iter().filter_map(|name| root.pointer(name)).map(|part| levels(part, &mut HashSet::new())).sum::<usize>() + own
}

/// Levels of a value; notes what its references name. No deeper than the parser of JSON lets a text be.
fn levels<'a>(value: &'a Value, references: &mut HashSet<&'a str>) -> usize {
    match value {
        Value::Object(map) => {
            references.extend(map.get("$ref").and_then(Value::as_str).and_then(|name| name.strip_prefix('#')));
            1 + map.values().map(|value| levels(value, references)).max().unwrap_or(0)
        }
        Value::Array(list) => 1 + list.iter().map(|value| levels(value, references)).max().unwrap_or(0),
        _ => 1,
    }
}

/// Runs what recurses over what a client wrote.
fn on_a_deep_stack<T: Send>(run: impl FnOnce() -> Result<T, GrammarError> + Send) -> Result<T, GrammarError> {
    thread::scope(|scope| {
        let started = thread::Builder::new().name("grammar".to_owned()).stack_size(STACK).spawn_scoped(scope, run);
        let running = started.map_err(|error| GrammarError(format!("no thread to compile it on: {error}")))?;
        running.join().unwrap_or_else(|_| Err(GrammarError("the grammar cannot be processed".to_owned())))
    })
}

/// The schema of any JSON object.
pub(crate) fn any_object() -> GrammarSource {
    GrammarSource::JsonSchema(Value::Object(Map::from_iter([("type".to_owned(), "object".into())])).to_string())
}

fn factory(tokenizer: &Arc<Tokenizer>) -> Result<ParserFactory, GrammarError> {
    let environment = Environment::new(tokenizer)?;
    let environment: TokEnv = Arc::new(environment);
    let slices = SlicedBiasComputer::general_slices();
    let mut factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices).map_err(|e| GrammarError::of(&e))?;
    *factory.quiet().limits_mut() = limits();
    Ok(factory)
}

/// The vocabulary as the library sees it.
struct Environment {
    trie: TokTrie,
    tokenizer: Arc<Tokenizer>,
}

impl Environment {
    fn new(tokenizer: &Arc<Tokenizer>) -> Result<Self, GrammarError> {
        let ends = tokenizer.end_ids();
        let Some(&end) = ends.first() else {
            return Err(GrammarError("the model has no end token, with which constrained output could end".to_owned()));
        };
        // Control tokens and what cannot begin a character are no text: nothing has them drawn. End tokens are allowed apart.
        let text = |id: TokenId| {
            let piece = tokenizer.piece(id);
            let drawn = !tokenizer.is_control(id) && !ends.contains(&id) && piece.len() <= LONGEST;
            if drawn && piece.first() != Some(&TokTrie::SPECIAL_TOKEN_MARKER) { piece.to_vec() } else { Vec::new() }
        };
        let pieces: Vec<Vec<u8>> = (0..tokenizer.vocab() as TokenId).map(text).collect();
        let trie = TokTrie::from(&TokRxInfo::new(pieces.len() as u32, end), &pieces).with_eos_tokens(ends);
        Ok(Self { trie, tokenizer: tokenizer.clone() })
    }

    fn encode(&self, text: &str) -> Vec<TokenId> {
        let ids = self.tokenizer.encode(text, false).unwrap_or_default();
        let same = ids.iter().flat_map(|&id| self.trie.token(id)).eq(text.as_bytes());
        // Where the tokenizer changes text (or has no piece for it), any other cut of it will do.
        if same { ids } else { self.trie.greedy_tokenize(text.as_bytes()) }
    }
}

impl TokenizerEnv for Environment {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| self.encode(text))
    }

    /// Text that can come in one way alone is drawn as the tokenizer cuts it, but where it cuts the beginning of a text otherwise than its middle.
    fn tokenize_is_canonical(&self) -> bool {
        !self.tokenizer.strips_space()
    }
}
