//! Everything that this example does, by subcommand.
//!
//! ```text
//! cargo run --release -p gla-lm --bin lm -- train --preset cpu
//! cargo run --release -p gla-lm --bin lm -- generate --prompt "pub fn "
//! cargo run --release -p gla-lm --bin lm -- export --checkpoint runs/cpu --output gla-cpu
//! cargo run --release -p gla-lm --bin lm -- logits --model gla-cpu --input in.safetensors \
//!     --output out.safetensors
//! ```

use clap::{Parser, Subcommand};
use gla_lm::commands::{self, ExportArgs, GenerateArgs, LogitsArgs};
use gla_lm::config::TrainArgs;
use gla_lm::training;

#[derive(Parser)]
#[command(about = "A small GLA language model", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train a model on bytes; the same command resumes a run
    Train(Box<TrainArgs>),
    /// Continue a prompt
    Generate(Box<GenerateArgs>),
    /// Compute the logits of given ids, to compare them with another implementation's
    Logits(LogitsArgs),
    /// Write a trained model as a checkpoint of flash-linear-attention
    Export(ExportArgs),
}

fn main() -> anyhow::Result<()> {
    // SAFETY: nothing has started a thread yet
    unsafe { commands::start() };
    match Cli::parse().command {
        Command::Train(args) => training::train(&args),
        Command::Generate(args) => commands::generate(&args),
        Command::Logits(args) => commands::logits(&args),
        Command::Export(args) => commands::export(&args),
    }
}
