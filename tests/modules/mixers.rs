//! Every kind of mixer: against a naive one in f64, values and gradients; in pieces and steps; sizes
//! and configurations.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::store::{BurnToPyTorchAdapter, ModuleSnapshot};
use burn::tensor::{Device, Gradients, Tensor, TensorData};
use gla_burn::{
    FeatureMap, FixedDecay, GlaTransformerConfig, Hgrn2Config, HybridAttention,
    HybridAttentionError, HybridAttentionSpec, LinearAttentionConfig, LinearFeatureMap,
    Mamba2Config, MambaConfig, Mixer, MixerConfig, RetentionConfig, SimpleGlaConfig,
    SoftmaxAttentionConfig, TimeSteps, fla_name,
};

use crate::naive::{Rows, naive, naive_model};
use crate::{VOCAB, assert_close, cases, config, draw, drawn, ids, values};

const HIDDEN: usize = 32;

/// The kinds beside gated linear attention, with their switches.
pub fn kinds() -> Vec<(&'static str, GlaTransformerConfig)> {
    let with = |mixer: MixerConfig| config().with_mixer(Some(mixer));
    let simple = SimpleGlaConfig::new(HIDDEN);
    let retention = || RetentionConfig::new(HIDDEN).with_num_heads(4);
    let lightning = FixedDecay::Lightning { layer: 0, num_layers: 1 };
    let switched = RetentionConfig {
        decay: lightning,
        rope_theta: None,
        feature_map: Some(FeatureMap::Silu),
        use_short_conv: true,
        use_output_gate: false,
        ..retention()
    };
    let linear = |map| LinearAttentionConfig::new(HIDDEN).with_num_heads(4).with_feature_map(map);
    let hgrn2 = || Hgrn2Config::new(HIDDEN).with_expand_ratio(8);
    let mamba2 = || Mamba2Config::new(HIDDEN).with_head_dim(16).with_state_size(8);
    let grouped_mamba2 = mamba2().with_n_groups(2).with_use_bias(true).with_use_conv_bias(false);
    let mamba = MambaConfig::new(HIDDEN).with_state_size(5);
    let attention = || SoftmaxAttentionConfig::new(HIDDEN, 4);
    let grouped = attention().with_num_kv_heads(Some(2)).with_qkv_bias(true);
    let hybrid =
        HybridAttentionSpec { window_size: Some(5), ..HybridAttentionSpec::new(vec![1], 2) };
    vec![
        ("simple gla", with(MixerConfig::SimpleGla(simple))),
        ("retention", with(MixerConfig::Retention(retention()))),
        ("lightning", with(MixerConfig::Retention(switched))),
        (
            "linear",
            with(MixerConfig::LinearAttention(linear(LinearFeatureMap::ElementwiseProduct))),
        ),
        (
            "normalised linear",
            with(MixerConfig::LinearAttention(
                linear(LinearFeatureMap::Elu)
                    .with_num_kv_heads(Some(2))
                    .with_do_feature_map_norm(true),
            )),
        ),
        ("relu linear", with(MixerConfig::LinearAttention(linear(LinearFeatureMap::Relu)))),
        ("identity linear", with(MixerConfig::LinearAttention(linear(LinearFeatureMap::Identity)))),
        ("hgrn2", with(MixerConfig::Hgrn2(hgrn2()))),
        (
            "unbounded hgrn2",
            with(MixerConfig::Hgrn2(hgrn2().with_use_lower_bound(false).with_use_short_conv(true))),
        ),
        ("mamba2", with(MixerConfig::Mamba2(mamba2()))),
        ("grouped mamba2", with(MixerConfig::Mamba2(grouped_mamba2))),
        ("mamba", with(MixerConfig::Mamba(mamba))),
        ("attention", with(MixerConfig::SoftmaxAttention(attention()))),
        ("grouped attention", with(MixerConfig::SoftmaxAttention(grouped))),
        (
            "windowed attention",
            with(MixerConfig::SoftmaxAttention(attention().with_window_size(Some(7)))),
        ),
        ("hybrid", config().with_attn(Some(HybridAttention(vec![hybrid])))),
    ]
}

