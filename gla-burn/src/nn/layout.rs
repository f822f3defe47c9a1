//! How sequences lie in a batch: one a row, packed one after the other, or padded.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::kind::Basic;
use burn::tensor::{Device, Int, Tensor};
use gla_kernels::Sequences;

/// How the sequences of a batch lie in its `[B, T, ..]` tensors.
///
/// The three say the same of the same sequences: packed or padded, each gets what it would get
/// alone.
///
/// ```
/// # use burn::tensor::{Device, Int, Tensor};
/// # use gla_burn::SequenceLayout;
/// # let device = Device::flex();
/// // sequences of 3 and 2 tokens: one after the other, or in rows filled up on the left
/// let packed = SequenceLayout::packed(&[0, 3, 5], &device);
/// let padded = SequenceLayout::padded(Tensor::<2, Int>::from_data([[1, 1, 1], [0, 1, 1]], &device));
/// assert_eq!((packed.num_sequences(1), padded.num_sequences(2)), (2, 2));
/// ```
#[derive(Clone, Debug, Default)]
pub struct SequenceLayout {
    packed: Option<Packed>,
    padding: Option<Padding>,
}

/// Sequences one after the other in a batch of one row.
#[derive(Clone, Debug)]
pub(super) struct Packed {
    cu_seqlens: Arc<[usize]>,
    /// Index of each token in its own sequence, `[T]`.
    pub positions: Tensor<1, Int>,
}

/// Which entries of a `[B, T]` batch are tokens.
#[derive(Clone, Debug)]
struct Padding {
    shape: [usize; 2],
    /// Where the tokens are among the `B * T` entries.
    tokens: Tensor<1, Int>,
    /// For each of the `B * T` entries: 1 + the number of the token in it, 0 for padding.
    origin: Tensor<1, Int>,
}

impl SequenceLayout {
    /// Every row is one sequence of `T` tokens. The default.
    pub fn rows() -> Self {
        Self::default()
    }

    /// Sequences one after the other in a batch of 1: sequence `n` has the tokens
    /// `cu_seqlens[n]..cu_seqlens[n + 1]`. Equal neighbours make an empty sequence.
    ///
    /// # Panics
    ///
    /// Panics if `cu_seqlens` does not rise from 0, or if there is no token.
    pub fn packed(cu_seqlens: &[usize], device: &Device) -> Self {
        let time = cu_seqlens.last().copied().unwrap_or(0);
        let sequences = Sequences::Packed { cu_seqlens: cu_seqlens.to_vec(), time };
        sequences.validate().unwrap_or_else(|error| panic!("SequenceLayout: {error}"));
        assert!(time > 0, "SequenceLayout: cu_seqlens must hold at least 1 token, got 0");
        Self { packed: Some(Packed::new(cu_seqlens, device)), padding: None }
    }

    /// Rows filled up to `T` by entries that are no tokens: the sequence of a row is what `mask`
    /// marks with 1 in it, in order. Padding may lie on either side, and a row may be empty.
    ///
    /// Padding takes part in nothing: it is removed before the first operation, and the output is
    /// 0 where it was. The mask is read, so this waits for the device.
    ///
    /// # Shapes
    ///
    /// - mask: `[B, T]`, 1 for a token and 0 for padding
    ///
    /// # Panics
    ///
    /// Panics if the mask holds another number, or no 1 at all.
    pub fn padded(mask: Tensor<2, Int>) -> Self {
        let (shape, device) = (mask.dims(), mask.device());
        let data = mask.into_data().convert::<i64>();
        let mask: Vec<i64> = data.try_into_vec().expect("i64 after the conversion");
        if let Some(other) = mask.iter().find(|&&entry| entry != 0 && entry != 1) {
            panic!("SequenceLayout: the mask must hold 0 and 1, got {other}");
        }

        let mut cu_seqlens = vec![0];
        let (mut tokens, mut origin) = (Vec::new(), Vec::new());
        for row in 0..shape[0] {
            let entries = row * shape[1]..(row + 1) * shape[1];
            for (entry, &mark) in entries.clone().zip(&mask[entries]) {
                if mark == 1 {
                    tokens.push(entry as i64);
                    origin.push(tokens.len() as i64);
                } else {
                    origin.push(0);
                }
            }
            cu_seqlens.push(tokens.len());
        }
        assert!(!tokens.is_empty(), "SequenceLayout: the mask must mark at least 1 token, got 0");
        let padding =
            Padding { shape, tokens: ints(tokens, &device), origin: ints(origin, &device) };
        Self { packed: Some(Packed::new(&cu_seqlens, &device)), padding: Some(padding) }
    }

