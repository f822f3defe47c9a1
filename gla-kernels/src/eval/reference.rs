//! Gated linear attention and its gradients in f64, one step after the other.
//!
//! Per sequence and head, with `S_0` the initial state or zero:
//!
//! ```text
//! S_t = diag(exp g_t) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t        final = S_T
//! ```
//!
//! The gradients need `D_t`, the gradient of the loss with respect to `S_t` through every later
//! use. It starts at the gradient of the final state and runs backwards:
//!
//! ```text
//! D_t     += scale * q_t do_t^T
//! dq_t     = scale * S_t do_t        dk_t = D_t v_t        dv_t = D_t^T k_t
//! dg_t[i]  = exp(g_t[i]) * sum_j S_{t-1}[i, j] D_t[i, j]
//! D_{t-1}  = diag(exp g_t) D_t                              dh0  = D_0
//! ```
//!
//! The gate gradient is usually computed as a suffix sum of `q dq - k dk`, which cancels. This
//! file keeps every state instead, so it can judge kernels that take the shorter way.

use std::ops::Range;

/// The log decay, natural logarithm, at most 0.
///
/// Data-dependent gates have as many heads as the keys.
#[derive(Clone, Debug, PartialEq)]
pub enum RefGate {
    /// No decay: linear attention.
    None,
    /// `[H]`: one constant per query head.
    Fixed(Vec<f64>),
    /// `[B, T, Hk]`: one value per step.
    Scalar(Vec<f64>),
    /// `[B, T, Hk, K]`: one value per step and key channel.
    Vector(Vec<f64>),
}

impl RefGate {
    /// The numbers of the gate in row-major order, `None` without a gate.
    pub fn values(&self) -> Option<&[f64]> {
        match self {
            Self::None => None,
            Self::Fixed(values) | Self::Scalar(values) | Self::Vector(values) => Some(values),
        }
    }

    /// As [`values`](Self::values), to be changed in place.
    pub fn values_mut(&mut self) -> Option<&mut Vec<f64>> {
        match self {
            Self::None => None,
            Self::Fixed(values) | Self::Scalar(values) | Self::Vector(values) => Some(values),
        }
    }
}

/// One problem: sizes and tensors, all row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct RefInputs {
    /// B, number of rows; 1 for packed sequences.
    pub batch: usize,
    /// T, steps per row.
    pub time: usize,
    /// H, number of query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Hk, number of heads of k, v and the data-dependent gates.
    pub kv_heads: usize,
    /// K, channels of a query or key.
    pub key_dim: usize,
    /// V, channels of a value or output.
    pub value_dim: usize,
    /// Factor on the output.
    pub scale: f64,
    /// `[N + 1]` bounds of the packed sequences, first 0, last T; `None` for one sequence per row.
    pub cu_seqlens: Option<Vec<usize>>,
    /// Queries, `[B, T, H, K]`.
    pub q: Vec<f64>,
    /// Keys, `[B, T, Hk, K]`.
    pub k: Vec<f64>,
    /// Values, `[B, T, Hk, V]`.
    pub v: Vec<f64>,
    /// Log decay.
    pub gate: RefGate,
    /// `[N, H, K, V]`, zero if absent.
    pub initial_state: Option<Vec<f64>>,
}

/// What [`forward`] computes.
#[derive(Clone, Debug, PartialEq)]
pub struct RefOutputs {
    /// `[B, T, H, V]`.
    pub o: Vec<f64>,
    /// `[N, H, K, V]`.
    pub final_state: Vec<f64>,
}

/// What [`backward`] computes. Query heads that share a key head add their gradients.
#[derive(Clone, Debug, PartialEq)]
pub struct RefGrads {
    /// `[B, T, H, K]`.
    pub dq: Vec<f64>,
    /// `[B, T, Hk, K]`.
    pub dk: Vec<f64>,
    /// `[B, T, Hk, V]`.
    pub dv: Vec<f64>,
    /// In the shape of the gate, `None` without one.
    pub dgate: Option<Vec<f64>>,
    /// `[N, H, K, V]`, also when the initial state was absent.
    pub dh0: Vec<f64>,
}

