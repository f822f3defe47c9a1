//! Folders that cannot be loaded, and models that cannot be saved: what the errors say.

use std::fs;
use std::path::Path;

use burn::tensor::{DType, Device};
use gla_burn::checkpoint::{
    Checkpoint, CheckpointConfig, CheckpointError, SaveOptions, TensorProblem, save,
};
use gla_burn::{FixedDecay, MixerConfig, RetentionConfig, SimpleGlaConfig};
use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::files::{Entry, SINGLE, edit, edit_config};
use crate::{config, drawn, saved};

fn folder() -> TempDir {
    saved(&config(), &SaveOptions::default()).1
}

fn error(folder: &Path) -> CheckpointError {
    let loaded = Checkpoint::open(folder).and_then(|c| c.load(&Device::flex()));
    loaded.expect_err("the folder is damaged")
}

/// The error after some settings were changed.
fn with_settings(settings: &[(&str, Value)]) -> CheckpointError {
    let folder = folder();
    edit_config(folder.path(), |config| {
        config.extend(settings.iter().map(|(key, value)| (key.to_string(), value.clone())));
    });
    error(folder.path())
}

fn with_setting(key: &str, value: Value) -> CheckpointError {
    with_settings(&[(key, value)])
}

#[test]
fn all_tensors_that_do_not_fit_are_listed_at_once() {
    let folder = folder();
    edit(folder.path(), |entries| {
        entries.remove("lm_head.weight");
        entries.remove("model.layers.1.attn.gk_proj.1.bias");
        let norm = entries.get_mut("model.norm.weight").unwrap();
        (norm.dtype, norm.shape) = (Dtype::I32, vec![32]);
        let q = entries.get_mut("model.layers.0.attn.q_proj.weight").unwrap();
        q.shape.reverse();
        let entry = Entry { dtype: Dtype::F32, shape: vec![1], bytes: vec![0; 4] };
        entries.insert("model.layers.2.attn_norm.weight".into(), entry);
        let entry = Entry { dtype: Dtype::F32, shape: vec![1], bytes: vec![0; 4] };
        entries.insert("layers.0.attn_norm.weight".into(), entry);
    });
    let error = error(folder.path());
    let lines: Vec<String> = error.to_string().lines().map(str::to_string).collect();
    let path = folder.path().display();
    assert_eq!(lines[0], format!("the tensors of {path} do not fit its config.json:"));
    let expected = [
        "model.layers.0.attn_norm.weight and layers.0.attn_norm.weight are the same tensor",
        "model.layers.1.attn.gk_proj.1.bias [16] is missing",
        "lm_head.weight [19, 32] is missing",
        "model.layers.0.attn.q_proj.weight has shape [32, 16], expected [16, 32]",
        "model.layers.2.attn_norm.weight [1] is unknown",
        "model.norm.weight is I32, expected F32, F16 or BF16",
    ];
    for line in expected {
        assert!(lines.contains(&format!("  {line}")), "no {line:?} in {lines:#?}");
    }
    let CheckpointError::Tensors { problems, .. } = error else { panic!("{error}") };
    assert!(problems.contains(&TensorProblem::Missing {
        name: "lm_head.weight".into(),
        expected: vec![19, 32]
    }));
}

#[test]
fn a_truncated_file_is_no_checkpoint() {
    let folder = folder();
    let path = folder.path().join(SINGLE);
    let bytes = fs::read(&path).unwrap();
    for len in [bytes.len() - 1, bytes.len() / 2, 100, 7, 0] {
        fs::write(&path, &bytes[..len]).unwrap();
        let error = error(folder.path());
        assert!(matches!(error, CheckpointError::Read { .. }), "{len}: {error}");
        assert!(error.to_string().contains(SINGLE), "{error}");
    }
}

#[test]
fn missing_files_are_named() {
    let message = |remove: &str| {
        let folder = folder();
        fs::remove_file(folder.path().join(remove)).unwrap();
        let error = error(folder.path());
        assert!(matches!(error, CheckpointError::Missing { .. }), "{error}");
        error.to_string()
    };
    assert!(message("config.json").contains("config.json is missing"));
    let tensors = message(SINGLE);
    assert!(tensors.contains("model.safetensors is missing"), "{tensors}");
    assert!(tensors.contains("no model.safetensors.index.json either"), "{tensors}");
    let nowhere = error(Path::new("/no/such/folder")).to_string();
    assert!(nowhere.contains("/no/such/folder/config.json is missing"), "{nowhere}");
}

