//! From logits to the next byte: temperature, top-k, top-p.
//!
//! `cargo run --release -p gla-lm --bin generate -- --temperature 0.7 --top-k 40 --top-p 0.95`

use anyhow::{Result, ensure};
use clap::Args;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::corpus::SEPARATOR;

/// How to choose among the bytes.
#[derive(Args, Clone, Debug)]
pub struct SamplingArgs {
    /// Divides the logits; 0 always takes the likeliest byte
    #[arg(long, default_value_t = 0.8)]
    pub temperature: f32,
    /// Choose among so many likeliest bytes; 0 for all
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    /// Choose among the likeliest bytes that together have this probability; 1 for all
    #[arg(long, default_value_t = 0.95)]
    pub top_p: f32,
    /// Seed of the choices
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
}

impl Default for SamplingArgs {
    fn default() -> Self {
        Self { temperature: 0.8, top_k: 0, top_p: 0.95, seed: 42 }
    }
}

/// Draws bytes.
pub struct Sampler {
    options: SamplingArgs,
    random: StdRng,
}

impl Sampler {
    /// A sampler at the start of its random sequence.
    ///
    /// # Errors
    ///
    /// When the temperature is negative or top-p is not in (0, 1].
    pub fn new(options: SamplingArgs) -> Result<Self> {
        let SamplingArgs { temperature, top_p, .. } = options;
        ensure!(
            temperature >= 0.0 && temperature.is_finite(),
            "--temperature is {temperature}, but must be 0 or more"
        );
        ensure!(
            top_p > 0.0 && top_p <= 1.0,
            "--top-p is {top_p}, but must be above 0 and at most 1"
        );
        let random = StdRng::seed_from_u64(options.seed);
        Ok(Self { options, random })
    }

    /// Choose the next byte. Never the document separator, which is no text.
    ///
    /// # Errors
    ///
    /// When the logits are not finite.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u8> {
        ensure!(
            logits.iter().all(|x| x.is_finite()),
            "the model gives logits that are not finite: its weights are damaged"
        );
        let choices = distribution(logits, &self.options);
        let mut left: f32 = self.random.random();
        for (byte, probability) in &choices {
            left -= probability;
            if left < 0.0 {
                return Ok(*byte);
            }
        }
        // rounding can leave a little over
        Ok(choices.last().map_or(b' ', |choice| choice.0))
    }
}

/// The bytes to choose from with their probabilities, likeliest first; they sum to 1.
fn distribution(logits: &[f32], options: &SamplingArgs) -> Vec<(u8, f32)> {
    let mut choices: Vec<(u8, f32)> =
        (0..=u8::MAX).zip(logits.iter().copied()).filter(|(byte, _)| *byte != SEPARATOR).collect();
    // a stable sort: of equal logits the lower byte comes first, on every machine
    choices.sort_by(|a, b| b.1.total_cmp(&a.1));
    let keep = match (options.temperature == 0.0, options.top_k) {
        (true, _) => 1,
        (false, 0) => choices.len(),
        (false, k) => k.min(choices.len()),
    };
    choices.truncate(keep);
    if keep == 1 {
        return vec![(choices[0].0, 1.0)];
    }

    let best = choices[0].1;
    for choice in &mut choices {
        choice.1 = ((choice.1 - best) / options.temperature).exp();
    }
    normalise(&mut choices);
    if options.top_p < 1.0 {
        let mut sum = 0.0;
        let enough = choices.iter().position(|(_, probability)| {
            sum += probability;
            sum >= options.top_p
        });
        choices.truncate(enough.map_or(choices.len(), |last| last + 1));
        normalise(&mut choices);
    }
    choices
}

