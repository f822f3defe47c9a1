//! Timing of launches: synced, warmed, of outputs that were checked; and the rows that are kept.

mod lines;
mod plot;
mod rows;

pub use lines::lines;
pub use plot::{roofline, svg};
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
