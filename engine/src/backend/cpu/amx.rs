//! Matrix tiles of the CPU (Intel AMX, bf16): the register kernel's product on machines that have them.
//!
//! `A` is split into two bf16 numbers, `x = hi + lo`, whose products with bf16 are exact in f32: what is lost is 2^-16 of
//! an input, not the 2^-9 of rounding it to bf16. Tiles do 16 times the operations of AVX-512, so that twice the products
//! still are much the faster way.
//!
//! The layouts of packed weights, keys and values are tiles already: sixteen steps of a group are the sixteen rows
//! of a B tile (Intel 64 and IA-32 Architectures Optimization Reference Manual, chapter on AMX). Each output is summed over the inner
//! dimension in order, `hi` before `lo` in each tile, whatever the number of rows: a row's result does not depend on
//! which rows share the call.

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::{Cell, RefCell};
use std::mem::MaybeUninit;
use std::sync::OnceLock;

use half::bf16;

use super::micro::Product;
use super::simd::LANES;

/// Rows of a tile of A and C, and steps (pairs) of a tile of B.
const ROWS: usize = 16;
/// Inner elements of a tile: sixteen pairs.
const INNER: usize = 32;
/// Bytes of a tile.
const TILE: usize = 1024;
/// Bytes of a row of a tile.
const ROW_BYTES: usize = 64;

/// Whether this process may use tiles. Asks the system for them once.
pub(crate) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        let converts = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16");
        converts && has_tiles() && permitted()
    })
}

fn has_tiles() -> bool {
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    if __cpuid(0).eax < 7 || !is_x86_feature_detected!("xsave") {
        return false;
    }
    let wanted = AMX_BF16 | AMX_TILE;
    __cpuid_count(7, 0).edx & wanted == wanted
}

/// Linux hands out the tiles' 8 KiB of state only to processes that ask (Documentation/arch/x86/xstate.rst).
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two integers and changes nothing but this process's permission.
    cfg!(target_os = "linux")
        && unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) } == 0
}

/// Shapes the tiles of this thread: all eight have sixteen rows of 64 bytes.
fn configure() {
    thread_local!(static CONFIGURED: Cell<bool> = const { Cell::new(false) });
    #[repr(C, align(64))]
    struct Config {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }
    if CONFIGURED.replace(true) {
        return;
    }
    let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    config.row_bytes[..8].fill(ROW_BYTES as u16);
    config.rows[..8].fill(ROWS as u8);
    // SAFETY: tiles exist (callers checked), and the configuration is 64 valid bytes.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) }
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Tile([u16; TILE / 2]);

/// A matrix `A` as tiles: `[rows / 16][inner / 32][hi, lo]`. Missing inner elements are zeros; rows beyond the last hold
/// anything, and so do their results, which are never stored.
#[derive(Default)]
pub(crate) struct Packed {
    tiles: Vec<Tile>,
    rows: usize,
    /// Tiles along the inner dimension.
    depth: usize,
}

impl Packed {
    /// Takes `rows` rows of `inner` numbers, `stride` apart, from `a`.
    ///
    /// # Safety
    /// `a` covers these rows, and tiles are [`available`].
    pub(crate) unsafe fn fill(&mut self, a: *const f32, rows: usize, inner: usize, stride: usize) {
        (self.rows, self.depth) = (rows, inner.div_ceil(INNER));
        let tiles = rows.div_ceil(ROWS) * self.depth * 2;
        if self.tiles.len() < tiles {
            self.tiles.resize(tiles, Tile([0; TILE / 2]));
        }
        // SAFETY: the machine has what the function is compiled for; the extents are the caller's.
        unsafe { split_rows(a, rows, inner, stride, self.depth, &mut self.tiles) }
    }
}

/// Splits each number into its upper half and the nearest bf16 of the rest.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn split_rows(a: *const f32, rows: usize, inner: usize, stride: usize, depth: usize, tiles: &mut [Tile]) {
    let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    // The odd ones of 64 numbers of 16 bits: the upper halves of two vectors.
    let odd: [u16; INNER] = std::array::from_fn(|i| 2 * i as u16 + 1);
    // SAFETY: 64 bytes of an array.
    let odd = unsafe { _mm512_loadu_si512(odd.as_ptr().cast()) };
    assert!(tiles.len() >= rows.div_ceil(ROWS) * depth * 2, "room for all tiles");
    for row in 0..rows {
        let from = a.wrapping_add(row * stride);
        let to = tiles[row / ROWS * depth * 2..].as_mut_ptr().cast::<u16>().wrapping_add(row % ROWS * INNER);
        for k in 0..depth {
            let mask = |first: usize| ((1u32 << inner.saturating_sub(first).min(LANES)) - 1) as __mmask16;
            // SAFETY: only the masked lanes are read, which lie in the row; the tiles hold `depth` pairs a block.
            unsafe {
                let first = k * INNER;
                let x = _mm512_maskz_loadu_ps(mask(first), from.wrapping_add(first));
                let y = _mm512_maskz_loadu_ps(mask(first + LANES), from.wrapping_add(first + LANES));
                let (u, v) = (_mm512_castps_si512(x), _mm512_castps_si512(y));
                let upper = |x| _mm512_castsi512_ps(_mm512_and_si512(x, high));
                let rest = _mm512_cvtne2ps_pbh(_mm512_sub_ps(y, upper(v)), _mm512_sub_ps(x, upper(u)));
                let to = to.add(k * TILE);
                _mm512_store_si512(to.cast(), _mm512_permutex2var_epi16(u, odd, v));
                _mm512_store_si512(to.add(TILE / 2).cast(), std::mem::transmute::<__m512bh, __m512i>(rest));
            }
        }
    }
}

