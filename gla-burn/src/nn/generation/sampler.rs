use std::collections::BTreeSet;

use burn::config::Config;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Configuration to create a [`Sampler`] using the [init function](SamplerConfig::init): how the
/// next token is drawn from the logits `z` of a model.
///
/// Names, formulas and order are those of Hugging Face's `generate`; each step sees what the one
/// before has left:
///
/// 1. `repetition_penalty` `r`: for each token of the sequence so far, prompt included, `z / r` if
///    `z > 0`, else `z r`
/// 2. `suppress_tokens`: removed
/// 3. `temperature` `T`: `z / T`; at 0, the token with the largest `z` is taken and the rest
///    is moot
/// 4. `top_k`: all below the `k`-th largest `z` are removed
/// 5. `top_p`: with `p = softmax(z)`, the fewest of the likeliest tokens are kept whose `p` sum to
///    `top_p` or more
/// 6. `min_p`: all with `p < min_p max(p)` are removed
///
/// The token is drawn from `softmax(z)` over what is left, which is never empty. Of equal logits the
/// lower token comes first.
#[derive(Config, Debug, PartialEq)]
pub struct SamplerConfig {
    /// Divides the logits; 0 always takes the likeliest token. Default: 1.0
    #[config(default = 1.0)]
    pub temperature: f64,
    /// Draw among so many likeliest tokens, more if the last are equally likely; among all if
    /// `None`.
    pub top_k: Option<usize>,
    /// Draw among the likeliest tokens that together have this probability. Default: 1.0, all
    #[config(default = 1.0)]
    pub top_p: f64,
    /// Draw among tokens at least this likely, relative to the likeliest. Default: 0.0, all
    #[config(default = 0.0)]
    pub min_p: f64,
    /// Makes tokens of the sequence so far less likely if above 1. Default: 1.0
    #[config(default = 1.0)]
    pub repetition_penalty: f64,
    /// Tokens that are never drawn.
    #[config(default = "Vec::new()")]
    pub suppress_tokens: Vec<usize>,
    /// Seed of the draws. Default: 0
    #[config(default = 0)]
    pub seed: u64,
}

/// What can be wrong with sampling.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SamplingError {
    /// A number of the configuration is out of its range.
    #[error("{name} is {found}, expected {expected}")]
    Config {
        /// Name of the field.
        name: &'static str,
        /// Its value.
        found: f64,
        /// The range, in words.
        expected: &'static str,
    },
    /// Logits are infinite or no numbers: the model is damaged.
    #[error("the logit of token {token} is {logit}, expected a finite number")]
    Logit {
        /// The first such token.
        token: usize,
        /// Its logit.
        logit: f32,
    },
    /// Nothing can be drawn: there are no logits, or all their tokens are suppressed.
    #[error("all of {vocab} tokens are suppressed")]
    Empty {
        /// Number of logits.
        vocab: usize,
    },
}

impl SamplerConfig {
    /// A sampler at the start of its random sequence.
    ///
    /// # Errors
    ///
    /// [`SamplingError::Config`] if a field is out of range.
    pub fn init(self) -> Result<Sampler, SamplingError> {
        let fields = [
            ("temperature", self.temperature, 0.0..=f64::MAX, "0 or more"),
            ("top_p", self.top_p, f64::MIN_POSITIVE..=1.0, "above 0 and at most 1"),
            ("min_p", self.min_p, 0.0..=1.0, "from 0 to 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                f64::MIN_POSITIVE..=f64::MAX,
                "above 0",
            ),
        ];
        for (name, found, range, expected) in fields {
            if !range.contains(&found) {
                return Err(SamplingError::Config { name, found, expected });
            }
        }
        if self.top_k == Some(0) {
            return Err(SamplingError::Config { name: "top_k", found: 0.0, expected: "1 or more" });
        }
        let random = StdRng::seed_from_u64(self.seed);
        Ok(Sampler { config: self, random, seen: BTreeSet::new() })
    }
}

