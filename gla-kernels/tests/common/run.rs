//! A case of the catalogue on a device: upload, run, read back, compare.

use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;
use gla_kernels::eval::{self, ABS_FLOOR, Case, CaseGate, RefDType, RefInputs};
use gla_kernels::{
    BackwardArgs, Dims, ForwardArgs, GateKind, Problem, RecurrentArgs, Sequences, Strategy,
};
use half::{bf16, f16};

/// Element type on the device.
pub fn elem_type(dtype: RefDType) -> ElemType {
    match dtype {
        RefDType::F32 => f32::elem_type_native(),
        RefDType::F16 => f16::elem_type_native(),
        RefDType::BF16 => bf16::elem_type_native(),
    }
}

/// Allowed error ratios `(o and final state, gradients)`: fla's for half precision.
pub fn tolerances(dtype: RefDType) -> (f64, f64) {
    match dtype {
        RefDType::F32 => (1e-4, 1e-4),
        RefDType::F16 | RefDType::BF16 => (4e-3, 5e-3),
    }
}

/// What the backward wrote.
pub struct Gradients {
    /// dq, dk, dv, dh0
    pub grads: Vec<Vec<f32>>,
    /// Of the gate, if there is one.
    pub dgate: Option<Vec<f32>>,
}

/// A case made ready for a device: inputs rounded to its type.
pub struct Prepared {
    pub case: Case,
    pub dtype: RefDType,
    pub gate_dtype: RefDType,
    pub inputs: RefInputs,
    pub problem: Problem,
    pub d_o: Vec<f64>,
    pub d_final: Option<Vec<f64>>,
}

impl Prepared {
    /// With a gate in f32.
    pub fn new(case: &Case, dtype: RefDType) -> Self {
        Self::with_gate(case, dtype, RefDType::F32)
    }

    /// With a gate in a type of its own.
    pub fn with_gate(case: &Case, dtype: RefDType, gate_dtype: RefDType) -> Self {
        let mut inputs = case.inputs();
        inputs.round_to(dtype, gate_dtype);
        let (mut d_o, d_final) = case.grads_in();
        dtype.round_all(&mut d_o);
        let gate = match case.gate {
            CaseGate::None => GateKind::None,
            CaseGate::Fixed => GateKind::Fixed,
            CaseGate::Scalar => GateKind::Scalar,
            CaseGate::Vector => GateKind::Vector,
        };
        let sequences = match &case.cu_seqlens {
            Some(cu) => Sequences::Packed { cu_seqlens: cu.clone(), time: case.time },
            None => Sequences::Uniform { batch: case.batch, time: case.time },
        };
        let problem = Problem {
            dims: Dims {
                heads: case.heads,
                kv_heads: case.kv_heads,
                key_dim: case.key_dim,
                value_dim: case.value_dim,
                gate,
            },
            sequences,
            scale: inputs.scale as f32,
            dtype: elem_type(dtype),
            gate_dtype: elem_type(gate_dtype),
        };
        Prepared { case: case.clone(), dtype, gate_dtype, inputs, problem, d_o, d_final }
    }

    fn o_len(&self) -> usize {
        self.problem.rows() * self.case.heads * self.case.value_dim
    }

    fn gate(&self, client: &Client) -> Option<Handle> {
        self.inputs.gate.values().map(|values| upload(client, values, self.gate_dtype))
    }

    fn state(&self, client: &Client) -> Option<Handle> {
        self.inputs.initial_state.as_ref().map(|values| upload(client, values, RefDType::F32))
    }

    fn qkv(&self, client: &Client) -> [Handle; 3] {
        let inputs = &self.inputs;
        [&inputs.q, &inputs.k, &inputs.v].map(|values| upload(client, values, self.dtype))
    }

    /// The chunked forward; outputs are poisoned with NaN before.
    pub fn forward(&self, client: &Client, strategy: Strategy) -> Result<[Vec<f32>; 2], String> {
        let [q, k, v] = self.qkv(client);
        let o = poison(client, self.o_len(), self.dtype);
        let final_state = poison(client, self.problem.state_len(), RefDType::F32);
        let args = ForwardArgs {
            q,
            k,
            v,
            gate: self.gate(client),
            initial_state: self.state(client),
            o: o.clone(),
            final_state: final_state.clone(),
        };
        gla_kernels::forward(client, &self.problem, strategy, args).map_err(|e| e.to_string())?;
        Ok([download(client, o, self.dtype)?, download(client, final_state, RefDType::F32)?])
    }

    /// The recurrent form, with the state in `state_dtype`.
    pub fn recurrent(
        &self,
        client: &Client,
        state_dtype: RefDType,
    ) -> Result<[Vec<f32>; 2], String> {
        let [q, k, v] = self.qkv(client);
        let o = poison(client, self.o_len(), self.dtype);
        let zeros = vec![0.0; self.problem.state_len()];
        let state = self.inputs.initial_state.as_ref().unwrap_or(&zeros);
        let state = upload(client, state, state_dtype);
        let args = RecurrentArgs {
            q,
            k,
            v,
            gate: self.gate(client),
            state: state.clone(),
            state_dtype: elem_type(state_dtype),
            o: o.clone(),
        };
        gla_kernels::recurrent(client, &self.problem, args).map_err(|e| e.to_string())?;
        Ok([download(client, o, self.dtype)?, download(client, state, state_dtype)?])
    }

