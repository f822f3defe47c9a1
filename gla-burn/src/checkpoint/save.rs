use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use burn::store::{
    BurnToPyTorchAdapter, FloatCastAdapter, ModuleAdapter, ModuleSnapshot, PathFilter,
    SafetensorsStore,
};
use burn::tensor::DType;
use serde_json::json;

use super::names::parameter_shapes;
use super::{CheckpointConfig, CheckpointError, TensorProblem, files};
use crate::nn::{GlaTransformer, fla_name};

/// How to write a checkpoint.
#[derive(Clone, Debug)]
pub struct SaveOptions {
    /// Type of the weights on disk, f32, f16 or bf16; that of the model if `None`.
    pub dtype: Option<DType>,
    /// Most bytes of a file; one file if `None`. A tensor that is larger has a file of its own.
    pub max_shard_bytes: Option<usize>,
}

impl Default for SaveOptions {
    /// The model's type, and files of at most 5 GB as Hugging Face writes them.
    fn default() -> Self {
        Self { dtype: None, max_shard_bytes: Some(5_000_000_000) }
    }
}

/// Writes a checkpoint that fla and [`Checkpoint`](super::Checkpoint) load into `folder`.
///
/// It is built beside `folder` and renamed: `folder` holds the whole checkpoint or is not there.
/// Tensors are read from the device one by one.
///
/// # Errors
///
/// If `folder` is there and not empty, if `config` is not the model's, if fla has no such model, or
/// if a file cannot be written.
pub fn save(
    model: &GlaTransformer,
    config: &CheckpointConfig,
    folder: impl AsRef<Path>,
    options: &SaveOptions,
) -> Result<(), CheckpointError> {
    let folder = folder.as_ref();
    if folder.file_name().is_none() {
        return Err(CheckpointError::write(folder, "it is no name of a folder"));
    }
    // before gigabytes are read from the device
    if folder.exists() && !folder.is_dir() {
        return Err(CheckpointError::write(folder, "it is a file, not a folder"));
    }
    if fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(CheckpointError::Exists { path: folder.to_path_buf() });
    }
    let unsupported = |what| CheckpointError::Unsupported { path: folder.to_path_buf(), what };
    let dtype = options.dtype.unwrap_or_else(|| model.embeddings.weight.val().dtype());
    let torch_dtype = match dtype {
        DType::F32 => "float32",
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        _ => return Err(unsupported(format!("a checkpoint in {dtype:?}"))),
    };
    let invalid = |reason| CheckpointError::Config { path: folder.join(files::CONFIG), reason };
    config.model.check().map_err(invalid)?;
    let config_json = config.json(torch_dtype).map_err(unsupported)?;
    let shapes = parameter_shapes(model);
    compare(&shapes, config, model, folder)?;
    let tensors = Tensors { model, dtype, shapes };
    // a name of its own for each process, so that nobody's folder is in the way
    let partial = folder.with_added_extension(format!("{}.partial", std::process::id()));
    let write = || -> Result<(), String> {
        fs::create_dir_all(&partial).map_err(|e| e.to_string())?;
        write_file(&partial.join(files::CONFIG), &config_json)?;
        tensors.write(options.max_shard_bytes.unwrap_or(usize::MAX), &partial)?;
        if folder.exists() {
            fs::remove_dir(folder).map_err(|e| e.to_string())?;
        }
        fs::rename(&partial, folder).map_err(|e| e.to_string())
    };
    write().map_err(|reason| {
        // the first error says more than one of cleaning up
        let _ = fs::remove_dir_all(&partial);
        CheckpointError::write(folder, reason)
    })
}

