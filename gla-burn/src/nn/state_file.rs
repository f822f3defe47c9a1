//! [`GlaState`] on disk: a burnpack file with the tensors `layers.{i}.recurrent` and
//! `layers.{i}.conv.{q,k,v}` and the scalars `layers` and `seen`.

use std::collections::BTreeMap;
use std::path::Path;

use burn::store::bridge;
use burn::store::burn_pack::{Bytes, Reader, Scalar, Tensor as PackTensor, Writer};
use burn::tensor::{DType, Device, Tensor};

use super::{GlaState, GlaStateError, LayerState};

const FORMAT: (&str, &str) = ("format", "gla-state-1");
const CONV: [&str; 3] = ["q", "k", "v"];

impl GlaState {
    /// Writes the state to `path`.
    ///
    /// The file is built beside `path`, flushed to disk and renamed: `path` holds either the whole
    /// new state or what it held before.
    ///
    /// # Errors
    ///
    /// [`GlaStateError::Presence`] if a layer has no recurrent state, [`GlaStateError::Write`] if
    /// the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), GlaStateError> {
        let mut tensors = Vec::new();
        for (i, layer) in self.layers.iter().enumerate() {
            let name = format!("layers.{i}.recurrent");
            let Some(recurrent) = &layer.recurrent else {
                return Err(GlaStateError::Presence { tensor: name, found: false });
            };
            tensors.push(bridge::from_tensor(recurrent, name, None));
            for (kind, conv) in CONV.iter().zip(layer.conv.iter().flatten()) {
                let name = format!("layers.{i}.conv.{kind}");
                tensors.push(bridge::from_tensor(conv, name, None));
            }
        }

        let path = path.as_ref();
        Writer::new(tensors)
            .with_metadata(FORMAT.0, FORMAT.1)
            .with_scalar("layers", Scalar::from(self.layers.len()))
            .with_scalar("seen", Scalar::from(self.seen))
            .auto_extension(false)
            .write_to_file(path)
            .map_err(|error| GlaStateError::Write {
                path: path.to_path_buf(),
                reason: error.to_string(),
            })
    }

    /// Reads a state that [`save`](Self::save) wrote onto `device`.
    ///
    /// Whether it fits a model is for
    /// [`GlaTransformer::check_state`](super::GlaTransformer::check_state).
    ///
    /// # Errors
    ///
    /// [`GlaStateError::Read`] if the file is missing, truncated or no burnpack file,
    /// [`GlaStateError::Content`] if it is not a state.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self, GlaStateError> {
        let path = path.as_ref();
        let failed = |reason: String| GlaStateError::Read { path: path.to_path_buf(), reason };
        // read at once: a reader of the file would leave CPU tensors backed by it, whatever becomes
        // of it
        let bytes = std::fs::read(path).map_err(|error| failed(error.to_string()))?;
        let reader = Reader::from_bytes(Bytes::from_bytes_vec(bytes))
            .map_err(|error| failed(error.to_string()))?;
        read(reader, device)
            .map_err(|reason| GlaStateError::Content { path: path.to_path_buf(), reason })
    }
}

fn read(reader: Reader, device: &Device) -> Result<GlaState, String> {
    let format = reader.metadata().get(FORMAT.0).map(String::as_str);
    if format != Some(FORMAT.1) {
        let found = format.unwrap_or("none");
        return Err(format!("the format is {found}, expected {}", FORMAT.1));
    }
    let num_layers = scalar(&reader, "layers")?;
    let seen = scalar(&reader, "seen")?;
    let tensors = reader.into_tensors().map_err(|e| e.to_string())?;
    let mut tensors = Tensors {
        by_name: tensors.into_iter().map(|t| (t.name.clone(), t)).collect(),
        device: device.clone().without_autodiff(),
    };

    let mut layers = Vec::new();
    for i in 0..num_layers {
        let name = format!("layers.{i}.recurrent");
        let recurrent = tensors.take(&name, Some(DType::F32))?;
        let recurrent = recurrent.ok_or_else(|| format!("tensor {name} is missing"))?;
        let [q, k, v] = CONV.map(|kind| tensors.take(&format!("layers.{i}.conv.{kind}"), None));
        let conv = match (q?, k?, v?) {
            (None, None, None) => None,
            (Some(q), Some(k), Some(v)) => Some([q, k, v]),
            _ => return Err(format!("some of layers.{i}.conv.{{q,k,v}} are missing")),
        };
        layers.push(LayerState { recurrent: Some(recurrent), conv });
    }
    match tensors.by_name.keys().next() {
        Some(name) => Err(format!("tensor {name} is not of a state")),
        None => Ok(GlaState { layers, seen }),
    }
}

fn scalar(reader: &Reader, name: &str) -> Result<usize, String> {
    let scalar = reader.scalars().get(name).copied();
    scalar
        .and_then(|scalar| scalar.try_into().ok())
        .ok_or_else(|| format!("scalar {name} is missing or not a count"))
}

struct Tensors {
    by_name: BTreeMap<String, PackTensor>,
    device: Device,
}

impl Tensors {
    /// Removes a float tensor of rank `D`, and of `dtype` if one is given.
    fn take<const D: usize>(
        &mut self,
        name: &str,
        dtype: Option<DType>,
    ) -> Result<Option<Tensor<D>>, String> {
        let Some(tensor) = self.by_name.remove(name) else {
            return Ok(None);
        };
        let data = bridge::into_data(tensor).map_err(|e| format!("tensor {name}: {e}"))?;
        let (rank, found) = (data.rank(), data.dtype());
        if rank != D {
            return Err(format!("tensor {name} has rank {rank}, expected {D}"));
        }
        if !found.is_float() || dtype.is_some_and(|dtype| dtype != found) {
            let expected = dtype.map_or("a float".to_string(), |dtype| format!("{dtype:?}"));
            return Err(format!("tensor {name} is {found:?}, expected {expected}"));
        }
        Ok(Some(Tensor::from_data(data, (&self.device, found))))
    }
}
