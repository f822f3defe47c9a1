//! The keys of fla's `GLAConfig`.

use serde::Deserialize;
use serde_json::{Value, json};

use super::{Ignored, LayerKeys};
use crate::nn::{FeatureMap, GatedLinearAttentionConfig, GlaTransformerConfig};

/// fla passes neither to its layers, which always use 16.
const NORMALIZER: f64 = 16.0;
const RANK: usize = 16;

#[derive(Deserialize)]
#[serde(default)]
pub(super) struct Keys {
    num_heads: usize,
    num_kv_heads: Option<usize>,
    expand_k: f64,
    expand_v: f64,
    feature_map: Option<FeatureMap>,
    use_short_conv: bool,
    conv_size: usize,
    use_output_gate: bool,
    clamp_min: Option<f64>,
    gate_logit_normalizer: Option<f64>,
    gate_low_rank_dim: Option<usize>,
    conv_bias: bool,
}

impl Default for Keys {
    fn default() -> Self {
        Self {
            num_heads: 4,
            num_kv_heads: None,
            expand_k: 0.5,
            expand_v: 1.0,
            feature_map: None,
            use_short_conv: false,
            conv_size: 4,
            use_output_gate: true,
            clamp_min: None,
            gate_logit_normalizer: None,
            gate_low_rank_dim: None,
            conv_bias: false,
        }
    }
}

impl LayerKeys for Keys {
    const HIDDEN_RATIO: f64 = 4.0;

    fn refuse(&self, _model: &GlaTransformerConfig) -> Option<String> {
        unknown_map(self.feature_map)
    }

    fn ignored(&self) -> Ignored {
        let normalizer = self.gate_logit_normalizer.filter(|value| *value != NORMALIZER);
        let rank = self.gate_low_rank_dim.filter(|value| *value != RANK);
        let ignored = [
            normalizer.map(|value| (format!("gate_logit_normalizer = {value}"), "16")),
            rank.map(|value| (format!("gate_low_rank_dim = {value}"), "16")),
            self.conv_bias.then(|| ("conv_bias = true".to_string(), "false")),
        ];
        ignored.into_iter().flatten().collect()
    }

    fn apply(self, model: &mut GlaTransformerConfig) {
        model.num_heads = self.num_heads;
        model.num_kv_heads = self.num_kv_heads;
        model.expand_k = self.expand_k;
        model.expand_v = self.expand_v;
        model.feature_map = self.feature_map;
        model.use_short_conv = self.use_short_conv;
        model.conv_size = self.conv_size;
        model.use_output_gate = self.use_output_gate;
        model.clamp_min = self.clamp_min;
        model.gate_logit_normalizer = NORMALIZER;
        model.gate_low_rank_dim = RANK;
    }
}

/// The keys of a model of such layers, or the setting that fla does not have.
pub(super) fn json(
    layer: &GatedLinearAttentionConfig,
    model: &GlaTransformerConfig,
) -> Result<Value, String> {
    let (normalizer, rank) = (layer.gate_logit_normalizer, layer.gate_low_rank_dim);
    if normalizer != NORMALIZER {
        return Err(format!("gate_logit_normalizer = {normalizer} (fla always uses {NORMALIZER})"));
    }
    if rank != RANK {
        return Err(format!("gate_low_rank_dim = {rank} (fla always uses {RANK})"));
    }
    if let Some(what) = unknown_map(layer.feature_map) {
        return Err(what);
    }
    Ok(json!({
        "architectures": ["GLAForCausalLM"],
        "model_type": "gla",
        "attn_mode": "chunk",
        "num_heads": layer.num_heads,
        "num_kv_heads": layer.num_kv_heads,
        "expand_k": layer.expand_k,
        "expand_v": layer.expand_v,
        "feature_map": layer.feature_map,
        "use_short_conv": layer.use_short_conv,
        "conv_size": layer.conv_size,
        "use_output_gate": layer.use_output_gate,
        "clamp_min": layer.clamp_min,
        "attn": model.attn,
    }))
}

/// The feature map if these layers of fla do not have it.
pub(super) fn unknown_map(map: Option<FeatureMap>) -> Option<String> {
    (map == Some(FeatureMap::Elu)).then(|| "feature_map = elu".to_string())
}
