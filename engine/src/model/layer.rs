//! The weights of one transformer block, read by the names that Hugging Face checkpoints use.

use super::spec::ModelSpec;
use crate::backend::cpu::Cpu;
use crate::backend::cpu::linear::Linear;
use crate::error::Result;
use crate::weights::Weights;

/// One block. Projections that read the same input are stacked into one matrix.
pub(crate) struct Layer {
    pub(crate) attention_norm: Vec<f32>,
    pub(crate) qkv: Linear,
    pub(crate) qkv_bias: Option<Vec<f32>>,
    pub(crate) q_norm: Option<Vec<f32>>,
    pub(crate) k_norm: Option<Vec<f32>>,
    pub(crate) output: Linear,
    pub(crate) output_bias: Option<Vec<f32>>,
    pub(crate) mlp_norm: Vec<f32>,
    pub(crate) gate_up: Linear,
    pub(crate) gate_up_bias: Option<Vec<f32>>,
    pub(crate) down: Linear,
    pub(crate) down_bias: Option<Vec<f32>>,
}

impl Layer {
    pub(crate) fn load(cpu: &Cpu, weights: &Weights, spec: &ModelSpec, layer: usize) -> Result<Layer> {
        let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let name = |suffix: &str| format!("model.layers.{layer}.{suffix}");
        let matrix = |parts: &[(&str, usize)], inputs: usize| -> Result<Linear> {
            let tensors = parts
                .iter()
                .map(|(part, outputs)| weights.tensor(&name(&format!("{part}.weight")), &[*outputs, inputs]))
                .collect::<Result<Vec<_>>>()?;
            Ok(Linear::new(cpu, &tensors))
        };
        let vector = |part: &str, width: usize| -> Result<Vec<f32>> {
            Ok(weights.tensor(&name(&format!("{part}.weight")), &[width])?.to_f32())
        };
        let bias = |present: bool, parts: &[(&str, usize)]| -> Result<Option<Vec<f32>>> {
            if !present {
                return Ok(None);
            }
            let mut all = Vec::new();
            for (part, width) in parts {
                all.extend(weights.tensor(&name(&format!("{part}.bias")), &[*width])?.to_f32());
            }
            Ok(Some(all))
        };
        let qkv = [("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)];
        let output = [("self_attn.o_proj", spec.hidden)];
        let gate_up = [("mlp.gate_proj", spec.intermediate), ("mlp.up_proj", spec.intermediate)];
        let down = [("mlp.down_proj", spec.hidden)];
        let head_norm = |part: &str| spec.qk_norm.then(|| vector(part, spec.head_dim)).transpose();
        Ok(Layer {
            attention_norm: vector("input_layernorm", spec.hidden)?,
            qkv: matrix(&qkv, spec.hidden)?,
            qkv_bias: bias(spec.attention_bias, &qkv)?,
            q_norm: head_norm("self_attn.q_norm")?,
            k_norm: head_norm("self_attn.k_norm")?,
            output: matrix(&output, q)?,
            output_bias: bias(spec.output_bias, &output)?,
            mlp_norm: vector("post_attention_layernorm", spec.hidden)?,
            gate_up: matrix(&gate_up, spec.hidden)?,
            gate_up_bias: bias(spec.mlp_bias, &gate_up)?,
            down: matrix(&down, spec.intermediate)?,
            down_bias: bias(spec.mlp_bias, &down)?,
        })
    }

    /// Bytes that one pass over the block's matrices reads.
    pub(crate) fn bytes(&self) -> usize {
        [&self.qkv, &self.output, &self.gate_up, &self.down].iter().map(|m| m.bytes()).sum()
    }
}
