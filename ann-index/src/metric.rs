//! Inner products and squared distances of rows, with the widest vectors the machine has.
//!
//! One kernel body per instruction set serves all stored types: numbers are widened as they are
//! loaded (a bf16 number is the upper half of an f32). All sums are kept in f32, in several partial
//! sums. The scale of an int8 row is multiplied in at the end, or per number for distances.

use crate::element::Element;
use crate::isa::Isa;

/// The inner product of a query and a stored row.
#[inline]
pub(crate) fn dot<T: Element>(query: &[f32], row: &[T]) -> f32 {
    Isa::best().reduce::<f32, T, false>(query, row)
}

/// The squared Euclidean distance of two stored rows, or of a point and a stored row.
#[inline]
pub(crate) fn squared_distance<A: Element, B: Element>(a: &[A], b: &[B]) -> f32 {
    Isa::best().reduce::<A, B, true>(a, b)
}

/// The inner products of a query and contiguous rows, one into each place of `scores`. Each equals
/// what [`dot`] gives, to the bit.
pub(crate) fn dot_rows<T: Element>(query: &[f32], rows: &[T], scores: &mut [f32]) {
    Isa::best().dot_rows(query, rows, scores);
}

impl Isa {
    #[inline]
    fn reduce<A: Element, B: Element, const DISTANCE: bool>(self, a: &[A], b: &[B]) -> f32 {
        let n = A::numbers(a).len();
        assert_eq!(n, B::numbers(b).len(), "rows of one dimension");
        match self {
            Isa::Scalar => reduce_scalar::<A, B, DISTANCE>(a, b),
            // SAFETY: `available` saw the features on this machine.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { x86::reduce_avx2::<A, B, DISTANCE>(a, b) },
            // SAFETY: `available` saw the feature on this machine.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { x86::reduce_avx512::<A, B, DISTANCE>(a, b) },
        }
    }

    fn dot_rows<T: Element>(self, query: &[f32], rows: &[T], scores: &mut [f32]) {
        assert_eq!(rows.len(), T::stride(query.len()) * scores.len(), "whole rows");
        match self {
            Isa::Scalar => {
                for (row, score) in rows.chunks_exact(T::stride(query.len())).zip(scores) {
                    *score = reduce_scalar::<f32, T, false>(query, row);
                }
            }
            // SAFETY: `available` saw the features on this machine.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { x86::dot_rows_avx2(query, rows, scores) },
            // SAFETY: `available` saw the feature on this machine.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { x86::dot_rows_avx512(query, rows, scores) },
        }
    }
}

/// What one pair of numbers adds.
#[inline(always)]
fn term<const DISTANCE: bool>(a: f32, b: f32) -> f32 {
    if DISTANCE { (a - b) * (a - b) } else { a * b }
}

/// Two rows, taken apart: the numbers, and the scales to multiply them with while they are read and
/// the sum with at the end.
struct Pair<'a, A, B> {
    a: &'a [A],
    b: &'a [B],
    each: (f32, f32),
    sum: f32,
}

impl<'a, A: Element, B: Element> Pair<'a, A, B> {
    #[inline(always)]
    fn new<const DISTANCE: bool>(a: &'a [A], b: &'a [B]) -> Self {
        let scales = (A::scale(a), B::scale(b));
        let (each, sum) = if DISTANCE { (scales, 1.0) } else { ((1.0, 1.0), scales.0 * scales.1) };
        Self { a: A::numbers(a), b: B::numbers(b), each, sum }
    }

    /// What the numbers from `from` on add.
    #[inline(always)]
    fn rest<const DISTANCE: bool>(&self, from: usize) -> f32 {
        let pairs = self.a[from..].iter().zip(&self.b[from..]);
        pairs.map(|(x, y)| term::<DISTANCE>(x.to_f32() * self.each.0, y.to_f32() * self.each.1)).sum()
    }
}

