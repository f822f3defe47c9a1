use std::io::Write;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::Trained;
use crate::device::{self, DeviceChoice};
use crate::generation::{self, Request};
use crate::pretrained::{Pretrained, WeightArgs};
use crate::sampling::SamplingArgs;
use crate::tokenizer::Tokenizer;

/// Options of `generate`.
#[derive(Args, Clone, Debug)]
pub struct GenerateArgs {
    /// Text to continue; may be empty
    #[arg(long, default_value = "")]
    pub prompt: String,
    /// Tokens to generate, bytes for models of this example; with --stop or --stop-at-end, at most
    #[arg(long, default_value_t = 400)]
    pub tokens: usize,
    /// Continuations of the prompt, generated together; more than one are printed when all are done
    #[arg(long, default_value = "1")]
    pub samples: NonZeroUsize,
    /// End a sample before this text; may be given several times
    #[arg(long)]
    pub stop: Vec<String>,
    /// End a sample where the model would begin another document; models with a tokenizer always do
    #[arg(long)]
    pub stop_at_end: bool,
    /// Folder of a run, for its best checkpoint, or of one checkpoint
    /// [default: the run in runs/ that was trained last]
    #[arg(long)]
    pub checkpoint: Option<PathBuf>,
    /// Instead of a run: a checkpoint of flash-linear-attention, a folder or (with the feature hub)
    /// a repository like fla-hub/gla-340M-15B
    #[arg(long, conflicts_with = "checkpoint")]
    pub model: Option<String>,
    /// The type to compute in.
    #[command(flatten)]
    pub weights: WeightArgs,
    /// Where to compute; auto takes a real GPU if there is one, and says what it took
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    pub device: DeviceChoice,
    /// How to choose among the tokens.
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// Where the model comes from.
enum Source<'a> {
    Trained(Box<Trained>),
    Pretrained(&'a str),
}

/// Continue a prompt; the text goes to stdout, the speed to stderr.
///
/// # Errors
///
/// When an option is wrong, or there is no such model or device.
pub fn generate(args: &GenerateArgs) -> Result<()> {
    let request = Request {
        prompt: args.prompt.clone(),
        tokens: args.tokens,
        samples: args.samples.get(),
        stop: args.stop.clone(),
        stop_at_end: args.stop_at_end,
        sampling: (&args.sampling).into(),
    };
    // a wrong option is told before anything is loaded
    request.sampling.clone().init()?;
    // a run is looked up first: without one there is no need for a device
    let source = match &args.model {
        Some(name) => Source::Pretrained(name),
        None => Source::Trained(Box::new(Trained::open(args.checkpoint.as_deref())?)),
    };
    let chosen = device::choose(args.device)?;
    eprintln!("device: {}", chosen.label);
    let device = &chosen.device;
    let (model, tokenizer) = match source {
        Source::Trained(trained) => (trained.load(device)?, Tokenizer::bytes()),
        Source::Pretrained(name) => {
            let pretrained = Pretrained::load(name, &args.weights, device)?;
            let tokenizer = Tokenizer::open(&pretrained.folder, &pretrained.config)?;
            (pretrained.model, tokenizer)
        }
    };

    let mut out = std::io::stdout().lock();
    let timing = match request.samples {
        1 => {
            out.write_all(request.prompt.as_bytes())?;
            let timing = generation::generate(&model, &tokenizer, &request, |_, text| {
                out.write_all(text.as_bytes())?;
                out.flush()
            })?;
            writeln!(out)?;
            timing
        }
        samples => {
            let mut texts = vec![request.prompt.clone(); samples];
            let timing = generation::generate(&model, &tokenizer, &request, |sample, text| {
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
