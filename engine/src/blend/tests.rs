//! What a blend leaves behind, row by row, against an oracle that shares nothing with it but the model: rotation and
//! distances in double precision, over chunks whose cached state is arbitrary numbers.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::{Arc, LazyLock};

use half::bf16;
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use super::plan::{BlendPlan, Treatment};
use super::select::{Budget, highest};
use super::{Context, Whole, blend};
use crate::chunk::{ChunkKv, ChunkLayer, PromptChunk};
use crate::config::{BlendConfig, BlendMode};
use crate::kv::KvDtype;
use crate::model::transformer::{Piece, Transformer, Want};

const BOS: u32 = 1;
const LAYERS: usize = 4;

/// The tiny Llama 2 of the golden fixtures with its two layers twice, so that there are layers behind a check layer.
static DIR: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/golden/llama2");
    let dir = tempfile::tempdir().unwrap();
    let mut config: Value = serde_json::from_slice(&std::fs::read(golden.join("config.json")).unwrap()).unwrap();
    config["num_hidden_layers"] = json!(LAYERS);
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let bytes = std::fs::read(golden.join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut all: Vec<(String, TensorView<'_>)> = Vec::new();
    for (name, tensor) in tensors.tensors() {
        for i in 0..2 {
            if let Some(rest) = name.strip_prefix(&format!("model.layers.{i}.")) {
                all.push((format!("model.layers.{}.{rest}", i + 2), tensor.clone()));
            }
        }
        all.push((name, tensor));
    }
    std::fs::write(dir.path().join("model.safetensors"), safetensors::serialize(all, None).unwrap()).unwrap();
    dir
});

fn model(dtype: KvDtype) -> Transformer {
    Transformer::load_dir(DIR.path(), 2, Some(dtype)).unwrap()
}

/// Unrotated keys and values of some tokens: `[layers]` of `[tokens, width]`.
type Kv = Vec<(Vec<f32>, Vec<f32>)>;

/// A prompt over chunks whose cached state is near the true one, by a distance of its own for each row's keys and values.
struct Case {
    tokens: Vec<u32>,
    chunks: Vec<PromptChunk>,
    /// As the whole prompt gives it when it is read at once.
    fresh: Kv,
    /// As cached; for the bos, which is not cached, as fresh.
    cached: Kv,
}

fn rounded(x: f32, dtype: KvDtype) -> f32 {
    if dtype == KvDtype::Bf16 { bf16::from_f32(x).to_f32() } else { x }
}

fn encoded(rows: &[f32], dtype: KvDtype) -> Vec<u8> {
    match dtype {
        KvDtype::F32 => rows.iter().flat_map(|x| x.to_le_bytes()).collect(),
        KvDtype::Bf16 => rows.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
    }
}

fn case(model: &Transformer, sizes: &[usize], rng: &mut ChaCha8Rng) -> Case {
    let (width, dtype) = (model.shape.width(), model.shape.dtype);
    let mut tokens = vec![BOS];
    tokens.extend((0..sizes.iter().sum()).map(|_| rng.random_range(2..200u32)));
    let (mut kv, mut fresh) = (model.new_kv(), Vec::new());
    let piece = Piece::exact(&mut kv, &tokens, Want::Nothing);
    model.forward(&mut [Piece { tap: Some(&mut fresh), ..piece }]).unwrap();
    let mut cached = fresh.clone();
    for side in cached.iter_mut().flat_map(|(keys, values)| [keys, values]) {
        for row in side.chunks_exact_mut(width).skip(1) {
            let size = 10f32.powf(rng.random_range(-2.0..0.5));
            row.iter_mut().for_each(|x| *x = rounded(*x + size * rng.random_range(-1.0..1.0f32), dtype));
        }
    }
    let mut start = 1;
    let chunks = sizes.iter().map(|&size| {
        let rows = start * width..(start + size) * width;
        let text = tokens[start..start + size].into();
        start += size;
        let side = |side: &[f32]| encoded(&side[rows.clone()], dtype).into();
        let layers = cached.iter().map(|(keys, values)| ChunkLayer::raw(side(keys), side(values))).collect();
        // Computed behind another token than the bos, so that not even the first one is exact.
        PromptChunk { tokens: text, prefix: [2].into(), source: Some(Arc::new(ChunkKv { tokens: size, layers })) }
    });
    let chunks = chunks.collect();
    Case { tokens, chunks, fresh, cached }
}

