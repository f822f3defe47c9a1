//! The keys of fla's `RetNetConfig`.

use serde::Deserialize;
use serde_json::{Value, json};

use super::gla::unknown_map;
use super::{Ignored, LayerKeys};
use crate::nn::{FeatureMap, FixedDecay, GlaTransformerConfig, MixerConfig, RetentionConfig};

/// Base of the rotary embedding, which is not in `config.json`.
const THETA: f64 = 10000.0;

#[derive(Deserialize)]
#[serde(default)]
pub(super) struct Keys {
    num_heads: usize,
    num_kv_heads: Option<usize>,
    expand_k: f64,
    expand_v: f64,
    feature_map: Option<FeatureMap>,
    use_short_conv: bool,
    use_output_gate: bool,
}

impl Default for Keys {
    fn default() -> Self {
        Self {
            num_heads: 8,
            num_kv_heads: None,
            expand_k: 1.0,
            expand_v: 2.0,
            feature_map: None,
            use_short_conv: false,
            use_output_gate: true,
        }
    }
}

impl LayerKeys for Keys {
    const HIDDEN_RATIO: f64 = 2.0;

    fn refuse(&self, _model: &GlaTransformerConfig) -> Option<String> {
        unknown_map(self.feature_map)
    }

    // fla's block does not hand it on to the layer
    fn ignored(&self) -> Ignored {
        match self.use_short_conv {
            true => vec![("use_short_conv = true".to_string(), "false")],
            false => Vec::new(),
        }
    }

    fn apply(self, model: &mut GlaTransformerConfig) {
        let layer = RetentionConfig::new(model.hidden_size)
            .with_num_heads(self.num_heads)
            .with_num_kv_heads(self.num_kv_heads)
            .with_expand_k(self.expand_k)
            .with_expand_v(self.expand_v)
            .with_decay(FixedDecay::Retention)
            .with_rope_theta(Some(THETA))
            .with_feature_map(self.feature_map)
            .with_use_output_gate(self.use_output_gate)
            .with_norm_eps(model.norm_eps)
            .with_initializer_range(model.initializer_range);
        model.mixer = Some(MixerConfig::Retention(layer));
    }
}

/// The keys of a model of such layers, or the setting that fla does not have.
pub(super) fn json(layer: &RetentionConfig, model: &GlaTransformerConfig) -> Result<Value, String> {
    if layer.decay != FixedDecay::Retention {
        return Err(format!("decay = {} of a retnet", json!(layer.decay)));
    }
    if layer.rope_theta != Some(THETA) {
        return Err(format!("rope_theta = {} (fla always uses {THETA})", json!(layer.rope_theta)));
    }
    if layer.use_short_conv {
        return Err("use_short_conv = true of a retnet (fla never uses it there)".into());
    }
    if let Some(what) = unknown_map(layer.feature_map) {
        return Err(what);
    }
    Ok(json!({
        "architectures": ["RetNetForCausalLM"],
        "model_type": "retnet",
        "attn_mode": "chunk",
        "num_heads": layer.num_heads,
        "num_kv_heads": layer.num_kv_heads,
        "expand_k": layer.expand_k,
        "expand_v": layer.expand_v,
        "feature_map": layer.feature_map,
        "use_short_conv": false,
        "use_output_gate": layer.use_output_gate,
        "attn": model.attn,
    }))
}