/// Computes `p`, whose `a` is packed on the way.
///
/// # Safety
/// As of [`super::micro::product`]; tiles are [`available`].
pub(crate) unsafe fn product(p: &Product<bf16>) {
    thread_local!(static PACKED: RefCell<Packed> = RefCell::default());
    PACKED.with_borrow_mut(|packed| {
        // SAFETY: the caller's contract.
        unsafe {
            packed.fill(p.a, p.rows, p.steps * 2, p.a_stride);
            product_packed(packed, p);
        }
    });
}

/// Computes `p` with `a` in the place of its own.
///
/// # Safety
/// As of [`super::micro::product`]; `a` was filled with `p.rows` rows of `p.steps` steps; tiles are [`available`].
pub(crate) unsafe fn product_packed(a: &Packed, p: &Product<bf16>) {
    debug_assert!(a.rows == p.rows && a.depth == p.steps.div_ceil(ROWS));
    configure();
    let blocks = p.rows.div_ceil(ROWS);
    let mut group = 0;
    while group < p.groups {
        let mut block = 0;
        // SAFETY: blocks and groups stay inside the product's extents.
        unsafe {
            if group + 2 <= p.groups {
                while block + 2 <= blocks {
                    Patch::<2, 2> { a, p, block, group }.run();
                    block += 2;
                }
            }
            let few = blocks == 1 && group + 4 <= p.groups;
            if few {
                Patch::<1, 4> { a, p, block, group }.run();
                block += 1;
            }
            let columns = if few { 4 } else { 2.min(p.groups - group) };
            while block < blocks {
                for group in group..group + columns {
                    Patch::<1, 1> { a, p, block, group }.run();
                }
                block += 1;
            }
            group += columns;
        }
    }
}

/// `R` blocks of rows times `C` groups of columns: one accumulator tile each.
struct Patch<'a, const R: usize, const C: usize> {
    a: &'a Packed,
    p: &'a Product<bf16>,
    block: usize,
    group: usize,
}

/// What the loops over the inner dimension need. Strides in bytes.
struct Loop {
    /// Tiles of A of each block of rows.
    a: [*const Tile; 2],
    /// First tiles of B of each group.
    b: [*const bf16; 4],
    b_row: usize,
    b_next: usize,
    depth: usize,
    c: *mut f32,
    c_row: usize,
    /// 1: begin with what C holds; 0: with zeros.
    accumulate: usize,
}

