//! `skein plan --deployment`: the plan of a deployment on a cluster, as its status has it.

use serde_json::{Value, json};

use crate::{
    args::ClusterArgs,
    exit::{Outcome, bad_input},
    kubectl::Kubectl,
    output,
};

/// Runs the command.
pub(crate) async fn plan(name: &str, cluster: &ClusterArgs, as_json: bool) -> Outcome {
    let deployment = Kubectl::new(cluster).get(&["modeldeployments.skein.dev", name]).await?;
    let Some(plan) = deployment.pointer("/status/plan") else {
        let ready = conditions(&deployment).find(|c| c["type"] == "Ready").and_then(|c| c["message"].as_str());
        return Err(bad_input!("{name} is not planned yet: {}", ready.unwrap_or("no operator has looked at it")));
    };
    let shown = if as_json { format!("{}\n", as_object(name, &deployment, plan)) } else { table(name, &deployment, plan) };
    output::write_all(&shown)?;
    match plan["fits"].as_bool() {
        Some(true) => Ok(()),
        _ => Err(bad_input!("{name}: {}", plan["message"].as_str().unwrap_or("it does not fit"))),
    }
}

fn conditions(deployment: &Value) -> impl Iterator<Item = &Value> {
    deployment.pointer("/status/conditions").and_then(Value::as_array).into_iter().flatten()
}

/// Whether the spec has changed since the plan was made.
fn is_stale(deployment: &Value) -> bool {
    deployment.pointer("/status/observedGeneration") != deployment.pointer("/metadata/generation")
}

/// One object, with the names that `skein plan --json` has for a file where both know a thing.
fn as_object(name: &str, deployment: &Value, plan: &Value) -> Value {
    let status = &deployment["status"];
    json!({
        "deployment": name,
        "model": deployment.pointer("/spec/model/uri"),
        "replicas": status["desiredReplicas"],
        "fits": plan["fits"],
        "message": plan["message"],
        "pipeline": plan["stages"].as_array().map(Vec::len),
        "stale": is_stale(deployment),
        "stages": plan["stages"],
        "draft": plan["draft"],
    })
}

fn table(name: &str, deployment: &Value, plan: &Value) -> String {
    let stages = || plan["stages"].as_array().into_iter().flatten();
    let number = |stage: &Value, field: &str| stage[field].as_u64().unwrap_or(0);
    let ranks = stages().next().map_or(0, |stage| number(stage, "ranks"));
    let uri = deployment.pointer("/spec/model/uri").and_then(Value::as_str).unwrap_or_default();
    let replicas = deployment.pointer("/status/desiredReplicas").and_then(Value::as_u64).unwrap_or(0);
    let copies = if replicas == 1 { "1 replica".to_owned() } else { format!("{replicas} replicas") };
    let mut shown = format!("{name} ({uri}): {copies} of {} stages × {ranks} ranks\n", stages().count());
    if is_stale(deployment) {
        shown.push_str("  the spec is newer than this plan\n");
    }
    shown.push_str("  stage  layers     ranks  weights of the largest  its KV cache\n");
    for stage in stages() {
        let layers = format!("{}–{}", number(stage, "firstLayer"), number(stage, "lastLayer"));
        let (weights, kv) = (output::bytes(number(stage, "weightBytes")), output::bytes(number(stage, "kvBytes")));
        shown.push_str(&format!("  {:<5}  {layers:<9}  {:<5}  {weights:<22}  {kv}\n", number(stage, "index"), number(stage, "ranks")));
    }
    if let Some(draft) = plan.get("draft") {
        shown.push_str(&format!(
            "  draft model: a worker beside each replica, weights {}, KV cache {}, context {} tokens; a token takes {:.2} of the model's time\n",
            output::bytes(number(draft, "weightBytes")),
            output::bytes(number(draft, "kvBytes")),
            number(draft, "contextTokens"),
            number(draft, "cost") as f64 / 1000.0
        ));
    }
    shown.push_str(&format!("  {}\n", plan["message"].as_str().unwrap_or_default()));
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_becomes_a_plan() {
        let deployment = json!({
            "metadata": { "generation": 2 },
            "spec": { "model": { "uri": "hf://a/b" } },
            "status": {
                "observedGeneration": 2,
                "desiredReplicas": 3,
                "plan": { "fits": true, "message": "it fits", "stages": [
                    { "index": 0, "firstLayer": 0, "lastLayer": 8, "ranks": 2, "weightBytes": 1048576, "kvBytes": 512 },
                    { "index": 1, "firstLayer": 9, "lastLayer": 17, "ranks": 2, "weightBytes": 2097152, "kvBytes": 512 },
                ] },
            },
        });
        let plan = &deployment["status"]["plan"];
        let shown = "\
m (hf://a/b): 3 replicas of 2 stages × 2 ranks
  stage  layers     ranks  weights of the largest  its KV cache
  0      0–8        2      1.0 MiB                 512 B
  1      9–17       2      2.0 MiB                 512 B
  it fits
";
        assert_eq!(table("m", &deployment, plan), shown);
        let object = as_object("m", &deployment, plan);
        assert_eq!((&object["pipeline"], &object["stale"], &object["replicas"]), (&json!(2), &json!(false), &json!(3)));
        let mut drafted = plan.clone();
        drafted["draft"] = json!({ "weightBytes": 1048576, "kvBytes": 512, "contextTokens": 64, "cost": 90 });
        let shown = table("m", &deployment, &drafted);
        let draft = "  draft model: a worker beside each replica, weights 1.0 MiB, KV cache 512 B, context 64 tokens; a token takes 0.09 of the model's time\n";
        assert!(shown.contains(draft), "{shown}");
        let mut newer = deployment.clone();
        newer["metadata"]["generation"] = json!(3);
        assert!(table("m", &newer, plan).contains("newer"));
    }
}
