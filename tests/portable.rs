//! The op in tensor operations, on the CPU, against the f64 reference.
#![cfg(feature = "flex")]

use burn::backend::Flex;
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::{Device, FloatTensor};
use burn::backend::{DType, TensorData, TensorMetadata};
use gla_burn::portable::{self, Args, Grads};
use gla_kernels::GateKind;
use gla_kernels::eval::{
    ABS_FLOOR, Case, RefGate, RefInputs, check, check_each, problems, reference,
};
use proptest::prelude::*;

type Tensor = FloatTensor<Flex>;

fn tensor<const D: usize>(values: &[f64], shape: [usize; D], dtype: DType) -> Tensor {
    let data = TensorData::new(values.to_vec(), shape).convert_dtype(dtype);
    Flex::float_from_data(data, &Device::<Flex>::default())
}

fn values(tensor: Tensor) -> Vec<f64> {
    let data = tensor.into_data().convert_dtype(DType::F64);
    data.try_into_vec().expect("f64 after the conversion")
}

/// The tensors of a reference problem.
struct Problem {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Option<Tensor>,
    h0: Option<Tensor>,
    kind: GateKind,
    scale: f64,
    cu_seqlens: Option<Vec<usize>>,
    outer: [usize; 2],
    state: [usize; 4],
    parallel: bool,
}

impl Problem {
    fn new(inputs: &RefInputs, dtype: DType) -> Self {
        let RefInputs { batch, time, heads, kv_heads, key_dim: key, value_dim: value, .. } =
            *inputs;
        let (kind, gate) = match &inputs.gate {
            RefGate::None => (GateKind::None, None),
            RefGate::Fixed(g) => (GateKind::Fixed, Some(tensor(g, [heads], dtype))),
            RefGate::Scalar(g) => {
                let shape = [batch, time, kv_heads];
                (GateKind::Scalar, Some(tensor(g, shape, dtype)))
            }
            RefGate::Vector(g) => {
                let shape = [batch, time, kv_heads, key];
                (GateKind::Vector, Some(tensor(g, shape, dtype)))
            }
        };
        let state = [inputs.sequences().len(), heads, key, value];
        let h0 = inputs.initial_state.as_ref();
        Self {
            q: tensor(&inputs.q, [batch, time, heads, key], dtype),
            k: tensor(&inputs.k, [batch, time, kv_heads, key], dtype),
            v: tensor(&inputs.v, [batch, time, kv_heads, value], dtype),
            gate,
            h0: h0.map(|h0| tensor(h0, state, DType::F32)),
            kind,
            scale: inputs.scale,
            cu_seqlens: inputs.cu_seqlens.clone(),
            outer: [batch, time],
            state,
            parallel: false,
        }
    }

    fn args(&self) -> Args<'_> {
        Args { kind: self.kind, scale: self.scale, cu_seqlens: self.cu_seqlens.as_deref() }
    }

    fn forward(&self) -> (Tensor, Tensor) {
        let [q, k, v] = [&self.q, &self.k, &self.v].map(Tensor::clone);
        let forward = match self.parallel {
            true => portable::forward_parallel::<Flex>,
            false => portable::forward::<Flex>,
        };
        forward(q, k, v, self.gate.clone(), self.h0.clone(), &self.args())
    }

    fn backward(&self, d_o: Option<Tensor>, d_final: Option<Tensor>) -> Grads<Flex> {
        let [q, k, v] = [&self.q, &self.k, &self.v].map(Tensor::clone);
        let (gate, h0) = (self.gate.clone(), self.h0.clone());
        let backward = match self.parallel {
            true => portable::backward_parallel::<Flex>,
            false => portable::backward::<Flex>,
        };
        backward(q, k, v, gate, h0, d_o, d_final, &self.args())
    }
}

