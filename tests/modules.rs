//! The layer against a naive one in f64, the model against itself in pieces, and what surrounds
//! them: names, sizes, states on disk, gradients.
//!
//! `cargo nextest run --release --workspace -E 'binary(modules)'`

#![cfg(feature = "flex")]

#[path = "modules/configs.rs"]
mod configs;
#[path = "modules/layouts.rs"]
mod layouts;
#[path = "modules/mixers.rs"]
mod mixers;
#[path = "modules/naive.rs"]
mod naive;
#[path = "modules/numerics.rs"]
mod numerics;
#[path = "modules/states.rs"]
mod states;

use std::cell::RefCell;
use std::ops::Range;

use burn::config::Config;
use burn::module::{Module, ModuleMapper, Param};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::store::{BurnToPyTorchAdapter, ModuleSnapshot};
use burn::tensor::{DType, Device, Int, Tensor, TensorCreationOptions, TensorData};
use gla_burn::{
    FeatureMap, GatedLinearAttentionConfig, GlaTransformerConfig, MixerConfig, fla_name,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const VOCAB: usize = 11;

fn config() -> GlaTransformerConfig {
    GlaTransformerConfig::new(VOCAB, 32, 2)
        .with_intermediate_size(Some(48))
        .with_initializer_range(0.2)
}

/// The attention layer of a model of gated linear attention.
fn gla(config: &GlaTransformerConfig) -> GatedLinearAttentionConfig {
    match config.block(0).attn {
        MixerConfig::Gla(config) => config,
        other => panic!("{other:?}"),
    }
}

/// One case per switch, and all of them together.
fn cases() -> Vec<(&'static str, GlaTransformerConfig)> {
    let all = config()
        .with_use_short_conv(true)
        .with_num_kv_heads(Some(1))
        .with_use_output_gate(false)
        .with_clamp_min(Some(-0.05))
        .with_feature_map(Some(FeatureMap::Silu))
        .with_tie_word_embeddings(true);
    vec![
        ("default", config()),
        ("short conv", config().with_use_short_conv(true)),
        ("conv of one", config().with_use_short_conv(true).with_conv_size(1)),
        ("grouped heads", config().with_num_kv_heads(Some(2))),
        ("no output gate", config().with_use_output_gate(false)),
        ("clamped gate", config().with_clamp_min(Some(-0.04))),
        ("strong gate", config().with_gate_logit_normalizer(0.1)),
        ("squared relu", config().with_feature_map(Some(FeatureMap::SqRelu))),
        ("wide values", config().with_expand_k(1.0).with_expand_v(0.5)),
        ("all", all),
    ]
}

thread_local! {
    /// Burn's own generator is shared by the tests of a process, so its draws depend on their
    /// order.
    static DRAWS: RefCell<StdRng> = RefCell::new(StdRng::seed_from_u64(42));
}

fn draw<const D: usize>(
    shape: [usize; D],
    range: Range<f32>,
    options: impl Into<TensorCreationOptions>,
) -> Tensor<D> {
    let next = || DRAWS.with_borrow_mut(|rng| rng.random_range(range.clone()));
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
    Tensor::from_data(TensorData::new(values, shape), options)
}

fn ids(shape: [usize; 2], device: &Device) -> Tensor<2, Int> {
    draw(shape, 0.0..VOCAB as f32, device).int()
}

struct Drawn;

impl ModuleMapper for Drawn {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        // norms and biases are the vectors
        let range = if D == 1 { 0.7..1.3 } else { -0.35..0.35 };
        param.map(|tensor| {
            let drawn = draw(tensor.dims(), range, (&tensor.device(), tensor.dtype()));
            match tensor.is_require_grad() {
                true => drawn.require_grad(),
                false => drawn,
            }
        })
    }
}

/// Redraws the parameters, norms included.
fn drawn<M: Module>(module: M) -> M {
    module.map(&mut Drawn)
}

fn assert_close<const D: usize>(name: &str, found: Tensor<D>, expected: Tensor<D>, tolerance: f32) {
    let scale = expected.clone().abs().max().into_scalar::<f32>().max(1.0);
    let error = (found - expected).abs().max().into_scalar::<f32>();
    assert!(error <= tolerance * scale, "{name}: error {error}, scale {scale}");
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.cast(DType::F64).into_data().try_to_vec().unwrap()
}

