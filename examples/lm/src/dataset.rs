//! Windows of the corpus. Which ones a step sees is a pure function of (seed, step).
//!
//! `cargo test --release -p gla-lm --lib -- dataset`

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::hash::mix;

/// One batch: `targets` are the `inputs` one byte later.
pub struct Batch {
    /// `[batch, context]`, byte values.
    pub inputs: Tensor<2, Int>,
    /// `[batch, context]`, byte values.
    pub targets: Tensor<2, Int>,
}

/// Start offsets of the `batch` windows of training step `step`.
///
/// Windows of `context + 1` bytes, drawn uniformly from a corpus of `len` bytes.
///
/// # Panics
///
/// When not even one window fits.
pub fn train_offsets(
    seed: u64,
    step: usize,
    batch: usize,
    context: usize,
    len: usize,
) -> Vec<usize> {
    assert!(
        len > context,
        "train_offsets: a window of {context} + 1 bytes needs a longer corpus than {len}"
    );
    let choices = (len - context) as u64;
    (0..batch as u64).map(|index| (mix(seed, step as u64, index) % choices) as usize).collect()
}

/// Start offsets of at most `count` windows spread evenly over `len` bytes, none overlapping.
///
/// The same windows at every evaluation, so that scores can be compared.
pub fn valid_offsets(count: usize, context: usize, len: usize) -> Vec<usize> {
    let room = len.saturating_sub(1) / context;
    let count = count.min(room);
    (0..count).map(|i| i * room / count * context).collect()
}

/// Gather the windows at `offsets` into a batch on `device`.
///
/// # Panics
///
/// When a window of `context + 1` bytes does not fit at its offset.
pub fn gather(bytes: &[u8], offsets: &[usize], context: usize, device: &Device) -> Batch {
    let shape = [offsets.len(), context];
    let window = |shift: usize| {
        let values: Vec<i32> = offsets
            .iter()
            .flat_map(|&start| &bytes[start + shift..start + shift + context])
            .map(|&byte| i32::from(byte))
            .collect();
        Tensor::from_data(TensorData::new(values, shape), device)
    };
    Batch { inputs: window(0), targets: window(1) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::test_device;

    #[test]
    fn a_step_always_sees_the_same_windows() {
        let first = train_offsets(42, 17, 8, 32, 10_000);
        assert_eq!(first, train_offsets(42, 17, 8, 32, 10_000));
        assert_ne!(first, train_offsets(42, 18, 8, 32, 10_000));
        assert_ne!(first, train_offsets(43, 17, 8, 32, 10_000));
    }

    #[test]
    fn windows_fit_up_to_the_last_byte() {
        let all: Vec<usize> = (0..200).flat_map(|step| train_offsets(0, step, 4, 32, 36)).collect();
        assert_eq!(all.iter().max(), Some(&3));
        assert_eq!(all.iter().min(), Some(&0));
        assert_eq!(train_offsets(0, 0, 2, 35, 36), [0, 0]);
    }

    #[test]
    #[should_panic(expected = "32 + 1 bytes needs a longer corpus than 32")]
    fn a_corpus_shorter_than_a_window_is_refused() {
        train_offsets(0, 0, 1, 32, 32);
    }

    #[test]
    fn validation_windows_are_apart_and_fit() {
        let offsets = valid_offsets(5, 10, 1000);
        assert_eq!(offsets.len(), 5);
        assert!(offsets.windows(2).all(|w| w[1] - w[0] >= 10), "{offsets:?}");
        assert!(offsets.iter().all(|o| o + 10 < 1000));
        assert_eq!(valid_offsets(100, 10, 31), [0, 10, 20]);
        assert!(valid_offsets(4, 10, 10).is_empty());
        assert!(valid_offsets(4, 10, 0).is_empty());
    }

    #[test]
    fn targets_are_the_next_bytes() {
        let bytes: Vec<u8> = (100..120).collect();
        let batch = gather(&bytes, &[0, 15], 4, &test_device());
        let inputs = batch.inputs.try_into_vec_as::<i32>().unwrap();
        let targets = batch.targets.try_into_vec_as::<i32>().unwrap();
        assert_eq!(inputs, [100, 101, 102, 103, 115, 116, 117, 118]);
        assert_eq!(targets, [101, 102, 103, 104, 116, 117, 118, 119]);
    }
}
