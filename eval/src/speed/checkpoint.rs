//! A model folder with random weights, for measurements that do not depend on what the weights are.
//!
//! Every number follows from the seed, its tensor's place and its own: threads and shards change nothing. Threads
//! write disjoint ranges of the files; nothing is held in memory but a buffer each.

use std::fmt;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use engine::Tokenizer;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::random::mix;
use crate::error::{EvalError, Result};
use crate::progress::{Meter, Progress};

/// Standard deviation of the weights, that of freshly initialised Llama models: RMS norms keep activations finite.
const DEVIATION: f64 = 0.02;
/// Bytes that one write hands to the system.
const PIECE: usize = 8 << 20;
/// Bytes of a number.
const BF16: usize = 2;

/// Shapes that can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckpointShape {
    /// Llama-3.1-8B.
    Llama8b,
    /// Two layers of the same kind, for tests.
    Tiny,
}

impl FromStr for CheckpointShape {
    type Err = EvalError;
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "8b" => Ok(CheckpointShape::Llama8b),
            "tiny" => Ok(CheckpointShape::Tiny),
            other => {
                Err(EvalError::UnknownName { what: "shape", name: other.to_owned(), known: "8b, tiny".to_owned() })
            }
        }
    }
}

impl fmt::Display for CheckpointShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CheckpointShape::Llama8b => "8b",
            CheckpointShape::Tiny => "tiny",
        })
    }
}

/// What [`write_checkpoint`] writes.
#[derive(Debug, Clone)]
pub struct CheckpointOptions {
    /// The folder; it must not hold a model yet.
    pub dir: PathBuf,
    /// The model's shape.
    pub shape: CheckpointShape,
    /// Seed of the weights.
    pub seed: u64,
    /// Folder whose tokenizer and prompt format are copied; its ids must fit the vocabulary.
    pub tokenizer_dir: PathBuf,
    /// Bytes of a file at most, where one tensor is not larger.
    pub shard_bytes: u64,
    /// Writing threads; 0: all cores.
    pub threads: usize,
}

impl Default for CheckpointOptions {
    fn default() -> Self {
        CheckpointOptions {
            dir: PathBuf::new(),
            shape: CheckpointShape::Llama8b,
            seed: 1,
            tokenizer_dir: PathBuf::new(),
            shard_bytes: 5_000_000_000,
            threads: 0,
        }
    }
}

/// What was written.
#[derive(Debug, Clone, Serialize)]
pub struct CheckpointReport {
    /// The folder.
    pub dir: PathBuf,
    /// Files of weights.
    pub shards: usize,
    /// Bytes of all weights.
    pub bytes: u64,
    /// From the first byte to the last, as far as the system took them: it writes to disk later.
    pub seconds: f64,
}

impl CheckpointReport {
    /// One line.
    #[must_use]
    pub fn line(&self) -> String {
        let (gb, rate) = (self.bytes as f64 / 1e9, self.bytes as f64 / 1e9 / self.seconds.max(1e-9));
        let (dir, shards, seconds) = (self.dir.display(), self.shards, self.seconds);
        format!("{dir}: {gb:.2} GB of weights in {shards} files, {seconds:.1} s ({rate:.2} GB/s)")
    }
}

