//! The order of the kernels.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::launch::{Prepared, Walk};
use super::walk_spec::{Decay, ROWS_LEN, TOTAL, WalkSpec};
use crate::launch::{Launcher, RowSums};
use crate::row_gate::RowGateSpec;
use crate::{BackwardArgs, ForwardArgs, ScanBlueprint};

/// 1. `prepare` (vector gate) or `scores`. 2. The `o` walk, after the states between segments if there
///    are any.
pub(crate) fn forward(launcher: &Launcher<ScanBlueprint>, args: &ForwardArgs) {
    let made = launcher.made([&args.q, &args.k], None);
    let (start, end) = (args.initial_state.as_ref(), Some(&args.final_state));
    let ends = launcher.ends(&made, false, [&made.kt, &args.v], start, end);
    let spec = WalkSpec::values(launcher.shape(false));
    let dims = launcher.problem.dims;
    let (o, o_type) = launcher.parts(&args.o, dims.heads, dims.value_dim, spec.parts);
    launcher.walk(Walk {
        spec,
        reversed: false,
        left: &made.qt,
        update: &made.kt,
        right: &args.v,
        decays: &made.decays,
        intra: &made.pairs,
        start: ends.start.as_ref(),
        end: ends.end.as_ref(),
        out: (&o, o_type),
        dots: None,
        trace: None,
        products: None,
    });
    launcher.sum_shares((&o, o_type), &args.o, dims.heads, dims.value_dim, spec.parts);
}

/// 1. `prepare` or `scores` again.
/// 2. The `dv` walk, and `dh0`.
/// 3. The `dk` walk, which leaves its states for
/// 4. the `dq` walk.
/// 5. `intra_grad`, or `row_gate` if there is a gate.
/// 6. Reductions.
pub(crate) fn backward(launcher: &Launcher<ScanBlueprint>, args: &BackwardArgs) {
    let dims = launcher.problem.dims;
    let decay = Decay::of(dims.gate);
    let (q, k, v, d_o) = (&args.q, &args.k, &args.v, &args.d_o);
    let made = launcher.made([q, k], Some([v, d_o]));

    let (start, end) = (args.d_final.as_ref(), Some(&args.dh0));
    let ends = launcher.ends(&made, true, [&made.qt, d_o], start, end);
    let spec = WalkSpec::values(launcher.shape(true));
    let (dv, dv_type) = launcher.parts(&args.dv, dims.kv_heads, dims.value_dim, spec.parts);
    launcher.walk(Walk {
        spec,
        reversed: true,
        left: &made.kt,
        update: &made.qt,
        right: d_o,
        decays: &made.decays,
        intra: &made.pairs,
        start: ends.start.as_ref(),
        end: ends.end.as_ref(),
        out: (&dv, dv_type),
        dots: None,
        trace: None,
        products: None,
    });
    launcher.sum_shares((&dv, dv_type), &args.dv, dims.kv_heads, dims.value_dim, spec.parts);

    let f32_type = f32::elem_type_native();
    let keys = WalkSpec::keys(launcher.shape(true));
    let out_len = keys.out_len(launcher.problem.rows(), launcher.lines.num_chunks);
    let shares = |out, own_heads| match decay {
        Decay::Channels => (launcher.scratch_like(out_len), launcher.problem.dtype),
        _ => launcher.parts(out, own_heads, dims.key_dim, keys.parts),
    };
    let dq = shares(&args.dq, dims.heads);
    let dk = shares(&args.dk, dims.kv_heads);
    let outs = [(&dq.0, dq.1), (&dk.0, dk.1)];
    let scratch = key_walks(launcher, args, &made, ends.start.as_ref(), outs);

    let group = dims.heads / dims.kv_heads;
    let key_len = launcher.row_heads() * dims.key_dim;
    match decay {
        Decay::Channels => {
            let (dk_sum, dk_type) = launcher.parts(&args.dk, dims.kv_heads, dims.key_dim, 1);
            let dg = (group > 1).then(|| launcher.scratch(key_len));
            launcher.scan_intra_grad(
                [q, k, v, d_o],
                [&dq.0, &dk.0, &scratch.products],
                &keys,
                (&args.dq, launcher.problem.dtype),
                (&dk_sum, dk_type),
                match (&dg, &args.dgate) {
                    (None, Some(dgate)) => (dgate, launcher.problem.gate_dtype),
                    (Some(dg), _) => (dg, f32_type),
                    (None, None) => unreachable!("a gate of channels has a gradient, see `check`"),
                },
            );
            launcher.sum_shares((&dk_sum, dk_type), &args.dk, dims.kv_heads, dims.key_dim, 1);
            if let (Some(dg), Some(dgate)) = (&dg, &args.dgate) {
                launcher.gate_gradient(dg, dgate);
            }
        }
        Decay::None | Decay::Rows => {
            launcher.sum_shares(outs[0], &args.dq, dims.heads, dims.key_dim, keys.parts);
            launcher.sum_shares(outs[1], &args.dk, dims.kv_heads, dims.key_dim, keys.parts);
            if let (Decay::Rows, Some(dgate)) = (decay, &args.dgate) {
                let sums = RowSums {
                    dots: scratch.dots.each_ref(),
                    products: &scratch.products,
                    decays: &made.decays,
                    spec: RowGateSpec {
                        dot_shares: keys.dot_shares(),
                        product_shares: keys.shares(),
                        products: keys.padded,
                        decay_stride: ROWS_LEN,
                        decay_at: TOTAL,
                    },
                };
                launcher.row_gate(sums, &made.dg);
                launcher.gate_gradient(&made.dg, dgate);
            }
        }
    }
}

