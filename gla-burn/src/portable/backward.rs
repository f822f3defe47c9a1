//! Gradients, written out: the chunks are recomputed, the gradient of the state walks from the
//! last chunk to the first, and each chunk then has its gradients from the states at its ends.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, DType, TensorMetadata};
use gla_kernels::GateKind;

use super::Args;
use super::decays::{Decayed, Decays, SourceGrads, walk};
use super::layout::{Chunks, sum_heads};
use super::num::Num;
use super::problem::{Inputs, Pieces, Problem};
use super::threads;

/// What [`backward`] returns: gradients in the shapes and dtypes of what they belong to.
#[derive(Clone, Debug)]
pub struct Grads<B: Backend> {
    /// `[B, T, H, K]`
    pub dq: FloatTensor<B>,
    /// `[B, T, Hk, K]`
    pub dk: FloatTensor<B>,
    /// `[B, T, Hk, V]`
    pub dv: FloatTensor<B>,
    /// In the shape of the gate; `None` without one.
    pub dgate: Option<FloatTensor<B>>,
    /// `[N, H, K, V]` in f32, also when the initial state was absent.
    pub dh0: FloatTensor<B>,
}

/// The gradients of [`forward`](fn@super::forward), from its inputs and those of its outputs.
///
/// - d_o: `[B, T, H, V]`, zero if absent
/// - d_final: `[N, H, K, V]`, zero if absent
#[expect(
    clippy::too_many_arguments,
    reason = "the inputs of forward, then the gradients of its outputs"
)]
pub fn backward<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    gate: Option<FloatTensor<B>>,
    h0: Option<FloatTensor<B>>,
    d_o: Option<FloatTensor<B>>,
    d_final: Option<FloatTensor<B>>,
    args: &Args,
) -> Grads<B> {
    run::<B>(Inputs { q, k, v, gate, h0 }, [d_o, d_final], args, None)
}

/// [`backward`] in cache-sized pieces on all cores, for back-ends that run on the calling thread.
#[expect(
    clippy::too_many_arguments,
    reason = "the inputs of forward, then the gradients of its outputs"
)]
pub fn backward_parallel<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    gate: Option<FloatTensor<B>>,
    h0: Option<FloatTensor<B>>,
    d_o: Option<FloatTensor<B>>,
    d_final: Option<FloatTensor<B>>,
    args: &Args,
) -> Grads<B> {
    let inputs = Inputs { q, k, v, gate, h0 };
    run::<B>(inputs, [d_o, d_final], args, Some(threads::available()))
}

fn run<B: Backend>(
    inputs: Inputs<B>,
    [d_o, d_final]: [Option<FloatTensor<B>>; 2],
    args: &Args,
    threads: Option<usize>,
) -> Grads<B> {
    let Inputs { q, k, v, gate, .. } = &inputs;
    let dtypes = [q, k, v].map(TensorMetadata::dtype);
    let shapes: [[usize; 4]; 3] = [q, k, v].map(|x| x.shape().dims());
    let gate_form = gate.as_ref().map(|gate| (gate.shape(), gate.dtype()));
    let problem = Problem::new(inputs, args);
    let or_zeros = |d: Option<FloatTensor<B>>, shape: [usize; 4]| match d {
        Some(d) => Num::new(d, problem.dtype),
        None => Num::zeros(shape, &problem.q),
    };
    let d_o = or_zeros(d_o, problem.v.dims());
    let d_final = or_zeros(d_final, problem.h0.dims());

    let pieces = Pieces::new(&problem, args, threads.is_some());
    let parts = threads::map(&pieces.pieces, threads.unwrap_or(1), |piece| {
        let (d_o, d_final) = (piece.steps(&d_o), piece.state(&d_final));
        match piece.is_empty() {
            true => (None, d_final),
            false => {
                let (d, d_h0) = sequences(problem.at(piece), d_o, d_final);
                (Some(d), d_h0)
            }
        }
    });
    let (mut q, mut k, mut v, mut gate) = (vec![], vec![], vec![], vec![]);
    let mut h0 = Vec::new();
    for (d, d_h0) in parts {
        h0.push(d_h0);
        if let Some((d, d_v)) = d {
            q.push(d.q);
            k.push(d.k);
            v.push(d_v);
            gate.extend(d.gate);
        }
    }
    let like = &problem.q;
    let join = |parts, n: usize| shrink(pieces.join(parts), shapes[n], like);
    let dgate = gate_form.map(|(shape, dtype)| {
        let dgate = match args.kind {
            GateKind::Vector => shrink::<B, 4>(pieces.join(gate), shape.dims(), like),
            GateKind::Fixed => {
                let parts = gate.into_iter().map(|part| part.sum(0).sum(1)).collect();
                let [heads] = shape.dims();
                shrink(pieces.join_heads(parts), [1, 1, heads], like).reshape([heads])
            }
            _ => shrink::<B, 3>(pieces.join(gate), shape.dims(), like),
        };
        dgate.into_primitive(dtype)
    });
    Grads {
        dq: join(q, 0).scale(args.scale).into_primitive(dtypes[0]),
        dk: join(k, 1).into_primitive(dtypes[1]),
        dv: join(v, 2).into_primitive(dtypes[2]),
        dgate,
        dh0: pieces.join_states(h0).into_primitive(DType::F32),
    }
}

/// Sums over the query heads of each head of `shape`; zeros if there are no steps.
fn shrink<B: Backend, const D: usize>(
    x: Option<Num<B>>,
    shape: [usize; D],
    like: &Num<B>,
) -> Num<B> {
    match x {
        Some(x) => sum_heads::<B, D>(x, 2, shape[2]),
        None => Num::zeros(shape, like),
    }
}

/// Gradients of all but h0 in the layout of [`Problem`], that of v apart; then that of h0.
type PieceGrads<B> = ((SourceGrads<B>, Num<B>), Num<B>);

fn sequences<B: Backend>(problem: Problem<B>, d_o: Num<B>, d_final: Num<B>) -> PieceGrads<B> {
    let Problem { kind, q, k, v, gate, h0, .. } = problem;
    let [_, time, ..]: [usize; 4] = q.dims();
    let chunks = Chunks::new(time);
    let decays = Decays::new(chunks, kind, q, k, gate);
    let decayed = decays.decayed();
    let (v, d_o) = (chunks.rows(v), chunks.rows(d_o));

    let total = decayed.total.as_ref();
    let writes = decayed.k.clone().t().matmul(v.clone());
    let (states, _) = walk(h0, total, &writes, 0..chunks.count);
    let reads = decayed.q.clone().t().matmul(d_o.clone());
    let (d_states, d_h0) = walk(d_final, total, &reads, (0..chunks.count).rev());

    let d_v =
        decayed.scores.clone().t().matmul(d_o.clone()) + decayed.k.clone().matmul(d_states.clone());
    let d = Decayed {
        q: d_o.clone().matmul(states.clone().t()),
        k: v.clone().matmul(d_states.clone().t()),
        scores: d_o.matmul(v.t()),
        total: total.map(|_| (states * d_states).sum(5)),
    };
    let d = decays.backward(chunks, decayed, d);
    ((d, chunks.unrows(d_v)), d_h0)
}
