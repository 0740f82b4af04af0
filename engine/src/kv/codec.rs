//! How the KV of a chunk is stored: the one place that knows these bytes.
//!
//! Keys (not rotated) and values of a layer are coded apart, each `[tokens, width]` with `width = kv_heads * head_dim`.
//!
//! * `raw`: numbers in the KV format (bf16 or f32), little-endian, as they were computed.
//! * `int8`, `kivi4`: KIVI's grouping (Liu et al. 2024, arXiv 2402.02750, section 3) with 8 and with 4 bits. Keys have channels of large
//!   numbers, the same for all tokens, so each channel is quantised over 32 consecutive tokens; values have none, so each
//!   token is quantised over 32 consecutive channels. A group is a least number and a step: `x = least + step * code`.
//!   Keys of the last `tokens % 32` tokens are as in `raw`: a group would span the end.
//!
//! | part | bytes |
//! |---|---|
//! | 32 tokens of keys | least `[width]`, step `[width]`, codes `[32]` rows |
//! | keys behind the last whole 32 | as in `raw` |
//! | a token of values | least `[groups]`, step `[groups]`, codes: one row; `groups = width / 32`, rounded up |
//!
//! Least numbers and steps are bf16; the first rounded down and the second up, so that the codes reach every number of their group, and
//! the first of bf16 numbers is exact. A row of codes has one byte a channel in `int8`; in `kivi4` 16 bytes for 32
//! channels, of which byte `i` holds channel `i` in its lower half and channel `i + 16` in its upper one; the last 32 are filled up with zeros.
//!
//! Rows of whole 32 tokens follow each other, so that any part of a layer which begins at a multiple of 32 is a layer by itself.

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;

use super::{KvDtype, KvShape};
use crate::backend::cpu::Isa;
use crate::backend::cpu::simd::{Simd, simd_dispatch};
use crate::error::EngineError;

/// Tokens of a group of keys, channels of a group of values.
pub(crate) const GROUP: usize = 32;
/// Larger numbers would leave single precision when they are decoded.
const LARGEST: f32 = 1e37;

/// A way of storing the KV of chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KvCodec {
    /// As it was computed.
    #[default]
    Raw,
    /// One byte a number.
    Int8,
    /// Half a byte a number.
    Kivi4,
}

/// Why KV cannot be coded or decoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// Bytes of another length than the codec gives so many tokens.
    #[error("{side} of {tokens} tokens as `{codec}`: expected {expected} bytes, found {found}; store the chunk anew")]
    Length {
        /// `keys` or `values`.
        side: &'static str,
        /// Tokens of the chunk.
        tokens: usize,
        /// How they are coded.
        codec: KvCodec,
        /// Bytes that they would have.
        expected: usize,
        /// Bytes that there are.
        found: usize,
    },
    /// A number that no code stands for.
    #[error("{side}: expected numbers between -1e37 and 1e37 for `{codec}`, found {found}; store the chunk as `raw`")]
    Number {
        /// `keys` or `values`.
        side: &'static str,
        /// How they were to be coded.
        codec: KvCodec,
        /// The first such number, as text.
        found: String,
    },
}

impl From<CodecError> for EngineError {
    fn from(error: CodecError) -> Self {
        EngineError::ChunkSource(Box::new(error))
    }
}

