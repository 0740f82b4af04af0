//! How fast this machine reads memory: the rate that the floor of decoding and the share of scans are computed with.
//!
//! A yardstick must not be slower than what it measures. So buffers lie in huge pages, are read as several streams with
//! prefetching, and of all samples of all ways to read the best one counts: what else runs on a machine makes every
//! sample slower and none faster.

use std::hint::black_box;
use std::path::Path;
use std::sync::Barrier;
use std::thread;
use std::time::Instant;

#[cfg(target_os = "linux")]
use memmap2::Advice;
use memmap2::MmapMut;
use serde::Serialize;
use serde_json::json;

use crate::error::{EvalError, Result};
use crate::progress::{Meter, Progress};
use crate::record::{Output, Record, RunInfo};
use crate::report::records_table;

/// Larger than the last-level cache of the machines in use, which is up to a quarter of it.
const LARGE: u64 = 1 << 30;
/// Bytes that one sample reads at least, so that starting threads does not count much; few, so that some samples fall
/// between the interruptions that a longer one would average over.
const SAMPLE: u64 = 64 << 20;
/// Ways to read: as how many streams at even distances, and how many bytes ahead in each is fetched. Which one is fastest
/// depends on the machine's own prefetching, and on whether a cache holds the buffer.
const WAYS: [(usize, usize); 5] = [(1, 512), (1, 1024), (4, 1024), (8, 1024), (8, 4096)];
/// Samples of a way in a round.
const TRIES: usize = 4;
/// Words that are read together: two cache lines.
const BLOCK: usize = 16;

/// What [`bench_membw`] measures.
#[derive(Debug, Clone)]
pub struct MembwOptions {
    /// Reading threads; 0: all cores.
    pub threads: usize,
    /// The buffer that no cache holds; 0: 1 GiB.
    pub large_bytes: u64,
    /// Further buffers, read again and again: caches may hold them.
    pub floor_bytes: Vec<u64>,
    /// Rounds of all ways to read; the best sample counts.
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
            super::round(best(&samples)),
            samples.len(),
        ));
        meter.advance(1, 1.0, format!("{case}: {:.1} GB/s", best(&samples)));
    }
    info.write(&records)?;
    Ok(MembwReport { records })
}

/// The read rate in GB/s for a floor of `bytes`: the higher of those over a large buffer and over one of just
/// these bytes. The higher rate makes the stricter floor.
pub(super) struct FloorRate {
    pub(super) large: f64,
    pub(super) resident: f64,
}

impl FloorRate {
    pub(super) fn measure(threads: usize, bytes: u64, repeats: usize) -> Result<FloorRate> {
        let large = best(&read_rates(threads, LARGE, repeats)?);
        Ok(FloorRate { large, resident: best(&read_rates(threads, bytes, repeats)?) })
    }

    pub(super) fn strict(&self) -> f64 {
        self.large.max(self.resident)
    }
}

fn thread_count(wanted: usize) -> usize {
    if wanted == 0 { thread::available_parallelism().map_or(1, usize::from) } else { wanted }
}

fn best(samples: &[f64]) -> f64 {
    samples.iter().copied().fold(0.0, f64::max)
}

