//! Softmax attention in some layers of a model.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::SoftmaxAttentionConfig;

/// Layers of softmax attention in a [`GlaTransformerConfig`](super::GlaTransformerConfig); the rest
/// keep the model's mixer.
///
/// As JSON one specification or a list, as flash-linear-attention's `attn`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HybridAttention(pub Vec<HybridAttentionSpec>);

/// The layers that share one kind of softmax attention.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HybridAttentionSpec {
    /// Indices of the layers, from 0.
    pub layers: Vec<usize>,
    /// Number of heads.
    pub num_heads: usize,
    /// Number of heads of keys and values; as many as `num_heads` if `None`.
    #[serde(default)]
    pub num_kv_heads: Option<usize>,
    /// Whether queries, keys and values have a bias. Default: false
    #[serde(default)]
    pub qkv_bias: bool,
    /// How many tokens a token sees, itself included; all before it if `None`.
    #[serde(default)]
    pub window_size: Option<usize>,
    /// Base of the rotary embedding. Default: 10000
    #[serde(default = "rope_theta")]
    pub rope_theta: f64,
}

/// What can be wrong with a [`HybridAttention`]; `spec` counts from 0.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum HybridAttentionError {
    /// A layer that the model does not have.
    #[error("attn[{spec}]: layer {layer} must be below num_hidden_layers = {num_hidden_layers}")]
    Layer {
        /// The specification.
        spec: usize,
        /// The layer.
        layer: usize,
        /// Layers of the model.
        num_hidden_layers: usize,
    },
    /// A layer is listed twice.
    #[error("attn[{spec}]: layer {layer} is also in attn[{other}]")]
    Twice {
        /// The specification.
        spec: usize,
        /// The layer.
        layer: usize,
        /// The specification that has it already.
        other: usize,
    },
    /// The heads do not fit.
    #[error(
        "attn[{spec}]: num_heads = {num_heads} must divide hidden_size = {hidden_size} into even \
         widths and be a multiple of num_kv_heads = {num_kv_heads}"
    )]
    Heads {
        /// The specification.
        spec: usize,
        /// Its heads.
        num_heads: usize,
        /// Its heads of keys and values.
        num_kv_heads: usize,
        /// Width of the model.
        hidden_size: usize,
    },
    /// The window is empty.
    #[error("attn[{spec}]: window_size must be at least 1, got 0")]
    Window {
        /// The specification.
        spec: usize,
    },
    /// The base of the rotary embedding is not a positive number.
    #[error("attn[{spec}]: rope_theta must be finite and positive, got {rope_theta}")]
    Theta {
        /// The specification.
        spec: usize,
        /// Its base.
        rope_theta: f64,
    },
}

impl Serialize for HybridAttention {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.as_slice() {
            // what readers of before lists understand
            [spec] => spec.serialize(serializer),
            specs => specs.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for HybridAttention {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OneOrMany)
    }
}

/// Unlike an untagged enum it says what is wrong, and in which specification.
struct OneOrMany;

impl<'de> Visitor<'de> for OneOrMany {
    type Value = HybridAttention;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a specification of softmax attention or a list of them")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        let spec = HybridAttentionSpec::deserialize(MapAccessDeserializer::new(map));
        Ok(HybridAttention(vec![spec.map_err(|error| in_spec(0, error))?]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut specs = Vec::new();
        while let Some(spec) = list.next_element().map_err(|e| in_spec(specs.len(), e))? {
            specs.push(spec);
        }
        Ok(HybridAttention(specs))
    }
}

fn in_spec<E: Error>(spec: usize, error: E) -> E {
    E::custom(format_args!("attn[{spec}]: {error}"))
}

fn rope_theta() -> f64 {
    10000.0
}

impl HybridAttentionSpec {
    /// Attention with `num_heads` heads in `layers`, the rest at its default.
    pub fn new(layers: Vec<usize>, num_heads: usize) -> Self {
        Self {
            layers,
            num_heads,
            num_kv_heads: None,
            qkv_bias: false,
            window_size: None,
            rope_theta: rope_theta(),
        }
    }

    /// The layer in a model of this width.
    pub(super) fn layer(&self, hidden_size: usize) -> SoftmaxAttentionConfig {
        SoftmaxAttentionConfig::new(hidden_size, self.num_heads)
            .with_num_kv_heads(self.num_kv_heads)
            .with_qkv_bias(self.qkv_bias)
            .with_window_size(self.window_size)
            .with_rope_theta(self.rope_theta)
    }
}

impl HybridAttention {
    /// The specification that lists `layer`.
    pub fn at(&self, layer: usize) -> Option<&HybridAttentionSpec> {
        self.0.iter().find(|spec| spec.layers.contains(&layer))
    }

    /// Checks the specifications against the sizes of a model.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong, with the number of the specification.
    pub fn check(
        &self,
        num_hidden_layers: usize,
        hidden_size: usize,
    ) -> Result<(), HybridAttentionError> {
        use HybridAttentionError::*;

        let mut owners = vec![None; num_hidden_layers];
        for (spec, s) in self.0.iter().enumerate() {
            for &layer in &s.layers {
                match owners.get_mut(layer) {
                    None => return Err(Layer { spec, layer, num_hidden_layers }),
                    Some(Some(other)) => return Err(Twice { spec, layer, other: *other }),
                    Some(owner) => *owner = Some(spec),
                }
            }
            let num_heads = s.num_heads;
            let num_kv_heads = s.num_kv_heads.unwrap_or(num_heads);
            if num_heads == 0
                || num_kv_heads == 0
                || !hidden_size.is_multiple_of(2 * num_heads)
                || !num_heads.is_multiple_of(num_kv_heads)
            {
                return Err(Heads { spec, num_heads, num_kv_heads, hidden_size });
            }
            if s.window_size == Some(0) {
                return Err(Window { spec });
            }
            if !(s.rope_theta.is_finite() && s.rope_theta > 0.0) {
                return Err(Theta { spec, rope_theta: s.rope_theta });
            }
        }
        Ok(())
    }
}
