//! Learning rate as a pure function of the step: linear warm-up, then a cosine down to a tenth.
//!
//! `cargo test --release -p gla-lm --lib -- schedule`
//!
//! A function has no state to save, so a resumed run cannot drift from an uninterrupted one.

use serde::{Deserialize, Serialize};

/// Warm-up and cosine decay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// Learning rate at the end of the warm-up.
    pub peak: f64,
    /// Steps of linear warm-up; the first of them already has a rate above zero.
    pub warmup: usize,
    /// Steps of the whole run; the last of them has the lowest rate.
    pub steps: usize,
}

/// The rate at the end, as a part of the peak.
const FLOOR: f64 = 0.1;

impl Schedule {
    /// Learning rate of `step`, counted from 0.
    pub fn rate(&self, step: usize) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let decay = self.steps.saturating_sub(self.warmup + 1).max(1);
        let progress = ((step - self.warmup) as f64 / decay as f64).min(1.0);
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
        self.peak * (FLOOR + (1.0 - FLOOR) * cosine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(warmup: usize, steps: usize) -> Schedule {
        Schedule { peak: 1e-3, warmup, steps }
    }

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-12, "{a} against {b}");
    }

    #[test]
    fn rises_to_the_peak_and_falls_to_a_tenth() {
        let s = schedule(10, 111);
        close(s.rate(0), 1e-4);
        close(s.rate(4), 5e-4);
        close(s.rate(9), 1e-3);
        close(s.rate(10), 1e-3);
        close(s.rate(60), 5.5e-4);
        close(s.rate(110), 1e-4);
    }

    #[test]
    fn stays_at_the_floor_past_the_end() {
        close(schedule(10, 111).rate(5000), 1e-4);
    }

    #[test]
    fn never_rises_after_the_warmup() {
        let s = schedule(5, 50);
        assert!((5..60).all(|step| s.rate(step + 1) <= s.rate(step)));
    }

    #[test]
    fn no_warmup_and_runs_shorter_than_the_warmup_are_fine() {
        close(schedule(0, 1).rate(0), 1e-3);
        close(schedule(10, 4).rate(3), 4e-4);
        assert!(schedule(4, 4).rate(4).is_finite());
    }
}
