//! Small random models of every shape that kernels are specialised for.

use std::path::Path;
use std::sync::OnceLock;
use std::time::SystemTime;

use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::TensorView;

use super::{CudaConfig, CudaModel, KvDtype, Limits, ModelSpec, Transformer, Weights};

/// How matrices are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stored {
    /// All as [`Tiny::bf16`] says.
    Alike,
    F16,
    /// In bf16, f32 and f16, each tensor in another format than the one before it.
    Mixed,
}

/// A small random model.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tiny {
    pub(super) family: &'static str,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) bf16: bool,
    pub(super) stored: Stored,
    pub(super) kv: KvDtype,
    pub(super) window: Option<usize>,
}

pub(super) const PLAIN: Tiny = Tiny {
    family: "LlamaForCausalLM",
    hidden: 256,
    intermediate: 344,
    heads: 4,
    kv_heads: 2,
    head_dim: 64,
    bf16: true,
    stored: Stored::Alike,
    kv: KvDtype::Bf16,
    window: None,
};

/// Every shape that some kernel treats in its own way.
pub(super) const SHAPES: [Tiny; 10] = [
    PLAIN,
    Tiny { heads: 6, kv_heads: 2, hidden: 384, ..PLAIN },
    Tiny { heads: 8, kv_heads: 1, head_dim: 128, ..PLAIN },
    Tiny { heads: 12, kv_heads: 1, head_dim: 64, ..PLAIN },
    Tiny { heads: 4, kv_heads: 4, head_dim: 128, family: "Qwen3ForCausalLM", ..PLAIN },
    Tiny { heads: 7, kv_heads: 1, head_dim: 64, family: "Qwen2ForCausalLM", ..PLAIN },
    Tiny { heads: 3, kv_heads: 3, head_dim: 48, hidden: 144, ..PLAIN },
    Tiny { head_dim: 64, window: Some(100), family: "MistralForCausalLM", ..PLAIN },
    Tiny { bf16: false, kv: KvDtype::F32, hidden: 200, ..PLAIN },
    Tiny { bf16: false, kv: KvDtype::Bf16, ..PLAIN },
];

pub(super) const VOCAB: usize = 1000;
pub(super) const LAYERS: usize = 3;
pub(super) const LIMITS: Limits =
    Limits { rows: 700, sequences: 24, context: 8192, kv_bytes: 1 << 28, chunk_bytes: Some(1 << 24) };

pub(super) fn config() -> CudaConfig {
    CudaConfig { memory_budget_bytes: 8 << 30, ..CudaConfig::default() }
}

