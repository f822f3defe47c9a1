//! Autodiff: one node for the whole operation.
//!
//! A node of Burn has one output. Training needs only `o`, so `o` is the node's output. If the final
//! state is to be differentiated too, the operation becomes a node whose two children `Take` are `o`
//! and the state. In the backward pass each child hands its gradient over in a shared cell and a
//! one-element token to the parent; the engine runs deeper nodes first, so the parent finds whatever
//! gradients there are and launches one backward.

use std::sync::{Arc, Mutex};

use burn::backend::{
    AutodiffBackend, Backend, TensorMetadata, ops::FloatTensorOps, tensor::FloatTensor,
};
use burn::tensor::{DType, FloatDType, Shape};
use burn_autodiff::{
    Autodiff, NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};

use crate::{GlaGrads, GlaOps, GlaSpec, OptionalTensor};

/// Gradients of `o` and of the final state, on their way from the children to the parent.
type Cell<B> = Arc<Mutex<[Option<FloatTensor<B>>; 2]>>;

/// What the parent keeps: ids of the checkpointed inputs, which of them exist, and the cell.
#[derive(Clone, Debug)]
struct State<B: Backend> {
    inputs: [NodeId; 5],
    has_gate: bool,
    has_h0: bool,
    cell: Option<Cell<B>>,
    spec: GlaSpec,
}

#[derive(Debug)]
struct Gla;

impl<B: GlaOps> Backward<B, 5> for Gla {
    type State = State<B>;

    fn backward(
        self,
        ops: Ops<Self::State, 5>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let state = ops.state;
        let incoming = grads.consume::<B>(&ops.node);
        let [d_o, d_final] = match state.cell {
            None => [Some(incoming), None],
            Some(cell) => core::mem::take(&mut *cell.lock().expect("no panic holds the cell")),
        };
        let [q, k, v, gate, h0] =
            state.inputs.map(|id| checkpointer.retrieve_node_output::<FloatTensor<B>>(id));
        let given = |tensor, given: bool| OptionalTensor::from(given.then_some(tensor));
        let GlaGrads { dq, dk, dv, dgate, dh0 } = B::gla_backward(
            q,
            k,
            v,
            given(gate, state.has_gate),
            given(h0, state.has_h0),
            d_o.into(),
            d_final.into(),
            state.spec,
        );
        // Burn 0.22.1 often runs one by one what it takes together with a custom op. This ends what it
        // takes, without waiting for the device: on wgpu the backward of a layer is 71 launches, not 94.
        if cfg!(feature = "fusion") {
            B::flush(&dq.device()).unwrap_or_else(|error| panic!("flush after gla: {error}"));
        }
        for (parent, grad) in ops.parents.into_iter().zip([dq, dk, dv, dgate, dh0]) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, grad);
            }
        }
    }
}

/// One of the two outputs of a [`Gla`] node: 0 is `o`, 1 the final state.
#[derive(Debug)]
struct Take;

impl<B: Backend> Backward<B, 1> for Take {
    type State = (Cell<B>, usize);

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let token = B::float_zeros(Shape::from([1]), &grad.device(), FloatDType::F32);
        let (cell, which) = ops.state;
        cell.lock().expect("no panic holds the cell")[which] = Some(grad);
        let [parent] = ops.parents;
        if let Some(parent) = parent {
            grads.register::<B>(parent.id, token);
        }
    }
}

impl<B: Backend + GlaOps, C: CheckpointStrategy> GlaOps for Autodiff<B, C> {
    fn gla_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        gate: OptionalTensor<Self>,
        h0: OptionalTensor<Self>,
        spec: GlaSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        // a node has a fixed number of parents: an untracked stand-in for what is absent
        let absent = || <Self as AutodiffBackend>::from_inner(q.primitive().clone());
        let (has_gate, gate) = match gate.into_option() {
            Some(gate) => (true, gate),
            None => (false, absent()),
        };
        let (has_h0, h0) = match h0.into_option() {
            Some(h0) => (true, h0),
            None => (false, absent()),
        };
        let inputs = [q, k, v, gate, h0];
        let guards = inputs.each_ref().map(|tensor| tensor.node());
        let [pq, pk, pv, pgate, ph0] = inputs.each_ref().map(|tensor| tensor.primitive().clone());
        let (o, final_state) = B::gla_forward(
            pq,
            pk,
            pv,
            has_gate.then_some(pgate).into(),
            has_h0.then_some(ph0).into(),
            spec.clone(),
        );

        let mut prep = match Gla.prepare::<C>(guards).compute_bound().stateful() {
            OpsKind::UnTracked(prep) => {
                let state = <Self as AutodiffBackend>::from_inner(final_state);
                return (prep.finish(o), state);
            }
            OpsKind::Tracked(prep) => prep,
        };
        let inputs = inputs.each_ref().map(|tensor| prep.checkpoint(tensor));
        let state_gradient = spec.state_gradient;
        let mut state = State { inputs, has_gate, has_h0, cell: None, spec };
        if !state_gradient {
            let final_state = <Self as AutodiffBackend>::from_inner(final_state);
            return (prep.finish(state, o), final_state);
        }
        let cell = Cell::<B>::default();
        state.cell = Some(cell.clone());
        let parent = prep.finish(state, o.clone());
        let take = |which: usize, output: FloatTensor<B>| match Take
            .prepare::<C>([parent.node()])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => prep.finish((cell.clone(), which), output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        };
        (take(0, o), take(1, final_state))
    }

    fn gla_backward(
        _q: FloatTensor<Self>,
        _k: FloatTensor<Self>,
        _v: FloatTensor<Self>,
        _gate: OptionalTensor<Self>,
        _h0: OptionalTensor<Self>,
        _d_o: OptionalTensor<Self>,
        _d_final: OptionalTensor<Self>,
        _spec: GlaSpec,
    ) -> GlaGrads<Self> {
        panic!("gla: the backward pass is not differentiable");
    }

    fn gla_step(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        gate: OptionalTensor<Self>,
        state: FloatTensor<Self>,
        spec: GlaSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        // a step is a sequence of length 1: its gradient is the gradient of that
        let row = |x: FloatTensor<Self>, at: usize| {
            let mut dims: Vec<usize> = x.shape().iter().copied().collect();
            dims.insert(at, 1);
            Self::float_reshape(x, Shape::from(dims))
        };
        let per_step = spec.gate != gla_kernels::GateKind::Fixed;
        let gate = gate.into_option().map(|gate| if per_step { row(gate, 1) } else { gate });
        let spec = GlaSpec { recurrent: true, state_gradient: true, ..spec };
        let state_dtype = state.dtype();
        let half = state_dtype != DType::F32;
        let state = if half { Self::float_cast(state, FloatDType::F32) } else { state };
        let (o, state) = Self::gla_forward(
            row(q, 1),
            row(k, 1),
            row(v, 1),
            gate.into(),
            OptionalTensor::Some(state),
            spec,
        );
        let [batch, _, heads, value_dim] = o.shape().dims();
        let state = if half { Self::float_cast(state, state_dtype.into()) } else { state };
        (Self::float_reshape(o, Shape::from([batch, heads, value_dim])), state)
    }
}
