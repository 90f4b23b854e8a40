//! The fleet as it is pushed to routers.

use plan::{
    adapter::AdapterSource,
    fleet::{
        ChatTemplate, FleetAdapter, FleetDeployment, FleetDraft, FleetReplica, FleetRouter, FleetState, HoldSettings, ReplicaLimits,
        RoutingPolicy, ServingSettings, Stopped,
    },
    shard::{KvDType, KvGeometry, KvGroup},
};

use super::ConvertError;
use crate::fleet as wire;

/// A state as it crosses the wire.
pub fn encode_fleet(state: &FleetState) -> wire::FleetState {
    wire::FleetState {
        term: state.term,
        number: state.number,
        deployments: state.deployments.iter().map(encode_deployment).collect(),
        routers: state
            .routers
            .iter()
            .map(|r| wire::Router { name: r.name.clone(), address: r.address.clone(), pool: r.pool.clone() })
            .collect(),
    }
}

/// A state from the wire.
///
/// # Errors
/// If a field is missing or holds a value of a later version.
pub fn decode_fleet(state: wire::FleetState) -> Result<FleetState, ConvertError> {
    let deployments = state.deployments.into_iter().map(|d| {
        let name = d.name.clone();
        decode_deployment(d).map_err(|e| e.within(format_args!("deployments[{name}]")))
    });
    Ok(FleetState {
        term: state.term,
        number: state.number,
        deployments: deployments.collect::<Result<_, _>>()?,
        routers: state.routers.into_iter().map(|r| FleetRouter { name: r.name, address: r.address, pool: r.pool }).collect(),
    })
}

fn encode_limits(limits: &ReplicaLimits) -> wire::Limits {
    let group =
        |g: &KvGroup| wire::KvGroup { window: g.window, layers: g.layers.iter().map(|&l| l as u32).collect(), blocks: g.blocks as u32 };
    wire::Limits {
        kv_dtype: limits.kv.dtype.name().to_owned(),
        kv_groups: limits.kv.groups.iter().map(group).collect(),
        max_context: limits.max_context as u32,
        max_batch_sequences: limits.max_batch_sequences as u32,
        max_batch_tokens: limits.max_batch_tokens as u32,
        prefix_caching: limits.prefix_caching,
    }
}

fn decode_limits(limits: Option<wire::Limits>) -> Result<ReplicaLimits, ConvertError> {
    let limits = limits.ok_or_else(|| ConvertError::missing("limits"))?;
    let dtype =
        KvDType::named(&limits.kv_dtype).ok_or_else(|| ConvertError::value("limits.kv_dtype", &limits.kv_dtype, "f32, f16 or q8"))?;
    let group = |g: wire::KvGroup| KvGroup {
        window: g.window,
        layers: g.layers.into_iter().map(|l| l as usize).collect(),
        blocks: g.blocks as usize,
    };
    Ok(ReplicaLimits {
        kv: KvGeometry { dtype, groups: limits.kv_groups.into_iter().map(group).collect() },
        max_context: limits.max_context as usize,
        max_batch_sequences: limits.max_batch_sequences as usize,
        max_batch_tokens: limits.max_batch_tokens as usize,
        prefix_caching: limits.prefix_caching,
    })
}

fn encode_adapter(FleetAdapter { name, source: AdapterSource { uri, digest, numerics } }: &FleetAdapter) -> wire::Adapter {
    wire::Adapter { name: name.clone(), uri: uri.clone(), digest: digest.clone(), numerics: numerics.clone() }
}

fn decode_adapter(wire::Adapter { name, uri, digest, numerics }: wire::Adapter) -> Result<FleetAdapter, ConvertError> {
    for (field, value) in [("name", &name), ("uri", &uri), ("numerics", &numerics)] {
        if value.is_empty() {
            return Err(ConvertError::missing(format!("adapters[{name}].{field}")));
        }
    }
    Ok(FleetAdapter { name, source: AdapterSource { uri, digest, numerics } })
}

fn encode_deployment(d: &FleetDeployment) -> wire::Deployment {
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
        limits: Some(encode_limits(&r.limits)),
        draft: r.draft.as_ref().map(encode_draft),
    };
    wire::Deployment {
        name: d.name.clone(),
        model: d.model.clone(),
        aliases: d.aliases.clone(),
        limits: Some(encode_limits(&d.limits)),
        serving: Some(wire::Serving {
            chat_template: d.serving.chat_template.as_ref().map(template),
            system_prompt: d.serving.system_prompt.clone(),
            policy: policy.to_owned(),
            queue_requests: d.serving.queue_requests as u32,
            queue_seconds: d.serving.queue_seconds,
            prompt_lookup: d.serving.prompt_lookup as u32,
            hold: d.serving.hold.map(|h| wire::Hold { requests: h.requests as u32, seconds: h.seconds }),
            stopped: match d.serving.stopped {
                None => String::new(),
                Some(Stopped::Suspended) => "suspended".to_owned(),
                Some(Stopped::ScaledToZero) => "scaled-to-zero".to_owned(),
            },
        }),
        drivers: d.drivers.clone(),
        replicas: d.replicas.iter().map(replica).collect(),
        adapters: d.adapters.iter().map(encode_adapter).collect(),
    }
}

fn encode_draft(d: &FleetDraft) -> wire::Draft {
    wire::Draft { worker: d.worker.clone(), limits: Some(encode_limits(&d.limits)), cost: d.cost, compared: d.compared }
}

fn decode_deployment(d: wire::Deployment) -> Result<FleetDeployment, ConvertError> {
    let limits = decode_limits(d.limits)?;
    let serving = d.serving.ok_or_else(|| ConvertError::missing("serving"))?;
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
    let stopped = match serving.stopped.as_str() {
        "" => None,
        "suspended" => Some(Stopped::Suspended),
        "scaled-to-zero" => Some(Stopped::ScaledToZero),
        other => return Err(ConvertError::value("serving.stopped", other, "suspended, scaled-to-zero or nothing")),
    };
    let replica = |r: wire::Replica| {
        let name = r.name.clone();
        let limits = decode_limits(r.limits).map_err(|e| e.within(format_args!("replicas[{name}]")))?;
        let draft =
            |d: wire::Draft| Ok(FleetDraft { worker: d.worker, limits: decode_limits(d.limits)?, cost: d.cost, compared: d.compared });
        let draft = r.draft.map(draft).transpose().map_err(|e: ConvertError| e.within(format_args!("replicas[{name}].draft")))?;
        Ok(FleetReplica {
            name: r.name,
            revision: r.revision,
            numerics: r.numerics,
            weight: r.weight,
            draining: r.draining,
            limits,
            workers: r.stages.into_iter().map(|s| s.ranks).collect(),
            draft,
        })
    };
    Ok(FleetDeployment {
        name: d.name,
        model: d.model,
        aliases: d.aliases,
        limits,
        serving: ServingSettings {
            chat_template,
            system_prompt: serving.system_prompt,
            policy,
            queue_requests: serving.queue_requests as usize,
            queue_seconds: serving.queue_seconds,
            prompt_lookup: serving.prompt_lookup as usize,
            hold: serving.hold.map(|h| HoldSettings { requests: h.requests as usize, seconds: h.seconds }),
            stopped,
        },
        drivers: d.drivers,
        replicas: d.replicas.into_iter().map(replica).collect::<Result<_, ConvertError>>()?,
        adapters: d.adapters.into_iter().map(decode_adapter).collect::<Result<_, ConvertError>>()?,
    })
}
