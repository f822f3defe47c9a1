//! Rotary position embedding.

use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData};

use super::SequenceLayout;

/// Rotary position embedding (Su et al., arXiv 2104.09864): turns channel `i` and channel
/// `i + d/2` of a head by the angle `position * theta^(-2i/d)`, so that products of queries and keys
/// depend on their distance.
///
/// Angles are in f32, their sines and cosines rounded to the type of the input. Burn's
/// [`RotaryEncoding`](burn::nn::RotaryEncoding) pairs neighbouring channels instead, and cannot
/// take a position per sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rotary {
    /// Base of the wave lengths.
    pub theta: f64,
}

/// Sines and cosines for one `[B, T]` of positions.
pub(super) struct Angles {
    /// `[B or 1, T, 1, d/2]`
    sin: Tensor<4>,
    /// As `sin`.
    cos: Tensor<4>,
}

impl Rotary {
    /// Whether heads of this width can be turned.
    pub(super) fn check(&self, head_dim: usize) -> Result<(), String> {
        let theta = self.theta;
        if !(theta.is_finite() && theta > 0.0) {
            return Err(format!("rope_theta must be finite and positive, got {theta}"));
        }
        if !head_dim.is_multiple_of(2) {
            return Err(format!("rotary positions need heads of an even width, got {head_dim}"));
        }
        Ok(())
    }

    /// The angles of the tokens of a `[B, T]` batch, of sequences that have seen so many tokens.
    pub(super) fn angles(
        &self,
        head_dim: usize,
        layout: &SequenceLayout,
        seen: Option<&[usize]>,
        tokens: usize,
        (device, dtype): (&Device, DType),
    ) -> Angles {
        let half = head_dim / 2;
        let frequency = |i: usize| self.theta.powf(-((2 * i) as f64) / head_dim as f64) as f32;
        let frequencies: Vec<f32> = (0..half).map(frequency).collect();
        let frequencies = Tensor::<4>::from_data(
            TensorData::new(frequencies, [1, 1, 1, half]),
            (device, DType::F32),
        );
        let positions = positions(layout, seen, tokens, device);
        let [rows, _] = positions.dims();
        let angles = positions.reshape([rows, tokens, 1, 1]) * frequencies;
        Angles { sin: angles.clone().sin().cast(dtype), cos: angles.cos().cast(dtype) }
    }
}

impl Angles {
    /// Turns `[B, T, H, d]`.
    pub(super) fn apply(&self, x: Tensor<4>) -> Tensor<4> {
        let half = x.dims()[3] / 2;
        let (first, second) = (x.clone().narrow(3, 0, half), x.narrow(3, half, half));
        let turned = first.clone() * self.cos.clone() - second.clone() * self.sin.clone();
        Tensor::cat(vec![turned, first * self.sin.clone() + second * self.cos.clone()], 3)
    }
}

/// Positions of the tokens in their sequences, `[B or 1, T]` f32 (exact below 2^24).
fn positions(
    layout: &SequenceLayout,
    seen: Option<&[usize]>,
    tokens: usize,
    device: &Device,
) -> Tensor<2> {
    // not `float()`: that passes through the device's default type
    let float = |positions: Tensor<1, Int>| positions.cast(FloatDType::F32);
    let seen = seen.filter(|seen| seen.iter().any(|&seen| seen > 0));
    let offsets = |offsets: Vec<f32>, shape: [usize; 2]| {
        Tensor::<2>::from_data(TensorData::new(offsets, shape), (device, DType::F32))
    };
    match (layout.as_packed(), seen) {
        (Some(packed), None) => float(packed.positions.clone()).unsqueeze(),
        (Some(packed), Some(seen)) => {
            let ranges = packed.ranges().zip(seen);
            let past = ranges.flat_map(|(range, &seen)| range.map(move |_| seen as f32)).collect();
            float(packed.positions.clone()).unsqueeze() + offsets(past, [1, tokens])
        }
        (None, seen) => {
            let start = seen.map_or(0, |seen| seen[0]);
            if seen.is_none_or(|seen| seen.iter().all(|&other| other == start)) {
                let (start, end) = (start as i64, (start + tokens) as i64);
                return float(Tensor::arange(start..end, device)).unsqueeze();
            }
            let seen = seen.unwrap_or_default();
            let past = seen.iter().map(|&seen| seen as f32).collect();
            float(Tensor::arange(0..tokens as i64, device)).unsqueeze()
                + offsets(past, [seen.len(), 1])
        }
    }
}
