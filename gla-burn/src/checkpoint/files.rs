//! The tensor files of a checkpoint: one, or shards with an index.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::path::{Component, Path};

use burn::store::burn_pack::Tensor;
use burn::store::{ModuleStore, SafetensorsStore};
use serde::Deserialize;

use super::{CheckpointError, TensorProblem};

pub(super) const CONFIG: &str = "config.json";
pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// `model.safetensors.index.json`, as far as it is needed to read.
#[derive(Deserialize)]
struct Index {
    /// File of each tensor.
    weight_map: BTreeMap<String, String>,
}

/// All tensors by name. Reads the headers of the files; the tensors read themselves when asked.
pub(super) fn tensors(folder: &Path) -> Result<BTreeMap<String, Tensor>, CheckpointError> {
    if folder.join(SINGLE).is_file() {
        return read(&folder.join(SINGLE));
    }
    let path = folder.join(INDEX);
    if !path.is_file() {
        return Err(CheckpointError::Missing {
            path: folder.join(SINGLE),
            reason: match folder.join("pytorch_model.bin").is_file() {
                true => "convert pytorch_model.bin to safetensors first".into(),
                false => format!("the folder has no {INDEX} either"),
            },
        });
    }
    let index: Index =
        serde_json::from_str(&text(&path)?).map_err(|e| CheckpointError::read(&path, e))?;

    let mut all = BTreeMap::new();
    let mut problems = Vec::new();
    for file in index.weight_map.values().collect::<BTreeSet<_>>() {
        let mut components = Path::new(file).components();
        let (Some(Component::Normal(_)), None) = (components.next(), components.next()) else {
            let reason = format!("{file:?} is no name of a file");
            return Err(CheckpointError::read(&path, reason));
        };
        for (name, tensor) in read(&folder.join(file))? {
            if all.insert(name.clone(), tensor).is_some() {
                let other = format!("{name} of another shard");
                problems.push(TensorProblem::Twice { name, other });
            }
        }
    }
    match problems.is_empty() {
        true => Ok(all),
        false => Err(CheckpointError::Tensors { path: folder.to_path_buf(), problems }),
    }
}

fn read(path: &Path) -> Result<BTreeMap<String, Tensor>, CheckpointError> {
    if !path.is_file() {
        let reason = format!("{INDEX} names it");
        return Err(CheckpointError::Missing { path: path.to_path_buf(), reason });
    }
    let mut store = SafetensorsStore::from_file(path);
    store.get_all_tensors().cloned().map_err(|error| CheckpointError::read(path, error))
}

/// The content of a JSON file.
pub(super) fn text(path: &Path) -> Result<String, CheckpointError> {
    fs::read_to_string(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => CheckpointError::Missing {
            path: path.to_path_buf(),
            reason: "a checkpoint has one beside its tensors".into(),
        },
        _ => CheckpointError::read(path, error),
    })
}
