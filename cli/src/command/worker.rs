//! `skein worker`: one rank of one stage, started by the other commands.
//!
//! The specification comes as one line on standard input; the end of standard input ends the worker, so a worker never outlives
//! whoever started it. The first line on standard output is the address it listens on. A worker that fails says why in one more
//! line there, for its runner to show once, however many workers fail alike.

use std::{
    fs,
    io::{self, BufRead, Read},
    net::SocketAddr,
    path::Path,
    thread,
    time::Duration,
};

use anyhow::Context;
use identity::Identity;
use kernels::Isa;
use plan::worker::WorkerSpec;
use source::Credentials;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};
use worker::{WorkerError, WorkerOptions};

use crate::{
    args::{Global, WorkerArgs, WorkerThreads},
    exit::{BadInput, Failure, Outcome},
    local::{restart::Fault, threads},
    model, output,
    stop::Stop,
};

/// How long a worker may take to end by itself once its lifeline is cut.
const GRACE: Duration = Duration::from_secs(3);

/// Runs the command until its lifeline is cut or a signal comes.
pub(crate) async fn worker(global: &Global, args: WorkerArgs, stop: &Stop) -> Outcome {
    let ending = CancellationToken::new();
    let mut spec = match &args.spec {
        Some(file) => read_spec(file)?,
        None => stop.or(receive_spec(ending.clone())).await?,
    };
    if let Some(replica) = args.replica {
        spec.replica = replica;
    }
    match args.threads {
        None => {}
        Some(WorkerThreads::Auto) => spec.threads = threads::available(),
        Some(WorkerThreads::Fixed(threads)) => spec.threads = threads.get(),
    }
    let isa = Isa::named(args.isa.name()).bad_input()?;
    let mut source = model::source_options(global)?;
    if let Some(folder) = &args.credentials {
        let shown =
            Credentials::from_folder(folder, &spec.uri).with_context(|| format!("the Secret at {} cannot be used", folder.display()));
        source.credentials = Some(shown.bad_input()?);
    }
    let identity = args.identity.as_deref().map(Identity::open).transpose().bad_input()?;
    let mut options = WorkerOptions::new(spec, args.listen, args.token, isa, source);
    options.identity = identity;
    options.announce = args.announce;
    let signalled = ending.clone();
    let until = async {
        stop.wait().await;
        signalled.cancel();
        std::future::pending().await
    };
    let served = tokio::select! {
        served = worker::serve(options, say_address, ending.clone()) => served,
        () = until => Ok(()),
    };
    match served {
        Ok(()) => Ok(()),
        Err(error) if args.spec.is_some() => {
            // Whoever started it finds why in the last lines of its log: the reason, then everything on one line.
            error!(reason = error.reason(), "the worker ends");
            Err(failure(error).on_one_line())
        }
        Err(error) => Err(tell(error)),
    }
}

/// The specification in a file.
fn read_spec(file: &Path) -> Outcome<WorkerSpec> {
    let text = fs::read_to_string(file).with_context(|| format!("failed to read {}", file.display())).bad_input()?;
    serde_json::from_str(&text).with_context(|| format!("{} is not a worker's specification", file.display())).bad_input()
}

/// The specification on standard input, which is watched from then on: its end cancels `ending`.
async fn receive_spec(ending: CancellationToken) -> Outcome<WorkerSpec> {
    let read = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        io::stdin().lock().read_line(&mut line).map(|_| line)
    });
    let line = read.await.context("reading standard input was cut off")?;
    let line = line.context("failed to read the specification on standard input").bad_input()?;
    let spec = serde_json::from_str(&line).context("standard input does not begin with a worker's specification").bad_input()?;
    thread::Builder::new()
        .name("lifeline".into())
        .spawn(move || {
            drain(&mut io::stdin().lock());
            info!("the runner is gone or wants this worker to end");
            ending.cancel();
            // A worker that is stuck in a step must not outlive its runner either.
            thread::sleep(GRACE);
            std::process::exit(1);
        })
        .context("failed to start the thread that watches standard input")?;
    Ok(spec)
}

/// Reads to the end, or to an error, which is an end as well.
fn drain(input: &mut impl Read) {
    let mut buffer = [0; 64];
    loop {
        match input.read(&mut buffer) {
            Ok(0) => return,
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return,
            _ => {}
        }
    }
}

/// Prints where the worker listens. Without anyone to read it there is no runner, and standard input ends too.
fn say_address(address: SocketAddr) {
    if let Err(failure) = output::line(&address.to_string()) {
        error!(%failure, "failed to say where this worker listens");
    }
}

/// Whose fault an error is.
fn failure(error: WorkerError) -> Failure {
    let input = match &error {
        WorkerError::Load { .. } | WorkerError::Router { .. } => true,
        WorkerError::Source { source, .. } => model::is_input(source),
        _ => false,
    };
    if input { Failure::Input(error.into()) } else { Failure::Failed(error.into()) }
}

/// Tells the runner why this worker ends.
fn tell(error: WorkerError) -> Failure {
    let failure = failure(error);
    let input = matches!(failure, Failure::Input(_));
    let fault = Fault { input, message: failure.to_string() };
    match output::json(&fault) {
        Ok(()) => Failure::Told { input },
        Err(_) => failure,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_input_is_read_to_its_end() {
        let mut long = vec![b'x'; 1000];
        long.push(b'\n');
        let mut input = long.as_slice();
        drain(&mut input);
        assert!(input.is_empty());
    }
}
