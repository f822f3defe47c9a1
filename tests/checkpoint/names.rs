//! Names and shapes of the tensors, against fla's list.

use std::collections::BTreeMap;

use burn::tensor::Device;
use gla_burn::checkpoint::{SaveOptions, tensor_shapes};
use gla_burn::{
    GatedLinearAttentionConfig, GlaTransformerConfig, MixerConfig, SoftmaxAttentionConfig,
};

use crate::{cases, files, saved};

/// fla's list.
fn names_and_shapes(config: &GlaTransformerConfig) -> BTreeMap<String, Vec<usize>> {
    let hidden = config.hidden_size;
    let inner = config.block(0).mlp.inner_size();
    let mut list = BTreeMap::new();
    let mut add = |name: String, shape: &[usize]| list.insert(name, shape.to_vec());
    for (i, block) in config.blocks().enumerate() {
        let mut add = |name: &str, shape: &[usize]| add(format!("model.layers.{i}.{name}"), shape);
        add("attn_norm.weight", &[hidden]);
        match block.attn {
            MixerConfig::Gla(layer) => gla_names_and_shapes(&layer, &mut add),
            // as gated linear attention, without a gate
            MixerConfig::Retention(layer) => {
                let same = GatedLinearAttentionConfig::new(layer.hidden_size)
                    .with_num_heads(layer.num_heads)
                    .with_num_kv_heads(layer.num_kv_heads)
                    .with_expand_k(layer.expand_k)
                    .with_expand_v(layer.expand_v)
                    .with_use_short_conv(layer.use_short_conv)
                    .with_conv_size(layer.conv_size)
                    .with_use_output_gate(layer.use_output_gate);
                gla_names_and_shapes(&same, |name, shape| {
                    if !name.contains("gk_proj") {
                        add(name, shape);
                    }
                });
            }
            MixerConfig::SoftmaxAttention(layer) => softmax_names_and_shapes(&layer, &mut add),
            other => panic!("no list for {other:?}"),
        }
        add("mlp_norm.weight", &[hidden]);
        add("mlp.gate_proj.weight", &[inner, hidden]);
        add("mlp.up_proj.weight", &[inner, hidden]);
        add("mlp.down_proj.weight", &[hidden, inner]);
    }
    add("model.embeddings.weight".into(), &[config.vocab_size, hidden]);
    add("model.norm.weight".into(), &[hidden]);
    if !config.tie_word_embeddings {
        add("lm_head.weight".into(), &[config.vocab_size, hidden]);
    }
    list
}

fn gla_names_and_shapes<T>(
    layer: &GatedLinearAttentionConfig,
    mut add: impl FnMut(&str, &[usize]) -> T,
) {
    let hidden = layer.hidden_size;
    let keys = (hidden as f64 * layer.expand_k) as usize;
    let values = (hidden as f64 * layer.expand_v) as usize;
    let groups = layer.num_heads / layer.num_kv_heads.unwrap_or(layer.num_heads);
    add("attn.q_proj.weight", &[keys, hidden]);
    add("attn.k_proj.weight", &[keys / groups, hidden]);
    add("attn.v_proj.weight", &[values / groups, hidden]);
    add("attn.gk_proj.0.weight", &[16, hidden]);
    add("attn.gk_proj.1.weight", &[keys / groups, 16]);
    add("attn.gk_proj.1.bias", &[keys / groups]);
    add("attn.o_proj.weight", &[hidden, values]);
    let head = values / layer.num_heads;
    if layer.use_output_gate {
        add("attn.g_proj.weight", &[values, hidden]);
        add("attn.g_norm_swish_gate.weight", &[head]);
    } else {
        add("attn.g_norm.weight", &[head]);
    }
    if layer.use_short_conv {
        add("attn.q_conv1d.weight", &[keys, 1, layer.conv_size]);
        add("attn.k_conv1d.weight", &[keys / groups, 1, layer.conv_size]);
        add("attn.v_conv1d.weight", &[values / groups, 1, layer.conv_size]);
    }
}

fn softmax_names_and_shapes<T>(
    layer: &SoftmaxAttentionConfig,
    mut add: impl FnMut(&str, &[usize]) -> T,
) {
    let hidden = layer.hidden_size;
    let kv = hidden / layer.num_heads * layer.num_kv_heads.unwrap_or(layer.num_heads);
    for (name, rows) in [("q", hidden), ("k", kv), ("v", kv)] {
        add(&format!("attn.{name}_proj.weight"), &[rows, hidden]);
        if layer.qkv_bias {
            add(&format!("attn.{name}_proj.bias"), &[rows]);
        }
    }
    add("attn.o_proj.weight", &[hidden, hidden]);
}

#[test]
fn names_and_shapes_are_flas() {
    // parameters are made when first used: the large models take no memory
    let tied = GlaTransformerConfig::gla_340m();
    let untied = tied.clone().with_tie_word_embeddings(false);
    let published = [(tied, 338), (untied, 339), (GlaTransformerConfig::gla_2_7b(), 451)];
    for (config, count) in published {
        let found = tensor_shapes(&config.init(&Device::flex()));
        assert_eq!(found.len(), count);
        assert_eq!(found, names_and_shapes(&config));
    }
    for (name, config) in cases() {
        let (_, folder) = saved(&config, &SaveOptions::default());
        let entries = files::read(&folder.path().join(files::SINGLE)).into_iter();
        let found: BTreeMap<_, _> = entries.map(|(name, entry)| (name, entry.shape)).collect();
        assert_eq!(found, names_and_shapes(&config), "{name}");
        assert_eq!(found, tensor_shapes(&config.init(&Device::flex())), "{name}");
    }
}
