use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use super::{Mixer, SoftmaxAttentionConfig};
use crate::nn::GatedLinearAttentionConfig;

/// Configuration to create a [`Mixer`] using the [init function](MixerConfig::init): the kind, and
/// the configuration of a layer of this kind.
///
/// As JSON an object with the kind as its only key, for example
/// `{"softmax_attention": {"num_heads": 16, ..}}`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MixerConfig {
    /// Gated linear attention.
    Gla(GatedLinearAttentionConfig),
    /// Softmax attention, for a Transformer with all the rest the same.
    SoftmaxAttention(SoftmaxAttentionConfig),
}

/// Where in a model a mixer is: what the model decides for all its layers.
#[derive(Clone, Copy, Debug)]
pub(in crate::nn) struct LayerPlace {
    pub hidden_size: usize,
    pub norm_eps: f64,
    pub initializer_range: f64,
}

impl MixerConfig {
    /// Initialize a new [`Mixer`] module.
    ///
    /// # Panics
    ///
    /// As the `init` of the kind.
    pub fn init(&self, device: &Device) -> Mixer {
        match self {
            Self::Gla(config) => config.init(device).into(),
            Self::SoftmaxAttention(config) => config.init(device).into(),
        }
    }

    /// Width of the input and the output.
    pub fn hidden_size(&self) -> usize {
        match self {
            Self::Gla(config) => config.hidden_size,
            Self::SoftmaxAttention(config) => config.hidden_size,
        }
    }

    /// Number of parameters of the module, without making it.
    ///
    /// # Panics
    ///
    /// As [`init`](Self::init).
    pub fn num_params(&self) -> usize {
        match self {
            Self::Gla(config) => config.num_params(),
            Self::SoftmaxAttention(config) => config.num_params(),
        }
    }

    /// The configuration with what the model decides.
    pub(in crate::nn) fn at(self, place: LayerPlace) -> Self {
        match self {
            Self::Gla(config) => Self::Gla(GatedLinearAttentionConfig {
                hidden_size: place.hidden_size,
                norm_eps: place.norm_eps,
                initializer_range: place.initializer_range,
                ..config
            }),
            Self::SoftmaxAttention(config) => Self::SoftmaxAttention(SoftmaxAttentionConfig {
                hidden_size: place.hidden_size,
                initializer_range: place.initializer_range,
                ..config
            }),
        }
    }
}
