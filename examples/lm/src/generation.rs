//! A prompt, continued: one prefill over all of its bytes, then one recurrent step per new byte.
//!
//! `cargo run --release -p gla-lm --bin generate -- --prompt "impl Iterator for " --tokens 400`
//!
//! The cost of a step does not depend on how much came before: the state has a constant size.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use burn::tensor::{Device, Int, Tensor, TensorData};
use gla_burn::GlaTransformer;

use crate::corpus::SEPARATOR;
use crate::sampling::Sampler;

/// How long the two phases took.
pub struct Timing {
    /// Bytes of the prompt, with the separator before it.
    pub prompt: usize,
    /// Time over the prompt.
    pub prefill: Duration,
    /// Bytes generated.
    pub generated: usize,
    /// Time over them.
    pub steps: Duration,
}

impl Timing {
    /// Both speeds, for people.
    pub fn summary(&self) -> String {
        let rate = |n: usize, time: Duration| n as f64 / time.as_secs_f64().max(1e-9);
        format!(
            "prompt: {} bytes at {:.0} bytes/s; generated: {} bytes at {:.0} bytes/s",
            self.prompt,
            rate(self.prompt, self.prefill),
            self.generated,
            rate(self.generated, self.steps),
        )
    }
}

/// Continue `prompt` by `tokens` bytes and hand the text to `sink` as it comes.
///
/// # Errors
///
/// When the model's logits are not finite, or `sink` fails.
pub fn generate(
    model: &GlaTransformer,
    prompt: &str,
    tokens: usize,
    sampler: &mut Sampler,
    device: &Device,
    mut sink: impl FnMut(&str) -> std::io::Result<()>,
) -> Result<Timing> {
    let start = Instant::now();
    let ids: Vec<i32> = std::iter::once(SEPARATOR).chain(prompt.bytes()).map(i32::from).collect();
    let prompt = ids.len();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, prompt]), device);
    let mut state = model.init_state(1, device);
    // only the last position is sampled from, so only it is projected
    let last = model.prefill_hidden(ids, &mut state).narrow(1, prompt - 1, 1);
    let mut logits = read(model.logits(last).flatten(0, 2))?;
    let prefill = start.elapsed();

    let start = Instant::now();
    let mut text = Utf8Stream::default();
    for done in 1..=tokens {
        let byte = sampler.sample(&logits)?;
        sink(&text.push(byte))?;
        if done < tokens {
            let id =
                Tensor::<1, Int>::from_data(TensorData::new(vec![i32::from(byte)], [1]), device);
            logits = read(model.step(id, &mut state).flatten(0, 1))?;
        }
    }
    sink(&text.finish())?;
    Ok(Timing { prompt, prefill, generated: tokens, steps: start.elapsed() })
}

fn read(logits: Tensor<1>) -> Result<Vec<f32>> {
    logits.try_into_vec_as::<f32>().context("cannot read the logits from the device")
}

/// Bytes in, whole characters out. Bytes that are no UTF-8 come out as U+FFFD.
#[derive(Default)]
pub struct Utf8Stream {
    pending: Vec<u8>,
}

impl Utf8Stream {
    /// Text that `byte` completes, often one character, empty within a longer one.
    pub fn push(&mut self, byte: u8) -> String {
        self.pending.push(byte);
        let mut text = String::new();
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    rest = after;
                    // no length: the last character may still be completed
                    let Some(bad) = error.error_len() else { break };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[bad..];
                }
            }
        }
        self.pending = rest.to_vec();
        text
    }

    /// What is left of a character that was never completed.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::test_device;
    use crate::sampling::SamplingArgs;
    use gla_burn::GlaTransformerConfig;

    #[test]
    fn the_text_is_what_whole_passes_would_give() {
        let device = test_device();
        device.seed(5);
        let config = GlaTransformerConfig::new(256, 16, 2)
            .with_num_heads(2)
            .with_use_short_conv(true)
            .with_initializer_range(0.5);
        let model = config.init(&device);
        let greedy = || Sampler::new(SamplingArgs { temperature: 0.0, ..Default::default() });
        for prompt in ["", "f", &"a longer prompt, of several chunks. ".repeat(5)] {
            let mut text = String::new();
            let sink = |part: &str| {
                text.push_str(part);
                Ok(())
            };
            let timing = generate(&model, prompt, 12, &mut greedy().unwrap(), &device, sink);
            assert_eq!(timing.unwrap().prompt, 1 + prompt.len());

            let mut bytes = [&[SEPARATOR], prompt.as_bytes()].concat();
            for _ in 0..12 {
                let ids: Vec<i32> = bytes.iter().copied().map(i32::from).collect();
                let ids = TensorData::new(ids, [1, bytes.len()]);
                let logits = model.forward(Tensor::from_data(ids, &device));
                let last = logits.narrow(1, bytes.len() - 1, 1).flatten(0, 2);
                bytes.push(greedy().unwrap().sample(&read(last).unwrap()).unwrap());
            }
            assert_eq!(text, String::from_utf8_lossy(&bytes[1 + prompt.len()..]), "{prompt:?}");
        }
    }

    fn stream(bytes: &[u8]) -> (Vec<String>, String) {
        let mut stream = Utf8Stream::default();
        let parts = bytes.iter().map(|b| stream.push(*b)).collect();
        (parts, stream.finish())
    }

    #[test]
    fn characters_come_out_whole() {
        let (parts, rest) = stream("aé€😀".as_bytes());
        assert_eq!(parts, ["a", "", "é", "", "", "€", "", "", "", "😀"]);
        assert_eq!(rest, "");
    }

    #[test]
    fn any_bytes_come_out_as_the_lossy_text() {
        let samples: [&[u8]; 5] =
            [b"\xff", b"a\xe2\x82b", b"\xf0\x9f\x98", b"\xc3\xc3\xa9\x80", b"ok \xed\xa0\x80 \xc3"];
        for bytes in samples {
            let (parts, rest) = stream(bytes);
            assert_eq!(parts.concat() + &rest, String::from_utf8_lossy(bytes));
        }
    }
}