impl Case {
    /// Squared distances of a row's keys and of its values in a layer, and the squared sizes of the fresh ones.
    fn sides(&self, width: usize, layer: usize, row: usize) -> [(f64, f64); 2] {
        let at = row * width..(row + 1) * width;
        let (fresh, cached) = (&self.fresh[layer], &self.cached[layer]);
        [(&fresh.0, &cached.0), (&fresh.1, &cached.1)].map(|(fresh, cached)| {
            let pairs = fresh[at.clone()].iter().zip(&cached[at.clone()]);
            pairs.fold((0.0, 0.0), |(d, s), (f, c)| (d + f64::from(f - c).powi(2), s + f64::from(*f).powi(2)))
        })
    }

    /// Both sides together.
    fn distance(&self, width: usize, layer: usize, row: usize) -> (f64, f64) {
        let [keys, values] = self.sides(width, layer, row);
        (keys.0 + values.0, keys.1 + values.1)
    }

    /// The rows whose values are farthest in a layer, so many of them.
    fn most_distant(&self, width: usize, layer: usize, count: usize) -> Vec<usize> {
        let mut rows: Vec<usize> = (1..self.tokens.len()).collect();
        rows.sort_by(|a, b| {
            let distance = |row: &usize| self.sides(width, layer, *row)[1].0;
            distance(b).total_cmp(&distance(a))
        });
        rows.truncate(count);
        rows
    }
}

/// A head of a row, rotated to `position`.
fn rotated(model: &Transformer, rows: &[f32], row: usize, head: usize, position: usize) -> Vec<f64> {
    let (dim, width) = (model.shape.head_dim, model.shape.width());
    let x = &rows[row * width + head * dim..][..dim];
    let frequencies = model.spec.rope.inv_freq();
    let turned = |i: usize| {
        let (sin, cos) = (position as f64 * frequencies[i % (dim / 2)]).sin_cos();
        let (a, b) = (f64::from(x[i % (dim / 2)]), f64::from(x[i % (dim / 2) + dim / 2]));
        if i < dim / 2 { a * cos - b * sin } else { b * cos + a * sin }
    };
    (0..dim).map(turned).collect()
}

/// Whether a row of the blended KV is what `wanted` has there, up to a relative and an absolute tolerance.
fn holds(
    model: &Transformer,
    blended: &Whole,
    wanted: &Kv,
    layer: usize,
    row: usize,
    (relative, absolute): (f64, f64),
) -> bool {
    let (dim, width) = (model.shape.head_dim, model.shape.width());
    let near = |found: &[f32], wanted: &[f64]| {
        found.iter().zip(wanted).all(|(f, w)| (f64::from(*f) - w).abs() <= relative * w.abs() + absolute)
    };
    (0..model.shape.kv_heads).all(|head| {
        let (keys, values) = blended.kv.rows(layer, head, row..row + 1);
        let value: Vec<f64> =
            wanted[layer].1[row * width + head * dim..][..dim].iter().map(|x| f64::from(*x)).collect();
        near(&keys, &rotated(model, &wanted[layer].0, row, head, row)) && near(&values, &value)
    })
}

/// Tolerances for what was only rotated and rounded (to nearest), and for what was computed.
fn tolerances(dtype: KvDtype) -> [(f64, f64); 2] {
    match dtype {
        KvDtype::F32 => [(1e-6, 2e-6), (1e-3, 1e-3)],
        KvDtype::Bf16 => [(1.0 / 256.0, 2e-6), (0.02, 0.02)],
    }
}

