//! The score: bits per byte. The loss that is trained is [`GlaTransformer::loss`], the mean cross
//! entropy in nats per byte.
//!
//! [`GlaTransformer::loss`]: gla_burn::GlaTransformer::loss

/// Nats per byte as bits per byte. One token is one byte here, so nothing else enters.
pub fn bits_per_byte(nats: f64) -> f64 {
    nats / std::f64::consts::LN_2
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::test_device;
    use burn::tensor::Tensor;
    use gla_burn::linear_cross_entropy;

    #[test]
    fn uniform_logits_cost_eight_bits_per_byte() {
        let device = test_device();
        let (hidden, weight) = (Tensor::zeros([2, 4], &device), Tensor::zeros([4, 256], &device));
        let labels = Tensor::from_data([0, 255], &device);
        let loss = linear_cross_entropy(hidden, weight, labels, None).into_scalar::<f32>();
        assert!((bits_per_byte(loss.into()) - 8.0).abs() < 1e-5, "{loss}");
    }
}
