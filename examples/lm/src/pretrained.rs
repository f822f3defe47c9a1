//! `--model`: checkpoints of flash-linear-attention in a folder, or on the Hugging Face hub.
//!
//! `cargo run --release -p gla-lm --bin lm -- generate --model gla-340M-15B --prompt "Once upon"`

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use burn::tensor::{DType, Device};
use clap::Args;
use gla_burn::GlaTransformer;
use gla_burn::checkpoint::{Checkpoint, CheckpointConfig};

/// How to take a checkpoint.
#[derive(Args, Clone, Debug)]
pub struct WeightArgs {
    /// Compute in the type of the stored weights where the device can [default: in f32]
    #[arg(long)]
    pub keep_dtype: bool,
}

/// A model of flash-linear-attention, on a device.
pub struct Pretrained {
    /// Where it lies.
    pub folder: PathBuf,
    /// What its `config.json` says.
    pub config: CheckpointConfig,
    /// The model.
    pub model: GlaTransformer,
}

impl Pretrained {
    /// Loads the checkpoint at `name`, a folder or a repository of the hub; warnings go to stderr.
    ///
    /// # Errors
    ///
    /// When there is no such checkpoint or it cannot be loaded.
    pub fn load(name: &str, weights: &WeightArgs, device: &Device) -> Result<Self> {
        let folder = find(name)?;
        let checkpoint = Checkpoint::open(&folder)?;
        for warning in checkpoint.warnings() {
            eprintln!("warning: {warning}");
        }
        let dtype = if weights.keep_dtype { checkpoint.dtype() } else { DType::F32 };
        let model = checkpoint.load_as(dtype, device)?;
        let config = checkpoint.config().clone();
        eprintln!("model: {}, {} parameters", folder.display(), config.model.num_params());
        Ok(Self { folder, config, model })
    }
}

/// The folder of a checkpoint; fetches it from the hub if there is no such folder.
fn find(name: &str) -> Result<PathBuf> {
    let folder = Path::new(name);
    if folder.is_dir() {
        return Ok(folder.to_path_buf());
    }
    match name.split('/').collect::<Vec<_>>()[..] {
        [owner, repository] if !owner.is_empty() && !owner.starts_with('.') => {
            fetch(owner, repository)
        }
        _ => bail!("--model {name}: there is no such folder"),
    }
}

/// Fetches a repository into Hugging Face's cache, or takes it from there.
#[cfg(feature = "hub")]
fn fetch(owner: &str, repository: &str) -> Result<PathBuf> {
    use anyhow::Context;

    let files = ["config.json", "tokenizer.json", "model*.safetensors", "model*.index.json"];
    let fetched = || {
        let repository = hf_hub::HFClientSync::new()?.model(owner, repository);
        let patterns = files.map(String::from).to_vec();
        repository.snapshot_download().allow_patterns(patterns).send()
    };
    fetched().with_context(|| {
        format!(
            "--model {owner}/{repository}: there is no such folder, and the hub did not give it"
        )
    })
}

#[cfg(not(feature = "hub"))]
fn fetch(owner: &str, repository: &str) -> Result<PathBuf> {
    bail!(
        "--model {owner}/{repository}: there is no such folder; with --features hub it would be \
         fetched from the Hugging Face hub"
    )
}
