//! Cross entropy of a language model whose logits never exist all at once.

use burn::tensor::{DType, FloatDType, Int, Tensor, TensorData};

use super::gradient::{carry, is_tracked};
use super::rows::even_divisor;
use super::{GlaTransformer, SequenceLayout};
use crate::functions::is_portable;

/// Label of a position that is not scored, as in PyTorch and Hugging Face.
pub const IGNORE_INDEX: i32 = -100;

/// With fewer rows a matrix product leaves a device idle.
const MIN_CHUNK: usize = 256;

/// How many rows at a time [`linear_cross_entropy`] takes if it is not told: a power of two that makes the
/// logits of a chunk two to four times as large as `hidden`, but at least 256.
///
/// # Panics
///
/// Panics if `vocab_size` is 0.
pub const fn loss_chunk(rows: usize, hidden_size: usize, vocab_size: usize) -> usize {
    let even = 2 * rows * hidden_size / vocab_size;
    (if even > MIN_CHUNK { even } else { MIN_CHUNK }).next_power_of_two()
}

/// Cross entropy of the logits `hidden weight`, without holding them: the output projection and the
/// softmax run over `chunk` rows at a time.
///
/// ```text
/// loss = mean over rows n with label_n != -100 of  ln(sum_v exp z_nv) - z_n,label_n
/// z = hidden weight
/// ```
///
/// Equal to a log-softmax and a gather over all the logits, and so are the gradients of `hidden` and
/// `weight`. They are computed together with the value, `softmax(z) - onehot(label)` times the other
/// operand, so that the graph keeps two tensors of the size of the operands and no logits. Without
/// autodiff, or for an operand that is not tracked, they are not computed. The mean over no rows at
/// all is 0, with gradients of 0.
///
/// The products have the type of the operands; logarithms, sums and the saved gradients are f32.
///
/// # Shapes
///
/// - hidden: `[N, hidden_size]`
/// - weight: `[hidden_size, vocab_size]`, type of `hidden`
/// - labels: `[N]`, in `0..vocab_size` or [`IGNORE_INDEX`]
/// - chunk: rows at a time; if `None`, [`loss_chunk`]
/// - output: `[1]`, f32, in nats
///
/// # Panics
///
/// Panics if shapes or types do not fit together, if there are no rows, or if `chunk` is 0; on the
/// CPU also if a label is out of range, for which a GPU would have to wait: there the value is NaN.
pub fn linear_cross_entropy(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    labels: Tensor<1, Int>,
    chunk: Option<usize>,
) -> Tensor<1> {
    check(&hidden, &weight, &labels, chunk);
    let [rows, hidden_size] = hidden.dims();
    let [_, vocab] = weight.dims();
    let chunk = chunk.unwrap_or_else(|| loss_chunk(rows, hidden_size, vocab));

    let labels = labels.without_autodiff();
    let scored = labels.clone().not_equal_elem(IGNORE_INDEX).int().sum();
    let scored = scored.clamp_min(1).cast(FloatDType::F32);
    let sums = Sums::over_chunks(&hidden, &weight, labels, chunk);

    let mut sum = sums.loss;
    if let Some(gradient) = sums.hidden {
        sum = sum + carry(hidden, gradient).sum();
    }
    if let Some(gradient) = sums.weight {
        sum = sum + carry(weight, gradient).sum();
    }
    sum / scored
}

/// Sums over the scored rows, without autodiff.
struct Sums {
    /// `[1]`
    loss: Tensor<1>,
    /// Gradient of `loss` in `hidden`, if that is tracked.
    hidden: Option<Tensor<2>>,
    /// Gradient of `loss` in `weight`, if that is tracked.
    weight: Option<Tensor<2>>,
}

