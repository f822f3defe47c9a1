//! One token: decay the state, add the new key and value, read with the query.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};
use gla_kernels::GateKind;

use super::layout::repeat_heads;
use super::num::Num;
use super::problem::work_dtype;

/// One step of the recurrence; inputs are taken to be valid.
///
/// - q: `[B, H, K]`
/// - k: `[B, Hk, K]`
/// - v: `[B, Hk, V]`
/// - gate: log decay, at most 0: `[H]`, `[B, Hk]` or `[B, Hk, K]` by kind; a fixed gate may have
///   Hk elements
/// - state: `[B, H, K, V]`
///
/// Returns the output `[B, H, V]` in the dtype of v and the new state in that of the old.
pub fn step<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    gate: Option<FloatTensor<B>>,
    state: FloatTensor<B>,
    kind: GateKind,
    scale: f64,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (out_dtype, state_dtype) = (v.dtype(), state.dtype());
    let dtype = work_dtype(q.dtype());
    let [batch, heads, key, value] = state.shape().dims();
    let num = |x| Num::<B>::new(x, dtype);
    let per_query_head = |x: FloatTensor<B>| repeat_heads::<B, 3>(num(x), 1, heads);

    let mut state = num(state);
    if let Some(gate) = gate {
        let gate = match kind {
            GateKind::Vector => per_query_head(gate).reshape([batch, heads, key, 1]),
            GateKind::Fixed => {
                let gate = num(gate);
                let [gate_heads] = gate.dims();
                repeat_heads::<B, 4>(gate.reshape([1, gate_heads, 1, 1]), 1, heads)
            }
            _ => repeat_heads::<B, 2>(num(gate), 1, heads).reshape([batch, heads, 1, 1]),
        };
        state = state * gate.exp();
    }
    let k = per_query_head(k).reshape([batch, heads, key, 1]);
    let v = per_query_head(v).reshape([batch, heads, 1, value]);
    let state = state + k * v;
    let q = num(q).scale(scale).reshape([batch, heads, 1, key]);
    let output = q.matmul(state.clone()).reshape([batch, heads, value]);
    (output.into_primitive(out_dtype), state.into_primitive(state_dtype))
}
