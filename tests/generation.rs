//! Sampling against a naive one, streams of text against whole texts, and sequences in one batch
//! against each alone.
//!
//! `cargo nextest run --release --workspace -E 'binary(generation)'`
#![cfg(feature = "flex")]

use std::sync::LazyLock;

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use gla_burn::{
    Generator, GlaState, GlaTransformer, GlaTransformerConfig, HybridAttention,
    HybridAttentionSpec, Sampler, SamplerConfig, SamplingError, TextStream,
};
use proptest::prelude::*;

/// Probabilities of all tokens, each step a pass over all of them.
fn naive(logits: &[f32], seen: &[usize], config: &SamplerConfig) -> Vec<f64> {
    let penalty = config.repetition_penalty;
    let mut z: Vec<f64> = logits.iter().copied().map(f64::from).collect();
    for (token, z) in z.iter_mut().enumerate() {
        if seen.contains(&token) {
            *z = if *z > 0.0 { *z / penalty } else { *z * penalty };
        }
        if config.suppress_tokens.contains(&token) {
            *z = f64::NEG_INFINITY;
        }
    }
    if config.temperature == 0.0 {
        let best = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let first = z.iter().position(|&z| z == best);
        return (0..z.len()).map(|token| f64::from(Some(token) == first)).collect();
    }
    z.iter_mut().for_each(|z| *z /= config.temperature);
    if let Some(k) = config.top_k {
        let mut sorted = z.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let least = sorted[k.min(z.len()) - 1];
        z.iter_mut().filter(|z| **z < least).for_each(|z| *z = f64::NEG_INFINITY);
    }
    let p = softmax(&z);
    for token in 0..z.len() {
        let before =
            |other: &usize| p[*other] > p[token] || (p[*other] == p[token] && *other < token);
        let likelier: f64 = (0..z.len()).filter(before).map(|other| p[other]).sum();
        if likelier >= config.top_p {
            z[token] = f64::NEG_INFINITY;
        }
    }
    let p = softmax(&z);
    let best = p.iter().copied().fold(0.0, f64::max);
    for (z, p) in z.iter_mut().zip(p) {
        if p < config.min_p * best {
            *z = f64::NEG_INFINITY;
        }
    }
    softmax(&z)
}

