//! Row-wise operations: RMSNorm, SwiGLU, rotation, rounding to bf16.

use half::bf16;

use super::Cpu;
use super::pool::Shards;
use super::simd::{LANES, Simd, simd_dispatch};

/// Rows per task: enough work to pay for handing it out.
const ROWS: usize = 32;

impl Cpu {
    /// `f(row)` for all rows, on all threads when there are many.
    pub(crate) fn rows(&self, rows: usize, f: impl Fn(usize) + Sync) {
        self.pool.ranges(rows, rows.div_ceil(ROWS), |r| r.for_each(&f));
    }

    /// RMSNorm: `out = x / sqrt(mean(x^2) + eps) * weight` for rows of `weight.len()`
    /// (Zhang & Sennrich 2019, eq. 4).
    pub(crate) fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let width = weight.len();
        let rows = x.len() / width;
        let shards = Shards::new(out);
        self.rows(rows, |r| {
            // SAFETY: one part a row.
            let out = unsafe { shards.part(r * width..(r + 1) * width) };
            let args = NormRow { x: &x[r * width..(r + 1) * width], weight, eps, out };
            simd_dispatch!(self.isa, norm_row, NormRow<'_>, args);
        });
    }

    /// `out = silu(gate) * up` for rows `[gate | up]` of `2 * width`.
    pub(crate) fn swiglu(&self, gate_up: &[f32], width: usize, out: &mut [f32]) {
        let rows = out.len() / width;
        let shards = Shards::new(out);
        self.rows(rows, |r| {
            // SAFETY: one part a row.
            let out = unsafe { shards.part(r * width..(r + 1) * width) };
            let row = &gate_up[2 * r * width..2 * (r + 1) * width];
            let args = SwigluRow { gate: &row[..width], up: &row[width..], out };
            simd_dispatch!(self.isa, swiglu_row, SwigluRow<'_>, args);
        });
    }
}

struct NormRow<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

#[inline(always)]
unsafe fn norm_row<S: Simd>(a: NormRow<'_>) {
    let n = a.x.len();
    let body = n - n % LANES;
    // SAFETY: all loads and stores are below `body`, within the three slices of length n.
    unsafe {
        let mut squares = S::zero();
        for i in (0..body).step_by(LANES) {
            let x = S::load(a.x.as_ptr().add(i));
            squares = S::fma(x, x, squares);
        }
        let tail: f32 = a.x[body..].iter().map(|x| x * x).sum();
        let scale = 1.0 / ((S::sum(squares) + tail) / n as f32 + a.eps).sqrt();
        let s = S::splat(scale);
        for i in (0..body).step_by(LANES) {
            let x = S::mul(S::load(a.x.as_ptr().add(i)), s);
            S::store(a.out.as_mut_ptr().add(i), S::mul(x, S::load(a.weight.as_ptr().add(i))));
        }
        for i in body..n {
            a.out[i] = a.x[i] * scale * a.weight[i];
        }
    }
}

struct SwigluRow<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

#[inline(always)]
unsafe fn swiglu_row<S: Simd>(a: SwigluRow<'_>) {
    let n = a.out.len();
    let body = n - n % LANES;
    // SAFETY: all loads and stores are below `body`, within the three slices of length n.
    unsafe {
        let one = S::splat(1.0);
        let log2e = S::splat(-std::f32::consts::LOG2_E);
        for i in (0..body).step_by(LANES) {
            let g = S::load(a.gate.as_ptr().add(i));
            let e = S::exp2(S::mul(g, log2e));
            let silu = S::div(g, S::add(one, e));
            S::store(a.out.as_mut_ptr().add(i), S::mul(silu, S::load(a.up.as_ptr().add(i))));
        }
    }
    for i in body..n {
        a.out[i] = a.gate[i] / (1.0 + (-a.gate[i]).exp()) * a.up[i];
    }
}

/// Rounds each value to bf16 and back.
pub(crate) fn round_bf16(x: &mut [f32]) {
    for x in x {
        *x = bf16::from_f32(*x).to_f32();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919) % 1009) as f32 / 100.0 - 5.0).collect()
    }

    #[test]
    fn a_number_is_rounded_to_the_nearest_of_bf16_and_between_two_to_the_even_one() {
        let rounded = |x: f32| {
            let mut x = [x];
            round_bf16(&mut x);
            x[0]
        };
        for sign in [1.0, -1.0] {
            // 129/128 is the number behind 1; halfway to it the even neighbour is taken, which alternates.
            for (x, wanted) in [(1.0 + 1.0 / 256.0, 1.0), (1.0 + 3.0 / 256.0, 1.0 + 2.0 / 128.0)] {
                assert_eq!(rounded(sign * x), sign * wanted);
                assert_eq!(rounded(sign * (x + 1e-6)), sign * (x + 1.0 / 256.0), "a little more");
                assert_eq!(rounded(sign * (x - 1e-6)), sign * (x - 1.0 / 256.0), "a little less");
            }
        }
        for x in values(2000) {
            let below = f32::from_bits(x.to_bits() & 0xffff_0000);
            let above = f32::from_bits((x.to_bits() & 0xffff_0000) + 0x1_0000);
            let nearest = if (x - below).abs() <= (above - x).abs() { below } else { above };
            let tie = (x - below).abs() == (above - x).abs();
            assert!(tie || rounded(x) == nearest, "{x}: {} instead of {nearest}", rounded(x));
        }
        assert_eq!([rounded(0.0), rounded(f32::INFINITY)], [0.0, f32::INFINITY]);
        assert!(rounded(f32::NAN).is_nan());
    }

    #[test]
    fn norm_and_swiglu_agree_with_double_precision() {
        for isa in super::super::Isa::available() {
            let mut cpu = Cpu::new(2);
            cpu.isa = isa;
            for width in [1, 16, 40, 384] {
                let x = values(70 * width);
                let weight = values(width);
                let mut out = vec![0.0; x.len()];
                cpu.rms_norm(&x, &weight, 1e-5, &mut out);
                for (r, row) in x.chunks(width).enumerate() {
                    let ms = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64;
                    for i in 0..width {
                        let want = f64::from(row[i]) / (ms + 1e-5).sqrt() * f64::from(weight[i]);
                        assert!((f64::from(out[r * width + i]) - want).abs() < 1e-4);
                    }
                }
                let mut out = vec![0.0; 35 * width];
                cpu.swiglu(&x, width, &mut out);
                for (i, y) in out.iter().enumerate() {
                    let (r, c) = (i / width, i % width);
                    let g = f64::from(x[2 * r * width + c]);
                    let want = g / (1.0 + (-g).exp()) * f64::from(x[(2 * r + 1) * width + c]);
                    assert!((f64::from(*y) - want).abs() < 1e-4, "{isa:?} {width}");
                }
            }
        }
    }
}