impl Sums {
    fn over_chunks(
        hidden: &Tensor<2>,
        weight: &Tensor<2>,
        labels: Tensor<1, Int>,
        chunk: usize,
    ) -> Self {
        let (with_hidden, with_weight) = (is_tracked(hidden), is_tracked(weight));
        let hidden = hidden.clone().without_autodiff();
        let weight = weight.clone().without_autodiff();
        let ([rows, _], [_, vocab]) = (hidden.dims(), weight.dims());
        let (device, dtype) = (hidden.device(), hidden.dtype());
        let tokens = Tensor::<1, Int>::arange(0..vocab as i64, (&device, labels.dtype()));
        let tokens = tokens.unsqueeze::<2>();

        let mut loss = Tensor::zeros([1], (&device, DType::F32));
        let mut d_hidden = Vec::new();
        let mut d_weight: Option<Tensor<2>> = None;
        for start in (0..rows).step_by(chunk) {
            let len = chunk.min(rows - start);
            let x = hidden.clone().narrow(0, start, len);
            let label = labels.clone().narrow(0, start, len).unsqueeze_dim::<2>(1);
            let ignored = label.clone().equal_elem(IGNORE_INDEX);
            let unknown = label.clone().lower_elem(0);
            let unknown = unknown.bool_or(label.clone().greater_equal_elem(vocab as i64));
            // Compared, not indexed: with as many rows in a chunk as channels Burn 0.22.1 was seen to fuse
            // a gather with the product of the chunk before, and to read its indices from elsewhere.
            let is_label = tokens.clone().equal(label);

            let logits = x.clone().matmul(weight.clone()).cast(DType::F32);
            let logits = logits.clone() - over_tokens(logits, Tensor::max_dim);
            let picked = logits.clone().mask_fill(is_label.clone().bool_not(), 0.0);
            let picked = over_tokens(picked, Tensor::sum_dim);
            let exp = logits.exp();
            let normalizer = over_tokens(exp.clone(), Tensor::sum_dim);
            let nats = normalizer.clone().log() - picked;
            let nats = nats.mask_fill(unknown, f32::NAN).mask_fill(ignored.clone(), 0.0);
            loss = loss + nats.sum();
            if !(with_hidden || with_weight) {
                continue;
            }

            let d_logits = exp / normalizer - is_label.cast(FloatDType::F32);
            let d_logits = d_logits.mask_fill(ignored, 0.0).cast(dtype);
            if with_hidden {
                let part = d_logits.clone().matmul(weight.clone().transpose());
                d_hidden.push(part.cast(DType::F32));
            }
            if with_weight {
                // not `x^T d_logits`: on an H100 that took Burn 0.22.1 twice as long
                let part = d_logits.transpose().matmul(x).cast(DType::F32);
                d_weight = Some(match d_weight {
                    Some(sum) => sum + part,
                    None => part,
                });
            }
        }
        let hidden = with_hidden.then(|| Tensor::cat(d_hidden, 0));
        Self { loss, hidden, weight: d_weight.map(Tensor::transpose) }
    }
}

/// `reduce`, a sum or a maximum over one axis, of each row, `[N, 1]`.
fn over_tokens(x: Tensor<2>, reduce: impl Fn(Tensor<3>, usize) -> Tensor<3>) -> Tensor<2> {
    let [rows, vocab] = x.dims();
    let parts = match even_divisor(vocab, rows) {
        Some(parts) => reduce(x.reshape([rows, parts, vocab / parts]), 1),
        None => x.unsqueeze_dim(1),
    };
    reduce(parts, 2).squeeze_dim(2)
}

fn check(hidden: &Tensor<2>, weight: &Tensor<2>, labels: &Tensor<1, Int>, chunk: Option<usize>) {
    let ([rows, hidden_size], [width, vocab]) = (hidden.dims(), weight.dims());
    let [num_labels] = labels.dims();
    assert!(
        width == hidden_size,
        "linear_cross_entropy: weight has {width} rows, hidden has {hidden_size} columns"
    );
    assert!(
        num_labels == rows,
        "linear_cross_entropy: {num_labels} labels for {rows} rows of hidden"
    );
    assert!(
        hidden.dtype() == weight.dtype(),
        "linear_cross_entropy: weight is {:?}, hidden is {:?}",
        weight.dtype(),
        hidden.dtype()
    );
    assert!(
        rows * vocab > 0,
        "linear_cross_entropy: {rows} rows and {vocab} tokens, expected some"
    );
    assert!(chunk != Some(0), "linear_cross_entropy: chunk must be at least 1, got 0");
    if is_portable(&labels.device().without_autodiff()) {
        let labels = labels.clone().without_autodiff();
        let scored = labels.clone().mask_fill(labels.equal_elem(IGNORE_INDEX), 0);
        let largest = scored.clone().max().into_scalar::<i64>();
        let smallest = scored.min().into_scalar::<i64>();
        assert!(
            smallest >= 0 && largest < vocab as i64,
            "linear_cross_entropy: labels from {smallest} to {largest}, expected {IGNORE_INDEX} or \
             0 to {}",
            vocab - 1
        );
    }
}