impl KvCodec {
    /// All of them, with their names, and the numbers that stores know them by, which stay as they are.
    pub const ALL: [(KvCodec, &'static str, u16); 3] =
        [(KvCodec::Raw, "raw", 0), (KvCodec::Int8, "int8", 1), (KvCodec::Kivi4, "kivi4", 2)];

    /// The number that it is stored under.
    #[must_use]
    pub fn number(self) -> u16 {
        Self::ALL.iter().find(|(codec, ..)| *codec == self).map_or(0, |(.., number)| *number)
    }

    /// The codec of this number.
    #[must_use]
    pub fn from_number(number: u16) -> Option<KvCodec> {
        Self::ALL.iter().find(|(.., known)| *known == number).map(|(codec, ..)| *codec)
    }

    /// Bits of a code; none: numbers are as they were computed.
    fn bits(self) -> Option<usize> {
        match self {
            KvCodec::Raw => None,
            KvCodec::Int8 => Some(8),
            KvCodec::Kivi4 => Some(4),
        }
    }

    /// Bytes of the keys of one layer of so many tokens.
    #[must_use]
    pub fn key_bytes(self, shape: &KvShape, tokens: usize) -> usize {
        let raw = shape.width() * shape.dtype.size();
        match self.bits() {
            None => tokens * raw,
            Some(bits) => tokens / GROUP * key_group_bytes(shape.width(), bits) + tokens % GROUP * raw,
        }
    }

    /// Bytes of the values of one layer of so many tokens.
    #[must_use]
    pub fn value_bytes(self, shape: &KvShape, tokens: usize) -> usize {
        let width = shape.width();
        tokens * self.bits().map_or(width * shape.dtype.size(), |bits| value_row_bytes(width, bits))
    }

    /// Compares the lengths of a layer's keys and values with those that the codec gives so many tokens.
    ///
    /// # Errors
    /// [`CodecError::Length`].
    pub fn check(self, shape: &KvShape, tokens: usize, keys: &[u8], values: &[u8]) -> Result<(), CodecError> {
        let sides = [
            ("keys", self.key_bytes(shape, tokens), keys.len()),
            ("values", self.value_bytes(shape, tokens), values.len()),
        ];
        match sides.into_iter().find(|(_, expected, found)| expected != found) {
            None => Ok(()),
            Some((side, expected, found)) => Err(CodecError::Length { side, tokens, codec: self, expected, found }),
        }
    }

    /// Codes a layer that is as it was computed.
    ///
    /// # Errors
    /// [`CodecError`].
    pub fn encode(
        self,
        shape: &KvShape,
        tokens: usize,
        keys: &Bytes,
        values: &Bytes,
    ) -> Result<(Bytes, Bytes), CodecError> {
        KvCodec::Raw.check(shape, tokens, keys, values)?;
        let Some(bits) = self.bits() else { return Ok((keys.clone(), values.clone())) };
        let numbers = |side, bytes: &[u8]| {
            let numbers = shape.dtype.decode(bytes);
            match numbers.iter().find(|x| !x.is_finite() || x.abs() > LARGEST) {
                None => Ok(numbers),
                Some(x) => Err(CodecError::Number { side, codec: self, found: x.to_string() }),
            }
        };
        let width = shape.width();
        let mut out = (Vec::new(), Vec::new());
        out.0.reserve(self.key_bytes(shape, tokens));
        let found = numbers("keys", keys)?;
        let whole = tokens / GROUP * GROUP * width;
        found[..whole]
            .chunks_exact((GROUP * width).max(1))
            .for_each(|group| encode_keys(group, width, bits, &mut out.0));
        out.0.extend_from_slice(&keys[whole * shape.dtype.size()..]);
        out.1.reserve(self.value_bytes(shape, tokens));
        let found = numbers("values", values)?;
        found.chunks_exact(width.max(1)).for_each(|row| encode_values(row, bits, &mut out.1));
        Ok((out.0.into(), out.1.into()))
    }

    /// The layer in the KV format, rounded to it.
    ///
    /// # Errors
    /// [`CodecError::Length`].
    pub(crate) fn decode(
        self,
        isa: Isa,
        shape: &KvShape,
        tokens: usize,
        keys: &Bytes,
        values: &Bytes,
    ) -> Result<(Bytes, Bytes), CodecError> {
        self.check(shape, tokens, keys, values)?;
        let Some(bits) = self.bits() else { return Ok((keys.clone(), values.clone())) };
        let (width, size) = (shape.width(), shape.dtype.size());
        let whole = tokens / GROUP * key_group_bytes(width, bits);
        let mut out = (vec![0; tokens * width * size], vec![0; tokens * width * size]);
        let (grouped, rest) = out.0.split_at_mut(tokens / GROUP * GROUP * width * size);
        rest.copy_from_slice(&keys[whole..]);
        let job = Job { bits, width, dtype: shape.dtype, keys: &keys[..whole], values, out: (grouped, &mut out.1) };
        simd_dispatch!(isa, decode_job, Job<'_>, job);
        Ok((out.0.into(), out.1.into()))
    }
}

impl fmt::Display for KvCodec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::ALL.iter().find(|(codec, ..)| codec == self).map_or("", |(_, name, _)| name))
    }
}

impl FromStr for KvCodec {
    type Err = EngineError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.iter().find(|(_, name, _)| *name == text).map(|(codec, ..)| *codec).ok_or_else(|| {
            let known = Self::ALL.map(|(_, name, _)| name).join(", ");
            EngineError::InvalidRequest(format!("codec of chunks: expected one of {known}, found `{text}`"))
        })
    }
}

