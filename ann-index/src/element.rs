//! Numbers as they are stored, and rows of them.

use half::{bf16, f16};

use crate::blocks::Plain;
use crate::error::IndexError;
use crate::params::KeyPrecision;

/// A number as it is stored. A stored row is its numbers and, where [`TAIL`](Element::TAIL) is not
/// 0, as many more places that hold the row's scale.
pub(crate) trait Element: Plain + Copy + Default + PartialEq {
    const PRECISION: KeyPrecision;
    /// Places of a row behind its numbers.
    const TAIL: usize = 0;
    /// The largest magnitude that can be stored.
    const LARGEST: f32 = f32::MAX;

    /// Rounds a row to the nearest stored numbers, ties to even; `out` has
    /// [`stride`](Element::stride) places.
    fn encode(row: &[f32], out: &mut [Self]);
    /// Refuses numbers that are too large to be stored, in rows of `dim`.
    fn check(dim: usize, values: &[f32]) -> Result<(), IndexError> {
        match values.iter().position(|x| x.abs() > Self::LARGEST) {
            None => Ok(()),
            Some(at) => {
                Err(IndexError::TooLarge { row: at / dim, column: at % dim, value: values[at], limit: Self::LARGEST })
            }
        }
    }
    /// The number, without the scale of its row.
    fn to_f32(self) -> f32;
    /// What the numbers of this stored row are multiplied with.
    #[inline]
    fn scale(_row: &[Self]) -> f32 {
        1.0
    }
    /// Places of a row of `dim` numbers.
    #[inline]
    fn stride(dim: usize) -> usize {
        dim + Self::TAIL
    }
    /// The numbers of a stored row.
    #[inline]
    fn numbers(row: &[Self]) -> &[Self] {
        &row[..row.len() - Self::TAIL]
    }
    /// Widens a stored row into `out`, one number a place.
    fn decode(row: &[Self], out: &mut [f32]) {
        let scale = Self::scale(row);
        for (to, from) in out.iter_mut().zip(Self::numbers(row)) {
            *to = from.to_f32() * scale;
        }
    }
    /// Adds the bytes of stored numbers, little-endian.
    fn append_bytes(numbers: &[Self], out: &mut Vec<u8>);
    /// The bits, equal for equal finite numbers except for the two zeros.
    fn bits(self) -> u32;
}

impl Element for f32 {
    fn append_bytes(numbers: &[Self], out: &mut Vec<u8>) {
        out.extend(numbers.iter().flat_map(|x| x.to_le_bytes()));
    }
    const PRECISION: KeyPrecision = KeyPrecision::F32;
    fn encode(row: &[f32], out: &mut [Self]) {
        out.copy_from_slice(row);
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
    fn append_bytes(numbers: &[Self], out: &mut Vec<u8>) {
        out.extend(numbers.iter().flat_map(|x| x.to_le_bytes()));
    }
    const PRECISION: KeyPrecision = KeyPrecision::Bf16;
    fn encode(row: &[f32], out: &mut [Self]) {
        for (to, &from) in out.iter_mut().zip(row) {
            *to = bf16::from_f32(from);
        }
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

impl Element for f16 {
    fn append_bytes(numbers: &[Self], out: &mut Vec<u8>) {
        out.extend(numbers.iter().flat_map(|x| x.to_le_bytes()));
    }
    const PRECISION: KeyPrecision = KeyPrecision::F16;
    const LARGEST: f32 = 65_504.0;
    fn encode(row: &[f32], out: &mut [Self]) {
        for (to, &from) in out.iter_mut().zip(row) {
            *to = f16::from_f32(from);
        }
    }
    #[inline]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline]
    fn bits(self) -> u32 {
        u32::from(self.to_bits())
    }
}

/// The largest int8 number; -128 is not used, so that a row and its negative have one scale.
const INT8_MAX: f32 = 127.0;

impl Element for i8 {
    fn append_bytes(numbers: &[Self], out: &mut Vec<u8>) {
        out.extend(numbers.iter().map(|&x| x as u8));
    }
    const PRECISION: KeyPrecision = KeyPrecision::Int8;
    /// The bytes of an f32.
    const TAIL: usize = 4;
    fn encode(row: &[f32], out: &mut [Self]) {
        let largest = row.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let scale = largest / INT8_MAX;
        let inverse = if scale.is_normal() { scale.recip() } else { 0.0 };
        let (numbers, tail) = out.split_at_mut(row.len());
        for (to, &from) in numbers.iter_mut().zip(row) {
            *to = (from * inverse).round_ties_even() as i8;
        }
        for (to, from) in tail.iter_mut().zip(scale.to_le_bytes()) {
            *to = from as i8;
        }
    }
    #[inline]
    fn to_f32(self) -> f32 {
        f32::from(self)
    }
    #[inline]
    fn scale(row: &[Self]) -> f32 {
        match row[row.len() - Self::TAIL..] {
            [a, b, c, d] => f32::from_le_bytes([a as u8, b as u8, c as u8, d as u8]),
            _ => 0.0,
        }
    }
    #[inline]
    fn bits(self) -> u32 {
        self as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn there_and_back<T: Element>(row: &[f32]) -> Vec<f32> {
        let mut stored = vec![T::default(); T::stride(row.len())];
        T::encode(row, &mut stored);
        let mut out = vec![f32::NAN; row.len()];
        T::decode(&stored, &mut out);
        out
    }

    #[test]
    fn rows_are_rounded_to_the_nearest() {
        let row = [0.1, -3.0, 127.0, 1e-3, 0.0];
        assert_eq!(there_and_back::<f32>(&row), row);
        assert_eq!(there_and_back::<i8>(&row), [0.0, -3.0, 127.0, 0.0, 0.0]);
        for (x, y) in row.iter().zip(there_and_back::<f16>(&row)) {
            assert!((x - y).abs() <= x.abs() / 2048.0);
        }
        for (x, y) in row.iter().zip(there_and_back::<bf16>(&row)) {
            assert!((x - y).abs() <= x.abs() / 256.0);
        }
        assert_eq!(there_and_back::<i8>(&[0.0, -0.0]), [0.0, 0.0]);
        assert_eq!(there_and_back::<i8>(&[1e-45, 0.0]), [0.0, 0.0], "a scale too small to divide by");
    }
}
