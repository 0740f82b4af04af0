//! Scores of a tile of keys for a few queries.
//!
//! For bf16 rows and AVX-512: a load brings 32 numbers as 16 pairs; shifting left by 16 bits widens those at even
//! places, masking those at odd ones, and the query is laid out to fit. That is 4 instructions for 64 bytes and one
//! query, a third less than widening half as many at a time, and exact in f32, which `vdpbf16ps` is not (it would also
//! want the query in bf16; its rate on the Xeon at hand is a quarter of FMA's). Every query has one running sum a
//! row, so the scores of a group are those of its queries alone, to the bit.

use std::marker::PhantomData;

use super::TILE;
use crate::element::Element;
use crate::isa::Isa;
use crate::metric::dot_rows;
#[cfg(target_arch = "x86_64")]
use crate::params::KeyPrecision;

/// Numbers of a row that are loaded together.
const LOAD: usize = 32;

/// Queries, laid out for the kernel.
pub(super) struct Prepared<'a, T> {
    dim: usize,
    queries: &'a [f32],
    /// For each query and 32 numbers: those at even places, then those at odd places. Empty where the kernel does not
    /// serve.
    pairs: Vec<f32>,
    rows: PhantomData<T>,
}

impl<'a, T: Element> Prepared<'a, T> {
    pub(super) fn new(isa: Isa, dim: usize, queries: &'a [f32]) -> Self {
        #[cfg(target_arch = "x86_64")]
        let fits = isa == Isa::Avx512 && T::PRECISION == KeyPrecision::Bf16 && dim.is_multiple_of(LOAD);
        #[cfg(not(target_arch = "x86_64"))]
        let fits = isa != Isa::Scalar;
        let turn = |load: &'a [f32]| load.iter().step_by(2).chain(load[1..].iter().step_by(2));
        let pairs = if fits { queries.chunks_exact(LOAD).flat_map(turn).copied().collect() } else { Vec::new() };
        Self { dim, queries, pairs, rows: PhantomData }
    }

    /// Scores `count` stored rows for each query.
    #[inline]
    pub(super) fn score(&self, rows: &[T], count: usize, scores: &mut [[f32; TILE]]) {
        #[cfg(target_arch = "x86_64")]
        if !self.pairs.is_empty() {
            let pairs = self.pairs.chunks(4 * self.dim);
            for (pairs, scores) in pairs.zip(scores.chunks_mut(4)) {
                // SAFETY: there are pairs only where AVX-512 is.
                unsafe {
                    match scores.len() {
                        1 => x86::score::<T, 1>(self.dim, pairs, rows, count, scores),
                        2 => x86::score::<T, 2>(self.dim, pairs, rows, count, scores),
                        3 => x86::score::<T, 3>(self.dim, pairs, rows, count, scores),
                        _ => x86::score::<T, 4>(self.dim, pairs, rows, count, scores),
                    }
                }
            }
            return;
        }
        for (query, scores) in self.queries.chunks_exact(self.dim).zip(scores) {
            dot_rows(query, rows, &mut scores[..count]);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{LOAD, TILE};
    use std::arch::x86_64::*;

    /// How far ahead rows are fetched, in bytes.
    const AHEAD: usize = 2048;

    /// # Safety
    /// The rows are bf16.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    pub(super) unsafe fn score<T, const QUERIES: usize>(
        dim: usize,
        pairs: &[f32],
        rows: &[T],
        count: usize,
        scores: &mut [[f32; TILE]],
    ) {
        assert!(size_of::<T>() == 2 && dim.is_multiple_of(LOAD) && count <= TILE);
        assert!(rows.len() >= count * dim && pairs.len() >= QUERIES * dim && scores.len() >= QUERIES);
        let mask = _mm512_set1_epi32(0xffff_0000_u32 as i32);
        let base: *const u16 = rows.as_ptr().cast();
        for first in (0..count).step_by(4) {
            let mut sums = [[_mm512_setzero_ps(); 4]; QUERIES];
            // Past the end, the last row is read again.
            let row: [*const u16; 4] = std::array::from_fn(|i| base.wrapping_add((first + i).min(count - 1) * dim));
            for at in (0..dim).step_by(LOAD) {
                for i in 0..4 {
                    // SAFETY: `at + 32 <= dim`, and row and pairs have `dim` numbers; prefetching past the end
                    // does nothing.
                    unsafe {
                        let start = row[i].add(at);
                        _mm_prefetch::<_MM_HINT_T0>(start.cast::<i8>().wrapping_add(AHEAD));
                        let both = _mm512_loadu_si512(start.cast());
                        let even = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(both));
                        let odd = _mm512_castsi512_ps(_mm512_and_si512(both, mask));
                        for (q, sums) in sums.iter_mut().enumerate() {
                            let pair = pairs.as_ptr().add(q * dim + at);
                            sums[i] = _mm512_fmadd_ps(even, _mm512_loadu_ps(pair), sums[i]);
                            sums[i] = _mm512_fmadd_ps(odd, _mm512_loadu_ps(pair.add(16)), sums[i]);
                        }
                    }
                }
            }
            for (sums, scores) in sums.iter().zip(scores.iter_mut()) {
                let four = add_across(sums);
                let used = (count - first).min(4);
                scores[first..first + used].copy_from_slice(&four[..used]);
            }
        }
    }

    /// The sum of the numbers in each of four registers.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn add_across(&[a, b, c, d]: &[__m512; 4]) -> [f32; 4] {
        let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
        let high = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
        let all = _mm512_add_ps(low, high);
        let half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps::<1>(all));
        let sums = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half));
        let mut out = [0.0; 4];
        // SAFETY: four numbers.
        unsafe { _mm_storeu_ps(out.as_mut_ptr(), sums) };
        out
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use half::bf16;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn scores_agree_with_f64_and_do_not_depend_on_the_group(
            dim in prop::sample::select(vec![1usize, 31, 32, 64, 96, 128]), count in 1usize..=TILE, queries in 1usize..10,
            numbers in prop::collection::vec(-8.0f32..8.0, 128 * (TILE + 10)),
        ) {
            let rows: Vec<bf16> = numbers[..count * dim].iter().map(|&x| bf16::from_f32(x)).collect();
            let queries_at = &numbers[TILE * 128..][..queries * dim];
            for isa in Isa::available() {
                let mut scores = vec![[f32::NAN; TILE]; queries];
                Prepared::<bf16>::new(isa, dim, queries_at).score(&rows, count, &mut scores);
                for (query, scores) in queries_at.chunks(dim).zip(&scores) {
                    let mut alone = vec![[f32::NAN; TILE]; 1];
                    Prepared::<bf16>::new(isa, dim, query).score(&rows, count, &mut alone);
                    prop_assert_eq!(&alone[0][..count], &scores[..count]);
                    for (row, &got) in rows.chunks(dim).zip(scores) {
                        let exact: f64 = row.iter().zip(query).map(|(x, y)| x.to_f64() * f64::from(*y)).sum();
                        prop_assert!((f64::from(got) - exact).abs() < 1e-2);
                    }
                }
            }
        }
    }
}
