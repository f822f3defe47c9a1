//! Checkpoints of flash-linear-attention: names and shapes, round trips, logits against an f64
//! evaluation of the files, older forms, and everything that can be wrong with a folder.
//!
//! `cargo nextest run --release --workspace -E 'binary(checkpoint)'`

#[path = "checkpoint/errors.rs"]
mod errors;
#[path = "checkpoint/files.rs"]
mod files;
#[path = "checkpoint/names.rs"]
mod names;
#[path = "checkpoint/old_forms.rs"]
mod old_forms;
#[path = "checkpoint/reference.rs"]
mod reference;

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::{Module, ModuleMapper, Param};
use burn::optim::GradientsParams;
use burn::store::ModuleSnapshot;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use gla_burn::checkpoint::{Checkpoint, CheckpointConfig, SaveOptions, save};
use gla_burn::{
    FeatureMap, GlaTransformer, GlaTransformerConfig, HybridAttention, HybridAttentionSpec,
    MixerConfig, RetentionConfig, SoftmaxAttentionConfig,
};
use gla_kernels::eval::{ABS_FLOOR, check};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tempfile::TempDir;

use reference::Reference;

const VOCAB: usize = 19;

fn config() -> GlaTransformerConfig {
    GlaTransformerConfig::new(VOCAB, 32, 2).with_intermediate_size(Some(40))
}

/// One case per switch of fla's configuration, and all of them together.
fn cases() -> Vec<(&'static str, GlaTransformerConfig)> {
    let mapped = |map| config().with_feature_map(Some(map));
    let all = config()
        .with_use_short_conv(true)
        .with_conv_size(3)
        .with_num_kv_heads(Some(2))
        .with_use_output_gate(false)
        .with_clamp_min(Some(-0.05))
        .with_feature_map(Some(FeatureMap::Silu))
        .with_expand_k(1.5)
        .with_expand_v(0.5)
        .with_tie_word_embeddings(true)
        .with_norm_eps(1e-3);
    let spec = |layer| HybridAttentionSpec::new(vec![layer], 4);
    let other = HybridAttentionSpec {
        num_kv_heads: Some(2),
        qkv_bias: true,
        window_size: Some(9),
        rope_theta: 100.0,
        ..spec(0)
    };
    let two_kinds = config().with_attn(Some(HybridAttention(vec![spec(1), other])));
    let windowed = SoftmaxAttentionConfig::new(32, 8)
        .with_num_kv_heads(Some(2))
        .with_qkv_bias(true)
        .with_window_size(Some(11))
        .with_rope_theta(50.0);
    let all_of_retnet = RetentionConfig::new(32)
        .with_num_heads(4)
        .with_num_kv_heads(Some(2))
        .with_expand_v(1.0)
        .with_feature_map(Some(FeatureMap::Relu))
        .with_use_output_gate(false);
    let retnet = |layer| config().with_mixer(Some(MixerConfig::Retention(layer)));
    let transformer = |layer| config().with_mixer(Some(MixerConfig::SoftmaxAttention(layer)));
    vec![
        ("default", config()),
        ("tied", config().with_tie_word_embeddings(true)),
        ("short conv", config().with_use_short_conv(true)),
        ("one kv head", config().with_num_kv_heads(Some(1))),
        ("two kv heads", config().with_num_kv_heads(Some(2)).with_use_short_conv(true)),
        ("no output gate", config().with_use_output_gate(false)),
        ("clamped gate", config().with_clamp_min(Some(-0.04))),
        ("wide keys", config().with_num_heads(2).with_expand_k(1.0).with_expand_v(2.0)),
        ("derived mlp", config().with_intermediate_size(None).with_hidden_ratio(2.5)),
        ("relu", mapped(FeatureMap::Relu)),
        ("sigmoid", mapped(FeatureMap::Sigmoid)),
        ("logsigmoid", mapped(FeatureMap::LogSigmoid)),
        ("sqrelu", mapped(FeatureMap::SqRelu)),
        ("gelu", mapped(FeatureMap::Gelu)),
        ("hybrid", config().with_attn(Some(HybridAttention(vec![spec(1)])))),
        ("two kinds of hybrid", two_kinds),
        ("retnet", retnet(RetentionConfig::new(32))),
        ("retnet with all", retnet(all_of_retnet).with_attn(Some(HybridAttention(vec![spec(1)])))),
        ("transformer", transformer(SoftmaxAttentionConfig::new(32, 4))),
        ("windowed transformer", transformer(windowed).with_tie_word_embeddings(true)),
        ("all", all),
    ]
}

/// Redraws parameters at a scale where every one of them matters: matrices around 0.2, with larger
/// first and smaller last rows and columns, so that a transposition or an exchange of heads shows.
struct Drawn(StdRng);