/// Bytes of the codes of `width` channels.
fn row_bytes(width: usize, bits: usize) -> usize {
    if bits == 4 { width.div_ceil(GROUP) * GROUP / 2 } else { width }
}

fn key_group_bytes(width: usize, bits: usize) -> usize {
    4 * width + GROUP * row_bytes(width, bits)
}

fn value_row_bytes(width: usize, bits: usize) -> usize {
    4 * width.div_ceil(GROUP) + row_bytes(width, bits)
}

/// The bits of a bf16, and the number they stand for.
fn widen(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The largest bf16 that is not above `x`, which is finite.
fn bf16_below(x: f32) -> u16 {
    let upper = (x.to_bits() >> 16) as u16;
    // Without its lower half a number is nearer to zero: below zero that is up.
    if widen(upper) > x { upper + 1 } else { upper }
}

/// Least number and step of a group of which these are the ends.
fn range(least: f32, most: f32, bits: usize) -> (u16, u16) {
    let least = bf16_below(least);
    let step = (f64::from(most) - f64::from(widen(least))) / f64::from((1u32 << bits) - 1);
    let cut = ((step as f32).to_bits() >> 16) as u16;
    (least, if f64::from(widen(cut)) < step { cut + 1 } else { cut })
}

fn code(x: f32, (least, step): (u16, u16), bits: usize) -> u8 {
    let (least, step) = (widen(least), widen(step));
    let most = ((1u32 << bits) - 1) as f32;
    if step > 0.0 { ((x - least) / step).round().clamp(0.0, most) as u8 } else { 0 }
}

/// Appends the codes of one row.
fn put_codes(codes: &[u8], bits: usize, out: &mut Vec<u8>) {
    if bits == 8 {
        return out.extend_from_slice(codes);
    }
    for block in codes.chunks(GROUP) {
        let at = |i: usize| block.get(i).copied().unwrap_or(0);
        out.extend((0..GROUP / 2).map(|i| at(i) | at(i + GROUP / 2) << 4));
    }
}

fn put_ranges(ranges: &[(u16, u16)], out: &mut Vec<u8>) {
    out.extend(ranges.iter().flat_map(|(least, _)| least.to_le_bytes()));
    out.extend(ranges.iter().flat_map(|(_, step)| step.to_le_bytes()));
}

/// Appends 32 tokens of keys.
fn encode_keys(group: &[f32], width: usize, bits: usize, out: &mut Vec<u8>) {
    let (mut least, mut most) = (vec![f32::INFINITY; width], vec![f32::NEG_INFINITY; width]);
    for row in group.chunks_exact(width) {
        for ((x, least), most) in row.iter().zip(&mut least).zip(&mut most) {
            (*least, *most) = (least.min(*x), most.max(*x));
        }
    }
    let ranges: Vec<(u16, u16)> = least.iter().zip(&most).map(|(least, most)| range(*least, *most, bits)).collect();
    put_ranges(&ranges, out);
    for row in group.chunks_exact(width) {
        let codes: Vec<u8> = row.iter().zip(&ranges).map(|(x, range)| code(*x, *range, bits)).collect();
        put_codes(&codes, bits, out);
    }
}

/// Appends one token of values.
fn encode_values(row: &[f32], bits: usize, out: &mut Vec<u8>) {
    let range = |group: &[f32]| {
        let ends = group.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), x| (a.min(*x), b.max(*x)));
        range(ends.0, ends.1, bits)
    };
    let ranges: Vec<(u16, u16)> = row.chunks(GROUP).map(range).collect();
    put_ranges(&ranges, out);
    let groups = row.chunks(GROUP).zip(&ranges);
    let codes: Vec<u8> = groups.flat_map(|(group, range)| group.iter().map(|x| code(*x, *range, bits))).collect();
    put_codes(&codes, bits, out);
}

/// Groups of keys and rows of values, and where they go: rows in the KV format.
struct Job<'a> {
    bits: usize,
    width: usize,
    dtype: KvDtype,
    keys: &'a [u8],
    values: &'a [u8],
    out: (&'a mut [u8], &'a mut [u8]),
}

