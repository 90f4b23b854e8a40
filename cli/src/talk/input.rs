//! What a person types: lines, several lines at once, commands.

use std::{io, thread};

use anyhow::Context;
use tokio::sync::mpsc;

/// Begins and ends a message of several lines.
const QUOTES: &str = "\"\"\"";

/// Something typed, whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Typed {
    /// For the model.
    Text(String),
    /// `/clear`: begin a new conversation.
    Clear,
    /// `/help`, or a command that does not exist.
    Help,
    /// `/exit`, `/quit`, `/bye`.
    Exit,
}

/// Puts lines together.
#[derive(Debug, Default)]
pub(crate) struct Assembly {
    /// Lines of a message that is not closed yet.
    open: Option<String>,
}

impl Assembly {
    /// Whether the next line goes on with a message.
    pub(crate) fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Takes a line; `None` when more is to come, or there was nothing in it.
    pub(crate) fn line(&mut self, line: &str) -> Option<Typed> {
        if let Some(mut text) = self.open.take() {
            text.push('\n');
            return self.quoted(text, line);
        }
        if let Some(rest) = line.strip_prefix(QUOTES) {
            return self.quoted(String::new(), rest);
        }
        match line.trim() {
            "" => None,
            "/clear" => Some(Typed::Clear),
            "/exit" | "/quit" | "/bye" => Some(Typed::Exit),
            // A path is a thing to say, a single word is a command.
            word if word.starts_with('/') && !word[1..].contains(['/', ' ']) => Some(Typed::Help),
            _ => Some(Typed::Text(line.to_owned())),
        }
    }

    /// Goes on with a quoted message.
    fn quoted(&mut self, mut text: String, line: &str) -> Option<Typed> {
        match line.strip_suffix(QUOTES) {
            Some(last) => {
                text.push_str(last);
                (!text.trim().is_empty()).then_some(Typed::Text(text))
            }
            None => {
                text.push_str(line);
                self.open = Some(text);
                None
            }
        }
    }
}

/// Lines of standard input, read by a thread that ends with the process: a read from a terminal cannot be called off.
///
/// # Errors
/// When the thread cannot be started.
pub(crate) fn lines() -> anyhow::Result<mpsc::Receiver<io::Result<String>>> {
    // One line ahead of whoever reads is enough; a person types more slowly than that.
    let (tell, told) = mpsc::channel(1);
    let read = move || {
        for line in io::stdin().lines() {
            if tell.blocking_send(line).is_err() {
                return;
            }
        }
    };
    thread::Builder::new().name("keyboard".into()).spawn(read).context("failed to start the thread that reads standard input")?;
    Ok(told)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(lines: &[&str]) -> Vec<Typed> {
        let mut assembly = Assembly::default();
        lines.iter().filter_map(|line| assembly.line(line)).collect()
    }

    #[test]
    fn lines_are_messages_and_words_with_a_slash_commands() {
        assert_eq!(
            all(&["hi", "", "  ", "/clear", "/nonsense", "/usr/bin", "/bye"]),
            [Typed::Text("hi".into()), Typed::Clear, Typed::Help, Typed::Text("/usr/bin".into()), Typed::Exit]
        );
    }

    #[test]
    fn quotes_hold_several_lines() {
        assert_eq!(all(&["\"\"\"a", "", "/bye", "b\"\"\"", "c"]), [Typed::Text("a\n\n/bye\nb".into()), Typed::Text("c".into())]);
        assert_eq!(all(&["\"\"\"one\"\"\""]), [Typed::Text("one".into())]);
        assert_eq!(all(&["\"\"\"", "\"\"\""]), []);
        let mut open = Assembly::default();
        open.line("\"\"\"a");
        assert!(open.is_open());
    }
}