/// What the walks for `dq` and `dk` leave for the gate's gradient.
pub(crate) struct KeyScratch {
    /// `[shares, chunks, H, padded]`
    pub products: Handle,
    /// Of `q` and `dq`, `k` and `dk`: `[tiles, parts, rows, H]`
    pub dots: [Handle; 2],
}

/// The `dk` walk, from the same `start` as the `dv` walk, and the `dq` walk, into `[dq, dk]`. They have the last
/// states too, but of operands that may have been rounded more (a small gradient times a decay is subnormal in
/// f16), and leave them to the walks for `o` and `dv`.
fn key_walks(
    launcher: &Launcher<ScanBlueprint>,
    args: &BackwardArgs,
    made: &Prepared,
    start: Option<&Handle>,
    [dq, dk]: [(&Handle, ElemType); 2],
) -> KeyScratch {
    let (v, d_o) = (&args.v, &args.d_o);
    let spec = WalkSpec::keys(launcher.shape(true));
    let chunk_heads = launcher.lines.num_chunks * launcher.problem.dims.heads;
    let gated = launcher.problem.dims.gate.is_some();
    let scratch = |needed: bool, len: usize| launcher.scratch(if needed { len } else { 1 });
    let dots_len = spec.dot_shares() * launcher.row_heads();
    let left = KeyScratch {
        products: scratch(gated, spec.shares() * chunk_heads * spec.padded),
        dots: [scratch(spec.dots, dots_len), scratch(spec.dots, dots_len)],
    };
    let trace = gated.then(|| launcher.scratch_like(chunk_heads * spec.trace_len()));
    launcher.walk(Walk {
        spec,
        reversed: true,
        left: v,
        update: d_o,
        right: &made.qt,
        decays: &made.decays,
        intra: &made.pair_grads,
        start,
        end: None,
        out: dk,
        dots: spec.dots.then_some((&args.k, &left.dots[1])),
        trace: trace.as_ref(),
        products: None,
    });
    let ends = launcher.ends(made, false, [&made.kt, v], args.initial_state.as_ref(), None);
    let spec = WalkSpec::keys(launcher.shape(false));
    launcher.walk(Walk {
        spec,
        reversed: false,
        left: d_o,
        update: v,
        right: &made.kt,
        decays: &made.decays,
        intra: &made.pair_grads,
        start: ends.start.as_ref(),
        end: None,
        out: dq,
        dots: spec.dots.then_some((&args.q, &left.dots[0])),
        trace: trace.as_ref(),
        products: gated.then_some(&left.products),
    });
    left
}
