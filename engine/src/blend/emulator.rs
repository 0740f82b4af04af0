//! An emulator of every rule, for tests: one ordinary pass over the whole prompt, in double precision and one row after the other,
//! in which tokens that are not recomputed take their cached keys and values on every layer. It shares nothing with the
//! engine but the weights.

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::Path;

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use crate::config::Correction;

pub(super) const LAYERS: usize = 4;
pub(super) const VOCAB: usize = 96;
const HIDDEN: usize = 64;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 16;
const INNER: usize = 80;
const THETA: f64 = 10_000.0;
const EPS: f64 = 1e-5;
const WIDTH: usize = KV_HEADS * DIM;

/// A random model of the Qwen 2 kind (with biases), whose attention is neither flat nor a single peak.
pub(super) struct Emulator {
    tensors: HashMap<String, Vec<f64>>,
}

/// Unrotated keys and values of all tokens, one pair a layer, `[tokens][WIDTH]`.
pub(super) type Kv = Vec<(Vec<Vec<f64>>, Vec<Vec<f64>>)>;

/// What is not computed.
pub(super) struct Cache<'a> {
    pub(super) kv: &'a Kv,
    /// By token: it takes its cached keys and values.
    pub(super) stale: Vec<bool>,
    /// By token, the chunk that it belongs to where its state is composed: stale or recomputed.
    pub(super) chunk: Vec<Option<usize>>,
    pub(super) correction: Correction,
}

/// What a pass has seen.
pub(super) struct Seen {
    /// Of the last token.
    pub(super) logits: Vec<f64>,
    /// By token, as attended but before rotation.
    pub(super) kv: Kv,
    /// By token, what the last token pays on layers from half depth on, and the last `asked` tokens on all layers.
    pub(super) last: Vec<f64>,
    pub(super) question: Vec<f64>,
}

fn tensors() -> Vec<(String, Vec<usize>)> {
    let mut all = vec![
        ("model.embed_tokens.weight".into(), vec![VOCAB, HIDDEN]),
        ("model.norm.weight".into(), vec![HIDDEN]),
        ("lm_head.weight".into(), vec![VOCAB, HIDDEN]),
    ];
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("input_layernorm.weight", vec![HIDDEN]),
            ("post_attention_layernorm.weight", vec![HIDDEN]),
            ("self_attn.q_proj.weight", vec![HEADS * DIM, HIDDEN]),
            ("self_attn.k_proj.weight", vec![WIDTH, HIDDEN]),
            ("self_attn.v_proj.weight", vec![WIDTH, HIDDEN]),
            ("self_attn.q_proj.bias", vec![HEADS * DIM]),
            ("self_attn.k_proj.bias", vec![WIDTH]),
            ("self_attn.v_proj.bias", vec![WIDTH]),
            ("self_attn.o_proj.weight", vec![HIDDEN, HEADS * DIM]),
            ("mlp.gate_proj.weight", vec![INNER, HIDDEN]),
            ("mlp.up_proj.weight", vec![INNER, HIDDEN]),
            ("mlp.down_proj.weight", vec![HIDDEN, INNER]),
        ] {
            all.push((format!("model.layers.{layer}.{name}"), shape));
        }
    }
    all
}

fn matmul(x: &[f64], weight: &[f64]) -> Vec<f64> {
    weight.chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
}

fn norm(x: &[f64], weight: &[f64]) -> Vec<f64> {
    let scale = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + EPS).sqrt();
    x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
}

/// All heads of a row at a position.
pub(super) fn rotated(row: &[f64], position: usize) -> Vec<f64> {
    let mut out = row.to_vec();
    for head in out.chunks_exact_mut(DIM) {
        for i in 0..DIM / 2 {
            let angle = position as f64 / THETA.powf(2.0 * i as f64 / DIM as f64);
            let (a, b) = (head[i], head[i + DIM / 2]);
            head[i] = a * angle.cos() - b * angle.sin();
            head[i + DIM / 2] = b * angle.cos() + a * angle.sin();
        }
    }
    out
}

