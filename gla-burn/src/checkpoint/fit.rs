//! Tensors of a checkpoint of any age, matched with the parameters of the model.

use std::collections::BTreeMap;

use burn::store::bridge;
use burn::store::burn_pack::Tensor;
use burn::tensor::{DType, TensorData, shape};

use super::TensorProblem;
use super::names::parameter_path;
use crate::nn::fla_name;

const HEAD: &str = "lm_head.weight";
const EMBEDDINGS: &str = "embeddings.weight";

/// A tensor of the files, which may be named after the parameter by now.
struct Found {
    name: String,
    tensor: Tensor,
}

/// Renames the tensors after the parameters of `expected`, or says everything that is wrong.
///
/// No tensor is read.
pub(super) fn fit(
    tensors: BTreeMap<String, Tensor>,
    expected: &BTreeMap<String, Vec<usize>>,
) -> Result<Vec<Tensor>, Vec<TensorProblem>> {
    let mut problems = Vec::new();
    let mut found = by_path(tensors, expected, &mut problems);
    split_fused_mlps(&mut found, expected);
    // a tied model takes its embedding, whatever the file has for a head
    if !expected.contains_key(HEAD)
        && let Some(head) = found.get(HEAD)
        && Some(&head.tensor.shape.to_vec()) == expected.get(EMBEDDINGS)
    {
        found.remove(HEAD);
    }

    for (path, shape) in expected {
        if !found.contains_key(path) {
            let (name, expected) = (fla_name(path), shape.clone());
            problems.push(TensorProblem::Missing { name, expected });
        }
    }
    for (path, Found { name, tensor }) in &found {
        let (name, shape) = (name.clone(), tensor.shape.to_vec());
        match expected.get(path) {
            None => problems.push(TensorProblem::Unknown { name, found: shape }),
            Some(expected) if *expected != shape => {
                let expected = expected.clone();
                problems.push(TensorProblem::Shape { name, found: shape, expected });
            }
            Some(_) if !matches!(tensor.dtype, DType::F32 | DType::F16 | DType::BF16) => {
                problems.push(TensorProblem::Type { name, found: tensor.dtype });
            }
            Some(_) => {}
        }
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    let renamed = |(path, mut found): (String, Found)| {
        found.tensor.name = path;
        found.tensor
    };
    Ok(found.into_iter().map(renamed).collect())
}

fn by_path(
    tensors: BTreeMap<String, Tensor>,
    expected: &BTreeMap<String, Vec<usize>>,
    problems: &mut Vec<TensorProblem>,
) -> BTreeMap<String, Found> {
    let mut found: BTreeMap<String, Found> = BTreeMap::new();
    for (name, tensor) in tensors {
        let mut path = parameter_path(&name);
        if !expected.contains_key(&path) {
            // with `fuse_norm: false`; the same numbers
            let fused = path.replace(".g_norm.", ".g_norm_swish_gate.");
            path = if expected.contains_key(&fused) { fused } else { path };
        }
        if let Some(first) = found.get(&path) {
            let other = first.name.clone();
            problems.push(TensorProblem::Twice { name, other });
            continue;
        }
        found.insert(path, Found { name, tensor });
    }
    found
}

/// Until 2025-02-09 fla had both input projections of an MLP in `gate_proj`: the first rows are the
/// gate's, the last rows are `up_proj`'s.
fn split_fused_mlps(found: &mut BTreeMap<String, Found>, expected: &BTreeMap<String, Vec<usize>>) {
    for (gate, shape) in expected.iter().filter(|(path, _)| path.ends_with("gate_proj.weight")) {
        let up = gate.replace("gate_proj", "up_proj");
        let (inner, hidden) = (shape[0], shape[1]);
        let is_fused = |found: &Found| found.tensor.shape.to_vec() == [2 * inner, hidden];
        if found.contains_key(&up) || !found.get(gate).is_some_and(is_fused) {
            continue;
        }
        let Found { name, tensor } = found.remove(gate).expect("just looked at");
        for (path, half) in [(gate.clone(), 0), (up, 1)] {
            let tensor = half_of(tensor.clone(), half);
            found.insert(path, Found { name: name.clone(), tensor });
        }
    }
}

/// The first or the last half of the rows of a matrix.
fn half_of(tensor: Tensor, half: usize) -> Tensor {
    let (name, dtype) = (tensor.name.clone(), tensor.dtype);
    let (rows, columns) = (tensor.shape[0] / 2, tensor.shape[1]);
    bridge::map_data(tensor, name, dtype, shape![rows, columns], move |data| {
        let size = rows * columns * dtype.size();
        let bytes = data.as_bytes()[half * size..][..size].to_vec();
        TensorData::from_bytes_vec(bytes, shape![rows, columns], dtype)
    })
}
