use burn::module::{Content, DisplaySettings, Module, ModuleDisplay};
use burn::nn::Linear;
use burn::tensor::{DType, Device, Tensor, assert_shape};

use crate::nn::mixer::{Mix, Operands, Pass, conv_shapes, convolve, mixer_methods, recur};
use crate::nn::rows::project_rows;
use crate::nn::swish::swish_gate;
use crate::nn::transparent::transparent_module;
use crate::nn::{
    FeatureMap, HeadFeatureMap, LayerState, LayerStateShape, RmsNorm, Rotary, SequenceLayout,
    ShortConv, log_sigmoid,
};
use crate::{Gate, GateKind};

/// Gated linear attention: attention whose memory is a matrix per head that decays by gates.
///
/// ```text
/// q, k, v = x W_q, x W_k, x W_v       through short convolutions; q and k also a feature map
/// g       = max(logsigmoid(x W_1 W_2 + b) / gate_logit_normalizer, clamp_min)
/// S_t     = diag(exp g_t) S_{t-1} + k_t v_t^T
/// o_t     = feature_dim^-0.5 S_t^T q_t
/// y       = [RMSNorm(o) * silu(x W_g)] W_o       norm per head, one weight for all heads
/// ```
///
/// With fewer key heads than query heads, query head `h` reads key, value and gate head
/// `h / (num_heads / num_kv_heads)`; these are not repeated.
///
/// Several models are this layer with another gate. The configuration decides:
///
/// | configuration | gate `g` | further |
/// |---|---|---|
/// | [`GatedLinearAttentionConfig`](super::GatedLinearAttentionConfig) | per key channel, low rank | |
/// | [`SimpleGlaConfig`](crate::nn::SimpleGlaConfig) | per head, full rank | |
/// | [`RetentionConfig`](crate::nn::RetentionConfig) | a constant per head | rotary positions |
/// | [`LinearAttentionConfig`](crate::nn::LinearAttentionConfig) | none | maps of whole heads, normaliser |
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
    /// Map of whole heads of the queries.
    pub feature_map_q: Option<HeadFeatureMap>,
    /// Map of whole heads of the keys, with as many features as that of the queries.
    pub feature_map_k: Option<HeadFeatureMap>,
    /// Projection of the gates, if they depend on the input.
    pub gk_proj: Option<GateProjection>,
    /// Logarithm of the decay of each head, `[num_heads]`, if it is constant.
    pub fixed_gate: Option<Tensor<1>>,
    /// Output gate, `hidden_size -> num_heads * head_v_dim`.
    pub g_proj: Option<Linear>,
    /// Output norm of a layer with an output gate.
    pub g_norm_swish_gate: Option<RmsNorm>,
    /// Output norm of a layer without an output gate.
    pub g_norm: Option<RmsNorm>,
    /// Output norm of linear attention.
    pub norm: Option<RmsNorm>,
    /// Output, `num_heads * head_v_dim -> hidden_size`.
    pub o_proj: Linear,
    /// Number of heads.
    pub num_heads: usize,
    /// Number of heads of keys, values and gates.
    pub num_kv_heads: usize,
    /// Width of a query and of a key as projected; see [`feature_dim`](Self::feature_dim).
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
    /// Position embedding of queries and keys, after the feature map.
    #[module(skip)]
    pub rotary: Option<Rotary>,
    /// Whether outputs are divided by the sum of their weights. The sum is one more channel of the
    /// values, and of the state, that is 1 throughout.
    pub normalize: bool,
}

transparent_module! {
    /// Projection of an input to the logits of its gates.
    pub enum GateProjection {
        /// One logit a head, `hidden_size -> num_kv_heads`, with a bias.
        Scalar(Linear),
        /// One logit a key channel, `hidden_size -> rank -> num_kv_heads * head_k_dim`; the second
        /// has a bias.
        Vector([Linear; 2]),
    }
}

mixer_methods!(GatedLinearAttention);

impl Mix for GatedLinearAttention {
    const NAME: &'static str = "GatedLinearAttention";

    fn mix(&self, x: Tensor<3>, pass: &Pass, mut state: Option<&mut LayerState>) -> Tensor<3> {
        let operands = self.operands(x.clone(), pass.layout, state.as_deref_mut());
        let output = recur(operands, pass.layout, state);
        let output = if self.normalize { divide_by_weights(output) } else { output };
        self.output(output, x)
    }

