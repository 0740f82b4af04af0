//! Keys quantised to a byte a number, and their inner products with a quantised query.
//!
//! A key is centred, which changes no order of inner products, and rounded to integers from -127 to
//! 127 times a scale of its own; 128 is added so that the bytes are unsigned, as VNNI wants one
//! operand. A query is rounded to integers of up to 15 bits, held as two bytes a number. All
//! arithmetic is in integers, so every instruction set finds the same scores to the bit.

use crate::blocks::{Blocks, View};
use crate::error::IndexError;
use crate::isa::Isa;
use crate::metric::dot;

/// Numbers of a row are filled up to a multiple of this.
pub(crate) const LANES: usize = 64;
/// What a byte is above the integer it stands for.
const BIAS: i32 = 128;
/// The largest integer of a query: 127 * 128 + 63.
const QUERY_MAX: i32 = 16_319;

/// Bytes of a quantised row of `dim` numbers.
pub(crate) fn code_stride(dim: usize) -> usize {
    dim.next_multiple_of(LANES)
}

/// Quantised keys.
pub(crate) struct Codes {
    center: Vec<f32>,
    codes: Blocks<u8>,
    scales: Blocks<f32>,
}

/// A quantised query.
#[derive(Default)]
pub(crate) struct Probe {
    /// The query's integers are `128 * high + low`.
    high: Vec<i8>,
    low: Vec<i8>,
    /// What the bias of the keys adds to every sum.
    bias: i32,
    /// What the integers are multiplied with.
    scale: f32,
}

/// What numbers are divided by a scale with; 0 for no scale. A scale may be too small for its inverse to be an f32.
fn inverse(scale: f32) -> f64 {
    if scale > 0.0 { f64::from(scale).recip() } else { 0.0 }
}

impl Codes {
    /// No keys yet.
    pub(crate) fn new(center: Vec<f32>, expected: usize) -> Self {
        let stride = code_stride(center.len());
        Self { center, codes: Blocks::new(stride, expected), scales: Blocks::new(1, expected) }
    }

    /// Codes and scales that were read from a file.
    pub(crate) fn from_parts(center: Vec<f32>, codes: Blocks<u8>, scales: Blocks<f32>) -> Self {
        Self { center, codes, scales }
    }

    pub(crate) fn center(&self) -> &[f32] {
        &self.center
    }

    pub(crate) fn parts(&self) -> (&Blocks<u8>, &Blocks<f32>) {
        (&self.codes, &self.scales)
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.codes.memory_bytes() + self.scales.memory_bytes() + 4 * self.center.len()
    }

    /// Bytes read to score a key.
    pub(crate) fn row_bytes(&self) -> usize {
        self.codes.stride() + size_of::<f32>()
    }

    /// Adds rows of `dim` numbers.
    pub(crate) fn append(&self, rows: &[f32]) -> Result<(), IndexError> {
        let dim = self.center.len();
        let count = rows.len() / dim;
        let mut scales = Vec::with_capacity(count);
        self.codes.append(count, |i, out| {
            let row = &rows[i * dim..(i + 1) * dim];
            let largest = row.iter().zip(&self.center).fold(0.0f32, |m, (x, c)| m.max((x - c).abs()));
            let scale = largest / 127.0;
            let inverse = inverse(scale);
            out.fill(BIAS as u8);
            for ((to, x), c) in out.iter_mut().zip(row).zip(&self.center) {
                *to = ((f64::from(x - c) * inverse).round_ties_even().clamp(-127.0, 127.0) as i32 + BIAS) as u8;
            }
            scales.push(scale);
        })?;
        self.scales.append(count, |i, out| out[0] = scales[i])?;
        Ok(())
    }

