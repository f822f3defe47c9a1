//! Sizes and types of one call, checked before anything is launched.

use cubecl::ir::ElemType;

use crate::{GlaError, Sequences};

/// What the gate depends on. The cheaper the gate, the less a kernel has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GateKind {
    /// No decay: linear attention.
    None,
    /// One constant per query head, `[H]`: RetNet, TransNormerLLM.
    Fixed,
    /// One value per step and key head, `[B, T, Hk]`: Mamba-2's SSD, gated RetNet.
    Scalar,
    /// One value per step, key head and key channel, `[B, T, Hk, K]`: GLA, HGRN2.
    Vector,
}

impl GateKind {
    /// Whether there is a gate tensor at all.
    pub fn is_some(self) -> bool {
        self != GateKind::None
    }

    /// Whether it decays all key channels of a row alike.
    pub fn by_row(self) -> bool {
        matches!(self, GateKind::Fixed | GateKind::Scalar)
    }
}

/// The static shape of a call: everything a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Dims {
    /// Query heads `H`; the state has as many.
    pub heads: usize,
    /// Heads of `k`, `v` and of a data-dependent gate; divides `heads`.
    pub kv_heads: usize,
    /// Key channels `K` per head.
    pub key_dim: usize,
    /// Value channels `V` per head.
    pub value_dim: usize,
    /// What the gate depends on.
    pub gate: GateKind,
}

/// One call of gated linear attention.
///
/// Tensors are row-major and contiguous: `q [B, T, H, K]`, `k [B, T, Hk, K]`, `v [B, T, Hk, V]`,
/// `o [B, T, H, V]`, gate as its [`GateKind`] says, state `[N, H, K, V]` with `N` the number of sequences.
/// The state is f32; [`recurrent`](fn@crate::recurrent) takes it in the type of `q` too.
#[derive(Clone, Debug)]
pub struct Problem {
    /// Head counts, widths and the kind of gate.
    pub dims: Dims,
    /// How the `B * T` rows fall into sequences.
    pub sequences: Sequences,
    /// Factor on the queries, usually `K^-0.5`.
    pub scale: f32,
    /// Type of `q`, `k`, `v`, `o` and their gradients: f32, f16 or bf16.
    pub dtype: ElemType,
    /// Type of the gate and of its gradient: f32, f16 or bf16, whatever the type of `q`. Not read without
    /// a gate.
    pub gate_dtype: ElemType,
}

impl Problem {
    /// Rows of all sequences together, `B * T`.
    pub fn rows(&self) -> usize {
        self.sequences.rows()
    }

    /// Number of states, `N`.
    pub fn num_sequences(&self) -> usize {
        self.sequences.count()
    }

    /// Elements of one state tensor `[N, H, K, V]`.
    pub fn state_len(&self) -> usize {
        let Dims { heads, key_dim, value_dim, .. } = self.dims;
        let sizes = [heads, key_dim, value_dim];
        // saturated, so that what is too large is refused as such
        sizes.into_iter().fold(self.num_sequences(), usize::saturating_mul)
    }

    /// Elements of the gate.
    pub fn gate_len(&self) -> usize {
        let Dims { heads, kv_heads, key_dim, gate, .. } = self.dims;
        match gate {
            GateKind::None => 0,
            GateKind::Fixed => heads,
            GateKind::Scalar => self.rows() * kv_heads,
            GateKind::Vector => self.rows() * kv_heads * key_dim,
        }
    }

    /// The type that kernels are compiled with for the gate: without one, a type that the device has.
    pub(crate) fn gate_type(&self) -> ElemType {
        if self.dims.gate.is_some() { self.gate_dtype } else { self.dtype }
    }

    /// Checks what the types cannot: head counts, widths, sequence bounds, 32-bit addresses.
    ///
    /// # Errors
    ///
    /// [`GlaError::EmptyDimension`], [`GlaError::HeadGroups`], what [`Sequences::validate`] returns, and
    /// [`GlaError::TooLarge`].
    pub fn validate(&self) -> Result<(), GlaError> {
        let Dims { heads, kv_heads, key_dim, value_dim, .. } = self.dims;
        for (name, size) in [
            ("heads", heads),
            ("kv_heads", kv_heads),
            ("key_dim", key_dim),
            ("value_dim", value_dim),
        ] {
            if size == 0 {
                return Err(GlaError::EmptyDimension { name });
            }
        }
        if !heads.is_multiple_of(kv_heads) {
            return Err(GlaError::HeadGroups { heads, kv_heads });
        }
        self.sequences.validate()?;
        let widest = self.rows().saturating_mul(heads).saturating_mul(key_dim.max(value_dim));
        check_addressable("a [B, T, H, max(K, V)] tensor", widest)?;
        check_addressable("the state", self.state_len())
    }
}

/// Kernels index with 32 bits (WGSL knows no more), so no buffer may pass `u32::MAX` elements.
pub(crate) fn check_addressable(what: &'static str, elements: usize) -> Result<(), GlaError> {
    let limit = u32::MAX as usize;
    if elements > limit {
        return Err(GlaError::TooLarge { what, elements, limit });
    }
    Ok(())
}