impl RefInputs {
    /// The sequences as ranges over the `B * T` flattened steps; `N` of them.
    pub fn sequences(&self) -> Vec<Range<usize>> {
        match &self.cu_seqlens {
            Some(bounds) => bounds.windows(2).map(|pair| pair[0]..pair[1]).collect(),
            None => (0..self.batch).map(|b| span(b, self.time)).collect(),
        }
    }

    /// Number of elements of the state `[N, H, K, V]`.
    pub fn state_len(&self) -> usize {
        self.sequences().len() * self.heads * self.key_dim * self.value_dim
    }

    fn assert_valid(&self) {
        let (heads, kv_heads) = (self.heads, self.kv_heads);
        let grouped = kv_heads > 0 && heads.is_multiple_of(kv_heads);
        assert!(grouped, "reference: heads {heads} over kv_heads {kv_heads}");
        let q_rows = self.batch * self.time * heads;
        let kv_rows = self.batch * self.time * kv_heads;
        if let Some(bounds) = &self.cu_seqlens {
            assert_eq!(self.batch, 1, "reference: cu_seqlens needs batch 1");
            let ends = (bounds.first().copied(), bounds.last().copied());
            let expected = (Some(0), Some(self.time));
            assert_eq!(ends, expected, "reference: first and last of cu_seqlens");
            assert!(bounds.is_sorted(), "reference: cu_seqlens falls");
        }
        assert_len("q", self.q.len(), q_rows * self.key_dim);
        assert_len("k", self.k.len(), kv_rows * self.key_dim);
        assert_len("v", self.v.len(), kv_rows * self.value_dim);
        let gate_len = match self.gate {
            RefGate::None => 0,
            RefGate::Fixed(_) => heads,
            RefGate::Scalar(_) => kv_rows,
            RefGate::Vector(_) => kv_rows * self.key_dim,
        };
        assert_len("gate", self.gate.values().map_or(0, <[f64]>::len), gate_len);
        if let Some(state) = &self.initial_state {
            assert_len("initial_state", state.len(), self.state_len());
        }
    }

    /// Row of q and o, `[B, T, H]` flattened.
    fn q_row(&self, step: usize, head: usize) -> usize {
        step * self.heads + head
    }

    /// Row of k, v and the gate that a query head reads, `[B, T, Hk]` flattened.
    fn kv_row(&self, step: usize, head: usize) -> usize {
        step * self.kv_heads + head / (self.heads / self.kv_heads)
    }

    /// Elements of the state of one sequence and head, `[K, V]`.
    fn state_block(&self, sequence: usize, head: usize) -> Range<usize> {
        span(sequence * self.heads + head, self.key_dim * self.value_dim)
    }

    /// Where the gate of one step, query head and key channel lies.
    fn gate_index(&self, step: usize, head: usize, channel: usize) -> usize {
        match self.gate {
            RefGate::None => 0,
            RefGate::Fixed(_) => head,
            RefGate::Scalar(_) => self.kv_row(step, head),
            RefGate::Vector(_) => self.kv_row(step, head) * self.key_dim + channel,
        }
    }

    fn decay(&self, step: usize, head: usize, channel: usize) -> f64 {
        match self.gate.values() {
            None => 1.0,
            Some(values) => values[self.gate_index(step, head, channel)].exp(),
        }
    }

    /// `S_0` of one sequence and head.
    fn first_state(&self, sequence: usize, head: usize) -> Vec<f64> {
        let block = self.state_block(sequence, head);
        let zeros = vec![0.0; block.len()];
        let given = self.initial_state.as_ref();
        given.map_or(zeros, |state| state[block].to_vec())
    }