fn softmax(z: &[f64]) -> Vec<f64> {
    let best = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exp: Vec<f64> = z.iter().map(|z| (z - best).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.into_iter().map(|exp| exp / sum).collect()
}

fn configs() -> impl Strategy<Value = SamplerConfig> {
    let temperature = prop_oneof![Just(0.0), 0.05..3.0];
    let top_k = proptest::option::of(1usize..12);
    let top_p = prop_oneof![Just(1.0), 0.01..1.0];
    let min_p = prop_oneof![Just(0.0), 0.0..0.6];
    let penalty = prop_oneof![Just(1.0), 0.5..2.0];
    let suppressed = proptest::collection::vec(1usize..50, 0..4);
    (temperature, top_k, top_p, min_p, penalty, suppressed, any::<u64>()).prop_map(
        |(temperature, top_k, top_p, min_p, penalty, suppressed, seed)| {
            SamplerConfig::new()
                .with_temperature(temperature)
                .with_top_k(top_k)
                .with_top_p(top_p)
                .with_min_p(min_p)
                .with_repetition_penalty(penalty)
                .with_suppress_tokens(suppressed)
                .with_seed(seed)
        },
    )
}

/// Bytes of which some are whole characters and some are not, and stop strings that occur in them.
fn streams() -> impl Strategy<Value = (Vec<Vec<u8>>, Vec<String>)> {
    let bytes = proptest::sample::select(b"aab\n\xc3\xa9\xe2\x82\xac\xf0\x9f\xff".to_vec());
    let tokens = proptest::collection::vec(proptest::collection::vec(bytes, 0..4), 0..30);
    let character = proptest::sample::select(vec!["a", "b", "\n", "é", "€", "\u{fffd}"]);
    let stop = proptest::collection::vec(character, 0..4).prop_map(|parts| parts.concat());
    (tokens, proptest::collection::vec(stop, 0..3))
}

proptest! {
    #[test]
    fn probabilities_are_those_of_the_formulas(
        logits in proptest::collection::vec(-9.0f32..9.0, 1..40),
        seen in proptest::collection::vec(0usize..40, 0..10),
        config in configs(),
    ) {
        let mut sampler = config.clone().init().unwrap();
        sampler.observe(&seen);
        let found = sampler.distribution(&logits).unwrap();
        prop_assert!(found.windows(2).all(|pair| pair[0].1 >= pair[1].1), "likeliest first");
        let expected = naive(&logits, &seen, &config);
        let mut all = vec![0.0; logits.len()];
        found.iter().for_each(|&(token, probability)| all[token] = probability);
        for (token, (found, expected)) in all.iter().zip(&expected).enumerate() {
            prop_assert!((found - expected).abs() < 1e-9, "{token}: {found}, expected {expected}");
        }
        let drawn = sampler.sample(&logits).unwrap();
        prop_assert!(expected[drawn] > 0.0);
    }

    #[test]
    fn streamed_text_is_the_whole_text_up_to_the_first_stop((tokens, stop) in streams()) {
        let text = String::from_utf8_lossy(&tokens.concat()).into_owned();
        let found = stop.iter().filter(|stop| !stop.is_empty()).filter_map(|stop| {
            text.find(stop.as_str()).map(|start| (start + stop.len(), start))
        });
        let expected = found.min().map_or(text.as_str(), |(_, start)| &text[..start]);

        let longest = stop.iter().map(String::len).max().unwrap_or(0);
        let mut stream = TextStream::new(stop);
        let (mut bytes, mut streamed) = (Vec::new(), String::new());
        for token in tokens {
            bytes.extend_from_slice(&token);
            streamed += &stream.push(&token);
            prop_assert!(expected.starts_with(&streamed));
            // at most a part of a stop string is held back, and a part of a character
            let whole = bytes.utf8_chunks().map(|chunk| chunk.valid().len()).sum::<usize>();
            prop_assert!(stream.is_stopped() || streamed.len() + longest >= whole);
        }
        streamed += &stream.finish();
        prop_assert_eq!(streamed, expected);
        prop_assert_eq!(stream.push(b"more") + &stream.finish(), "");
    }
}

#[test]
fn characters_come_out_whole() {
    let mut stream = TextStream::new(["\n\n"]);
    let parts: Vec<String> = "aé€😀\nb\n\nc".bytes().map(|byte| stream.push(&[byte])).collect();
    let expected = ["a", "", "é", "", "", "€", "", "", "", "😀", "", "\nb", "", "", ""];
    assert_eq!(parts, expected);
    assert!(stream.is_stopped());
    assert_eq!(stream.finish(), "");
}

#[test]
fn draws_follow_the_probabilities_and_the_seed() {
    let logits = [0.5f32, 0.25, 0.125, 0.125].map(f32::ln);
    let draw = |seed| -> Vec<usize> {
        let mut sampler = SamplerConfig::new().with_seed(seed).init().unwrap();
        (0..4000).map(|_| sampler.sample(&logits).unwrap()).collect()
    };
    let tokens = draw(1);
    assert_eq!(tokens, draw(1));
    assert_ne!(tokens, draw(2));
    for (token, expected) in [2000, 1000, 500, 500].into_iter().enumerate() {
        let found = tokens.iter().filter(|&&drawn| drawn == token).count();
        // five standard deviations
        assert!(found.abs_diff(expected) < 160, "{token}: {found}, expected {expected}");
    }
}

#[test]
fn bad_configurations_and_bad_logits_are_errors() {
    let new = SamplerConfig::new;
    for (config, message) in [
        (new().with_temperature(-1.0), "temperature is -1, expected 0 or more"),
        (new().with_temperature(f64::NAN), "temperature is NaN, expected 0 or more"),
        (new().with_top_k(Some(0)), "top_k is 0, expected 1 or more"),
        (new().with_top_p(0.0), "top_p is 0, expected above 0 and at most 1"),
        (new().with_min_p(1.5), "min_p is 1.5, expected from 0 to 1"),
        (new().with_repetition_penalty(0.0), "repetition_penalty is 0, expected above 0"),
    ] {
        assert_eq!(config.init().unwrap_err().to_string(), message);
    }
    let mut sampler = new().with_suppress_tokens(vec![0, 1]).init().unwrap();
    let error = sampler.sample(&[0.0, 1.0, f32::NAN]).unwrap_err().to_string();
    assert_eq!(error, "the logit of token 2 is NaN, expected a finite number");
    assert_eq!(sampler.sample(&[0.0, 1.0]), Err(SamplingError::Empty { vocab: 2 }));
    assert_eq!(sampler.sample(&[9.0, 9.0, -9.0]), Ok(2));

    // the exponents of a temperature this small would overflow
    let sampler = new().with_temperature(1e-300).init().unwrap();
    assert_eq!(sampler.distribution(&[1.0, 700.0]).unwrap()[0], (1, 1.0));
}

const VOCAB: usize = 23;

/// The same model for all tests.
fn model() -> GlaTransformer {
    static MODEL: LazyLock<GlaTransformer> = LazyLock::new(|| {
        let device = Device::flex();
        device.seed(5);
        let config = GlaTransformerConfig::new(VOCAB, 16, 2)
            .with_num_heads(2)
            .with_use_short_conv(true)
            .with_initializer_range(0.5);
        // parameters are drawn in the order of their first use, if not here
        config.init(&device).materialize()
    });
    MODEL.clone()
}

fn prompt(len: usize) -> Vec<usize> {
    (0..len).map(|i| i * i % VOCAB).collect()
}

fn sampler(seed: u64) -> Sampler {
    let config = SamplerConfig::new().with_temperature(0.9).with_repetition_penalty(1.1);
    config.with_seed(seed).init().unwrap()
}

/// The next `tokens` tokens of one sequence by itself.
fn alone(prompt: &[usize], sampler: Sampler, tokens: usize) -> Vec<usize> {
    let mut generator = Generator::new(model());
    generator.add(prompt, vec![sampler]);
    (0..tokens).map(|_| generator.step().unwrap()[0].1).collect()
}

#[test]
fn the_tokens_are_those_of_whole_passes() {
    let (device, model) = (Device::flex(), model());
    let greedy = SamplerConfig::new().with_temperature(0.0);
    // up to two tokens around the end of a piece of the prompt
    for len in [1, 2, 70, 1024, 1025, 1026, 2100] {
        let mut tokens = prompt(len);
        for _ in 0..4 {
            let ids: Vec<i32> = tokens.iter().map(|&token| token as i32).collect();
            let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, tokens.len()]), &device);
            let last = model.forward(ids).narrow(1, tokens.len() - 1, 1);
            tokens.push(last.argmax(2).into_scalar::<i32>() as usize);
        }
        let found = alone(&tokens[..len], greedy.clone().init().unwrap(), 4);
        assert_eq!(found, tokens[len..], "after {len} tokens");
    }
}