    /// The chunked backward; outputs are poisoned with NaN before.
    pub fn backward(&self, client: &Client, strategy: Strategy) -> Result<Gradients, String> {
        let [q, k, v] = self.qkv(client);
        let inputs = &self.inputs;
        let [dq, dk, dv] =
            [&inputs.q, &inputs.k, &inputs.v].map(|like| poison(client, like.len(), self.dtype));
        let dh0 = poison(client, self.problem.state_len(), RefDType::F32);
        let dgate = inputs.gate.values().map(|like| poison(client, like.len(), self.gate_dtype));
        let args = BackwardArgs {
            q,
            k,
            v,
            gate: self.gate(client),
            initial_state: self.state(client),
            d_o: upload(client, &self.d_o, self.dtype),
            d_final: self.d_final.as_ref().map(|d| upload(client, d, RefDType::F32)),
            dq: dq.clone(),
            dk: dk.clone(),
            dv: dv.clone(),
            dgate: dgate.clone(),
            dh0: dh0.clone(),
        };
        gla_kernels::backward(client, &self.problem, strategy, args).map_err(|e| e.to_string())?;
        let grads = vec![
            download(client, dq, self.dtype)?,
            download(client, dk, self.dtype)?,
            download(client, dv, self.dtype)?,
            download(client, dh0, RefDType::F32)?,
        ];
        let dgate = dgate.map(|d| download(client, d, self.gate_dtype)).transpose()?;
        Ok(Gradients { grads, dgate })
    }

    /// The outputs of a form against the reference.
    pub fn check_outputs(
        &self,
        form: &str,
        outputs: Result<[Vec<f32>; 2], String>,
        errors: &mut Vec<String>,
    ) {
        let (tol_o, _) = tolerances(self.dtype);
        let reference = eval::forward(&self.inputs);
        let expected = [("o", &reference.o), ("final_state", &reference.final_state)];
        match outputs {
            Ok(outputs) => {
                for ((name, expected), got) in expected.iter().zip(&outputs) {
                    let name = format!("{form} {name}");
                    errors.extend(eval::check(&name, expected, got, tol_o, ABS_FLOOR).err());
                }
            }
            Err(error) => errors.push(format!("{form}: {error}")),
        }
    }

    /// Forward in both forms and backward against the reference; the errors, if any.
    pub fn check_all(&self, client: &Client, strategy: Strategy) -> Vec<String> {
        let mut errors = Vec::new();
        self.check_outputs("chunk", self.forward(client, strategy), &mut errors);
        self.check_outputs("recurrent", self.recurrent(client, RefDType::F32), &mut errors);
        self.check_gradients(client, strategy, ABS_FLOOR, &mut errors);
        errors.into_iter().map(|e| format!("{} {:?}: {e}", self.case.id, self.dtype)).collect()
    }

    /// The backward against the reference.
    pub fn check_gradients(
        &self,
        client: &Client,
        strategy: Strategy,
        abs_floor: f64,
        errors: &mut Vec<String>,
    ) {
        let (_, tol_grad) = tolerances(self.dtype);
        // it is in the gate's own type
        let tol_gate = tol_grad.max(tolerances(self.gate_dtype).1);
        match self.backward(client, strategy) {
            Ok(Gradients { grads, dgate }) => {
                let reference = eval::backward(&self.inputs, &self.d_o, self.d_final.as_deref());
                let names = ["dq", "dk", "dv", "dh0"];
                let expected = [&reference.dq, &reference.dk, &reference.dv, &reference.dh0];
                for ((name, expected), got) in names.iter().zip(expected).zip(&grads) {
                    errors.extend(eval::check(name, expected, got, tol_grad, abs_floor).err());
                }
                match (reference.dgate, dgate) {
                    (Some(expected), Some(got)) => {
                        errors.extend(
                            eval::check("dgate", &expected, &got, tol_gate, abs_floor).err(),
                        );
                    }
                    (None, None) => {}
                    _ => errors.push("dgate: present on one side only".into()),
                }
            }
            Err(error) => errors.push(format!("backward: {error}")),
        }
    }
}

/// The least byte but the first at which a tensor may begin in its buffer.
pub fn least_offset(client: &Client) -> u64 {
    match client.name().starts_with("wgpu") {
        true => client.properties().memory.alignment.max(16),
        false => 16,
    }
}

/// Uploads values in a type, to where they may begin in a buffer that begins with NaN.
pub fn upload(client: &Client, values: &[f64], dtype: RefDType) -> Handle {
    let offset = least_offset(client);
    let before = offset as usize / elem_type(dtype).size();
    let all = std::iter::repeat_n(f64::NAN, before).chain(values.iter().copied());
    let buffer = match dtype {
        RefDType::F32 => {
            let x: Vec<f32> = all.map(|x| x as f32).collect();
            client.create_from_slice(f32::as_bytes(&x))
        }
        RefDType::F16 => {
            let x: Vec<f16> = all.map(f16::from_f64).collect();
            client.create_from_slice(f16::as_bytes(&x))
        }
        RefDType::BF16 => {
            let x: Vec<bf16> = all.map(bf16::from_f64).collect();
            client.create_from_slice(bf16::as_bytes(&x))
        }
    };
    buffer.offset_start(offset)
}

/// A buffer full of NaN: what a kernel leaves unwritten shows.
pub fn poison(client: &Client, len: usize, dtype: RefDType) -> Handle {
    upload(client, &vec![f64::NAN; len], dtype)
}

/// Reads a buffer back in f32. A launch that failed is reported here.
pub fn download(client: &Client, handle: Handle, dtype: RefDType) -> Result<Vec<f32>, String> {
    let bytes = client.read_one(handle).map_err(|e| format!("launch failed: {e:?}"))?;
    Ok(match dtype {
        RefDType::F32 => f32::from_bytes(&bytes).to_vec(),
        RefDType::F16 => f16::from_bytes(&bytes).iter().map(|x| x.to_f32()).collect(),
        RefDType::BF16 => bf16::from_bytes(&bytes).iter().map(|x| x.to_f32()).collect(),
    })
}