    /// Quantises a query.
    pub(crate) fn probe(&self, query: &[f32]) -> Probe {
        let stride = self.codes.stride();
        // No sum of `stride` products of a byte and such an integer leaves 31 bits.
        let most = QUERY_MAX.min((i64::from(i32::MAX) / (255 * stride as i64)) as i32);
        let largest = query.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let scale = largest / most as f32;
        let inverse = inverse(scale);
        let (mut high, mut low, mut sum) = (vec![0; stride], vec![0; stride], 0);
        for (i, x) in query.iter().enumerate() {
            let number = ((f64::from(*x) * inverse).round_ties_even() as i32).clamp(-most, most);
            let upper = (number + 64) >> 7;
            high[i] = upper as i8;
            low[i] = (number - (upper << 7)) as i8;
            sum += number;
        }
        Probe { high, low, bias: BIAS * sum, scale }
    }

    /// The keys that are there now.
    pub(crate) fn view(&self) -> CodesView<'_> {
        CodesView { scales: self.scales.view(), codes: self.codes.view(), isa: Isa::best() }
    }

    /// The exact share of every score that the codes leave out.
    pub(crate) fn center_score(&self, query: &[f32]) -> f32 {
        dot(query, &self.center[..])
    }
}

/// The keys that were there when the view was taken.
pub(crate) struct CodesView<'a> {
    codes: View<'a, u8>,
    scales: View<'a, f32>,
    isa: Isa,
}

impl CodesView<'_> {
    /// How many keys it shows.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        // Codes are added first, so there are no fewer of them.
        self.scales.len()
    }

    /// Brings a key closer.
    #[inline]
    pub(crate) fn prefetch(&self, id: u32) {
        self.codes.prefetch(id as usize);
        self.scales.prefetch(id as usize);
    }

    /// The scores of keys, without what the centre adds: into `scores`, which is emptied first.
    #[inline]
    pub(crate) fn score(&self, probe: &Probe, ids: &[u32], scores: &mut Vec<f32>) {
        scores.clear();
        match self.isa {
            // SAFETY: `Isa` has only values whose features this machine has.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { x86::score_avx512(self, probe, ids, scores) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { x86::score_avx2(self, probe, ids, scores) },
            Isa::Scalar => {
                for &id in ids {
                    scores.push(self.finish(probe, id, sum_scalar(probe, self.codes.row(id as usize))));
                }
            }
        }
    }

    #[inline(always)]
    fn finish(&self, probe: &Probe, id: u32, sum: i32) -> f32 {
        (sum - probe.bias) as f32 * self.scales.row(id as usize)[0] * probe.scale
    }
}

