#![allow(clippy::unwrap_used)]

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

const CODED: [(KvCodec, usize); 2] = [(KvCodec::Int8, 8), (KvCodec::Kivi4, 4)];

fn shape(kv_heads: usize, head_dim: usize, dtype: KvDtype) -> KvShape {
    KvShape { layers: 1, kv_heads, head_dim, dtype }
}

/// Rows in the KV format; channels differ in size and place by orders of magnitude, as those of keys do.
fn rows(rng: &mut ChaCha8Rng, shape: &KvShape, tokens: usize) -> (Vec<f32>, Bytes) {
    let scale = |rng: &mut ChaCha8Rng| (10f32.powf(rng.random_range(-3.0..2.5)), rng.random_range(-50.0..50.0f32));
    let channels: Vec<(f32, f32)> = (0..shape.width()).map(|_| scale(rng)).collect();
    let number = |rng: &mut ChaCha8Rng, c: usize| channels[c].1 + channels[c].0 * rng.random_range(-1.0..1.0f32);
    let mut numbers: Vec<f32> = (0..tokens * shape.width()).map(|i| number(rng, i % shape.width())).collect();
    shape.dtype.round(&mut numbers);
    let mut bytes = Vec::new();
    shape.dtype.encode(&numbers, &mut bytes);
    (numbers, bytes.into())
}

