//! The register kernel under every matrix product of the CPU backend: weights, QK^T and PV.
//!
//! `C[rows, 16 * groups] (+)= A[rows, inner] * B`, where `B` is packed so that one vector load yields
//! sixteen output lanes for one step of the inner dimension. A step is one element in f32 and a pair
//! of elements in bf16; `A` and `C` are f32, and bf16 is widened in registers, once for all rows of a tile. Each output is summed over the inner dimension in order, whatever the
//! number of rows: **a row's result does not depend on which rows share the call** - with one exception: where the
//! machine has matrix tiles, more than six rows go through them, which sum in another order.

use half::bf16;

use super::simd::{LANES, Simd};

/// A storage type of packed operands.
pub(crate) trait Element: Copy + Default + Send + Sync + 'static {
    /// Inner elements per step.
    const STEP: usize;
    fn from_f32(x: f32) -> Self;
    fn to_f32(self) -> f32;
}

impl Element for f32 {
    const STEP: usize = 1;
    #[inline(always)]
    fn from_f32(x: f32) -> f32 {
        x
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    const STEP: usize = 2;
    #[inline(always)]
    fn from_f32(x: f32) -> bf16 {
        bf16::from_f32(x)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// What an instruction set does with a step of an element type.
pub(crate) trait Steps<E: Element>: Simd {
    /// Sixteen lanes of a step of B, in f32.
    type B: Copy;
    /// A step of A, in all lanes.
    type A: Copy;
    unsafe fn load_b(p: *const E) -> Self::B;
    unsafe fn splat_a(p: *const f32) -> Self::A;
    unsafe fn mac(acc: Self::V, a: Self::A, b: Self::B) -> Self::V;
}

// SAFETY (both impls): plain forwarding; the contracts are those of `Simd`.
#[allow(clippy::undocumented_unsafe_blocks)]
impl<S: Simd> Steps<f32> for S {
    type B = S::V;
    type A = S::V;
    #[inline(always)]
    unsafe fn load_b(p: *const f32) -> Self::B {
        unsafe { S::load(p) }
    }
    #[inline(always)]
    unsafe fn splat_a(p: *const f32) -> Self::A {
        unsafe { S::splat(*p) }
    }
    #[inline(always)]
    unsafe fn mac(acc: Self::V, a: Self::A, b: Self::B) -> Self::V {
        unsafe { S::fma(a, b, acc) }
    }
}

#[allow(clippy::undocumented_unsafe_blocks)]
impl<S: Simd> Steps<bf16> for S {
    type B = (S::V, S::V);
    type A = (S::V, S::V);
    #[inline(always)]
    unsafe fn load_b(p: *const bf16) -> Self::B {
        unsafe { S::load_pairs(p) }
    }
    #[inline(always)]
    unsafe fn splat_a(p: *const f32) -> Self::A {
        unsafe { (S::splat(*p), S::splat(*p.add(1))) }
    }
    #[inline(always)]
    unsafe fn mac(acc: Self::V, a: Self::A, b: Self::B) -> Self::V {
        unsafe { S::fma(a.1, b.1, S::fma(a.0, b.0, acc)) }
    }
}

/// One product. All strides count elements.
#[derive(Clone, Copy)]
pub(crate) struct Product<E> {
    pub rows: usize,
    pub groups: usize,
    /// Steps of the inner dimension.
    pub steps: usize,
    pub a: *const f32,
    pub a_stride: usize,
    pub b: *const E,
    /// From one step to the next.
    pub b_step: usize,
    /// From one group of sixteen lanes to the next.
    pub b_group: usize,
    pub c: *mut f32,
    pub c_stride: usize,
    /// Add to `C` instead of overwriting it.
    pub accumulate: bool,
    /// How far ahead of its use B is fetched into the cache when few rows share it, so that waiting for memory
    /// and not arithmetic decides; 0: not at all.
    pub ahead: usize,
}

/// Rows up to which a product waits for B rather than for its arithmetic: matrix tiles would be mostly empty.
const FEW_ROWS: usize = 6;

#[inline(always)]
unsafe fn tile<S: Steps<E>, E: Element, const MR: usize, const NR: usize>(p: &Product<E>, row: usize, group: usize) {
    // SAFETY: the caller of `product` vouches for the extents; `row + MR` and `group + NR` are inside.
    unsafe {
        let c = p.c.add(row * p.c_stride + group * LANES);
        let a = p.a.add(row * p.a_stride);
        let b = p.b.add(group * p.b_group);
        let mut acc = [[S::zero(); NR]; MR];
        if p.accumulate {
            for (r, acc) in acc.iter_mut().enumerate() {
                for (n, x) in acc.iter_mut().enumerate() {
                    *x = S::load(c.add(r * p.c_stride + n * LANES));
                }
            }
        }
        for s in 0..p.steps {
            let mut bs = [S::load_b(b.add(s * p.b_step)); NR];
            for (n, x) in bs.iter_mut().enumerate().skip(1) {
                *x = S::load_b(b.add(s * p.b_step + n * p.b_group));
            }
            if MR <= FEW_ROWS && p.ahead > 0 {
                for n in 0..NR {
                    S::prefetch(b.wrapping_add(s * p.b_step + n * p.b_group + p.ahead).cast());
                }
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let x = S::splat_a(a.add(r * p.a_stride + s * E::STEP));
                for (n, y) in acc.iter_mut().enumerate() {
                    *y = S::mac(*y, x, bs[n]);
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (n, x) in acc.iter().enumerate() {
                S::store(c.add(r * p.c_stride + n * LANES), *x);
            }
        }
    }
}

#[inline(always)]
unsafe fn columns<S: Steps<E>, E: Element, const MR: usize, const NR: usize>(p: &Product<E>, row: usize) {
    let mut group = 0;
    while group + NR <= p.groups {
        // SAFETY: inside the groups of `p`.
        unsafe { tile::<S, E, MR, NR>(p, row, group) };
        group += NR;
    }
    while group < p.groups {
        // SAFETY: inside the groups of `p`.
        unsafe { tile::<S, E, MR, 1>(p, row, group) };
        group += 1;
    }
}

/// Computes `p`.
///
/// # Safety
/// The pointers cover the extents that the fields name, `C` overlaps nothing else, and the caller is
/// compiled for `S`.
#[inline(always)]
pub(crate) unsafe fn product<S: Steps<E>, E: Element>(p: &Product<E>) {
    #[cfg(target_arch = "x86_64")]
    if let Some(p) = for_tiles::<S, E>(p) {
        // SAFETY: `TILES` is set only where tiles are available; the extents are the caller's.
        return unsafe { super::amx::product(p) };
    }
    // SAFETY: rows stay inside `p.rows`; the rest is the caller's contract.
    unsafe {
        if S::WIDE && p.rows >= 12 {
            // Column panels outside, so that a panel of B stays in L1 over all rows.
            let mut group = 0;
            let whole = p.rows - p.rows % 12;
            while group < p.groups {
                let two = group + 2 <= p.groups;
                let mut row = 0;
                while row < whole {
                    if two {
                        tile::<S, E, 12, 2>(p, row, group)
                    } else {
                        tile::<S, E, 12, 1>(p, row, group)
                    }
                    row += 12;
                }
                group += if two { 2 } else { 1 };
            }
            rest::<S, E>(p, whole);
        } else {
            rest::<S, E>(p, 0);
        }
    }
}

/// `p` as a product with bf16, where such products go through matrix tiles.
#[inline(always)]
pub(crate) fn for_tiles<S: Simd, E: Element>(p: &Product<E>) -> Option<&Product<bf16>> {
    // SAFETY: only bf16 has steps of two, and the element type occurs in one pointer alone.
    (S::TILES && E::STEP == 2 && p.rows > FEW_ROWS).then(|| unsafe { &*std::ptr::from_ref(p).cast() })
}

#[inline(always)]
unsafe fn rest<S: Steps<E>, E: Element>(p: &Product<E>, mut row: usize) {
    // SAFETY: rows stay inside `p.rows`; the rest is the caller's contract.
    unsafe {
        while row < p.rows {
            row += match p.rows - row {
                n if n >= 6 && S::WIDE => {
                    columns::<S, E, 6, 2>(p, row);
                    6
                }
                n if n >= 3 && !S::WIDE => {
                    columns::<S, E, 3, 1>(p, row);
                    3
                }
                n if n >= 3 => {
                    columns::<S, E, 3, 4>(p, row);
                    3
                }
                2 if S::WIDE => {
                    columns::<S, E, 2, 4>(p, row);
                    2
                }
                2 => {
                    columns::<S, E, 2, 1>(p, row);
                    2
                }
                _ if S::WIDE => {
                    columns::<S, E, 1, 4>(p, row);
                    1
                }
                _ => {
                    columns::<S, E, 1, 2>(p, row);
                    1
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::simd::{Isa, simd_dispatch};

    unsafe fn run_f32<S: Simd>(p: &Product<f32>) {
        // SAFETY: the test's arrays cover the extents.
        unsafe { product::<S, f32>(p) }
    }
    unsafe fn run_bf16<S: Simd>(p: &Product<bf16>) {
        // SAFETY: the test's arrays cover the extents.
        unsafe { product::<S, bf16>(p) }
    }

    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| (((i * 2_654_435_761 + seed * 97) >> 7) % 4001) as f32 / 2000.0 - 1.0).collect()
    }

    fn check<E: Element>(run: impl Fn(Isa, &Product<E>)) {
        let inner = 24;
        for isa in Isa::available() {
            for rows in [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 25, 48] {
                for groups in [1, 2, 3, 5, 8] {
                    let lanes = groups * LANES;
                    let a = values(rows * inner, 1);
                    let b: Vec<E> = values(inner * lanes, 2).into_iter().map(E::from_f32).collect();
                    let at = |k: usize, n: usize| b[(k / E::STEP) * lanes * E::STEP + n * E::STEP + k % E::STEP];
                    for accumulate in [false, true] {
                        let mut c = vec![3.0f32; rows * lanes];
                        let p = Product {
                            rows,
                            groups,
                            steps: inner / E::STEP,
                            a: a.as_ptr(),
                            a_stride: inner,
                            b: b.as_ptr(),
                            b_step: lanes * E::STEP,
                            b_group: LANES * E::STEP,
                            c: c.as_mut_ptr(),
                            c_stride: lanes,
                            accumulate,
                            ahead: lanes * E::STEP,
                        };
                        run(isa, &p);
                        for r in 0..rows {
                            for n in 0..lanes {
                                let dot: f64 = (0..inner)
                                    .map(|k| f64::from(a[r * inner + k]) * f64::from(at(k, n).to_f32()))
                                    .sum();
                                let want = dot + if accumulate { 3.0 } else { 0.0 };
                                assert!((f64::from(c[r * lanes + n]) - want).abs() < 1e-4, "{isa:?} {rows}x{groups}");
                            }
                        }
                        // The same row with fewer beside it gives the same bits.
                        let fewer = if isa == Isa::Amx && rows > FEW_ROWS { FEW_ROWS + 1 } else { 1 };
                        for r in [0, rows - fewer] {
                            let mut some = vec![3.0f32; fewer * lanes];
                            let a = a[r * inner..].as_ptr();
                            run(isa, &Product { rows: fewer, a, c: some.as_mut_ptr(), ..p });
                            assert_eq!(some, c[r * lanes..(r + fewer) * lanes], "{isa:?} row {r} of {rows}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn products_agree_with_double_precision_and_rows_are_independent() {
        check::<f32>(|isa, p| simd_dispatch!(isa, run_f32, &Product<f32>, p));
        check::<bf16>(|isa, p| simd_dispatch!(isa, run_bf16, &Product<bf16>, p));
    }
}
