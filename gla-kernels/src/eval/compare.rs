//! Precisions, and the measure of agreement: root mean square error relative to the reference,
//! over one tensor.

use crate::eval::reference::RefInputs;

/// Largest absolute error that passes whatever the size of the reference.
pub const ABS_FLOOR: f64 = 1e-6;

/// Keeps the ratio finite for a reference of zeros.
const RMS_FLOOR: f64 = 1e-8;

/// How far two tensors are apart.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// `RMS(reference - got) / (RMS(reference) + 1e-8)`.
    pub ratio: f64,
    /// Largest absolute error.
    pub max_abs: f64,
}

/// Passes when the largest absolute error is at most `abs_floor` (see [`ABS_FLOOR`]) or
/// [`Stats::ratio`] is below `ratio`.
///
/// # Errors
///
/// A message that names the tensor when the lengths differ, when either side has a NaN or an
/// infinity (even where both have it), or when the two are too far apart.
pub fn check<T: Copy + Into<f64>>(
    name: &str,
    reference: &[f64],
    got: &[T],
    ratio: f64,
    abs_floor: f64,
) -> Result<Stats, String> {
    check_len(name, reference, got)?;
    let (mut worst, mut max_abs) = (0, 0.0f64);
    let (mut error_sum, mut reference_sum) = (0.0, 0.0);
    for (at, (&expected, &got)) in reference.iter().zip(got).enumerate() {
        let got: f64 = got.into();
        if !expected.is_finite() || !got.is_finite() {
            return Err(format!("{name}[{at}]: got {got}, the reference is {expected}"));
        }
        let error = (expected - got).abs();
        if error > max_abs {
            (worst, max_abs) = (at, error);
        }
        error_sum += error * error;
        reference_sum += expected * expected;
    }
    let count = reference.len().max(1) as f64;
    let error_ratio = (error_sum / count).sqrt() / ((reference_sum / count).sqrt() + RMS_FLOOR);
    if max_abs <= abs_floor || error_ratio < ratio {
        return Ok(Stats { ratio: error_ratio, max_abs });
    }
    let (expected, got): (f64, f64) = (reference[worst], got[worst].into());
    Err(format!(
        "{name}: error ratio {error_ratio:.3e}, allowed {ratio:.3e}; max abs error {max_abs:.3e} \
         at {worst} of {}: got {got:.6e}, the reference is {expected:.6e}",
        reference.len()
    ))
}

/// Passes when every element is right to 0.2 % of itself, or 1e-7: small ones beside large ones too. Terms of one
/// element may have both signs, hence that slack on top of f32.
///
/// # Errors
///
/// A message that names the tensor when the lengths differ, and the first element that is not right.
pub fn check_each<T: Copy + Into<f64>>(
    name: &str,
    reference: &[f64],
    got: &[T],
) -> Result<(), String> {
    check_len(name, reference, got)?;
    for (at, (&expected, &got)) in reference.iter().zip(got).enumerate() {
        let got: f64 = got.into();
        let error = (expected - got).abs();
        let right = error <= 2e-3 * expected.abs() + 1e-37 || error < 1e-7;
        if !right {
            return Err(format!("{name}[{at}]: got {got:e}, the reference is {expected:e}"));
        }
    }
    Ok(())
}

fn check_len<T>(name: &str, reference: &[f64], got: &[T]) -> Result<(), String> {
    let (expected, got) = (reference.len(), got.len());
    if expected != got {
        return Err(format!("{name}: got {got} elements, the reference has {expected}"));
    }
    Ok(())
}

/// A precision that kernels take their inputs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RefDType {
    /// 24 bits of mantissa.
    F32,
    /// 11 bits of mantissa, 5 of exponent.
    F16,
    /// 8 bits of mantissa, the exponent of f32.
    BF16,
}

impl RefDType {
    /// The f32 nearest to `x`, then the nearest number of this type, ties to even.
    pub fn round(self, x: f64) -> f64 {
        let x = f64::from(x as f32);
        let (mantissa, smallest, overflow) = match self {
            Self::F32 => return x,
            Self::F16 => (10, -14, 16),
            Self::BF16 => (7, -126, 128),
        };
        if x == 0.0 || !x.is_finite() {
            return x;
        }
        // the bits hold the exponent of every f32, subnormal ones too, since those are normal f64
        let exponent = ((x.to_bits() >> 52) & 0x7ff) as i32 - 1023;
        let unit = 2.0f64.powi(exponent.max(smallest) - mantissa);
        let rounded = (x / unit).round_ties_even() * unit;
        match rounded.abs() < 2.0f64.powi(overflow) {
            true => rounded,
            false => f64::INFINITY.copysign(x),
        }
    }

    /// [`round`](Self::round) on every element.
    pub fn round_all(self, values: &mut [f64]) {
        for value in values {
            *value = self.round(*value);
        }
    }
}