pub fn all() -> impl Iterator<Item = (&'static str, GlaTransformerConfig)> {
    cases().into_iter().chain(kinds())
}

fn rows(x: &Tensor<3>) -> Rows {
    values(x.clone()).chunks(x.dims()[2]).map(<[f64]>::to_vec).collect()
}

/// Mixers of the last layers, where some kinds differ from the first.
fn mixers(norm_eps: f64, device: &Device) -> impl Iterator<Item = (&'static str, Mixer)> {
    let mixer = move |config: GlaTransformerConfig| config.with_norm_eps(norm_eps).block(1).attn;
    all().map(move |(name, config)| (name, drawn(mixer(config).init(device))))
}

#[test]
fn mixers_equal_naive_mixers() {
    let device = Device::flex();
    for (name, mixer) in mixers(1e-6, &device) {
        let x = draw([1, 70, HIDDEN], -2.0..2.0, &device);
        let expected: Vec<f64> = naive(&mixer, &rows(&x), None).concat();
        let expected = TensorData::new(expected, [1, 70, HIDDEN]);
        let found = mixer.forward(x, &Default::default());
        assert_close(name, found, Tensor::from_data(expected, &device), 1e-4);
    }
}

/// Blocks, hybrids, and what a model gives its layers.
#[test]
fn models_equal_naive_models() {
    let device = Device::flex();
    for (name, mut config) in all().filter(|(_, config)| !config.tie_word_embeddings) {
        config.num_hidden_layers = 3;
        let model = drawn(config.init(&device));
        let ids = ids([1, 25], &device);
        let numbers: Vec<i64> = ids.clone().into_data().convert::<i64>().try_into_vec().unwrap();
        let numbers: Vec<usize> = numbers.into_iter().map(|id| id as usize).collect();
        let expected = TensorData::new(naive_model(&model, &numbers).concat(), [1, 25, VOCAB]);
        assert_close(name, model.forward(ids), Tensor::from_data(expected, &device), 1e-4);
    }
}

/// Adds `amount` of the gradient, scaled to the size of the parameter, to the parameter of one
/// index.
struct Nudge<'a> {
    index: usize,
    amount: f32,
    grads: &'a Gradients,
    /// Name for messages: the shape.
    shape: Vec<usize>,
    /// Change of the loss if the gradient is right: the sum of gradient times step.
    expected: f64,
}

impl ModuleMapper for Nudge<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let own = self.index == 0;
        self.index = self.index.wrapping_sub(1);
        if !own {
            return param;
        }
        let grad = param.val().grad(self.grads).expect("every parameter has a gradient");
        param.map(|value| {
            let value = value.without_autodiff();
            self.shape = value.dims().to_vec();
            let largest = grad.clone().abs().max().into_scalar::<f32>().max(1e-12);
            let moved = value.clone() + grad.clone() * (self.amount / largest);
            // what was added after rounding
            let steps = values(moved.clone()).into_iter().zip(values(value));
            self.expected = steps.zip(values(grad)).map(|((m, v), g)| (m - v) * g).sum();
            moved
        })
    }
}

struct Count(usize);

impl ModuleVisitor for Count {
    fn visit_float<const D: usize>(&mut self, _param: &Param<Tensor<D>>) {
        self.0 += 1;
    }
}

