//! Continue a prompt with a trained model; the text goes to stdout, the speed to stderr.
//!
//! ```text
//! cargo run --release -p gla-lm --bin generate -- --prompt "pub fn " --tokens 300
//! cargo run --release -p gla-lm --bin generate -- --checkpoint runs/cpu/step-00001000 --top-k 20
//! cargo run --release -p gla-lm --bin generate -- --prompt "impl " --samples 4 --stop "}"
//! cargo run --release -p gla-lm --bin generate -- --model gla-340M-15B --prompt "Once upon"
//! ```

use clap::Parser;
use gla_lm::commands::{self, GenerateArgs};

#[derive(Parser)]
#[command(about = "Continue a prompt with a trained GLA language model", version)]
struct Cli {
    #[command(flatten)]
    generate: GenerateArgs,
}

fn main() -> anyhow::Result<()> {
    // SAFETY: nothing has started a thread yet
    unsafe { commands::start() };
    commands::generate(&Cli::parse().generate)
}
