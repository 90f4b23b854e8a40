//! The local runner: clean stop, and nothing left behind when it is killed.

use std::{process::Command, time::Duration};

use e2e::{
    client, files,
    process::Pid,
    program,
    server::{Server, manifest, parallelism},
    wait,
};
use serde_json::json;

fn gone(workers: &[Pid]) -> Option<()> {
    (!workers.iter().any(|w| w.lives())).then_some(())
}

#[test]
fn a_killed_runner_leaves_nothing_behind() {
    let mut server = Server::start(&manifest("tiny", &files::fixture("llama"), &parallelism(2, 2)));
    let workers = server.workers();
    assert_eq!(workers.len(), 4);
    assert!(workers.iter().all(|w| w.lives()));
    server.kill();
    wait::until(Duration::from_secs(30), "the end of the workers", || gone(&workers));
}

#[test]
fn an_interrupt_stops_everything() {
    let server = Server::start(&manifest("tiny", &files::fixture("llama"), &parallelism(2, 1)));
    let workers = server.workers();
    assert_eq!(workers.len(), 2);
    drop(server);
    assert!(gone(&workers).is_some());
}

/// What is interrupted in the middle of a computation leaves no worker behind either.
#[test]
fn an_interrupted_measurement_leaves_nothing_behind() {
    let model = files::fixture("llama");
    let args = ["bench", "engine", "--tp", "2", "--tests", "tg128", "--repetitions", "100000"];
    let mut bench = program::start(Command::new(program::skein()).args(args).arg(&model));
    let pid = Pid(bench.id());
    let workers = wait::until(Duration::from_secs(60), "two workers", || Some(pid.children()).filter(|all| all.len() == 2));
    // One that is stopped cannot see that its runner is gone.
    workers[1].signal("STOP");
    pid.signal("INT");
    assert_eq!(bench.wait().expect("it ends").code(), Some(130));
    wait::until(Duration::from_secs(10), "the end of the workers", || gone(&workers));
}

/// A worker that dies is started again, and the replica answers once more.
#[tokio::test]
async fn a_dead_worker_is_replaced() {
    let server = Server::start(&manifest("tiny", &files::fixture("llama"), &parallelism(2, 2)));
    let body = json!({"model": "tiny", "prompt": [0, 56, 262], "max_tokens": 8, "temperature": 0, "ignore_eos": true});
    let before = client::complete(&server.http, &body).await.expect("an answer");
    let workers = server.workers();
    workers[2].signal("KILL");
    program::until("a new worker", || Some(server.workers()).filter(|now| now.len() == 4 && !now.contains(&workers[2])));
    assert_eq!(client::complete(&server.http, &body).await.expect("an answer after the loss"), before);
}