/// The corrections of a layer's cached rows, by token.
fn correct(fresh: &[Vec<f64>], cached: &[Vec<f64>], cache: &Cache<'_>, out: &mut [Vec<f64>]) {
    let difference = |token: usize| fresh[token].iter().zip(&cached[token]).map(|(f, c)| f - c).collect::<Vec<f64>>();
    let computed = |chunk: Option<usize>| {
        let all = 0..cache.chunk.len();
        all.filter(move |t| {
            !cache.stale[*t] && cache.chunk[*t].is_some() && (chunk.is_none() || cache.chunk[*t] == chunk)
        })
    };
    let sum = |tokens: &mut dyn Iterator<Item = usize>| {
        tokens.fold((0.0, vec![0.0; WIDTH]), |(n, sum), t| {
            (n + 1.0, sum.iter().zip(difference(t)).map(|(a, b)| a + b).collect::<Vec<f64>>())
        })
    };
    let (count, all) = sum(&mut computed(None));
    if count < 4.0 {
        return;
    }
    let mut of_chunks: HashMap<Option<usize>, Vec<f64>> = HashMap::new();
    for token in (0..cache.chunk.len()).filter(|t| cache.stale[*t]) {
        let own = if cache.correction == Correction::Chunk { cache.chunk[token] } else { None };
        let shift = of_chunks.entry(own).or_insert_with(|| {
            let (n, part) = own.map_or((0.0, vec![0.0; WIDTH]), |own| sum(&mut computed(Some(own))));
            (0..WIDTH).map(|d| (part[d] + 8.0 * all[d] / count) / (n + 8.0)).collect()
        });
        out[token].iter_mut().zip(shift).for_each(|(x, shift)| *x += *shift);
    }
}

