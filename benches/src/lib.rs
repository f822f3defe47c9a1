//! Timing of launches: synced, warmed, of outputs that were checked; and the rows that are kept.

mod layer_row;
mod lines;
mod model_row;
mod peers;
mod plot;
pub mod report;
mod rows;
#[cfg(feature = "model")]
mod with_burn;

pub use layer_row::*;
pub use lines::lines;
pub use model_row::ModelRow;
pub use peers::*;
pub use plot::{roofline, svg};
pub use rows::*;
#[cfg(feature = "model")]
pub use with_burn::*;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use anyhow::{Result, anyhow};
use cubecl::client::Client;

/// Whether it is `cargo bench` that started this process: test runners start benches too, to list their
/// tests, of which there are none.
pub fn is_bench() -> bool {
    std::env::args().any(|arg| arg == "--bench")
}

/// The command line without what `cargo bench` adds.
pub fn arguments() -> impl Iterator<Item = String> {
    std::env::args().filter(|arg| arg != "--bench")
}

/// What a call returns; if it panics, an error with what it said.
///
/// # Errors
///
/// As the call.
pub fn caught<T>(call: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|said| {
        let literal = said.downcast_ref::<&str>().map(ToString::to_string);
        let text = literal.or_else(|| said.downcast_ref::<String>().cloned());
        Err(anyhow!("panic: {}", text.unwrap_or_default()))
    })
}

/// Waits until the device has done everything it was given.
///
/// # Panics
///
/// If the device is lost.
pub fn sync(client: &Client) {
    cubecl::future::block_on(client.sync()).expect("the device answers");
}

/// Median time of one call in milliseconds. Calls are timed in batches, each ended by a sync, long
/// enough for the clock and for the wait: wgpu's takes up to some 10 ms longer than the work.
pub fn median_ms(client: &Client, mut call: impl FnMut()) -> f64 {
    let (least, batches) = if client.name().starts_with("wgpu") { (0.25, 7) } else { (0.02, 15) };
    for _ in 0..3 {
        call();
    }
    sync(client);
    let mut seconds = |batch: usize| {
        let start = Instant::now();
        for _ in 0..batch {
            call();
        }
        sync(client);
        start.elapsed().as_secs_f64()
    };
    let mut batch = 1;
    while batch < 4096 && seconds(batch) < least {
        batch *= 2;
    }
    median((0..batches).map(|_| seconds(batch) * 1e3 / batch as f64).collect())
}

/// The one in the middle.
///
/// # Panics
///
/// If there is none.
pub fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Bytes in MiB.
pub fn mib(bytes: u64) -> f64 {
    (bytes as f64 / f64::from(1 << 20)).round()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_are_errors_that_keep_the_message() {
        let number = 7;
        let said = |result: Result<()>| result.unwrap_err().to_string();
        assert_eq!(said(caught(|| panic!("lost {number}"))), "panic: lost 7");
        assert_eq!(said(caught(|| panic!("lost"))), "panic: lost");
        assert_eq!(said(caught(|| Err(anyhow!("refused")))), "refused");
        assert_eq!(caught(|| Ok(number)).unwrap(), 7);
    }
}