/// Along the gradient of each parameter, and of the input, the naive loss grows as the gradient
/// says.
#[test]
fn gradients_equal_differences_of_naive_mixers() {
    let device = Device::flex().autodiff();
    // the norm of a vector near 0 turns too fast for differences
    for (name, mixer) in mixers(1e-1, &device) {
        let x = draw([1, 21, HIDDEN], -2.0..2.0, &device).require_grad();
        let weights = draw([1, 21, HIDDEN], -1.0..1.0, &device);
        let weight_rows = values(weights.clone());
        let loss = |mixer: &Mixer, x: &Rows| -> f64 {
            naive(mixer, x, None).concat().iter().zip(&weight_rows).map(|(y, w)| y * w).sum()
        };
        let output = mixer.forward(x.clone(), &Default::default());
        let grads = (output * weights).sum().backward();

        let step = 2e-4f32;
        let check = |what: &str, rise: f64, expected: f64| {
            let error = (rise - expected).abs();
            assert!(error <= 1e-3 * expected.abs() + 1e-6, "{name}, {what}: {rise} for {expected}");
        };
        let mut count = Count(0);
        mixer.visit(&mut count);
        for index in 0..count.0 {
            let nudged = |amount: f32| {
                let (shape, expected) = (Vec::new(), 0.0);
                let mut nudge = Nudge { index, amount, grads: &grads, shape, expected };
                let mixer = mixer.clone().map(&mut nudge);
                (loss(&mixer, &rows(&x)), nudge.expected, nudge.shape)
            };
            let ((up, rise, shape), (down, fall, _)) = (nudged(step), nudged(-step));
            check(&format!("parameter {index} {shape:?}"), up - down, rise - fall);
        }

        let slope = rows(&x.grad(&grads).expect("tracked"));
        let largest = slope.concat().iter().fold(0.0, |m: f64, g| m.max(g.abs()));
        let moved = |amount: f64| -> Rows {
            let rows = rows(&x).into_iter().zip(&slope);
            let moved = |(row, slope): (Vec<f64>, &Vec<f64>)| {
                row.iter().zip(slope).map(|(x, g)| x + amount * g / largest).collect()
            };
            rows.map(moved).collect()
        };
        let rise = loss(&mixer, &moved(1e-4)) - loss(&mixer, &moved(-1e-4));
        let squares: f64 = slope.concat().iter().map(|g| g * g).sum();
        check("input", rise, 2e-4 * squares / largest);
    }
}

#[test]
fn pieces_and_steps_equal_the_whole() {
    let device = Device::flex();
    for (name, config) in all() {
        let model = drawn(config.init(&device));
        let ids = ids([2, 150], &device);
        let whole = model.forward(ids.clone());

        let mut state = model.init_state(2, &device);
        let mut pieces = Vec::new();
        for (start, end) in [(0, 70), (70, 75), (75, 76), (76, 143)] {
            pieces.push(model.prefill(ids.clone().narrow(1, start, end - start), &mut state));
        }
        for t in 143..150 {
            let logits = model.step(ids.clone().narrow(1, t, 1).squeeze_dim(1), &mut state);
            pieces.push(logits.unsqueeze_dim(1));
        }
        assert_eq!(state.seen(), [150, 150]);
        assert_close(name, Tensor::cat(pieces, 1), whole, 1e-4);
        model.check_state(&state).unwrap();
    }
}

#[test]
fn sizes_and_configurations_of_all_kinds() {
    for (name, config) in all() {
        assert_eq!(config.init(&Device::flex()).num_params(), config.num_params(), "{name}");
        let json = config.to_string();
        let read: GlaTransformerConfig =
            burn::config::Config::load_binary(json.as_bytes()).unwrap();
        assert_eq!(read.to_string(), json, "{name}");
    }

    // as written before there were mixers
    let old = config().to_string().replace(",\n  \"mixer\": null,\n  \"attn\": null", "");
    assert!(!old.contains("mixer"), "{old}");
    let read: GlaTransformerConfig = burn::config::Config::load_binary(old.as_bytes()).unwrap();
    assert_eq!(read.to_string(), config().to_string());
}

/// A window bounds what a state holds.
#[test]
fn windows_are_trimmed() {
    let device = Device::flex();
    for (name, length) in [("attention", 30), ("windowed attention", 7)] {
        let (_, config) = kinds().into_iter().find(|(kind, _)| *kind == name).unwrap();
        let model = config.init(&device);
        let mut state = model.init_state(2, &device);
        assert_eq!(state.num_bytes(), 0);
        for _ in 0..3 {
            model.prefill(ids([2, 10], &device), &mut state);
        }
        let keys = state.layers[1].keys.as_ref().unwrap();
        assert_eq!(keys.dims(), [2, length, 4, 8], "{name}");
        assert_eq!(state.num_bytes(), 2 * 2 * 2 * length * HIDDEN * 4);
    }
}

