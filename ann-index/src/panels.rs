//! Many inner products at once: rows against panels of 64 transposed rows.
//!
//! The register kernel holds a tile of 6 x 64 sums. Every sum runs over the dimension in order, so a
//! product does not depend on the rows beside it.

use crate::isa::Isa;

/// Rows of a panel.
pub(crate) const WIDTH: usize = 64;
/// Rows of a tile.
pub(crate) const HEIGHT: usize = 6;
/// The products of a tile: `[HEIGHT][WIDTH]`.
pub(crate) type Tile = [[f32; WIDTH]; HEIGHT];

/// Rows, transposed in panels `[dim][64]`; rows that fill up the last panel are zero.
pub(crate) struct Panels {
    dim: usize,
    rows: usize,
    data: Vec<f32>,
}

impl Panels {
    /// Packs `rows`, rows of `dim` numbers.
    pub(crate) fn new(dim: usize, rows: &[f32]) -> Self {
        let count = rows.len() / dim;
        let mut data = vec![0.0; count.div_ceil(WIDTH) * WIDTH * dim];
        for (panel, rows) in data.chunks_exact_mut(WIDTH * dim).zip(rows.chunks(WIDTH * dim)) {
            for (column, row) in rows.chunks_exact(dim).enumerate() {
                for (i, &x) in row.iter().enumerate() {
                    panel[i * WIDTH + column] = x;
                }
            }
        }
        Self { dim, rows: count, data }
    }

    /// A row, unpacked.
    pub(crate) fn row(&self, at: usize) -> Vec<f32> {
        let panel = &self.data[at / WIDTH * WIDTH * self.dim..][..WIDTH * self.dim];
        panel.iter().skip(at % WIDTH).step_by(WIDTH).copied().collect()
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        4 * self.data.len()
    }

    /// The panels, each with the number of its first row and how many rows it has.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, usize, &[f32])> {
        let panels = self.data.chunks_exact(WIDTH * self.dim).enumerate();
        panels.map(|(i, panel)| (i * WIDTH, WIDTH.min(self.rows - i * WIDTH), panel))
    }
}

/// The products of up to [`HEIGHT`] rows of `dim` numbers with a panel, into the first rows of `tile`.
#[inline]
pub(crate) fn multiply(isa: Isa, dim: usize, rows: &[f32], panel: &[f32], tile: &mut Tile) {
    assert_eq!(panel.len(), dim * WIDTH, "a whole panel");
    let count = rows.len() / dim;
    assert!(count <= HEIGHT, "at most a tile");
    // Short tiles read their first row again: the kernel has one shape.
    let pointers: [&[f32]; HEIGHT] = std::array::from_fn(|i| {
        let at = if i < count { i } else { 0 };
        &rows[at * dim..(at + 1) * dim]
    });
    match isa {
        Isa::Scalar => multiply_by::<8, false>(&pointers, panel, tile),
        // SAFETY: `Isa` has only values whose features this machine has.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { x86::multiply_avx2(&pointers, panel, tile) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { x86::multiply_avx512(&pointers, panel, tile) },
    }
}

