use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use burn::tensor::{Device, Int, Tensor, TensorData};
use clap::Args;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::device::{self, DeviceChoice};
use crate::pretrained::{Pretrained, WeightArgs};

/// Options of `logits`.
#[derive(Args, Clone, Debug)]
pub struct LogitsArgs {
    /// A checkpoint of flash-linear-attention, a folder or (with the feature hub) a repository like
    /// fla-hub/gla-340M-15B
    #[arg(long)]
    pub model: String,
    /// Safetensors file with the tensor `ids`, [B, T] i32 or i64
    #[arg(long)]
    pub input: PathBuf,
    /// Safetensors file to write, with the tensor `logits`, [B, T, vocabulary] f32
    #[arg(long)]
    pub output: PathBuf,
    /// The type to compute in.
    #[command(flatten)]
    pub weights: WeightArgs,
    /// Where to compute; auto takes a real GPU if there is one, and says what it took
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    pub device: DeviceChoice,
}

/// Compute the logits of given ids, to compare them with another implementation's.
///
/// # Errors
///
/// When the input is not what it should be, there is no such model or device, or the output cannot
/// be written.
pub fn logits(args: &LogitsArgs) -> Result<()> {
    let (ids, shape) = read_ids(&args.input)?;
    let chosen = device::choose(args.device)?;
    eprintln!("device: {}", chosen.label);
    let pretrained = Pretrained::load(&args.model, &args.weights, &chosen.device)?;
    let vocabulary = pretrained.config.model.vocab_size;
    let is_known = |id: &i64| usize::try_from(*id).is_ok_and(|id| id < vocabulary);
    if let Some(at) = ids.iter().position(|id| !is_known(id)) {
        bail!(
            "{}: ids[{}, {}] is {}, but the model knows the tokens 0 to {}",
            args.input.display(),
            at / shape[1],
            at % shape[1],
            ids[at],
            vocabulary - 1
        );
    }

    let logits = compute(&pretrained, ids, shape, &chosen.device)?;
    let bytes: Vec<u8> = logits.iter().flat_map(|x| x.to_le_bytes()).collect();
    let shape = vec![shape[0], shape[1], vocabulary];
    let view = TensorView::new(Dtype::F32, shape.clone(), &bytes)?;
    safetensors::serialize_to_file([("logits", view)], None, &args.output)
        .with_context(|| format!("cannot write {}", args.output.display()))?;
    println!("wrote logits {shape:?} to {}", args.output.display());
    Ok(())
}

fn compute(
    pretrained: &Pretrained,
    ids: Vec<i64>,
    shape: [usize; 2],
    device: &Device,
) -> Result<Vec<f32>> {
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, shape), device);
    let logits = pretrained.model.forward(ids).flatten::<1>(0, 2);
    logits.try_into_vec_as::<f32>().context("cannot read the logits from the device")
}

fn read_ids(path: &Path) -> Result<(Vec<i64>, [usize; 2])> {
    let named = |error: safetensors::SafeTensorError| {
        anyhow!("{} is no safetensors file with a tensor ids: {error}", path.display())
    };
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(named)?;
    let ids = tensors.tensor("ids").map_err(named)?;
    let &[batch, tokens] = ids.shape() else {
        bail!("{}: ids has shape {:?}, expected [B, T]", path.display(), ids.shape());
    };
    ensure!(
        batch > 0 && tokens > 0,
        "{}: ids has shape [{batch}, {tokens}], expected at least one token",
        path.display()
    );
    let bytes = ids.data();
    let ids = match ids.dtype() {
        Dtype::I32 => bytes.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b).into()).collect(),
        Dtype::I64 => bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect(),
        dtype => bail!("{}: ids is {dtype:?}, expected I32 or I64", path.display()),
    };
    Ok((ids, [batch, tokens]))
}