/// Writes a complete model folder: weights in bf16 (norms 1, everything else random with deviation 0.02), index,
/// configuration and tokenizer. `config.json` comes last: a folder with one is complete.
///
/// # Errors
/// [`EvalError::BadOption`] for a folder that holds a model or a part of one; [`EvalError::Io`]; those of the tokenizer.
pub fn write_checkpoint(options: &CheckpointOptions, progress: &mut dyn FnMut(&Progress)) -> Result<CheckpointReport> {
    let dims = Dims::of(options.shape);
    let tokenizer = Tokenizer::from_dir(&options.tokenizer_dir, dims.vocab)?;
    fs::create_dir_all(&options.dir).map_err(EvalError::io("create", &options.dir))?;
    refuse_model(&options.dir)?;
    let started = Instant::now();
    let shards = shards(dims.tensors(), options.shard_bytes);
    write_weights(options, &shards, progress)?;
    let seconds = started.elapsed().as_secs_f64();
    let bytes = shards.iter().flat_map(|shard| &shard.tensors).map(Tensor::bytes).sum();
    write_index(&options.dir, &shards, bytes)?;
    for name in ["tokenizer.json", "tokenizer_config.json", "prompt.json"] {
        let from = options.tokenizer_dir.join(name);
        if from.is_file() {
            fs::copy(&from, options.dir.join(name)).map_err(EvalError::io("copy", &from))?;
        }
    }
    let generation = json!({"bos_token_id": tokenizer.bos(), "eos_token_id": tokenizer.eos(), "do_sample": false});
    write_json(&options.dir.join("generation_config.json"), &generation)?;
    write_json(&options.dir.join("config.json"), &dims.config(&tokenizer))?;
    Ok(CheckpointReport { dir: options.dir.clone(), shards: shards.len(), bytes, seconds })
}

fn refuse_model(dir: &Path) -> Result<()> {
    let listed = fs::read_dir(dir).map_err(EvalError::io("read", dir))?;
    let names = listed.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    match names.into_iter().find(|name| name == "config.json" || name.contains(".safetensors")) {
        None => Ok(()),
        Some(name) => Err(EvalError::BadOption {
            what: "the folder for the model",
            found: format!("{} with {name}", dir.display()),
            expected: "a folder without a model: choose another, or remove that one".into(),
        }),
    }
}

/// The numbers of a shape, named as in [`engine::ModelSpec`].
struct Dims {
    layers: usize,
    hidden: usize,
    intermediate: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocab: usize,
}

impl Dims {
    fn of(shape: CheckpointShape) -> Dims {
        match shape {
            CheckpointShape::Llama8b => Dims {
                layers: 32,
                hidden: 4096,
                intermediate: 14_336,
                heads: 32,
                kv_heads: 8,
                head_dim: 128,
                vocab: 128_256,
            },
            CheckpointShape::Tiny => {
                Dims { layers: 2, hidden: 256, intermediate: 512, heads: 8, kv_heads: 2, head_dim: 32, vocab: 8192 }
            }
        }
    }

    /// All tensors, in the order of the model.
    fn tensors(&self) -> Vec<Tensor> {
        let (hidden, inner) = (self.hidden, self.intermediate);
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut tensors = vec![Tensor::random("model.embed_tokens.weight", &[self.vocab, hidden])];
        for layer in 0..self.layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            tensors.extend([
                Tensor::ones(name("input_layernorm"), hidden),
                Tensor::random(name("self_attn.q_proj"), &[queries, hidden]),
                Tensor::random(name("self_attn.k_proj"), &[keys, hidden]),
                Tensor::random(name("self_attn.v_proj"), &[keys, hidden]),
                Tensor::random(name("self_attn.o_proj"), &[hidden, queries]),
                Tensor::ones(name("post_attention_layernorm"), hidden),
                Tensor::random(name("mlp.gate_proj"), &[inner, hidden]),
                Tensor::random(name("mlp.up_proj"), &[inner, hidden]),
                Tensor::random(name("mlp.down_proj"), &[hidden, inner]),
            ]);
        }
        tensors.push(Tensor::ones("model.norm.weight", hidden));
        tensors.push(Tensor::random("lm_head.weight", &[self.vocab, hidden]));
        tensors.iter_mut().enumerate().for_each(|(number, tensor)| tensor.number = number as u64);
        tensors
    }

    /// `config.json` of a Llama 3.1.
    fn config(&self, tokenizer: &Tokenizer) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": self.hidden, "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "vocab_size": self.vocab, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "attention_bias": false, "mlp_bias": false, "attention_dropout": 0.0, "initializer_range": DEVIATION,
            "tie_word_embeddings": false, "use_cache": true, "torch_dtype": "bfloat16",
            "bos_token_id": tokenizer.bos(), "eos_token_id": tokenizer.eos(),
        })
    }
}

