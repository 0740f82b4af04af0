//! How fast this machine reads memory: the rate that the floor of decoding is computed with.

use std::hint::black_box;
use std::sync::Barrier;
use std::thread;
use std::time::Instant;

use serde::Serialize;
use serde_json::json;

use crate::error::{EvalError, Result};
use crate::progress::{Meter, Progress};
use crate::record::{Output, Record, RunInfo};
use crate::report::records_table;
use crate::stats::median;

/// Larger than the last-level cache of the machines in use, which is up to a quarter of it.
const LARGE: u64 = 1 << 30;
/// Bytes that one sample reads at least, so that starting threads does not count.
const SAMPLE: u64 = 1 << 30;

/// What [`bench_membw`] measures.
#[derive(Debug, Clone)]
pub struct MembwOptions {
    /// Reading threads; 0: all cores.
    pub threads: usize,
    /// The buffer that no cache holds; 0: 1 GiB.
    pub large_bytes: u64,
    /// Further buffers, read again and again: caches may hold them.
    pub floor_bytes: Vec<u64>,
    /// Samples of each.
    pub repeats: usize,
    /// Where records go.
    pub output: Output,
}

impl Default for MembwOptions {
    fn default() -> Self {
        MembwOptions { threads: 0, large_bytes: 0, floor_bytes: Vec::new(), repeats: 5, output: Output::default() }
    }
}

/// The result of [`bench_membw`].
#[derive(Debug, Clone, Serialize)]
pub struct MembwReport {
    /// All figures as records.
    pub records: Vec<Record>,
}

impl MembwReport {
    /// As Markdown.
    #[must_use]
    pub fn table(&self) -> String {
        records_table(&self.records)
    }
}

/// Measures how fast buffers are read.
///
/// # Errors
/// [`EvalError::BadOption`] for empty buffers or no samples; [`EvalError::Io`] when records cannot be written.
pub fn bench_membw(options: &MembwOptions, progress: &mut dyn FnMut(&Progress)) -> Result<MembwReport> {
    let threads = thread_count(options.threads);
    let large = if options.large_bytes == 0 { LARGE } else { options.large_bytes };
    let sizes: Vec<u64> = std::iter::once(large).chain(options.floor_bytes.iter().copied()).collect();
    let info = RunInfo::start(&options.output).with_config(json!({"threads": threads, "repeats": options.repeats}));
    let mut meter = Meter::new(sizes.len(), sizes.len() as f64, progress);
    let mut records = Vec::new();
    for bytes in sizes {
        let samples = read_rates(threads, bytes, options.repeats)?;
        let case = format!("read/{}m/{threads}t", bytes.div_ceil(1 << 20));
        records.push(info.record(
            "membw",
            &case,
            "read_bandwidth",
            "GB/s",
            super::round(median(&samples)),
            samples.len(),
        ));
        meter.advance(1, 1.0, format!("{case}: {:.1} GB/s", median(&samples)));
    }
    info.write(&records)?;
    Ok(MembwReport { records })
}

/// The read rate in GB/s for a floor of `bytes`: the higher of the medians over a large buffer and over one of just
/// these bytes. The higher rate makes the stricter floor.
pub(super) struct FloorRate {
    pub(super) large: f64,
    pub(super) resident: f64,
}

impl FloorRate {
    pub(super) fn measure(threads: usize, bytes: u64, repeats: usize) -> Result<FloorRate> {
        let large = median(&read_rates(threads, LARGE, repeats)?);
        Ok(FloorRate { large, resident: median(&read_rates(threads, bytes, repeats)?) })
    }

    pub(super) fn strict(&self) -> f64 {
        self.large.max(self.resident)
    }
}

fn thread_count(wanted: usize) -> usize {
    if wanted == 0 { thread::available_parallelism().map_or(1, usize::from) } else { wanted }
}

/// GB/s of `repeats` samples: `threads` threads read a share of `bytes` each, as often as a sample needs.
fn read_rates(threads: usize, bytes: u64, repeats: usize) -> Result<Vec<f64>> {
    let share = bytes as usize / threads / size_of::<u64>();
    if share == 0 || repeats == 0 {
        let expected = "at least 8 bytes for each thread, read at least once".into();
        return Err(EvalError::BadOption {
            what: "the buffer",
            found: format!("{bytes} bytes, {repeats} times"),
            expected,
        });
    }
    let passes = (SAMPLE / bytes).max(1);
    let barrier = Barrier::new(threads + 1);
    let samples = thread::scope(|scope| {
        for number in 0..threads {
            let barrier = &barrier;
            scope.spawn(move || {
                // Not zeros: pages of zeros may share one page of memory.
                let words: Vec<u64> =
                    (0..share as u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number as u64).collect();
                black_box(sum(&words));
                for _ in 0..repeats {
                    barrier.wait();
                    for _ in 0..passes {
                        black_box(sum(black_box(&words)));
                    }
                    barrier.wait();
                }
            });
        }
        let mut samples = Vec::with_capacity(repeats);
        for _ in 0..repeats {
            barrier.wait();
            let start = Instant::now();
            barrier.wait();
            let read = (share * size_of::<u64>() * threads) as f64 * passes as f64;
            samples.push(read / start.elapsed().as_secs_f64() / 1e9);
        }
        samples
    });
    Ok(samples)
}

/// Reads all of `words`.
fn sum(words: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the instructions that the function is compiled for are there.
            return unsafe { sum_avx512(words) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the instructions that the function is compiled for are there.
            return unsafe { sum_avx2(words) };
        }
    }
    sum_lanes(words)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn sum_avx512(words: &[u64]) -> u64 {
    sum_lanes(words)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_avx2(words: &[u64]) -> u64 {
    sum_lanes(words)
}

/// In 64 lanes: enough independent additions that only reading takes time, in any width of registers.
#[inline(always)]
fn sum_lanes(words: &[u64]) -> u64 {
    let mut lanes = [0_u64; 64];
    let (blocks, rest) = words.as_chunks::<64>();
    for block in blocks {
        for (lane, word) in lanes.iter_mut().zip(block) {
            *lane = lane.wrapping_add(*word);
        }
    }
    lanes.iter().chain(rest).fold(0, |sum, word| sum.wrapping_add(*word))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_word_is_read_whatever_the_instructions() {
        for length in [0, 1, 63, 64, 1000] {
            let words: Vec<u64> = (0..length).map(|i| u64::MAX / 3 * i).collect();
            let expected = words.iter().fold(0_u64, |sum, word| sum.wrapping_add(*word));
            assert_eq!((sum(&words), sum_lanes(&words)), (expected, expected));
        }
    }

    #[test]
    fn rates_are_positive_and_empty_buffers_refused() {
        let rates = read_rates(2, 1 << 20, 3).unwrap();
        assert!(rates.len() == 3 && rates.iter().all(|rate| *rate > 0.01 && rate.is_finite()), "{rates:?}");
        assert!(read_rates(2, 8, 1).is_err() && read_rates(1, 1024, 0).is_err());
    }
}
