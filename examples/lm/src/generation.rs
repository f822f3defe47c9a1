//! A prompt, continued: it is read once, then each sample takes one recurrent step per new token.
//!
//! `cargo run --release -p gla-lm --bin generate -- --prompt "impl Iterator for " --samples 3`
//!
//! The cost of a step does not depend on how much came before: the state has a constant size.

use std::io;
use std::time::{Duration, Instant};

use anyhow::Result;
use gla_burn::{Generator, GlaTransformer, SamplerConfig, TextStream};

use crate::tokenizer::Tokenizer;

/// What to continue, and how far.
#[derive(Clone, Debug)]
pub struct Request {
    /// Text to continue.
    pub prompt: String,
    /// Tokens of a sample at most.
    pub tokens: usize,
    /// Number of continuations, in one batch.
    pub samples: usize,
    /// A sample ends before the first of these.
    pub stop: Vec<String>,
    /// Whether a sample ends where the model would begin another document. If not, it goes on in
    /// this one, unless the tokenizer [always ends](Tokenizer::always_ends).
    pub stop_at_end: bool,
    /// How tokens are drawn. Sample `i` has the seed plus `i`: it is the sample that this seed alone
    /// would give.
    pub sampling: SamplerConfig,
}

/// How long the two phases took.
pub struct Timing {
    /// Tokens of the prompt, with the one that starts a text.
    pub prompt: usize,
    /// Time over the prompt.
    pub prefill: Duration,
    /// Tokens generated, in all samples.
    pub generated: usize,
    /// Time over them.
    pub steps: Duration,
}

impl Timing {
    /// Both speeds, for people.
    pub fn summary(&self) -> String {
        let rate = |n: usize, time: Duration| n as f64 / time.as_secs_f64().max(1e-9);
        format!(
            "prompt: {} tokens at {:.0} tokens/s; generated: {} tokens at {:.0} tokens/s",
            self.prompt,
            rate(self.prompt, self.prefill),
            self.generated,
            rate(self.generated, self.steps),
        )
    }
}