struct Tensor {
    name: String,
    shape: Vec<usize>,
    random: bool,
    /// Its place in the model.
    number: u64,
}

impl Tensor {
    fn random(name: impl Into<String>, shape: &[usize]) -> Tensor {
        Tensor { name: name.into(), shape: shape.to_vec(), random: true, number: 0 }
    }

    fn ones(name: impl Into<String>, width: usize) -> Tensor {
        Tensor { name: name.into(), shape: vec![width], random: false, number: 0 }
    }

    fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * BF16) as u64
    }
}

/// One file of weights.
struct Shard {
    name: String,
    header: Vec<u8>,
    tensors: Vec<Tensor>,
}

/// Tensors in order, as many in a file as fit.
fn shards(tensors: Vec<Tensor>, limit: u64) -> Vec<Shard> {
    let mut groups: Vec<(u64, Vec<Tensor>)> = Vec::new();
    for tensor in tensors {
        let bytes = tensor.bytes();
        match groups.last_mut() {
            Some((sum, group)) if *sum + bytes <= limit => {
                *sum += bytes;
                group.push(tensor);
            }
            _ => groups.push((bytes, vec![tensor])),
        }
    }
    let count = groups.len();
    let named = groups.into_iter().enumerate().map(|(at, (_, tensors))| Shard {
        name: format!("model-{:05}-of-{count:05}.safetensors", at + 1),
        header: header(&tensors),
        tensors,
    });
    named.collect()
}

/// The header of a safetensors file: its length in 8 bytes, then JSON, filled up so that tensors are aligned.
fn header(tensors: &[Tensor]) -> Vec<u8> {
    let mut fields = Map::new();
    fields.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut at = 0;
    for tensor in tensors {
        let end = at + tensor.bytes();
        fields.insert(tensor.name.clone(), json!({"dtype": "BF16", "shape": tensor.shape, "data_offsets": [at, end]}));
        at = end;
    }
    let mut text = Value::Object(fields).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(64), b' ');
    [&(text.len() as u64).to_le_bytes(), &text[..]].concat()
}

/// A range of one tensor and its place in a file.
struct Piece<'a> {
    file: usize,
    at: u64,
    tensor: &'a Tensor,
    /// In bytes of the tensor; even numbers of numbers.
    begin: usize,
    end: usize,
}

fn pieces(shards: &[Shard]) -> Vec<Piece<'_>> {
    let mut pieces = Vec::new();
    for (file, shard) in shards.iter().enumerate() {
        let mut at = shard.header.len() as u64;
        for tensor in &shard.tensors {
            let bytes = tensor.bytes() as usize;
            for begin in (0..bytes).step_by(PIECE) {
                let end = bytes.min(begin + PIECE);
                pieces.push(Piece { file, at: at + begin as u64, tensor, begin, end });
            }
            at += bytes as u64;
        }
    }
    pieces
}

