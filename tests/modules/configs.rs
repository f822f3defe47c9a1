//! Configurations of mixers and hybrids: as JSON, refused, and what they make.

use burn::config::Config;
use burn::module::Module;
use burn::store::{BurnToPyTorchAdapter, ModuleSnapshot};
use burn::tensor::{Device, Tensor};
use gla_burn::{
    Dpfp, FixedDecay, GlaTransformerConfig, HedgehogConfig, Hgrn2Config, HybridAttention,
    HybridAttentionError, HybridAttentionSpec, LinearAttentionConfig, LinearFeatureMap,
    Mamba2Config, MambaConfig, Mixer, MixerConfig, RetentionConfig, SimpleGlaConfig,
    SoftmaxAttentionConfig, TimeSteps, fla_name,
};

use crate::mixers::{HIDDEN, all, kinds};
use crate::{config, values};

#[test]
fn sizes_and_configurations_of_all_kinds() {
    for (name, config) in all() {
        let model = config.init(&Device::flex());
        assert_eq!(model.num_params(), config.num_params(), "{name}");
        let text = model.layers[1].to_string();
        assert!(text.contains("attn: ") && text.contains("{hidden_size: 32, "), "{text}");
        let json = config.to_string();
        let read = GlaTransformerConfig::load_binary(json.as_bytes()).unwrap();
        assert_eq!(read.to_string(), json, "{name}");
    }

    // as written before there were mixers
    let old = config().to_string().replace(",\n  \"mixer\": null,\n  \"attn\": null", "");
    assert!(!old.contains("mixer"), "{old}");
    let read = GlaTransformerConfig::load_binary(old.as_bytes()).unwrap();
    assert_eq!(read.to_string(), config().to_string());
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

#[test]
fn hedgehog_starts_as_the_identity() {
    let device = Device::flex().autodiff();
    let map = HedgehogConfig::new(3).init(&device);
    assert!(map.layer.weight.val().is_require_grad());
    assert_eq!(values(map.layer.weight.val()), [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]);
    assert_eq!(values(map.layer.bias.as_ref().expect("a bias").val()), [0.0; 3]);

    let x = Tensor::<2>::from_data([[0.5, -1.0, 0.0]], &device);
    let exp = [1.0f64, -2.0, 0.0, -1.0, 2.0, 0.0].map(f64::exp);
    let sum: f64 = exp.iter().sum();
    for (found, exp) in values(map.forward(x)).into_iter().zip(exp) {
        assert!((found - exp / sum).abs() < 1e-6, "{found} for {}", exp / sum);
    }
}

/// By hand: `r` is `[2, 0, 0, 3]`, rolled `[3, 2, 0, 0]`, `[0, 3, 2, 0]` and so on.
#[test]
fn dpfp_multiplies_each_channel_with_those_before() {
    let x = Tensor::<1>::from_data([2.0, -3.0], &Device::flex());
    let with = |nu: usize| values(Dpfp { nu }.forward(x.clone()));
    assert_eq!(with(2), [6.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    let last = [[0.0, 0.0, 0.0, 6.0], [4.0, 0.0, 0.0, 9.0], [6.0, 0.0, 0.0, 0.0]];
    assert_eq!(with(5)[8..], last.concat());
    assert_eq!(values(Dpfp::default().forward(x.clone())), with(4));
}

#[test]
fn feature_maps_are_named_as_in_fla() {
    let names = ["elementwise_product", "hedgehog", "t2r", "dpfp", "elu", "relu", "identity"];
    for name in names {
        let json = format!("\"{name}\"");
        let map: LinearFeatureMap = serde_json::from_str(&json).unwrap();
        assert_eq!(serde_json::to_string(&map).unwrap(), json);
    }
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
        "hedgehog linear",
        &[
            ("feature_map_k.layer.bias", &[8]),
            ("feature_map_k.layer.weight", &[8, 8]),
            ("feature_map_q.layer.bias", &[8]),
            ("feature_map_q.layer.weight", &[8, 8]),
            ("k_proj.weight", &[16, 32]),
            ("norm.weight", &[8]),
            ("o_proj.weight", &[32, 32]),
            ("q_proj.weight", &[32, 32]),
            ("v_proj.weight", &[16, 32]),
        ],
    );
    expect(
        "t2r linear",
        &[
            ("feature_map_k.layer.weight", &[8, 8]),
            ("feature_map_q.layer.weight", &[8, 8]),
            ("k_proj.weight", &[32, 32]),
            ("norm.weight", &[8]),
            ("o_proj.weight", &[32, 32]),
            ("q_proj.weight", &[32, 32]),
            ("v_proj.weight", &[32, 32]),
        ],
    );
    expect(
        "dpfp linear",
        &[
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