#[test]
fn sequences_of_a_batch_are_as_if_alone() {
    let mut generator = Generator::new(model());
    assert!(generator.is_empty());
    assert_eq!(generator.step().unwrap(), []);

    let mut found = vec![Vec::new(); 5];
    let mut steps = |generator: &mut Generator, n: usize| {
        for _ in 0..n {
            for (id, token) in generator.step().unwrap() {
                found[id].push(token);
            }
        }
    };
    assert_eq!(generator.add(&prompt(9), vec![sampler(1)]), 0..1);
    steps(&mut generator, 3);
    // one prefix in three continuations
    assert_eq!(generator.add(&prompt(40), vec![sampler(2), sampler(3), sampler(4)]), 1..4);
    steps(&mut generator, 5);
    let (state, token) = generator.remove(2).unwrap();
    assert!(generator.remove(2).is_none());
    assert_eq!(state.seen(), [40 - 1 + 5]);
    generator.remove(0).unwrap();
    assert_eq!(generator.len(), 2);
    steps(&mut generator, 4);
    // the sequence goes on with its state and another sampler
    assert_eq!(generator.resume(state, token, vec![sampler(9)]), 4..5);
    steps(&mut generator, 6);
    for id in [1, 3, 4] {
        generator.remove(id).unwrap();
    }
    assert!(generator.is_empty());

    assert_eq!(found[0], alone(&prompt(9), sampler(1), 8));
    assert_eq!(found[1], alone(&prompt(40), sampler(2), 15));
    assert_eq!(found[2], alone(&prompt(40), sampler(3), 5));
    assert_eq!(found[3], alone(&prompt(40), sampler(4), 15));
    // the other sampler has not seen what came before: nor has this one
    let mut other = Generator::new(model());
    let past = [prompt(40), found[2].clone()].concat();
    other.add(&past, vec![sampler(9)]);
    let first = other.remove(0).map(|(state, token)| other.resume(state, token, vec![sampler(9)]));
    assert_eq!(first, Some(1..2));
    let again: Vec<usize> = (0..6).map(|_| other.step().unwrap()[0].1).collect();
    assert_eq!(found[4], again);
}