#[test]
fn shards_must_be_there_and_beside_the_index() {
    let options = SaveOptions { max_shard_bytes: Some(10_000), ..Default::default() };
    let (_, folder) = saved(&config(), &options);
    let first = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
    let first = first.filter(|p| p.to_string_lossy().contains("-00001-of-")).last().unwrap();
    let bytes = fs::read(&first).unwrap();
    fs::remove_file(&first).unwrap();
    let missing = error(folder.path());
    assert!(matches!(&missing, CheckpointError::Missing { path, .. } if *path == first));
    fs::write(&first, bytes).unwrap();

    let index = folder.path().join("model.safetensors.index.json");
    let text = fs::read_to_string(&index).unwrap();
    let name = first.file_name().unwrap().to_str().unwrap();
    fs::write(&index, text.replacen(name, &format!("../{name}"), 1)).unwrap();
    let outside = error(folder.path()).to_string();
    assert!(outside.contains(&format!("\"../{name}\" is no name of a file")), "{outside}");
    fs::write(&index, "{").unwrap();
    assert!(matches!(error(folder.path()), CheckpointError::Read { path, .. } if path == index));
}

#[test]
fn other_models_are_refused() {
    let message = |key, value| with_setting(key, value).to_string();
    let other = with_setting("model_type", json!("llama"));
    assert!(matches!(&other, CheckpointError::ModelType { found, .. } if found == "llama"));
    assert!(
        other
            .to_string()
            .contains("of model_type llama, expected one of: gla, retnet, transformer"),
        "{other}"
    );
    assert!(message("model_type", json!(null)).contains("of model_type none"));
    let act = message("hidden_act", json!("gelu"));
    assert!(act.contains("hidden_act = \"gelu\" (swish is) is not supported"), "{act}");
    let residuals = message("attnres_block_size", json!(4));
    assert!(residuals.contains("attnres_block_size = 4"), "{residuals}");
    let qk_norm = with_settings(&[("model_type", json!("transformer")), ("qk_norm", json!(true))]);
    assert!(qk_norm.to_string().contains("qk_norm = true"), "{qk_norm}");
    let hybrid = json!({"layers": [1], "num_heads": 4});
    let hybrid = with_settings(&[("model_type", json!("transformer")), ("attn", hybrid)]);
    assert!(hybrid.to_string().contains("in a transformer is not supported"), "{hybrid}");
    let affine = message("elementwise_affine", json!(false));
    assert!(affine.contains("elementwise_affine = false"), "{affine}");
    let map = message("feature_map", json!("bias_gelu"));
    assert!(map.contains("config.json") && map.contains("bias_gelu"), "{map}");
}

#[test]
fn a_shared_convolution_is_refused() {
    let folder = folder();
    edit(folder.path(), |entries| {
        let entry = Entry { dtype: Dtype::F32, shape: vec![32, 1, 4], bytes: vec![0; 512] };
        entries.insert("model.layers.0.attn.h_conv1d.weight".into(), entry);
    });
    let error = error(folder.path());
    assert!(matches!(error, CheckpointError::Unsupported { .. }), "{error}");
    assert!(error.to_string().contains("model.layers.0.attn.h_conv1d.weight"), "{error}");
}

#[test]
fn sizes_that_make_no_model_are_errors() {
    let message = |key, value| {
        let error = with_setting(key, value);
        assert!(matches!(error, CheckpointError::Config { .. }), "{error}");
        error.to_string()
    };
    assert!(message("num_heads", json!(5)).contains("a positive multiple of num_heads = 5"));
    assert!(message("num_heads", json!(0)).contains("num_heads = 0"));
    assert!(message("num_kv_heads", json!(3)).contains("a multiple of num_kv_heads = 3"));
    assert!(message("hidden_size", json!(0)).contains("hidden_size"));
    assert!(message("vocab_size", json!(0)).contains("vocab_size must be at least 1, got 0"));
    let clamp = message("clamp_min", json!(0.5));
    assert!(clamp.ends_with("clamp_min must be at most 0, got 0.5"), "{clamp}");
    let layer = message("attn", json!([{"layers": [0, 2], "num_heads": 4}]));
    assert!(layer.contains("attn[0]: layer 2 must be below num_hidden_layers = 2"), "{layer}");
    let heads = message("attn", json!({"layers": [1], "num_heads": 5}));
    assert!(heads.contains("num_heads = 5 must divide hidden_size = 32"), "{heads}");
    let retnet = with_settings(&[("model_type", json!("retnet")), ("num_heads", json!(3))]);
    assert!(retnet.to_string().contains("a positive multiple of num_heads = 3"), "{retnet}");
    assert!(message("norm_eps", json!(0.0)).contains("norm_eps must be positive, got 0"));
    let settings = [("model_type", json!("transformer")), ("norm_eps", json!(0.0))];
    let transformer = with_settings(&settings).to_string();
    assert!(transformer.contains("norm_eps must be positive, got 0"), "{transformer}");
    let inner = with_settings(&[("intermediate_size", json!(null)), ("hidden_ratio", json!(0))]);
    let inner = inner.to_string();
    assert!(inner.contains("hidden_size * hidden_ratio must be at least 1, got 0"), "{inner}");
    assert!(matches!(with_setting("vocab_size", json!("x")), CheckpointError::Read { .. }));
    let unread = |key, value| {
        let error = with_setting(key, value);
        assert!(matches!(error, CheckpointError::Read { .. }), "{error}");
        error.to_string()
    };
    let heads = unread("attn", json!([{"layers": [0], "num_heads": 4}, {"layers": [1]}]));
    assert!(heads.contains("attn[1]: missing field `num_heads`"), "{heads}");
    let layers = unread("attn", json!({"layers": [true], "num_heads": 4}));
    assert!(layers.contains("attn[0]: invalid type: boolean `true`, expected usize"), "{layers}");
    let end = unread("eos_token_id", json!("</s>"));
    assert!(end.contains("eos_token_id") && end.contains("expected an id"), "{end}");
    let wider = with_setting("hidden_size", json!(64)).to_string();
    assert!(wider.contains("model.norm.weight has shape [32], expected [64]"), "{wider}");
}