/// Continue a prompt and hand the text to `sink` as it comes, with the number of the sample.
///
/// # Errors
///
/// When an option is out of range, the prompt cannot be encoded, the model's logits are not finite,
/// or `sink` fails.
pub fn generate(
    model: &GlaTransformer,
    tokenizer: &Tokenizer,
    request: &Request,
    mut sink: impl FnMut(usize, &str) -> io::Result<()>,
) -> Result<Timing> {
    let ends = tokenizer.ends();
    let mut samplers = Vec::new();
    for sample in 0..request.samples {
        let mut config = request.sampling.clone();
        config.seed = config.seed.wrapping_add(sample as u64);
        if !request.stop_at_end && !tokenizer.always_ends() {
            // the end is no text
            config.suppress_tokens = ends.to_vec();
        }
        samplers.push(config.init()?);
    }

    let start = Instant::now();
    let prompt = tokenizer.encode(&request.prompt)?;
    let mut generator = Generator::new(model.clone());
    let ids = generator.add(&prompt, samplers);
    let prefill = start.elapsed();

    let start = Instant::now();
    let text = |_| Ok((tokenizer.decoder(&prompt)?, TextStream::new(&request.stop)));
    let mut texts = ids.map(text).collect::<Result<Vec<_>>>()?;
    let mut generated = 0;
    for _ in 0..request.tokens {
        if generator.is_empty() {
            break;
        }
        for (id, token) in generator.step()? {
            generated += 1;
            let (decoder, text) = &mut texts[id];
            let ended = ends.contains(&token);
            if !ended {
                sink(id, &text.push(&decoder.push(token)?))?;
            }
            if ended || text.is_stopped() {
                generator.remove(id);
            }
        }
    }
    for (id, (_, text)) in texts.iter_mut().enumerate() {
        sink(id, &text.finish())?;
    }
    Ok(Timing { prompt: prompt.len(), prefill, generated, steps: start.elapsed() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::corpus::SEPARATOR;
    use crate::device::test_device;
    use burn::tensor::{Int, Tensor, TensorData};
    use gla_burn::GlaTransformerConfig;

    fn model() -> GlaTransformer {
        let config = GlaTransformerConfig::new(256, 16, 2)
            .with_num_heads(2)
            .with_use_short_conv(true)
            .with_initializer_range(0.5);
        config.init(&test_device())
    }

    fn request(prompt: &str, samples: usize) -> Request {
        Request {
            prompt: prompt.to_string(),
            tokens: 12,
            samples,
            stop: Vec::new(),
            stop_at_end: false,
            sampling: SamplerConfig::new().with_seed(3),
        }
    }

    fn texts(model: &GlaTransformer, request: &Request) -> Vec<String> {
        let mut texts = vec![String::new(); request.samples];
        let sink = |sample: usize, part: &str| {
            texts[sample].push_str(part);
            Ok(())
        };
        let timing = generate(model, &Tokenizer::bytes(), request, sink).unwrap();
        assert_eq!(timing.prompt, 1 + request.prompt.len());
        texts
    }

    #[test]
    fn the_text_is_what_whole_passes_would_give() {
        let model = model();
        for prompt in ["", "f", &"a longer prompt, of several chunks. ".repeat(5)] {
            let mut request = request(prompt, 1);
            request.sampling.temperature = 0.0;
            let mut bytes = [&[SEPARATOR], prompt.as_bytes()].concat();
            for _ in 0..request.tokens {
                let ids: Vec<i32> = bytes.iter().copied().map(i32::from).collect();
                let ids = TensorData::new(ids, [1, bytes.len()]);
                let ids = Tensor::<2, Int>::from_data(ids, &test_device());
                let last = model.forward(ids).narrow(1, bytes.len() - 1, 1);
                // the lowest byte is the separator
                let best = last.narrow(2, 1, 255).argmax(2).into_scalar::<i32>() + 1;
                bytes.push(best as u8);
            }
            let expected = String::from_utf8_lossy(&bytes[1 + prompt.len()..]).into_owned();
            assert_eq!(texts(&model, &request), [expected], "{prompt:?}");
        }
    }

    #[test]
    fn samples_are_those_of_their_seeds_and_end_by_themselves() {
        let model = model();
        let together = texts(&model, &request("fn ", 3));
        for (i, text) in together.iter().enumerate() {
            let mut alone = request("fn ", 1);
            alone.sampling.seed += i as u64;
            assert_eq!(texts(&model, &alone)[0], *text);
        }
        assert!(together[0] != together[1] && together[1] != together[2]);

        // a stop string ends one, the others go on
        let (at, stop) = together[1].char_indices().nth(4).expect("some characters");
        let mut request = request("fn ", 3);
        request.stop = vec![stop.to_string()];
        let stopped = texts(&model, &request);
        assert!(stopped[1].len() <= at);
        for (stopped, whole) in stopped.iter().zip(&together) {
            let end = whole.find(stop).unwrap_or(whole.len());
            assert_eq!(*stopped, whole[..end]);
        }
    }

    #[test]
    fn a_sample_may_end_with_its_document() {
        let model = model();
        let mut request = request("", 1);
        // all but the separator are out of the question
        request.sampling.suppress_tokens = (1..256).collect();
        request.stop_at_end = true;
        assert_eq!(texts(&model, &request), [""]);
    }

    #[test]
    fn options_out_of_range_are_errors() {
        let mut request = request("", 1);
        request.sampling.top_p = 1.5;
        let result = generate(&model(), &Tokenizer::bytes(), &request, |_, _| Ok(()));
        let error = result.err().unwrap();
        assert_eq!(error.to_string(), "top_p is 1.5, expected above 0 and at most 1");
    }
}