impl<const R: usize, const C: usize> Patch<'_, R, C> {
    #[inline(always)]
    unsafe fn run(&self) {
        let p = self.p;
        let row = self.block * ROWS;
        // SAFETY: inside C by the caller's contract.
        let c = unsafe { p.c.add(row * p.c_stride + self.group * LANES) };
        let whole = row + R * ROWS <= p.rows;
        let tail = !p.steps.is_multiple_of(ROWS);
        if whole && !tail {
            // SAFETY: all rows of the tiles are rows of C, all steps steps of B.
            return unsafe { self.steps(p.steps / ROWS, 0, c, p.c_stride, p.accumulate) };
        }
        let rows = (p.rows - row).min(R * ROWS);
        let mut beside = MaybeUninit::<[f32; 4 * ROWS * LANES]>::uninit();
        let beside = beside.as_mut_ptr().cast::<f32>();
        let lanes = C * LANES;
        // SAFETY: `rows` rows of C, `lanes` wide, belong to this patch; `beside` holds R * C tiles.
        unsafe {
            if p.accumulate {
                for r in 0..rows {
                    std::ptr::copy_nonoverlapping(c.add(r * p.c_stride), beside.add(r * lanes), lanes);
                }
            }
            let full = p.steps / ROWS;
            self.steps(full, 0, beside, lanes, p.accumulate);
            if tail {
                self.last_steps(full, beside, lanes);
            }
            for r in 0..rows {
                std::ptr::copy_nonoverlapping(beside.add(r * lanes), c.add(r * p.c_stride), lanes);
            }
        }
    }

    /// The tiles of B from `first` on, `depth` of them.
    #[inline(always)]
    unsafe fn steps(&self, depth: usize, first: usize, c: *mut f32, c_stride: usize, accumulate: bool) {
        let p = self.p;
        let b = |n: usize| p.b.wrapping_add((self.group + n.min(C - 1)) * p.b_group + first * ROWS * p.b_step);
        let patch = Loop {
            a: [self.tiles(0, first), self.tiles(R - 1, first)],
            b: [b(0), b(1), b(2), b(3)],
            b_row: p.b_step * 2,
            b_next: ROWS * p.b_step * 2,
            depth,
            c,
            c_row: c_stride * 4,
            accumulate: usize::from(accumulate),
        };
        // SAFETY: the extents are the caller's.
        unsafe { patch.dispatch::<R, C>() }
    }

    /// The steps that do not fill a tile: from a copy of B that is padded with zeros.
    #[inline(never)]
    unsafe fn last_steps(&self, first: usize, c: *mut f32, c_stride: usize) {
        let p = self.p;
        let mut tiles = [Tile([0; TILE / 2]); 4];
        for (n, tile) in tiles.iter_mut().enumerate().take(C) {
            let from = p.b.wrapping_add((self.group + n) * p.b_group + first * ROWS * p.b_step);
            for step in 0..p.steps % ROWS {
                // SAFETY: a step of the group, 32 numbers, is inside B.
                let row = unsafe { std::slice::from_raw_parts(from.add(step * p.b_step).cast::<u16>(), INNER) };
                tile.0[step * INNER..(step + 1) * INNER].copy_from_slice(row);
            }
        }
        let b = |n: usize| tiles[n.min(C - 1)].0.as_ptr().cast::<bf16>();
        let patch = Loop {
            a: [self.tiles(0, first), self.tiles(R - 1, first)],
            b: [b(0), b(1), b(2), b(3)],
            b_row: ROW_BYTES,
            b_next: 0,
            depth: 1,
            c,
            c_row: c_stride * 4,
            accumulate: 1,
        };
        // SAFETY: C is the caller's, B the copies above.
        unsafe { patch.dispatch::<R, C>() }
    }

    fn tiles(&self, block: usize, first: usize) -> *const Tile {
        let at = ((self.block + block) * self.a.depth + first) * 2;
        // With no steps at all the place behind the last tile is named, and not read.
        self.a.tiles.as_ptr().wrapping_add(at)
    }
}

impl Loop {
    #[inline(always)]
    unsafe fn dispatch<const R: usize, const C: usize>(self) {
        // SAFETY: the caller's.
        unsafe {
            match (R, C) {
                (2, 2) => self.two_by_two(),
                (1, 4) => self.one_by_four(),
                _ => self.one_by_one(),
            }
        }
    }

