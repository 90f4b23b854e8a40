//! What a pod said of a model, kept in a `ConfigMap` of the deployment.

use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client};
use plan::model::ModelHeader;
use serde_json::json;
use source::Inspection;
use tracing::{info, warn};

use super::pod;
use crate::{
    apply::{ApplyError, Conflicts, Writer},
    build::owned,
    cache::Owner,
    models::chain,
    resource::ModelDeployment,
};

/// Longest line that is kept, since a `ConfigMap` holds 1 MiB: about 6,000 tensors.
const LONGEST: usize = 768 << 10;
/// Key of the line, and of the model's source, for people.
const KEYS: (&str, &str) = ("header", "uri");

/// The header that `name` keeps. It is understood anew: whoever may write `ConfigMap`s of the namespace may have written this one.
pub(super) async fn read(client: &Client, object: &ModelDeployment, name: &str) -> Result<Option<ModelHeader>, kube::Error> {
    let map = Api::<ConfigMap>::namespaced(client.clone(), object.namespace()).get_opt(name).await?;
    let Some(line) = map.and_then(|map| map.data?.remove(KEYS.0)) else { return Ok(None) };
    match Inspection::understand(&line) {
        Ok(header) => Ok(Some(header)),
        Err(error) => {
            warn!(namespace = object.namespace(), name, error = chain(&error), "a kept header is not understood and is read again");
            Ok(None)
        }
    }
}

/// Keeps what a pod said of the model at `uri`, unless it is too long.
pub(super) async fn write(writer: Writer<'_>, object: &ModelDeployment, (name, uri): (&str, &str), line: &str) -> Result<(), ApplyError> {
    if line.len() > LONGEST {
        info!(namespace = object.namespace(), name, bytes = line.len(), "a header is too long to be kept for other processes");
        return Ok(());
    }
    let data = json!({ "data": { KEYS.0: line, KEYS.1: uri } });
    let map = owned(("v1", "ConfigMap"), name.to_owned(), pod::labels(object), &[object.owner(true)], data);
    writer.write::<ConfigMap>(&Owner::new(object.namespace(), object.name()), &map, Conflicts::Ours).await?;
    Ok(())
}
