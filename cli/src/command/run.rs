//! `skein run`: one answer, or a conversation, in this terminal.

use std::{
    io::{self, IsTerminal},
    path::Path,
    time::Duration,
};

use anyhow::Context;
use router::{
    ApiOptions,
    api::{Dialect, Direct, DirectRequest},
};

use crate::{
    args::{Adapted, Global, RunArgs},
    exit::{BadInput, Failure, Outcome, bad_input},
    local::{
        deployment::{self, Planned},
        fleet,
        serving::Serving,
    },
    output,
    stop::Stop,
    talk::{self, answer, chat::Chat},
};

/// Longest answer; who waits at a terminal decides for himself.
const DEADLINE: Duration = Duration::from_secs(7 * 24 * 3600);

/// Runs the command.
pub(crate) async fn run(global: &Global, args: RunArgs, stop: &Stop) -> Outcome {
    let (target, prompt) = args.target()?;
    let manifest_on_stdin = target.file.as_deref() == Some(Path::new("-"));
    let prompt = match prompt {
        Some(prompt) => Some(prompt),
        None if manifest_on_stdin => return Err(bad_input!("the manifest comes on standard input, so a PROMPT is needed as an argument")),
        None if io::stdin().is_terminal() => None,
        None => Some(read_prompt()?),
    };
    if prompt.is_none() && args.json {
        return Err(bad_input!("--json is for one answer, expected a PROMPT or text on standard input"));
    }
    // Parameters are refused before anything is loaded.
    let trial = talk::completion("model", prompt.as_deref().unwrap_or("x"), &args.sampling);
    DirectRequest::parse(Dialect::Completions, &trial).map_err(answer::refused)?;

    let adapted = args.adapted()?;
    let start = async {
        let adapters = match &adapted {
            Some(Adapted::With(spec)) => std::slice::from_ref(spec),
            _ => &[],
        };
        let (draft, context) = (args.generator.draft_model(), args.generator.context());
        let planned = deployment::plans(global, &target, adapters, draft, &args.placement, context).await?;
        // One copy answers one person.
        let mut planned = Planned { replicas: 1, ..choose(planned, args.deployment.as_deref())? };
        planned.look_up(args.generator.prompt_lookup);
        called(&planned, adapted.as_ref())?;
        if fleet::workers(&planned.plan) > 1 || planned.draft.is_some() {
            output::status(global.quiet, "Starting", &fleet::summary(&planned));
        }
        Serving::start(global, vec![planned], &args.placement).await
    };
    let serving = stop.or(start).await?;
    let outcome = tokio::select! {
        biased;
        failure = serving.failed() => Err(failure),
        done = talk(global, &args, (prompt, adapted.as_ref()), &serving, stop) => done,
    };
    serving.stop().await;
    outcome
}

/// All of standard input, without the line break at its end.
fn read_prompt() -> Outcome<String> {
    let text = io::read_to_string(io::stdin()).context("failed to read the prompt from standard input").bad_input()?;
    let text = text.strip_suffix('\n').map_or(text.as_str(), |line| line.strip_suffix('\r').unwrap_or(line));
    if text.is_empty() {
        Err(bad_input!("standard input is empty, expected a prompt there or as an argument"))
    } else {
        Ok(text.to_owned())
    }
}

/// The deployment that was asked for.
fn choose(mut planned: Vec<Planned>, name: Option<&str>) -> Outcome<Planned> {
    let names = planned.iter().map(|deployment| deployment.name.clone()).collect::<Vec<_>>().join(", ");
    if let Some(name) = name {
        planned.retain(|deployment| deployment.name == name);
    }
    match (planned.pop(), planned.is_empty(), name) {
        (Some(only), true, _) => Ok(only),
        (_, _, Some(name)) => Err(bad_input!("the manifest has no deployment {name}, expected one of {names}")),
        _ => Err(bad_input!("the manifest has several deployments, choose one with --deployment: {names}")),
    }
}

/// What requests call a deployment's model with the adapter that was asked for.
fn called(planned: &Planned, adapted: Option<&Adapted>) -> Outcome<String> {
    let name = match adapted {
        None => return Ok(planned.served.clone()),
        Some(Adapted::With(spec)) => &spec.name,
        Some(Adapted::Named(name)) => name,
    };
    let names: Vec<&str> = planned.adapters.iter().map(|adapter| adapter.name.as_str()).collect();
    match (names.contains(&name.as_str()), names.is_empty()) {
        (true, _) => Ok(format!("{}:{name}", planned.served)),
        (false, true) => Err(bad_input!("deployment {} has no adapters, --adapter asks for {name}", planned.name)),
        (false, false) => Err(bad_input!("deployment {} has no adapter {name}, expected one of {}", planned.name, names.join(", "))),
    }
}

/// Waits until the model answers, then asks it.
async fn talk(
    global: &Global,
    args: &RunArgs,
    (prompt, adapted): (Option<String>, Option<&Adapted>),
    serving: &Serving,
    stop: &Stop,
) -> Outcome {
    stop.or(serving.ready(global.quiet)).await?;
    let Some(planned) = serving.planned().first() else { return Err(anyhow::anyhow!("nothing was started").into()) };
    let model = &*called(planned, adapted)?;
    let direct = Direct::new(serving.edge.clone(), ApiOptions { deadline: DEADLINE, ..ApiOptions::default() });
    let templates = stop.or(async { direct.templates(model).await.map_err(answer::refused) }).await?;
    // A prompt is asked as a chat where the model was made for it; who sits at a terminal chats if there is any way to.
    let chat = args.chat || !args.raw && if prompt.is_some() { templates.own } else { templates.any };
    let dialect = if chat { Dialect::Chat } else { Dialect::Completions };
    let (sampling, system) = (&args.sampling, args.system.as_deref());
    if system.is_some() && dialect == Dialect::Completions {
        return Err(bad_input!("--system needs a chat, and {model} has no chat template of its own; --chat uses the manifest's"));
    }
    match prompt {
        Some(prompt) => {
            let body = talk::question(dialect, model, &prompt, system, sampling);
            let show = |text: &str| if args.json { Ok(()) } else { output::write_all(text) };
            let answered = answer::ask(&direct, dialect, &body, show, stop.wait()).await?;
            if args.json {
                output::json(&answered.printed(model))?;
            } else {
                if !answered.text.ends_with('\n') {
                    output::write_all("\n")?;
                }
                output::note(global.quiet, &answered.summary());
            }
            if answered.finish.is_none() { Err(Failure::Interrupted) } else { Ok(()) }
        }
        None => Chat { direct: &direct, model, dialect, system, sampling, quiet: global.quiet }.run(stop).await,
    }
}
