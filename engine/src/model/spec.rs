//! Reads `config.json` into a [`ModelSpec`]: everything that tells one Llama-like model from another.

use std::fmt;
use std::path::Path;

use serde_json::Value;

use super::config::Fields;
use super::rope::{Rope, RopeScaling};
use crate::error::{EngineError, Result};

const SUPPORTED: &str = "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM";

/// A family of models that share one configuration format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Llama 2, 3, 3.1, 3.2 and what follows their form.
    Llama,
    /// Mistral: Llama with a sliding window.
    Mistral,
    /// Qwen2 and 2.5: biases on queries, keys and values.
    Qwen2,
    /// Qwen3: RMS norms on the heads of queries and keys.
    Qwen3,
}

impl Family {
    fn from_architecture(name: &str) -> Option<Family> {
        match name {
            "LlamaForCausalLM" | "llama" => Some(Family::Llama),
            "MistralForCausalLM" | "mistral" => Some(Family::Mistral),
            "Qwen2ForCausalLM" | "qwen2" => Some(Family::Qwen2),
            "Qwen3ForCausalLM" | "qwen3" => Some(Family::Qwen3),
            _ => None,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
        })
    }
}

/// The shape and the switches of one model. Plain data: the transformer reads it and never asks for the family.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// The configuration format it was read from.
    pub family: Family,
    /// Transformer blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the gated MLP.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Dimension of every head; a multiple of 16. `heads * head_dim` need not be `hidden`.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Epsilon of every RMS norm.
    pub norm_eps: f32,
    /// Rotary embedding.
    pub rope: Rope,
    /// The projections of queries, keys and values have biases.
    pub attention_bias: bool,
    /// The attention's output projection has a bias.
    pub output_bias: bool,
    /// The MLP's three projections have biases.
    pub mlp_bias: bool,
    /// Each head of queries and keys passes an RMS norm before the rotation.
    pub qk_norm: bool,
    /// The output projection is the embedding.
    pub tied_embeddings: bool,
    /// Tokens of context the model was made for.
    pub max_context: usize,
    /// Each token sees itself and the `sliding_window - 1` tokens before it; `None`: all.
    pub sliding_window: Option<usize>,
    /// The token that begins a text.
    pub bos: Option<u32>,
    /// Tokens that end an answer; may be empty.
    pub eos: Vec<u32>,
    /// `generation_config.json` lists `eos`. Otherwise it is what the configuration of the bare model says, which for
    /// a model tuned to converse need not end a turn.
    pub eos_stated: bool,
}

impl ModelSpec {
    /// Reads `config.json` and, if there, `generation_config.json` (whose bos and eos come first) in `dir`. Where
    /// `config.json` leaves the length of an extended context open, `tokenizer_config.json` may state it.
    ///
    /// # Errors
    /// Missing or malformed files ([`EngineError::MissingFile`], [`EngineError::Config`]), and models this engine
    /// does not run ([`EngineError::Unsupported`]).
    pub fn from_dir(dir: &Path) -> Result<ModelSpec> {
        let config = Fields::read(&dir.join("config.json"), "it states the model's shape")?;
        let path = dir.join("generation_config.json");
        let generation = match path.try_exists() {
            Ok(true) => Some(Fields::read(&path, "it states the tokens that end an answer")?),
            _ => None,
        };
        let tokenizer = dir.join("tokenizer_config.json");
        let stated = match tokenizer.try_exists() {
            Ok(true) => {
                Fields::read(&tokenizer, "it may state the length of the context")?.get_size("model_max_length")
            }
            _ => None,
        };
        ModelSpec::from_fields(&config, generation.as_ref(), stated)
    }

    /// What of this spec changes the numbers that the same weights give, in a canonical text form. The rotary embedding
    /// has a fingerprint of its own.
    pub(crate) fn arithmetic(&self) -> String {
        format!(
            "layers {} heads {}/{} x {} eps {:08x} biases {} {} {} qk_norm {} window {:?}",
            self.layers,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.norm_eps.to_bits(),
            self.attention_bias,
            self.output_bias,
            self.mlp_bias,
            self.qk_norm,
            self.sliding_window
        )
    }

