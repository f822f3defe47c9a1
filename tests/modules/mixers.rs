//! Every kind of mixer: against a naive one in f64, values and gradients; in pieces and steps;
//! states. Configurations are in `configs.rs`.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Int, Tensor, TensorData};
use gla_burn::{
    FeatureMap, FixedDecay, GlaState, GlaTransformerConfig, Hgrn2Config, HybridAttention,
    HybridAttentionSpec, LinearAttentionConfig, LinearFeatureMap, Mamba2Config, MambaConfig, Mixer,
    MixerConfig, RetentionConfig, SimpleGlaConfig, SoftmaxAttentionConfig,
};

use crate::naive::{Rows, naive, naive_model};
use crate::{VOCAB, assert_close, cases, config, draw, drawn, ids, values};

pub const HIDDEN: usize = 32;

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
        (
            "hedgehog linear",
            with(MixerConfig::LinearAttention(
                linear(LinearFeatureMap::Hedgehog)
                    .with_num_kv_heads(Some(2))
                    .with_do_feature_map_norm(true),
            )),
        ),
        ("t2r linear", with(MixerConfig::LinearAttention(linear(LinearFeatureMap::T2r)))),
        ("dpfp linear", with(MixerConfig::LinearAttention(linear(LinearFeatureMap::Dpfp)))),
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

fn numbers(ids: &Tensor<2, Int>) -> Vec<usize> {
    let numbers: Vec<i64> = ids.clone().into_data().convert::<i64>().try_into_vec().unwrap();
    numbers.into_iter().map(|id| id as usize).collect()
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
        let logits = naive_model(&model, &numbers(&ids)).concat();
        let expected = TensorData::new(logits, [1, 25, VOCAB]);
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

/// Along the gradient of each parameter, `expected` grows as the gradient of `loss` says.
fn check_gradients<M: Module>(
    name: &str,
    module: &M,
    loss: Tensor<1>,
    expected: impl Fn(&M) -> f64,
) -> Gradients {
    let grads = loss.backward();
    let mut count = Count(0);
    module.visit(&mut count);
    for index in 0..count.0 {
        let nudged = |amount: f32| {
            let (shape, expected_change) = (Vec::new(), 0.0);
            let mut nudge =
                Nudge { index, amount, grads: &grads, shape, expected: expected_change };
            let module = module.clone().map(&mut nudge);
            (expected(&module), nudge.expected, nudge.shape)
        };
        let ((up, rise, shape), (down, fall, _)) = (nudged(STEP), nudged(-STEP));
        check_slope(&format!("{name}, parameter {index} {shape:?}"), up - down, rise - fall);
    }
    grads
}

fn check_slope(what: &str, found: f64, expected: f64) {
    let error = (found - expected).abs();
    assert!(error <= 1e-3 * expected.abs() + 1e-6, "{what}: {found} for {expected}");
}

/// Largest change of an entry.
const STEP: f32 = 2e-4;

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
        let input = rows(&x);
        let grads = check_gradients(name, &mixer, (output * weights).sum(), |m| loss(m, &input));

        let slope = rows(&x.grad(&grads).expect("tracked"));
        let largest = slope.concat().iter().fold(0.0, |m: f64, g| m.max(g.abs()));
        let moved = |amount: f64| -> Rows {
            let moved = |(row, slope): (&Vec<f64>, &Vec<f64>)| {
                row.iter().zip(slope).map(|(x, g)| x + amount * g / largest).collect()
            };
            input.iter().zip(&slope).map(moved).collect()
        };
        let rise = loss(&mixer, &moved(1e-4)) - loss(&mixer, &moved(-1e-4));
        let squares: f64 = slope.concat().iter().map(|g| g * g).sum();
        check_slope(&format!("{name}, input"), rise, 2e-4 * squares / largest);
    }
}

/// Lower bounds are parameters of the model.
#[test]
fn gradients_of_lower_bounds_equal_differences() {
    let device = Device::flex().autodiff();
    let (name, mut config) = kinds().into_iter().find(|(name, _)| *name == "hgrn2").unwrap();
    config.num_hidden_layers = 3;
    let model = drawn(config.with_norm_eps(1e-1).init(&device));
    let ids = ids([1, 13], &device);
    let weights = draw([1, 13, VOCAB], -1.0..1.0, &device);
    let (numbers, weight_values) = (numbers(&ids), values(weights.clone()));
    let loss = (model.forward(ids) * weights).sum();
    check_gradients(name, &model, loss, |model| {
        let logits = naive_model(model, &numbers).concat();
        logits.iter().zip(&weight_values).map(|(y, w)| y * w).sum()
    });
}