fn sum_scalar(probe: &Probe, code: &[u8]) -> i32 {
    let query = probe.high.iter().zip(&probe.low).map(|(&h, &l)| 128 * i32::from(h) + i32::from(l));
    query.zip(code).map(|(q, &c)| q * i32::from(c)).sum()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{CodesView, LANES, Probe};
    use std::arch::x86_64::*;

    /// The sums of four keys' products with the query.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn sums_4(probe: &Probe, rows: [&[u8]; 4]) -> [i32; 4] {
        let mut high = [_mm512_setzero_si512(); 4];
        let mut low = [_mm512_setzero_si512(); 4];
        let n = probe.high.len().min(probe.low.len());
        assert!(rows.iter().all(|row| row.len() >= n), "whole rows");
        for at in (0..n / LANES * LANES).step_by(LANES) {
            // SAFETY: 64 bytes from `at` on lie within all of them.
            unsafe {
                let h = _mm512_loadu_si512(probe.high.as_ptr().add(at).cast());
                let l = _mm512_loadu_si512(probe.low.as_ptr().add(at).cast());
                for i in 0..4 {
                    let code = _mm512_loadu_si512(rows[i].as_ptr().add(at).cast());
                    high[i] = _mm512_dpbusd_epi32(high[i], code, h);
                    low[i] = _mm512_dpbusd_epi32(low[i], code, l);
                }
            }
        }
        let [a, b, c, d]: [__m512i; 4] =
            std::array::from_fn(|i| _mm512_add_epi32(_mm512_slli_epi32::<7>(high[i]), low[i]));
        // Transposed sums: each quarter ends with one partial sum of each key.
        let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        let all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
        let half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64::<1>(all));
        let sums = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half));
        let mut out = [0; 4];
        // SAFETY: sixteen bytes.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), sums) };
        out
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    pub(super) fn score_avx512(view: &CodesView<'_>, probe: &Probe, ids: &[u32], scores: &mut Vec<f32>) {
        scores.reserve(ids.len());
        for four in ids.chunks(4) {
            let row = |i: usize| view.codes.row(four[i.min(four.len() - 1)] as usize);
            let sums = sums_4(probe, [row(0), row(1), row(2), row(3)]);
            for (&id, sum) in four.iter().zip(sums) {
                scores.push(view.finish(probe, id, sum));
            }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn score_avx2(view: &CodesView<'_>, probe: &Probe, ids: &[u32], scores: &mut Vec<f32>) {
        scores.reserve(ids.len());
        for &id in ids {
            scores.push(view.finish(probe, id, sum_avx2(probe, view.codes.row(id as usize))));
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn sum_avx2(probe: &Probe, code: &[u8]) -> i32 {
        let n = probe.high.len().min(probe.low.len()).min(code.len());
        let (mut high, mut low) = (_mm256_setzero_si256(), _mm256_setzero_si256());
        for at in (0..n / 16 * 16).step_by(16) {
            // SAFETY: 16 bytes from `at` on lie within all three.
            let (h, l, c) = unsafe {
                (
                    _mm256_cvtepi8_epi16(_mm_loadu_si128(probe.high.as_ptr().add(at).cast())),
                    _mm256_cvtepi8_epi16(_mm_loadu_si128(probe.low.as_ptr().add(at).cast())),
                    _mm256_cvtepu8_epi16(_mm_loadu_si128(code.as_ptr().add(at).cast())),
                )
            };
            high = _mm256_add_epi32(high, _mm256_madd_epi16(h, c));
            low = _mm256_add_epi32(low, _mm256_madd_epi16(l, c));
        }
        let sum = _mm256_add_epi32(_mm256_slli_epi32::<7>(high), low);
        let four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
        let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b1110>(four));
        _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<1>(two)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn every_instruction_set_finds_the_same_score_near_the_true_one(
            dim in 1usize..200, keys in 1usize..9,
            numbers in prop::collection::vec(-4.0f32..4.0, 2000),
        ) {
            let rows = &numbers[..keys.min(1800 / dim) * dim];
            let query = &numbers[1800..1800 + dim];
            let codes = Codes::new(vec![0.5; dim], 2);
            codes.append(rows).unwrap();
            let (probe, ids) = (codes.probe(query), (0..(rows.len() / dim) as u32).collect::<Vec<_>>());
            let mut first: Option<Vec<f32>> = None;
            for isa in Isa::available() {
                let mut scores = Vec::new();
                CodesView { isa, ..codes.view() }.score(&probe, &ids, &mut scores);
                for (row, &got) in rows.chunks(dim).zip(&scores) {
                    let exact: f32 = row.iter().zip(query).map(|(x, q)| x * q).sum();
                    let norm: f32 = query.iter().map(|q| q.abs()).sum();
                    let error = (got + codes.center_score(query) - exact).abs();
                    prop_assert!(error <= 4.5 / 127.0 * 0.55 * norm + 0.05, "{got} {exact}");
                }
                prop_assert_eq!(&scores, first.get_or_insert(scores.clone()));
            }
        }
    }

    #[test]
    fn long_rows_do_not_overflow() {
        for dim in [128, 4096, 65_536] {
            let codes = Codes::new(vec![0.0; dim], 0);
            codes.append(&vec![-3.0; dim]).unwrap();
            let probe = codes.probe(&vec![-2.0; dim]);
            for isa in Isa::available() {
                let mut scores = Vec::new();
                CodesView { isa, ..codes.view() }.score(&probe, &[0], &mut scores);
                assert!((scores[0] / (6.0 * dim as f32) - 1.0).abs() < 0.01, "{isa:?}");
            }
        }
    }
}
