//! The recurrence and the short convolutions, with and without a past.

use burn::tensor::Tensor;

use crate::nn::{LayerState, SequenceLayout, ShortConv};
use crate::{Gate, GlaOptions, StepGate, gla, gla_step};

/// Operands of the op.
pub(in crate::nn) struct Operands {
    /// `[B, T, H, K]`
    pub q: Tensor<4>,
    /// `[B, T, Hk, K]`
    pub k: Tensor<4>,
    /// `[B, T, Hk, V]`
    pub v: Tensor<4>,
    /// f32
    pub gate: Gate,
    /// Factor on the queries, `K^-0.5` if absent.
    pub scale: Option<f64>,
}

/// Runs the op over the layout, from and to the recurrent state if there is one: `[B, T, H, V]`.
pub(in crate::nn) fn recur(
    operands: Operands,
    layout: &SequenceLayout,
    state: Option<&mut LayerState>,
) -> Tensor<4> {
    let Operands { q, k, v, gate, scale } = operands;
    let mut options = GlaOptions { scale, cu_seqlens: layout.cu_seqlens(), ..Default::default() };
    let Some(state) = state else {
        return gla(q, k, v, gate, options).output;
    };

    let recurrent = state.recurrent.take().expect("checked on entry");
    if q.dims()[1] == 1 && options.cu_seqlens.is_none() {
        let (output, recurrent) = gla_step(
            q.squeeze_dim(1),
            k.squeeze_dim(1),
            v.squeeze_dim(1),
            step_gate(gate),
            recurrent,
            scale,
        );
        state.recurrent = Some(recurrent.without_autodiff());
        return output.unsqueeze_dim(1);
    }
    options.initial_state = Some(recurrent);
    options.final_state = true;
    let output = gla(q, k, v, gate, options);
    state.recurrent = output.final_state.map(Tensor::without_autodiff);
    output.output
}

fn step_gate(gate: Gate) -> StepGate {
    match gate {
        Gate::None => StepGate::None,
        Gate::Fixed(gate) => StepGate::Fixed(gate),
        Gate::Scalar(gate) => StepGate::Scalar(gate.squeeze_dim(1)),
        Gate::Vector(gate) => StepGate::Vector(gate.squeeze_dim(1)),
    }
}

/// Short convolutions of queries, keys and values, where the layer has them.
pub(in crate::nn) fn convolve(
    convs: [&Option<ShortConv>; 3],
    qkv: [Tensor<3>; 3],
    layout: &SequenceLayout,
    state: Option<&mut LayerState>,
) -> [Tensor<3>; 3] {
    let mut caches = match state {
        Some(state) => state.conv.each_mut().map(Option::as_mut),
        None => [None, None, None],
    };
    let mut convs = convs.into_iter().zip(&mut caches);
    qkv.map(|x| match convs.next() {
        Some((Some(conv), cache)) => conv.forward_with(x, layout, cache.as_deref_mut()),
        _ => x,
    })
}

/// Channels and kernel sizes of short convolutions, as a state has them.
pub(in crate::nn) fn conv_shapes(convs: [&Option<ShortConv>; 3]) -> [Option<[usize; 2]>; 3] {
    convs.map(|conv| {
        let [channels, _, kernel_size] = conv.as_ref()?.weight.lazy_shape().dims();
        Some([channels, kernel_size])
    })
}