impl GlaTransformer {
    /// Mean cross entropy of the model's predictions, by [`linear_cross_entropy`]: no
    /// `[B, T, vocab_size]` logits, neither in the forward nor in the backward.
    ///
    /// # Shapes
    ///
    /// - ids: `[B, T]`
    /// - labels: `[B, T]`, the token after each position or [`IGNORE_INDEX`], see [`shift_labels`]
    /// - output: `[1]`, f32, in nats per scored token
    ///
    /// # Panics
    ///
    /// As [`linear_cross_entropy`], if labels and ids differ in shape, and if the output projection has
    /// a bias.
    pub fn loss(&self, ids: Tensor<2, Int>, labels: Tensor<2, Int>) -> Tensor<1> {
        self.loss_with(ids, labels, &SequenceLayout::rows())
    }

    /// [`loss`](Self::loss) of sequences that are packed or padded as `layout` says. Padding must
    /// bear the label [`IGNORE_INDEX`].
    ///
    /// # Shapes
    ///
    /// As [`loss`](Self::loss).
    ///
    /// # Panics
    ///
    /// As [`loss`](Self::loss), and if the layout is not of `ids`.
    pub fn loss_with(
        &self,
        ids: Tensor<2, Int>,
        labels: Tensor<2, Int>,
        layout: &SequenceLayout,
    ) -> Tensor<1> {
        assert!(
            labels.dims() == ids.dims(),
            "GlaTransformer: labels have shape {:?}, ids {:?}",
            labels.dims(),
            ids.dims()
        );
        let weight = match &self.lm_head {
            Some(head) => {
                assert!(head.bias.is_none(), "GlaTransformer: the loss knows no bias in lm_head");
                head.weight.val()
            }
            None => self.embeddings.weight.val().transpose(),
        };
        let hidden = self.hidden_with(ids, layout).flatten::<2>(0, 1);
        linear_cross_entropy(hidden, weight, labels.flatten(0, 1), None)
    }
}

/// Labels of sequences that predict their own next token: `labels_t = ids_{t+1}`, and
/// [`IGNORE_INDEX`] at the last position of each sequence.
///
/// Packed documents are sequences of their own: with `cu_seqlens`, as for
/// [`SequenceLayout::packed`], the last token of a document does not predict the first of the next.
///
/// # Shapes
///
/// - ids: `[B, T]`, `B = 1` with `cu_seqlens`
/// - output: `[B, T]`
///
/// # Panics
///
/// Panics if `T` is 0, or with `cu_seqlens` if `B` is not 1 or an offset is beyond `T`.
pub fn shift_labels(ids: Tensor<2, Int>, cu_seqlens: Option<&[usize]>) -> Tensor<2, Int> {
    let [batch, time] = ids.dims();
    assert!(time > 0, "shift_labels: ids must hold at least 1 token per sequence, got 0");
    let mut last = vec![false; time];
    last[time - 1] = true;
    if let Some(bounds) = cu_seqlens {
        assert!(batch == 1, "shift_labels: cu_seqlens needs a batch of 1, got {batch}");
        for &end in bounds.iter().filter(|&&end| end > 0) {
            assert!(end <= time, "shift_labels: cu_seqlens has {end}, ids have {time} tokens");
            last[end - 1] = true;
        }
    }
    let last = Tensor::from_data(TensorData::new(last, [1, time]), &ids.device());
    // what comes round to the last position is masked
    ids.roll_dim(-1, 1).mask_fill(last, IGNORE_INDEX)
}