    /// Number of sequences in a batch of `batch` rows.
    pub fn num_sequences(&self, batch: usize) -> usize {
        self.packed.as_ref().map_or(batch, |packed| packed.cu_seqlens.len() - 1)
    }

    /// Tokens of each sequence in a `[batch, tokens]` batch.
    pub(super) fn lengths(&self, [batch, tokens]: [usize; 2]) -> Vec<usize> {
        match &self.packed {
            None => vec![tokens; batch],
            Some(packed) => packed.ranges().map(|range| range.len()).collect(),
        }
    }

    /// Where the sequences lie in a batch of one row, if they are packed.
    pub(super) fn as_packed(&self) -> Option<&Packed> {
        self.packed.as_ref()
    }

    /// Bounds of packed sequences, as the op takes them.
    pub(super) fn cu_seqlens(&self) -> Option<Vec<usize>> {
        self.packed.as_ref().map(|packed| packed.cu_seqlens.to_vec())
    }

    /// Compares the layout with the `[B, T]` of an input.
    pub(super) fn check(&self, owner: &str, [batch, tokens]: [usize; 2]) {
        match (&self.padding, &self.packed) {
            (Some(Padding { shape, .. }), _) => assert!(
                *shape == [batch, tokens],
                "{owner}: the mask of the layout is {shape:?}, the input is [{batch}, {tokens}]"
            ),
            (None, Some(packed)) => {
                let time = packed.cu_seqlens.last().copied().unwrap_or(0);
                assert!(
                    [batch, tokens] == [1, time],
                    "{owner}: the layout has {time} packed tokens, the input is [{batch}, {tokens}]"
                );
            }
            (None, None) => {}
        }
    }

    /// Runs `body` on the tokens without the padding, packed in one row, and puts what comes back
    /// where the tokens were, with 0 elsewhere.
    ///
    /// # Shapes
    ///
    /// - x: `[B, T, D]`
    /// - output: `[B, T, E]` for a `body` from `[1, N, D]` to `[1, N, E]`
    pub(super) fn without_padding<K: Basic>(
        &self,
        x: Tensor<3, K>,
        body: impl FnOnce(Tensor<3, K>, &Self) -> Tensor<3>,
    ) -> Tensor<3> {
        let Some(padding) = &self.padding else { return body(x, self) };
        let [batch, tokens, width] = x.dims();
        let inner = Self { packed: self.packed.clone(), padding: None };
        let flat = x.reshape([1, batch * tokens, width]);
        let y = body(flat.select(1, padding.tokens.clone()), &inner);
        let width = y.dims()[2];
        let nothing = Tensor::zeros([1, 1, width], (&y.device(), y.dtype()));
        let spread = Tensor::cat(vec![nothing, y], 1).select(1, padding.origin.clone());
        spread.reshape([batch, tokens, width])
    }
}

impl Packed {
    fn new(cu_seqlens: &[usize], device: &Device) -> Self {
        let lengths = cu_seqlens.windows(2).map(|pair| pair[1] - pair[0]);
        let positions = lengths.flat_map(|length| 0..length as i64).collect();
        Self { cu_seqlens: cu_seqlens.into(), positions: ints(positions, device) }
    }

    /// The tokens of each sequence.
    pub fn ranges(&self) -> impl Iterator<Item = Range<usize>> {
        self.cu_seqlens.windows(2).map(|pair| pair[0]..pair[1])
    }
}

/// A constant for any device, also one with autodiff.
fn ints(values: Vec<i64>, device: &Device) -> Tensor<1, Int> {
    Tensor::from_data(values.as_slice(), device)
}