/// All outputs and gradients of a case, against the reference.
fn compare(case: &Case, dtype: DType, ratio: f64, parallel: bool) -> Vec<String> {
    let inputs = case.inputs();
    let (d_o, d_final) = case.grads_in();
    let expected = reference::forward(&inputs);
    let grads = reference::backward(&inputs, &d_o, d_final.as_deref());

    let problem = Problem { parallel, ..Problem::new(&inputs, dtype) };
    let (o, state) = problem.forward();
    let [batch, time] = problem.outer;
    let [_, heads, _, value] = problem.state;
    let got = problem.backward(
        Some(tensor(&d_o, [batch, time, heads, value], dtype)),
        d_final.map(|d| tensor(&d, problem.state, DType::F32)),
    );
    assert_eq!(state.dtype(), DType::F32);
    assert_eq!(got.dh0.dtype(), DType::F32);
    assert_eq!(got.dgate.is_some(), grads.dgate.is_some());
    let mut pairs = vec![
        ("o", o, expected.o),
        ("final state", state, expected.final_state),
        ("dq", got.dq, grads.dq),
        ("dk", got.dk, grads.dk),
        ("dv", got.dv, grads.dv),
        ("dh0", got.dh0, grads.dh0),
    ];
    if let (Some(got), Some(expected)) = (got.dgate, grads.dgate) {
        assert_eq!(got.dtype(), dtype);
        pairs.push(("dgate", got, expected));
    }
    let errors = pairs.into_iter().filter_map(|(name, got, expected)| {
        check(name, &expected, &values(got), ratio, ABS_FLOOR).err()
    });
    errors.map(|error| format!("{}: {error}", case.id)).collect()
}

fn assert_all(cases: &[Case], dtype: DType, ratio: f64) {
    let errors: Vec<String> =
        cases.iter().flat_map(|case| compare(case, dtype, ratio, false)).collect();
    assert!(errors.is_empty(), "{}", errors.join("\n"));
}

#[test]
fn catalogue_in_f32() {
    assert_all(&problems::small(), DType::F32, 1e-4);
}

#[test]
fn catalogue_in_f64() {
    // the states are f32 at the border of the op
    assert_all(&problems::small(), DType::F64, 2e-7);
}

#[test]
fn every_length_around_a_chunk() {
    let ids = ["none", "fixed-m0.1", "scalar-mixed", "vector-mixed"];
    let cases: Vec<Case> = (1..=66)
        .flat_map(|time| ids.map(|id| format!("{id}-b2-t{time}-k5-v7-h2-kv1-init-final")))
        .map(|id| Case::parse(&id).unwrap())
        .collect();
    assert_all(&cases, DType::F32, 1e-4);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Sequences of any lengths in one row, empty ones among them and at both ends.
    #[test]
    fn any_packing_matches_the_reference(
        gate in prop::sample::select(&["none", "fixed-ls0.1", "scalar-mixed", "vector-mixed"]),
        lengths in prop::collection::vec(prop_oneof![2 => Just(0), 5 => 1usize..80], 1..7),
        (k, v, kv, group) in (1usize..20, 1usize..20, 1usize..3, 1usize..3),
        (init, parallel) in any::<(bool, bool)>(),
    ) {
        let mut bounds = String::from("0");
        let mut end = 0;
        for length in lengths {
            end += length;
            bounds += &format!(".{end}");
        }
        let init = if init { "-init" } else { "" };
        let id = format!("{gate}-cu{bounds}-k{k}-v{v}-h{}-kv{kv}{init}-final", kv * group);
        let errors = compare(&Case::parse(&id).unwrap(), DType::F32, 1e-4, parallel);
        prop_assert!(errors.is_empty(), "{}", errors.join("\n"));
    }
}

/// Large enough to be cut into rows, sequences and heads.
#[test]
fn pieces_on_threads() {
    for gate in ["none", "fixed-m0.1", "scalar-ls1", "vector-ls1"] {
        for sizes in ["b3-t150-kv2", "b9-t40-kv4", "cu0.90.90.300-kv1", "t40-kv4"] {
            let id = format!("{gate}-{sizes}-k33-v70-h4-init-final");
            let case = Case::parse(&id).unwrap();
            let errors = compare(&case, DType::F32, 1e-4, true);
            assert!(errors.is_empty(), "{}", errors.join("\n"));
        }
    }
}

/// The gradient of a weak gate beside a strong one has digits of its own.
#[test]
fn gate_gradient_is_relative() {
    for id in ["vector-alt-t100-k8-v8-h1-final", "vector-mixed-t100-k8-v8-h1-init-final"] {
        let case = Case::parse(id).unwrap();
        let inputs = case.inputs();
        let (d_o, d_final) = case.grads_in();
        let grads = reference::backward(&inputs, &d_o, d_final.as_deref());
        let problem = Problem::new(&inputs, DType::F32);
        let got = problem.backward(
            Some(tensor(&d_o, [1, 100, 1, 8], DType::F32)),
            d_final.map(|d| tensor(&d, problem.state, DType::F32)),
        );
        check_each(id, &grads.dgate.unwrap(), &values(got.dgate.unwrap())).unwrap();
    }
}

