//! What the configurations of this family have in common: sizes, and the making of the layer.

use burn::nn::Linear;
use burn::tensor::{DType, Device, Tensor};

use super::{GateProjection, GatedLinearAttention};
use crate::nn::init::{projection, projection_with_bias};
use crate::nn::norm::check_norm_eps;
use crate::nn::{
    FeatureMap, LinearFeatureMap, RmsNorm, RmsNormConfig, Rotary, ShortConv, ShortConvConfig,
};

/// Heads and their widths.
#[derive(Clone, Copy, Debug)]
pub(in crate::nn) struct Heads {
    pub num: usize,
    pub num_kv: usize,
    pub k_dim: usize,
    pub v_dim: usize,
}

/// What the decay depends on.
#[derive(Clone, Debug)]
pub(in crate::nn) enum GateParts {
    /// No decay.
    None,
    /// The logarithm of the decay of each head.
    Fixed(Vec<f32>),
    /// A full projection to one value a head.
    Scalar,
    /// A projection of this rank to one value a key channel.
    Vector(usize),
}

/// The output norm, which decides about its name too.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::nn) enum OutputNorm {
    /// `g_norm_swish_gate`, with the output gate.
    Gated,
    /// `g_norm`, without output gate.
    Plain,
    /// `norm`, without output gate.
    Named,
}

/// A [`GatedLinearAttention`] to be made.
#[derive(Clone, Debug)]
pub(in crate::nn) struct Parts {
    pub hidden_size: usize,
    pub heads: Heads,
    /// Kernel size of the short convolutions.
    pub conv_size: Option<usize>,
    pub gate: GateParts,
    pub gate_logit_normalizer: f64,
    pub clamp_min: Option<f64>,
    pub feature_map: Option<FeatureMap>,
    /// Of its kinds those of whole heads; `feature_map` has the others.
    pub head_feature_map: LinearFeatureMap,
    pub rotary: Option<Rotary>,
    pub normalize: bool,
    pub output_norm: OutputNorm,
    pub norm_eps: f64,
    pub initializer_range: f64,
}

impl OutputNorm {
    /// The norm of a layer that may have an output gate.
    pub fn gated(use_output_gate: bool) -> Self {
        if use_output_gate { Self::Gated } else { Self::Plain }
    }
}

impl Heads {
    /// Derives the widths of the heads.
    ///
    /// # Errors
    ///
    /// What does not divide.
    pub fn new(
        hidden_size: usize,
        [num, num_kv]: [usize; 2],
        [expand_k, expand_v]: [f64; 2],
    ) -> Result<Self, String> {
        let head_dim = |name: &str, expand: f64| {
            let dim = (hidden_size as f64 * expand) as usize;
            if num > 0 && dim > 0 && dim.is_multiple_of(num) {
                return Ok(dim / num);
            }
            Err(format!(
                "hidden_size * {name} = {hidden_size} * {expand} = {dim} must be a positive \
                 multiple of num_heads = {num}"
            ))
        };
        let (k_dim, v_dim) = (head_dim("expand_k", expand_k)?, head_dim("expand_v", expand_v)?);
        if num_kv == 0 || !num.is_multiple_of(num_kv) {
            return Err(format!("num_heads = {num} must be a multiple of num_kv_heads = {num_kv}"));
        }
        Ok(Self { num, num_kv, k_dim, v_dim })
    }

    /// Widths of all queries, keys and values.
    pub fn widths(&self) -> [usize; 3] {
        [self.num * self.k_dim, self.num_kv * self.k_dim, self.num_kv * self.v_dim]
    }

    /// Width of the output before its projection.
    pub fn value_dim(&self) -> usize {
        self.num * self.v_dim
    }
}

impl Parts {
    /// A layer without anything that a kind may add.
    pub fn new(hidden_size: usize, heads: Heads, norm_eps: f64, initializer_range: f64) -> Self {
        Self {
            hidden_size,
            heads,
            conv_size: None,
            gate: GateParts::None,
            gate_logit_normalizer: 1.0,
            clamp_min: None,
            feature_map: None,
            head_feature_map: LinearFeatureMap::Identity,
            rotary: None,
            normalize: false,
            output_norm: OutputNorm::Gated,
            norm_eps,
            initializer_range,
        }
    }

    /// The parts, if they fit.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong.
    pub fn checked(self) -> Result<Self, String> {
        let normalizer = self.gate_logit_normalizer;
        let reason = if matches!(self.gate, GateParts::Vector(0)) {
            "gate_low_rank_dim must be at least 1, got 0".into()
        } else if normalizer.is_nan() || normalizer <= 0.0 {
            format!("gate_logit_normalizer must be positive, got {normalizer}")
        } else if let Some(min) = self.clamp_min.filter(|min| min.is_nan() || *min > 0.0) {
            format!("clamp_min must be at most 0, got {min}")
        } else if self.conv_size == Some(0) {
            "conv_size must be at least 1, got 0".into()
        } else if let Err(reason) = check_norm_eps(self.norm_eps) {
            reason
        } else {
            if let Some(rotary) = self.rotary {
                rotary.check(self.heads.k_dim)?;
            }
            return Ok(self);
        };
        Err(reason)
    }