#[test]
fn rows_that_are_not_chosen_are_the_rotated_cache_from_the_check_layer_on() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for dtype in [KvDtype::F32, KvDtype::Bf16] {
        let model = model(dtype);
        let width = model.shape.width();
        let [copied, computed] = tolerances(dtype);
        for check_layer in 0..LAYERS {
            // The ratio of 45 tokens is thirteen and a half; the last case crosses pages.
            for sizes in [&[45][..], &[20, 31, 1], &[200, 100]] {
                let case = case(&model, sizes, &mut rng);
                let config =
                    BlendConfig { mode: BlendMode::CacheBlend, ratio: 0.3, check_layer, ..BlendConfig::default() };
                let blended = blend(&model, &Context::unasked(&[BOS], &case.chunks), &config, &|| false).unwrap();
                let cached = case.tokens.len() - 1;
                let count = (cached * 3 + 5) / 10;
                let chosen = case.most_distant(width, check_layer, count);
                assert_eq!((blended.stats.recomputed_tokens, blended.stats.reused_tokens), (1 + count, cached - count));
                for layer in 0..LAYERS {
                    for row in 1..case.tokens.len() {
                        let is = |wanted, tolerance| holds(&model, &blended, wanted, layer, row, tolerance);
                        let about = format!("{dtype:?}, check {check_layer}, layer {layer}, row {row} of {sizes:?}");
                        if layer < check_layer {
                            assert!(is(&case.fresh, computed), "not computed before the check layer: {about}");
                        } else if !chosen.contains(&row) {
                            assert!(is(&case.cached, copied), "not the rotated cache: {about}");
                        } else {
                            assert!(!is(&case.cached, copied), "not recomputed: {about}");
                            assert!(layer > check_layer || is(&case.fresh, computed), "not fresh: {about}");
                        }
                    }
                }
                let relative = (1..=cached).map(|row| case.distance(width, check_layer, row)).map(|(d, s)| d / s);
                let wanted = relative.sum::<f64>() / cached as f64;
                let found = f64::from(blended.stats.blend_deviation.unwrap());
                assert!((found / wanted - 1.0).abs() < 1e-2, "deviation {found}, not {wanted}");
            }
        }
    }
}

#[test]
fn chunks_that_are_reused_are_the_rotated_cache_at_their_places() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for dtype in [KvDtype::F32, KvDtype::Bf16] {
        let model = model(dtype);
        let case = case(&model, &[7, 260, 40, 1], &mut rng);
        let config = BlendConfig { mode: BlendMode::Reuse, ..BlendConfig::default() };
        let blended = blend(&model, &Context::unasked(&[BOS], &case.chunks), &config, &|| false).unwrap();
        assert_eq!((blended.stats.recomputed_tokens, blended.stats.blend_deviation), (1, None));
        for layer in 0..LAYERS {
            for row in 1..case.tokens.len() {
                let holds = holds(&model, &blended, &case.cached, layer, row, tolerances(dtype)[0]);
                assert!(holds, "{dtype:?}, layer {layer}, row {row}");
            }
        }
    }
}

#[test]
fn other_tokens_of_equal_number_before_a_chunk_do_not_make_it_exact() {
    let treatment = |prompt: &[u32], prefix: &[u32]| {
        let kv = ChunkKv { tokens: 2, layers: Vec::new() };
        let chunk = PromptChunk { tokens: [7, 8].into(), prefix: prefix.into(), source: Some(Arc::new(kv)) };
        BlendPlan::new(prompt, &[chunk], &BlendConfig::default(), &[]).spans.last().unwrap().treatment
    };
    assert_eq!(treatment(&[1, 5, 6], &[1, 5, 6]), Treatment::Exact);
    for other in [[1, 5, 9], [9, 5, 6], [5, 1, 6]] {
        assert_eq!(treatment(&[1, 5, 6], &other), Treatment::Cached, "{other:?}");
    }
    assert_eq!(treatment(&[1, 5, 6], &[1, 5]), Treatment::Cached);
    assert_eq!(treatment(&[1, 5, 6], &[]), Treatment::Cached);
    assert_eq!(treatment(&[], &[]), Treatment::Exact);
}

#[test]
fn a_share_is_rounded_to_the_nearest_number_of_rows() {
    let count = |rows: usize, ratio| highest(&vec![1.0; rows], Budget::Tokens(ratio)).len();
    assert_eq!(count(45, 0.3), 14);
    assert_eq!([count(10, 0.14), count(10, 0.16), count(3, 0.5), count(1, 0.49)], [1, 2, 2, 0]);
    assert_eq!([count(1000, 0.0), count(1000, 1.0)], [0, 1000]);
}

proptest! {
    #[test]
    fn no_row_that_is_left_deviates_more_than_one_that_is_chosen(
        deviation in prop::collection::vec(0u8..20, 0..60), share in 0usize..=16,
    ) {
        let deviation: Vec<f32> = deviation.into_iter().map(f32::from).collect();
        let chosen = highest(&deviation, Budget::Tokens(share as f32 / 16.0));
        // Half a row is a row.
        prop_assert_eq!(chosen.len(), (deviation.len() * share + 8) / 16);
        prop_assert!(chosen.windows(2).all(|pair| pair[0] < pair[1]));
        let left = (0..deviation.len()).filter(|row| !chosen.contains(row));
        for row in left {
            for &better in &chosen {
                let wins = deviation[better] > deviation[row] || (deviation[better] == deviation[row] && better < row);
                prop_assert!(wins, "{better} was chosen, {row} was not");
            }
        }
    }
}