    /// `S_t` from `S_{t-1}`, in place.
    fn advance(&self, state: &mut [f64], step: usize, head: usize) {
        let kv_row = self.kv_row(step, head);
        let k = &self.k[span(kv_row, self.key_dim)];
        let v = &self.v[span(kv_row, self.value_dim)];
        for (i, state_row) in state.chunks_exact_mut(self.value_dim).enumerate() {
            let decay = self.decay(step, head, i);
            for (s, vj) in state_row.iter_mut().zip(v) {
                *s = decay * *s + k[i] * vj;
            }
        }
    }
}

/// Output and final state.
///
/// # Panics
///
/// If a length does not agree with the sizes of `inputs`.
pub fn forward(inputs: &RefInputs) -> RefOutputs {
    inputs.assert_valid();
    let mut o = vec![0.0; inputs.batch * inputs.time * inputs.heads * inputs.value_dim];
    let mut final_state = vec![0.0; inputs.state_len()];
    for (n, steps) in inputs.sequences().into_iter().enumerate() {
        for head in 0..inputs.heads {
            let mut state = inputs.first_state(n, head);
            for step in steps.clone() {
                inputs.advance(&mut state, step, head);
                let q_row = inputs.q_row(step, head);
                let q = &inputs.q[span(q_row, inputs.key_dim)];
                let o = &mut o[span(q_row, inputs.value_dim)];
                for (state_row, qi) in state.chunks_exact(inputs.value_dim).zip(q) {
                    for (oj, s) in o.iter_mut().zip(state_row) {
                        *oj += inputs.scale * qi * s;
                    }
                }
            }
            final_state[inputs.state_block(n, head)].copy_from_slice(&state);
        }
    }
    RefOutputs { o, final_state }
}

/// Gradients of `sum(o * d_o) + sum(final_state * d_final)`.
///
/// Keeps all states of one sequence and head: `8 * T * K * V` bytes at a time.
///
/// # Arguments
///
/// - d_o: `[B, T, H, V]`
/// - d_final: `[N, H, K, V]`, zero if absent
///
/// # Panics
///
/// If a length does not agree with the sizes of `inputs`.
pub fn backward(inputs: &RefInputs, d_o: &[f64], d_final: Option<&[f64]>) -> RefGrads {
    inputs.assert_valid();
    let (key_dim, width) = (inputs.key_dim, inputs.value_dim);
    let o_len = inputs.batch * inputs.time * inputs.heads * width;
    assert_len("d_o", d_o.len(), o_len);
    if let Some(d_final) = d_final {
        assert_len("d_final", d_final.len(), inputs.state_len());
    }
    let mut grads = RefGrads {
        dq: vec![0.0; inputs.q.len()],
        dk: vec![0.0; inputs.k.len()],
        dv: vec![0.0; inputs.v.len()],
        dgate: inputs.gate.values().map(|values| vec![0.0; values.len()]),
        dh0: vec![0.0; inputs.state_len()],
    };
    for (n, steps) in inputs.sequences().into_iter().enumerate() {
        for head in 0..inputs.heads {
            let block = inputs.state_block(n, head);
            let mut states = vec![inputs.first_state(n, head)];
            for step in steps.clone() {
                let mut state = states[states.len() - 1].clone();
                inputs.advance(&mut state, step, head);
                states.push(state);
            }
            let d_state = &mut grads.dh0[block.clone()];
            if let Some(d_final) = d_final {
                d_state.copy_from_slice(&d_final[block.clone()]);
            }
            for (t, step) in steps.clone().enumerate().rev() {
                let (q_row, kv_row) = (inputs.q_row(step, head), inputs.kv_row(step, head));
                let (before, after) = (&states[t], &states[t + 1]);
                let (q, d_o) = (&inputs.q[span(q_row, key_dim)], &d_o[span(q_row, width)]);
                let (k, v) = (&inputs.k[span(kv_row, key_dim)], &inputs.v[span(kv_row, width)]);
                let dq = &mut grads.dq[span(q_row, key_dim)];
                let dk = &mut grads.dk[span(kv_row, key_dim)];
                let dv = &mut grads.dv[span(kv_row, width)];
                for i in 0..key_dim {
                    let decay = inputs.decay(step, head, i);
                    let mut d_decay = 0.0;
                    for j in 0..width {
                        let at = i * width + j;
                        dq[i] += inputs.scale * after[at] * d_o[j];
                        d_state[at] += inputs.scale * q[i] * d_o[j];
                        dk[i] += d_state[at] * v[j];
                        dv[j] += d_state[at] * k[i];
                        d_decay += before[at] * d_state[at];
                        d_state[at] *= decay;
                    }
                    if let Some(dgate) = &mut grads.dgate {
                        dgate[inputs.gate_index(step, head, i)] += decay * d_decay;
                    }
                }
            }
        }
    }
    grads
}

