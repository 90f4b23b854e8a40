//! The commands, one file each.

mod bench_engine;
mod bench_load;
mod bench_router;
pub(crate) mod convert;
mod eval_logits;
pub(crate) mod eval_ppl;
mod eval_vectors;
mod inspect;
mod logs;
mod plan;
mod plan_status;
mod quantize;
mod router;
mod run;
mod serve;
mod status;
mod top;
mod worker;

use crate::{
    args::{BenchCommand, Command, EvalCommand, Skein},
    exit::Outcome,
    stop::Stop,
};

/// Runs the command that was asked for.
pub(crate) async fn dispatch(args: Skein, stop: Stop) -> Outcome {
    let global = &args.global;
    match args.command {
        Command::Run(args) => run::run(global, args, &stop).await,
        Command::Serve(args) => serve::serve(global, args, &stop).await,
        Command::Router(args) => router::router(args, &stop).await,
        Command::Worker(args) => worker::worker(global, args, &stop).await,
        Command::Plan(args) => stop.or(plan::plan(global, args)).await,
        Command::Inspect(args) => stop.or(inspect::inspect(global, args)).await,
        Command::Eval(EvalCommand::Logits(args)) => stop.or(eval_logits::eval(global, args)).await,
        Command::Eval(EvalCommand::Ppl(args)) => stop.or(eval_ppl::eval(global, args)).await,
        Command::Bench(BenchCommand::Engine(args)) => stop.or(bench_engine::bench(global, args)).await,
        Command::Bench(BenchCommand::Load(args)) => stop.or(bench_load::bench(global, args)).await,
        Command::Bench(BenchCommand::Router(args)) => stop.or(bench_router::bench(global, args)).await,
        Command::Convert(args) => stop.or(convert::convert(global, args)).await,
        Command::Quantize(args) => stop.or(quantize::quantize(global, args)).await,
        Command::Status(args) => stop.or(status::status(args)).await,
        Command::Top(args) => stop.or(top::top(args)).await,
        Command::Logs(args) => stop.or(logs::logs(args)).await,
    }
}
