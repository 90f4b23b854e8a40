//! Built-in autoscaling in a reconcile: what routers report goes into a decision, and the decision into the spec that is built and into status.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use plan::manifest::{AutoscalingMode, AutoscalingSpec, Manifest};

use crate::{
    autoscale::{self, Decision, History, Observed, Report},
    resource::{AutoscalingStatus, ModelDeployment, ScaleRecord, Status},
};

/// Number of replicas follows the load, or somebody else's word.
pub const SCALING_ACTIVE: &str = "ScalingActive";
/// Changes that status lists.
const HISTORY: usize = 10;

/// What is remembered of every deployment's load.
#[derive(Debug, Default)]
pub struct Scaling(Mutex<HashMap<String, History>>);

impl Scaling {
    /// Decides how many replicas a deployment of mode `Builtin` is to have, and puts the number into its manifest; in other modes the number
    /// stays what it is.
    pub fn decide(&self, object: &ModelDeployment, manifest: &mut Manifest, ready: u32, reports: &[Report], now: i64) -> Option<Decision> {
        let mut histories = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(builtin) = manifest.spec().autoscaling.builtin().filter(|_| !manifest.spec().suspend) else {
            histories.remove(object.uid());
            return None;
        };
        let history = histories.entry(object.uid().to_owned()).or_default();
        let observed = Observed { desired: wanted(object), ready, reports };
        let decision = autoscale::decide(&builtin, &observed, history, now);
        manifest.deployment.spec.replicas = decision.desired;
        Some(decision)
    }

    /// Forgets a deployment that is gone.
    pub fn forget(&self, object: &ModelDeployment) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(object.uid());
    }
}

/// Replicas wanted so far: in mode `Builtin` what was decided last, and the spec's number only before that.
pub fn wanted(object: &ModelDeployment) -> u32 {
    let spec = object.spec["replicas"].as_u64().map_or(1, |n| u32::try_from(n).unwrap_or(u32::MAX));
    let decided = object.status.as_ref().and_then(|s| s.autoscaling.as_ref()).map(|a| a.desired_replicas);
    if object.spec["autoscaling"]["mode"] == "Builtin" { decided.unwrap_or(spec) } else { spec }
}

/// Whether a request wakes a deployment that has no replicas.
pub fn wakes(object: &ModelDeployment) -> bool {
    object.spec["autoscaling"]["mode"] == "Builtin" && object.spec["suspend"] != true
}

