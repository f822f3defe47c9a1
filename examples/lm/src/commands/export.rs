use std::path::PathBuf;

use anyhow::Result;
use burn::tensor::DType;
use clap::{Args, ValueEnum};
use gla_burn::checkpoint::{CheckpointConfig, SaveOptions, save};

use super::Trained;
use crate::corpus::SEPARATOR;
use crate::device::{self, DeviceChoice};

/// Options of `export`.
#[derive(Args, Clone, Debug)]
pub struct ExportArgs {
    /// Folder of a run, for its best checkpoint, or of one checkpoint
    /// [default: the run in runs/ that was trained last]
    #[arg(long)]
    pub checkpoint: Option<PathBuf>,
    /// Folder to write; it must be new or empty
    #[arg(long)]
    pub output: PathBuf,
    /// Type of the weights
    #[arg(long, value_enum, default_value_t = WeightType::F32)]
    pub dtype: WeightType,
}

/// Type of weights on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WeightType {
    /// 4 bytes.
    F32,
    /// 2 bytes, with the range of about 65504.
    F16,
    /// 2 bytes, with the range of f32.
    Bf16,
}

/// Write a trained model as a checkpoint of flash-linear-attention.
///
/// # Errors
///
/// When there is no such run, or the folder cannot be written.
pub fn export(args: &ExportArgs) -> Result<()> {
    let trained = Trained::open(args.checkpoint.as_deref())?;
    let model = trained.load(&device::choose(DeviceChoice::Cpu)?.device)?;
    let separator = u32::from(SEPARATOR);
    let config = CheckpointConfig {
        bos_token_id: Some(separator),
        eos_token_ids: vec![separator],
        ..CheckpointConfig::new(trained.config.model)
    };
    let dtype = match args.dtype {
        WeightType::F32 => DType::F32,
        WeightType::F16 => DType::F16,
        WeightType::Bf16 => DType::BF16,
    };
    let options = SaveOptions { dtype: Some(dtype), ..SaveOptions::default() };
    save(&model, &config, &args.output, &options)?;
    println!("wrote {}", args.output.display());
    Ok(())
}