#[test]
fn rows_are_independent_and_causal() {
    let device = Device::flex();
    let model = drawn(cases().pop().unwrap().1.init(&device));
    let ids = ids([3, 90], &device);
    let logits = model.forward(ids.clone());
    for row in 0..3 {
        let alone = model.forward(ids.clone().narrow(0, row, 1));
        assert_close("row", alone, logits.clone().narrow(0, row, 1), 1e-5);
    }

    let other = (ids.clone().narrow(1, 40, 1) + 1).remainder_scalar(VOCAB as i32);
    let changed = ids.clone().slice_assign([0..3, 40..41], other);
    let changed = model.forward(changed);
    let difference = (changed - logits).abs();
    assert_eq!(difference.clone().narrow(1, 0, 40).max().into_scalar::<f32>(), 0.0);
    assert!(difference.narrow(1, 40, 50).max().into_scalar::<f32>() > 1e-3);
}

#[test]
#[should_panic(expected = "axis 2 expected 32, got 31")]
fn input_width_must_match() {
    let layer = GatedLinearAttentionConfig::new(32).init(&Device::flex());
    layer.forward(Tensor::zeros([1, 5, 31], &Device::flex()));
}

#[test]
#[should_panic(
    expected = "hidden_size * expand_k = 30 * 0.5 = 15 must be a positive multiple of num_heads = 4"
)]
fn heads_must_divide_the_keys() {
    GatedLinearAttentionConfig::new(30).init(&Device::flex());
}

#[test]
#[should_panic(expected = "num_heads = 4 must be a multiple of num_kv_heads = 3")]
fn kv_heads_must_divide_the_heads() {
    let config = GatedLinearAttentionConfig::new(32).with_num_kv_heads(Some(3));
    config.init(&Device::flex());
}

#[test]
#[should_panic(expected = "GatedLinearAttention: the state is of 2 sequences, expected 3")]
fn state_must_be_of_the_batch() {
    let model = config().init(&Device::flex());
    let mut state = model.init_state(2, &Device::flex());
    model.prefill(ids([3, 5], &Device::flex()), &mut state);
}

#[test]
fn parameters_are_named_and_shaped_as_in_fla() {
    let mut config = config().with_num_kv_heads(Some(2)).with_use_short_conv(true);
    config.num_hidden_layers = 1;
    let layer = [
        ("attn.gk_proj.0.weight", vec![16, 32]),
        ("attn.gk_proj.1.bias", vec![8]),
        ("attn.gk_proj.1.weight", vec![8, 16]),
        ("attn.k_conv1d.weight", vec![8, 1, 4]),
        ("attn.k_proj.weight", vec![8, 32]),
        ("attn.o_proj.weight", vec![32, 32]),
        ("attn.q_conv1d.weight", vec![16, 1, 4]),
        ("attn.q_proj.weight", vec![16, 32]),
        ("attn.v_conv1d.weight", vec![16, 1, 4]),
        ("attn.v_proj.weight", vec![16, 32]),
        ("attn_norm.weight", vec![32]),
        ("mlp.down_proj.weight", vec![32, 48]),
        ("mlp.gate_proj.weight", vec![48, 32]),
        ("mlp.up_proj.weight", vec![48, 32]),
        ("mlp_norm.weight", vec![32]),
    ];
    for (gated, tied) in [(true, false), (false, true)] {
        let layer = layer.iter().map(|(n, s)| (format!("model.layers.0.{n}"), s.clone()));
        let mut expected: Vec<_> = layer.collect();
        expected.push(("model.embeddings.weight".into(), vec![VOCAB, 32]));
        expected.push(("model.norm.weight".into(), vec![32]));
        if gated {
            expected.push(("model.layers.0.attn.g_proj.weight".into(), vec![32, 32]));
            expected.push(("model.layers.0.attn.g_norm_swish_gate.weight".into(), vec![8]));
        } else {
            expected.push(("model.layers.0.attn.g_norm.weight".into(), vec![8]));
        }
        if !tied {
            expected.push(("lm_head.weight".into(), vec![VOCAB, 32]));
        }
        expected.sort();

        let config = config.clone().with_use_output_gate(gated).with_tie_word_embeddings(tied);
        let model = config.init(&Device::flex());
        // the kind of mixer must not show, also where enum variants are not skipped
        let tensors = model.collect(None, Some(Box::new(BurnToPyTorchAdapter)), false);
        let mut found: Vec<_> =
            tensors.iter().map(|t| (fla_name(&t.name), t.shape.to_vec())).collect();
        found.sort();
        assert_eq!(found, expected);
    }
}

