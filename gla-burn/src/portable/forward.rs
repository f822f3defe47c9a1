//! Outputs and the final state: `o = q S + scores v` per chunk, `S` from the walk over chunks.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, DType, TensorMetadata};

use super::Args;
use super::decays::{Decays, walk};
use super::layout::Chunks;
use super::num::Num;
use super::problem::{Inputs, Pieces, Problem};
use super::threads;

/// Gated linear attention over whole sequences; inputs are taken to be valid.
///
/// - q: `[B, T, H, K]`
/// - k: `[B, T, Hk, K]`
/// - v: `[B, T, Hk, V]`
/// - gate: log decay, at most 0: `[H]`, `[B, T, Hk]` or `[B, T, Hk, K]` by kind; a fixed gate may
///   have Hk elements
/// - h0: `[N, H, K, V]`, zero if absent
///
/// Returns the output `[B, T, H, V]` in the dtype of v and the final state `[N, H, K, V]` in f32.
/// Computes in f64 if q is f64, else in f32.
pub fn forward<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    gate: Option<FloatTensor<B>>,
    h0: Option<FloatTensor<B>>,
    args: &Args,
) -> (FloatTensor<B>, FloatTensor<B>) {
    run::<B>(Inputs { q, k, v, gate, h0 }, args, None)
}

/// [`forward`] in cache-sized pieces on all cores, for back-ends that run on the calling thread.
pub fn forward_parallel<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    gate: Option<FloatTensor<B>>,
    h0: Option<FloatTensor<B>>,
    args: &Args,
) -> (FloatTensor<B>, FloatTensor<B>) {
    run::<B>(Inputs { q, k, v, gate, h0 }, args, Some(threads::available()))
}

fn run<B: Backend>(
    inputs: Inputs<B>,
    args: &Args,
    threads: Option<usize>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let dtype = inputs.v.dtype();
    let problem = Problem::new(inputs, args);
    let pieces = Pieces::new(&problem, args, threads.is_some());
    let parts =
        threads::map(&pieces.pieces, threads.unwrap_or(1), |piece| match piece.is_empty() {
            true => (None, piece.state(&problem.h0)),
            false => {
                let (output, state) = sequences(problem.at(piece));
                (Some(output), state)
            }
        });
    let (outputs, states): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
    // without steps v is as empty as the output
    let output = pieces.join(outputs.into_iter().flatten().collect());
    let output = output.unwrap_or(problem.v);
    let state = pieces.join_states(states);
    (output.into_primitive(dtype), state.into_primitive(DType::F32))
}

fn sequences<B: Backend>(problem: Problem<B>) -> (Num<B>, Num<B>) {
    let Problem { kind, q, k, v, gate, h0, .. } = problem;
    let [_, time, ..]: [usize; 4] = q.dims();
    let chunks = Chunks::new(time);
    let decayed = Decays::new(chunks, kind, q, k, gate).decayed();
    let v = chunks.rows(v);
    let writes = decayed.k.t().matmul(v.clone());
    let (states, last) = walk(h0, decayed.total.as_ref(), &writes, 0..chunks.count);
    let output = decayed.q.matmul(states) + decayed.scores.matmul(v);
    (chunks.unrows(output), last)
}
