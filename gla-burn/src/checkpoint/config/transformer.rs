//! The keys of fla's `TransformerConfig`: softmax attention in all layers.

use serde::Deserialize;
use serde_json::{Value, json};

use super::{Ignored, LayerKeys};
use crate::nn::{GlaTransformerConfig, MixerConfig, SoftmaxAttentionConfig};

#[derive(Deserialize)]
#[serde(default)]
pub(super) struct Keys {
    num_heads: usize,
    num_kv_heads: Option<usize>,
    qkv_bias: bool,
    qk_norm: bool,
    window_size: Option<usize>,
    rope_theta: Option<f64>,
}

impl Default for Keys {
    fn default() -> Self {
        Self {
            num_heads: 32,
            num_kv_heads: None,
            qkv_bias: false,
            qk_norm: false,
            window_size: None,
            rope_theta: Some(10000.0),
        }
    }
}

impl LayerKeys for Keys {
    const HIDDEN_RATIO: f64 = 4.0;

    fn refuse(&self, model: &GlaTransformerConfig) -> Option<String> {
        match (&model.attn, self.qk_norm, self.rope_theta) {
            (Some(attn), ..) => Some(format!("attn = {} in a transformer", json!(attn))),
            (_, true, _) => Some("qk_norm = true (norms of queries and keys)".into()),
            (.., None) => Some("rope_theta = null".into()),
            _ => None,
        }
    }

    fn ignored(&self) -> Ignored {
        Vec::new()
    }

    fn apply(self, model: &mut GlaTransformerConfig) {
        let layer = SoftmaxAttentionConfig::new(model.hidden_size, self.num_heads)
            .with_num_kv_heads(self.num_kv_heads)
            .with_qkv_bias(self.qkv_bias)
            .with_window_size(self.window_size)
            .with_rope_theta(self.rope_theta.unwrap_or(10000.0))
            .with_initializer_range(model.initializer_range);
        model.mixer = Some(MixerConfig::SoftmaxAttention(layer));
    }
}

/// The keys of a model of such layers, or what fla does not have.
pub(super) fn json(
    layer: &SoftmaxAttentionConfig,
    model: &GlaTransformerConfig,
) -> Result<Value, String> {
    if let Some(attn) = &model.attn {
        return Err(format!("attn = {} in a transformer", json!(attn)));
    }
    Ok(json!({
        "architectures": ["TransformerForCausalLM"],
        "model_type": "transformer",
        "num_heads": layer.num_heads,
        "num_kv_heads": layer.num_kv_heads,
        "qkv_bias": layer.qkv_bias,
        "qk_norm": false,
        "window_size": layer.window_size,
        "rope_theta": layer.rope_theta,
    }))
}
