//! What a run shows while it trains, and what it writes to log.jsonl.
//!
//! `cargo run --release -p gla-lm --bin train -- --log-every 1`
//!
//! A bar if stderr is a terminal, plain lines otherwise. The log holds no times, so that a resumed
//! run and an uninterrupted one write the same lines.

use std::fs::{self, File};
use std::io::{ErrorKind, IsTerminal, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

use crate::checkpoint::write_file;
use crate::loss::bits_per_byte;

/// Name of the log in the run's folder.
pub const LOG_FILE: &str = "log.jsonl";

/// A line of the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Steps done.
    pub step: usize,
    /// Loss of the last step's batch, in nats per byte.
    pub loss: f32,
    /// Global norm of its gradients before the clip.
    pub norm: f32,
    /// Its learning rate.
    pub rate: f64,
    /// Validation score in bits per byte, where it was measured.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub valid_bits: Option<f64>,
}

/// Shows and logs a run from some step to its last.
pub struct Progress {
    bar: Option<ProgressBar>,
    log: File,
    steps: usize,
    tokens_per_step: usize,
    begin: Instant,
    /// Step and time of the last shown entry.
    shown: (usize, Instant),
    /// Time spent outside of steps since the start, and since the last shown entry.
    idle: (Duration, Duration),
}

impl Progress {
    /// Continue the log in `folder` after `step` of `steps`; later lines belong to work that was
    /// lost and are dropped.
    ///
    /// # Errors
    ///
    /// When the log cannot be written.
    pub fn new(folder: &Path, step: usize, steps: usize, tokens_per_step: usize) -> Result<Self> {
        let path = folder.join(LOG_FILE);
        let open = || -> Result<File> {
            let old = match fs::read(&path) {
                Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
                old => old?,
            };
            // a line that was cut within a character is dropped, as any that is no entry
            let kept: String = String::from_utf8_lossy(&old)
                .lines()
                .filter(|line| serde_json::from_str::<Entry>(line).is_ok_and(|e| e.step <= step))
                .map(|line| format!("{line}\n"))
                .collect();
            write_file(&path, kept.as_bytes())?;
            Ok(File::options().append(true).open(&path)?)
        };
        let log = open().with_context(|| format!("cannot write {}", path.display()))?;
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = "{bar:32} step {pos}/{len}  {msg}";
            let bar = ProgressBar::new(steps as u64).with_position(step as u64);
            bar.with_style(ProgressStyle::with_template(style).expect("the template is constant"))
        });
        let now = Instant::now();
        Ok(Self {
            bar,
            log,
            steps,
            tokens_per_step,
            begin: now,
            shown: (step, now),
            idle: (Duration::ZERO, Duration::ZERO),
        })
    }

    /// A step that is neither shown nor logged.
    pub fn tick(&self) {
        if let Some(bar) = &self.bar {
            bar.inc(1);
        }
    }

    /// Show and log a step that the device has done: its speed is that since the last one shown.
    ///
    /// # Errors
    ///
    /// When the log cannot be written.
    pub fn show(&mut self, entry: &Entry) -> Result<()> {
        let json = serde_json::to_string(entry)?;
        writeln!(self.log, "{json}").context("cannot write the log")?;

        let now = Instant::now();
        let recent = now - self.shown.1 - self.idle.1.min(now - self.shown.1);
        let steps = (entry.step - self.shown.0).max(1);
        let rate = (steps * self.tokens_per_step) as f64 / recent.as_secs_f64().max(1e-9);
        // from the last steps alone: the first waits for compilers
        let left = recent.mul_f64((self.steps - entry.step) as f64 / steps as f64);
        self.shown = (entry.step, now);
        self.idle.1 = Duration::ZERO;

        let bits = bits_per_byte(entry.loss.into());
        let numbers = format!(
            "loss {bits:.3} bits/byte  norm {:.2}  lr {:.1e}  {rate:.0} tokens/s  {} left",
            entry.norm,
            entry.rate,
            minutes(left),
        );
        match &self.bar {
            Some(bar) => {
                bar.set_position(entry.step as u64);
                bar.set_message(numbers);
            }
            None => eprintln!("step {}/{}  {numbers}", entry.step, self.steps),
        }
        Ok(())
    }

    /// A line of its own.
    pub fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    /// Run something that is not training: it does not count as time of steps.
    pub fn pause<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = work();
        let time = start.elapsed();
        self.idle.0 += time;
        self.idle.1 += time;
        result
    }

    /// Time of steps since the start.
    pub fn trained(&self) -> Duration {
        self.begin.elapsed().saturating_sub(self.idle.0)
    }

    /// Wall time since the start.
    pub fn elapsed(&self) -> Duration {
        self.begin.elapsed()
    }

    /// Take the bar away and put the log on disk.
    ///
    /// # Errors
    ///
    /// When the log cannot be written.
    pub fn finish(&self) -> Result<()> {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.log.sync_all().context("cannot write the log")
    }
}

/// A duration for people: `7 s`, `2 min 31 s`, `3 h 5 min`.
pub fn minutes(time: Duration) -> String {
    let seconds = time.as_secs_f64().round() as u64;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(step: usize) -> Entry {
        Entry {
            step,
            loss: 1.5,
            norm: 0.5,
            rate: 1e-3,
            valid_bits: step.is_multiple_of(2).then_some(2.25),
        }
    }

    #[test]
    fn durations_read_well() {
        let text = |s| minutes(Duration::from_secs(s));
        assert_eq!(text(59), "59 s");
        assert_eq!(text(151), "2 min 31 s");
        assert_eq!(text(11_130), "3 h 5 min");
    }

    #[test]
    fn a_resumed_log_drops_what_was_lost() {
        let dir = tempfile::tempdir().unwrap();
        let read = || -> Vec<Entry> {
            let text = fs::read_to_string(dir.path().join(LOG_FILE)).unwrap();
            text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
        };
        let mut progress = Progress::new(dir.path(), 0, 9, 10).unwrap();
        for step in 1..=5 {
            progress.show(&entry(step)).unwrap();
        }
        assert_eq!(read(), [1, 2, 3, 4, 5].map(entry));
        // cut within a line, and within a character
        let mut log = File::options().append(true).open(dir.path().join(LOG_FILE)).unwrap();
        log.write_all(b"{\"step\": \xc3").unwrap();
        let mut progress = Progress::new(dir.path(), 3, 9, 10).unwrap();
        progress.show(&entry(4)).unwrap();
        assert_eq!(read(), [1, 2, 3, 4].map(entry));
    }
}
