#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;
use safetensors::tensor::TensorView;
use tempfile::TempDir;

fn file(tensors: &[(&str, safetensors::Dtype, Vec<usize>, Vec<u8>)]) -> Vec<u8> {
    let views =
        tensors.iter().map(|(name, dtype, shape, data)| (*name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn sample() -> Vec<u8> {
    let halves = |bits: [u16; 2]| bits.iter().flat_map(|b| b.to_le_bytes()).collect::<Vec<u8>>();
    file(&[
        ("a", safetensors::Dtype::F32, vec![2, 3], bytes_of(&[1.0, -2.5, 3.0, 4.0, 5.0, 6.0])),
        (
            "b",
            safetensors::Dtype::BF16,
            vec![2],
            halves([bf16::from_f32(0.5).to_bits(), bf16::from_f32(-3.0).to_bits()]),
        ),
        (
            "c",
            safetensors::Dtype::F16,
            vec![2],
            halves([f16::from_f32(0.25).to_bits(), f16::from_f32(-65504.0).to_bits()]),
        ),
        ("d", safetensors::Dtype::I64, vec![1], vec![0; 8]),
    ])
}

fn folder(contents: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in contents {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

/// Opens `bytes` as the only weights file and reads every tensor.
fn open(bytes: &[u8]) -> Result<Weights> {
    let weights = Weights::open(folder(&[(SINGLE, bytes)]).path())?;
    let _ = weights.fingerprint();
    Ok(weights)
}

#[test]
fn all_three_formats_are_widened_exactly() {
    let weights = open(&sample()).unwrap();
    assert_eq!(weights.tensor("a", &[2, 3]).unwrap().to_f32(), [1.0, -2.5, 3.0, 4.0, 5.0, 6.0]);
    assert_eq!(weights.tensor("b", &[2]).unwrap().to_f32(), [0.5, -3.0]);
    assert_eq!(weights.tensor("c", &[2]).unwrap().to_f32(), [0.25, -65504.0]);
    assert!(weights.has("d") && !weights.has("e"));
    assert_eq!(weights.bytes(), 24 + 4 + 4 + 8);
}

#[test]
fn a_tensor_that_is_not_as_expected_is_an_error() {
    let weights = open(&sample()).unwrap();
    let missing = weights.tensor("e", &[7, 8]).unwrap_err();
    assert!(matches!(&missing, EngineError::MissingTensor { name, .. } if name == "e"));
    assert!(missing.to_string().contains("[7, 8]"), "{missing}");
    let shape = weights.tensor("a", &[3, 2]).unwrap_err();
    assert!(matches!(&shape, EngineError::TensorShape { found, .. } if found == &[2, 3]), "{shape}");
    let dtype = weights.tensor("d", &[1]).unwrap_err();
    assert!(matches!(&dtype, EngineError::TensorDtype { found, .. } if found == "I64"), "{dtype}");
}

#[test]
fn a_truncated_file_is_refused_at_every_length() {
    let whole = sample();
    for length in 0..whole.len() {
        match open(&whole[..length]) {
            Err(EngineError::CorruptWeights { path, .. }) => assert!(path.ends_with(SINGLE)),
            other => panic!("{length} of {} bytes: {other:?}", whole.len()),
        }
    }
    let mut longer = whole;
    longer.push(0);
    assert!(matches!(open(&longer), Err(EngineError::CorruptWeights { .. })));
}

#[test]
fn offsets_that_overlap_or_wrap_around_are_refused() {
    let with_header = |header: &str, data: usize| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    };
    let huge = u64::MAX / 8 - 7;
    let wrapping: Vec<String> = (0..8)
        .map(|i| {
            format!(r#""t{i}":{{"dtype":"U8","shape":[{huge}],"data_offsets":[{},{}]}}"#, i * huge, (i + 1) * huge)
        })
        .collect();
    for header in [
        r#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"y":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#.to_string(),
        r#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#.to_string(),
        r#"{"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}"#.to_string(),
        r#"{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#.to_string(),
        r#"{"x":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}"#.to_string(),
        format!("{{{}}}", wrapping.join(",")),
    ] {
        let result = open(&with_header(&header, 12));
        assert!(matches!(result, Err(EngineError::CorruptWeights { .. })), "{header}: {result:?}");
    }
}

proptest! {
    /// A header with flipped bytes is refused, or describes tensors that can be read; it never panics.
    #[test]
    fn a_damaged_header_never_panics(flips in prop::collection::vec((0usize..400, 1u8..), 1..4)) {
        let mut bytes = sample();
        for (at, mask) in flips {
            let at = at % bytes.len();
            bytes[at] ^= mask;
        }
        if let Err(error) = open(&bytes) {
            prop_assert!(matches!(error, EngineError::CorruptWeights { .. }), "{:?}", error);
        }
    }
}

fn shards() -> (Vec<u8>, Vec<u8>) {
    let one = file(&[("a", safetensors::Dtype::F32, vec![2], bytes_of(&[1.0, 2.0]))]);
    let two = file(&[("b", safetensors::Dtype::F32, vec![1], bytes_of(&[3.0]))]);
    (one, two)
}

#[test]
fn shards_are_one_set_of_weights() {
    let (one, two) = shards();
    let index = br#"{"metadata":{},"weight_map":{"a":"one.safetensors","b":"two.safetensors"}}"#;
    let dir = folder(&[("one.safetensors", &one), ("two.safetensors", &two), (INDEX, index)]);
    let sharded = Weights::open(dir.path()).unwrap();
    assert_eq!(sharded.tensor("b", &[1]).unwrap().to_f32(), [3.0]);
    assert_eq!(sharded.files().count(), 2);
    let whole = file(&[
        ("b", safetensors::Dtype::F32, vec![1], bytes_of(&[3.0])),
        ("a", safetensors::Dtype::F32, vec![2], bytes_of(&[1.0, 2.0])),
    ]);
    assert_eq!(sharded.fingerprint(), open(&whole).unwrap().fingerprint());
}

#[test]
fn a_missing_shard_and_a_wrong_index_are_named() {
    let (one, _) = shards();
    let cases: [(&str, &str); 5] = [
        (r#"{"weight_map":{"a":"one.safetensors","b":"two.safetensors"}}"#, "two.safetensors is missing"),
        (r#"{"weight_map":{"a":"../one.safetensors"}}"#, "expected the name of a file beside the index"),
        (r#"{"weight_map":{"a":7}}"#, "expected the name of a file"),
        (r#"{"weights":{}}"#, "expected an object `weight_map`"),
        ("{", "not valid JSON"),
    ];
    for (index, message) in cases {
        let dir = folder(&[("one.safetensors", &one), (INDEX, index.as_bytes())]);
        let error = Weights::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(message), "{index}: {error}");
    }
    let error = Weights::open(folder(&[("pytorch_model.bin", b"x")]).path()).unwrap_err();
    assert!(matches!(&error, EngineError::MissingFile { path, .. } if path.ends_with(SINGLE)), "{error}");
}

#[test]
fn a_tensor_that_no_shard_holds_is_missed_only_where_it_is_needed() {
    let (one, two) = shards();
    let index = br#"{"weight_map":{"a":"one.safetensors","lm_head.weight":"one.safetensors","b":"two.safetensors"}}"#;
    let dir = folder(&[("one.safetensors", &one), ("two.safetensors", &two), (INDEX, index)]);
    let weights = Weights::open(dir.path()).unwrap();
    assert!(weights.has("a") && weights.has("b") && !weights.has("lm_head.weight"));
    let error = weights.tensor("lm_head.weight", &[2]).unwrap_err().to_string();
    assert!(error.contains("one.safetensors is damaged: expected tensor `lm_head.weight`"), "{error}");
    // What an index leaves out is there all the same.
    let index = br#"{"weight_map":{"b":"two.safetensors","c":"one.safetensors"}}"#;
    let dir = folder(&[("one.safetensors", &one), ("two.safetensors", &two), (INDEX, index)]);
    assert_eq!(Weights::open(dir.path()).unwrap().tensor("a", &[2]).unwrap().to_f32(), [1.0, 2.0]);
}

#[test]
fn a_model_saved_without_its_head_has_the_names_of_one_with_it() {
    let tensor = |name: &'static str| (name, safetensors::Dtype::F32, vec![1], bytes_of(&[3.0]));
    let names = ["embed_tokens.weight", "layers.0.mlp.up_proj.weight", "norm.weight", "lm_head.weight"];
    let bare = open(&file(&names.map(tensor))).unwrap();
    let with =
        ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"];
    let whole = open(&file(&with.map(tensor))).unwrap();
    assert_eq!(bare.names().collect::<Vec<_>>(), whole.names().collect::<Vec<_>>());
    assert_eq!(bare.fingerprint(), whole.fingerprint());
    assert!(whole.same("lm_head.weight", "model.norm.weight") && !whole.same("lm_head.weight", "x"));
}

#[test]
fn fingerprints_see_names_formats_shapes_and_bytes() {
    let with = |name: &'static str, dtype, shape: &[usize], data: &[u8]| {
        open(&file(&[(name, dtype, shape.to_vec(), data.to_vec())])).unwrap().fingerprint()
    };
    use safetensors::Dtype::{BF16, F16};
    let base = with("a", F16, &[2, 1], &[1, 2, 3, 4]);
    assert_eq!(base, with("a", F16, &[2, 1], &[1, 2, 3, 4]));
    for other in [
        with("b", F16, &[2, 1], &[1, 2, 3, 4]),
        with("a", BF16, &[2, 1], &[1, 2, 3, 4]),
        with("a", F16, &[1, 2], &[1, 2, 3, 4]),
        with("a", F16, &[2, 1], &[1, 2, 3, 5]),
    ] {
        assert_ne!(base, other);
    }
}
