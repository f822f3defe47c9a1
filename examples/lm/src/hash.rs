//! Two hashes that stay the same on every machine and in every release: FNV-1a for bytes, and a
//! counter-based generator for data order.
//!
//! `cargo test --release -p gla-lm --lib -- hash`

/// FNV-1a over `bytes`, 64 bit.
pub fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(FNV_OFFSET, |h, b| fnv1a_step(h, *b))
}

/// FNV-1a of a name followed by bytes, with a zero byte between them so that both ends count.
pub fn fnv1a_named(name: &str, bytes: &[u8]) -> u64 {
    let name = fnv1a_step(fnv1a(name.as_bytes()), 0);
    bytes.iter().fold(name, |h, b| fnv1a_step(h, *b))
}

const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;

fn fnv1a_step(hash: u64, byte: u8) -> u64 {
    (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
}

/// A well mixed 64-bit value for (seed, step, index): the finaliser of splitmix64, once per word.
///
/// Random access is the point: the batch of step 1000 needs nothing from the 999 before it, so a
/// resumed run sees the same data as one that was never stopped.
pub fn mix(seed: u64, step: u64, index: u64) -> u64 {
    [step, index].into_iter().fold(splitmix(seed), |h, word| splitmix(h ^ splitmix(word)))
}

fn splitmix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fnv1a_has_its_published_values() {
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
    }

    #[test]
    fn every_argument_of_mix_counts() {
        let base = mix(1, 2, 3);
        assert_eq!(base, mix(1, 2, 3));
        for other in [mix(2, 2, 3), mix(1, 3, 3), mix(1, 2, 4), mix(1, 3, 2)] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn mix_spreads_over_a_small_range() {
        let mut counts = [0_u32; 10];
        for step in 0..100 {
            for index in 0..100 {
                counts[(mix(7, step, index) % 10) as usize] += 1;
            }
        }
        assert!(counts.iter().all(|n| (900..1100).contains(n)), "{counts:?} of 1000 each");
    }
}
