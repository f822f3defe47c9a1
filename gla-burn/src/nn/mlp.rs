use burn::config::Config;
use burn::module::{Content, DisplaySettings, Module, ModuleDisplay};
use burn::nn::Linear;
use burn::tensor::{Device, Tensor, assert_shape};

use super::init::projection;
use super::swish::swish_gate;

/// Configuration to create a [`GlaMlp`] layer using the [init function](GlaMlpConfig::init).
#[derive(Config, Debug)]
pub struct GlaMlpConfig {
    /// Width of the input and the output.
    pub hidden_size: usize,
    /// Inner width of an ungated MLP with as many parameters, relative to `hidden_size`. Default:
    /// 4.0
    #[config(default = 4.0)]
    pub hidden_ratio: f64,
    /// Inner width; `hidden_size * hidden_ratio * 2 / 3`, rounded up to a multiple of 256, if
    /// `None`.
    pub intermediate_size: Option<usize>,
    /// Standard deviation of the initial weights. Default: 0.02
    #[config(default = 0.02)]
    pub initializer_range: f64,
}

impl GlaMlpConfig {
    /// Initialize a new [`GlaMlp`] module.
    pub fn init(&self, device: &Device) -> GlaMlp {
        let (hidden, inner) = (self.hidden_size, self.inner_size());
        let linear =
            |d_input, d_output| projection(d_input, d_output, self.initializer_range, device);
        GlaMlp {
            gate_proj: linear(hidden, inner),
            up_proj: linear(hidden, inner),
            down_proj: linear(inner, hidden),
        }
    }

    /// The inner width, derived or given.
    pub fn inner_size(&self) -> usize {
        self.intermediate_size.unwrap_or_else(|| {
            // truncated before it is rounded up, as flash-linear-attention does
            let inner = (self.hidden_size as f64 * self.hidden_ratio * 2.0 / 3.0) as usize;
            inner.next_multiple_of(256)
        })
    }

    /// Number of parameters of the module, without making it.
    pub fn num_params(&self) -> usize {
        3 * self.hidden_size * self.inner_size()
    }
}

/// SwiGLU feed-forward layer: `Y = (silu(X W_gate) * X W_up) W_down`, the product in f32.
///
/// Should be created using [`GlaMlpConfig`].
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct GlaMlp {
    /// `hidden_size -> inner_size`, through the swish.
    pub gate_proj: Linear,
    /// `hidden_size -> inner_size`.
    pub up_proj: Linear,
    /// `inner_size -> hidden_size`.
    pub down_proj: Linear,
}

impl GlaMlp {
    /// Applies the layer.
    ///
    /// # Shapes
    ///
    /// - x: `[..., hidden_size]`
    /// - output: `[..., hidden_size]`
    ///
    /// # Panics
    ///
    /// Panics if the last axis of `x` is not `hidden_size`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let [hidden, _] = self.gate_proj.weight.dims();
        assert_shape!(x, [.., hidden]);

        let dtype = x.dtype();
        let (gate, up) = (self.gate_proj.forward(x.clone()), self.up_proj.forward(x));
        self.down_proj.forward(swish_gate(up, gate, dtype))
    }
}

impl ModuleDisplay for GlaMlp {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new().with_new_line_after_attribute(false).optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let [hidden_size, inner_size] = self.gate_proj.weight.lazy_shape().dims();
        content.add("hidden_size", &hidden_size).add("inner_size", &inner_size).optional()
    }
}
