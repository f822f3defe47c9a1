use burn::module::{Content, DisplaySettings, Module, ModuleDisplay};
use burn::nn::Linear;
use burn::tensor::{DType, Device, Tensor, assert_shape};

use crate::Gate;
use crate::nn::mixer::{Mix, Operands, conv_shapes, convolve, mixer_methods, recur};
use crate::nn::{
    FeatureMap, LayerState, LayerStateShape, RmsNorm, SequenceLayout, ShortConv, log_sigmoid,
};

/// Gated linear attention: attention whose memory is a matrix per head that decays by
/// data-dependent gates.
///
/// ```text
/// q, k, v = x W_q, x W_k, x W_v       through short convolutions; q and k also a feature map
/// g       = max(logsigmoid(x W_1 W_2 + b) / gate_logit_normalizer, clamp_min)
/// S_t     = diag(exp g_t) S_{t-1} + k_t v_t^T
/// o_t     = head_k_dim^-0.5 S_t^T q_t
/// y       = [RMSNorm(o) * silu(x W_g)] W_o       norm per head, one weight for all heads
/// ```
///
/// With fewer key heads than query heads, query head `h` reads key, value and gate head
/// `h / (num_heads / num_kv_heads)`; these are not repeated.
///
/// Should be created using [`GatedLinearAttentionConfig`](super::GatedLinearAttentionConfig).
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct GatedLinearAttention {
    /// Queries, `hidden_size -> num_heads * head_k_dim`.
    pub q_proj: Linear,
    /// Keys, `hidden_size -> num_kv_heads * head_k_dim`.
    pub k_proj: Linear,
    /// Values, `hidden_size -> num_kv_heads * head_v_dim`.
    pub v_proj: Linear,
    /// Short convolution of the queries.
    pub q_conv1d: Option<ShortConv>,
    /// Short convolution of the keys.
    pub k_conv1d: Option<ShortConv>,
    /// Short convolution of the values.
    pub v_conv1d: Option<ShortConv>,
    /// Low-rank projection of the gates, `hidden_size -> rank -> num_kv_heads * head_k_dim`; the
    /// second has a bias.
    pub gk_proj: [Linear; 2],
    /// Output gate, `hidden_size -> num_heads * head_v_dim`.
    pub g_proj: Option<Linear>,
    /// Output norm of a layer with an output gate.
    pub g_norm_swish_gate: Option<RmsNorm>,
    /// Output norm of a layer without an output gate.
    pub g_norm: Option<RmsNorm>,
    /// Output, `num_heads * head_v_dim -> hidden_size`.
    pub o_proj: Linear,
    /// Number of heads.
    pub num_heads: usize,
    /// Number of heads of keys, values and gates.
    pub num_kv_heads: usize,
    /// Width of a query and of a key.
    pub head_k_dim: usize,
    /// Width of a value.
    pub head_v_dim: usize,
    /// Divides the logarithm of the gate.
    pub gate_logit_normalizer: f64,
    /// Lower bound of the log gate.
    pub clamp_min: Option<f64>,
    /// Map of queries and keys.
    #[module(skip)]
    pub feature_map: Option<FeatureMap>,
}

mixer_methods!(GatedLinearAttention);

impl Mix for GatedLinearAttention {
    const NAME: &'static str = "GatedLinearAttention";

    fn mix(
        &self,
        x: Tensor<3>,
        layout: &SequenceLayout,
        mut state: Option<&mut LayerState>,
    ) -> Tensor<3> {
        let operands = self.operands(x.clone(), layout, state.as_deref_mut());
        self.output(recur(operands, layout, state), x)
    }

    fn state_shape(&self, batch: usize) -> LayerStateShape {
        LayerStateShape {
            batch,
            recurrent: Some([self.num_heads, self.head_k_dim, self.head_v_dim]),
            conv: conv_shapes([&self.q_conv1d, &self.k_conv1d, &self.v_conv1d]),
            ..LayerStateShape::default()
        }
    }

    fn dtype(&self) -> DType {
        self.q_proj.weight.val().dtype()
    }
}

impl GatedLinearAttention {
    fn operands(
        &self,
        x: Tensor<3>,
        layout: &SequenceLayout,
        state: Option<&mut LayerState>,
    ) -> Operands {
        let [batch, tokens, _] = x.dims();
        let [hidden, _] = self.q_proj.weight.dims();
        assert_shape!(x, [_, _, hidden]);

        let heads = |x: Tensor<3>, num: usize, dim: usize| x.reshape([batch, tokens, num, dim]);
        let map = |x: Tensor<4>| match self.feature_map {
            Some(map) => map.apply(x),
            None => x,
        };
        let qkv = [&self.q_proj, &self.k_proj, &self.v_proj].map(|proj| proj.forward(x.clone()));
        let convs = [&self.q_conv1d, &self.k_conv1d, &self.v_conv1d];
        let [q, k, v] = convolve(convs, qkv, layout, state);

        let [down, up] = &self.gk_proj;
        let logits = heads(up.forward(down.forward(x)), self.num_kv_heads, self.head_k_dim);
        let log_gate = log_sigmoid(logits) / self.gate_logit_normalizer;
        let log_gate = match self.clamp_min {
            Some(min) => log_gate.clamp_min(min),
            None => log_gate,
        };
        Operands {
            q: map(heads(q, self.num_heads, self.head_k_dim)),
            k: map(heads(k, self.num_kv_heads, self.head_k_dim)),
            v: heads(v, self.num_kv_heads, self.head_v_dim),
            gate: Gate::Vector(log_gate),
            scale: None,
        }
    }

    /// Norm, gate and output projection of the op's `[B, T, H, V]` output; `x` is the layer's
    /// input.
    fn output(&self, output: Tensor<4>, x: Tensor<3>) -> Tensor<3> {
        let [batch, tokens, heads, v_dim] = output.dims();
        let output = match (&self.g_proj, &self.g_norm_swish_gate, &self.g_norm) {
            (Some(gate), Some(norm), _) => {
                norm.forward_gated(output, gate.forward(x).reshape([batch, tokens, heads, v_dim]))
            }
            (_, _, Some(norm)) => norm.forward(output),
            _ => unreachable!("a layer has a gated or a plain output norm"),
        };
        self.o_proj.forward(output.reshape([batch, tokens, heads * v_dim]))
    }
}

impl ModuleDisplay for GatedLinearAttention {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new().with_new_line_after_attribute(false).optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let [hidden_size, _] = self.q_proj.weight.lazy_shape().dims();
        content
            .add("hidden_size", &hidden_size)
            .add("num_heads", &self.num_heads)
            .add("num_kv_heads", &self.num_kv_heads)
            .add("head_k_dim", &self.head_k_dim)
            .add("head_v_dim", &self.head_v_dim)
            .add("short_conv", &self.q_conv1d.is_some())
            .add("output_gate", &self.g_proj.is_some())
            .optional()
    }
}
