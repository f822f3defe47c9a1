//! What the program `lm` does besides training: [`generate`], [`logits`] and [`export`].
//!
//! `cargo run --release -p gla-lm --bin lm -- --help`

mod export;
mod generate;
mod logits;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use burn::module::Module;
use burn::tensor::Device;
use gla_burn::GlaTransformer;
use tracing_subscriber::EnvFilter;

pub use export::{ExportArgs, export};
pub use generate::{GenerateArgs, generate};
pub use logits::{LogitsArgs, logits};

use crate::checkpoint::{self, Checkpoint};
use crate::config::RunConfig;
use crate::device;

/// What every program of this example does first.
///
/// # Safety
///
/// Writes to the environment: call it first in `main`, before there is a second thread.
pub unsafe fn start() {
    // SAFETY: the caller promises that no other thread reads the environment
    unsafe { device::pin_default_device() };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("error"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
}

/// A checkpoint of a run, and what the run says about its model.
struct Trained {
    path: PathBuf,
    config: RunConfig,
    checkpoint: Checkpoint,
}

impl Trained {
    /// Opens the checkpoint at `path` or the best of the run there; without a path, of the run that
    /// was trained last.
    fn open(path: Option<&Path>) -> Result<Self> {
        let run = match path {
            Some(path) => path.to_path_buf(),
            None => checkpoint::last_run("runs".as_ref()).context(
                "there is no run in runs/: train one first, or name it with --checkpoint",
            )?,
        };
        let path = checkpoint::find(&run)?;
        // absolute, so that even "." has a parent
        let path = path.canonicalize()?;
        let run = path.parent().context("a checkpoint lies in the folder of its run")?;
        let config = RunConfig::load(run)?
            .with_context(|| format!("{} holds no config.json of a run", run.display()))?;
        let checkpoint = Checkpoint::open_model(&path)?;
        Ok(Self { path, config, checkpoint })
    }

    fn load(&self, device: &Device) -> Result<GlaTransformer> {
        let bits = self.checkpoint.state.valid_bits;
        eprintln!("model: {}, {bits:.3} bits/byte in validation", self.path.display());
        Ok(self.checkpoint.load_model(self.config.model.init(device))?.valid())
    }
}
