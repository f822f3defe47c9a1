use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use super::{
    FixedDecay, Hgrn2Config, LinearAttentionConfig, Mamba2Config, MambaConfig, Mixer,
    RetentionConfig, SimpleGlaConfig, SoftmaxAttentionConfig,
};
use crate::nn::GatedLinearAttentionConfig;

/// Configuration to create a [`Mixer`] using the [init function](MixerConfig::init): the kind, and
/// the configuration of a layer of this kind.
///
/// As JSON an object with the kind as its only key, for example
/// `{"softmax_attention": {"hidden_size": 1024, "num_heads": 16, ..}}`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MixerConfig {
    /// Gated linear attention.
    Gla(GatedLinearAttentionConfig),
    /// Gated linear attention with one gate a head.
    SimpleGla(SimpleGlaConfig),
    /// RetNet's retention, or TransNormerLLM's decay.
    Retention(RetentionConfig),
    /// Linear attention, without decay.
    LinearAttention(LinearAttentionConfig),
    /// HGRN2.
    Hgrn2(Hgrn2Config),
    /// Mamba-2.
    Mamba2(Mamba2Config),
    /// Mamba, a baseline that is slow here.
    Mamba(MambaConfig),
    /// Softmax attention, for a Transformer with all the rest the same.
    SoftmaxAttention(SoftmaxAttentionConfig),
}

/// Where in a model a mixer is: what the model decides for all its layers.
#[derive(Clone, Copy, Debug)]
pub(in crate::nn) struct LayerPlace {
    pub hidden_size: usize,
    pub norm_eps: f64,
    pub initializer_range: f64,
    pub layer: usize,
    pub num_layers: usize,
}

/// The same for the configuration of any kind.
macro_rules! of_kind {
    ($mixer:expr, $config:ident => $result:expr) => {
        match $mixer {
            MixerConfig::Gla($config) => $result,
            MixerConfig::SimpleGla($config) => $result,
            MixerConfig::Retention($config) => $result,
            MixerConfig::LinearAttention($config) => $result,
            MixerConfig::Hgrn2($config) => $result,
            MixerConfig::Mamba2($config) => $result,
            MixerConfig::Mamba($config) => $result,
            MixerConfig::SoftmaxAttention($config) => $result,
        }
    };
}

impl MixerConfig {
    /// Initialize a new [`Mixer`] module.
    ///
    /// # Panics
    ///
    /// As the `init` of the kind.
    pub fn init(&self, device: &Device) -> Mixer {
        of_kind!(self, config => config.init(device).into())
    }

    /// Says what is wrong with the configuration, if anything is.
    ///
    /// # Errors
    ///
    /// What [`init`](Self::init) would panic with.
    pub fn check(&self) -> Result<(), String> {
        of_kind!(self, config => config.check())
    }

    /// Width of the input and the output.
    pub fn hidden_size(&self) -> usize {
        of_kind!(self, config => config.hidden_size)
    }

    /// Number of parameters of the module, without making it.
    ///
    /// # Panics
    ///
    /// As [`init`](Self::init).
    pub fn num_params(&self) -> usize {
        of_kind!(self, config => config.num_params())
    }

    /// The configuration with what the model decides.
    pub(in crate::nn) fn at(mut self, place: LayerPlace) -> Self {
        of_kind!(&mut self, config => {
            config.hidden_size = place.hidden_size;
            config.initializer_range = place.initializer_range;
        });
        match &mut self {
            Self::Gla(config) => config.norm_eps = place.norm_eps,
            Self::SimpleGla(config) => config.norm_eps = place.norm_eps,
            Self::LinearAttention(config) => config.norm_eps = place.norm_eps,
            Self::Hgrn2(config) => config.norm_eps = place.norm_eps,
            Self::Mamba2(config) => config.norm_eps = place.norm_eps,
            Self::Retention(config) => {
                config.norm_eps = place.norm_eps;
                if let FixedDecay::Lightning { layer, num_layers } = &mut config.decay {
                    (*layer, *num_layers) = (place.layer, place.num_layers);
                }
            }
            Self::Mamba(_) | Self::SoftmaxAttention(_) => {}
        }
        self
    }

    /// Width of the lower bounds that the model is to hold for each layer.
    pub(in crate::nn) fn lower_bound(&self) -> Option<usize> {
        match self {
            Self::Hgrn2(config) if config.use_lower_bound => Some(config.forget_dim()),
            _ => None,
        }
    }
}