fn normalise(choices: &mut [(u8, f32)]) {
    let sum: f32 = choices.iter().map(|choice| choice.1).sum();
    for choice in choices {
        choice.1 /= sum;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Probabilities 1/2, 1/4, 1/8 and 1/8 for the bytes 1, 2, 3 and 4.
    fn logits() -> Vec<f32> {
        let mut logits = vec![-100.0; 256];
        logits[SEPARATOR as usize] = 50.0;
        for (byte, p) in [(1, 0.5_f32), (2, 0.25), (3, 0.125), (4, 0.125)] {
            logits[byte] = p.ln();
        }
        logits
    }

    fn options(temperature: f32, top_k: usize, top_p: f32) -> SamplingArgs {
        SamplingArgs { temperature, top_k, top_p, seed: 7 }
    }

    fn bytes(options: &SamplingArgs) -> Vec<u8> {
        let choices = distribution(&logits(), options);
        let sum: f32 = choices.iter().map(|c| c.1).sum();
        assert!((sum - 1.0).abs() < 1e-5, "{sum}");
        choices.iter().map(|c| c.0).collect()
    }

    #[test]
    fn temperature_zero_takes_the_likeliest() {
        assert_eq!(bytes(&options(0.0, 0, 1.0)), [1]);
        let mut sampler = Sampler::new(options(0.0, 3, 0.1)).unwrap();
        assert!((0..20).all(|_| sampler.sample(&logits()).unwrap() == 1));
        let flat = vec![0.0; 256];
        assert_eq!(sampler.sample(&flat).unwrap(), 1, "the lowest byte of equals");
    }

    #[test]
    fn top_k_keeps_so_many() {
        assert_eq!(bytes(&options(1.0, 1, 1.0)), [1]);
        assert_eq!(bytes(&options(1.0, 3, 1.0)), [1, 2, 3]);
        assert_eq!(bytes(&options(1.0, 0, 1.0)).len(), 255);
        assert_eq!(bytes(&options(1.0, 1000, 1.0)).len(), 255);
    }

    #[test]
    fn top_p_keeps_the_fewest_that_suffice() {
        assert_eq!(bytes(&options(1.0, 0, 0.4)), [1]);
        assert_eq!(bytes(&options(1.0, 0, 0.6)), [1, 2]);
        assert_eq!(bytes(&options(1.0, 0, 0.8)), [1, 2, 3]);
        assert_eq!(bytes(&options(1.0, 0, 1e-9)), [1], "never empty");
    }

    #[test]
    fn temperature_sharpens_and_flattens() {
        let first = |temperature| distribution(&logits(), &options(temperature, 4, 1.0))[0].1;
        assert!((first(1.0) - 0.5).abs() < 1e-5);
        assert!(first(0.5) > 0.7);
        assert!(first(100.0) < 0.26);
        assert!((first(1e-6) - 1.0).abs() < 1e-6, "no NaN at tiny temperatures");
    }

    #[test]
    fn frequencies_follow_the_probabilities_and_the_seed() {
        let draw = |seed| {
            let mut sampler = Sampler::new(SamplingArgs { seed, ..options(1.0, 0, 1.0) }).unwrap();
            let all: Vec<u8> = (0..4000).map(|_| sampler.sample(&logits()).unwrap()).collect();
            all
        };
        let bytes = draw(1);
        assert_eq!(bytes, draw(1));
        assert_ne!(bytes, draw(2));
        let ones = bytes.iter().filter(|b| **b == 1).count();
        assert!((1850..2150).contains(&ones), "{ones} of 4000 for one half");
        assert!(!bytes.contains(&SEPARATOR));
    }

    #[test]
    fn bad_options_and_bad_logits_are_errors() {
        assert!(Sampler::new(options(-1.0, 0, 1.0)).is_err());
        assert!(Sampler::new(options(1.0, 0, 0.0)).is_err());
        assert!(Sampler::new(options(1.0, 0, 1.1)).is_err());
        assert!(Sampler::new(options(f32::NAN, 0, 1.0)).is_err());
        let mut sampler = Sampler::new(options(1.0, 0, 1.0)).unwrap();
        assert!(sampler.sample(&[f32::NAN; 256]).is_err());
    }
}