    /// Many rows: 8 products of tiles for 6 loads. Four products lie between two into the same accumulator, which hides most
    /// of their latency.
    #[inline(always)]
    unsafe fn two_by_two(self) {
        // SAFETY: the caller vouches for the extents; tiles are configured, and all eight are declared.
        unsafe {
            asm!(
                "test {accumulate}, {accumulate}",
                "jz 2f",
                "tileloadd tmm0, [{c0} + {c_row}]",
                "tileloadd tmm1, [{c0} + {c_row} + 64]",
                "tileloadd tmm2, [{c1} + {c_row}]",
                "tileloadd tmm3, [{c1} + {c_row} + 64]",
                "jmp 3f",
                "2:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "3:",
                "test {depth}, {depth}",
                "jz 5f",
                "4:",
                "tileloadd tmm6, [{b0} + {b_row}]",
                "tileloadd tmm4, [{a0} + {a_row}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b1} + {b_row}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a1} + {a_row}]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "tileloadd tmm4, [{a0} + {a_row} + 1024]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a1} + {a_row} + 1024]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a0}, 2048",
                "add {a1}, 2048",
                "add {b0}, {b_next}",
                "add {b1}, {b_next}",
                "dec {depth}",
                "jnz 4b",
                "5:",
                "tilestored [{c0} + {c_row}], tmm0",
                "tilestored [{c0} + {c_row} + 64], tmm1",
                "tilestored [{c1} + {c_row}], tmm2",
                "tilestored [{c1} + {c_row} + 64], tmm3",
                a0 = inout(reg) self.a[0] => _,
                a1 = inout(reg) self.a[1] => _,
                a_row = in(reg) ROW_BYTES,
                b0 = inout(reg) self.b[0] => _,
                b1 = inout(reg) self.b[1] => _,
                b_row = in(reg) self.b_row,
                b_next = in(reg) self.b_next,
                depth = inout(reg) self.depth => _,
                c0 = in(reg) self.c,
                c1 = in(reg) self.c.wrapping_add(self.c_row / 4 * ROWS),
                c_row = in(reg) self.c_row,
                accumulate = in(reg) self.accumulate,
                out("tmm0") _,
                out("tmm1") _,
                out("tmm2") _,
                out("tmm3") _,
                out("tmm4") _,
                out("tmm5") _,
                out("tmm6") _,
                out("tmm7") _,
                options(nostack),
            )
        }
    }

    /// Few rows: B decides, and is read in four streams.
    #[inline(always)]
    unsafe fn one_by_four(self) {
        // SAFETY: the caller vouches for the extents; tiles are configured, and all eight are declared.
        unsafe {
            asm!(
                "test {accumulate}, {accumulate}",
                "jz 2f",
                "tileloadd tmm0, [{c0} + {c_row}]",
                "tileloadd tmm1, [{c0} + {c_row} + 64]",
                "tileloadd tmm2, [{c0} + {c_row} + 128]",
                "tileloadd tmm3, [{c0} + {c_row} + 192]",
                "jmp 3f",
                "2:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "3:",
                "test {depth}, {depth}",
                "jz 5f",
                "4:",
                "tileloadd tmm4, [{a0} + {a_row}]",
                "tileloadd tmm5, [{a0} + {a_row} + 1024]",
                "tileloadd tmm6, [{b0} + {b_row}]",
                "tileloadd tmm7, [{b1} + {b_row}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm0, tmm5, tmm6",
                "tdpbf16ps tmm1, tmm5, tmm7",
                "tileloadd tmm6, [{b2} + {b_row}]",
                "tileloadd tmm7, [{b3} + {b_row}]",
                "tdpbf16ps tmm2, tmm4, tmm6",
                "tdpbf16ps tmm3, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a0}, 2048",
                "add {b0}, {b_next}",
                "add {b1}, {b_next}",
                "add {b2}, {b_next}",
                "add {b3}, {b_next}",
                "dec {depth}",
                "jnz 4b",
                "5:",
                "tilestored [{c0} + {c_row}], tmm0",
                "tilestored [{c0} + {c_row} + 64], tmm1",
                "tilestored [{c0} + {c_row} + 128], tmm2",
                "tilestored [{c0} + {c_row} + 192], tmm3",
                a0 = inout(reg) self.a[0] => _,
                a_row = in(reg) ROW_BYTES,
                b0 = inout(reg) self.b[0] => _,
                b1 = inout(reg) self.b[1] => _,
                b2 = inout(reg) self.b[2] => _,
                b3 = inout(reg) self.b[3] => _,
                b_row = in(reg) self.b_row,
                b_next = in(reg) self.b_next,
                depth = inout(reg) self.depth => _,
                c0 = in(reg) self.c,
                c_row = in(reg) self.c_row,
                accumulate = in(reg) self.accumulate,
                out("tmm0") _,
                out("tmm1") _,
                out("tmm2") _,
                out("tmm3") _,
                out("tmm4") _,
                out("tmm5") _,
                out("tmm6") _,
                out("tmm7") _,
                options(nostack),
            )
        }
    }

    /// What is left over by odd numbers.
    #[inline(always)]
    unsafe fn one_by_one(self) {
        // SAFETY: the caller vouches for the extents; tiles are configured, and all eight are declared.
        unsafe {
            asm!(
                "test {accumulate}, {accumulate}",
                "jz 2f",
                "tileloadd tmm0, [{c0} + {c_row}]",
                "jmp 3f",
                "2:",
                "tilezero tmm0",
                "3:",
                "test {depth}, {depth}",
                "jz 5f",
                "4:",
                "tileloadd tmm4, [{a0} + {a_row}]",
                "tileloadd tmm5, [{a0} + {a_row} + 1024]",
                "tileloadd tmm6, [{b0} + {b_row}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm0, tmm5, tmm6",
                "add {a0}, 2048",
                "add {b0}, {b_next}",
                "dec {depth}",
                "jnz 4b",
                "5:",
                "tilestored [{c0} + {c_row}], tmm0",
                a0 = inout(reg) self.a[0] => _,
                a_row = in(reg) ROW_BYTES,
                b0 = inout(reg) self.b[0] => _,
                b_row = in(reg) self.b_row,
                b_next = in(reg) self.b_next,
                depth = inout(reg) self.depth => _,
                c0 = in(reg) self.c,
                c_row = in(reg) self.c_row,
                accumulate = in(reg) self.accumulate,
                out("tmm0") _,
                out("tmm1") _,
                out("tmm2") _,
                out("tmm3") _,
                out("tmm4") _,
                out("tmm5") _,
                out("tmm6") _,
                out("tmm7") _,
                options(nostack),
            )
        }
    }
}
