//! [`GlaState`] on disk: a safetensors file with the tensors and counts of each layer, `layers.{i}.`
//! before the names of [`LayerState::merge`], and the number of layers among the metadata.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::tensor::{DType, Device, Tensor, TensorData};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::state::RECURRENT;
use super::{GlaState, GlaStateError, LayerState, StateAxis, StateVisitor};

const FORMAT: (&str, &str) = ("format", "gla-state-1");
const LAYERS: &str = "layers";

/// Types of the numbers in a state. Counts are I64.
const DTYPES: [(DType, Dtype); 5] = [
    (DType::F32, Dtype::F32),
    (DType::F16, Dtype::F16),
    (DType::BF16, Dtype::BF16),
    (DType::F64, Dtype::F64),
    (DType::I64, Dtype::I64),
];

impl GlaState {
    /// Writes the state to `path`, in the format of
    /// [safetensors](https://github.com/huggingface/safetensors).
    ///
    /// The file is built beside `path`, flushed to disk and renamed: `path` holds either the whole
    /// new state or what it held before.
    ///
    /// # Errors
    ///
    /// [`GlaStateError::Write`] if the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), GlaStateError> {
        let path = path.as_ref();
        let failed = |reason: String| GlaStateError::Write { path: path.to_path_buf(), reason };
        let mut tensors = Collected { prefix: String::new(), list: Vec::new() };
        for (i, layer) in self.layers.iter().enumerate() {
            tensors.prefix = format!("layers.{i}.");
            LayerState::merge(vec![layer.clone()], &mut tensors);
        }

        let views: Result<Vec<_>, String> = tensors.list.iter().map(view).collect();
        let metadata = HashMap::from([
            (FORMAT.0.to_string(), FORMAT.1.to_string()),
            (LAYERS.to_string(), self.layers.len().to_string()),
        ]);
        let bytes = safetensors::serialize(views.map_err(failed)?, Some(metadata));
        let bytes = bytes.map_err(|error| failed(error.to_string()))?;
        replace(path, &bytes).map_err(|error| failed(error.to_string()))
    }

    /// Reads a state that [`save`](Self::save) wrote onto `device`; what is of a type that the device
    /// lacks, as f32.
    ///
    /// Whether it fits a model is for
    /// [`GlaTransformer::check_state`](super::GlaTransformer::check_state).
    ///
    /// # Errors
    ///
    /// [`GlaStateError::Read`] if the file is missing, truncated or no safetensors file,
    /// [`GlaStateError::Content`] if it is not a state.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self, GlaStateError> {
        let path = path.as_ref();
        let failed = |reason: String| GlaStateError::Read { path: path.to_path_buf(), reason };
        let bytes = fs::read(path).map_err(|error| failed(error.to_string()))?;
        let header = SafeTensors::read_metadata(&bytes);
        let (_, header) = header.map_err(|error| failed(described(&bytes, error)))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let tensors = SafeTensors::deserialize(&bytes).expect("its header has been read");
        read(&tensors, &metadata, device)
            .map_err(|reason| GlaStateError::Content { path: path.to_path_buf(), reason })
    }
}

fn view((name, data): &(String, TensorData)) -> Result<(&str, TensorView<'_>), String> {
    let found = DTYPES.iter().find(|(dtype, _)| *dtype == data.dtype());
    let &(_, dtype) = found.ok_or_else(|| format!("tensor {name} is {:?}", data.dtype()))?;
    let view = TensorView::new(dtype, data.shape().to_vec(), data.as_bytes());
    view.map(|view| (name.as_str(), view)).map_err(|error| format!("tensor {name}: {error}"))
}

/// Writes `bytes` beside `path` and renames.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    static WRITES: AtomicUsize = AtomicUsize::new(0);
    let name = path.file_name().ok_or_else(|| io::Error::other("the path names no file"))?;
    // nobody else writes to a file of this name
    let (process, write) = (std::process::id(), WRITES.fetch_add(1, Ordering::Relaxed));
    let partial = format!(".{}.{process}-{write}.partial", name.to_string_lossy());
    let partial = path.with_file_name(partial);
    let write = || {
        let mut file = File::create(&partial)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&partial, path)
    };
    write().inspect_err(|_| {
        // the first error is the one to tell
        let _ = fs::remove_file(&partial);
    })
}

/// What is wrong with a file; sizes, if it is shorter than its header says.
fn described(bytes: &[u8], error: safetensors::SafeTensorError) -> String {
    use safetensors::SafeTensorError::{
        HeaderTooSmall, InvalidHeaderLength, MetadataIncompleteBuffer,
    };
    match error {
        HeaderTooSmall | InvalidHeaderLength | MetadataIncompleteBuffer => {
            format!("the file has {} bytes, not what its header says: {error}", bytes.len())
        }
        error => error.to_string(),
    }
}

