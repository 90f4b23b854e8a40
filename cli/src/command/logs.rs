//! `skein logs`: what workers or routers say, each line with the pod it is from.

use crate::{args::LogsArgs, exit::Outcome, kubectl::Kubectl};

/// Pods that are followed at once; a replica may have many workers.
const MOST: &str = "--max-log-requests=1024";

/// Runs the command.
pub(crate) async fn logs(args: LogsArgs) -> Outcome {
    Kubectl::new(&args.cluster).pass(&arguments(&args)).await
}

/// What `kubectl` is told.
fn arguments(args: &LogsArgs) -> Vec<String> {
    let mut line = vec!["logs".to_owned(), "--prefix".to_owned(), MOST.to_owned(), format!("--tail={}", args.tail)];
    line.push(format!("--selector={}", selector(args)));
    line.extend(args.follow.then(|| "--follow".to_owned()));
    line.extend(args.previous.then(|| "--previous".to_owned()));
    line
}

fn selector(args: &LogsArgs) -> String {
    let Some(name) = &args.name else { return "app.kubernetes.io/part-of=skein,app.kubernetes.io/component=router".to_owned() };
    let mut selector = format!("app.kubernetes.io/component=worker,skein.dev/deployment={name}");
    let parts = [("skein.dev/replica", args.replica), ("skein.dev/stage", args.stage), ("apps.kubernetes.io/pod-index", args.rank)];
    for (label, number) in parts {
        if let Some(number) = number {
            selector.push_str(&format!(",{label}={number}"));
        }
    }
    if args.draft {
        selector.push_str(",skein.dev/stage=draft");
    }
    selector
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_chosen_by_its_labels() {
        let mut args = LogsArgs {
            name: Some("m".into()),
            replica: Some(1),
            stage: None,
            rank: Some(0),
            draft: false,
            follow: true,
            previous: false,
            tail: 5,
            cluster: Default::default(),
        };
        let chosen =
            "--selector=app.kubernetes.io/component=worker,skein.dev/deployment=m,skein.dev/replica=1,apps.kubernetes.io/pod-index=0";
        assert_eq!(arguments(&args), ["logs", "--prefix", MOST, "--tail=5", chosen, "--follow"]);
        (args.rank, args.draft) = (None, true);
        assert_eq!(selector(&args), "app.kubernetes.io/component=worker,skein.dev/deployment=m,skein.dev/replica=1,skein.dev/stage=draft");
        args.name = None;
        assert_eq!(selector(&args), "app.kubernetes.io/part-of=skein,app.kubernetes.io/component=router");
    }
}
