//! Where a pod finds a model that is on no server: the volume it mounts, and the path in it. Pure.

use serde_json::{Value, json};

use super::pod::{CACHE, MODEL, USER, volume_mount};

/// A volume that holds models.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Volume {
    /// A claim of the namespace, by its name.
    Claim(String),
    /// A folder of the node that the pod runs on.
    Folder(String),
}

/// A volume and a path in it; an empty path is all of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The volume.
    pub volume: Volume,
    /// The path.
    pub path: String,
}

impl Place {
    /// Path of the model in the pod.
    pub fn inside(&self) -> String {
        if self.path.is_empty() { MODEL.to_owned() } else { format!("{MODEL}/{}", self.path) }
    }

    /// Gives the pod's program the volume, to read alone.
    pub fn mount(&self, pod: &mut Value) {
        let mut volume = json!({ "name": "model" });
        match &self.volume {
            Volume::Claim(claim) => volume["persistentVolumeClaim"] = json!({ "claimName": claim, "readOnly": true }),
            // One that is not there is not made: nobody would find a model in it.
            Volume::Folder(folder) => volume["hostPath"] = json!({ "path": folder, "type": "Directory" }),
        }
        if let Some(mounts) = pod["containers"][0]["volumeMounts"].as_array_mut() {
            mounts.push(volume_mount("model", MODEL, true));
        }
        if let Some(volumes) = pod["volumes"].as_array_mut() {
            volumes.push(volume);
        }
    }

    /// What a pod says, for people, who know its paths by other names, and what they can do about it.
    pub fn explain(&self, said: &str) -> String {
        match &self.volume {
            Volume::Claim(claim) => said.replace(MODEL, &format!("pvc://{claim}")),
            Volume::Folder(folder) => {
                let said = said.replace(MODEL, folder);
                if is_denied(&said, folder) { format!("{said}; user {USER} must be able to read it on the node") } else { said }
            }
        }
    }
}

/// The same for a cache in a folder of nodes.
pub fn explain_cache(folder: &str, said: &str) -> String {
    let said = said.replace(CACHE, folder);
    if is_denied(&said, folder) { format!("{said}; user {USER} must be able to write to {folder} of the node") } else { said }
}

/// Whether the system says of something in a folder that a user may not have it.
fn is_denied(said: &str, folder: &str) -> bool {
    said.contains(folder) && said.contains("Permission denied")
}