fn read(
    tensors: &SafeTensors<'_>,
    metadata: &HashMap<String, String>,
    device: &Device,
) -> Result<GlaState, String> {
    let format = metadata.get(FORMAT.0).map(String::as_str);
    if format != Some(FORMAT.1) {
        let found = format.unwrap_or("none");
        return Err(format!("the format is {found}, expected {}", FORMAT.1));
    }
    let layers = metadata.get(LAYERS).and_then(|layers| layers.parse::<usize>().ok());
    let layers = layers.ok_or("the metadata layers is missing or not a count")?;
    let mut named = Named {
        prefix: String::new(),
        by_name: tensors.tensors().into_iter().collect(),
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
struct Collected {
    prefix: String,
    list: Vec<(String, TensorData)>,
}

impl StateVisitor for Collected {
    fn tensor<const D: usize>(
        &mut self,
        name: &str,
        _axis: StateAxis,
        parts: Vec<Option<Tensor<D>>>,
    ) -> Option<Tensor<D>> {
        let data = parts.into_iter().flatten().map(Tensor::into_data);
        self.list.extend(data.map(|data| (format!("{}{name}", self.prefix), data)));
        None
    }

    fn counts(&mut self, name: &str, parts: Vec<Vec<usize>>) -> Vec<usize> {
        let counts: Vec<i64> = parts.concat().iter().map(|&count| count as i64).collect();
        let shape = [counts.len()];
        self.list.push((format!("{}{name}", self.prefix), TensorData::new(counts, shape)));
        Vec::new()
    }
}

/// Hands out what was read; the first thing that is wrong is kept.
struct Named<'a> {
    prefix: String,
    by_name: BTreeMap<String, TensorView<'a>>,
    device: Device,
    error: Option<String>,
}

impl Named<'_> {
    fn take(&mut self, name: &str, rank: usize) -> Result<Option<TensorData>, String> {
        let Some(view) = self.by_name.remove(name) else {
            return Ok(None);
        };
        let (shape, found) = (view.shape(), view.dtype());
        if shape.len() != rank {
            return Err(format!("tensor {name} has rank {}, expected {rank}", shape.len()));
        }
        let dtype = DTYPES.iter().find(|(_, dtype)| *dtype == found).map(|(dtype, _)| *dtype);
        let dtype = dtype.ok_or_else(|| format!("tensor {name} is {found:?}"))?;
        Ok(Some(TensorData::from_bytes_vec(view.data().to_vec(), shape.to_vec(), dtype)))
    }

    fn tensor_data(
        &mut self,
        name: &str,
        rank: usize,
        f32_only: bool,
    ) -> Result<Option<TensorData>, String> {
        let data = self.take(name, rank)?;
        match data.as_ref().map(TensorData::dtype) {
            Some(dtype) if f32_only && dtype != DType::F32 => {
                Err(format!("tensor {name} is {dtype:?}, expected F32"))
            }
            Some(dtype) if !dtype.is_float() => {
                Err(format!("tensor {name} is {dtype:?}, expected a float"))
            }
            _ => Ok(data),
        }
    }

    fn count_data(&mut self, name: &str) -> Result<Vec<usize>, String> {
        let data = self.take(name, 1)?.ok_or_else(|| format!("tensor {name} is missing"))?;
        let dtype = data.dtype();
        let counts = data.try_into_vec::<i64>();
        let counts = counts.map_err(|_| format!("tensor {name} is {dtype:?}, expected I64"))?;
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

impl StateVisitor for Named<'_> {
    fn tensor<const D: usize>(
        &mut self,
        name: &str,
        _axis: StateAxis,
        _parts: Vec<Option<Tensor<D>>>,
    ) -> Option<Tensor<D>> {
        // the kernels take no other
        let f32_only = name == RECURRENT;
        let data = self.tensor_data(&format!("{}{name}", self.prefix), D, f32_only);
        let data = self.keep(data)?;
        let dtype = data.dtype();
        let dtype = if self.device.supports_dtype(dtype) { dtype } else { DType::F32 };
        Some(Tensor::from_data(data, (&self.device, dtype)))
    }

    fn counts(&mut self, name: &str, _parts: Vec<Vec<usize>>) -> Vec<usize> {
        let counts = self.count_data(&format!("{}{name}", self.prefix));
        self.keep(counts)
    }
}
