//! Chat templates: Jinja with the methods and functions that model makers rely on, without access to anything else.

use std::io::Write;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, Value};
use serde::Serialize;

use super::error::ChatError;

/// Work a template may do in one rendering: instructions, and 64 bytes of text each. A sanitizer's frames are larger, and slower: less of them.
const FUEL: u64 = if cfg!(fuzzing) { 100_000 } else { 1_000_000 };
/// Bytes a template may write.
const OUTPUT_BYTES: usize = 16 << 20;
/// Longest template in bytes; those of models have tens of thousands.
const SOURCE_BYTES: usize = 64 << 10;
/// Stack for each byte of a template. Its parser calls itself for each `not`, `-` and `elif`, however many there are; what is not used costs nothing.
const STACK_PER_BYTE: usize = if cfg!(fuzzing) { 64 << 10 } else { 4 << 10 };
/// Stack of a rendering. All of its work can go into lists within lists, which are written and dropped level by level.
const RENDER_STACK: usize = 512 << 20;

/// A compiled chat template. A cheap clone.
#[derive(Clone)]
pub(super) struct Template {
    environment: Arc<Environment<'static>>,
    source: Arc<str>,
}

/// What a template is rendered with.
#[derive(Serialize)]
pub(super) struct Context<'a> {
    /// `{role, content, …}` objects.
    pub(super) messages: &'a serde_json::Value,
    /// Function descriptions, or null.
    pub(super) tools: &'a serde_json::Value,
    /// End with the opening of the assistant's turn.
    pub(super) add_generation_prompt: bool,
    /// Text of the first token.
    pub(super) bos_token: &'a str,
    /// Text of the last token.
    pub(super) eos_token: &'a str,
    /// More variables (`chat_template_kwargs`).
    #[serde(flatten)]
    pub(super) more: &'a serde_json::Map<String, serde_json::Value>,
}

impl Template {
    /// Compiles `source`.
    ///
    /// # Errors
    /// When it is not valid Jinja.
    pub(super) fn new(source: &str) -> Result<Self, ChatError> {
        if source.len() > SOURCE_BYTES {
            return Err(ChatError::Template(format!("it has {} bytes, expected at most {SOURCE_BYTES}", source.len())));
        }
        let invalid = |e: Error| ChatError::Template(describe(&e));
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(64);
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(invalid)?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", tojson);
        environment
            .add_function("raise_exception", |text: String| -> Result<Value, Error> { Err(Error::new(ErrorKind::InvalidOperation, text)) });
        environment.add_function("strftime_now", |format: String| strftime(&format, SystemTime::now()));
        let add = || environment.add_template_owned("chat", source.to_owned());
        on_stack(STACK_PER_BYTE * source.len(), add)?.map_err(invalid)?;
        Ok(Self { environment: Arc::new(environment), source: source.into() })
    }

    /// The Jinja source.
    pub(super) fn source(&self) -> &str {
        &self.source
    }

    /// Renders the prompt text.
    ///
    /// # Errors
    /// When the template refuses the messages or exceeds a limit.
    pub(super) fn render(&self, context: &Context<'_>) -> Result<String, ChatError> {
        on_stack(RENDER_STACK, || self.render_here(context))?
    }

    fn render_here(&self, context: &Context<'_>) -> Result<String, ChatError> {
        let template = self.environment.get_template("chat").map_err(|e| ChatError::Template(describe(&e)))?;
        let mut output = Limited(Vec::new());
        match template.render_captured_to(Value::from(minijinja::value::Serde(context)), &mut output) {
            Ok(_) => String::from_utf8(output.0).map_err(|e| ChatError::Refused(e.to_string())),
            Err(e) if e.kind() == ErrorKind::OutOfFuel => Err(ChatError::Limit("steps")),
            Err(e) if e.kind() == ErrorKind::WriteFailure => Err(ChatError::Limit("output bytes")),
            Err(e) => Err(ChatError::Refused(describe(&e))),
        }
    }
}