fn span(index: usize, len: usize) -> Range<usize> {
    index * len..(index + 1) * len
}

#[track_caller]
fn assert_len(name: &str, got: usize, expected: usize) {
    assert_eq!(got, expected, "reference: elements of {name}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::problems::Case;

    fn dot(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    fn assert_near(name: &str, got: &[f64], expected: &[f64]) {
        assert_eq!(got.len(), expected.len(), "{name}");
        for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
            let near = (got - expected).abs() <= 1e-7 * (1.0 + expected.abs());
            assert!(near, "{name}[{at}]: {got} != {expected}");
        }
    }

    type Pick = fn(&mut RefInputs) -> &mut Vec<f64>;

    /// Central differences of `loss` with respect to every element that `pick` exposes.
    fn numeric(inputs: &RefInputs, pick: Pick, loss: impl Fn(&RefInputs) -> f64) -> Vec<f64> {
        const EPSILON: f64 = 1e-4;
        let mut moved = inputs.clone();
        let len = pick(&mut moved).len();
        let slope = |at: usize| {
            pick(&mut moved)[at] += EPSILON;
            let above = loss(&moved);
            pick(&mut moved)[at] -= 2.0 * EPSILON;
            let below = loss(&moved);
            pick(&mut moved)[at] = pick(&mut inputs.clone())[at];
            (above - below) / (2.0 * EPSILON)
        };
        (0..len).map(slope).collect()
    }

    fn assert_gradients(case: &Case) {
        let inputs = case.inputs();
        let (d_o, d_final) = case.grads_in();
        let loss = |x: &RefInputs| {
            let outputs = forward(x);
            let d_final = d_final.as_deref().unwrap_or_default();
            dot(&d_o, &outputs.o) + dot(d_final, &outputs.final_state)
        };
        let grads = backward(&inputs, &d_o, d_final.as_deref());
        let id = &case.id;
        let dgate = grads.dgate.as_deref().unwrap_or_default();
        let tensors: [(&str, &[f64], Pick); 5] = [
            ("dq", &grads.dq, |x| &mut x.q),
            ("dk", &grads.dk, |x| &mut x.k),
            ("dv", &grads.dv, |x| &mut x.v),
            ("dh0", &grads.dh0, |x| x.initial_state.as_mut().unwrap()),
            ("dgate", dgate, |x| x.gate.values_mut().unwrap()),
        ];
        let gated = inputs.gate != RefGate::None;
        assert_eq!(grads.dgate.is_some(), gated, "{id}");
        let mut at = inputs.clone();
        let zeros = vec![0.0; inputs.state_len()];
        at.initial_state.get_or_insert(zeros);
        for (name, got, pick) in &tensors[..4 + usize::from(gated)] {
            assert_near(&format!("{id} {name}"), got, &numeric(&at, *pick, loss));
        }
    }

    #[test]
    fn gradients_agree_with_finite_differences() {
        for gate in "none fixed-ls1 scalar-ls1 vector-ls1 vector-mixed scalar-m0".split(' ') {
            for sizes in "b2-t5-h2 b2-t5-h4-kv2 cu0.3.3.4.6-h2 cu0.3.3.4.6-h4-kv2".split(' ') {
                for flags in ["", "-init", "-final", "-init-final"] {
                    let id = format!("{gate}-{sizes}-k3-v2{flags}");
                    assert_gradients(&Case::parse(&id).unwrap());
                }
            }
        }
    }
}