#[test]
fn sizes_of_the_published_models() {
    let tied = GlaTransformerConfig::gla_340m();
    let small = tied.clone().with_tie_word_embeddings(false);
    let mistral = GlaTransformerConfig::new(32000, 4096, 32)
        .with_num_heads(32)
        .with_num_kv_heads(Some(8))
        .with_expand_k(1.0)
        .with_intermediate_size(Some(14336))
        .with_use_output_gate(false);
    let counts = [341_707_776, 1_365_514_240, 2_703_583_744];
    for (name, count) in GlaTransformerConfig::PRESETS.into_iter().zip(counts) {
        let preset = GlaTransformerConfig::preset(&name.to_lowercase()).expect("a known name");
        assert_eq!(preset.num_params(), count, "{name}");
    }
    assert!(GlaTransformerConfig::preset("341M").is_none());
    assert_eq!(small.num_params(), 374_475_776);
    assert_eq!(mistral.num_params(), 7_244_390_400);

    // parameters are made when first used: counting them takes no memory
    for (name, config) in cases().into_iter().chain([("340M", tied), ("7B", mistral)]) {
        assert_eq!(config.init(&Device::flex()).num_params(), config.num_params(), "{name}");
    }
}

/// Bytes of the state of one sequence, without making it.
fn state_bytes(config: &GlaTransformerConfig) -> usize {
    let model = config.init(&Device::flex());
    model.layers.iter().map(|layer| layer.attn.state_shape(1).num_bytes(DType::F32)).sum()
}

fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[test]
fn the_model_card_says_what_the_models_are() {
    for (name, config) in cases() {
        let state = config.init(&Device::flex()).init_state(1, &Device::flex());
        assert_eq!(state.num_bytes(), state_bytes(&config), "{name}");
    }
    let readme = include_str!("../gla-burn/README.md");
    for name in GlaTransformerConfig::PRESETS {
        let config = GlaTransformerConfig::preset(name).expect("a known name");
        let (layers, hidden) = (config.num_hidden_layers, config.hidden_size);
        let bytes = state_bytes(&config);
        // keys and values of each layer, two bytes a number
        let cached_token = 2 * layers * hidden * 2;
        assert!(bytes.is_multiple_of(cached_token));
        let row = format!(
            "| {name} | {layers} x {hidden} | {} x {} x {} | {} | {} | {} | {} |",
            config.num_heads,
            (hidden as f64 * config.expand_k) as usize / config.num_heads,
            (hidden as f64 * config.expand_v) as usize / config.num_heads,
            if config.tie_word_embeddings { "yes" } else { "no" },
            thousands(config.num_params()),
            thousands(bytes),
            bytes / cached_token,
        );
        assert!(readme.contains(&row), "the model card lacks:\n{row}");
    }
}

#[test]
fn configurations_are_json() {
    let config = cases().pop().unwrap().1;
    let json = config.to_string();
    assert!(json.contains(r#""feature_map": "silu""#), "{json}");
    let alias = json.replace("silu", "swish");
    let read = GlaTransformerConfig::load_binary(alias.as_bytes()).unwrap();
    assert_eq!(read.to_string(), json);
}

#[test]
fn training_reduces_the_loss_of_copying() {
    let device = Device::flex().autodiff();
    device.seed(1);
    let mut model = config().with_initializer_range(0.05).init(&device);
    let mut optimizer = AdamWConfig::new().init();
    let mut losses = Vec::new();
    for _ in 0..120 {
        // each target is the token before the last
        let ids = ids([8, 24], &device);
        let logits = model.forward(ids.clone()).narrow(1, 1, 23).reshape([8 * 23, VOCAB]);
        let targets = ids.narrow(1, 0, 23).reshape([8 * 23]);
        let loss = CrossEntropyLossConfig::new().init(&device).forward(logits, targets);
        losses.push(loss.clone().into_scalar::<f32>());

        let grads = GradientsParams::from_grads(loss.backward(), &model);
        assert_eq!(grads.len(), 3 + 2 * 14, "every parameter has a gradient");
        model = optimizer.step(1e-2, model, grads);
    }
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    assert!(last < 0.6 * first, "loss {first} to {last}");
}