    fn from_fields(config: &Fields, generation: Option<&Fields>, stated: Option<usize>) -> Result<ModelSpec> {
        let family = family(config)?;
        refuse_unsupported(config)?;

        let layers = config.size("num_hidden_layers")?;
        let heads = config.size("num_attention_heads")?;
        let kv_heads = config.size_or("num_key_value_heads", default_kv_heads(config, family, heads))?;
        if heads % kv_heads != 0 {
            return Err(config.wrong("num_key_value_heads", &format!("a divisor of num_attention_heads ({heads})")));
        }
        let hidden = config.size("hidden_size")?;
        let head_dim = head_dim(config, family, hidden, heads)?;
        let positions = config.size("max_position_embeddings")?;
        let rope = rope(config, head_dim, positions)?;
        let max_context = max_context(config, &rope.scaling, positions, stated)?;
        let (attention_bias, output_bias) = attention_biases(config, family)?;
        let norm_eps = config.number_or("rms_norm_eps", 1e-6)? as f32;
        if !(norm_eps > 0.0 && norm_eps < 1.0) {
            return Err(config.wrong("rms_norm_eps", "a number between 0 and 1"));
        }
        let vocab = config.size("vocab_size")?;
        let (bos, eos) = special_tokens(config, generation, family, vocab)?;
        Ok(ModelSpec {
            family,
            layers,
            hidden,
            intermediate: config.size("intermediate_size")?,
            heads,
            kv_heads,
            head_dim,
            vocab,
            norm_eps,
            rope,
            attention_bias,
            output_bias,
            mlp_bias: family == Family::Llama && config.flag_or("mlp_bias", false)?,
            qk_norm: family == Family::Qwen3,
            tied_embeddings: config.flag_or("tie_word_embeddings", false)?,
            max_context,
            sliding_window: sliding_window(config, family, layers)?,
            bos,
            // A file that states only ids that no token has states nothing.
            eos_stated: !eos.is_empty() && generation.is_some_and(|g| g.get("eos_token_id").is_some()),
            eos,
        })
    }
}

fn family(config: &Fields) -> Result<Family> {
    let names: Vec<&str> = match config.get("architectures") {
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        None => config.get("model_type").and_then(Value::as_str).into_iter().collect(),
        Some(_) => return Err(config.wrong("architectures", "a list of names")),
    };
    names.iter().find_map(|name| Family::from_architecture(name)).ok_or_else(|| EngineError::Unsupported {
        what: "architecture",
        found: if names.is_empty() { "none named in config.json".into() } else { names.join(", ") },
        supported: SUPPORTED.into(),
        advice: "Use a model of one of these architectures",
    })
}

fn refuse_unsupported(config: &Fields) -> Result<()> {
    if let Some(quantization) = config.get("quantization_config") {
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("an unnamed method");
        return Err(EngineError::Unsupported {
            what: "quantised weights",
            found: method.to_string(),
            supported: "weights in f32, f16 or bf16".into(),
            advice: "Use the model's unquantised weights",
        });
    }
    match config.get("hidden_act").map(|v| (v, v.as_str())) {
        None | Some((_, Some("silu" | "swish"))) => {}
        Some((value, _)) => {
            return Err(EngineError::Unsupported {
                what: "activation (hidden_act)",
                found: value.to_string(),
                supported: "silu".into(),
                advice: "Use a model with a gated SiLU MLP",
            });
        }
    }
    Ok(())
}

/// Heads of keys and values where the configuration names none: the default of the family's configuration in
/// transformers; `null` stands for as many as there are query heads.
fn default_kv_heads(config: &Fields, family: Family, heads: usize) -> usize {
    match family {
        _ if config.has("num_key_value_heads") => heads,
        Family::Llama => heads,
        Family::Mistral => 8,
        Family::Qwen2 | Family::Qwen3 => 32,
    }
}

/// Tokens of context. `positions`: `max_position_embeddings`; `stated`: the length that the tokenizer's configuration
/// names.
fn max_context(config: &Fields, scaling: &RopeScaling, positions: usize, stated: Option<usize>) -> Result<usize> {
    Ok(match *scaling {
        // Models state YaRN beside the length before it, or the extended one.
        RopeScaling::Yarn { factor, original_context, .. } => positions.max((factor * original_context) as usize),
        // The same for position interpolation, which does not name the length before: `max_position_embeddings` may be
        // either, and is the one before where nothing says otherwise.
        RopeScaling::Linear { factor } => {
            let scaled = (factor * positions as f64) as usize;
            let original = original_positions(config)?;
            let extended = original.map(|original| (factor * original as f64) as usize);
            let stated = stated.filter(|stated| (positions..=scaled).contains(stated));
            extended.or(stated).unwrap_or(scaled).max(positions)
        }
        _ => positions,
    })
}

