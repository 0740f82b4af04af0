//! A page of KV: 256 consecutive tokens of one layer, all heads, laid out for the register kernel.
//!
//! For each KV head, first K as `[256 / 16][head_dim / s][16][s]`, then V as `[256 / s][head_dim][s]`,
//! where `s` is the elements of a step: 2 in bf16, 1 in f32. One vector load of K is one step of
//! `head_dim` for sixteen keys; one vector load of V is one step of tokens for sixteen dimensions.
//! Neither prefill nor decode has to repack anything.

use half::bf16;

use super::{KvDtype, KvShape};
use crate::backend::cpu::micro::Element;
use crate::backend::cpu::simd::LANES;

/// Tokens of a page.
pub(crate) const PAGE: usize = 256;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

#[derive(Clone)]
pub(crate) struct Page {
    lines: Box<[Line]>,
}

/// A storage type with the dtype that names it.
pub(crate) trait KvElement: Element {
    const DTYPE: KvDtype;
}
impl KvElement for f32 {
    const DTYPE: KvDtype = KvDtype::F32;
}
impl KvElement for bf16 {
    const DTYPE: KvDtype = KvDtype::Bf16;
}

impl Page {
    /// Bytes of a page of `shape` (one layer).
    pub(crate) fn bytes(shape: &KvShape) -> usize {
        2 * PAGE * shape.kv_heads * shape.head_dim * shape.dtype.size()
    }

    /// Zeros: what is not yet written must be finite, since masked values are multiplied by zero.
    pub(crate) fn zeroed(shape: &KvShape) -> Page {
        Page { lines: vec![Line([0; 64]); Page::bytes(shape).div_ceil(64)].into_boxed_slice() }
    }

    fn elements<E: KvElement>(&self) -> &[E] {
        let n = self.lines.len() * 64 / size_of::<E>();
        // SAFETY: plain bytes, 64-byte aligned, and every bit pattern is a value of f32 and bf16.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), n) }
    }

    fn elements_mut<E: KvElement>(&mut self) -> &mut [E] {
        let n = self.lines.len() * 64 / size_of::<E>();
        // SAFETY: as in `elements`, borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), n) }
    }

    /// K and V of one head in the layouts above.
    pub(crate) fn head<E: KvElement>(&self, shape: &KvShape, head: usize) -> (&[E], &[E]) {
        let size = PAGE * shape.head_dim;
        self.elements::<E>()[2 * head * size..2 * (head + 1) * size].split_at(size)
    }

    /// Writes the token in `slot`: rotated keys and values, `[kv_heads, head_dim]` each.
    pub(crate) fn write(&mut self, shape: &KvShape, slot: usize, keys: &[f32], values: &[f32]) {
        match shape.dtype {
            KvDtype::F32 => self.write_as::<f32>(shape, slot, keys, values),
            KvDtype::Bf16 => self.write_as::<bf16>(shape, slot, keys, values),
        }
    }

    fn write_as<E: KvElement>(&mut self, shape: &KvShape, slot: usize, keys: &[f32], values: &[f32]) {
        let dim = shape.head_dim;
        let size = PAGE * dim;
        let rows = keys.chunks_exact(dim).zip(values.chunks_exact(dim));
        for (out, (keys, values)) in self.elements_mut::<E>().chunks_exact_mut(2 * size).zip(rows) {
            let (k, v) = out.split_at_mut(size);
            for d in 0..dim {
                k[key_at::<E>(dim, slot, d)] = E::from_f32(keys[d]);
                v[value_at::<E>(dim, slot, d)] = E::from_f32(values[d]);
            }
        }
    }

    /// Reads the token in `slot` back for one head.
    pub(crate) fn read(&self, shape: &KvShape, head: usize, slot: usize, key: &mut [f32], value: &mut [f32]) {
        match shape.dtype {
            KvDtype::F32 => self.read_as::<f32>(shape, head, slot, key, value),
            KvDtype::Bf16 => self.read_as::<bf16>(shape, head, slot, key, value),
        }
    }

    /// Reads the token in `slot` back, all heads: `[kv_heads, head_dim]` each.
    pub(crate) fn read_all(&self, shape: &KvShape, slot: usize, keys: &mut [f32], values: &mut [f32]) {
        let rows = keys.chunks_exact_mut(shape.head_dim).zip(values.chunks_exact_mut(shape.head_dim));
        for (head, (key, value)) in rows.enumerate() {
            self.read(shape, head, slot, key, value);
        }
    }

    fn read_as<E: KvElement>(&self, shape: &KvShape, head: usize, slot: usize, key: &mut [f32], value: &mut [f32]) {
        let dim = shape.head_dim;
        let (k, v) = self.head::<E>(shape, head);
        for d in 0..dim {
            key[d] = k[key_at::<E>(dim, slot, d)].to_f32();
            value[d] = v[value_at::<E>(dim, slot, d)].to_f32();
        }
    }
}

#[inline(always)]
fn key_at<E: Element>(dim: usize, slot: usize, d: usize) -> usize {
    (slot / LANES) * LANES * dim + (d / E::STEP) * LANES * E::STEP + (slot % LANES) * E::STEP + d % E::STEP
}

#[inline(always)]
fn value_at<E: Element>(dim: usize, slot: usize, d: usize) -> usize {
    (slot / E::STEP) * dim * E::STEP + d * E::STEP + slot % E::STEP
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_comes_back_rounded_and_the_others_stay() {
        for dtype in [KvDtype::F32, KvDtype::Bf16] {
            let shape = KvShape { layers: 1, kv_heads: 3, head_dim: 16, dtype };
            let number = |slot: usize, i: usize| ((slot * 7919 + i * 104_729) % 2003) as f32 / 77.7 - 12.0;
            let row = |slot: usize, side: usize| -> Vec<f32> {
                (0..shape.width()).map(|i| number(slot, 2 * i + side)).collect()
            };
            let mut page = Page::zeroed(&shape);
            // Every second slot, in no order.
            let slots: Vec<usize> = (0..PAGE / 2).map(|i| i * 77 % (PAGE / 2) * 2).collect();
            slots.iter().for_each(|&slot| page.write(&shape, slot, &row(slot, 0), &row(slot, 1)));
            for slot in 0..PAGE {
                let wanted = |side, head: usize, d: usize| {
                    let x = if slot % 2 == 0 { row(slot, side)[head * 16 + d] } else { 0.0 };
                    if dtype == KvDtype::Bf16 { bf16::from_f32(x).to_f32() } else { x }
                };
                for head in 0..shape.kv_heads {
                    let (mut key, mut value) = (vec![9.0; 16], vec![9.0; 16]);
                    page.read(&shape, head, slot, &mut key, &mut value);
                    for d in 0..16 {
                        assert_eq!((key[d], value[d]), (wanted(0, head, d), wanted(1, head, d)), "{dtype:?} {slot}");
                    }
                }
            }
        }
    }
}
