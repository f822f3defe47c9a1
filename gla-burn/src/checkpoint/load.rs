use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::store::burn_pack::Tensor;
use burn::store::{Applier, FloatCastAdapter, ModuleAdapter, PyTorchToBurnAdapter};
use burn::tensor::{DType, Device};

use super::fit::fit;
use super::names::parameter_shapes;
use super::{CheckpointConfig, CheckpointError, TensorProblem, files};
use crate::nn::GlaTransformer;

/// A checkpoint on disk whose tensors have not been read yet.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    config: CheckpointConfig,
    warnings: Vec<String>,
    tensors: BTreeMap<String, Tensor>,
}

impl Checkpoint {
    /// Reads `config.json` and the headers of the tensor files.
    ///
    /// The files are mapped into memory until the checkpoint is dropped: do not change them before.
    ///
    /// # Errors
    ///
    /// If a file is missing, truncated or not what it should be, or if `config.json` describes a
    /// model that cannot be loaded.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let folder = folder.as_ref();
        let (config, warnings) = CheckpointConfig::read(&folder.join(files::CONFIG))?;
        for warning in &warnings {
            tracing::warn!("{warning}");
        }
        let tensors = files::tensors(folder)?;
        Ok(Self { folder: folder.to_path_buf(), config, warnings, tensors })
    }

    /// What `config.json` says.
    pub fn config(&self) -> &CheckpointConfig {
        &self.config
    }

    /// Settings in `config.json` that fla, and so this library, does not follow.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The type of the weights on disk; f32 if there are several.
    pub fn dtype(&self) -> DType {
        let mut dtypes = self.tensors.values().map(|tensor| tensor.dtype);
        let first = dtypes.next().unwrap_or(DType::F32);
        if dtypes.all(|dtype| dtype == first) { first } else { DType::F32 }
    }

    /// Makes the model on `device`, with weights in f32.
    ///
    /// Tensors are read one by one: beside the model there is at most one of them in memory, in two
    /// or three forms.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Tensors`] lists all tensors that are missing, unknown, or of another
    /// shape or type than the model needs; then none has been read.
    pub fn load(&self, device: &Device) -> Result<GlaTransformer, CheckpointError> {
        self.load_as(DType::F32, device)
    }

    /// As [`load`](Self::load), with weights in `dtype` where `device` computes in it, else in f32.
    ///
    /// # Errors
    ///
    /// As [`load`](Self::load).
    ///
    /// # Panics
    ///
    /// Panics if `dtype` is no float type.
    pub fn load_as(
        &self,
        dtype: DType,
        device: &Device,
    ) -> Result<GlaTransformer, CheckpointError> {
        let dtype = if device.supports_dtype(dtype) { dtype } else { DType::F32 };
        // parameters are made when first used: these never are
        let model = self.config.model.init(device);
        let tensors =
            fit(self.tensors.clone(), &parameter_shapes(&model)).map_err(
                |problems| match problems.iter().find_map(shared_convolution) {
                    Some(what) => CheckpointError::Unsupported { path: self.folder.clone(), what },
                    None => CheckpointError::Tensors { path: self.folder.clone(), problems },
                },
            )?;

        let adapter = PyTorchToBurnAdapter.chain(FloatCastAdapter::to(dtype));
        let mut applier = Applier::new(tensors, None, Some(Box::new(adapter)), false);
        let model = model.map(&mut applier);
        let result = applier.into_result();
        match result.errors.first() {
            Some(error) => Err(CheckpointError::read(&self.folder, error)),
            None => Ok(model),
        }
    }
}

/// Says so if the tensor is of a kind of convolution that is not supported.
fn shared_convolution(problem: &TensorProblem) -> Option<String> {
    match problem {
        TensorProblem::Unknown { name, .. } if name.contains(".h_conv1d.") => {
            Some(format!("{name} (one short convolution for all projections, until 2024-07-15)"))
        }
        _ => None,
    }
}