/// `original_max_position_embeddings`, wherever a configuration has it.
fn original_positions(config: &Fields) -> Result<Option<usize>> {
    const FIELD: &str = "original_max_position_embeddings";
    let nested = [config.nested("rope_parameters")?, config.nested("rope_scaling")?];
    for fields in [config].into_iter().chain(nested.iter().flatten()) {
        if let Some(positions) = fields.optional_size(FIELD)? {
            return Ok(Some(positions));
        }
    }
    Ok(None)
}

fn head_dim(config: &Fields, family: Family, hidden: usize, heads: usize) -> Result<usize> {
    let head_dim = match (config.get("head_dim"), family) {
        (Some(_), _) => config.size("head_dim")?,
        (None, Family::Qwen3) => 128,
        (None, _) if hidden.is_multiple_of(heads) => hidden / heads,
        (None, _) => {
            return Err(config.wrong("hidden_size", &format!("a multiple of num_attention_heads ({heads})")));
        }
    };
    if head_dim % 16 != 0 {
        return Err(EngineError::Unsupported {
            what: "head dimension",
            found: head_dim.to_string(),
            supported: "multiples of 16".into(),
            advice: "Use a model whose heads have 64, 96, 128 or another multiple of 16",
        });
    }
    Ok(head_dim)
}

/// Whether the projections of queries, keys and values have biases, and whether the output projection has one.
fn attention_biases(config: &Fields, family: Family) -> Result<(bool, bool)> {
    Ok(match family {
        Family::Llama | Family::Qwen3 => {
            let both = config.flag_or("attention_bias", false)?;
            (both, both)
        }
        Family::Mistral => (false, false),
        Family::Qwen2 => (true, false),
    })
}

/// The window of all layers. Qwen's configurations name the layers that have one; Llama's know no window.
fn sliding_window(config: &Fields, family: Family, layers: usize) -> Result<Option<usize>> {
    if family == Family::Llama {
        return Ok(None);
    }
    // An absent field means Mistral 7B's first release; null means no window.
    let window = match config.has("sliding_window") {
        true => config.optional_size("sliding_window")?,
        false => Some(4096),
    };
    if family == Family::Mistral {
        return Ok(window);
    }
    let used = config.flag_or("use_sliding_window", false)?;
    let window = window.filter(|_| used);
    let windowed = match config.get("layer_types") {
        Some(Value::Array(kinds)) => kinds.iter().filter(|kind| *kind != "full_attention").count(),
        Some(_) => return Err(config.wrong("layer_types", "a list of names")),
        None if window.is_none() => 0,
        None => layers.saturating_sub(config.whole_or("max_window_layers", 28)?),
    };
    match (windowed, window) {
        (0, _) => Ok(None),
        (windowed, Some(window)) if windowed == layers => Ok(Some(window)),
        _ => Err(EngineError::Unsupported {
            what: "attention pattern",
            found: format!("{windowed} of {layers} layers with a window (layer_types, use_sliding_window)"),
            supported: "full attention in every layer, or one window in every layer".into(),
            advice: "Models published with use_sliding_window: false run as they are",
        }),
    }
}

fn special_tokens(
    config: &Fields,
    generation: Option<&Fields>,
    family: Family,
    vocab: usize,
) -> Result<(Option<u32>, Vec<u32>)> {
    let lists = |field: &str| -> Result<Option<Vec<u32>>> {
        match generation.filter(|g| g.has(field)) {
            Some(g) => g.token_ids(field, vocab),
            None => config.token_ids(field, vocab),
        }
    };
    let known = |ids: Option<Vec<u32>>, default: u32| match (ids, family) {
        (Some(ids), _) => ids,
        (None, Family::Llama | Family::Mistral) => vec![default],
        (None, Family::Qwen2 | Family::Qwen3) => Vec::new(),
    };
    let bos = known(lists("bos_token_id")?, 1);
    let eos = known(lists("eos_token_id")?, 2);
    Ok((bos.first().copied(), eos))
}

