"""Between the stacks of weights here and a Hugging Face folder."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from model import Shape
from tokenizer import EOS, write_config


def parts(shape: Shape) -> dict[str, tuple[str, int, int]]:
    """Name in a layer -> stack and its rows."""
    query, key, inner = shape.query, shape.key, shape.intermediate_size
    hidden = shape.hidden_size
    return {
        "self_attn.q_proj": ("qkv", 0, query),
        "self_attn.k_proj": ("qkv", query, query + key),
        "self_attn.v_proj": ("qkv", query + key, query + 2 * key),
        "self_attn.o_proj": ("out", 0, hidden),
        "mlp.gate_proj": ("gate_up", 0, inner),
        "mlp.up_proj": ("gate_up", inner, 2 * inner),
        "mlp.down_proj": ("down", 0, hidden),
        "input_layernorm": ("norm_in", 0, hidden),
        "post_attention_layernorm": ("norm_mlp", 0, hidden),
    }


def save(folder: Path, shape: Shape, weights: dict[str, torch.Tensor], tokenizer, context: int) -> None:
    """Writes model, configuration and tokenizer; weights in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"model.embed_tokens.weight": weights["embedding"], "model.norm.weight": weights["norm_end"]}
    for layer in range(shape.num_hidden_layers):
        for name, (stack, low, high) in parts(shape).items():
            tensors[f"model.layers.{layer}.{name}.weight"] = weights[stack][layer, low:high]
    tensors = {n: t.detach().to("cpu", torch.bfloat16).clone().contiguous() for n, t in tensors.items()}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(shape.config(context), indent=1) + "\n")
    generation = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0, "do_sample": False, "max_new_tokens": 48}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
    write_config(folder, context)


def load(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Shape, dict[str, torch.Tensor]]:
    """Reads a folder as `save` writes it (the reference model's too)."""
    config = json.loads((folder / "config.json").read_text())
    shape = Shape(**{name: config[name] for name in Shape.__dataclass_fields__})
    tensors = load_file(str(folder / "model.safetensors"))
    stacks: dict[str, list] = {}
    for layer in range(shape.num_hidden_layers):
        rows: dict[str, list] = {}
        for name, (stack, _, _) in parts(shape).items():
            rows.setdefault(stack, []).append(tensors[f"model.layers.{layer}.{name}.weight"])
        for stack, found in rows.items():
            stacks.setdefault(stack, []).append(torch.cat(found))
    weights = {stack: torch.stack(found) for stack, found in stacks.items()}
    weights["embedding"], weights["norm_end"] = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
    return shape, {n: w.to(device, dtype) for n, w in weights.items()}