impl Tiny {
    /// Writes config and weights as Hugging Face publishes them.
    pub(super) fn write(&self, dir: &Path, rng: &mut ChaCha8Rng) {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let config = serde_json::json!({
            "architectures": [self.family], "hidden_size": self.hidden, "intermediate_size": self.intermediate,
            "num_hidden_layers": LAYERS, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim, "vocab_size": VOCAB, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "tie_word_embeddings": false, "sliding_window": self.window, "bos_token_id": 1,
            "eos_token_id": [2, 7],
        });
        std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
        let mut tensors: Vec<(String, Vec<usize>, safetensors::Dtype, Vec<u8>)> = Vec::new();
        let mut add = |name: String, shape: Vec<usize>, around: f32| {
            let inputs = *shape.last().unwrap();
            let spread = if shape.len() == 2 { (3.0 / inputs as f32).sqrt() } else { 0.3 };
            let numbers = (0..shape.iter().product()).map(|_| around + spread * rng.random_range(-1.0f32..1.0));
            use safetensors::Dtype::{BF16, F16, F32};
            let dtype = match self.stored {
                Stored::Alike if self.bf16 => BF16,
                Stored::Alike => F32,
                Stored::F16 => F16,
                Stored::Mixed => [BF16, F32, F16, BF16, F16][tensors.len() % 5],
            };
            let bytes = match dtype {
                BF16 => numbers.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
                F16 => numbers.flat_map(|x| f16::from_f32(x).to_le_bytes()).collect(),
                _ => numbers.flat_map(f32::to_le_bytes).collect(),
            };
            tensors.push((name, shape, dtype, bytes));
        };
        add("model.embed_tokens.weight".into(), vec![VOCAB, self.hidden], 0.0);
        add("lm_head.weight".into(), vec![VOCAB, self.hidden], 0.0);
        add("model.norm.weight".into(), vec![self.hidden], 1.0);
        for layer in 0..LAYERS {
            let mut add = |name: &str, shape: Vec<usize>, around: f32| {
                add(format!("model.layers.{layer}.{name}"), shape, around);
            };
            for (part, outputs) in [("q", q), ("k", kv), ("v", kv)] {
                add(&format!("self_attn.{part}_proj.weight"), vec![outputs, self.hidden], 0.0);
                if self.family.starts_with("Qwen2") {
                    add(&format!("self_attn.{part}_proj.bias"), vec![outputs], 0.0);
                }
            }
            if self.family.starts_with("Qwen3") {
                add("self_attn.q_norm.weight", vec![self.head_dim], 1.0);
                add("self_attn.k_norm.weight", vec![self.head_dim], 1.0);
            }
            add("self_attn.o_proj.weight", vec![self.hidden, q], 0.0);
            for part in ["gate", "up"] {
                add(&format!("mlp.{part}_proj.weight"), vec![self.intermediate, self.hidden], 0.0);
            }
            add("mlp.down_proj.weight", vec![self.hidden, self.intermediate], 0.0);
            add("input_layernorm.weight", vec![self.hidden], 1.0);
            add("post_attention_layernorm.weight", vec![self.hidden], 1.0);
        }
        let views = tensors
            .iter()
            .map(|(name, shape, dtype, bytes)| (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
        safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
    }

    /// The model on the CPU and on the GPU.
    pub(super) fn pair(&self, seed: u64) -> (Transformer, Transformer) {
        self.pair_as(seed, &config(), LIMITS)
    }

    pub(super) fn pair_as(&self, seed: u64, config: &CudaConfig, limits: Limits) -> (Transformer, Transformer) {
        let seed = fresh(seed);
        let dir = tempfile::tempdir().unwrap();
        self.write(dir.path(), &mut ChaCha8Rng::seed_from_u64(seed));
        let spec = ModelSpec::from_dir(dir.path()).unwrap();
        let weights = Weights::open(dir.path()).unwrap();
        let host = Transformer::load(spec.clone(), &weights, 4, Some(self.kv)).unwrap();
        let device = Transformer::load_on_device(spec, &weights, 4, Some(self.kv), config, limits).unwrap();
        poison(device.device().unwrap());
        (host, device)
    }
}

/// A seed that a test which failed has printed, to bring its run back; `None`: another one in each run.
const SEED: Option<u64> = None;

fn fresh(number: u64) -> u64 {
    static RUN: OnceLock<u64> = OnceLock::new();
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let run = *RUN.get_or_init(|| SEED.unwrap_or_else(now));
    println!("SEED: {run}");
    run * 1000 + number
}

pub(super) fn rng(number: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(fresh(number))
}

/// Fills all intermediate memory with NaN, so that what a kernel leaves unwritten is seen.
fn poison(model: &CudaModel) {
    model.device.bind().unwrap();
    let w = &model.workspace;
    for memory in [
        &w.x,
        &w.qkv,
        &w.q,
        &w.keys,
        &w.values,
        &w.cached[0],
        &w.cached[1],
        &w.attention,
        &w.lse,
        &w.other,
        &w.other_lse,
        &w.split,
        &w.product,
        &w.gate_up,
        &w.split_hidden,
        &w.hidden,
        &w.finals,
        &w.logits,
        &model.sampling.chosen,
    ] {
        memory.fill(0xff).unwrap();
    }
}
