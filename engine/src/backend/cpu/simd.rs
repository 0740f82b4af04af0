//! Sixteen lanes of f32 on whatever the machine has.
//!
//! A kernel is written once, generic over [`Simd`], and instantiated for each instruction set inside a
//! function that enables it (`simd_dispatch!`). Every method is inlined into that function: calling
//! one from code compiled without the instruction set would be slow and, on a machine without it,
//! undefined, which is why all are `unsafe`.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use half::bf16;

/// Lanes of a vector, on every instruction set.
pub(crate) const LANES: usize = 16;

/// The instruction sets that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512, and matrix tiles for products with bf16 (AMX).
    Amx,
    /// AVX-512 (F, BW, DQ, VL).
    Avx512,
    /// AVX2 with FMA.
    Avx2,
    /// Portable code.
    Scalar,
}

impl Isa {
    /// The best set that this machine has.
    pub fn detect() -> Isa {
        *Isa::available().first().unwrap_or(&Isa::Scalar)
    }

    /// Every set that this machine has, best first.
    pub fn available() -> Vec<Isa> {
        let mut sets = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if avx512 && super::amx::available() {
                sets.push(Isa::Amx);
            }
            if avx512 {
                sets.push(Isa::Avx512);
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                sets.push(Isa::Avx2);
            }
        }
        sets.push(Isa::Scalar);
        sets
    }
}

/// Sixteen f32 lanes.
pub(crate) trait Simd: Copy + 'static {
    /// Sixteen f32.
    type V: Copy;
    /// Whether there are enough registers for 12 x 2 accumulators.
    const WIDE: bool;
    /// Whether products with bf16 go through matrix tiles.
    const TILES: bool = false;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn sum(v: Self::V) -> f32;
    unsafe fn maximum(v: Self::V) -> f32;
    /// 2 to the power of `v`; exactly 0 below -126, so that a masked lane adds nothing.
    unsafe fn exp2(v: Self::V) -> Self::V;
    /// 2 to the power of `v` for attention weights that are rounded to bf16: error below 2^-13. Arguments are
    /// finite or NaN, at most 0; those of [`MASKED`] give exactly 0.
    unsafe fn exp2_weight(v: Self::V) -> Self::V {
        // SAFETY: the caller is compiled for this instruction set.
        unsafe { Self::exp2(v) }
    }
    /// Thirty-two bf16 from memory, widened: those at even places, and those at odd places.
    unsafe fn load_pairs(p: *const bf16) -> (Self::V, Self::V);

    /// Begins to fetch the cache line at `p`, which may be any address.
    #[inline(always)]
    fn prefetch(p: *const u8) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch never faults, and every x86-64 machine has it.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(p.cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = p;
    }

    #[inline(always)]
    unsafe fn zero() -> Self::V {
        // SAFETY: the caller is compiled for this instruction set.
        unsafe { Self::splat(0.0) }
    }
}

/// Coefficients of 2^f on [-0.5, 0.5], highest first (Taylor series of e^(f ln 2); error below 1 ulp of f32).
const EXP2: [f32; 7] =
    [1.540_353e-4, 1.333_355_8e-3, 9.618_129e-3, 5.550_411e-2, 2.402_265e-1, std::f32::consts::LN_2, 1.0];

/// Score of a key that a query must not see. Finite, so that no instruction set makes a NaN of it.
pub(crate) const MASKED: f32 = -1e38;

/// Minimax coefficients of 2^f on [-0.5, 0.5], highest first; relative error 7.5e-5.
const EXP2_WEIGHT: [f32; 4] = [0.055_171_67, 0.242_611_15, 0.693_261, 0.999_928_1];

/// Portable lanes; the compiler vectorises them as far as the baseline allows.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

#[inline(always)]
fn lanes(f: impl Fn(usize) -> f32) -> [f32; LANES] {
    let mut v = [0.0; LANES];
    for (i, x) in v.iter_mut().enumerate() {
        *x = f(i);
    }
    v
}

impl Simd for Scalar {
    type V = [f32; LANES];
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        // SAFETY: the caller passes a pointer to 16 readable f32.
        unsafe { p.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        // SAFETY: the caller passes a pointer to 16 writable f32.
        unsafe { p.cast::<Self::V>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] / b[i])
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i].max(b[i]))
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        lanes(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn sum(v: Self::V) -> f32 {
        v.iter().sum()
    }
    #[inline(always)]
    unsafe fn maximum(v: Self::V) -> f32 {
        v.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x))
    }
    #[inline(always)]
    unsafe fn exp2(v: Self::V) -> Self::V {
        lanes(|i| {
            let x = v[i];
            // Not `x < -126`: a NaN has to come through.
            if x < -126.0 {
                return 0.0;
            }
            let x = if x > 127.0 { 127.0 } else { x };
            let n = x.round_ties_even();
            let f = x - n;
            let mut y = EXP2[0];
            for c in &EXP2[1..] {
                y = y * f + c;
            }
            y * f32::from_bits(((n as i32 + 127) as u32) << 23)
        })
    }
    #[inline(always)]
    unsafe fn load_pairs(p: *const bf16) -> (Self::V, Self::V) {
        // SAFETY: the caller passes a pointer to 32 readable bf16.
        let x = unsafe { p.cast::<[u16; 2 * LANES]>().read_unaligned() };
        let widen = |x: u16| f32::from_bits(u32::from(x) << 16);
        (lanes(|i| widen(x[2 * i])), lanes(|i| widen(x[2 * i + 1])))
    }
}

