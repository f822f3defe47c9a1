//! Errors, all raised before a kernel is launched.

/// What can be wrong with a call. Every message names the argument and both numbers.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GlaError {
    /// A dimension other than time or batch is 0.
    #[error("{name}: must be at least 1, got 0")]
    EmptyDimension {
        /// The dimension.
        name: &'static str,
    },
    /// Query heads are not a multiple of key/value heads.
    #[error("heads: {heads} query heads are no multiple of {kv_heads} key/value heads")]
    HeadGroups {
        /// Heads of q.
        heads: usize,
        /// Heads of k and v.
        kv_heads: usize,
    },
    /// A tensor has the wrong shape.
    #[error("{name}: expected shape {expected:?}, got {got:?}")]
    Shape {
        /// The argument.
        name: &'static str,
        /// The shape the other arguments ask for.
        expected: Vec<usize>,
        /// The shape it has.
        got: Vec<usize>,
    },
    /// A buffer is smaller than its shape needs.
    #[error("{name}: needs {expected} bytes, the buffer has {got}")]
    BufferSize {
        /// The argument.
        name: &'static str,
        /// Bytes its shape needs.
        expected: usize,
        /// Bytes it has.
        got: usize,
    },
    /// A tensor has an unexpected element type.
    #[error("{name}: expected dtype {expected}, got {got}")]
    Dtype {
        /// The argument.
        name: &'static str,
        /// The types that would do.
        expected: String,
        /// The type it has.
        got: String,
    },
    /// The device cannot hold or convert this element type.
    #[error("{name}: the device {device} does not support dtype {dtype}")]
    UnsupportedDtype {
        /// The argument.
        name: &'static str,
        /// The type asked for.
        dtype: String,
        /// The device.
        device: String,
    },
    /// Packed sequences need at least one sequence.
    #[error("cu_seqlens: needs at least 2 entries, got {len}")]
    CuSeqlensTooShort {
        /// Entries given.
        len: usize,
    },
    /// Packed sequences must start at row 0.
    #[error("cu_seqlens: must start at 0, got {first}")]
    CuSeqlensStart {
        /// The first entry.
        first: usize,
    },
    /// Offsets must not fall.
    #[error("cu_seqlens: must not fall, got {value} at index {index} after {previous}")]
    CuSeqlensFalling {
        /// Where.
        index: usize,
        /// The entry there.
        value: usize,
        /// The entry before it.
        previous: usize,
    },
    /// Offsets must cover all rows.
    #[error("cu_seqlens: must end at T = {time}, got {last}")]
    CuSeqlensEnd {
        /// The last entry.
        last: usize,
        /// Rows of the tensors.
        time: usize,
    },
    /// Packed sequences come as one row of the batch.
    #[error("cu_seqlens: packed sequences need batch 1, got {batch}")]
    CuSeqlensBatch {
        /// The batch size given.
        batch: usize,
    },
    /// The chunk length is none that the kernels know.
    #[error("chunk: must be one of {allowed:?}, got {got}")]
    Chunk {
        /// Lengths that exist.
        allowed: &'static [usize],
        /// The length asked for.
        got: usize,
    },
    /// The tile width is none that the kernels know.
    #[error("cols: must be one of {allowed:?}, got {got}")]
    Cols {
        /// Widths that exist.
        allowed: &'static [usize],
        /// The width asked for.
        got: usize,
    },
    /// A gate makes the state grow.
    #[error("gate: must be at most 0, the largest is {largest}")]
    PositiveGate {
        /// The largest value of the gate.
        largest: f64,
    },
    /// More elements than a 32-bit index reaches.
    #[error("{what}: {elements} elements, 32-bit addresses reach {limit}")]
    TooLarge {
        /// The tensor.
        what: &'static str,
        /// Its elements.
        elements: usize,
        /// The limit.
        limit: usize,
    },
    /// A tensor is larger than the largest buffer of the device.
    #[error("{what}: needs {requested} bytes in one buffer, the device allocates {available}")]
    Allocation {
        /// The tensor.
        what: &'static str,
        /// Bytes it needs.
        requested: u64,
        /// Bytes the device allocates at once.
        available: u64,
    },
    /// A kernel needs more shared memory than the device has.
    #[error("{kernel}: needs {requested} bytes of shared memory, the device has {available}")]
    SharedMemory {
        /// The kernel.
        kernel: &'static str,
        /// Bytes it needs.
        requested: usize,
        /// Bytes there are.
        available: usize,
    },
    /// A kernel needs more units per cube than the device allows.
    #[error("{kernel}: needs {requested} units per cube, the device allows {available}")]
    Units {
        /// The kernel.
        kernel: &'static str,
        /// Units it needs.
        requested: usize,
        /// Units allowed.
        available: usize,
    },
    /// A kernel needs more buffers than the device binds.
    #[error("kernels: need {requested} storage buffers, the device binds {available}")]
    Bindings {
        /// Buffers needed.
        requested: usize,
        /// Buffers there are.
        available: usize,
    },
    /// An option does not fit the arguments.
    #[error("{name}: {message}")]
    Argument {
        /// The argument.
        name: &'static str,
        /// What is wrong with it.
        message: String,
    },
}
