//! Parameters of a module and tensors of a checkpoint: names and shapes.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::store::ModuleContext;
use burn::tensor::Tensor;

use crate::nn::fla_name;

/// Names and shapes of a model's tensors in a checkpoint, without making its parameters.
///
/// ```
/// use burn::tensor::Device;
/// use gla_burn::{GlaTransformerConfig, checkpoint::tensor_shapes};
///
/// let model = GlaTransformerConfig::gla_1_3b().init(&Device::flex());
/// let shapes = tensor_shapes(&model);
/// assert_eq!(shapes.len(), 339);
/// assert_eq!(shapes["model.layers.23.attn.q_proj.weight"], [1024, 2048]);
/// ```
pub fn tensor_shapes<M: Module>(model: &M) -> BTreeMap<String, Vec<usize>> {
    let shapes = parameter_shapes(model).into_iter();
    shapes.map(|(path, shape)| (fla_name(&path), shape)).collect()
}

/// As [`tensor_shapes`], by the paths of the parameters in the module.
pub(super) fn parameter_shapes<M: Module>(model: &M) -> BTreeMap<String, Vec<usize>> {
    let mut visitor = Shapes::default();
    model.visit(&mut visitor);
    visitor.shapes
}

/// Path in the module of a tensor with this name, in a checkpoint of any age: the inverse of
/// [`fla_name`].
pub(super) fn parameter_path(name: &str) -> String {
    let path = name.strip_prefix("model.").unwrap_or(name);
    match path {
        // until 2024-03-14
        "embed_tokens.weight" => "embeddings.weight".to_string(),
        path => path.to_string(),
    }
}

#[derive(Default)]
struct Shapes {
    path: Vec<String>,
    containers: Vec<String>,
    shapes: BTreeMap<String, Vec<usize>>,
}

impl ModuleVisitor for Shapes {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.push(name.to_string());
        self.containers.push(container.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
        self.containers.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let mut shape = param.lazy_shape().to_vec();
        // [out, in] in PyTorch, [in, out] in Burn
        let module = ModuleContext::new(&self.containers).module_type();
        if D == 2 && module == Some("Struct:Linear") {
            shape.reverse();
        }
        self.shapes.insert(self.path.join("."), shape);
    }
}