/// The rotary embedding, from `rope_parameters` or from `rope_theta` and `rope_scaling`.
fn rope(config: &Fields, head_dim: usize, positions: usize) -> Result<Rope> {
    let (name, nested) = match (config.nested("rope_parameters")?, config.nested("rope_scaling")?) {
        (Some(parameters), _) => ("rope_parameters", Some(parameters)),
        (None, scaling) => ("rope_scaling", scaling),
    };
    let outer_theta = config.number_or("rope_theta", 10_000.0)?;
    let theta = match &nested {
        Some(fields) => fields.number_or("rope_theta", outer_theta)?,
        None => outer_theta,
    };
    // A base of 1 would make every frequency 1, and YaRN divides by its logarithm.
    if theta <= 1.0 {
        return Err(nested
            .as_ref()
            .filter(|n| n.has("rope_theta"))
            .unwrap_or(config)
            .wrong("rope_theta", "a number above 1"));
    }
    for fields in nested.iter().chain([config]) {
        if fields.number_or("partial_rotary_factor", 1.0)? != 1.0 {
            return Err(fields.wrong("partial_rotary_factor", "1 (the whole head is rotated)"));
        }
    }
    let scaling = match nested {
        Some(fields) => scaling(config, &fields, name, positions)?,
        None => RopeScaling::None,
    };
    Ok(Rope { theta, head_dim, scaling })
}

fn scaling(config: &Fields, fields: &Fields, name: &'static str, positions: usize) -> Result<RopeScaling> {
    let kind = match fields.get("rope_type").or_else(|| fields.get("type")) {
        None => "default",
        Some(Value::String(kind)) => kind,
        Some(_) => return Err(fields.wrong("rope_type", "a name")),
    };
    let original = || -> Result<f64> {
        let outer = config.optional_size("original_max_position_embeddings")?;
        Ok(match outer {
            Some(size) => size as f64,
            None => fields.size_or("original_max_position_embeddings", positions)? as f64,
        })
    };
    match kind {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: fields.positive("factor")? }),
        "llama3" => {
            let (low, high) = (fields.positive("low_freq_factor")?, fields.positive("high_freq_factor")?);
            if high <= low {
                return Err(fields.wrong("high_freq_factor", &format!("more than low_freq_factor ({low})")));
            }
            Ok(RopeScaling::Llama3 {
                factor: fields.positive("factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_context: original()?,
            })
        }
        "yarn" => yarn(fields, positions as f64, original()?),
        _ => Err(EngineError::Unsupported {
            what: "RoPE scaling",
            found: format!("{name}.rope_type = \"{kind}\""),
            supported: "default, linear, llama3, yarn".into(),
            advice: match kind {
                "dynamic" | "longrope" | "su" => {
                    "Its frequencies change with the length of the sequence, so that cached keys could not be reused; \
                     it will be possible once they are frozen per sequence. Remove the scaling to run within the \
                     original context"
                }
                _ => "Use a model with one of these",
            },
        }),
    }
}

fn yarn(fields: &Fields, positions: f64, original_context: f64) -> Result<RopeScaling> {
    let factor = match fields.get("factor") {
        Some(_) => fields.positive("factor")?,
        None => positions / original_context,
    };
    let optional = |field: &str| -> Result<Option<f64>> {
        // Absent, null and zero all mean "not given", as in the reference implementation.
        Ok(Some(fields.number_or(field, 0.0)?).filter(|v| *v != 0.0))
    };
    let magnitude = |scale: f64, weight: f64| {
        if scale <= 1.0 { 1.0 } else { 0.1 * weight * scale.ln() + 1.0 }
    };
    let attention_factor = match (fields.get("attention_factor"), optional("mscale")?, optional("mscale_all_dim")?) {
        (Some(_), _, _) => fields.positive("attention_factor")?,
        (None, Some(m), Some(all)) => magnitude(factor, m) / magnitude(factor, all),
        _ => magnitude(factor, 1.0),
    };
    let beta_fast = optional("beta_fast")?.unwrap_or(32.0);
    let beta_slow = optional("beta_slow")?.unwrap_or(1.0);
    if !(beta_slow > 0.0 && beta_fast >= beta_slow) {
        return Err(fields.wrong("beta_fast", &format!("at least beta_slow ({beta_slow}), both above 0")));
    }
    let truncate = fields.flag_or("truncate", true)?;
    Ok(RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, truncate, attention_factor })
}

#[cfg(test)]
#[path = "spec/tests.rs"]
mod tests;
