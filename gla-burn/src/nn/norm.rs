use burn::config::Config;
use burn::module::{Content, DisplaySettings, Module, ModuleDisplay, Param};
use burn::nn::Initializer;
use burn::tensor::{DType, Device, Tensor, assert_shape};

use super::rows::scale_rows_in_place;

/// Configuration to create an [`RmsNorm`] layer using the [init function](RmsNormConfig::init).
#[derive(Config, Debug)]
pub struct RmsNormConfig {
    /// The size of the normalised axis.
    pub d_model: usize,
    /// Added to the mean square. Default: 1e-6
    #[config(default = 1e-6)]
    pub epsilon: f64,
}

impl RmsNormConfig {
    /// Initialize a new [`RmsNorm`] module with weight 1.
    ///
    /// # Panics
    ///
    /// Panics if `epsilon` is not positive.
    pub fn init(&self, device: &Device) -> RmsNorm {
        assert!(
            self.epsilon > 0.0,
            "RmsNormConfig: epsilon must be positive, got {}",
            self.epsilon
        );

        RmsNorm { weight: Initializer::Ones.init([self.d_model], device), epsilon: self.epsilon }
    }
}

/// What configurations with a norm check of it.
pub(super) fn check_norm_eps(norm_eps: f64) -> Result<(), String> {
    match norm_eps > 0.0 {
        true => Ok(()),
        false => Err(format!("norm_eps must be positive, got {norm_eps}")),
    }
}

/// Root-mean-square normalisation over the last axis, computed in f32 and rounded once.
///
/// `Y = X / sqrt(mean(X^2) + eps) * weight`
///
/// Differs from [`burn::nn::RmsNorm`] in the rounding (Burn's rounds the quotient before the weight
/// is applied) and in the name of the parameter.
///
/// Should be created using [`RmsNormConfig`].
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct RmsNorm {
    /// Learnt scale, `[d_model]`.
    pub weight: Param<Tensor<1>>,
    /// Added to the mean square.
    pub epsilon: f64,
}

impl RmsNorm {
    /// Normalises the last axis.
    ///
    /// # Shapes
    ///
    /// - x: `[..., d_model]`
    /// - output: `[..., d_model]`, dtype of `x`
    ///
    /// # Panics
    ///
    /// Panics if the last axis of `x` is not `d_model`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let dtype = x.dtype();
        self.normalize(x).cast(dtype)
    }

    /// [`forward`](Self::forward), not rounded to the type of `x`.
    pub(super) fn normalize<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let [d_model] = self.weight.dims();
        assert_shape!(x, [.., d_model]);

        let x = x.cast(DType::F32);
        let rms = (x.clone().square().mean_dim(D - 1) + self.epsilon).sqrt();
        scale_rows_in_place(x / rms, self.weight.val().cast(DType::F32))
    }
}

impl ModuleDisplay for RmsNorm {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new().with_new_line_after_attribute(false).optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let [d_model] = self.weight.lazy_shape().dims();
        content.add("d_model", &d_model).add("epsilon", &self.epsilon).optional()
    }
}