impl RefInputs {
    /// Rounds q, k and v to a precision, and the gate to its own. The initial state stays: it is f32
    /// for every precision of the others.
    pub fn round_to(&mut self, dtype: RefDType, gate_dtype: RefDType) {
        dtype.round_all(&mut self.q);
        dtype.round_all(&mut self.k);
        dtype.round_all(&mut self.v);
        if let Some(gate) = self.gate.values_mut() {
            gate_dtype.round_all(gate);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::problems::Case;

    fn ramp(len: usize) -> Vec<f64> {
        (0..len).map(|at| at as f64 - 3.5).collect()
    }

    fn fails<T: Copy + Into<f64>>(reference: &[f64], got: &[T]) -> String {
        check("dq", reference, got, 5e-3, ABS_FLOOR).expect_err("must not pass")
    }

    #[test]
    fn small_elements_have_digits_of_their_own() {
        let reference = [1.0, 1e-4, 0.0];
        assert_eq!(check_each("dg", &reference, &[1.001, 1.001e-4, 1e-8]), Ok(()));
        let error = check_each("dg", &reference, &[1.0, 1.1e-4, 0.0]).unwrap_err();
        assert_eq!(error, "dg[1]: got 1.1e-4, the reference is 1e-4");
        assert!(check_each("dg", &reference, &[1.0, f64::NAN, 0.0]).is_err());
        assert!(check_each("dg", &reference, &[1.0, 1e-4]).is_err());
    }

    #[test]
    fn equal_and_near_pass() {
        let reference = ramp(10);
        let got: Vec<f32> = reference.iter().map(|&x| x as f32).collect();
        assert_eq!(check("o", &reference, &got, 1e-9, 0.0), Ok(Stats::default()));
        let near: Vec<f64> = reference.iter().map(|x| x * 1.001).collect();
        let stats = check("o", &reference, &near, 5e-3, 0.0).unwrap();
        assert!((stats.ratio - 1e-3).abs() < 1e-9 && (stats.max_abs - 5.5e-3).abs() < 1e-9);
        assert_eq!(check::<f64>("o", &[], &[], 5e-3, 0.0), Ok(Stats::default()));
    }

    #[test]
    fn ratio_is_the_quotient_of_the_root_mean_squares() {
        let stats = check("o", &[3.0, 4.0], &[3.0, 3.5], 0.2, 0.0).unwrap();
        assert!((stats.ratio - 0.1).abs() < 1e-9 && stats.max_abs == 0.5, "{stats:?}");
    }

    #[test]
    fn floor_excuses_small_errors_only() {
        let reference = [0.0; 8];
        check("dg", &reference, &[1e-6; 8], 5e-3, ABS_FLOOR).unwrap();
        let message = fails(&reference, &[1.1e-6; 8]);
        assert!(message.starts_with("dq: error ratio"), "{message}");
    }

    #[test]
    fn length_mismatch_fails() {
        let message = fails(&ramp(8), &ramp(7));
        assert_eq!(message, "dq: got 7 elements, the reference has 8");
    }

    #[test]
    fn swapped_elements_fail_and_name_the_worst() {
        let reference = ramp(9);
        let mut got = reference.clone();
        got.swap(4, 5);
        got[7] += 2.0;
        let message = fails(&reference, &got);
        assert!(message.contains("max abs error 2.000e0 at 7 of 9: got 5.5"), "{message}");
        let reversed: Vec<f64> = reference.iter().rev().copied().collect();
        fails(&reference, &reversed);
    }

    #[test]
    fn not_finite_fails_on_either_side() {
        let fine = ramp(4);
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let mut broken = fine.clone();
            broken[2] = bad;
            assert!(fails(&fine, &broken).starts_with("dq[2]: got "));
            assert!(fails(&broken, &fine).starts_with("dq[2]: got -1.5"));
            fails(&broken, &broken);
            assert!(check("o", &fine, &broken, f64::INFINITY, f64::INFINITY).is_err());
        }
        fails(&[0.0], &[f32::NAN]);
    }

    #[test]
    fn a_limit_that_is_not_a_number_never_passes() {
        assert!(check("o", &[1.0], &[2.0], f64::NAN, f64::NAN).is_err());
    }

    #[test]
    fn rounding_agrees_with_half() {
        // every exponent of f32 and mantissas around the ties of both types
        for high in 0..=0xffffu32 {
            for low in [0, 1, 0x0fff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001, 0xf000, 0xffff] {
                let x = f32::from_bits((high << 16) | low);
                let (f16, bf16) = (half::f16::from_f32(x), half::bf16::from_f32(x));
                for (dtype, expected) in [
                    (RefDType::F32, f64::from(x)),
                    (RefDType::F16, f16.to_f64()),
                    (RefDType::BF16, bf16.to_f64()),
                ] {
                    let got = dtype.round(f64::from(x));
                    let same = got.to_bits() == expected.to_bits();
                    assert!(same || got.is_nan() && expected.is_nan(), "{dtype:?} {x:e}: {got:e}");
                }
            }
        }
    }

    #[test]
    fn round_to_gives_the_gate_its_own_precision() {
        let exact = Case::parse("scalar-ls1-t9-k5-v3-h2-init").unwrap().inputs();
        let mut inputs = exact.clone();
        inputs.round_to(RefDType::BF16, RefDType::F32);
        assert_eq!((&inputs.gate, &inputs.initial_state), (&exact.gate, &exact.initial_state));
        assert!(inputs.q != exact.q && inputs.k != exact.k && inputs.v != exact.v);
        let mut inputs = exact.clone();
        inputs.round_to(RefDType::F32, RefDType::BF16);
        assert_eq!((&inputs.q, &inputs.k, &inputs.v), (&exact.q, &exact.k, &exact.v));
        assert_ne!(inputs.gate, exact.gate);
    }
}