/// Puts a decision into status; the condition's state, reason and message. Words change with the number or the reason alone, so that a
/// load that only varies is no news.
pub fn note(
    status: &mut Status,
    object: &ModelDeployment,
    spec: &AutoscalingSpec,
    decision: Option<&Decision>,
    now: &str,
) -> (bool, &'static str, String) {
    let Some(decision) = decision else {
        status.autoscaling = None;
        return match spec.mode {
            AutoscalingMode::External => (true, "ExternallyManaged", "another controller decides through the scale subresource".to_owned()),
            AutoscalingMode::Builtin => (false, "Disabled", "the deployment is suspended".to_owned()),
            AutoscalingMode::Disabled => (false, "Disabled", "spec.replicas says how many replicas there are".to_owned()),
        };
    };
    let before = wanted(object);
    let said = status.autoscaling.get_or_insert_with(|| AutoscalingStatus { desired_replicas: before, ..AutoscalingStatus::default() });
    if said.desired_replicas != decision.desired {
        said.history.insert(
            0,
            ScaleRecord { time: now.to_owned(), from: said.desired_replicas, to: decision.desired, reason: decision.message.clone() },
        );
        said.history.truncate(HISTORY);
        said.last_scale_time = Some(now.to_owned());
        said.last_reason = Some(decision.message.clone());
        said.desired_replicas = decision.desired;
    }
    status.desired_replicas = decision.desired;
    let old = object.condition(SCALING_ACTIVE).filter(|c| c.reason == decision.reason.name() && before == decision.desired);
    let message = old.map_or_else(|| decision.message.clone(), |c| c.message.clone());
    (decision.reason.is_active(), decision.reason.name(), message)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::resource::Condition;

    const MODEL: &str = "apiVersion: skein.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {name: a}\nspec:\n  model: {uri: 'hf://a/b/c.gguf'}\n  replicas: 3\n";
    const BUILTIN: &str =
        "  autoscaling: {mode: Builtin, minReplicas: 0, maxReplicas: 4, targets: [{type: InflightPerReplica, value: 8}]}\n";

    fn manifest(autoscaling: &str) -> Manifest {
        Manifest::parse("m.yaml", &format!("{MODEL}{autoscaling}")).expect("a manifest")
    }

    fn object(manifest: &Manifest) -> ModelDeployment {
        let spec = serde_json::to_value(manifest.spec()).expect("plain data");
        serde_json::from_value(json!({ "metadata": { "name": "a", "namespace": "n", "uid": "u" }, "spec": spec })).expect("an object")
    }

    /// One reconcile: decides, and writes what came of it into the object.
    fn reconcile(scaling: &Scaling, object: &mut ModelDeployment, text: &str, reports: &[Report], now: i64) -> (u32, Status) {
        let mut manifest = manifest(text);
        let ready = wanted(object);
        let decision = scaling.decide(object, &mut manifest, ready, reports, now);
        let mut status = object.status.clone().unwrap_or_default();
        let (truth, reason, message) = note(&mut status, object, &manifest.spec().autoscaling, decision.as_ref(), &format!("t{now}"));
        status.conditions = vec![Condition {
            kind: SCALING_ACTIVE.to_owned(),
            status: if truth { "True" } else { "False" }.to_owned(),
            reason: reason.to_owned(),
            message,
            ..Condition::default()
        }];
        object.status = Some(status.clone());
        (manifest.spec().replicas, status)
    }

    fn running(running: u32) -> [Report; 1] {
        [Report { running, ..Report::default() }]
    }

    #[test]
    fn replicas_of_the_spec_are_only_the_first_size() {
        let (scaling, mut object) = (Scaling::default(), object(&manifest(BUILTIN)));
        let (replicas, status) = reconcile(&scaling, &mut object, BUILTIN, &running(24), 0);
        assert_eq!((replicas, status.desired_replicas, status.autoscaling.expect("said").history.len()), (3, 3, 0));
        let (replicas, status) = reconcile(&scaling, &mut object, BUILTIN, &running(80), 1);
        let said = status.autoscaling.expect("said");
        assert_eq!((replicas, said.desired_replicas, said.last_scale_time.as_deref()), (4, 4, Some("t1")));
        assert_eq!((said.history[0].from, said.history[0].to), (3, 4));
        // A restarted operator goes on from what stands in status, and so does one whose spec was changed by hand.
        object.spec["replicas"] = 1.into();
        assert_eq!(reconcile(&Scaling::default(), &mut object, BUILTIN, &running(30), 2).0, 4);
        // In another mode the spec's number counts again.
        let (replicas, status) = reconcile(&scaling, &mut object, "", &running(80), 3);
        assert_eq!((replicas, status.autoscaling, status.conditions[0].reason.as_str()), (3, None, "Disabled"));
        let external = "  autoscaling: {mode: External}\n";
        let (replicas, status) = reconcile(&scaling, &mut object, external, &running(80), 4);
        assert_eq!((replicas, status.conditions[0].reason.as_str()), (3, "ExternallyManaged"));
    }

    #[test]
    fn a_load_that_only_varies_is_no_news() {
        let (scaling, mut object) = (Scaling::default(), object(&manifest(BUILTIN)));
        let first = reconcile(&scaling, &mut object, BUILTIN, &running(24), 0).1;
        assert_eq!(reconcile(&scaling, &mut object, BUILTIN, &running(23), 5).1, first);
        let scaled = reconcile(&scaling, &mut object, BUILTIN, &running(30), 10).1;
        assert_ne!(scaled, first);
        // The words of the change stay until there is another.
        let after = reconcile(&scaling, &mut object, BUILTIN, &running(31), 15).1;
        assert_eq!(reconcile(&scaling, &mut object, BUILTIN, &running(32), 20).1, after);
    }

    #[test]
    fn what_status_says_is_reached() {
        let (scaling, mut object) = (Scaling::default(), object(&manifest(BUILTIN)));
        let mut reason = |reports: &[Report], now| {
            let status = reconcile(&scaling, &mut object, BUILTIN, reports, now).1;
            (status.conditions[0].reason.clone(), status.conditions[0].status.clone())
        };
        let is = |(reason, status): (String, String), expected: (&str, &str)| assert_eq!((reason.as_str(), status.as_str()), expected);
        is(reason(&[], 0), ("MetricsStale", "False"));
        is(reason(&running(24), 1), ("ValidMetrics", "True"));
        is(reason(&running(500), 2), ("AtMax", "True"));
        is(reason(&running(0), 3), ("ValidMetrics", "True"));
        is(reason(&running(0), 400), ("AtZero", "True"));
        is(reason(&[Report { held: 1, ..Report::default() }], 401), ("ValidMetrics", "True"));
    }

    #[test]
    fn status_lists_the_last_changes() {
        let (scaling, mut object) = (Scaling::default(), object(&manifest(BUILTIN)));
        for round in 0..20 {
            reconcile(&scaling, &mut object, BUILTIN, &[Report { held: 1, ..Report::default() }], round * 1000);
            reconcile(&scaling, &mut object, BUILTIN, &running(0), round * 1000 + 1);
            reconcile(&scaling, &mut object, BUILTIN, &running(0), round * 1000 + 500);
        }
        let said = object.status.as_ref().and_then(|s| s.autoscaling.clone()).expect("said");
        assert_eq!((said.history.len(), said.history[0].to, said.history[0].time.as_str()), (HISTORY, 0, "t19500"));
    }
}
