//! The fleet as it is pushed to routers.

use plan::{
    fleet::{ChatTemplate, FleetDeployment, FleetReplica, FleetState, ReplicaLimits, RoutingPolicy, ServingSettings},
    shard::{KvDType, KvGeometry, KvGroup},
};

use super::ConvertError;
use crate::fleet as wire;

/// A state as it crosses the wire. `routers` is the pool, (name, address) each.
pub fn encode_fleet(state: &FleetState, routers: &[(String, String)]) -> wire::FleetState {
    wire::FleetState {
        term: state.term,
        number: state.number,
        deployments: state.deployments.iter().map(encode_deployment).collect(),
        routers: routers.iter().map(|(name, address)| wire::Router { name: name.clone(), address: address.clone() }).collect(),
    }
}

/// A state from the wire, without the pool's routers.
///
/// # Errors
/// If a field is missing or holds a value of a later version.
pub fn decode_fleet(state: wire::FleetState) -> Result<FleetState, ConvertError> {
    let deployments = state.deployments.into_iter().map(|d| {
        let name = d.name.clone();
        decode_deployment(d).map_err(|e| e.within(format_args!("deployments[{name}]")))
    });
    Ok(FleetState { term: state.term, number: state.number, deployments: deployments.collect::<Result<_, _>>()? })
}

fn encode_deployment(d: &FleetDeployment) -> wire::Deployment {
    let kv = &d.limits.kv;
    let group =
        |g: &KvGroup| wire::KvGroup { window: g.window, layers: g.layers.iter().map(|&l| l as u32).collect(), blocks: g.blocks as u32 };
    let template = |t: &ChatTemplate| match t {
        ChatTemplate::Gemma => wire::serving::ChatTemplate::Builtin("gemma".to_owned()),
        ChatTemplate::ChatML => wire::serving::ChatTemplate::Builtin("chatml".to_owned()),
        ChatTemplate::Llama3 => wire::serving::ChatTemplate::Builtin("llama3".to_owned()),
        ChatTemplate::Inline(source) => wire::serving::ChatTemplate::Inline(source.clone()),
    };
    let policy = match d.serving.policy {
        RoutingPolicy::PrefixAware => "prefix-aware",
        RoutingPolicy::LeastLoad => "least-load",
        RoutingPolicy::RoundRobin => "round-robin",
        RoutingPolicy::Random => "random",
    };
    let replica = |r: &FleetReplica| wire::Replica {
        name: r.name.clone(),
        revision: r.revision.clone(),
        numerics: r.numerics.clone(),
        weight: r.weight,
        draining: r.draining,
        stages: r.workers.iter().map(|ranks| wire::StageWorkers { ranks: ranks.clone() }).collect(),
    };
    wire::Deployment {
        name: d.name.clone(),
        model: d.model.clone(),
        aliases: d.aliases.clone(),
        limits: Some(wire::Limits {
            kv_dtype: match kv.dtype {
                KvDType::F32 => "f32".to_owned(),
                KvDType::F16 => "f16".to_owned(),
            },
            kv_groups: kv.groups.iter().map(group).collect(),
            max_context: d.limits.max_context as u32,
            max_batch_sequences: d.limits.max_batch_sequences as u32,
            max_batch_tokens: d.limits.max_batch_tokens as u32,
            prefix_caching: d.limits.prefix_caching,
        }),
        serving: Some(wire::Serving {
            chat_template: d.serving.chat_template.as_ref().map(template),
            system_prompt: d.serving.system_prompt.clone(),
            policy: policy.to_owned(),
            queue_requests: d.serving.queue_requests as u32,
            queue_seconds: d.serving.queue_seconds,
        }),
        replicas: d.replicas.iter().map(replica).collect(),
    }
}

fn decode_deployment(d: wire::Deployment) -> Result<FleetDeployment, ConvertError> {
    let limits = d.limits.ok_or_else(|| ConvertError::missing("limits"))?;
    let serving = d.serving.ok_or_else(|| ConvertError::missing("serving"))?;
    let dtype = match limits.kv_dtype.as_str() {
        "f32" => KvDType::F32,
        "f16" => KvDType::F16,
        other => return Err(ConvertError::value("limits.kv_dtype", other, "f32 or f16")),
    };
    let chat_template = match serving.chat_template {
        None => None,
        Some(wire::serving::ChatTemplate::Inline(source)) => Some(ChatTemplate::Inline(source)),
        Some(wire::serving::ChatTemplate::Builtin(name)) => Some(match name.as_str() {
            "gemma" => ChatTemplate::Gemma,
            "chatml" => ChatTemplate::ChatML,
            "llama3" => ChatTemplate::Llama3,
            other => return Err(ConvertError::value("serving.chat_template", other, "gemma, chatml or llama3")),
        }),
    };
    let policy = match serving.policy.as_str() {
        "prefix-aware" => RoutingPolicy::PrefixAware,
        "least-load" => RoutingPolicy::LeastLoad,
        "round-robin" => RoutingPolicy::RoundRobin,
        "random" => RoutingPolicy::Random,
        other => return Err(ConvertError::value("serving.policy", other, "prefix-aware, least-load, round-robin or random")),
    };
    let group = |g: wire::KvGroup| KvGroup {
        window: g.window,
        layers: g.layers.into_iter().map(|l| l as usize).collect(),
        blocks: g.blocks as usize,
    };
    let replica = |r: wire::Replica| FleetReplica {
        name: r.name,
        revision: r.revision,
        numerics: r.numerics,
        weight: r.weight,
        draining: r.draining,
        workers: r.stages.into_iter().map(|s| s.ranks).collect(),
    };
    Ok(FleetDeployment {
        name: d.name,
        model: d.model,
        aliases: d.aliases,
        limits: ReplicaLimits {
            kv: KvGeometry { dtype, groups: limits.kv_groups.into_iter().map(group).collect() },
            max_context: limits.max_context as usize,
            max_batch_sequences: limits.max_batch_sequences as usize,
            max_batch_tokens: limits.max_batch_tokens as usize,
            prefix_caching: limits.prefix_caching,
        },
        serving: ServingSettings {
            chat_template,
            system_prompt: serving.system_prompt,
            policy,
            queue_requests: serving.queue_requests as usize,
            queue_seconds: serving.queue_seconds,
        },
        replicas: d.replicas.into_iter().map(replica).collect(),
    })
}