    fn state_shape(&self, batch: usize) -> LayerStateShape {
        let width = self.head_v_dim + usize::from(self.normalize);
        LayerStateShape {
            batch,
            recurrent: Some([self.num_heads, self.feature_dim(), width]),
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

        let seen = state.as_deref().map(|state| state.seen.clone());
        let qkv = [&self.q_proj, &self.k_proj, &self.v_proj].map(|proj| proj.forward(x.clone()));
        let convs = [&self.q_conv1d, &self.k_conv1d, &self.v_conv1d];
        let [q, k, v] = convolve(convs, qkv, layout, state);
        let heads = |x: Tensor<3>, num: usize, dim: usize| x.reshape([batch, tokens, num, dim]);
        let q = heads(q, self.num_heads, self.head_k_dim);
        let k = heads(k, self.num_kv_heads, self.head_k_dim);
        let v = heads(v, self.num_kv_heads, self.head_v_dim);

        let map = |x: Tensor<4>, of_heads: &Option<HeadFeatureMap>| {
            let x = self.feature_map.iter().fold(x, |x, map| map.apply(x));
            of_heads.iter().fold(x, |x, map| map.forward(x))
        };
        let (mut q, mut k) = (map(q, &self.feature_map_q), map(k, &self.feature_map_k));
        if let Some(rotary) = self.rotary {
            let place = (&q.device(), q.dtype());
            let angles = rotary.angles(self.head_k_dim, layout, seen.as_deref(), tokens, place);
            (q, k) = (angles.apply(q), angles.apply(k));
        }
        Operands {
            q,
            k,
            v: if self.normalize { with_ones(v) } else { v },
            gate: self.gate(x),
            scale: None,
        }
    }

    /// Width of a query and of a key after the feature map: what the op and the state have.
    pub fn feature_dim(&self) -> usize {
        self.head_k_dim * self.feature_map_q.as_ref().map_or(1, HeadFeatureMap::widening)
    }

    /// What the gate depends on.
    pub fn gate_kind(&self) -> GateKind {
        match (&self.gk_proj, &self.fixed_gate) {
            (Some(GateProjection::Vector(_)), _) => GateKind::Vector,
            (Some(GateProjection::Scalar(_)), _) => GateKind::Scalar,
            (None, Some(_)) => GateKind::Fixed,
            (None, None) => GateKind::None,
        }
    }

    /// The gate of the layer's input.
    fn gate(&self, x: Tensor<3>) -> Gate {
        let [batch, tokens, _] = x.dims();
        match (&self.gk_proj, &self.fixed_gate) {
            (Some(GateProjection::Scalar(proj)), _) => {
                Gate::Scalar(self.log_gate(project_rows(proj, x)))
            }
            (Some(GateProjection::Vector([down, up])), _) => {
                let logits = project_rows(up, down.forward(x));
                let shape = [batch, tokens, self.num_kv_heads, self.head_k_dim];
                Gate::Vector(self.log_gate(logits.reshape(shape)))
            }
            (None, Some(gate)) => Gate::Fixed(gate.clone()),
            (None, None) => Gate::None,
        }
    }

    fn log_gate<const D: usize>(&self, logits: Tensor<D>) -> Tensor<D> {
        let log_gate = log_sigmoid(logits) / self.gate_logit_normalizer;
        match self.clamp_min {
            Some(min) => log_gate.clamp_min(min),
            None => log_gate,
        }
    }

    /// Norm, gate and output projection of the op's `[B, T, H, V]` output; `x` is the layer's
    /// input.
    fn output(&self, output: Tensor<4>, x: Tensor<3>) -> Tensor<3> {
        let [batch, tokens, heads, v_dim] = output.dims();
        let (flat, dtype) = ([batch, tokens, heads * v_dim], output.dtype());
        let plain = self.g_norm.as_ref().or(self.norm.as_ref());
        let output = match (&self.g_proj, &self.g_norm_swish_gate, plain) {
            (Some(gate), Some(norm), _) => {
                swish_gate(norm.normalize(output).reshape(flat), gate.forward(x), dtype)
            }
            (_, _, Some(norm)) => norm.forward(output).reshape(flat),
            _ => unreachable!("a layer has a gated or a plain output norm"),
        };
        self.o_proj.forward(output)
    }
}

/// One more channel of the values, in which the op adds up the weights.
fn with_ones(v: Tensor<4>) -> Tensor<4> {
    let [batch, tokens, heads, _] = v.dims();
    let ones = Tensor::ones([batch, tokens, heads, 1], (&v.device(), v.dtype()));
    Tensor::cat(vec![v, ones], 3)
}

/// Divides the other channels by the last, in f32.
fn divide_by_weights(output: Tensor<4>) -> Tensor<4> {
    let dtype = output.dtype();
    let width = output.dims()[3] - 1;
    let output = output.cast(DType::F32);
    let weights = output.clone().narrow(3, width, 1) + 1e-10;
    (output.narrow(3, 0, width) / weights).cast(dtype)
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
            .add_debug_attribute("gate", &self.gate_kind())
            .add("short_conv", &self.q_conv1d.is_some())
            .add("output_gate", &self.g_proj.is_some())
            .optional()
    }
}
