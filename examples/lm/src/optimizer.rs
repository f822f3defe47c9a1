//! AdamW with decay on matrices only, stable parameter ids, and a clip of the global gradient norm.
//!
//! `cargo test --release -p gla-lm --lib -- optimizer`
//!
//! Burn's own norm clip looks at one tensor at a time, which turns the step as well as shortening it.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamGroup, ParamId};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::{Device, Tensor};

use crate::hash::fnv1a;

/// AdamW (0.9, 0.95) for `model`; `weight_decay` applies to tensors of two and more dimensions, except
/// Mamba's `A_log`, a logarithm that decay would draw to a rate of 1.
pub fn adamw<M: Module>(model: &M, weight_decay: f32) -> ModuleOptimizer {
    let config = AdamWConfig::new().with_beta_1(0.9).with_beta_2(0.95).with_epsilon(1e-8);
    let mut matrices = Decayed::default();
    model.visit(&mut matrices);
    config.clone().with_weight_decay(0.0).init().with_group(
        ParamGroup::from_ids(matrices.ids),
        config.with_weight_decay(weight_decay).build(),
        None,
    )
}

/// Ids of the parameters that decay.
#[derive(Default)]
struct Decayed {
    ids: Vec<ParamId>,
    path: Vec<String>,
}

impl ModuleVisitor for Decayed {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if D >= 2 && self.path.last().is_none_or(|name| name != "A_log") {
            self.ids.push(param.id);
        }
    }
}

/// `model` with ids made from parameter paths instead of drawn at random.
///
/// A checkpoint stores the ids, so this is what makes equal weights equal files. It also draws all
/// initial weights now, in the order of the paths.
pub fn with_stable_ids<M: Module>(model: M) -> M {
    model.map(&mut StableIds::default())
}

#[derive(Default)]
struct StableIds {
    path: Vec<String>,
}

impl ModuleMapper for StableIds {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let id = ParamId::from(fnv1a(self.path.join(".").as_bytes()));
        let (_, tensor, mapper) = param.consume();
        Param::from_mapped_value(id, tensor, mapper)
    }
}

/// Scale all gradients by one factor so that their joint norm is at most `max_norm`.
///
/// Returns the norm before, `[1]`, still on the device: nothing here waits for it.
pub fn clip_global_norm<M: Module>(
    model: &M,
    mut grads: GradientsParams,
    max_norm: f32,
    device: &Device,
) -> (GradientsParams, Tensor<1>) {
    let mut squares = SumOfSquares { grads: &grads, sum: Tensor::zeros([1], device) };
    model.visit(&mut squares);
    let norm = squares.sum.sqrt();
    // the small number keeps a gradient of zero at zero
    let factor = (norm.clone() + 1e-6).recip().mul_scalar(max_norm);
    let mut scale = Scale { grads: &mut grads, factor: factor.clamp_max(1.0) };
    model.visit(&mut scale);
    (grads, norm)
}

struct SumOfSquares<'a> {
    grads: &'a GradientsParams,
    sum: Tensor<1>,
}

impl ModuleVisitor for SumOfSquares<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(grad) = self.grads.get::<D>(param.id) {
            // rows first: a sum over everything may add its parts in the order in which threads
            // finish, and a resumed run has to repeat every bit
            let rows = grad.square().sum_dim(D - 1);
            self.sum = self.sum.clone() + rows.sum();
        }
    }
}

struct Scale<'a> {
    grads: &'a mut GradientsParams,
    factor: Tensor<1>,
}

impl ModuleVisitor for Scale<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(grad) = self.grads.remove::<D>(param.id) {
            let factor = self.factor.clone().reshape([1; D]);
            self.grads.register(param.id, grad * factor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::test_device;
    use burn::nn::{Linear, LinearConfig};
    use gla_burn::MambaConfig;

    #[test]
    fn matrices_decay_except_the_rates_of_mamba() {
        let layer = with_stable_ids(MambaConfig::new(8).init(&test_device()));
        let mut decayed = Decayed::default();
        layer.visit(&mut decayed);
        let expected =
            [&layer.in_proj, &layer.x_proj, &layer.dt_proj, &layer.out_proj].map(|l| l.weight.id);
        assert!(expected.iter().all(|id| decayed.ids.contains(id)));
        assert!(decayed.ids.contains(&layer.conv1d.weight.id));
        assert_eq!(decayed.ids.len(), 5, "neither A_log nor vectors");
    }

    /// Gradients 3 for the single weight and 4 for the single bias.
    fn example() -> (Linear, GradientsParams) {
        let device = test_device().autodiff();
        let model = with_stable_ids(LinearConfig::new(1, 1).init(&device));
        let bias = model.bias.as_ref().unwrap().val();
        let loss = (model.weight.val() * 3.0).sum() + (bias * 4.0).sum();
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        (model, grads)
    }

    fn values(model: &Linear, grads: &GradientsParams) -> [f32; 2] {
        let weight = grads.get::<2>(model.weight.id).unwrap();
        let bias = grads.get::<1>(model.bias.as_ref().unwrap().id).unwrap();
        [weight.into_scalar(), bias.into_scalar()]
    }

    fn clipped(max_norm: f32) -> ([f32; 2], f32) {
        let (model, grads) = example();
        let (grads, norm) = clip_global_norm(&model, grads, max_norm, &test_device());
        (values(&model, &grads), norm.into_scalar())
    }

    #[test]
    fn the_norm_spans_all_tensors_and_the_direction_stays() {
        let ([weight, bias], norm) = clipped(1.0);
        assert!((norm - 5.0).abs() < 1e-5, "{norm}");
        assert!((weight - 0.6).abs() < 1e-5, "{weight}");
        assert!((bias - 0.8).abs() < 1e-5, "{bias}");
    }

    #[test]
    fn short_gradients_are_left_alone() {
        let (grads, norm) = clipped(10.0);
        assert_eq!(grads, [3.0, 4.0]);
        assert!((norm - 5.0).abs() < 1e-5, "{norm}");
    }

    #[test]
    fn ids_depend_on_the_path_alone() {
        let ids = || {
            let (model, _) = example();
            (model.weight.id, model.bias.unwrap().id)
        };
        assert_eq!(ids(), ids());
        assert_ne!(ids().0, ids().1);
    }

    #[test]
    fn only_matrices_decay() {
        let (mut model, _) = example();
        model.weight = model.weight.map(|t| t.ones_like().require_grad());
        model.bias = model.bias.map(|bias| bias.map(|t| t.ones_like().require_grad()));
        let mut optimizer = adamw(&model, 0.5);
        let loss =
            (model.weight.val() * 0.0).sum() + (model.bias.as_ref().unwrap().val() * 0.0).sum();
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        let model = optimizer.step(0.1, model, grads);
        let weight = model.weight.val().into_scalar::<f32>();
        let bias = model.bias.unwrap().val().into_scalar::<f32>();
        assert!((weight - 0.95).abs() < 1e-6, "{weight}");
        assert_eq!(bias, 1.0);
    }
}
