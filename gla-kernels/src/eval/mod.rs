//! The f64 oracle, which tests and benches compare with, and the tests' catalogue of problems.
//!
//! * [`mod@reference`]: the recurrence and its gradients as plain loops in f64.
//! * [`problems`]: every problem a kernel is tested on, named by a readable id.
//! * [`compare`]: precisions, and the one measure of agreement.
//!
//! Nothing here touches a device: callers upload [`RefInputs`], run a form of the operation and
//! pass what they read back to [`check`].

pub mod compare;
mod one_shape;
pub mod problems;
pub mod reference;

pub use compare::{ABS_FLOOR, RefDType, Stats, check, check_each};
pub use one_shape::one_shape;
pub use problems::{Case, CaseGate, GateValues, large, small};
pub use reference::{RefGate, RefGrads, RefInputs, RefOutputs, backward, forward};

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn forward_by_hand() {
        let half = 0.5f64.ln();
        let inputs = RefInputs {
            scale: 0.5,
            q: vec![1.0, 2.0, 3.0, 4.0],
            k: vec![1.0, 10.0, 2.0, 20.0],
            v: vec![3.0, 5.0],
            gate: RefGate::Vector(vec![half, 0.0, 0.0, half]),
            initial_state: Some(vec![8.0, 4.0]),
            ..Case::parse("vector-m0-t2-k2-v1-h1").unwrap().inputs()
        };
        // S_1 = [8 / 2 + 3, 4 + 30] = [7, 34], S_2 = [7 + 10, 34 / 2 + 100] = [17, 117]
        let outputs = forward(&inputs);
        check("final", &[17.0, 117.0], &outputs.final_state, 1e-12, 0.0).unwrap();
        let o = [0.5 * (7.0 + 68.0), 0.5 * (51.0 + 468.0)];
        check("o", &o, &outputs.o, 1e-12, 0.0).unwrap();
    }

    #[test]
    fn packed_sequences_do_not_see_each_other() {
        let case = Case::parse("vector-ls1-cu0.0.3.3.7-k3-v2-h2-init");
        let packed = case.unwrap().inputs();
        let outputs = forward(&packed);
        let (mut o, mut final_state) = (Vec::new(), Vec::new());
        let block = packed.heads * packed.key_dim * packed.value_dim;
        for (n, steps) in packed.sequences().into_iter().enumerate() {
            let part = |all: &[f64]| {
                let width = all.len() / packed.time;
                all[steps.start * width..steps.end * width].to_vec()
            };
            let initial = &packed.initial_state.as_ref().unwrap()[n * block..(n + 1) * block];
            let alone = RefInputs {
                time: steps.len(),
                cu_seqlens: None,
                q: part(&packed.q),
                k: part(&packed.k),
                v: part(&packed.v),
                gate: RefGate::Vector(part(packed.gate.values().unwrap())),
                initial_state: Some(initial.to_vec()),
                ..packed
            };
            let outputs = forward(&alone);
            if steps.is_empty() {
                assert_eq!(outputs.final_state, initial);
            }
            o.extend(outputs.o);
            final_state.extend(outputs.final_state);
        }
        assert_eq!(outputs, RefOutputs { o, final_state });
    }

    /// Grouped heads and the smaller gates are the full vector form with numbers repeated.
    #[test]
    fn every_gate_is_a_vector_gate_repeated() {
        for gate in ["fixed", "scalar", "vector"] {
            let case = Case::parse(&format!("{gate}-ls1-b2-t4-k3-v2-h6-kv2-init"));
            let grouped = case.unwrap().inputs();
            let repeat = |all: &[f64], width: usize, times: usize| -> Vec<f64> {
                let row = |row: &[f64]| row.repeat(times);
                all.chunks_exact(width).flat_map(row).collect()
            };
            let vector = match &grouped.gate {
                RefGate::None => unreachable!(),
                RefGate::Fixed(g) => repeat(&g.repeat(8), 1, 3),
                RefGate::Scalar(g) => repeat(g, 1, 9),
                RefGate::Vector(g) => repeat(g, 3, 3),
            };
            let full = RefInputs {
                kv_heads: 6,
                k: repeat(&grouped.k, 3, 3),
                v: repeat(&grouped.v, 2, 3),
                gate: RefGate::Vector(vector),
                ..grouped.clone()
            };
            assert_eq!(forward(&grouped), forward(&full), "{gate}");
        }
    }

    #[test]
    fn ids_and_seeds_are_unique() {
        let all = [small(), large()].concat();
        let ids: BTreeSet<_> = all.iter().map(|case| &case.id).collect();
        let seeds: BTreeSet<_> = all.iter().map(|case| case.seed).collect();
        assert_eq!((ids.len(), seeds.len()), (all.len(), all.len()));
    }

    /// Every gate kind meets every strength, length, width, grouping and packing.
    #[test]
    fn small_covers_each_factor_with_each_gate() {
        let values = "m0 m0.03 m0.7 m7 m50 m1e4 ls0.1 ls1 ls16 alt mixed";
        let times = "t1 t2 t15 t16 t17 t31 t63 t64 t65 t100 t130";
        let packed = "cu0.15 cu0.0.16 cu0.5.5.64.130 cu0.1.100.130";
        let dims = "k8-v8 k16-v32 k33-v20 k60-v64 k64-v60 k100-v36";
        let heads = "h1 h2 h3 h4-kv2 h6-kv2";
        let all: Vec<_> = small().into_iter().map(|case| case.id + "-").collect();
        for gate in ["none", "fixed", "scalar", "vector"] {
            let of_gate: Vec<_> = all.iter().filter(|id| id.starts_with(gate)).collect();
            let values = if gate == "none" { "" } else { values };
            for part in [values, times, packed, dims, heads].join(" ").split_whitespace() {
                let part = format!("-{part}-");
                assert!(of_gate.iter().any(|id| id.contains(&part)), "{gate} without {part}");
            }
            for (init, last) in [(false, false), (false, true), (true, false), (true, true)] {
                let flags = |id: &str| (id.contains("-init-"), id.contains("-final-"));
                let hit = of_gate.iter().any(|id| flags(id) == (init, last));
                assert!(hit, "{gate} without init {init}, final {last}");
            }
        }
    }

    #[test]
    fn the_reference_is_finite_and_of_order_one() {
        for case in small() {
            let inputs = case.inputs();
            let outputs = forward(&inputs);
            let (d_o, d_final) = case.grads_in();
            let grads = backward(&inputs, &d_o, d_final.as_deref());
            let dgate = grads.dgate.unwrap_or_default();
            assert!(dgate.iter().all(|x| x.is_finite()), "{}", case.id);
            let of_order_one =
                [outputs.o, outputs.final_state, grads.dq, grads.dk, grads.dv, grads.dh0];
            for x in of_order_one.concat() {
                assert!(x.abs() < 100.0, "{}: {x}", case.id);
            }
        }
    }

    #[test]
    #[should_panic(expected = "reference: elements of k\n  left: 2\n right: 30")]
    fn wrong_length_is_named() {
        let mut inputs = Case::parse("none-t5-k3-v2-h2").unwrap().inputs();
        inputs.k.truncate(2);
        forward(&inputs);
    }
}