/// # Safety
/// The caller is compiled for `S`; plain code that the compiler turns into its vectors.
#[inline(always)]
unsafe fn decode_job<S: Simd>(job: Job<'_>) {
    match (job.bits, job.dtype) {
        (4, KvDtype::Bf16) => decode_as::<4, 2>(job),
        (4, KvDtype::F32) => decode_as::<4, 4>(job),
        (_, KvDtype::Bf16) => decode_as::<8, 2>(job),
        (_, KvDtype::F32) => decode_as::<8, 4>(job),
    }
}

#[inline(always)]
fn decode_as<const BITS: usize, const SIZE: usize>(job: Job<'_>) {
    let Job { width, keys, values, out, .. } = job;
    if width == 0 {
        return;
    }
    let (codes, row) = (row_bytes(width, BITS), width * SIZE);
    let (mut least, mut step) = (vec![0.0; width], vec![0.0; width]);
    let groups = keys.chunks_exact(key_group_bytes(width, BITS)).zip(out.0.chunks_exact_mut(GROUP * row));
    for (group, out) in groups {
        let (ranges, rows) = group.split_at(4 * width);
        widen_all(&ranges[..2 * width], &mut least);
        widen_all(&ranges[2 * width..], &mut step);
        for (codes, out) in rows.chunks_exact(codes).zip(out.chunks_exact_mut(row)) {
            let blocks = codes.chunks(GROUP * BITS / 8).zip(out.chunks_mut(GROUP * SIZE));
            for ((codes, out), (least, step)) in blocks.zip(least.chunks(GROUP).zip(step.chunks(GROUP))) {
                decode_block::<BITS, SIZE>(codes, least, step, out);
            }
        }
    }
    let groups = width.div_ceil(GROUP);
    for (coded, out) in values.chunks_exact(value_row_bytes(width, BITS)).zip(out.1.chunks_exact_mut(row)) {
        let (ranges, codes) = coded.split_at(4 * groups);
        let (least, step) = ranges.split_at(2 * groups);
        let bf16 = |bytes: &[u8], at: usize| widen(u16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]]));
        let blocks = codes.chunks(GROUP * BITS / 8).zip(out.chunks_mut(GROUP * SIZE));
        for (at, (codes, out)) in blocks.enumerate() {
            let (least, step) = ([bf16(least, at); GROUP], [bf16(step, at); GROUP]);
            let count = out.len() / SIZE;
            decode_block::<BITS, SIZE>(codes, &least[..count], &step[..count], out);
        }
    }
}

#[inline(always)]
fn widen_all(bytes: &[u8], out: &mut [f32]) {
    for (bytes, out) in bytes.chunks_exact(2).zip(out) {
        *out = widen(u16::from_le_bytes([bytes[0], bytes[1]]));
    }
}

/// Decodes up to 32 channels of a row; whole blocks with lengths that the compiler knows.
#[inline(always)]
fn decode_block<const BITS: usize, const SIZE: usize>(codes: &[u8], least: &[f32], step: &[f32], out: &mut [u8]) {
    let mut unpacked = [0u8; GROUP];
    if BITS == 4 {
        for (i, byte) in codes.iter().take(GROUP / 2).enumerate() {
            unpacked[i] = byte & 15;
            unpacked[i + GROUP / 2] = byte >> 4;
        }
    } else {
        unpacked[..codes.len()].copy_from_slice(codes);
    }
    let known = (least.first_chunk::<GROUP>(), step.first_chunk::<GROUP>(), out.len() == GROUP * SIZE);
    if let (Some(least), Some(step), true) = known {
        put_numbers::<SIZE>(&unpacked, least, step, &mut out[..GROUP * SIZE]);
    } else {
        put_numbers::<SIZE>(&unpacked, least, step, out);
    }
}

/// The product of a code and a bf16 is exact: the sum is rounded once, and equal on every machine.
#[inline(always)]
fn put_numbers<const SIZE: usize>(codes: &[u8; GROUP], least: &[f32], step: &[f32], out: &mut [u8]) {
    for (((code, least), step), out) in codes.iter().zip(least).zip(step).zip(out.chunks_exact_mut(SIZE)) {
        let x = step * f32::from(*code) + least;
        if SIZE == 2 {
            // To the nearest, ties to even; what is coded is finite.
            let bits = x.to_bits();
            let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
            out.copy_from_slice(&(rounded as u16).to_le_bytes());
        } else {
            out.copy_from_slice(&x.to_le_bytes());
        }
    }
}

#[cfg(test)]
#[path = "codec_tests.rs"]
mod tests;