/// Layers of softmax attention remember every token, so sequences of a batch differ in length.
#[test]
fn hybrid_models_are_continued_too() {
    let device = Device::flex();
    let spec = HybridAttentionSpec::new(vec![1], 2);
    let config = GlaTransformerConfig::new(VOCAB, 16, 2)
        .with_num_heads(2)
        .with_attn(Some(HybridAttention(vec![spec])))
        .with_initializer_range(0.5);
    let model = config.init(&device).materialize();
    let run = |prompts: &[usize], steps: usize| {
        let mut generator = Generator::new(model.clone());
        let mut found = vec![Vec::new(); prompts.len()];
        for (i, &len) in prompts.iter().enumerate() {
            generator.add(&prompt(len), vec![sampler(len as u64)]);
            for _ in 0..if i + 1 == prompts.len() { steps } else { 2 } {
                generator.step().unwrap().into_iter().for_each(|(id, t)| found[id].push(t));
            }
        }
        found
    };
    let together = run(&[3, 1, 30], 6);
    for (i, (len, steps)) in [(3, 10), (1, 8), (30, 6)].into_iter().enumerate() {
        assert_eq!(together[i], run(&[len], steps)[0], "prompt of {len}");
    }
}

/// What nobody reads any more is forgotten, though some sequence is always running.
#[test]
fn a_batch_remembers_no_more_than_its_longest_sequence() {
    let device = Device::flex();
    let spec = HybridAttentionSpec::new(vec![1], 2);
    let config = GlaTransformerConfig::new(VOCAB, 16, 2)
        .with_num_heads(2)
        .with_attn(Some(HybridAttention(vec![spec])));
    let model = config.init(&device).materialize();
    let remembered = |state: &GlaState| state.layers[1].keys.as_ref().map_or(0, |k| k.dims()[1]);

    let mut generator = Generator::new(model.clone());
    let mut running = generator.add(&prompt(3), vec![sampler(0)]).start;
    for seed in 1..20 {
        let next = generator.add(&prompt(4), vec![sampler(seed)]).start;
        (0..5).for_each(|_| drop(generator.step().unwrap()));
        let (state, _) = generator.remove(running).unwrap();
        assert_eq!(remembered(&state), state.seen()[0], "removed after {seed} others");
        running = next;
    }

    // slots of a state, one of which is always in use
    let mut slots = model.init_state(2, &device);
    for round in 0..20 {
        slots.reset(round % 2);
        for _ in 0..5 {
            model.step(Tensor::from_data([1, 2], &device), &mut slots);
        }
        let longest = *slots.seen().iter().max().unwrap();
        assert_eq!(remembered(&slots), longest, "round {round}");
        assert!(longest <= 10);
    }
}

#[test]
#[should_panic(expected = "Generator: token is 23, the vocabulary has 23")]
fn a_last_token_of_another_vocabulary_is_refused() {
    let mut generator = Generator::new(model());
    let state = model().init_state(1, &Device::flex());
    generator.resume(state, VOCAB, vec![sampler(0)]);
}

#[test]
#[should_panic(expected = "Generator: token 23 of the prompt, the vocabulary has 23")]
fn a_prompt_of_other_tokens_is_refused() {
    Generator::new(model()).add(&[1, VOCAB], vec![sampler(0)]);
}

#[test]
#[should_panic(expected = "Generator: prompt must hold at least 1 token, got 0")]
fn an_empty_prompt_is_refused() {
    Generator::new(model()).add(&[], vec![sampler(0)]);
}

#[test]
#[should_panic(expected = "Generator: a sequence goes on from a state of 1, got 2")]
fn a_state_of_two_sequences_is_refused() {
    let model = model();
    let state = model.init_state(2, &Device::flex());
    Generator::new(model).resume(state, 0, vec![sampler(0)]);
}
