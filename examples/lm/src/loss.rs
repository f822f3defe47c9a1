//! Cross entropy over bytes, and the score made from it: bits per byte.
//!
//! `cargo test --release -p gla-lm --lib -- loss`

use burn::tensor::activation::log_softmax;
use burn::tensor::{Int, Tensor};

/// Mean negative log likelihood of the targets, in nats.
///
/// # Shapes
///
/// - `logits`: `[batch, time, vocab]`
/// - `targets`: `[batch, time]`
/// - output: `[1]`
pub fn cross_entropy(logits: Tensor<3>, targets: Tensor<2, Int>) -> Tensor<1> {
    let [batch, time, vocab] = logits.dims();
    let log_probs = log_softmax(logits.reshape([batch * time, vocab]), 1);
    let picked = log_probs.gather(1, targets.reshape([batch * time, 1]));
    picked.mean().neg()
}

/// Nats per byte as bits per byte. One token is one byte here, so nothing else enters.
pub fn bits_per_byte(nats: f64) -> f64 {
    nats / std::f64::consts::LN_2
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::test_device;
    use burn::tensor::TensorData;

    fn targets(values: &[i32]) -> Tensor<2, Int> {
        Tensor::from_data(TensorData::new(values.to_vec(), [1, values.len()]), &test_device())
    }

    #[test]
    fn uniform_logits_cost_eight_bits_per_byte() {
        let logits = Tensor::<3>::zeros([1, 2, 256], &test_device());
        let loss = cross_entropy(logits, targets(&[0, 255])).into_scalar::<f32>();
        assert!((bits_per_byte(loss.into()) - 8.0).abs() < 1e-5, "{loss}");
    }

    #[test]
    fn each_row_is_scored_by_its_own_target() {
        let logits = Tensor::<3>::from_data([[[2.0, 0.0], [0.0, 2.0]]], &test_device());
        let right = cross_entropy(logits.clone(), targets(&[0, 1])).into_scalar::<f32>();
        let wrong = cross_entropy(logits, targets(&[1, 0])).into_scalar::<f32>();
        let expected = (1.0 + (-2.0_f32).exp()).ln();
        assert!((right - expected).abs() < 1e-6, "{right} against {expected}");
        assert!((wrong - right - 2.0).abs() < 1e-6, "{wrong} against {right} + 2");
    }
}
