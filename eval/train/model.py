"""The model: a small Llama in plain PyTorch.

Weights are stacks over the layers, so that the optimizer treats a whole stack at once. Everything but attention runs on
the flat stream of tokens `[tokens, hidden]`; only attention sees rows, so one compilation serves every row length.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass
class Shape:
    """Sizes of the model; names as in a Hugging Face `LlamaConfig`."""

    vocab_size: int = 7168
    hidden_size: int = 384
    intermediate_size: int = 640
    num_hidden_layers: int = 8
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 64
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0

    @property
    def query(self) -> int:
        """Width of all query heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def key(self) -> int:
        """Width of all key heads."""
        return self.num_key_value_heads * self.head_dim

    def config(self, context: int) -> dict:
        """The `config.json` of this shape."""
        fixed = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False,
            "mlp_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
            "tie_word_embeddings": True, "torch_dtype": "bfloat16", "dtype": "bfloat16", "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2, "rope_scaling": None, "max_position_embeddings": context,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
        }
        return fixed | asdict(self)


def initial_weights(shape: Shape, seed: int) -> dict[str, torch.Tensor]:
    """Float32 weights: outputs into the residual stream start at zero, the embedding with deviation 0.05, the other
    matrices with 1/sqrt(hidden)."""
    generator = torch.Generator().manual_seed(seed)
    layers, hidden, inner = shape.num_hidden_layers, shape.hidden_size, shape.intermediate_size

    def normal(*size: int, deviation: float = 1 / math.sqrt(hidden)) -> torch.Tensor:
        return torch.randn(*size, generator=generator) * deviation

    return {
        "embedding": normal(shape.vocab_size, hidden, deviation=0.05),
        "qkv": normal(layers, shape.query + 2 * shape.key, hidden),
        "out": torch.zeros(layers, hidden, shape.query),
        "gate_up": normal(layers, 2 * inner, hidden),
        "down": torch.zeros(layers, hidden, inner),
        "norm_in": torch.ones(layers, hidden),
        "norm_mlp": torch.ones(layers, hidden),
        "norm_end": torch.ones(hidden),
    }


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight, the root mean square in float32. x: [tokens, hidden]."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions in the halves layout. x: [tokens, heads, head_dim]; cos, sin: [tokens, head_dim / 2]."""
    first, second = x.float().chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def angles(shape: Shape, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines in float32, [len(positions), head_dim / 2]."""
    exponent = torch.arange(0, shape.head_dim, 2, device=positions.device, dtype=torch.float32) / shape.head_dim
    angle = positions.float()[:, None] * (shape.rope_theta**-exponent)[None]
    return angle.cos(), angle.sin()


def before_attention(x, norm, qkv, cos, sin, query: int, key: int, head: int, eps: float):
    """Queries, keys (both rotated) and values, each [tokens, heads, head_dim]."""
    q, k, v = (rms_norm(x, norm, eps) @ qkv.T).split([query, key, key], -1)
    tokens = x.shape[0]
    q, k = q.view(tokens, -1, head), k.view(tokens, -1, head)
    return rotate(q, cos, sin), rotate(k, cos, sin), v.reshape(tokens, -1, head)


def after_attention(x, attended, out, norm, gate_up, down, eps: float):
    """The residual stream after the attention's output and the SwiGLU block."""
    x = x + attended @ out.T
    gate, up = (rms_norm(x, norm, eps) @ gate_up.T).chunk(2, -1)
    return x + (F.silu(gate) * up) @ down.T


def judge(x, norm, embedding, target, kind, eps: float):
    """Summed cross entropy of answers and of text, and the number of right answer tokens, at the judged positions."""
    logits = (rms_norm(x, norm, eps) @ embedding.T).float()
    loss = F.cross_entropy(logits, target, reduction="none")
    reply, text = (kind == 2).float(), (kind == 1).float()
    right = ((logits.argmax(-1) == target) * reply).sum()
    return (loss * reply).sum(), (loss * text).sum(), right


class Attention:
    """Causal attention over rows of equal length."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, probe: bool):
        self.shape, self.repeat, self.name = shape, True, "PyTorch's choice"
        # cuDNN plans anew for every row length, so only training, whose lengths are few, considers it.
        self.backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        if probe and device.type == "cuda":
            self.backends = self.pick(device, dtype)

    def pick(self, device: torch.device, dtype: torch.dtype) -> list[SDPBackend]:
        """The fastest kernel that works here, timed at 2,048 tokens a row, forward and backward."""
        best = None
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            for repeat in (False, True):
                try:
                    seconds = self.time(backend, repeat, device, dtype)
                except RuntimeError:
                    continue
                if best is None or seconds < best[0]:
                    best = (seconds, backend, repeat)
        if best is None:
            self.repeat, self.name = True, "math"
            return [SDPBackend.MATH]
        self.repeat, self.name = best[2], f"{best[1].name.lower()}, repeated keys: {best[2]}"
        return [best[1]]

    def time(self, backend: SDPBackend, repeat: bool, device: torch.device, dtype: torch.dtype) -> float:
        """Milliseconds of the fastest of five runs over 65,536 tokens."""
        self.backends, self.repeat = [backend], repeat
        heads = (self.shape.num_attention_heads, self.shape.num_key_value_heads, self.shape.num_key_value_heads)
        qkv = [torch.randn(65536, h, self.shape.head_dim, device=device, dtype=dtype, requires_grad=True) for h in heads]
        best = math.inf
        gradient = torch.randn(65536, self.shape.query, device=device, dtype=dtype)
        for _ in range(6):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            self(*qkv, 2048).backward(gradient)
            end.record()
            torch.cuda.synchronize()
            best = min(best, start.elapsed_time(end))
        return best

    def __call__(self, q, k, v, length: int) -> torch.Tensor:
        """q, k, v: [tokens, heads, head_dim], rows of `length` tokens. Returns [tokens, query heads * head_dim]."""
        q, k, v = (t.view(-1, length, t.shape[1], t.shape[2]).transpose(1, 2) for t in (q, k, v))
        if self.repeat:
            group = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        with sdpa_kernel(self.backends):
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not self.repeat)
        return o.transpose(1, 2).reshape(-1, self.shape.query)


class Model:
    """Runs the weights it is given; it owns none."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, compiled: bool, probe: bool = False):
        self.shape, self.device, self.dtype = shape, device, dtype
        self.attention = Attention(shape, device, dtype, probe)
        self.before, self.after, self.judge = before_attention, after_attention, judge
        self.positions: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        if compiled:
            self.before = torch.compile(before_attention, dynamic=False)
            self.after = torch.compile(after_attention, dynamic=False)
            self.judge = torch.compile(judge, dynamic=False)

    def angles(self, length: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary angles of a flat stream of rows of `length` tokens; kept by length."""
        if (length, tokens) not in self.positions:
            cos, sin = angles(self.shape, torch.arange(length, device=self.device))
            rows = tokens // length
            self.positions[length, tokens] = cos.repeat(rows, 1), sin.repeat(rows, 1)
        return self.positions[length, tokens]

    def hidden(self, weights: dict[str, torch.Tensor], tokens: torch.Tensor, length: int, keep=None) -> torch.Tensor:
        """The residual stream after the last layer, [tokens, hidden]; `keep` receives each layer's keys and values."""
        shape, eps = self.shape, self.shape.rms_norm_eps
        cos, sin = self.angles(length, len(tokens))
        x = F.embedding(tokens, weights["embedding"])
        names = ("qkv", "out", "gate_up", "down", "norm_in", "norm_mlp")
        for qkv, out, gate_up, down, norm_in, norm_mlp in zip(*(weights[n].unbind(0) for n in names)):
            q, k, v = self.before(x, norm_in, qkv, cos, sin, shape.query, shape.key, shape.head_dim, eps)
            if keep is not None:
                keep(k, v)
            x = self.after(x, self.attention(q, k, v, length), out, norm_mlp, gate_up, down, eps)
        return x

    def losses(self, weights: dict[str, torch.Tensor], tokens, length: int, at, target, kind):
        """Summed loss of answers, summed loss of text, right answer tokens."""
        x = self.hidden(weights, tokens, length)[at]
        return self.judge(x, weights["norm_end"], weights["embedding"], target, kind, self.shape.rms_norm_eps)

    def logits(self, weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Float32 logits of residual streams [n, hidden]."""
        return (rms_norm(x, weights["norm_end"], self.shape.rms_norm_eps) @ weights["embedding"].T).float()