fn bf16_at(bytes: &[u8], at: usize) -> f64 {
    f64::from(half::bf16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

/// A code of a row, as the head of the module has it.
fn code_at(row: &[u8], channel: usize, bits: usize) -> f64 {
    if bits == 8 {
        return f64::from(row[channel]);
    }
    let byte = row[channel / 32 * 16 + channel % 16];
    f64::from(if channel % 32 < 16 { byte % 16 } else { byte / 16 })
}

/// Number, and the step of its group: from the table at the head of the module, one at a time.
fn slow(
    codec: (KvCodec, usize),
    shape: &KvShape,
    coded: (&[u8], &[u8]),
    value: bool,
    token: usize,
    c: usize,
) -> (f64, f64) {
    let (width, bits) = (shape.width(), codec.1);
    let row = if bits == 8 { width } else { width.div_ceil(32) * 16 };
    let (least, step, codes) = if value {
        let groups = width.div_ceil(32);
        let at = &coded.1[token * (4 * groups + row)..];
        (bf16_at(at, 2 * (c / 32)), bf16_at(at, 2 * groups + 2 * (c / 32)), &at[4 * groups..])
    } else {
        let at = &coded.0[token / 32 * (4 * width + 32 * row)..];
        (bf16_at(at, 2 * c), bf16_at(at, 2 * width + 2 * c), &at[4 * width + token % 32 * row..])
    };
    (least + step * code_at(codes, c, bits), step)
}

#[test]
fn every_instruction_set_decodes_what_the_table_says_and_that_is_near_what_was_coded() {
    let mut rng = ChaCha8Rng::seed_from_u64(rand::random());
    for dtype in [KvDtype::Bf16, KvDtype::F32] {
        for (kv_heads, head_dim) in [(1, 1), (3, 5), (1, 33), (2, 16), (2, 64), (3, 80)] {
            for tokens in [0, 1, 31, 32, 33, 64, rng.random_range(65..200)] {
                let shape = shape(kv_heads, head_dim, dtype);
                let ((keys, key_bytes), (values, value_bytes)) =
                    (rows(&mut rng, &shape, tokens), rows(&mut rng, &shape, tokens));
                for codec in CODED {
                    let coded = codec.0.encode(&shape, tokens, &key_bytes, &value_bytes).unwrap();
                    codec.0.check(&shape, tokens, &coded.0, &coded.1).unwrap();
                    let mut before = None;
                    for isa in Isa::available() {
                        let found = codec.0.decode(isa, &shape, tokens, &coded.0, &coded.1).unwrap();
                        if let Some(before) = &before {
                            assert_eq!(&found, before, "{isa:?} {codec:?} {shape:?} {tokens}");
                            continue;
                        }
                        let (found_keys, found_values) = (dtype.decode(&found.0), dtype.decode(&found.1));
                        let sides = [(false, &keys, found_keys), (true, &values, found_values)];
                        for (value, wanted, found) in sides {
                            for (i, (x, found)) in wanted.iter().zip(&found).enumerate() {
                                let (token, c) = (i / shape.width(), i % shape.width());
                                if !value && token >= tokens / 32 * 32 {
                                    assert_eq!(x, found, "not grouped: as it was");
                                    continue;
                                }
                                let (exact, step) = slow(codec, &shape, (&coded.0, &coded.1), value, token, c);
                                let mut rounded = [exact as f32];
                                dtype.round(&mut rounded);
                                assert_eq!(*found, rounded[0], "{codec:?} {shape:?} {tokens}: {value} {token} {c}");
                                let off = (exact - f64::from(*x)).abs();
                                assert!(off <= step * 0.5001 + 1e-6 * x.abs() as f64, "{codec:?} {x} {exact} {step}");
                            }
                        }
                        before = Some(found);
                    }
                }
            }
        }
    }
}

#[test]
fn a_step_is_hardly_larger_than_the_groups_extent_needs() {
    let mut rng = ChaCha8Rng::seed_from_u64(rand::random());
    let shape = shape(2, 64, KvDtype::Bf16);
    let ((keys, key_bytes), (values, value_bytes)) = (rows(&mut rng, &shape, 64), rows(&mut rng, &shape, 64));
    for (codec, bits) in CODED {
        let coded = codec.encode(&shape, 64, &key_bytes, &value_bytes).unwrap();
        let levels = f64::from((1u32 << bits) - 1);
        for (token, c) in (0..64).flat_map(|token| (0..128).map(move |c| (token, c))) {
            let of_key: Vec<f32> = (0..32).map(|t| keys[(token / 32 * 32 + t) * 128 + c]).collect();
            for (value, group) in [(false, &of_key[..]), (true, &values[token * 128 + c / 32 * 32..][..32])] {
                let ends = group.iter().fold((f32::MAX, f32::MIN), |(a, b), x| (a.min(*x), b.max(*x)));
                let (_, step) = slow((codec, bits), &shape, (&coded.0, &coded.1), value, token, c);
                // A bf16 has eight bits; the least number of bf16 numbers is exact.
                assert!(step <= f64::from(ends.1 - ends.0) / levels * 1.01, "{codec} {value} {ends:?} {step}");
            }
        }
    }
}

#[test]
fn numbers_that_are_all_equal_come_back_as_they_were() {
    let shape = shape(1, 40, KvDtype::Bf16);
    for x in [0.0, -0.0, 1.5, -123.0, 1e-30, -1e-39, 9e36] {
        let mut bytes = Vec::new();
        shape.dtype.encode(&[x; 40 * 32], &mut bytes);
        let raw = Bytes::from(bytes);
        for (codec, _) in CODED {
            let coded = codec.encode(&shape, 32, &raw, &raw).unwrap();
            let found = codec.decode(Isa::detect(), &shape, 32, &coded.0, &coded.1).unwrap();
            // Of zero the sign is lost.
            let (found, wanted) = (shape.dtype.decode(&found.0), shape.dtype.decode(&raw));
            assert_eq!(found, wanted, "{codec} {x}");
        }
    }
}

#[test]
fn sizes_are_those_of_the_method_and_a_part_is_a_layer_by_itself() {
    let shape = shape(2, 64, KvDtype::Bf16);
    // Five bits a number: four, and two bf16 for 32.
    assert_eq!(KvCodec::Kivi4.key_bytes(&shape, 64) * 8, 64 * 128 * 5);
    assert_eq!(KvCodec::Kivi4.value_bytes(&shape, 7) * 8, 7 * 128 * 5);
    assert_eq!(KvCodec::Int8.key_bytes(&shape, 33), 32 * 128 * 9 / 8 + 256);
    let mut rng = ChaCha8Rng::seed_from_u64(rand::random());
    let (keys, values) = (rows(&mut rng, &shape, 100).1, rows(&mut rng, &shape, 100).1);
    for (codec, ..) in KvCodec::ALL {
        let coded = codec.encode(&shape, 100, &keys, &values).unwrap();
        let part = |from: usize| {
            let at = (codec.key_bytes(&shape, from), codec.value_bytes(&shape, from));
            let rest = (coded.0.slice(at.0..), coded.1.slice(at.1..));
            codec.decode(Isa::detect(), &shape, 100 - from, &rest.0, &rest.1).unwrap()
        };
        let whole = part(0);
        for from in [32, 64, 96] {
            let skipped = from * 256;
            assert_eq!(part(from), (whole.0.slice(skipped..), whole.1.slice(skipped..)), "{codec} {from}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_with_the_lengths_and_the_side() {
    let shape = shape(2, 5, KvDtype::F32);
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let (keys, values) = (rows(&mut rng, &shape, 40).1, rows(&mut rng, &shape, 40).1);
    for (codec, ..) in KvCodec::ALL {
        let (keys, values) = codec.encode(&shape, 40, &keys, &values).unwrap();
        let decode = |tokens, keys: &Bytes, values: &Bytes| codec.decode(Isa::detect(), &shape, tokens, keys, values);
        assert!(decode(40, &keys, &values).is_ok());
        let longer: Bytes = [&values[..], &[0]].concat().into();
        let (expected, found) = (values.len(), values.len() + 1);
        let wanted = CodecError::Length { side: "values", tokens: 40, codec, expected, found };
        assert_eq!(decode(40, &keys, &longer), Err(wanted.clone()));
        assert!(wanted.to_string().contains(&format!("expected {expected} bytes, found {found}")));
        for (tokens, keys, values) in [
            (40, keys.slice(1..), values.clone()),
            (40, Bytes::new(), values.clone()),
            (39, keys.clone(), values.clone()),
            (0, keys.clone(), values.clone()),
        ] {
            assert!(matches!(decode(tokens, &keys, &values), Err(CodecError::Length { side: "keys", .. })));
        }
        assert!(matches!(codec.encode(&shape, 41, &keys, &values), Err(CodecError::Length { .. })));
    }
}

#[test]
fn numbers_that_have_no_code_are_refused() {
    let shape = shape(1, 4, KvDtype::F32);
    let raw = |x: f32| {
        let mut bytes = Vec::new();
        shape.dtype.encode(&[0.0, x, 1.0, 2.0], &mut bytes);
        Bytes::from(bytes)
    };
    for x in [f32::NAN, f32::INFINITY, -2e37] {
        for (codec, _) in CODED {
            let error = codec.encode(&shape, 1, &raw(1.0), &raw(x)).unwrap_err();
            assert_eq!(error, CodecError::Number { side: "values", codec, found: x.to_string() });
            assert!(codec.encode(&shape, 1, &raw(x), &raw(1.0)).is_err());
        }
        assert!(KvCodec::Raw.encode(&shape, 1, &raw(x), &raw(x)).is_ok());
    }
}

#[test]
fn names_and_numbers_tell_codecs_apart_and_stay() {
    for (codec, name, number) in KvCodec::ALL {
        assert_eq!((codec.to_string().as_str(), codec.number()), (name, number));
        assert_eq!((name.parse::<KvCodec>().unwrap(), KvCodec::from_number(number)), (codec, Some(codec)));
    }
    assert_eq!(KvCodec::ALL.map(|(.., number)| number), [0, 1, 2]);
    let error = "kivi2".parse::<KvCodec>().unwrap_err().to_string();
    assert!(error.contains("kivi2") && error.contains("int8"), "{error}");
    assert_eq!(KvCodec::from_number(3), None);
}