    pub fn init(&self, device: &Device) -> GatedLinearAttention {
        let (heads, hidden, std) = (self.heads, self.hidden_size, self.initializer_range);
        let [q_width, k_width, v_width] = heads.widths();
        let value_dim = heads.value_dim();
        let linear = |d_output| projection(hidden, d_output, std, device);
        let conv = |channels| -> Option<ShortConv> {
            let config = ShortConvConfig::new(channels).with_kernel_size(self.conv_size?);
            Some(config.with_initializer_range(std).init(device))
        };
        let head_map = || self.head_feature_map.init(heads.k_dim, std, device);
        let norm = |kind: OutputNorm| -> Option<RmsNorm> {
            let config = RmsNormConfig::new(heads.v_dim).with_epsilon(self.norm_eps);
            (self.output_norm == kind).then(|| config.init(device))
        };
        GatedLinearAttention {
            q_proj: linear(q_width),
            k_proj: linear(k_width),
            v_proj: linear(v_width),
            q_conv1d: conv(q_width),
            k_conv1d: conv(k_width),
            v_conv1d: conv(v_width),
            feature_map_q: head_map(),
            feature_map_k: head_map(),
            gk_proj: self.gate_projection(device),
            fixed_gate: match &self.gate {
                GateParts::Fixed(gate) => {
                    Some(Tensor::from_data(gate.as_slice(), (device, DType::F32)))
                }
                _ => None,
            },
            g_proj: (self.output_norm == OutputNorm::Gated).then(|| linear(value_dim)),
            g_norm_swish_gate: norm(OutputNorm::Gated),
            g_norm: norm(OutputNorm::Plain),
            norm: norm(OutputNorm::Named),
            o_proj: projection(value_dim, hidden, std, device),
            num_heads: heads.num,
            num_kv_heads: heads.num_kv,
            head_k_dim: heads.k_dim,
            head_v_dim: heads.v_dim,
            gate_logit_normalizer: self.gate_logit_normalizer,
            clamp_min: self.clamp_min,
            feature_map: self.feature_map,
            rotary: self.rotary,
            normalize: self.normalize,
        }
    }

    fn gate_projection(&self, device: &Device) -> Option<GateProjection> {
        let (heads, hidden, std) = (self.heads, self.hidden_size, self.initializer_range);
        let with_bias =
            |input, output| -> Linear { projection_with_bias(input, output, std, device) };
        match self.gate {
            GateParts::None | GateParts::Fixed(_) => None,
            GateParts::Scalar => Some(with_bias(hidden, heads.num_kv).into()),
            GateParts::Vector(rank) => {
                let down = projection(hidden, rank, std, device);
                Some([down, with_bias(rank, heads.num_kv * heads.k_dim)].into())
            }
        }
    }

    pub fn num_params(&self) -> usize {
        let (heads, hidden) = (self.heads, self.hidden_size);
        let [q, k, v] = heads.widths();
        let value_dim = heads.value_dim();
        let output_gate = usize::from(self.output_norm == OutputNorm::Gated) * hidden * value_dim;
        let convs = self.conv_size.unwrap_or(0) * (q + k + v);
        let head_maps = 2 * self.head_feature_map.num_params(heads.k_dim);
        let gate = match self.gate {
            GateParts::None | GateParts::Fixed(_) => 0,
            GateParts::Scalar => (hidden + 1) * heads.num_kv,
            GateParts::Vector(rank) => hidden * rank + rank * k + k,
        };
        hidden * (q + k + v + value_dim) + output_gate + convs + head_maps + gate + heads.v_dim
    }
}

/// What a configuration does with the layer that its `try_parts` describes.
macro_rules! layer_of_parts {
    ($config:ident, $(#[$panics:meta])+) => {
        impl $config {
            /// Initialize a new [`GatedLinearAttention`](crate::nn::GatedLinearAttention) layer.
            ///
            /// # Panics
            ///
            $(#[$panics])+
            pub fn init(
                &self,
                device: &burn::tensor::Device,
            ) -> $crate::nn::GatedLinearAttention {
                self.parts().init(device)
            }

            /// Number of parameters of the module, without making it.
            ///
            /// # Panics
            ///
            /// As [`init`](Self::init).
            pub fn num_params(&self) -> usize {
                self.parts().num_params()
            }

            /// Says what is wrong with the configuration, if anything is.
            ///
            /// # Errors
            ///
            /// What [`init`](Self::init) would panic with.
            pub fn check(&self) -> Result<(), String> {
                self.try_parts().map(drop)
            }

            fn parts(&self) -> $crate::nn::attention::Parts {
                let name = stringify!($config);
                self.try_parts().unwrap_or_else(|reason| panic!("{name}: {reason}"))
            }
        }
    };
}
pub(in crate::nn) use layer_of_parts;