#[test]
fn strongest_finite_gates_give_no_nan() {
    for id in ["scalar-m1e38-t40-k4-v4-h1-init-final", "vector-m1e38-t40-k4-v4-h1-init-final"] {
        assert_all(&[Case::parse(id).unwrap()], DType::F32, 1e-4);
    }
}

#[test]
fn no_steps_keep_the_state() {
    for id in ["none", "fixed-m0.1", "scalar-m0.1", "vector-m0.1"] {
        for rest in ["b2-t0-k3-v5-h2-init-final", "cu0.0.0-k3-v5-h2-init-final"] {
            let id = format!("{id}-{rest}");
            assert_all(&[Case::parse(&id).unwrap()], DType::F32, 1e-6);
        }
    }
}

#[test]
fn absent_gradients_are_zero() {
    let case = Case::parse("vector-ls1-t20-k4-v6-h2-init-final").unwrap();
    let problem = Problem::new(&case.inputs(), DType::F32);
    let zeros = |shape| tensor(&vec![0.0; 20 * 2 * 6], shape, DType::F32);
    let d_final = tensor(&case.grads_in().1.unwrap(), problem.state, DType::F32);
    let absent = problem.backward(None, Some(d_final.clone()));
    let given = problem.backward(Some(zeros([1, 20, 2, 6])), Some(d_final));
    assert_eq!(values(absent.dk), values(given.dk));
    let nothing = problem.backward(None, None);
    assert!(values(nothing.dgate.unwrap()).iter().all(|&x| x == 0.0));
    assert!(values(nothing.dh0).iter().all(|&x| x == 0.0));
}

#[test]
fn half_inputs_give_half_outputs() {
    for dtype in [DType::F16, DType::BF16] {
        let case = Case::parse("scalar-ls1-t20-k4-v6-h2-init-final").unwrap();
        let problem = Problem::new(&case.inputs(), dtype);
        let (o, state) = problem.forward();
        assert_eq!((o.dtype(), state.dtype()), (dtype, DType::F32));
        let grads = problem.backward(Some(o), None);
        let dtypes = [&grads.dq, &grads.dk, &grads.dv].map(|d| d.dtype());
        assert_eq!(dtypes, [dtype; 3]);
        assert_eq!(grads.dgate.unwrap().dtype(), dtype);
    }
}

#[test]
fn steps_are_the_sequence() {
    for id in ["none", "fixed-m0.1", "scalar-mixed", "vector-mixed"] {
        let id = format!("{id}-b2-t9-k5-v7-h4-kv2-init");
        let inputs = Case::parse(&id).unwrap().inputs();
        let expected = reference::forward(&inputs);
        let problem = Problem::new(&inputs, DType::F32);
        let mut state = problem.h0.clone().unwrap();
        let mut outputs = Vec::new();
        for t in 0..9 {
            // [B, T, ..] at t, without the time
            let at = |x: &Tensor| {
                let mut shape = x.shape().to_vec();
                let mut slices: Vec<_> = shape.iter().map(|&size| (0..size).into()).collect();
                slices[1] = (t..t + 1).into();
                shape.remove(1);
                Flex::float_reshape(Flex::float_slice(x.clone(), &slices), shape.into())
            };
            let gate = problem.gate.as_ref().map(|gate| match problem.kind {
                GateKind::Fixed => gate.clone(),
                _ => at(gate),
            });
            let [q, k, v] = [&problem.q, &problem.k, &problem.v].map(at);
            let (o, next) =
                portable::step::<Flex>(q, k, v, gate, state, problem.kind, problem.scale);
            assert_eq!(o.shape().to_vec(), [2, 4, 7]);
            outputs.push(Flex::float_reshape(o, [2, 1, 4, 7].into()));
            state = next;
        }
        let o = Flex::float_cat(outputs, 1);
        check("o", &expected.o, &values(o), 1e-5, ABS_FLOOR).expect(&id);
        check("state", &expected.final_state, &values(state), 1e-5, ABS_FLOOR).expect(&id);
    }
}
