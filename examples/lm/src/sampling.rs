//! How to choose the next token, as options: see [`SamplerConfig`] for formulas and order.
//!
//! `cargo run --release -p gla-lm --bin generate -- --temperature 0.7 --top-k 40 --min-p 0.05`

use clap::Args;
use gla_burn::SamplerConfig;

/// How to choose among the tokens.
#[derive(Args, Clone, Debug)]
pub struct SamplingArgs {
    /// Divides the logits; 0 always takes the likeliest token
    #[arg(long, default_value_t = 0.8)]
    pub temperature: f64,
    /// Choose among so many likeliest tokens; 0 for all
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    /// Choose among the likeliest tokens that together have this probability; 1 for all
    #[arg(long, default_value_t = 0.95)]
    pub top_p: f64,
    /// Choose among tokens at least this likely, relative to the likeliest; 0 for all
    #[arg(long, default_value_t = 0.0)]
    pub min_p: f64,
    /// Above 1 makes tokens of the text so far less likely; 1 does nothing
    #[arg(long, default_value_t = 1.0)]
    pub repetition_penalty: f64,
    /// Seed of the choices; each further sample has the next one
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
}

impl Default for SamplingArgs {
    fn default() -> Self {
        Self {
            temperature: 0.8,
            top_k: 0,
            top_p: 0.95,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 42,
        }
    }
}

impl From<&SamplingArgs> for SamplerConfig {
    fn from(args: &SamplingArgs) -> Self {
        SamplerConfig::new()
            .with_temperature(args.temperature)
            .with_top_k((args.top_k > 0).then_some(args.top_k))
            .with_top_p(args.top_p)
            .with_min_p(args.min_p)
            .with_repetition_penalty(args.repetition_penalty)
            .with_seed(args.seed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        sampling: SamplingArgs,
    }

    #[test]
    fn the_defaults_of_the_options_are_those_of_the_library() {
        let parsed = SamplerConfig::from(&Cli::parse_from(["generate"]).sampling);
        assert_eq!(parsed, SamplerConfig::from(&SamplingArgs::default()));
        assert_eq!(parsed.top_k, None);
        let all = "generate --temperature 0 --top-k 3 --top-p 0.5 --min-p 0.1 \
                   --repetition-penalty 1.2 --seed 7";
        let parsed = SamplerConfig::from(&Cli::parse_from(all.split_whitespace()).sampling);
        let expected = SamplerConfig::new()
            .with_temperature(0.0)
            .with_top_k(Some(3))
            .with_top_p(0.5)
            .with_min_p(0.1)
            .with_repetition_penalty(1.2)
            .with_seed(7);
        assert_eq!(parsed, expected);
    }
}