/// GB/s of all samples of `repeats` rounds: `threads` threads read a share of `bytes` each, as often as a sample
/// needs.
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
    // In turns, so that a disturbance does not hit one way alone.
    let ways: Vec<(usize, usize)> = WAYS.into_iter().cycle().take(repeats * TRIES * WAYS.len()).collect();
    let buffers = (0..threads).map(|number| buffer(share, number as u64)).collect::<Result<Vec<_>>>()?;
    let barrier = Barrier::new(threads);
    let spans: Vec<Vec<(Instant, Instant)>> = thread::scope(|scope| {
        let read = |buffer: &MmapMut| {
            let words: &[u64] = bytemuck::cast_slice(&buffer[..share * size_of::<u64>()]);
            let sample = |&way: &(usize, usize)| {
                barrier.wait();
                // The reader's own clock: another thread may be woken when all has been read.
                let start = Instant::now();
                for _ in 0..passes {
                    black_box(sum(black_box(words), way));
                }
                (start, Instant::now())
            };
            ways.iter().map(sample).collect::<Vec<_>>()
        };
        let readers: Vec<_> = buffers.iter().map(|buffer| scope.spawn(move || read(buffer))).collect();
        readers
            .into_iter()
            .map(|reader| reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    let bytes = (share * size_of::<u64>() * threads) as f64 * passes as f64;
    let rate = |sample: usize| {
        let of_all = spans.iter().filter_map(|spans| spans.get(sample));
        let (start, end) = (of_all.clone().map(|span| span.0).min()?, of_all.map(|span| span.1).max()?);
        Some(bytes / (end - start).as_secs_f64() / 1e9)
    };
    Ok((0..ways.len()).filter_map(rate).collect())
}

/// Words in huge pages where the system has some, written once.
fn buffer(words: usize, seed: u64) -> Result<MmapMut> {
    let failed = EvalError::io("map memory for", Path::new("the buffer that is read"));
    let mut memory = MmapMut::map_anon(words * size_of::<u64>()).map_err(failed)?;
    // Refused where there are no huge pages: then the machine reads without them.
    #[cfg(target_os = "linux")]
    let _ = memory.advise(Advice::HugePage);
    // Not zeros: pages of zeros may share one page of memory.
    for (i, word) in (0u64..).zip(bytemuck::cast_slice_mut::<u8, u64>(&mut memory)) {
        *word = i.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed;
    }
    Ok(memory)
}

/// Reads all of `words`.
fn sum(words: &[u64], way: (usize, usize)) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the instructions that the function is compiled for are there.
            return unsafe { sum_avx512(words, way) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the instructions that the function is compiled for are there.
            return unsafe { sum_avx2(words, way) };
        }
    }
    sum_streams(words, way)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn sum_avx512(words: &[u64], way: (usize, usize)) -> u64 {
    sum_streams(words, way)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_avx2(words: &[u64], way: (usize, usize)) -> u64 {
    sum_streams(words, way)
}

#[inline(always)]
fn sum_streams(words: &[u64], (streams, ahead): (usize, usize)) -> u64 {
    match streams {
        4 => sum_lanes::<4>(words, ahead),
        8 => sum_lanes::<8>(words, ahead),
        _ => sum_lanes::<1>(words, ahead),
    }
}

/// In `16 * STREAMS` lanes: independent additions, so that only reading takes time.
#[inline(always)]
fn sum_lanes<const STREAMS: usize>(words: &[u64], ahead: usize) -> u64 {
    let mut lanes = [[0_u64; BLOCK]; STREAMS];
    let (blocks, rest) = words.as_chunks::<BLOCK>();
    let each = blocks.len() / STREAMS;
    let streams: [&[[u64; BLOCK]]; STREAMS] = std::array::from_fn(|i| &blocks[i * each..(i + 1) * each]);
    for at in 0..each {
        for (lanes, stream) in lanes.iter_mut().zip(streams) {
            let block = &stream[at];
            fetch(block, ahead);
            for (lane, word) in lanes.iter_mut().zip(block) {
                *lane = lane.wrapping_add(*word);
            }
        }
    }
    let left = blocks[STREAMS * each..].iter().flatten().chain(rest);
    lanes.iter().flatten().chain(left).fold(0, |sum, word| sum.wrapping_add(*word))
}

/// Starts to bring what lies `ahead` bytes behind a block's start.
#[inline(always)]
fn fetch(block: &[u64; BLOCK], ahead: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let place = block.as_ptr().cast::<i8>().wrapping_add(ahead);
        for line in [0, 64] {
            // SAFETY: prefetching has no effect but on caches, wherever it points.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(place.wrapping_add(line)) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (block, ahead);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_word_is_read_whatever_the_instructions() {
        for length in [0, 1, 63, 64, 129, 1000] {
            let words: Vec<u64> = (0..length).map(|i| (u64::MAX / 3).wrapping_mul(i)).collect();
            let expected = words.iter().fold(0_u64, |sum, word| sum.wrapping_add(*word));
            for way in WAYS {
                assert_eq!((sum(&words, way), sum_streams(&words, way)), (expected, expected), "{way:?}");
            }
        }
    }

    #[test]
    fn rates_are_positive_and_empty_buffers_refused() {
        let rates = read_rates(2, 1 << 20, 3).unwrap();
        assert!(
            rates.len() == 3 * TRIES * WAYS.len() && rates.iter().all(|rate| *rate > 0.01 && rate.is_finite()),
            "{rates:?}"
        );
        // No machine reads a buffer that no cache holds this fast.
        assert!(read_rates(1, 64 << 20, 1).unwrap().iter().all(|rate| *rate < 1000.0));
        assert!(read_rates(2, 8, 1).is_err() && read_rates(1, 1024, 0).is_err());
    }
}