/// The portable body: strips of `STRIP` columns.
#[inline(always)]
fn multiply_by<const STRIP: usize, const FMA: bool>(rows: &[&[f32]; HEIGHT], panel: &[f32], tile: &mut Tile) {
    for start in (0..WIDTH).step_by(STRIP) {
        let mut sums = [[0.0f32; STRIP]; HEIGHT];
        for (i, line) in panel.chunks_exact(WIDTH).enumerate() {
            let line = &line[start..start + STRIP];
            for (sums, row) in sums.iter_mut().zip(rows) {
                let x = row[i];
                for (sum, &y) in sums.iter_mut().zip(line) {
                    *sum = if FMA { x.mul_add(y, *sum) } else { *sum + x * y };
                }
            }
        }
        for (to, from) in tile.iter_mut().zip(&sums) {
            to[start..start + STRIP].copy_from_slice(from);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{HEIGHT, Tile, WIDTH, multiply_by};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn multiply_avx2(rows: &[&[f32]; HEIGHT], panel: &[f32], tile: &mut Tile) {
        multiply_by::<16, true>(rows, panel, tile);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    pub(super) fn multiply_avx512(rows: &[&[f32]; HEIGHT], panel: &[f32], tile: &mut Tile) {
        let mut sums = [[_mm512_setzero_ps(); 4]; HEIGHT];
        let dim = panel.len() / WIDTH;
        assert!(rows.iter().all(|row| row.len() == dim), "rows of one dimension");
        for i in 0..dim {
            // SAFETY: `i < dim`, so the 64 numbers from `64 i` on and number `i` of each row exist.
            unsafe {
                let line = panel.as_ptr().add(i * WIDTH);
                let y: [__m512; 4] = std::array::from_fn(|j| _mm512_loadu_ps(line.add(16 * j)));
                for (sums, row) in sums.iter_mut().zip(rows) {
                    let x = _mm512_set1_ps(*row.as_ptr().add(i));
                    for (sum, y) in sums.iter_mut().zip(y) {
                        *sum = _mm512_fmadd_ps(x, y, *sum);
                    }
                }
            }
        }
        for (to, from) in tile.iter_mut().zip(sums) {
            for (to, from) in to.chunks_exact_mut(16).zip(from) {
                // SAFETY: sixteen places.
                unsafe { _mm512_storeu_ps(to.as_mut_ptr(), from) };
            }
        }
    }
}

/// Which of the numbers are above the threshold, the first in the lowest bit.
#[inline]
pub(crate) fn above(isa: Isa, numbers: &[f32; WIDTH], threshold: f32) -> u64 {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Isa` has only values whose features this machine has.
        Isa::Avx512 => unsafe { above_avx512(numbers, threshold) },
        _ => numbers.iter().enumerate().fold(0, |bits, (i, &x)| bits | u64::from(x > threshold) << i),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn above_avx512(numbers: &[f32; WIDTH], threshold: f32) -> u64 {
    use std::arch::x86_64::*;
    let threshold = _mm512_set1_ps(threshold);
    let mut bits = 0;
    for (i, sixteen) in numbers.chunks_exact(16).enumerate() {
        // SAFETY: sixteen numbers.
        let x = unsafe { _mm512_loadu_ps(sixteen.as_ptr()) };
        bits |= u64::from(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, threshold)) << (16 * i);
    }
    bits
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(30))]
        #[test]
        fn products_agree_with_f64(
            dim in 1usize..40, height in 1usize..=HEIGHT, count in 1usize..150,
            numbers in prop::collection::vec(-8.0f32..8.0, 6000),
            threshold in -50.0f32..50.0,
        ) {
            let (a, b) = numbers.split_at(height * dim);
            let b = &b[..count.min(b.len() / dim) * dim];
            let panels = Panels::new(dim, b);
            for (i, row) in b.chunks(dim).enumerate() {
                prop_assert_eq!(panels.row(i), row);
            }
            for isa in Isa::available() {
                let mut seen = 0;
                for (start, len, panel) in panels.iter() {
                    let mut tile = [[f32::NAN; WIDTH]; HEIGHT];
                    multiply(isa, dim, a, panel, &mut tile);
                    prop_assert_eq!(start, seen);
                    seen += len;
                    for (x, line) in a.chunks(dim).zip(&tile) {
                        for (y, &got) in b[start * dim..].chunks(dim).zip(&line[..len]) {
                            let exact: f64 = x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
                            prop_assert!((f64::from(got) - exact).abs() < 1e-3);
                        }
                        let bits = above(isa, line, threshold);
                        for (i, &x) in line.iter().enumerate() {
                            prop_assert_eq!(bits >> i & 1 == 1, x > threshold);
                        }
                    }
                }
                prop_assert_eq!(seen * dim, b.len());
            }
        }
    }
}