#[test]
fn hybrids_are_one_specification_or_a_list() {
    let json = |text: &str| serde_json::from_str::<HybridAttention>(text).unwrap();
    let one = json(r#"{"layers": [1, 3], "num_heads": 4, "window_size": null, "extra": 1}"#);
    assert_eq!(one.0, vec![HybridAttentionSpec::new(vec![1, 3], 4)]);
    let text = serde_json::to_string(&one).unwrap();
    assert!(text.starts_with(r#"{"layers":[1,3],"num_heads":4"#), "{text}");
    let two = json(
        r#"[{"layers": [0], "num_heads": 4, "rope_theta": 5e5}, {"layers": [2], "num_heads": 2, "num_kv_heads": 1, "qkv_bias": true, "window_size": 64}]"#,
    );
    assert_eq!(two, json(&serde_json::to_string(&two).unwrap()));
    assert_eq!(two.at(2).unwrap().window_size, Some(64));
    assert!(two.at(1).is_none());
    two.check(3, HIDDEN).unwrap();
    for bad in
        [r#"{"layers": [true], "num_heads": 4}"#, r#"{"layers": [-1], "num_heads": 4}"#, "{}"]
    {
        assert!(serde_json::from_str::<HybridAttention>(bad).is_err(), "{bad}");
    }
}

#[test]
fn bad_hybrids_name_the_specification() {
    use HybridAttentionError::*;

    let good = || HybridAttentionSpec::new(vec![0], 4);
    let error = |spec: HybridAttentionSpec| {
        HybridAttention(vec![good(), spec]).check(3, HIDDEN).expect_err("something is wrong")
    };
    let layers = |layers: &[usize]| HybridAttentionSpec { layers: layers.to_vec(), ..good() };
    let other = layers(&[2]);
    assert_eq!(error(layers(&[1, 3])), Layer { spec: 1, layer: 3, num_hidden_layers: 3 });
    assert_eq!(error(layers(&[1, 0])), Twice { spec: 1, layer: 0, other: 0 });
    assert_eq!(error(layers(&[2, 2])), Twice { spec: 1, layer: 2, other: 1 });
    let heads = HybridAttentionSpec { num_heads: 5, ..other.clone() };
    assert_eq!(error(heads), Heads { spec: 1, num_heads: 5, num_kv_heads: 5, hidden_size: HIDDEN });
    let grouped = HybridAttentionSpec { num_kv_heads: Some(3), ..other.clone() };
    assert!(matches!(error(grouped), Heads { num_kv_heads: 3, .. }));
    let window = HybridAttentionSpec { window_size: Some(0), ..other.clone() };
    assert_eq!(error(window), Window { spec: 1 });
    let theta = HybridAttentionSpec { rope_theta: f64::INFINITY, ..other };
    let message = "attn[1]: rope_theta must be finite and positive, got inf";
    assert_eq!(error(theta).to_string(), message);
}

#[test]
#[should_panic(
    expected = "GlaTransformerConfig: attn[0]: layer 2 must be below num_hidden_layers = 2"
)]
fn a_model_refuses_layers_that_it_does_not_have() {
    let spec = HybridAttentionSpec::new(vec![2], 4);
    config().with_attn(Some(HybridAttention(vec![spec]))).init(&Device::flex());
}

/// What a configuration says is wrong, and what making the layer panics with.
#[test]
fn bad_configurations_are_refused() {
    let says = |config: MixerConfig, expected: &str| {
        assert_eq!(config.check(), Err(expected.to_string()));
        let init = || drop(config.init(&Device::flex()));
        let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(init)).unwrap_err();
        let message: String = *panic.downcast().expect("a message");
        assert!(message.ends_with(&format!("Config: {expected}")), "{message}");
    };
    let retention = || RetentionConfig::new(HIDDEN).with_num_heads(4);
    let mamba2 = || Mamba2Config::new(HIDDEN).with_head_dim(16);
    says(
        MixerConfig::SimpleGla(SimpleGlaConfig::new(HIDDEN).with_num_heads(3)),
        "hidden_size * expand_k = 32 * 1 = 32 must be a positive multiple of num_heads = 3",
    );
    says(
        MixerConfig::SimpleGla(SimpleGlaConfig::new(HIDDEN).with_conv_size(0)),
        "conv_size must be at least 1, got 0",
    );
    says(
        MixerConfig::Retention(retention().with_num_kv_heads(Some(3))),
        "num_heads = 4 must be a multiple of num_kv_heads = 3",
    );
    says(
        MixerConfig::Retention(retention().with_num_heads(32)),
        "rotary positions need heads of an even width, got 1",
    );
    let decay = FixedDecay::Lightning { layer: 2, num_layers: 2 };
    says(
        MixerConfig::Retention(retention().with_decay(decay)),
        "layer = 2 of the decay must be below num_layers = 2",
    );
    says(
        MixerConfig::LinearAttention(LinearAttentionConfig::new(HIDDEN).with_norm_eps(0.0)),
        "norm_eps must be positive, got 0",
    );
    says(
        MixerConfig::Hgrn2(Hgrn2Config::new(HIDDEN)),
        "hidden_size = 32 must be a positive multiple of num_heads = 0",
    );
    says(
        MixerConfig::Mamba2(mamba2().with_n_groups(3)),
        "the number of heads, 4, must be a multiple of n_groups = 3",
    );
    says(
        MixerConfig::Mamba2(mamba2().with_head_dim(24)),
        "hidden_size * expand = 64 must be a positive multiple of head_dim = 24",
    );
    says(
        MixerConfig::Mamba(
            MambaConfig::new(HIDDEN).with_time_steps(TimeSteps { min: 0.1, max: 0.01 }),
        ),
        "the time steps must rise from above 0, got 0.1 to 0.01",
    );
    says(
        MixerConfig::SoftmaxAttention(SoftmaxAttentionConfig::new(HIDDEN, 5)),
        "hidden_size = 32 must be an even multiple of num_heads = 5",
    );
    says(
        MixerConfig::SoftmaxAttention(
            SoftmaxAttentionConfig::new(HIDDEN, 4).with_window_size(Some(0)),
        ),
        "window_size must be at least 1, got 0",
    );
}

/// Decays by the formulas, at the ends that are easy to get wrong.
#[test]
fn fixed_decays_are_as_published() {
    let keeps = |decay: FixedDecay, head, heads| decay.log_decay(head, heads).exp();
    let close = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-15, "{found}");
    close(keeps(FixedDecay::Retention, 0, 8), 1.0 - 1.0 / 32.0);
    close(keeps(FixedDecay::Retention, 7, 8), 1.0 - 1.0 / 4096.0);
    let lightning = FixedDecay::Lightning { layer: 3, num_layers: 12 };
    close(keeps(lightning, 0, 16), 1.0);
    close(keeps(lightning, 5, 16), (-0.5 * 0.75 * 5.0f64).exp());

    // in a model the layer is the model's, whatever the configuration says
    let (_, config) = kinds().into_iter().find(|(name, _)| *name == "lightning").unwrap();
    let gates = |layer| match config.block(layer).attn.init(&Device::flex()) {
        Mixer::Gla(layer) => values(layer.fixed_gate.expect("a fixed gate")),
        other => panic!("{other:?}"),
    };
    assert_eq!(gates(0), [0.0, -2.0, -4.0, -6.0]);
    assert_eq!(gates(1), [0.0, -1.0, -2.0, -3.0]);
}

