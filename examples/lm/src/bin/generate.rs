//! Continue a prompt with a trained model; the text goes to stdout, the speed to stderr.
//!
//! ```text
//! cargo run --release -p gla-lm --bin generate -- --prompt "pub fn " --tokens 300
//! cargo run --release -p gla-lm --bin generate -- --checkpoint runs/cpu/step-00001000 --top-k 20
//! cargo run --release -p gla-lm --bin generate -- --prompt "impl " --samples 4 --stop "}"
//! ```

use std::io::Write;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Context, Result};
use burn::module::Module;
use clap::Parser;
use gla_lm::checkpoint::{self, Checkpoint};
use gla_lm::config::RunConfig;
use gla_lm::device::{self, DeviceChoice};
use gla_lm::generation::{Request, generate};
use gla_lm::sampling::SamplingArgs;
use tracing_subscriber::EnvFilter;

#[derive(Parser)]
#[command(about = "Continue a prompt with a trained GLA language model", version)]
struct Cli {
    /// Text to continue; may be empty
    #[arg(long, default_value = "")]
    prompt: String,
    /// Bytes to generate; with --stop or --stop-at-end, at most
    #[arg(long, default_value_t = 400)]
    tokens: usize,
    /// Continuations of the prompt, generated together; more than one are printed when all are done
    #[arg(long, default_value = "1")]
    samples: NonZeroUsize,
    /// End a sample before this text; may be given several times
    #[arg(long)]
    stop: Vec<String>,
    /// End a sample where the model would begin another document
    #[arg(long)]
    stop_at_end: bool,
    /// Folder of a run, for its best checkpoint, or of one checkpoint
    /// [default: the run in runs/ that was trained last]
    #[arg(long)]
    checkpoint: Option<PathBuf>,
    /// Where to compute; auto takes a real GPU if there is one, and says what it took
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
    #[command(flatten)]
    sampling: SamplingArgs,
}

fn main() -> Result<()> {
    // SAFETY: nothing has started a thread yet
    unsafe { device::pin_default_device() };
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("error"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();

    let request = Request {
        prompt: cli.prompt,
        tokens: cli.tokens,
        samples: cli.samples.get(),
        stop: cli.stop,
        stop_at_end: cli.stop_at_end,
        sampling: (&cli.sampling).into(),
    };
    // a wrong option is told before anything is loaded
    request.sampling.clone().init()?;
    let run = match cli.checkpoint {
        Some(path) => path,
        None => checkpoint::last_run("runs".as_ref())
            .context("there is no run in runs/: train one first, or name it with --checkpoint")?,
    };
    let path = checkpoint::find(&run)?;
    // absolute, so that even "." has a parent
    let path = path.canonicalize()?;
    let run = path.parent().context("a checkpoint lies in the folder of its run")?.to_path_buf();
    let config = RunConfig::load(&run)?
        .with_context(|| format!("{} holds no config.json of a run", run.display()))?;
    let checkpoint = Checkpoint::open_model(&path)?;
    let chosen = device::choose(cli.device)?;
    eprintln!("device: {}", chosen.label);
    eprintln!(
        "model: {}, {:.3} bits/byte in validation",
        path.display(),
        checkpoint.state.valid_bits
    );
    let model = checkpoint.load_model(config.model.init(&chosen.device))?.valid();

    let mut out = std::io::stdout().lock();
    let timing = match request.samples {
        1 => {
            out.write_all(request.prompt.as_bytes())?;
            let timing = generate(&model, &request, |_, text| {
                out.write_all(text.as_bytes())?;
                out.flush()
            })?;
            writeln!(out)?;
            timing
        }
        samples => {
            let mut texts = vec![request.prompt.clone(); samples];
            let timing = generate(&model, &request, |sample, text| {
                texts[sample].push_str(text);
                Ok(())
            })?;
            for (i, text) in texts.iter().enumerate() {
                writeln!(out, "--- sample {} of {samples}\n{text}", i + 1)?;
            }
            timing
        }
    };
    eprintln!("{}", timing.summary());
    Ok(())
}