impl ModuleMapper for Drawn {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let shape = param.lazy_shape();
        let range = if D == 1 { 0.6..1.4 } else { -0.4..0.4 };
        let pattern = |i: usize, n: usize| match i {
            i if 4 * i < n => 1.3,
            i if 4 * i >= 3 * n => 0.6,
            _ => 1.0,
        };
        let (rows, columns) = (shape[0], shape[D - 1]);
        let row_size = shape.num_elements() / rows;
        let mut next = |i: usize| {
            let value: f32 = self.0.random_range(range.clone());
            value * pattern(i / row_size, rows) * pattern(i % columns, columns)
        };
        let values: Vec<f32> = (0..shape.num_elements()).map(&mut next).collect();
        param.map(|old| Tensor::from_data(TensorData::new(values, old.shape()), &old.device()))
    }
}

fn drawn(config: &GlaTransformerConfig, seed: u64) -> GlaTransformer {
    config.init(&Device::flex()).map(&mut Drawn(StdRng::seed_from_u64(seed)))
}

/// A drawn model of `config`, and the folder that it was saved to.
fn saved(config: &GlaTransformerConfig, options: &SaveOptions) -> (GlaTransformer, TempDir) {
    let model = drawn(config, 42);
    let folder = tempfile::tempdir().unwrap();
    save(&model, &CheckpointConfig::new(config.clone()), folder.path(), options).unwrap();
    (model, folder)
}

fn load(folder: &Path) -> GlaTransformer {
    Checkpoint::open(folder).unwrap().load(&Device::flex()).unwrap()
}

/// The bytes of all parameters by path.
fn parameters(model: &GlaTransformer) -> BTreeMap<String, Vec<u8>> {
    let tensors = model.collect(None, None, false).into_iter();
    tensors.map(|t| (t.name.clone(), t.to_bytes().unwrap().to_vec())).collect()
}

fn ids(len: usize) -> Vec<usize> {
    let mut random = StdRng::seed_from_u64(7);
    (0..len).map(|_| random.random_range(0..VOCAB)).collect()
}

fn logits(model: &GlaTransformer, ids: &[usize]) -> Vec<f64> {
    let device = model.embeddings.weight.device();
    let ids: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
    let shape = [1, ids.len()];
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, shape), &device);
    gla_tests::values(model.forward(ids))
}

#[test]
fn logits_equal_the_f64_evaluation_of_the_files() {
    // longer than a chunk, and no multiple of one
    let ids = ids(75);
    for (name, config) in cases() {
        let (_, folder) = saved(&config, &SaveOptions::default());
        let expected = Reference::open(folder.path()).logits(&ids).concat();
        let stats = check(name, &expected, &logits(&load(folder.path()), &ids), 1e-4, ABS_FLOOR);
        println!("{name}: relative RMS {:.1e}", stats.unwrap().ratio);
    }
}

/// The comparison above is worth something only if it notices what goes wrong in loaders.
#[test]
fn the_f64_evaluation_notices_exchanged_weights() {
    let config = config().with_num_kv_heads(Some(2)).with_expand_k(1.0);
    let ids = ids(40);
    let (model, folder) = saved(&config, &SaveOptions::default());
    let expected = logits(&model, &ids);
    let kv_heads = |name: &'static str| {
        move |entries: &mut files::Entries| {
            let bytes = &mut entries.get_mut(name).unwrap().bytes;
            let half = bytes.len() / 2;
            bytes.rotate_left(half);
        }
    };
    let swap = |a: &'static str, b: &'static str| {
        move |entries: &mut files::Entries| {
            let (first, second) = (entries.remove(a).unwrap(), entries.remove(b).unwrap());
            entries.insert(a.into(), second);
            entries.insert(b.into(), first);
        }
    };
    type Damage = Box<dyn FnOnce(&mut files::Entries)>;
    let transpose = |name: &'static str| -> Damage {
        Box::new(move |entries| entries.get_mut(name).unwrap().transpose())
    };
    let damages: [(&str, Damage); 7] = [
        ("o_proj transposed", transpose("model.layers.0.attn.o_proj.weight")),
        ("q_proj transposed", transpose("model.layers.1.attn.q_proj.weight")),
        ("g_proj transposed", transpose("model.layers.1.attn.g_proj.weight")),
        ("key heads", Box::new(kv_heads("model.layers.0.attn.k_proj.weight"))),
        ("gate heads", Box::new(kv_heads("model.layers.0.attn.gk_proj.1.weight"))),
        (
            "gate and up",
            Box::new(swap(
                "model.layers.0.mlp.gate_proj.weight",
                "model.layers.0.mlp.up_proj.weight",
            )),
        ),
        (
            "norms",
            Box::new(swap("model.layers.0.attn_norm.weight", "model.layers.0.mlp_norm.weight")),
        ),
    ];
    for (name, damage) in damages {
        let undamaged = files::read_all(folder.path());
        files::edit(folder.path(), damage);
        let other = Reference::open(folder.path()).logits(&ids).concat();
        files::write(&folder.path().join(files::SINGLE), &undamaged);
        let error = check(name, &other, &expected, 0.1, ABS_FLOOR).unwrap_err();
        println!("{error}");
    }
}