/// Does `work` with `bytes` of stack, and some more.
fn on_stack<T: Send>(bytes: usize, work: impl FnOnce() -> T + Send) -> Result<T, ChatError> {
    let failed = |what: &str| ChatError::Template(format!("it could not be worked on: {what}"));
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("chat template".to_owned()).stack_size((2 << 20) + bytes);
        let thread = thread.spawn_scoped(scope, work).map_err(|e| failed(&e.to_string()))?;
        thread.join().map_err(|_| failed("its thread panicked"))
    })
}

fn describe(e: &Error) -> String {
    let text = e.detail().map_or_else(|| e.kind().to_string(), str::to_owned);
    match e.line() {
        Some(line) => format!("{text} (line {line})"),
        None => text,
    }
}

struct Limited(Vec<u8>);

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > OUTPUT_BYTES {
            return Err(std::io::Error::other("output limit"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False)` writes it, which is what templates were trained with.
fn tojson(value: Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<Value> = options.get("ensure_ascii")?;
    let _: Option<Value> = options.get("sort_keys")?;
    let _: Option<Value> = options.get("separators")?;
    options.assert_all_used()?;
    let wrong = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    let value = serde_json::to_value(&value).map_err(wrong)?;
    let mut out = String::new();
    dump(&value, indent.map(|n| n.min(16)), 0, &mut out);
    Ok(Value::from_safe_string(out))
}

fn dump(value: &serde_json::Value, indent: Option<usize>, depth: usize, out: &mut String) {
    let line = |depth: usize, out: &mut String| {
        if let Some(n) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', n * depth));
        }
    };
    let comma = if indent.is_some() { "," } else { ", " };
    match value {
        serde_json::Value::Array(list) if !list.is_empty() => {
            out.push('[');
            for (i, v) in list.iter().enumerate() {
                out.push_str(if i > 0 { comma } else { "" });
                line(depth + 1, out);
                dump(v, indent, depth + 1, out);
            }
            line(depth, out);
            out.push(']');
        }
        serde_json::Value::Object(map) if !map.is_empty() => {
            out.push('{');
            for (i, (k, v)) in map.iter().enumerate() {
                out.push_str(if i > 0 { comma } else { "" });
                line(depth + 1, out);
                out.push_str(&serde_json::Value::from(k.as_str()).to_string());
                out.push_str(": ");
                dump(v, indent, depth + 1, out);
            }
            line(depth, out);
            out.push('}');
        }
        plain => out.push_str(&plain.to_string()),
    }
}

/// The date in UTC, for the directives that templates use; others stay as they are.
fn strftime(format: &str, now: SystemTime) -> String {
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    // Howard Hinnant, "chrono-compatible low-level date algorithms": civil_from_days.
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + u64::from(month <= 2);
    const MONTHS: [&str; 12] =
        ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (month_name, day_name) = (MONTHS[(month - 1) as usize], DAYS[(days % 7) as usize]);
    let (mut out, mut chars) = (String::new(), format.chars());
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out.push_str(&year.to_string()),
            Some('m') => out.push_str(&format!("{month:02}")),
            Some('d') => out.push_str(&format!("{day:02}")),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(day_name),
            Some('a') => out.push_str(&day_name[..3]),
            Some('H') => out.push_str(&format!("{:02}", of_day / 3600)),
            Some('M') => out.push_str(&format!("{:02}", of_day / 60 % 60)),
            Some('S') => out.push_str(&format!("{:02}", of_day % 60)),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

/// The `<start_of_turn>` form. A system message goes before the first user content.
pub(super) const GEMMA: &str = r#"{{ bos_token }}
{%- set ns = namespace(system='') -%}
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set ns.system = (messages[0]['content'] | trim) + '\n\n' -%}
    {%- set messages = messages[1:] -%}
    {%- if not messages -%}{{ raise_exception('this template takes a message after the system message') }}{%- endif -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}{%- set role = 'model' -%}
    {%- elif message['role'] == 'user' -%}{%- set role = 'user' -%}
    {%- else -%}{{ raise_exception('this template takes the roles user and assistant, and system in the first message, not ' + message['role']) }}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (ns.system if loop.first else '') + (message['content'] | trim) + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"#;

/// The `<|im_start|>` form.
pub(super) const CHATML: &str = r#"{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"#;

/// The `<|start_header_id|>` form.
pub(super) const LLAMA3: &str = r#"{{ bos_token }}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + (message['content'] | trim) + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"#;