/// Draws the tokens of one sequence.
///
/// Should be created using [`SamplerConfig`].
#[derive(Debug)]
pub struct Sampler {
    config: SamplerConfig,
    random: StdRng,
    /// Tokens of the sequence, for the repetition penalty.
    seen: BTreeSet<usize>,
}

/// A token that may be drawn, with its logit, later its probability.
type Candidate = (usize, f64);

impl Sampler {
    /// Takes note of tokens of the sequence that are not drawn, for the repetition penalty: the
    /// prompt.
    pub fn observe(&mut self, tokens: &[usize]) {
        self.seen.extend(tokens);
    }

    /// Draws the next token.
    ///
    /// # Errors
    ///
    /// [`SamplingError::Logit`] if a logit is not finite, [`SamplingError::Empty`] if no token may
    /// be drawn.
    pub fn sample(&mut self, logits: &[f32]) -> Result<usize, SamplingError> {
        let candidates = self.distribution(logits)?;
        let mut left: f64 = self.random.random();
        let drawn = candidates.iter().find(|(_, probability)| {
            left -= probability;
            left < 0.0
        });
        // rounding can leave a little over
        let (token, _) = drawn.or(candidates.last()).expect("a distribution is not empty");
        self.seen.insert(*token);
        Ok(*token)
    }

    /// The tokens that can be drawn, likeliest first, with their probabilities, which sum to 1.
    ///
    /// # Errors
    ///
    /// As [`sample`](Self::sample).
    pub fn distribution(&self, logits: &[f32]) -> Result<Vec<(usize, f64)>, SamplingError> {
        let config = &self.config;
        let mut candidates = self.candidates(logits)?;
        if config.temperature == 0.0 {
            let best = candidates.into_iter().min_by(likelier).expect("checked not to be empty");
            return Ok(vec![(best.0, 1.0)]);
        }
        if let Some(k) = config.top_k.filter(|&k| k < candidates.len()) {
            let (_, &mut (_, least), _) = candidates.select_nth_unstable_by(k - 1, likelier);
            candidates.retain(|&(_, logit)| logit >= least);
        }
        candidates.sort_unstable_by(likelier);

        let best = candidates[0].1;
        for (_, logit) in &mut candidates {
            // of differences: a small temperature must not overflow
            *logit = ((*logit - best) / config.temperature).exp();
        }
        normalize(&mut candidates);
        if config.top_p < 1.0 {
            let mut likelier = 0.0;
            candidates.retain(|(_, probability)| {
                let keep = likelier < config.top_p;
                likelier += probability;
                keep
            });
        }
        let least = config.min_p * candidates[0].1;
        candidates.retain(|&(_, probability)| probability >= least);
        normalize(&mut candidates);
        Ok(candidates)
    }

    /// Logits after the repetition penalty, of the tokens that are not suppressed.
    fn candidates(&self, logits: &[f32]) -> Result<Vec<Candidate>, SamplingError> {
        if let Some(token) = logits.iter().position(|logit| !logit.is_finite()) {
            return Err(SamplingError::Logit { token, logit: logits[token] });
        }
        let penalty = self.config.repetition_penalty;
        let mut penalized: Vec<f64> = logits.iter().copied().map(f64::from).collect();
        if penalty != 1.0 {
            for &token in self.seen.range(..logits.len()) {
                let logit = &mut penalized[token];
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
        let mut candidates: Vec<Candidate> = penalized.into_iter().enumerate().collect();
        if !self.config.suppress_tokens.is_empty() {
            candidates.retain(|(token, _)| !self.config.suppress_tokens.contains(token));
        }
        match candidates.is_empty() {
            true => Err(SamplingError::Empty { vocab: logits.len() }),
            false => Ok(candidates),
        }
    }
}

/// The order of falling logits, then of rising tokens.
fn likelier(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

fn normalize(candidates: &mut [Candidate]) {
    let sum: f64 = candidates.iter().map(|candidate| candidate.1).sum();
    candidates.iter_mut().for_each(|candidate| candidate.1 /= sum);
}
