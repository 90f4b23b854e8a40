//! A conversation in a terminal.

use router::api::{Dialect, Direct};
use serde_json::Value;

use super::{
    answer::{self, Answer},
    completion, conversation,
    input::{self, Assembly, Typed},
    message,
};
use crate::{
    args::SamplingArgs,
    exit::{Failure, Outcome},
    output,
    stop::Stop,
};

const HELP: &str = "  /clear   begin a new conversation
  /exit    leave, as Ctrl-D does
  \"\"\"      begins and ends a message of several lines
  Ctrl-C   stops an answer; where nothing is being answered, it leaves";

/// Who talks, and how.
pub(crate) struct Chat<'a> {
    pub(crate) direct: &'a Direct,
    pub(crate) model: &'a str,
    /// Without a template, each line is a text to continue.
    pub(crate) dialect: Dialect,
    pub(crate) system: Option<&'a str>,
    pub(crate) sampling: &'a SamplingArgs,
    pub(crate) quiet: bool,
}

impl Chat<'_> {
    /// Talks until the person leaves.
    pub(crate) async fn run(&self, stop: &Stop) -> Outcome {
        let mut lines = input::lines()?;
        let mut assembly = Assembly::default();
        let mut messages = self.opening();
        output::note(self.quiet, self.greeting());
        loop {
            output::prompt(if assembly.is_open() { "... " } else { ">>> " });
            let line = tokio::select! {
                biased;
                () = stop.wait() => None,
                line = lines.recv() => line,
            };
            let Some(line) = line else {
                output::prompt("\n");
                return Ok(());
            };
            match assembly.line(&line.map_err(anyhow::Error::new)?) {
                None => {}
                Some(Typed::Exit) => return Ok(()),
                Some(Typed::Help) => output::note(false, HELP),
                Some(Typed::Clear) => messages = self.opening(),
                Some(Typed::Text(text)) => self.turn(&mut messages, text, stop).await?,
            }
        }
    }

    fn opening(&self) -> Vec<Value> {
        self.system.map(|text| message("system", text)).into_iter().collect()
    }

    fn greeting(&self) -> &'static str {
        match self.dialect {
            Dialect::Chat => "Type a message; /help says what else there is.",
            Dialect::Completions => {
                "This model has no chat template, so it continues what you type, line by line; /help says what else there is."
            }
        }
    }

    /// Asks and shows the answer. What the API refuses is said, and the conversation goes on without it.
    async fn turn(&self, messages: &mut Vec<Value>, text: String, stop: &Stop) -> Outcome {
        let body = match self.dialect {
            Dialect::Completions => completion(self.model, &text, self.sampling),
            Dialect::Chat => {
                messages.push(message("user", &text));
                conversation(self.model, messages, self.sampling)
            }
        };
        let diversion = stop.divert();
        let asked = tokio::select! {
            biased;
            () = stop.wait() => Err(Failure::Interrupted),
            asked = answer::ask(self.direct, self.dialect, &body, output::write_all, diversion.interrupted()) => asked,
        };
        let answered = match asked {
            Ok(answered) => answered,
            Err(failure @ Failure::Input(_)) => {
                failure.report();
                messages.pop();
                if self.dialect == Dialect::Chat {
                    output::note(false, "The conversation goes on without that message; /clear begins a new one.");
                }
                return Ok(());
            }
            Err(other) => return Err(other),
        };
        self.shown(&answered)?;
        if self.dialect == Dialect::Chat {
            match answered.text.as_str() {
                "" => drop(messages.pop()),
                text => messages.push(message("assistant", text)),
            }
        }
        Ok(())
    }

    fn shown(&self, answered: &Answer) -> Outcome {
        if !answered.text.ends_with('\n') {
            output::write_all("\n")?;
        }
        output::note(self.quiet, &format!("\x1b[2m{}\x1b[0m", answered.summary()));
        Ok(())
    }
}
