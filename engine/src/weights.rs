//! Weights from safetensors files, memory-mapped: one file, or shards with an index.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::SafeTensorError;
use serde_json::Value;

use crate::error::{EngineError, Result};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Number formats of stored weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a single.
    Bf16,
}

impl Dtype {
    /// Bytes of one number.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }
}

/// One tensor inside a mapped file.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    /// The stored format.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: &'a [usize],
    /// Row-major little-endian numbers; of any alignment.
    pub data: &'a [u8],
}

impl Tensor<'_> {
    /// The numbers, widened (exactly) to f32.
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        let pairs = || self.data.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        match self.dtype {
            Dtype::F32 => self.data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Dtype::F16 => pairs().map(|bits| f16::from_bits(bits).to_f32()).collect(),
            Dtype::Bf16 => pairs().map(|bits| bf16::from_bits(bits).to_f32()).collect(),
        }
    }
}

#[derive(Debug)]
struct Entry {
    shard: usize,
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Mmap,
}

/// The tensors of a model's folder. Files are mapped, not read: a byte costs memory once it is touched.
#[derive(Debug)]
pub struct Weights {
    dir: PathBuf,
    shards: Vec<Shard>,
    entries: BTreeMap<String, Entry>,
    /// Tensors that the index places in a file which lacks them: an error once they are asked for. (Indexes name tied
    /// embeddings and computed frequencies that nobody stored.)
    lacking: BTreeMap<String, PathBuf>,
}

/// What the names of a causal model's tensors begin with, but for its head.
const PREFIX: &str = "model.";

impl Weights {
    /// Maps `model.safetensors`, or the shards that `model.safetensors.index.json` names, in `dir`, and checks
    /// every header: names, shapes, number formats and offsets must describe each file completely. Tensors of a model that
    /// was saved without its head get the names that they have with it (`layers.0...` is `model.layers.0...`).
    ///
    /// # Errors
    /// [`EngineError::MissingFile`] and [`EngineError::CorruptWeights`], naming the file.
    pub fn open(dir: &Path) -> Result<Weights> {
        let mut weights =
            Weights { dir: dir.to_path_buf(), shards: Vec::new(), entries: BTreeMap::new(), lacking: BTreeMap::new() };
        let index = dir.join(INDEX);
        if index.is_file() && !dir.join(SINGLE).is_file() {
            weights.open_sharded(&index)?;
        } else {
            let single = dir.join(SINGLE);
            if !single.exists() {
                return Err(EngineError::MissingFile {
                    path: single,
                    needed_for: "it (or model.safetensors.index.json with its shards) holds the weights",
                    advice: "Other weight formats are not read: convert them to safetensors",
                });
            }
            weights.entries = weights.open_shard(&single)?;
        }
        weights.add_prefix();
        Ok(weights)
    }

    fn open_sharded(&mut self, index: &Path) -> Result<()> {
        let placed = read_index(index)?;
        let mut opened: BTreeMap<&String, BTreeMap<String, Entry>> = BTreeMap::new();
        for file in placed.values() {
            if !opened.contains_key(file) {
                let entries = self.open_shard(&self.dir.join(file))?;
                opened.insert(file, entries);
            }
        }
        for (name, file) in &placed {
            if let Some(entry) = opened.get_mut(file).and_then(|entries| entries.remove(name)) {
                self.entries.insert(name.clone(), entry);
            } else {
                self.lacking.insert(name.clone(), self.dir.join(file));
            }
        }
        // What the index does not name is there all the same; what it places elsewhere is not.
        for (name, entry) in opened.into_values().flatten() {
            if !placed.contains_key(&name) {
                self.entries.insert(name, entry);
            }
        }
        Ok(())
    }

    /// Gives the tensors of a model that was saved without its head the names that they have with it.
    fn add_prefix(&mut self) {
        if !self.entries.contains_key("embed_tokens.weight") {
            return;
        }
        let named = |name: String| if name.starts_with("lm_head.") { name } else { format!("{PREFIX}{name}") };
        self.entries =
            std::mem::take(&mut self.entries).into_iter().map(|(name, entry)| (named(name), entry)).collect();
        self.lacking = std::mem::take(&mut self.lacking).into_iter().map(|(name, file)| (named(name), file)).collect();
    }

