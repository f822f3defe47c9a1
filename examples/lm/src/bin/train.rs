//! Train a small language model; prints the validation score and a sample.
//!
//! ```text
//! cargo run --release -p gla-lm --bin train
//! cargo run --release -p gla-lm --bin train --features vulkan -- --preset small
//! cargo run --release -p gla-lm --bin train -- --data my-notes/ --out runs/notes --minutes 5
//! ```
//!
//! The same command resumes a run that was stopped or killed.

use clap::Parser;
use gla_lm::config::TrainArgs;
use gla_lm::{commands, training};

#[derive(Parser)]
#[command(about = "Train a small GLA language model on bytes", version)]
struct Cli {
    #[command(flatten)]
    train: TrainArgs,
}

fn main() -> anyhow::Result<()> {
    // SAFETY: nothing has started a thread yet
    unsafe { commands::start() };
    training::train(&Cli::parse().train)
}
