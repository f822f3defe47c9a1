//! Checkpoints of flash-linear-attention (fla) in the Hugging Face layout, both ways.
//!
//! ```text
//! config.json                          fla's GLAConfig
//! model.safetensors                    all tensors, or
//! model-00001-of-00002.safetensors ..  shards, and
//! model.safetensors.index.json         which tensor is in which of them
//! ```
//!
//! [`Checkpoint::open`] reads `config.json` and the headers of the tensor files, and
//! [`Checkpoint::load`] compares every name, shape and type with the model before it reads the
//! first tensor; [`save`] writes a folder that fla loads.
//!
//! ```no_run
//! use burn::tensor::Device;
//! use gla_burn::checkpoint::{Checkpoint, SaveOptions, save};
//!
//! # fn main() -> Result<(), gla_burn::checkpoint::CheckpointError> {
//! let checkpoint = Checkpoint::open("gla-340M-15B")?;
//! let model = checkpoint.load(&Device::default())?;
//! save(&model, checkpoint.config(), "copy", &SaveOptions::default())?;
//! # Ok(())
//! # }
//! ```
//!
//! Folders of older versions of fla are read too: tensors without the prefix `model.` or with
//! `embed_tokens` for `embeddings`, the two input projections of the MLP in one tensor, an output
//! norm that is not fused with its gate, and `rms_norm_eps` in `config.json`. They are written in
//! today's form.

mod config;
mod error;
mod files;
mod fit;
mod load;
mod names;
mod save;

pub use config::CheckpointConfig;
pub use error::{CheckpointError, TensorProblem};
pub use load::Checkpoint;
pub use names::tensor_shapes;
pub use save::{SaveOptions, save};