/// Refuses a configuration that is not the model's.
fn compare(
    shapes: &BTreeMap<String, Vec<usize>>,
    config: &CheckpointConfig,
    model: &GlaTransformer,
    folder: &Path,
) -> Result<(), CheckpointError> {
    // its parameters are never made
    let expected = parameter_shapes(&config.model.init(&model.embeddings.weight.device()));
    let mut problems = Vec::new();
    for (path, expected) in &expected {
        let (name, expected) = (fla_name(path), expected.clone());
        match shapes.get(path).cloned() {
            None => problems.push(TensorProblem::Missing { name, expected }),
            Some(found) if found != expected => {
                problems.push(TensorProblem::Shape { name, found, expected });
            }
            Some(_) => {}
        }
    }
    for (path, found) in shapes.iter().filter(|(path, _)| !expected.contains_key(*path)) {
        problems.push(TensorProblem::Unknown { name: fla_name(path), found: found.clone() });
    }
    match problems.is_empty() {
        true => Ok(()),
        false => Err(CheckpointError::Tensors { path: folder.to_path_buf(), problems }),
    }
}

/// What is written, by the paths of the parameters.
struct Tensors<'a> {
    model: &'a GlaTransformer,
    dtype: DType,
    shapes: BTreeMap<String, Vec<usize>>,
}

impl Tensors<'_> {
    fn bytes(&self, shape: &[usize]) -> usize {
        shape.iter().product::<usize>() * self.dtype.size()
    }

    /// Writes the index first: with each file of tensors, the folder's entries go to disk.
    fn write(&self, max_bytes: usize, folder: &Path) -> Result<(), String> {
        let shards = self.shards(max_bytes);
        if let [all] = shards.as_slice() {
            return self.write_shard(all, folder, files::SINGLE);
        }
        let count = shards.len();
        let file = |i: usize| format!("model-{:05}-of-{count:05}.safetensors", i + 1);
        let named = |(i, shard): (usize, &Vec<&str>)| {
            shard.iter().map(|path| (fla_name(path), file(i))).collect::<Vec<_>>()
        };
        let weight_map: BTreeMap<_, _> = shards.iter().enumerate().flat_map(named).collect();
        let total_size: usize = self.shapes.values().map(|shape| self.bytes(shape)).sum();
        let index = json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map });
        write_file(&folder.join(files::INDEX), &format!("{index:#}\n"))?;

        let mut shards = shards.iter().enumerate();
        shards.try_for_each(|(i, shard)| self.write_shard(shard, folder, &file(i)))
    }

    /// Paths of the parameters in each file.
    fn shards(&self, max_bytes: usize) -> Vec<Vec<&str>> {
        let mut shards: Vec<Vec<&str>> = Vec::new();
        let mut room = 0;
        for (path, shape) in &self.shapes {
            let size = self.bytes(shape);
            match shards.last_mut() {
                Some(shard) if size <= room => shard.push(path),
                _ => {
                    shards.push(vec![path]);
                    room = max_bytes;
                }
            }
            room = room.saturating_sub(size);
        }
        shards
    }

    fn write_shard(&self, paths: &[&str], folder: &Path, file: &str) -> Result<(), String> {
        let file = folder.join(file);
        let mut store = SafetensorsStore::from_file(&file)
            .clear_metadata()
            // Hugging Face refuses a file without it
            .metadata("format", "pt")
            .with_to_adapter(BurnToPyTorchAdapter.chain(FloatCastAdapter::to(self.dtype)))
            .filter(PathFilter::new().with_full_paths(paths.iter().copied()))
            // as `fla_name`
            .with_key_remapping(r"^(embeddings|layers|norm)\.", "model.$1.");
        self.model.save_into(&mut store).map_err(|e| e.to_string())?;
        // it was a temporary file, which only its owner may read
        let public = fs::metadata(folder.join(files::CONFIG)).map_err(|e| e.to_string())?;
        fs::set_permissions(&file, public.permissions()).map_err(|e| e.to_string())
    }
}

/// Writes a file and waits until it is on disk.
fn write_file(path: &Path, text: &str) -> Result<(), String> {
    let write = || -> std::io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().map_err(|error| format!("{}: {error}", path.display()))
}