fn write_weights(options: &CheckpointOptions, shards: &[Shard], progress: &mut dyn FnMut(&Progress)) -> Result<()> {
    let mut files = Vec::new();
    for shard in shards {
        let path = options.dir.join(&shard.name);
        let file = File::create(&path).map_err(EvalError::io("create", &path))?;
        file.write_all_at(&shard.header, 0).map_err(EvalError::io("write", &path))?;
        files.push((path, file));
    }
    let (pieces, table) = (pieces(shards), Table::new(DEVIATION));
    let total: usize = pieces.iter().map(|piece| piece.end - piece.begin).sum();
    let mut meter = Meter::new(pieces.len(), total as f64, progress);
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads = if options.threads == 0 { cores } else { options.threads };
    let next = AtomicUsize::new(0);
    let (done, news) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..threads {
            let (done, pieces, table, files, next) = (done.clone(), &pieces, &table, &files, &next);
            scope.spawn(move || {
                let mut buffer = Vec::with_capacity(PIECE);
                while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                    table.fill(options.seed, piece, &mut buffer);
                    let (path, file) = &files[piece.file];
                    let written = file.write_all_at(&buffer, piece.at).map_err(EvalError::io("write", path));
                    // Whoever listens has gone away after an error: then the rest is not wanted.
                    if done.send(written.map(|()| buffer.len())).is_err() {
                        return;
                    }
                }
            });
        }
        drop(done);
        let (mut steps, mut bytes) = (0, 0);
        for written in news {
            (steps, bytes) = (steps + 1, bytes + written?);
            if bytes >= total.div_ceil(20) {
                meter.advance(steps, bytes as f64, "writing weights");
                (steps, bytes) = (0, 0);
            }
        }
        Ok(())
    })
}

fn write_index(dir: &Path, shards: &[Shard], bytes: u64) -> Result<()> {
    let places = shards.iter().flat_map(|s| s.tensors.iter().map(|t| (t.name.clone(), Value::from(s.name.clone()))));
    let map: Map<String, Value> = places.collect();
    let index = json!({"metadata": {"total_size": bytes}, "weight_map": map});
    write_json(&dir.join("model.safetensors.index.json"), &index)
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    fs::write(path, format!("{value:#}\n")).map_err(EvalError::io("write", path))
}

/// bf16 numbers by the sum of four random bytes, whose distribution is a normal one up to 3.4 deviations (Irwin-Hall).
struct Table([u16; 4 * 255 + 1]);

impl Table {
    fn new(deviation: f64) -> Table {
        // The variance of one byte is (256^2 - 1) / 12.
        let unit = deviation / (4.0 * f64::from(256 * 256 - 1) / 12.0).sqrt();
        Table(std::array::from_fn(|sum| bf16((unit * (sum as f64 - 510.0)) as f32)))
    }

    /// Replaces `buffer` by the bytes of a piece.
    fn fill(&self, seed: u64, piece: &Piece<'_>, buffer: &mut Vec<u8>) {
        buffer.clear();
        let count = (piece.end - piece.begin) / BF16;
        if !piece.tensor.random {
            buffer.extend((0..count).flat_map(|_| bf16(1.0).to_le_bytes()));
            return;
        }
        let key = mix(mix(seed) ^ piece.tensor.number);
        let first = (piece.begin / BF16 / 2) as u64;
        for pair in first..first + count.div_ceil(2) as u64 {
            let [a, b] = byte_sums(mix(key.wrapping_add(pair)));
            let (a, b) = (u32::from(self.0[a]), u32::from(self.0[b]));
            buffer.extend_from_slice(&(a | b << 16).to_le_bytes());
        }
        buffer.truncate(piece.end - piece.begin);
    }
}

/// The sums of the lower and of the upper four bytes.
fn byte_sums(word: u64) -> [usize; 2] {
    const EVEN: u64 = 0x00ff_00ff_00ff_00ff;
    let pairs = (word & EVEN) + (word >> 8 & EVEN);
    let sums = pairs + (pairs >> 16);
    [(sums & 0xffff) as usize, (sums >> 32 & 0xffff) as usize]
}

