//! Timing of launches: synced, warmed, of outputs that were checked; and the rows that are kept.

mod lines;
mod plot;
mod rows;

pub use lines::lines;
pub use plot::svg;
pub use rows::*;

use std::time::Instant;

use cubecl::client::Client;

/// Waits until the device has done everything it was given.
///
/// # Panics
///
/// If the device is lost.
pub fn sync(client: &Client) {
    cubecl::future::block_on(client.sync()).expect("the device answers");
}

/// Median time of one call in milliseconds. Calls are timed in batches long enough for the clock,
/// each batch ended by a sync.
pub fn median_ms(client: &Client, mut call: impl FnMut()) -> f64 {
    for _ in 0..3 {
        call();
    }
    sync(client);
    let start = Instant::now();
    call();
    sync(client);
    let once = start.elapsed().as_secs_f64().max(1e-6);
    let batch = ((0.02 / once).ceil() as usize).clamp(1, 1000);
    let times = (0..15)
        .map(|_| {
            let start = Instant::now();
            for _ in 0..batch {
                call();
            }
            sync(client);
            start.elapsed().as_secs_f64() * 1e3 / batch as f64
        })
        .collect();
    median(times)
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
