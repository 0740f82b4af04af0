"""Greedy decoding with this folder's own model, many prompts at once."""

import torch
import torch.nn.functional as F

from model import Model, after_attention, angles, before_attention
from tokenizer import EOS, PAD


class Decoder:
    """Greedy answers to prompts of token ids."""

    def __init__(self, model: Model, weights: dict[str, torch.Tensor], batch_tokens: int):
        self.model, self.weights, self.batch_tokens = model, weights, batch_tokens

    def answers(self, prompts: list[list[int]], limit: int = 48) -> list[list[int]]:
        """The ids that follow each prompt, end mark excluded, in the order of the prompts."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found: list[list[int]] = [[] for _ in prompts]
        while order:
            batch = [order.pop()]
            longest = len(prompts[batch[0]])
            while order and (len(batch) + 1) * longest <= self.batch_tokens:
                batch.append(order.pop())
            for i, answer in zip(batch, self.batch([prompts[i] for i in batch], limit)):
                found[i] = answer
        return found

    @torch.inference_mode()
    def batch(self, prompts: list[list[int]], limit: int) -> list[list[int]]:
        """One batch, padded on the right: causal attention never sees the padding."""
        device, rows = self.model.device, len(prompts)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        width = int(lengths.max())
        width += -width % 64
        flat = [t for p in prompts for t in p + [PAD] * (width - len(p))]
        cache: list[tuple[torch.Tensor, torch.Tensor]] = []

        def keep(k: torch.Tensor, v: torch.Tensor) -> None:
            cache.append(tuple(F.pad(t.view(rows, width, *t.shape[1:]), (0, 0, 0, 0, 0, limit)) for t in (k, v)))

        x = self.model.hidden(self.weights, torch.tensor(flat, device=device), width, keep)
        self.model.positions.clear()
        x = x.view(rows, width, -1)[torch.arange(rows, device=device), lengths - 1]
        answers: list[list[int]] = [[] for _ in prompts]
        ended = torch.zeros(rows, dtype=torch.bool, device=device)
        steps = []
        for _ in range(limit):
            token = self.model.logits(self.weights, x).argmax(-1)
            steps.append(token)
            ended |= token == EOS
            if bool(ended.all()):
                break
            x = self.step(token, lengths, cache)
            lengths = lengths + 1
        for row, ids in enumerate(torch.stack(steps, 1).tolist()):
            answers[row] = ids[: ids.index(EOS)] if EOS in ids else ids
        return answers

    def step(self, token: torch.Tensor, position: torch.Tensor, cache) -> torch.Tensor:
        """The residual stream of one more token a row; its keys and values join the cache."""
        shape, weights = self.model.shape, self.weights
        cos, sin = angles(shape, position)
        x = F.embedding(token, weights["embedding"])
        rows = torch.arange(len(token), device=token.device)
        seen = torch.arange(cache[0][0].shape[1], device=token.device)[None] <= position[:, None]
        group = shape.num_attention_heads // shape.num_key_value_heads
        for layer, (keys, values) in enumerate(cache):
            w = {name: weights[name][layer] for name in ("qkv", "out", "gate_up", "down", "norm_in", "norm_mlp")}
            q, k, v = before_attention(x, w["norm_in"], w["qkv"], cos, sin, shape.query, shape.key, shape.head_dim,
                                       shape.rms_norm_eps)
            keys[rows, position], values[rows, position] = k, v
            q = q.view(len(token), -1, group, shape.head_dim)
            scores = torch.einsum("bhgd,bshd->bhgs", q, keys).float() / shape.head_dim**0.5
            share = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1).to(x.dtype)
            attended = torch.einsum("bhgs,bshd->bhgd", share, values).reshape(len(token), -1)
            x = after_attention(x, attended, w["out"], w["norm_mlp"], w["gate_up"], w["down"], shape.rms_norm_eps)
        return x
