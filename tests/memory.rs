//! What the loss, a prompt and decoding hold in memory, counted where it is allocated, and whether
//! a token costs more the later it comes.
//!
//! `cargo nextest run --release --workspace -E 'binary(memory)' --no-capture` prints the figures.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Distribution, Int, Tensor};
use gla_burn::{Generator, GlaTransformerConfig, SamplerConfig, linear_cross_entropy};

/// Counts bytes that are allocated and not freed.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: System does the work
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(live, Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// One test at a time, where they share a process.
static ALONE: Mutex<()> = Mutex::new(());

/// The most that `work` held at a time beyond what was there, in bytes.
fn peak_of(work: impl FnOnce()) -> usize {
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    work();
    PEAK.load(Relaxed) - before
}

/// Resident memory of the process in bytes, where the system says so.
fn resident() -> Option<usize> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: usize = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * 4096)
}

#[test]
fn the_loss_holds_no_logits() {
    let _alone = ALONE.lock();
    let device = Device::flex().autodiff();
    let (rows, hidden, vocab) = (4096, 32, 8192);
    let random = |shape: [usize; 2]| Tensor::<2>::random(shape, Distribution::Default, &device);
    let (x, weight) =
        (random([rows, hidden]).require_grad(), random([hidden, vocab]).require_grad());
    let labels = Tensor::<1, Int>::arange(0..rows as i64, &device);
    let logits = rows * vocab * size_of::<f32>();

    let plain = peak_of(|| {
        let log_probs = log_softmax(x.clone().matmul(weight.clone()), 1);
        let picked = log_probs.gather(1, labels.clone().unsqueeze_dim(1));
        drop(picked.mean().neg().backward());
    });
    let chunked = peak_of(|| {
        drop(linear_cross_entropy(x.clone(), weight.clone(), labels.clone(), None).backward());
    });
    println!("logits {logits} bytes; peak: plain {plain}, in chunks {chunked}");
    assert!(plain > 2 * logits, "{plain}: the count sees the logits");
    assert!(chunked < logits / 2, "{chunked} bytes of {logits}");

    // twice the rows, the same chunks: more only of what has the size of the operands
    let twice = random([2 * rows, hidden]).require_grad();
    let labels = labels.repeat(&[2]);
    let grown = peak_of(|| {
        drop(linear_cross_entropy(twice.clone(), weight.clone(), labels.clone(), None).backward());
    });
    let allowed = chunked + 12 * rows * hidden * size_of::<f32>();
    assert!(grown < allowed, "{grown} bytes, {allowed} allowed");
}

#[test]
fn a_prompt_of_any_length_takes_the_same_memory() {
    let _alone = ALONE.lock();
    let model = GlaTransformerConfig::new(64, 64, 2).init(&Device::flex());
    let peak = |tokens: usize| {
        let prompt: Vec<usize> = (0..tokens).map(|i| i % 64).collect();
        let mut generator = Generator::new(model.clone());
        peak_of(|| {
            generator.add(&prompt, vec![SamplerConfig::new().init().unwrap()]);
        })
    };
    // makes the parameters
    peak(2048);
    // what threads hold at once is chance: as many pieces in short prompts as in the long one
    let short = (0..16).map(|_| peak(2048)).max().expect("some prompts");
    let long = peak(32768);
    println!("peak: {short} bytes for 2048 tokens, {long} for 32768");
    assert!(long < short + short / 4, "{long} bytes, {short} for a sixteenth");
}

#[test]
fn decoding_takes_constant_memory_and_time() {
    let _alone = ALONE.lock();
    let model = GlaTransformerConfig::new(256, 64, 2).with_use_short_conv(true);
    let mut generator = Generator::new(model.init(&Device::flex()));
    generator.add(&[0], vec![SamplerConfig::new().init().unwrap()]);

    let mut seconds = Vec::with_capacity(10_000);
    let mut thousand = || {
        for _ in 0..1000 {
            let start = Instant::now();
            generator.step().unwrap();
            seconds.push(start.elapsed().as_secs_f64());
        }
        (LIVE.load(Relaxed), resident())
    };
    let first = thousand();
    let peak = peak_of(|| {
        (1..9).for_each(|_| {
            thousand();
        });
    });
    let last = thousand();
    println!("after 1000 tokens {first:?} bytes live and resident, after 10000 {last:?}");
    assert!(last.0.abs_diff(first.0) < 64 << 10, "{} bytes live, then {}", first.0, last.0);
    assert!(peak < 1 << 20, "{peak} bytes on top while decoding");
    if let (Some(first), Some(last)) = (first.1, last.1) {
        assert!(last < first + (8 << 20), "{first} bytes resident, then {last}");
    }

    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let median = |part: &[f64]| {
        let mut sorted = part.to_vec();
        sorted.sort_by(f64::total_cmp);
        sorted[part.len() / 2]
    };
    let (early, late) = (&seconds[..1000], &seconds[9000..]);
    println!(
        "microseconds a token: mean {:.1} of the first thousand, {:.1} of the last; median {:.1}, {:.1}",
        1e6 * mean(early),
        1e6 * mean(late),
        1e6 * median(early),
        1e6 * median(late),
    );
    // the mean would count what other programs do to a few of the tokens
    assert!(median(late) < 2.0 * median(early), "{} s, then {} s", median(early), median(late));
}