impl Emulator {
    /// Writes a model folder with such weights.
    pub(super) fn write(dir: &Path, rng: &mut ChaCha8Rng) -> Emulator {
        let config = json!({
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": HIDDEN, "vocab_size": VOCAB,
            "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
            "intermediate_size": INNER, "rms_norm_eps": EPS, "rope_theta": THETA, "hidden_act": "silu",
            "max_position_embeddings": 4096, "tie_word_embeddings": false, "eos_token_id": 2, "bos_token_id": 1,
        });
        std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
        let (mut stored, mut tensors_of) = (Vec::new(), HashMap::new());
        for (name, shape) in tensors() {
            let size = match () {
                () if name.contains("norm") => 0.0,
                () if name.contains("q_proj") || name.contains("k_proj") => 0.25,
                () if name.contains("embed") => 1.0,
                () => 0.2,
            };
            let base = if name.contains("norm") { 1.0 } else { 0.0 };
            let numbers: Vec<f32> =
                (0..shape.iter().product()).map(|_| base + size * rng.random_range(-1.7..1.7f32)).collect();
            tensors_of.insert(name.clone(), numbers.iter().map(|x| f64::from(*x)).collect());
            stored.push((name, shape, numbers.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>()));
        }
        let views = stored
            .iter()
            .map(|(name, shape, bytes)| (name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
        std::fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
        Emulator { tensors: tensors_of }
    }

    fn part(&self, layer: usize, name: &str) -> &[f64] {
        &self.tensors[&format!("model.layers.{layer}.{name}")]
    }

    fn projected(&self, layer: usize, name: &str, x: &[f64]) -> Vec<f64> {
        let mut y = matmul(x, self.part(layer, &format!("self_attn.{name}.weight")));
        y.iter_mut().zip(self.part(layer, &format!("self_attn.{name}.bias"))).for_each(|(y, b)| *y += b);
        y
    }

    /// A pass over `tokens`; the last `asked` ask. `leaky`: the queries of recomputed tokens are masked as if they were the last
    /// tokens of the prompt, as a causal mask that is aligned at its lower right corner does to scattered rows.
    pub(super) fn pass(&self, tokens: &[u32], cache: Option<&Cache<'_>>, asked: usize, leaky: bool) -> Seen {
        let n = tokens.len();
        let stale = |token: usize| cache.is_some_and(|cache| cache.stale[token]);
        let active: Vec<usize> = (0..n).filter(|t| !stale(*t)).collect();
        let sees = |token: usize| match active.iter().position(|t| *t == token) {
            Some(rank) if leaky => n - active.len() + rank + 1,
            _ => token + 1,
        };
        let embedding = &self.tensors["model.embed_tokens.weight"];
        let mut x: Vec<Vec<f64>> =
            tokens.iter().map(|t| embedding[*t as usize * HIDDEN..][..HIDDEN].to_vec()).collect();
        let mut seen = Seen { logits: Vec::new(), kv: Vec::new(), last: vec![0.0; n], question: vec![0.0; n] };
        for layer in 0..LAYERS {
            let h: Vec<Vec<f64>> = x.iter().map(|x| norm(x, self.part(layer, "input_layernorm.weight"))).collect();
            let project = |name| h.iter().map(|h| self.projected(layer, name, h)).collect::<Vec<_>>();
            let (queries, mut keys, mut values) = (project("q_proj"), project("k_proj"), project("v_proj"));
            if let Some(cache) = cache {
                let (fresh_keys, fresh_values) = (keys.clone(), values.clone());
                let (cached_keys, cached_values) = &cache.kv[layer];
                for token in (0..cache.stale.len()).filter(|t| cache.stale[*t]) {
                    (keys[token], values[token]) = (cached_keys[token].clone(), cached_values[token].clone());
                }
                if layer > 0 && cache.correction != Correction::None {
                    correct(&fresh_keys, cached_keys, cache, &mut keys);
                    correct(&fresh_values, cached_values, cache, &mut values);
                }
            }
            let turned: Vec<Vec<f64>> = keys.iter().enumerate().map(|(at, key)| rotated(key, at)).collect();
            for token in 0..n {
                let q = rotated(&queries[token], token);
                let mut out = vec![0.0; HEADS * DIM];
                for head in 0..HEADS {
                    let kv = head / (HEADS / KV_HEADS) * DIM;
                    let score = |key: &Vec<f64>| {
                        let product: f64 =
                            q[head * DIM..][..DIM].iter().zip(&key[kv..kv + DIM]).map(|(a, b)| a * b).sum();
                        (product / (DIM as f64).sqrt()).exp()
                    };
                    let weights: Vec<f64> = turned[..sees(token)].iter().map(score).collect();
                    let sum: f64 = weights.iter().sum();
                    for (at, weight) in weights.iter().map(|w| w / sum).enumerate() {
                        (0..DIM).for_each(|d| out[head * DIM + d] += weight * values[at][kv + d]);
                        seen.last[at] += if token + 1 == n && 2 * layer >= LAYERS { weight } else { 0.0 };
                        seen.question[at] += if token + asked >= n { weight } else { 0.0 };
                    }
                }
                let add = |x: &mut Vec<f64>, y: Vec<f64>| x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
                add(&mut x[token], matmul(&out, self.part(layer, "self_attn.o_proj.weight")));
                let h = norm(&x[token], self.part(layer, "post_attention_layernorm.weight"));
                let gate = matmul(&h, self.part(layer, "mlp.gate_proj.weight"));
                let up = matmul(&h, self.part(layer, "mlp.up_proj.weight"));
                let inner: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
                add(&mut x[token], matmul(&inner, self.part(layer, "mlp.down_proj.weight")));
            }
            seen.kv.push((keys, values));
        }
        let last = norm(&x[n - 1], &self.tensors["model.norm.weight"]);
        seen.logits = matmul(&last, &self.tensors["lm_head.weight"]);
        seen
    }
}
