use burn::module::{Content, DisplaySettings, Module, ModuleDisplay};
use burn::nn::Linear;
use burn::tensor::{Device, Tensor, assert_shape};

use crate::nn::state::LayerStateShape;
use crate::nn::{FeatureMap, LayerState, RmsNorm, ShortConv, log_sigmoid};
use crate::{Gate, GlaOptions, StepGate, gla, gla_step};

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

/// Operands of the op.
struct Operands {
    /// `[B, T, H, K]`
    q: Tensor<4>,
    /// `[B, T, Hk, K]`
    k: Tensor<4>,
    /// `[B, T, Hk, V]`
    v: Tensor<4>,
    /// `[B, T, Hk, K]`, f32
    log_gate: Tensor<4>,
}

impl GatedLinearAttention {
    /// Applies the layer to whole sequences.
    ///
    /// # Shapes
    ///
    /// - x: `[B, T, hidden_size]`
    /// - output: `[B, T, hidden_size]`
    ///
    /// # Panics
    ///
    /// Panics if the last axis of `x` is not `hidden_size`.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let Operands { q, k, v, log_gate } = self.operands(x.clone(), None);
        let output = gla(q, k, v, Gate::Vector(log_gate), GlaOptions::default()).output;
        self.output(output, x)
    }

    /// Applies the layer to the next tokens of sequences whose past is in `state`, and updates it.
    ///
    /// Pieces of any length may follow each other; together they give what
    /// [`forward`](Self::forward) gives.
    ///
    /// # Shapes
    ///
    /// - x: `[B, T, hidden_size]`, `T >= 1`
    /// - output: `[B, T, hidden_size]`
    ///
    /// # Panics
    ///
    /// Panics if the last axis of `x` is not `hidden_size`, or if `state` is not of this layer and
    /// batch size.
    pub fn prefill(&self, x: Tensor<3>, state: &mut LayerState) -> Tensor<3> {
        self.enter(&x, state);
        let Operands { q, k, v, log_gate } = self.operands(x.clone(), state.conv.as_mut());
        let options = GlaOptions {
            initial_state: state.recurrent.take(),
            final_state: true,
            ..Default::default()
        };
        let output = gla(q, k, v, Gate::Vector(log_gate), options);
        state.recurrent = output.final_state.map(Tensor::without_autodiff);
        self.output(output.output, x)
    }

    /// Applies the layer to the next token of sequences whose past is in `state`, and updates it.
    ///
    /// # Shapes
    ///
    /// - x: `[B, hidden_size]`
    /// - output: `[B, hidden_size]`
    ///
    /// # Panics
    ///
    /// Panics if the last axis of `x` is not `hidden_size`, or if `state` is not of this layer and
    /// batch size.
    pub fn step(&self, x: Tensor<2>, state: &mut LayerState) -> Tensor<2> {
        let [batch, hidden] = x.dims();
        let (k_dim, v_dim) = (self.head_k_dim, self.head_v_dim);
        let x = x.unsqueeze_dim::<3>(1);

        self.enter(&x, state);
        let Operands { q, k, v, log_gate } = self.operands(x.clone(), state.conv.as_mut());
        let recurrent = state.recurrent.take().expect("checked on entry");
        let (output, recurrent) = gla_step(
            q.reshape([batch, self.num_heads, k_dim]),
            k.reshape([batch, self.num_kv_heads, k_dim]),
            v.reshape([batch, self.num_kv_heads, v_dim]),
            StepGate::Vector(log_gate.reshape([batch, self.num_kv_heads, k_dim])),
            recurrent,
            None,
        );
        state.recurrent = Some(recurrent.without_autodiff());

        let output = output.reshape([batch, 1, self.num_heads, v_dim]);
        self.output(output, x).reshape([batch, hidden])
    }

    /// The state before the first token of `batch` sequences.
    pub fn init_state(&self, batch: usize, device: &Device) -> LayerState {
        let dtype = self.q_proj.weight.val().dtype();
        LayerState::zeros(&self.state_shape(batch), dtype, device)
    }

    pub(in crate::nn) fn state_shape(&self, batch: usize) -> LayerStateShape {
        let convs = [&self.q_conv1d, &self.k_conv1d, &self.v_conv1d];
        let conv = convs.map(|conv| {
            let [channels, _, kernel_size] = conv.as_ref()?.weight.lazy_shape().dims();
            Some([batch, channels, kernel_size])
        });
        LayerStateShape {
            recurrent: [batch, self.num_heads, self.head_k_dim, self.head_v_dim],
            conv: match conv {
                [Some(q), Some(k), Some(v)] => Some([q, k, v]),
                _ => None,
            },
        }
    }

    /// Checks `state` against the layer and its input, and takes it out of autodiff.
    fn enter(&self, x: &Tensor<3>, state: &mut LayerState) {
        let [batch, tokens, _] = x.dims();
        assert!(
            tokens > 0,
            "GatedLinearAttention: x must hold at least 1 token per sequence, got 0"
        );
        if let Err(error) = state.check(&self.state_shape(batch)) {
            panic!("GatedLinearAttention: {error}");
        }

        // constants for the op, also if the state was made on an autodiff device
        state.recurrent = state.recurrent.take().map(Tensor::without_autodiff);
        state.conv = state.conv.take().map(|conv| conv.map(Tensor::without_autodiff));
    }

    fn operands(&self, x: Tensor<3>, conv: Option<&mut [Tensor<3>; 3]>) -> Operands {
        let [batch, tokens, _] = x.dims();
        let [hidden, _] = self.q_proj.weight.dims();
        assert_shape!(x, [_, _, hidden]);

        let heads = |x: Tensor<3>, num: usize, dim: usize| x.reshape([batch, tokens, num, dim]);
        let map = |x: Tensor<4>| match self.feature_map {
            Some(map) => map.apply(x),
            None => x,
        };
        let qkv = [&self.q_proj, &self.k_proj, &self.v_proj].map(|proj| proj.forward(x.clone()));
        let [q, k, v] = self.convolve(qkv, conv);

        let [down, up] = &self.gk_proj;
        let logits = heads(up.forward(down.forward(x)), self.num_kv_heads, self.head_k_dim);
        let log_gate = log_sigmoid(logits) / self.gate_logit_normalizer;
        Operands {
            q: map(heads(q, self.num_heads, self.head_k_dim)),
            k: map(heads(k, self.num_kv_heads, self.head_k_dim)),
            v: heads(v, self.num_kv_heads, self.head_v_dim),
            log_gate: match self.clamp_min {
                Some(min) => log_gate.clamp_min(min),
                None => log_gate,
            },
        }
    }

    /// Short convolutions of queries, keys and values, if the layer has them.
    fn convolve(&self, qkv: [Tensor<3>; 3], cache: Option<&mut [Tensor<3>; 3]>) -> [Tensor<3>; 3] {
        let (Some(q), Some(k), Some(v)) = (&self.q_conv1d, &self.k_conv1d, &self.v_conv1d) else {
            return qkv;
        };
        let [xq, xk, xv] = qkv;
        match cache {
            None => [q.forward(xq), k.forward(xk), v.forward(xv)],
            Some([cq, ck, cv]) => {
                [q.forward_cached(xq, cq), k.forward_cached(xk, ck), v.forward_cached(xv, cv)]
            }
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