/// AVX2 with FMA: a vector is two registers.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

// SAFETY (all blocks of this impl): the methods are only called from functions compiled with
// AVX2 and FMA, on machines that have them; pointers cover the lanes that the contract names.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx2 {
    type V = [__m256; 2];
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        unsafe {
            _mm256_storeu_ps(p, v[0]);
            _mm256_storeu_ps(p.add(8), v[1]);
        }
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        unsafe { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
    #[inline(always)]
    unsafe fn sum(v: Self::V) -> f32 {
        unsafe {
            let mut t = [0.0f32; 8];
            _mm256_storeu_ps(t.as_mut_ptr(), _mm256_add_ps(v[0], v[1]));
            ((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7]))
        }
    }
    #[inline(always)]
    unsafe fn maximum(v: Self::V) -> f32 {
        unsafe {
            let mut t = [0.0f32; 8];
            _mm256_storeu_ps(t.as_mut_ptr(), _mm256_max_ps(v[0], v[1]));
            t.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x))
        }
    }
    #[inline(always)]
    unsafe fn exp2(v: Self::V) -> Self::V {
        unsafe {
            let mut out = v;
            for o in &mut out {
                // min and max return the second operand for a NaN, so a NaN comes through.
                let x = _mm256_min_ps(_mm256_set1_ps(127.0), *o);
                let low = _mm256_cmp_ps::<_CMP_LT_OQ>(x, _mm256_set1_ps(-126.0));
                let x = _mm256_max_ps(_mm256_set1_ps(-126.0), x);
                let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
                let f = _mm256_sub_ps(x, n);
                let mut y = _mm256_set1_ps(EXP2[0]);
                for c in &EXP2[1..] {
                    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(*c));
                }
                let e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                let y = _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(e)));
                *o = _mm256_andnot_ps(low, y);
            }
            out
        }
    }
    #[inline(always)]
    unsafe fn load_pairs(p: *const bf16) -> (Self::V, Self::V) {
        unsafe {
            let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            let x = [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(16).cast())];
            let even = x.map(|x| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x)));
            let odd = x.map(|x| _mm256_castsi256_ps(_mm256_and_si256(x, high)));
            (even, odd)
        }
    }
}

/// AVX-512, with or without matrix tiles.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const TILES: bool>;

// SAFETY (all blocks of this impl): the methods are only called from functions compiled with
// AVX-512, on machines that have it; pointers cover the lanes that the contract names.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::undocumented_unsafe_blocks)]
impl<const TILES: bool> Simd for Avx512<TILES> {
    type V = __m512;
    const WIDE: bool = true;
    const TILES: bool = TILES;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn sum(v: Self::V) -> f32 {
        unsafe { _mm512_reduce_add_ps(v) }
    }
    #[inline(always)]
    unsafe fn maximum(v: Self::V) -> f32 {
        unsafe { _mm512_reduce_max_ps(v) }
    }
    #[inline(always)]
    unsafe fn exp2(v: Self::V) -> Self::V {
        unsafe {
            let keep = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(v, _mm512_set1_ps(-126.0));
            let x = _mm512_max_ps(_mm512_set1_ps(-126.0), v);
            let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
            let f = _mm512_sub_ps(x, n);
            let mut y = _mm512_set1_ps(EXP2[0]);
            for c in &EXP2[1..] {
                y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(*c));
            }
            _mm512_maskz_scalef_ps(keep, y, n)
        }
    }
    #[inline(always)]
    unsafe fn exp2_weight(v: Self::V) -> Self::V {
        unsafe {
            let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v);
            let f = _mm512_sub_ps(v, n);
            let mut y = _mm512_set1_ps(EXP2_WEIGHT[0]);
            for c in &EXP2_WEIGHT[1..] {
                y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(*c));
            }
            _mm512_scalef_ps(y, n)
        }
    }
    #[inline(always)]
    unsafe fn load_pairs(p: *const bf16) -> (Self::V, Self::V) {
        unsafe {
            let x = _mm512_loadu_si512(p.cast());
            let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            let even = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(x));
            (even, _mm512_castsi512_ps(_mm512_and_si512(x, high)))
        }
    }
}