/// A state serves as well after a file, and models with and without autodiff alike.
#[test]
fn states_of_all_kinds_are_values() {
    let (plain, training) = (Device::flex(), Device::flex().autodiff());
    let path = std::env::temp_dir().join(format!("gla-{}-kinds", std::process::id()));
    for (name, config) in all() {
        let model = drawn(config.init(&training));
        let mut state = model.init_state(2, &training);
        for _ in 0..2 {
            assert!(model.prefill(ids([2, 7], &training), &mut state).is_tracked(), "{name}");
            for layer in &state.layers {
                let mut tensors = layer.recurrent.iter().chain(&layer.keys).chain(&layer.values);
                assert!(tensors.all(|tensor| !tensor.is_autodiff()), "{name}");
                assert!(layer.conv.iter().flatten().all(|conv| !conv.is_autodiff()), "{name}");
            }
        }
        state.save(&path).unwrap();
        let mut loaded = GlaState::load(&path, &plain).unwrap();
        std::fs::remove_file(&path).unwrap();
        model.check_state(&loaded).unwrap();
        assert_eq!((loaded.seen(), loaded.num_bytes()), (&[14, 14][..], state.num_bytes()));

        let next: Tensor<1, Int> = ids([2, 1], &plain).squeeze_dim(1);
        let mut branch = state.clone();
        let expected = model.valid().step(next.clone(), &mut state);
        assert_close(name, model.valid().step(next.clone(), &mut loaded), expected.clone(), 0.0);

        // there and back: what is no parameter comes along too
        let again = model.valid().train();
        let logits = again.step(next, &mut branch);
        assert_close(name, logits.clone().without_autodiff(), expected, 1e-5);
        logits.sum().backward();
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

/// The state has a row for each feature, and a column for the sum of the weights.
#[test]
fn features_are_the_rows_of_a_state() {
    let device = Device::flex();
    let cases = [
        ("linear", [8, 8]),
        ("hedgehog linear", [16, 9]),
        ("t2r linear", [8, 8]),
        ("dpfp linear", [64, 8]),
    ];
    for (name, [rows, columns]) in cases {
        let (_, config) = kinds().into_iter().find(|(kind, _)| *kind == name).unwrap();
        let model = config.init(&device);
        let mut state = model.init_state(2, &device);
        model.prefill(ids([2, 3], &device), &mut state);
        for layer in &state.layers {
            assert_eq!(layer.recurrent.as_ref().unwrap().dims(), [2, 4, rows, columns], "{name}");
        }
        assert_eq!(state.num_bytes(), 2 * 2 * 4 * rows * columns * 4, "{name}");
    }
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

/// A state of another kind, or one that lost something, is no state of a model.
#[test]
fn states_of_other_kinds_are_refused() {
    let device = Device::flex();
    let model = |name: &str| {
        let (_, config) = all().find(|(kind, _)| *kind == name).unwrap();
        config.init(&device)
    };
    let filled = |name: &str| {
        let model = model(name);
        let mut state = model.init_state(2, &device);
        model.prefill(ids([2, 9], &device), &mut state);
        state
    };
    let error = |name: &str, state: &GlaState| {
        model(name).check_state(state).expect_err("another kind").to_string()
    };
    assert_eq!(error("attention", &filled("default")), "recurrent of the state is superfluous");
    assert_eq!(error("default", &filled("attention")), "recurrent of the state is missing");
    assert_eq!(
        error("retention", &filled("hybrid")),
        "recurrent of the state has shape [2, 4, 4, 8], the layer needs [2, 4, 8, 16]"
    );
    assert_eq!(error("hybrid", &filled("default")), "recurrent of the state is superfluous");
    assert_eq!(
        error("mamba2", &filled("simple gla")),
        "recurrent of the state has shape [2, 4, 8, 8], the layer needs [2, 4, 8, 16]"
    );

    let mut state = filled("attention");
    state.layers[1].values = None;
    assert_eq!(error("attention", &state), "values of the state is missing");
    state.layers[0].keys = None;
    assert_eq!(error("attention", &state), "keys of the state is missing");
    let mut state = filled("attention");
    state.layers[1].seen.pop();
    let expected = "layer 1 of the state has seen [9] tokens, layer 0 has seen [9, 9]";
    assert_eq!(error("attention", &state), expected);
}
