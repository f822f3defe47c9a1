//! Kinds of `--mixer`: what stands where attention stands, with all the rest of the model the same.

use clap::ValueEnum;
use gla_burn::{
    GlaTransformerConfig, Hgrn2Config, LinearAttentionConfig, Mamba2Config, MambaConfig,
    MixerConfig, RetentionConfig, SimpleGlaConfig, SoftmaxAttentionConfig,
};

/// Kind of the layers of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MixerKind {
    /// Gated linear attention: a gate per key channel.
    Gla,
    /// Gated linear attention with a gate per head.
    SimpleGla,
    /// RetNet's retention: a constant decay per head.
    Retention,
    /// Linear attention: no decay.
    LinearAttention,
    /// HGRN2: a gate per key channel that the keys are tied to.
    Hgrn2,
    /// Mamba-2.
    Mamba2,
    /// Mamba; slow here.
    Mamba,
    /// Softmax attention.
    SoftmaxAttention,
}

impl MixerKind {
    /// Sets the mixer of `model`, of its heads and width.
    ///
    /// Keys are as wide as those of gated linear attention where a gate or a decay is all that
    /// differs, and a short convolution goes where the kind has one; the rest is the kind's own.
    pub fn set(self, model: &mut GlaTransformerConfig) {
        let (hidden, heads) = (model.hidden_size, model.num_heads);
        let conv = model.use_short_conv;
        model.mixer = match self {
            Self::Gla => None,
            Self::SimpleGla => {
                let config = SimpleGlaConfig::new(hidden).with_num_heads(heads);
                let config = config.with_expand_k(model.expand_k).with_use_short_conv(conv);
                Some(MixerConfig::SimpleGla(config))
            }
            Self::Retention => {
                let config = RetentionConfig::new(hidden).with_num_heads(heads);
                let config = config.with_expand_k(model.expand_k).with_expand_v(model.expand_v);
                Some(MixerConfig::Retention(config))
            }
            Self::LinearAttention => {
                let config = LinearAttentionConfig::new(hidden).with_num_heads(heads);
                Some(MixerConfig::LinearAttention(config))
            }
            Self::Hgrn2 => {
                let config = Hgrn2Config::new(hidden).with_num_heads(Some(heads));
                let config = config.with_expand_ratio(hidden / heads.max(1));
                Some(MixerConfig::Hgrn2(config.with_use_short_conv(conv)))
            }
            Self::Mamba2 => {
                let config = Mamba2Config::new(hidden);
                let head_dim = config.expand * hidden / heads.max(1);
                Some(MixerConfig::Mamba2(config.with_head_dim(head_dim)))
            }
            Self::Mamba => Some(MixerConfig::Mamba(MambaConfig::new(hidden))),
            Self::SoftmaxAttention => {
                Some(MixerConfig::SoftmaxAttention(SoftmaxAttentionConfig::new(hidden, heads)))
            }
        };
    }

    /// The kind of a model's mixer.
    pub fn of(model: &GlaTransformerConfig) -> Self {
        match model.mixer {
            None | Some(MixerConfig::Gla(_)) => Self::Gla,
            Some(MixerConfig::SimpleGla(_)) => Self::SimpleGla,
            Some(MixerConfig::Retention(_)) => Self::Retention,
            Some(MixerConfig::LinearAttention(_)) => Self::LinearAttention,
            Some(MixerConfig::Hgrn2(_)) => Self::Hgrn2,
            Some(MixerConfig::Mamba2(_)) => Self::Mamba2,
            Some(MixerConfig::Mamba(_)) => Self::Mamba,
            Some(MixerConfig::SoftmaxAttention(_)) => Self::SoftmaxAttention,
        }
    }

    /// The name on the command line.
    pub fn name(self) -> String {
        self.to_possible_value().expect("no kind is hidden").get_name().to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Preset;

    #[test]
    fn every_kind_fits_every_preset() {
        for preset in Preset::value_variants() {
            for kind in MixerKind::value_variants() {
                let mut model = preset.config().model;
                kind.set(&mut model);
                model.check().unwrap_or_else(|why| panic!("{preset:?} {kind:?}: {why}"));
                assert_eq!(MixerKind::of(&model), *kind);
            }
        }
    }

    #[test]
    fn names_are_those_of_the_command_line() {
        let names: Vec<String> = MixerKind::value_variants().iter().map(|k| k.name()).collect();
        let expected = [
            "gla",
            "simple-gla",
            "retention",
            "linear-attention",
            "hgrn2",
            "mamba2",
            "mamba",
            "softmax-attention",
        ];
        assert_eq!(names, expected);
    }
}
