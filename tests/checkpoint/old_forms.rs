//! What older versions of fla wrote, and what is left out of a checkpoint.

use gla_burn::checkpoint::{Checkpoint, SaveOptions};
use gla_burn::{GlaTransformerConfig, MixerConfig, RetentionConfig};
use serde_json::json;

use crate::files::{Entries, edit, edit_config};
use crate::{cases, config, load, parameters, saved};

/// Saves a model of `config`, changes the tensors, and expects the same model back.
fn still_loads(config: GlaTransformerConfig, change: impl FnOnce(&mut Entries)) {
    let (model, folder) = saved(&config, &SaveOptions::default());
    edit(folder.path(), change);
    assert!(parameters(&load(folder.path())) == parameters(&model));
}

fn rename(entries: &mut Entries, rename: impl Fn(&str) -> String) {
    *entries = std::mem::take(entries).into_iter().map(|(n, e)| (rename(&n), e)).collect();
}

#[test]
fn the_prefix_may_be_missing() {
    for (_, config) in cases() {
        still_loads(config, |entries| rename(entries, |name| name.replacen("model.", "", 1)));
    }
}

#[test]
fn the_embedding_may_be_embed_tokens() {
    still_loads(config(), |entries| {
        rename(entries, |name| name.replace("model.embeddings", "model.embed_tokens"))
    });
}

#[test]
fn the_projections_of_the_mlp_may_be_one_tensor() {
    still_loads(config(), |entries| {
        for i in 0..2 {
            let up = entries.remove(&format!("model.layers.{i}.mlp.up_proj.weight")).unwrap();
            let gate = entries.get_mut(&format!("model.layers.{i}.mlp.gate_proj.weight")).unwrap();
            gate.bytes.extend(up.bytes);
            gate.shape[0] *= 2;
        }
    });
}

#[test]
fn a_gated_norm_may_not_be_fused() {
    still_loads(config(), |entries| {
        rename(entries, |name| name.replace("g_norm_swish_gate", "g_norm"))
    });
}

#[test]
fn a_tied_model_may_have_a_head() {
    still_loads(config().with_tie_word_embeddings(true), |entries| {
        let head = entries.get_key_value("model.embeddings.weight").unwrap().1;
        let (dtype, shape) = (head.dtype, head.shape.clone());
        let bytes = vec![0; head.bytes.len()];
        entries.insert("lm_head.weight".into(), crate::files::Entry { dtype, shape, bytes });
    });
}

#[test]
fn settings_left_out_are_flas() {
    let folder = tempfile::tempdir().unwrap();
    let (_, other) = saved(&config(), &SaveOptions::default());
    std::fs::copy(other.path().join("model.safetensors"), folder.path().join("model.safetensors"))
        .unwrap();
    std::fs::write(folder.path().join("config.json"), r#"{"model_type": "gla"}"#).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let config = checkpoint.config();
    assert_eq!(config.model.to_string(), GlaTransformerConfig::gla_1_3b().to_string());
    assert_eq!((config.bos_token_id, config.pad_token_id), (Some(1), None));
    assert_eq!(config.eos_token_ids, [2]);
}

#[test]
fn old_and_unknown_settings_are_read() {
    let (model, folder) = saved(&config().with_norm_eps(1e-3), &SaveOptions::default());
    edit_config(folder.path(), |config| {
        config.remove("norm_eps");
        config.insert("rms_norm_eps".into(), json!(1e-3));
        config.insert("attn_mode".into(), json!("fused_chunk"));
        config.insert("hidden_ratio".into(), json!(null));
        config.insert("eos_token_id".into(), json!([2, 7]));
        config.insert("pad_token_id".into(), json!(-1));
        config.insert("architectures".into(), json!(null));
        config.insert("some_future_setting".into(), json!({"a": [1, 2]}));
    });
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.config().model.norm_eps, 1e-3);
    assert_eq!(checkpoint.config().eos_token_ids, [2, 7]);
    assert_eq!(checkpoint.config().pad_token_id, None);
    assert!(parameters(&load(folder.path())) == parameters(&model));
}

#[test]
fn a_retnet_has_no_short_convolution() {
    let retnet = config().with_mixer(Some(MixerConfig::Retention(RetentionConfig::new(32))));
    let (model, folder) = saved(&retnet, &SaveOptions::default());
    edit_config(folder.path(), |config| {
        config.insert("use_short_conv".into(), json!(true));
    });
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let warnings = checkpoint.warnings();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].contains("use_short_conv = true is ignored"), "{warnings:?}");
    assert!(parameters(&load(folder.path())) == parameters(&model));
}

#[test]
fn ignored_settings_are_warned_of() {
    let (model, folder) = saved(&config(), &SaveOptions::default());
    edit_config(folder.path(), |config| {
        config.insert("gate_logit_normalizer".into(), json!(8));
        config.insert("gate_low_rank_dim".into(), json!(32));
        config.insert("conv_bias".into(), json!(true));
    });
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let warnings = checkpoint.warnings();
    assert_eq!(warnings.len(), 3, "{warnings:?}");
    assert!(warnings[0].contains("gate_logit_normalizer = 8 is ignored"), "{warnings:?}");
    assert!(warnings[1].ends_with(
        "gate_low_rank_dim = 32 is ignored, as flash-linear-attention ignores it: it is always 16"
    ));
    assert_eq!(checkpoint.config().model.gate_logit_normalizer, 16.0);
    assert!(parameters(&load(folder.path())) == parameters(&model));

    edit_config(folder.path(), |config| {
        config.insert("gate_logit_normalizer".into(), json!(16));
        config.insert("gate_low_rank_dim".into(), json!(16));
        config.remove("conv_bias");
    });
    assert!(Checkpoint::open(folder.path()).unwrap().warnings().is_empty());
}