fn reduce_scalar<A: Element, B: Element, const DISTANCE: bool>(a: &[A], b: &[B]) -> f32 {
    const LANES: usize = 8;
    let pair = Pair::new::<DISTANCE>(a, b);
    let mut sums = [0.0f32; LANES];
    let whole = pair.a.len() / LANES * LANES;
    for (x, y) in pair.a[..whole].chunks_exact(LANES).zip(pair.b[..whole].chunks_exact(LANES)) {
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum += term::<DISTANCE>(x[i].to_f32() * pair.each.0, y[i].to_f32() * pair.each.1);
        }
    }
    (sums.iter().sum::<f32>() + pair.rest::<DISTANCE>(whole)) * pair.sum
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Element, Pair};
    use crate::params::KeyPrecision;
    use std::arch::x86_64::*;

    /// Sixteen stored numbers, widened.
    ///
    /// # Safety
    /// Sixteen numbers are readable at `p`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn load_16<T: Element>(p: *const T) -> __m512 {
        // SAFETY: the caller vouches for sixteen numbers; neither load wants alignment.
        unsafe {
            match T::PRECISION {
                KeyPrecision::F32 => _mm512_loadu_ps(p.cast()),
                KeyPrecision::Bf16 => {
                    let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
                }
                KeyPrecision::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())),
                KeyPrecision::Int8 => _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))),
            }
        }
    }

    /// Eight stored numbers, widened.
    ///
    /// # Safety
    /// Eight numbers are readable at `p`.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_8<T: Element>(p: *const T) -> __m256 {
        // SAFETY: the caller vouches for eight numbers; neither load wants alignment.
        unsafe {
            match T::PRECISION {
                KeyPrecision::F32 => _mm256_loadu_ps(p.cast()),
                KeyPrecision::Bf16 => {
                    let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
                }
                KeyPrecision::F16 => _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
                KeyPrecision::Int8 => _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))),
            }
        }
    }

    /// Multiplies with the scale, for distances of rows that have one.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn widen_16<T: Element, const DISTANCE: bool>(x: __m512, scale: __m512) -> __m512 {
        if DISTANCE && T::TAIL > 0 { _mm512_mul_ps(x, scale) } else { x }
    }

    /// As [`widen_16`].
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn widen_8<T: Element, const DISTANCE: bool>(x: __m256, scale: __m256) -> __m256 {
        if DISTANCE && T::TAIL > 0 { _mm256_mul_ps(x, scale) } else { x }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn add_term_16<const DISTANCE: bool>(a: __m512, b: __m512, sum: __m512) -> __m512 {
        if DISTANCE {
            let d = _mm512_sub_ps(a, b);
            _mm512_fmadd_ps(d, d, sum)
        } else {
            _mm512_fmadd_ps(a, b, sum)
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn add_term_8<const DISTANCE: bool>(a: __m256, b: __m256, sum: __m256) -> __m256 {
        if DISTANCE {
            let d = _mm256_sub_ps(a, b);
            _mm256_fmadd_ps(d, d, sum)
        } else {
            _mm256_fmadd_ps(a, b, sum)
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    pub(super) fn reduce_avx512<A: Element, B: Element, const DISTANCE: bool>(a: &[A], b: &[B]) -> f32 {
        let pair = Pair::new::<DISTANCE>(a, b);
        let (a, b) = (pair.a, pair.b);
        let n = a.len().min(b.len());
        let scales = (_mm512_set1_ps(pair.each.0), _mm512_set1_ps(pair.each.1));
        let mut sums = [_mm512_setzero_ps(); 4];
        let mut i = 0;
        while i + 64 <= n {
            for (j, sum) in sums.iter_mut().enumerate() {
                // SAFETY: `i + 16 j + 16 <= i + 64 <= n`.
                let (x, y) = unsafe {
                    let at = i + 16 * j;
                    (load_16(a.as_ptr().add(at)), load_16(b.as_ptr().add(at)))
                };
                *sum = add_term_16::<DISTANCE>(
                    widen_16::<A, DISTANCE>(x, scales.0),
                    widen_16::<B, DISTANCE>(y, scales.1),
                    *sum,
                );
            }
            i += 64;
        }
        while i + 16 <= n {
            // SAFETY: `i + 16 <= n`.
            let (x, y) = unsafe { (load_16(a.as_ptr().add(i)), load_16(b.as_ptr().add(i))) };
            let (x, y) = (widen_16::<A, DISTANCE>(x, scales.0), widen_16::<B, DISTANCE>(y, scales.1));
            sums[0] = add_term_16::<DISTANCE>(x, y, sums[0]);
            i += 16;
        }
        let halves = (_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
        let total = _mm512_reduce_add_ps(_mm512_add_ps(halves.0, halves.1));
        (total + pair.rest::<DISTANCE>(i)) * pair.sum
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn reduce_avx2<A: Element, B: Element, const DISTANCE: bool>(a: &[A], b: &[B]) -> f32 {
        let pair = Pair::new::<DISTANCE>(a, b);
        let (a, b) = (pair.a, pair.b);
        let n = a.len().min(b.len());
        let scales = (_mm256_set1_ps(pair.each.0), _mm256_set1_ps(pair.each.1));
        let mut sums = [_mm256_setzero_ps(); 4];
        let mut i = 0;
        while i + 32 <= n {
            for (j, sum) in sums.iter_mut().enumerate() {
                // SAFETY: `i + 8 j + 8 <= i + 32 <= n`.
                let (x, y) = unsafe {
                    let at = i + 8 * j;
                    (load_8(a.as_ptr().add(at)), load_8(b.as_ptr().add(at)))
                };
                *sum = add_term_8::<DISTANCE>(
                    widen_8::<A, DISTANCE>(x, scales.0),
                    widen_8::<B, DISTANCE>(y, scales.1),
                    *sum,
                );
            }
            i += 32;
        }
        while i + 8 <= n {
            // SAFETY: `i + 8 <= n`.
            let (x, y) = unsafe { (load_8(a.as_ptr().add(i)), load_8(b.as_ptr().add(i))) };
            let (x, y) = (widen_8::<A, DISTANCE>(x, scales.0), widen_8::<B, DISTANCE>(y, scales.1));
            sums[0] = add_term_8::<DISTANCE>(x, y, sums[0]);
            i += 8;
        }
        let halves = (_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
        let sum = _mm256_add_ps(halves.0, halves.1);
        let four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        let total = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
        (total + pair.rest::<DISTANCE>(i)) * pair.sum
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    pub(super) fn dot_rows_avx512<T: Element>(query: &[f32], rows: &[T], scores: &mut [f32]) {
        for (row, score) in rows.chunks_exact(T::stride(query.len())).zip(scores) {
            *score = reduce_avx512::<f32, T, false>(query, row);
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn dot_rows_avx2<T: Element>(query: &[f32], rows: &[T], scores: &mut [f32]) {
        for (row, score) in rows.chunks_exact(T::stride(query.len())).zip(scores) {
            *score = reduce_avx2::<f32, T, false>(query, row);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use half::{bf16, f16};
    use proptest::prelude::*;

    /// Both reductions in f64, with the size of what was added up.
    fn oracle<A: Element, B: Element>(a: &[A], b: &[B]) -> [(f64, f64); 2] {
        let wide = (values(a), values(b));
        let pairs = || wide.0.iter().zip(&wide.1).map(|(x, y)| (f64::from(*x), f64::from(*y)));
        let dot = pairs().map(|(x, y)| x * y).sum();
        let size = pairs().map(|(x, y)| (x * y).abs()).sum();
        let distance = pairs().map(|(x, y)| (x - y) * (x - y)).sum();
        // Scales round each number once more.
        let squares: f64 = pairs().map(|(x, y)| x * x + y * y).sum();
        [(dot, size), (distance, if A::TAIL + B::TAIL > 0 { squares } else { distance })]
    }

    fn values<T: Element>(row: &[T]) -> Vec<f32> {
        let mut out = vec![0.0; T::numbers(row).len()];
        T::decode(row, &mut out);
        out
    }

    fn agrees<A: Element, B: Element>(a: &[A], b: &[B]) {
        let [dot, distance] = oracle(a, b);
        for isa in Isa::available() {
            let got = isa.reduce::<A, B, false>(a, b);
            assert!((f64::from(got) - dot.0).abs() <= 1e-5 * dot.1, "{isa:?}: {got}, {dot:?}");
            let got = isa.reduce::<A, B, true>(a, b);
            assert!((f64::from(got) - distance.0).abs() <= 1e-5 * distance.1, "{isa:?}: {got}, {distance:?}");
        }
    }

    fn encoded<T: Element>(dim: usize, numbers: &[f32]) -> Vec<T> {
        let mut out = vec![T::default(); numbers.len() / dim * T::stride(dim)];
        for (from, to) in numbers.chunks(dim).zip(out.chunks_mut(T::stride(dim))) {
            T::encode(from, to);
        }
        out
    }

    fn rows_agree<T: Element>(query: &[f32], keys: &[f32]) {
        let keys: Vec<T> = encoded(query.len(), keys);
        for isa in Isa::available() {
            let mut scores = vec![f32::NAN; keys.len() / T::stride(query.len())];
            isa.dot_rows(query, &keys, &mut scores);
            for (row, score) in keys.chunks(T::stride(query.len())).zip(scores) {
                assert_eq!(score, isa.reduce::<f32, T, false>(query, row));
            }
        }
    }

    fn precision_agrees<T: Element>(a: &[f32], b: &[f32]) {
        let n = a.len();
        let (narrow_a, narrow_b) = (encoded::<T>(n, a), encoded::<T>(n, b));
        agrees(a, &narrow_b);
        agrees(&narrow_a, &narrow_b);
        rows_agree::<T>(a, b);
        let dim = n.min(7);
        rows_agree::<T>(&a[..dim], &b[..n / dim * dim]);
    }

    proptest! {
        #[test]
        fn every_instruction_set_agrees_with_f64(
            pairs in prop::collection::vec((-8.0f32..8.0, -8.0f32..8.0), 1..300),
        ) {
            let (a, b): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            precision_agrees::<f32>(&a, &b);
            precision_agrees::<bf16>(&a, &b);
            precision_agrees::<f16>(&a, &b);
            precision_agrees::<i8>(&a, &b);
        }
    }
}