/// Parameters have the names and shapes of flash-linear-attention's layers.
#[test]
fn parameters_of_all_kinds_are_named_as_in_fla() {
    let device = Device::flex();
    let expect = |kind: &str, expected: &[(&str, &[usize])]| {
        let (_, config) = kinds().into_iter().find(|(name, _)| *name == kind).unwrap();
        let tensors =
            config.init(&device).collect(None, Some(Box::new(BurnToPyTorchAdapter)), false);
        let mut found: Vec<(String, Vec<usize>)> = tensors
            .iter()
            .filter_map(|t| {
                let name = fla_name(&t.name);
                let name = name.strip_prefix("model.layers.1.attn.").map(String::from);
                let bounds =
                    || (fla_name(&t.name) == "model.lower_bounds").then_some(fla_name(&t.name));
                Some((name.or_else(bounds)?, t.shape.to_vec()))
            })
            .collect();
        found.sort();
        let expected: Vec<_> = expected.iter().map(|(n, s)| (n.to_string(), s.to_vec())).collect();
        assert_eq!(found, expected, "{kind}");
    };
    expect(
        "simple gla",
        &[
            ("g_norm_swish_gate.weight", &[8]),
            ("g_proj.weight", &[32, 32]),
            ("gk_proj.bias", &[4]),
            ("gk_proj.weight", &[4, 32]),
            ("k_conv1d.weight", &[32, 1, 4]),
            ("k_proj.weight", &[32, 32]),
            ("o_proj.weight", &[32, 32]),
            ("q_conv1d.weight", &[32, 1, 4]),
            ("q_proj.weight", &[32, 32]),
            ("v_conv1d.weight", &[32, 1, 4]),
            ("v_proj.weight", &[32, 32]),
        ],
    );
    expect(
        "retention",
        &[
            ("g_norm_swish_gate.weight", &[16]),
            ("g_proj.weight", &[64, 32]),
            ("k_proj.weight", &[32, 32]),
            ("o_proj.weight", &[32, 64]),
            ("q_proj.weight", &[32, 32]),
            ("v_proj.weight", &[64, 32]),
        ],
    );
    expect(
        "linear",
        &[
            ("feature_map_k.layer1.bias", &[8]),
            ("feature_map_k.layer1.weight", &[8, 8]),
            ("feature_map_k.layer2.bias", &[8]),
            ("feature_map_k.layer2.weight", &[8, 8]),
            ("feature_map_q.layer1.bias", &[8]),
            ("feature_map_q.layer1.weight", &[8, 8]),
            ("feature_map_q.layer2.bias", &[8]),
            ("feature_map_q.layer2.weight", &[8, 8]),
            ("k_proj.weight", &[32, 32]),
            ("norm.weight", &[8]),
            ("o_proj.weight", &[32, 32]),
            ("q_proj.weight", &[32, 32]),
            ("v_proj.weight", &[32, 32]),
        ],
    );
    expect(
        "hgrn2",
        &[
            ("f_proj.weight", &[32, 32]),
            ("g_norm.weight", &[32]),
            ("i_proj.weight", &[32, 32]),
            ("model.lower_bounds", &[2, 32]),
            ("o_proj.weight", &[32, 32]),
            ("q_proj.weight", &[32, 32]),
        ],
    );
    expect(
        "mamba2",
        &[
            ("A_log", &[4]),
            ("D", &[4]),
            ("conv1d.bias", &[80]),
            ("conv1d.weight", &[80, 1, 4]),
            ("dt_bias", &[4]),
            ("in_proj.weight", &[148, 32]),
            ("norm.weight", &[64]),
            ("out_proj.weight", &[32, 64]),
        ],
    );
    expect(
        "mamba",
        &[
            ("A_log", &[64, 5]),
            ("D", &[64]),
            ("conv1d.bias", &[64]),
            ("conv1d.weight", &[64, 1, 4]),
            ("dt_proj.bias", &[64]),
            ("dt_proj.weight", &[64, 2]),
            ("in_proj.weight", &[128, 32]),
            ("out_proj.weight", &[32, 64]),
            ("x_proj.weight", &[12, 64]),
        ],
    );
    expect(
        "grouped attention",
        &[
            ("k_proj.bias", &[16]),
            ("k_proj.weight", &[16, 32]),
            ("o_proj.weight", &[32, 32]),
            ("q_proj.bias", &[32]),
            ("q_proj.weight", &[32, 32]),
            ("v_proj.bias", &[16]),
            ("v_proj.weight", &[16, 32]),
        ],
    );
}
