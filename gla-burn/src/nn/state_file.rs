//! [`GlaState`] on disk: a burnpack file with the tensors of each layer, `layers.{i}.` before the
//! names of [`LayerState::merge`], and the scalar `layers`.

use std::collections::BTreeMap;
use std::path::Path;

use burn::store::bridge;
use burn::store::burn_pack::{Bytes, Reader, Scalar, Tensor as PackTensor, Writer};
use burn::tensor::{Device, Tensor, TensorData};

use super::{GlaState, GlaStateError, LayerState, StateAxis, StateVisitor};

const FORMAT: (&str, &str) = ("format", "gla-state-2");

impl GlaState {
    /// Writes the state to `path`.
    ///
    /// The file is built beside `path`, flushed to disk and renamed: `path` holds either the whole
    /// new state or what it held before.
    ///
    /// # Errors
    ///
    /// [`GlaStateError::Write`] if the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), GlaStateError> {
        let mut tensors = Tensors { prefix: String::new(), list: Vec::new() };
        for (i, layer) in self.layers.iter().enumerate() {
            tensors.prefix = format!("layers.{i}.");
            LayerState::merge(vec![layer.clone()], &mut tensors);
        }

        let path = path.as_ref();
        Writer::new(tensors.list)
            .with_metadata(FORMAT.0, FORMAT.1)
            .with_scalar("layers", Scalar::from(self.layers.len()))
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
    let layers = reader.scalars().get("layers").copied();
    let layers: usize = layers
        .and_then(|layers| layers.try_into().ok())
        .ok_or("scalar layers is missing or not a count")?;
    let tensors = reader.into_tensors().map_err(|e| e.to_string())?;
    let mut named = Named {
        prefix: String::new(),
        by_name: tensors.into_iter().map(|t| (t.name.clone(), t)).collect(),
        device: device.clone().without_autodiff(),
        error: None,
    };

    let mut states = Vec::new();
    for i in 0..layers {
        named.prefix = format!("layers.{i}.");
        states.push(LayerState::merge(Vec::new(), &mut named));
        if let Some(error) = named.error.take() {
            return Err(error);
        }
    }
    match named.by_name.keys().next() {
        Some(name) => Err(format!("tensor {name} is not of a state")),
        None => Ok(GlaState { layers: states }),
    }
}

/// Lists what is to be written.
struct Tensors {
    prefix: String,
    list: Vec<PackTensor>,
}

impl StateVisitor for Tensors {
    fn tensor<const D: usize>(
        &mut self,
        name: &str,
        _axis: StateAxis,
        parts: Vec<Option<Tensor<D>>>,
    ) -> Option<Tensor<D>> {
        let name = format!("{}{name}", self.prefix);
        self.list
            .extend(parts.iter().flatten().map(|t| bridge::from_tensor(t, name.clone(), None)));
        None
    }

    fn counts(&mut self, name: &str, parts: Vec<Vec<usize>>) -> Vec<usize> {
        let counts: Vec<i64> = parts.concat().iter().map(|&count| count as i64).collect();
        let (name, shape) = (format!("{}{name}", self.prefix), [counts.len()]);
        self.list.push(bridge::from_data(TensorData::new(counts, shape), name, None));
        Vec::new()
    }
}

/// Hands out what was read; the first thing that is wrong is kept.
struct Named {
    prefix: String,
    by_name: BTreeMap<String, PackTensor>,
    device: Device,
    error: Option<String>,
}

impl Named {
    fn take(&mut self, name: &str, rank: usize) -> Result<Option<TensorData>, String> {
        let Some(tensor) = self.by_name.remove(name) else {
            return Ok(None);
        };
        let data = bridge::into_data(tensor).map_err(|e| format!("tensor {name}: {e}"))?;
        if data.rank() != rank {
            return Err(format!("tensor {name} has rank {}, expected {rank}", data.rank()));
        }
        Ok(Some(data))
    }

    fn tensor_data(&mut self, name: &str, rank: usize) -> Result<Option<TensorData>, String> {
        let data = self.take(name, rank)?;
        match data.as_ref().map(TensorData::dtype).filter(|dtype| !dtype.is_float()) {
            Some(dtype) => Err(format!("tensor {name} is {dtype:?}, expected a float")),
            None => Ok(data),
        }
    }

    fn count_data(&mut self, name: &str) -> Result<Vec<usize>, String> {
        let data = self.take(name, 1)?.ok_or_else(|| format!("tensor {name} is missing"))?;
        let counts = data.try_into_vec::<i64>().map_err(|e| format!("tensor {name}: {e:?}"))?;
        let count = |&count: &i64| {
            usize::try_from(count).map_err(|_| format!("tensor {name} holds the count {count}"))
        };
        counts.iter().map(count).collect()
    }

    /// What a broken file is read as does not matter: it is not handed out.
    fn keep<T: Default>(&mut self, result: Result<T, String>) -> T {
        result.unwrap_or_else(|error| {
            self.error.get_or_insert(error);
            T::default()
        })
    }
}

impl StateVisitor for Named {
    fn tensor<const D: usize>(
        &mut self,
        name: &str,
        _axis: StateAxis,
        _parts: Vec<Option<Tensor<D>>>,
    ) -> Option<Tensor<D>> {
        let name = format!("{}{name}", self.prefix);
        let data = self.tensor_data(&name, D);
        let data = self.keep(data)?;
        let dtype = data.dtype();
        Some(Tensor::from_data(data, (&self.device, dtype)))
    }

    fn counts(&mut self, name: &str, _parts: Vec<Vec<usize>>) -> Vec<usize> {
        let counts = self.count_data(&format!("{}{name}", self.prefix));
        self.keep(counts)
    }
}