#[test]
fn a_saved_model_loads_back_bit_equal() {
    for (name, config) in cases() {
        let (model, folder) = saved(&config, &SaveOptions::default());
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let layers = |config: &GlaTransformerConfig| {
            config.blocks().map(|block| block.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(layers(&checkpoint.config().model), layers(&config), "{name}");
        assert!(checkpoint.warnings().is_empty(), "{name}");
        let loaded = checkpoint.load(&Device::flex()).unwrap();
        assert!(parameters(&loaded) == parameters(&model), "{name}");
        assert_eq!(logits(&loaded, &ids(20)), logits(&model, &ids(20)), "{name}");
    }
}

#[test]
fn shards_hold_what_one_file_holds() {
    let options = SaveOptions { max_shard_bytes: Some(10_000), ..Default::default() };
    let (model, folder) = saved(&config(), &options);
    let index =
        std::fs::read_to_string(folder.path().join("model.safetensors.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_str(&index).unwrap();
    let map = index["weight_map"].as_object().unwrap();
    assert_eq!(map.len(), 2 * 14 + 3);
    assert!(!folder.path().join(files::SINGLE).exists());

    let mut total = 0;
    for (name, entry) in files::read_all(folder.path()) {
        total += entry.bytes.len();
        let file = folder.path().join(map[&name].as_str().unwrap());
        assert!(files::read(&file).contains_key(&name), "{name}");
        let size: usize = files::read(&file).values().map(|entry| entry.bytes.len()).sum();
        assert!(size <= 10_000, "{file:?} holds {size} bytes");
    }
    assert_eq!(index["metadata"]["total_size"], total);
    assert!(parameters(&load(folder.path())) == parameters(&model));
}

#[test]
fn half_types_widen_exactly_or_stay() {
    for dtype in [DType::F16, DType::BF16] {
        let options = SaveOptions { dtype: Some(dtype), ..Default::default() };
        let (_, folder) = saved(&config(), &options);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(checkpoint.dtype(), dtype);

        // the file's values, in f32
        let wide = checkpoint.load(&Device::flex()).unwrap();
        let expected = Reference::open(folder.path()).logits(&ids(70)).concat();
        check("widened", &expected, &logits(&wide, &ids(70)), 1e-4, ABS_FLOOR).unwrap();

        let kept = checkpoint.load_as(checkpoint.dtype(), &Device::flex()).unwrap();
        for tensor in kept.collect(None, None, false) {
            assert_eq!(tensor.dtype, dtype, "{}", tensor.name);
        }
        let copy = tempfile::tempdir().unwrap();
        save(&kept, checkpoint.config(), copy.path(), &SaveOptions::default()).unwrap();
        let bytes = |folder: &TempDir| std::fs::read(folder.path().join(files::SINGLE)).unwrap();
        assert!(bytes(&copy) == bytes(&folder), "{dtype:?} is written as it was read");
        check("kept", &expected, &logits(&kept, &ids(70)), 3e-2, ABS_FLOOR).unwrap();
    }
}

#[test]
fn a_checkpoint_loads_for_training() {
    let (model, folder) = saved(&config(), &SaveOptions::default());
    let device = Device::flex().autodiff();
    let loaded = Checkpoint::open(folder.path()).unwrap().load(&device).unwrap();
    let ids = Tensor::<2, Int>::from_data([[1, 2, 3, 4, 5]], &device);
    let grads = GradientsParams::from_grads(loaded.forward(ids).sum().backward(), &loaded);
    assert_eq!(grads.len(), 2 * 14 + 3, "every parameter has a gradient");
    assert!(parameters(&loaded.valid()) == parameters(&model));
}

#[test]
fn a_checkpoint_loads_on_every_device() {
    let options = SaveOptions { dtype: Some(DType::BF16), ..Default::default() };
    let (_, folder) = saved(&cases().pop().unwrap().1, &options);
    let expected = Reference::open(folder.path()).logits(&ids(33)).concat();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    for tested in gla_tests::devices() {
        let (name, device) = (tested.name, tested.device.clone());
        let model = checkpoint.load(&device).unwrap();
        // Burn multiplies f32 matrices in TF32 on CUDA
        let tolerance = if name == "cuda" { 1e-2 } else { 1e-4 };
        check(name, &expected, &logits(&model, &ids(33)), tolerance, ABS_FLOOR).unwrap();

        let kept = checkpoint.load_as(DType::BF16, &device).unwrap();
        let has_bf16 = device.supports_dtype(DType::BF16);
        let dtype = if has_bf16 { DType::BF16 } else { DType::F32 };
        assert_eq!(kept.embeddings.weight.val().dtype(), dtype, "{name}");
    }
}