#[test]
fn what_fla_could_not_load_is_not_written() {
    let target = tempfile::tempdir().unwrap();
    let write = |config: &CheckpointConfig, model: &gla_burn::GlaTransformerConfig, dtype| {
        let options = SaveOptions { dtype, ..Default::default() };
        let error = save(&drawn(model, 1), config, target.path(), &options).unwrap_err();
        assert_eq!(fs::read_dir(&target).unwrap().count(), 0, "nothing is written");
        error.to_string()
    };
    let right = CheckpointConfig::new(config());
    for (model, what) in [
        (config().with_gate_logit_normalizer(8.0), "gate_logit_normalizer = 8"),
        (config().with_gate_low_rank_dim(8), "gate_low_rank_dim = 8"),
    ] {
        let error = write(&CheckpointConfig::new(model.clone()), &model, None);
        assert!(error.contains(what) && error.contains("always uses 16"), "{error}");
    }
    let lightning = FixedDecay::Lightning { layer: 0, num_layers: 1 };
    for (mixer, what) in [
        (MixerConfig::Retention(RetentionConfig::new(32).with_decay(lightning)), "decay = "),
        (
            MixerConfig::Retention(RetentionConfig::new(32).with_rope_theta(None)),
            "rope_theta = null",
        ),
        (
            MixerConfig::Retention(RetentionConfig::new(32).with_use_short_conv(true)),
            "use_short_conv = true",
        ),
        (MixerConfig::SimpleGla(SimpleGlaConfig::new(32)), "a model of simple_gla"),
    ] {
        let model = config().with_mixer(Some(mixer));
        let error = write(&CheckpointConfig::new(model.clone()), &model, None);
        assert!(error.contains(what) && error.contains("is not supported"), "{error}");
    }
    let error = write(&right, &config(), Some(DType::F64));
    assert!(error.contains("a checkpoint in F64 is not supported"), "{error}");
    let error = write(&right, &config().with_use_output_gate(false), None);
    assert!(error.contains("model.layers.0.attn.g_proj.weight [32, 32] is missing"), "{error}");
    assert!(error.contains("model.layers.0.attn.g_norm.weight [8] is unknown"), "{error}");
}

#[test]
fn a_folder_in_use_is_left_alone() {
    let folder = folder();
    let names = |path: &Path| {
        let mut names: Vec<_> = fs::read_dir(path).unwrap().map(|e| e.unwrap().path()).collect();
        names.sort();
        names
    };
    let before = names(folder.path());
    let config = CheckpointConfig::new(config());
    let model = drawn(&config.model, 1);
    let error = save(&model, &config, folder.path(), &SaveOptions::default()).unwrap_err();
    assert!(matches!(error, CheckpointError::Exists { .. }), "{error}");
    assert_eq!(names(folder.path()), before);

    // a new folder in a new folder; nothing is left beside it
    let target = folder.path().join("new/copy");
    save(&model, &config, &target, &SaveOptions::default()).unwrap();
    assert_eq!(names(&folder.path().join("new")), std::slice::from_ref(&target));
    assert_eq!(names(&target), [target.join("config.json"), target.join(SINGLE)]);

    // a file in the way of the folder
    let error =
        save(&model, &config, folder.path().join(SINGLE).join("x"), &SaveOptions::default());
    assert!(matches!(error, Err(CheckpointError::Write { .. })));
    // and in its place
    let error = save(&model, &config, folder.path().join(SINGLE), &SaveOptions::default());
    let error = error.unwrap_err().to_string();
    assert!(error.ends_with("it is a file, not a folder"), "{error}");
    assert_eq!(names(folder.path()).len(), before.len() + 1);
}