    fn open_shard(&mut self, path: &Path) -> Result<BTreeMap<String, Entry>> {
        let reading = |e| EngineError::reading(path, e, "it holds weights");
        let corrupt = |why: String| EngineError::CorruptWeights { path: path.to_path_buf(), why };
        let file = File::open(path).map_err(reading)?;
        if !file.metadata().map_err(reading)?.is_file() {
            return Err(reading(std::io::ErrorKind::InvalidInput.into()));
        }
        // SAFETY: the map is read-only and private. The one hazard of mapping is another process that shortens or
        // rewrites the file in place: a shortened file raises SIGBUS, a rewritten one changes weights. Model files
        // are to be replaced by renaming, never edited in place while a process uses them.
        let map = unsafe { Mmap::map(&file) }.map_err(reading)?;
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|e| corrupt(explain(&e, &map)))?;
        let start = size_of::<u64>() + header;
        let mut entries = BTreeMap::new();
        for (name, info) in metadata.tensors() {
            let (begin, end) = info.data_offsets;
            let bytes = start.checked_add(begin).zip(start.checked_add(end));
            let Some((begin, end)) = bytes.filter(|(begin, end)| begin <= end && *end <= map.len()) else {
                return Err(corrupt(format!("tensor `{name}` ends at byte {end} of a file of {} bytes", map.len())));
            };
            let entry =
                Entry { shard: self.shards.len(), dtype: info.dtype, shape: info.shape.clone(), bytes: begin..end };
            entries.insert(name, entry);
        }
        self.shards.push(Shard { path: path.to_path_buf(), map });
        Ok(entries)
    }

    /// Whether a tensor of this name is there.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Bytes of all tensors.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.entries.values().map(|entry| entry.bytes.len() as u64).sum()
    }

    /// The mapped files.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(|shard| shard.path.as_path())
    }

    /// The tensor `name`, which must have this shape.
    ///
    /// # Errors
    /// [`EngineError::MissingTensor`], [`EngineError::TensorShape`], [`EngineError::TensorDtype`];
    /// [`EngineError::CorruptWeights`] where the index promised it.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>> {
        let entry = self.entries.get(name).ok_or_else(|| match self.lacking.get(name) {
            Some(file) => EngineError::CorruptWeights {
                path: file.clone(),
                why: format!("expected tensor `{name}`, which {INDEX} places there, found none"),
            },
            None => {
                EngineError::MissingTensor { name: name.to_string(), expected: shape.to_vec(), dir: self.dir.clone() }
            }
        })?;
        if entry.shape != shape {
            return Err(EngineError::TensorShape {
                name: name.to_string(),
                expected: shape.to_vec(),
                found: entry.shape.clone(),
            });
        }
        let dtype = match entry.dtype {
            safetensors::Dtype::F32 => Dtype::F32,
            safetensors::Dtype::F16 => Dtype::F16,
            safetensors::Dtype::BF16 => Dtype::Bf16,
            other => {
                return Err(EngineError::TensorDtype { name: name.to_string(), found: other.to_string() });
            }
        };
        Ok(Tensor { dtype, shape: &entry.shape, data: self.data(entry) })
    }

    /// Whether two tensors are there and have the same format, shape and bytes.
    #[must_use]
    pub fn same(&self, one: &str, other: &str) -> bool {
        let (Some(one), Some(other)) = (self.entries.get(one), self.entries.get(other)) else { return false };
        one.dtype == other.dtype && one.shape == other.shape && self.data(one) == self.data(other)
    }

    /// Hash over names, formats, shapes and bytes of all tensors: the identity of the weights, however they are
    /// spread over files. Reads every byte once, on all threads.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 32] {
        let entries: Vec<(&String, &Entry)> = self.entries.iter().collect();
        let contents: Vec<blake3::Hash> = entries.par_iter().map(|(_, entry)| blake3::hash(self.data(entry))).collect();
        let mut hasher = blake3::Hasher::new_derive_key("quire model weights 1");
        for ((name, entry), content) in entries.iter().zip(contents) {
            let dtype = entry.dtype.to_string();
            for field in [name.as_bytes(), dtype.as_bytes()] {
                hasher.update(&(field.len() as u64).to_le_bytes()).update(field);
            }
            hasher.update(&(entry.shape.len() as u64).to_le_bytes());
            for dimension in &entry.shape {
                hasher.update(&(*dimension as u64).to_le_bytes());
            }
            hasher.update(content.as_bytes());
        }
        *hasher.finalize().as_bytes()
    }

    fn data(&self, entry: &Entry) -> &[u8] {
        &self.shards[entry.shard].map[entry.bytes.clone()]
    }
}

/// Reads a shard index: tensor name -> file name.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let corrupt = |why: String| EngineError::CorruptWeights { path: path.to_path_buf(), why };
    let bytes =
        std::fs::read(path).map_err(|e| EngineError::reading(path, e, "it says which file holds which tensor"))?;
    let index: Value = serde_json::from_slice(&bytes).map_err(|e| corrupt(format!("it is not valid JSON: {e}")))?;
    let Some(Value::Object(weight_map)) = index.get("weight_map") else {
        return Err(corrupt("expected an object `weight_map`, found none".into()));
    };
    let entry = |(name, file): (&String, &Value)| match file.as_str() {
        // Only plain file names: an index must not reach out of its folder.
        Some(file) if Path::new(file).file_name().is_some_and(|f| f == file) => Ok((name.clone(), file.to_string())),
        _ => Err(corrupt(format!("tensor `{name}`: expected the name of a file beside the index, found {file}"))),
    };
    weight_map.iter().map(entry).collect()
}

/// What a header error means for this file, with its sizes.
fn explain(error: &SafeTensorError, file: &[u8]) -> String {
    let length = file.len();
    match error {
        SafeTensorError::HeaderTooSmall => format!("expected at least 8 bytes, found {length}"),
        SafeTensorError::HeaderTooLarge | SafeTensorError::InvalidHeaderLength => {
            let announced = file.first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            format!("its first bytes announce a header of {announced} bytes, the file has {length}")
        }
        SafeTensorError::MetadataIncompleteBuffer => {
            format!(
                "the tensors its header lists do not fill its {length} bytes exactly: it is truncated or has bytes appended"
            )
        }
        other => format!("{other} (file of {length} bytes)"),
    }
}

#[cfg(test)]
#[path = "weights/tests.rs"]
mod tests;