/// The nearest bf16 number, ties to even.
fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use engine::{Engine, EngineConfig, Weights};

    fn options(dir: &Path) -> CheckpointOptions {
        let tokenizer_dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/reference");
        let shape = CheckpointShape::Tiny;
        CheckpointOptions { dir: dir.to_owned(), shape, tokenizer_dir, ..CheckpointOptions::default() }
    }

    #[test]
    fn weights_depend_on_the_seed_and_neither_on_threads_nor_on_shards() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, change: &dyn Fn(&mut CheckpointOptions)| {
            let mut options = options(&dir.path().join(name));
            change(&mut options);
            let report = write_checkpoint(&options, &mut |_| {}).unwrap();
            let weights = Weights::open(&options.dir).unwrap();
            assert_eq!(weights.bytes(), report.bytes);
            (report.shards, weights.fingerprint())
        };
        let (shards, one) = write("one", &|o| o.threads = 1);
        let (many, three) = write("three", &|o| (o.threads, o.shard_bytes) = (3, 1 << 20));
        assert!(shards == 1 && many > 3, "{shards} {many}");
        assert_eq!(one, three);
        assert_ne!(one, write("other", &|o| o.seed = 2).1);
    }

    #[test]
    fn numbers_are_normal_with_the_right_deviation() {
        let dir = tempfile::tempdir().unwrap();
        let options = options(&dir.path().join("model"));
        write_checkpoint(&options, &mut |_| {}).unwrap();
        let weights = Weights::open(&options.dir).unwrap();
        let numbers = weights.tensor("model.embed_tokens.weight", &[8192, 256]).unwrap().to_f32();
        let n = numbers.len() as f64;
        let mean = numbers.iter().map(|x| f64::from(*x)).sum::<f64>() / n;
        let moment = |power| numbers.iter().map(|x| f64::from(*x).powi(power)).sum::<f64>() / n;
        let deviation = moment(2).sqrt();
        assert!(mean.abs() < 1e-4 && (deviation / DEVIATION - 1.0).abs() < 0.01, "{mean} {deviation}");
        // A normal distribution has kurtosis 3, four bytes 3 - 0.3, a uniform one 1.8.
        let kurtosis = moment(4) / deviation.powi(4);
        assert!((2.6..3.1).contains(&kurtosis), "{kurtosis}");
        assert!(weights.tensor("model.norm.weight", &[256]).unwrap().to_f32().iter().all(|x| *x == 1.0));
    }

    #[test]
    fn the_engine_reads_and_writes_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let options = options(&dir.path().join("model"));
        write_checkpoint(&options, &mut |_| {}).unwrap();
        let config = EngineConfig { model_dir: options.dir.clone(), threads: 1, ..EngineConfig::default() };
        let engine = Engine::load(config).unwrap();
        assert_eq!((engine.max_context(), engine.spec().vocab), (131_072, 8192));
        // Tokens beyond the tokenizer's are the model's all the same.
        let prompt = engine::Prompt::plain(vec![5, 8000, 8191]);
        let mut request = engine::Request::new(prompt, 8);
        request.ignore_eos = true;
        let answer = crate::ask::ask(&engine, request).unwrap();
        assert_eq!(answer.ids.len(), 8);
    }

    #[test]
    fn a_folder_with_a_model_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let options = options(dir.path());
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        let error = write_checkpoint(&options, &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains("config.json") && error.contains("choose another"), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_large_shape_has_the_published_number_of_parameters() {
        let tensors = Dims::of(CheckpointShape::Llama8b).tensors();
        let parameters: u64 = tensors.iter().map(|t| t.bytes() / 2).sum();
        assert_eq!((tensors.len(), parameters), (291, 8_030_261_248));
        let shards = shards(tensors, 5_000_000_000);
        let sizes: Vec<u64> = shards.iter().map(|s| s.tensors.iter().map(Tensor::bytes).sum()).collect();
        assert!(shards.len() == 4 && sizes.iter().all(|size| *size <= 5_000_000_000), "{sizes:?}");
    }

    #[test]
    fn rounding_is_to_the_nearest_and_sums_are_of_bytes() {
        assert_eq!(
            [bf16(1.0), bf16(-2.0), bf16(1.0 + 1.0 / 256.0), bf16(1.0 + 3.0 / 256.0)],
            [0x3f80, 0xc000, 0x3f80, 0x3f82]
        );
        assert_eq!(byte_sums(u64::MAX), [1020, 1020]);
        assert_eq!(byte_sums(0x0102_0304_1020_3040), [0xa0, 10]);
    }
}