/// Calls `$kernel::<S>($arg)` compiled for the instruction set `$isa`.
macro_rules! simd_dispatch {
    ($isa:expr, $kernel:ident, $ty:ty, $arg:expr) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        unsafe fn avx512(arg: $ty) {
            // SAFETY: this function is compiled for the instruction set.
            unsafe { $kernel::<$crate::backend::cpu::simd::Avx512<false>>(arg) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        unsafe fn amx(arg: $ty) {
            // SAFETY: this function is compiled for the instruction set.
            unsafe { $kernel::<$crate::backend::cpu::simd::Avx512<true>>(arg) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma")]
        unsafe fn avx2(arg: $ty) {
            // SAFETY: this function is compiled for the instruction set.
            unsafe { $kernel::<$crate::backend::cpu::simd::Avx2>(arg) }
        }
        // SAFETY: an `Isa` other than `Scalar` only exists where `Isa::available` found it.
        unsafe {
            match $isa {
                #[cfg(target_arch = "x86_64")]
                $crate::backend::cpu::simd::Isa::Amx => amx($arg),
                #[cfg(target_arch = "x86_64")]
                $crate::backend::cpu::simd::Isa::Avx512 => avx512($arg),
                #[cfg(target_arch = "x86_64")]
                $crate::backend::cpu::simd::Isa::Avx2 => avx2($arg),
                _ => $kernel::<$crate::backend::cpu::simd::Scalar>($arg),
            }
        }
    }};
}
pub(crate) use simd_dispatch;

#[cfg(test)]
mod tests {
    use super::*;

    struct Case {
        x: [f32; LANES],
        pairs: [bf16; 2 * LANES],
        even: [f32; LANES],
        odd: [f32; LANES],
        exp: [f32; LANES],
        weight: [f32; LANES],
    }

    unsafe fn run<S: Simd>(c: &mut Case) {
        // SAFETY: all arrays hold what the lanes need.
        unsafe {
            let v = S::load(c.x.as_ptr());
            S::store(c.exp.as_mut_ptr(), S::exp2(v));
            S::store(c.weight.as_mut_ptr(), S::exp2_weight(v));
            let (even, odd) = S::load_pairs(c.pairs.as_ptr());
            S::store(c.even.as_mut_ptr(), even);
            S::store(c.odd.as_mut_ptr(), odd);
        }
    }

    #[test]
    fn every_instruction_set_agrees_with_double_precision() {
        for isa in Isa::available() {
            for seed in 0..200 {
                let at = |i: usize| ((i * 7919 + seed * 104_729) % 2003) as f32 / 50.0 - 20.0;
                let mut c = Case {
                    x: std::array::from_fn(at),
                    pairs: std::array::from_fn(|i| bf16::from_f32(at(i))),
                    even: [0.0; LANES],
                    odd: [0.0; LANES],
                    exp: [0.0; LANES],
                    weight: [0.0; LANES],
                };
                simd_dispatch!(isa, run, &mut Case, &mut c);
                for i in 0..LANES {
                    let want = f64::from(c.x[i]).exp2();
                    assert!((f64::from(c.exp[i]) - want).abs() <= 3e-7 * want, "{isa:?} exp2 {}", c.x[i]);
                    assert!((f64::from(c.weight[i]) - want).abs() <= 1e-4 * want, "{isa:?} weight {}", c.x[i]);
                    assert_eq!(c.even[i], c.pairs[2 * i].to_f32(), "{isa:?} even");
                    assert_eq!(c.odd[i], c.pairs[2 * i + 1].to_f32(), "{isa:?} odd");
                }
            }
        }
    }

    #[test]
    fn exp2_of_a_masked_lane_is_exactly_zero_and_nan_comes_through() {
        for isa in Isa::available() {
            let mut c = Case {
                x: [f32::NEG_INFINITY; LANES],
                pairs: [bf16::ZERO; 2 * LANES],
                even: [0.0; LANES],
                odd: [0.0; LANES],
                exp: [1.0; LANES],
                weight: [1.0; LANES],
            };
            c.x[1] = f32::NAN;
            c.x[2] = 0.0;
            c.x[3] = -127.0;
            c.x[4] = MASKED - 1e38;
            simd_dispatch!(isa, run, &mut Case, &mut c);
            assert_eq!(c.exp[0], 0.0, "{isa:?}");
            assert!(c.exp[1].is_nan(), "{isa:?}");
            assert_eq!(c.exp[2], 1.0, "{isa:?}");
            assert_eq!(c.exp[3], 0.0, "{isa:?}");
            assert_eq!((c.exp[4], c.weight[4]), (0.0, 0.0), "{isa:?}");
            assert!(c.weight[1].is_nan(), "{isa:?}");
        }
    }
}
