//! Inner products and squared distances of rows, with the widest vectors the machine has.
//!
//! One kernel body per instruction set serves both stored types: a bf16 number is the upper half
//! of an f32, so widening it is a shift. All sums are kept in f32, in several partial sums.

use std::sync::OnceLock;

use half::bf16;

use crate::key_index::KeyPrecision;

/// A number as it is stored.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    const PRECISION: KeyPrecision;
    /// The nearest stored number, ties to even.
    fn from_f32(x: f32) -> Self;
    fn to_f32(self) -> f32;
    /// The bits, equal for equal finite numbers except for the two zeros.
    fn bits(self) -> u32;
}

impl Element for f32 {
    const PRECISION: KeyPrecision = KeyPrecision::F32;
    #[inline]
    fn from_f32(x: f32) -> Self {
        x
    }
    #[inline]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline]
    fn bits(self) -> u32 {
        self.to_bits()
    }
}

impl Element for bf16 {
    const PRECISION: KeyPrecision = KeyPrecision::Bf16;
    #[inline]
    fn from_f32(x: f32) -> Self {
        bf16::from_f32(x)
    }
    #[inline]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    #[inline]
    fn bits(self) -> u32 {
        u32::from(self.to_bits())
    }
}

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

/// The instruction sets with a kernel of their own.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Isa {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// Every set this machine can run, the best one last. Only from here come values other than
    /// `Scalar`.
    fn available() -> Vec<Isa> {
        #[cfg(target_arch = "x86_64")]
        {
            let mut sets = vec![Isa::Scalar];
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                sets.push(Isa::Avx2);
            }
            if is_x86_feature_detected!("avx512f") {
                sets.push(Isa::Avx512);
            }
            sets
        }
        #[cfg(not(target_arch = "x86_64"))]
        vec![Isa::Scalar]
    }

    #[inline]
    fn best() -> Isa {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().pop().unwrap_or(Isa::Scalar))
    }

    #[inline]
    fn reduce<A: Element, B: Element, const DISTANCE: bool>(self, a: &[A], b: &[B]) -> f32 {
        assert_eq!(a.len(), b.len(), "rows of one dimension");
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
        assert_eq!(rows.len(), query.len() * scores.len(), "whole rows");
        match self {
            Isa::Scalar => {
                for (row, score) in rows.chunks_exact(query.len()).zip(scores) {
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

fn reduce_scalar<A: Element, B: Element, const DISTANCE: bool>(a: &[A], b: &[B]) -> f32 {
    const LANES: usize = 8;
    let mut sums = [0.0f32; LANES];
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a.remainder().iter().zip(b.remainder());
    let tail: f32 = rest.map(|(x, y)| term::<DISTANCE>(x.to_f32(), y.to_f32())).sum();
    for (x, y) in a.zip(b) {
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum += term::<DISTANCE>(x[i].to_f32(), y[i].to_f32());
        }
    }
    sums.iter().sum::<f32>() + tail
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Element, term};
    use crate::key_index::KeyPrecision;
    use std::arch::x86_64::*;

    /// Sixteen stored numbers, widened.
    ///
    /// # Safety
    /// Sixteen numbers are readable at `p`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_16<T: Element>(p: *const T) -> __m512 {
        // SAFETY: the caller vouches for sixteen numbers; neither load wants alignment.
        unsafe {
            match T::PRECISION {
                KeyPrecision::F32 => _mm512_loadu_ps(p.cast()),
                KeyPrecision::Bf16 => {
                    let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
                }
            }
        }
    }

    /// Eight stored numbers, widened.
    ///
    /// # Safety
    /// Eight numbers are readable at `p`.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn load_8<T: Element>(p: *const T) -> __m256 {
        // SAFETY: the caller vouches for eight numbers; neither load wants alignment.
        unsafe {
            match T::PRECISION {
                KeyPrecision::F32 => _mm256_loadu_ps(p.cast()),
                KeyPrecision::Bf16 => {
                    let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn add_term_16<const DISTANCE: bool>(a: __m512, b: __m512, sum: __m512) -> __m512 {
        if DISTANCE {
            let d = _mm512_sub_ps(a, b);
            _mm512_fmadd_ps(d, d, sum)
        } else {
            _mm512_fmadd_ps(a, b, sum)
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn add_term_8<const DISTANCE: bool>(a: __m256, b: __m256, sum: __m256) -> __m256 {
        if DISTANCE {
            let d = _mm256_sub_ps(a, b);
            _mm256_fmadd_ps(d, d, sum)
        } else {
            _mm256_fmadd_ps(a, b, sum)
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn reduce_avx512<A: Element, B: Element, const DISTANCE: bool>(a: &[A], b: &[B]) -> f32 {
        let n = a.len().min(b.len());
        let mut sums = [_mm512_setzero_ps(); 4];
        let mut i = 0;
        while i + 64 <= n {
            for (j, sum) in sums.iter_mut().enumerate() {
                // SAFETY: `i + 16 j + 16 <= i + 64 <= n`.
                let (x, y) = unsafe {
                    let at = i + 16 * j;
                    (load_16(a.as_ptr().add(at)), load_16(b.as_ptr().add(at)))
                };
                *sum = add_term_16::<DISTANCE>(x, y, *sum);
            }
            i += 64;
        }
        while i + 16 <= n {
            // SAFETY: `i + 16 <= n`.
            let (x, y) = unsafe { (load_16(a.as_ptr().add(i)), load_16(b.as_ptr().add(i))) };
            sums[0] = add_term_16::<DISTANCE>(x, y, sums[0]);
            i += 16;
        }
        let halves = (_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
        let mut total = _mm512_reduce_add_ps(_mm512_add_ps(halves.0, halves.1));
        for (x, y) in a[i..n].iter().zip(&b[i..n]) {
            total += term::<DISTANCE>(x.to_f32(), y.to_f32());
        }
        total
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn reduce_avx2<A: Element, B: Element, const DISTANCE: bool>(a: &[A], b: &[B]) -> f32 {
        let n = a.len().min(b.len());
        let mut sums = [_mm256_setzero_ps(); 4];
        let mut i = 0;
        while i + 32 <= n {
            for (j, sum) in sums.iter_mut().enumerate() {
                // SAFETY: `i + 8 j + 8 <= i + 32 <= n`.
                let (x, y) = unsafe {
                    let at = i + 8 * j;
                    (load_8(a.as_ptr().add(at)), load_8(b.as_ptr().add(at)))
                };
                *sum = add_term_8::<DISTANCE>(x, y, *sum);
            }
            i += 32;
        }
        while i + 8 <= n {
            // SAFETY: `i + 8 <= n`.
            let (x, y) = unsafe { (load_8(a.as_ptr().add(i)), load_8(b.as_ptr().add(i))) };
            sums[0] = add_term_8::<DISTANCE>(x, y, sums[0]);
            i += 8;
        }
        let halves = (_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
        let sum = _mm256_add_ps(halves.0, halves.1);
        let four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        let mut total = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
        for (x, y) in a[i..n].iter().zip(&b[i..n]) {
            total += term::<DISTANCE>(x.to_f32(), y.to_f32());
        }
        total
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn dot_rows_avx512<T: Element>(query: &[f32], rows: &[T], scores: &mut [f32]) {
        for (row, score) in rows.chunks_exact(query.len()).zip(scores) {
            *score = reduce_avx512::<f32, T, false>(query, row);
        }
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn dot_rows_avx2<T: Element>(query: &[f32], rows: &[T], scores: &mut [f32]) {
        for (row, score) in rows.chunks_exact(query.len()).zip(scores) {
            *score = reduce_avx2::<f32, T, false>(query, row);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use proptest::prelude::*;

    /// Both reductions in f64, with the size of what was added up.
    fn oracle<A: Element, B: Element>(a: &[A], b: &[B]) -> [(f64, f64); 2] {
        let pairs = || a.iter().zip(b).map(|(x, y)| (f64::from(x.to_f32()), f64::from(y.to_f32())));
        let dot = pairs().map(|(x, y)| x * y).sum();
        let size = pairs().map(|(x, y)| (x * y).abs()).sum();
        let distance = pairs().map(|(x, y)| (x - y) * (x - y)).sum();
        [(dot, size), (distance, distance)]
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

    fn rows_agree<T: Element>(query: &[f32], keys: &[f32]) {
        let keys: Vec<T> = keys.iter().map(|&x| T::from_f32(x)).collect();
        for isa in Isa::available() {
            let mut scores = vec![f32::NAN; keys.len() / query.len()];
            isa.dot_rows(query, &keys, &mut scores);
            for (row, score) in keys.chunks(query.len()).zip(scores) {
                assert_eq!(score, isa.reduce::<f32, T, false>(query, row));
            }
        }
    }

    proptest! {
        #[test]
        fn every_instruction_set_agrees_with_f64(
            pairs in prop::collection::vec((-8.0f32..8.0, -8.0f32..8.0), 1..300),
        ) {
            let (a, b): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            let narrow = |v: &[f32]| -> Vec<bf16> { v.iter().map(|&x| bf16::from_f32(x)).collect() };
            agrees(&a, &b);
            agrees(&a, &narrow(&b));
            agrees(&narrow(&a), &narrow(&b));
            rows_agree::<f32>(&a[..a.len() / 3 + 1], &b[..a.len() / 3 + 1]);
            let dim = b.len().min(7);
            let whole = &b[..b.len() / dim * dim];
            rows_agree::<f32>(&a[..dim], whole);
            rows_agree::<bf16>(&a[..dim], whole);
        }
    }

    #[test]
    fn this_machine_runs_the_set_it_reports() {
        assert_eq!(Isa::available().last(), Some(&Isa::best()));
        assert_eq!(Isa::available()[0], Isa::Scalar);
    }
}
