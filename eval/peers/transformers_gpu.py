"""Times Hugging Face transformers and PyTorch's attention on a GPU, with random weights of a model's shape.

What is timed is named by parts, PART = WHAT:KIND:TOKENS:BATCH:

    decode:eager:131072:1         one step of LlamaForCausalLM, dynamic cache, no compilation
    decode:compiled:2048:64       the same with a static cache and torch.compile(mode="reduce-overhead")
    attention:cudnn:131072:8      attention of one new token in one layer (scaled_dot_product_attention, grouped heads);
                                  kinds are cudnn, flash, efficient and math
    prefill-attention:flash:8192:1  causal attention of a whole prompt in one layer

Parts come from --parts (default: DEFAULT_PARTS below), or with --commands from standard input, one JSON string a
line. The first line of standard output is {"ready": VERSIONS, ...}; then comes one JSON line a part, with "ms" (median of
"samples"), or with "error" where a part failed: the others go on.

How it is timed. Weights and caches are normal random numbers in bf16: no prompt is read, the cache is filled with random
keys and values of TOKENS tokens, and steps go on behind them. A sample of decode is the wall clock of a few steps
between two synchronisations, divided by their number, so that the host may run ahead; the choice of the next token stays
on the device. A sample of attention is the time between two CUDA events around one call for each of several sets of KV,
divided by their number, so that no set is still in a cache. On the CPU the wall clock is used (for tests).

Usage: transformers_gpu.py [--device cuda] [--shape 8b | --model FOLDER] [--parts PART,...] [--commands]
"""

import argparse
import inspect
import json
import os
import statistics
import sys
import time

DEFAULT_PARTS = [
    "attention:cudnn:131072:1",
    "attention:cudnn:131072:8",
    "attention:flash:131072:1",
    "attention:flash:131072:8",
    "prefill-attention:cudnn:8192:1",
    "prefill-attention:flash:8192:1",
    "decode:eager:512:1",
    "decode:eager:131072:1",
    "decode:compiled:512:1",
    "decode:compiled:2048:1",
    "decode:compiled:2048:64",
]
SHAPES = {
    "8b": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=128256,
    ),
    "tiny": dict(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
        head_dim=32, vocab_size=8192,
    ),
}
ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
KV_SETS = 4


def reply(**fields):
    print(json.dumps(fields), file=ANSWERS, flush=True)


# Whatever libraries print must not end up between the answers.
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

try:
    import torch
    import transformers
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache
except ImportError as error:
    reply(error=f"cannot import torch and transformers: {error}")
    sys.exit(1)

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--model", help="folder whose config.json gives the shape; weights are not read")
    parser.add_argument("--parts", default=",".join(DEFAULT_PARTS))
    parser.add_argument("--commands", action="store_true", help="take parts from standard input")
    parser.add_argument("--samples", type=int, default=8, help="samples of decode")
    parser.add_argument("--steps", type=int, default=8, help="steps of a sample of decode; as many warm up")
    parser.add_argument("--rounds", type=int, default=20, help="samples of attention")
    return parser.parse_args()


def shape_of(options):
    if options.model:
        return AutoConfig.from_pretrained(options.model, local_files_only=True)
    scaling = ROPE | dict(original_max_position_embeddings=8192, rope_theta=500000.0)
    config = dict(max_position_embeddings=131072, tie_word_embeddings=False, rms_norm_eps=1e-5, **SHAPES[options.shape])
    # Version 5 has one name for both, version 4 two.
    if hasattr(LlamaConfig(), "rope_parameters"):
        return LlamaConfig(rope_parameters=scaling, **config)
    return LlamaConfig(rope_theta=scaling.pop("rope_theta"), rope_scaling=scaling, **config)


class Clock:
    """Milliseconds of work on a device."""

    def __init__(self, device):
        self.cuda = device.startswith("cuda")

    def synchronize(self):
        if self.cuda:
            torch.cuda.synchronize()

    def wall(self, work):
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return (time.perf_counter() - start) * 1e3

    def device(self, works):
        """One time for each of `works`; all are handed to the device before the first time is read."""
        if not self.cuda:
            return [self.wall(work) for work in works]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(works) + 1)]
        events[0].record()
        for work, event in zip(works, events[1:]):
            work()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(events, events[1:])]


class Decoder:
    """The model with random weights, made when it is first needed."""

    def __init__(self, options, config):
        self.options, self.config, self.model = options, config, None
        self.clock = Clock(options.device)

    def load(self):
        if self.model is None:
            with torch.device(self.options.device):
                self.model = AutoModelForCausalLM.from_config(
                    self.config, dtype=torch.bfloat16, attn_implementation="sdpa"
                ).eval()
            for parameter in self.model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.02)
        return self.model

    def unload(self):
        self.model = None

    def cache(self, kind, tokens, batch, room):
        """A cache of `tokens` random tokens."""
        config = self.config
        if kind == "eager":
            cache = DynamicCache(config=config)
        else:
            cache = StaticCache(config=config, max_cache_len=tokens + room)
        shape = (batch, config.num_key_value_heads, tokens, config.head_dim)
        drawn = dict(dtype=torch.bfloat16, device=self.options.device)
        for layer in range(config.num_hidden_layers):
            positions = {"cache_position": torch.arange(tokens, device=self.options.device)}
            cache.update(torch.randn(shape, **drawn), torch.randn(shape, **drawn), layer, positions)
        return cache

    def time(self, kind, tokens, batch):
        if kind not in ("eager", "compiled"):
            raise ValueError(f"kinds of decode are eager and compiled, not {kind}")
        options, model = self.options, self.load()
        total = options.steps * (options.samples + 1)
        cache = self.cache(kind, tokens, batch, total + 1)
        names = inspect.signature(model.model.forward).parameters
        fixed = {"cache" if "cache" in names else "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        takes_cache_position = "cache_position" in names

        def step(token, position):
            more = {"cache_position": position[0]} if takes_cache_position else {}
            logits = model(input_ids=token, position_ids=position, **fixed, **more).logits[:, -1]
            return logits.argmax(-1, keepdim=True), torch.isfinite(logits).all()

        if kind == "compiled":
            step = torch.compile(step, mode="reduce-overhead")
        token = torch.zeros((batch, 1), dtype=torch.long, device=options.device)
        position = torch.full((1, 1), tokens, dtype=torch.long, device=options.device)
        finite = torch.ones((), dtype=torch.bool, device=options.device)

        def run():
            for _ in range(options.steps):
                chosen, good = step(token, position)
                token.copy_(chosen)
                finite.logical_and_(good)
                position.add_(1)

        warm_up = self.clock.wall(run)
        samples = [self.clock.wall(run) / options.steps for _ in range(options.samples)]
        if not bool(finite) or int(cache.get_seq_length()) != tokens + total:
            raise RuntimeError(f"logits finite: {bool(finite)}, cache of {int(cache.get_seq_length())} tokens")
        return dict(samples=samples, warm_up_seconds=warm_up / 1e3)


def attention(options, config, kind, tokens, batch, causal):
    """Milliseconds a layer."""
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    drawn = dict(dtype=torch.bfloat16, device=options.device)
    grouped = {"enable_gqa": True} if heads != kv_heads else {}
    sets = [
        (
            torch.randn((batch, heads, tokens if causal else 1, dim), **drawn),
            torch.randn((batch, kv_heads, tokens, dim), **drawn),
            torch.randn((batch, kv_heads, tokens, dim), **drawn),
        )
        for _ in range(KV_SETS)
    ]

    def round_of_layers():
        for query, key, value in sets:
            scaled_dot_product_attention(query, key, value, is_causal=causal, **grouped)

    clock = Clock(options.device)
    with sdpa_kernel(BACKENDS[kind]):
        check_attention(sets[0], causal, grouped)
        clock.wall(round_of_layers)
        samples = [ms / KV_SETS for ms in clock.device([round_of_layers] * options.rounds)]
    return dict(samples=samples, kv_bytes=2 * batch * tokens * kv_heads * dim * 2)


def check_attention(inputs, causal, grouped):
    """What is timed must be attention: some rows against the definition in f32."""
    query, key, value = (x[:1].float() for x in inputs)
    out = scaled_dot_product_attention(*(x[:1] for x in inputs), is_causal=causal, **grouped).float()
    rows = query.shape[2]
    seen = [min(rows, 64) - 1, rows - 1] if causal else [0]
    for row in seen:
        keys = row + 1 if causal else key.shape[2]
        group = query.shape[1] // key.shape[1]
        q = query[:, :, row].unflatten(1, (-1, group))
        scores = torch.einsum("bhgd,bhkd->bhgk", q, key[:, :, :keys]) * query.shape[-1] ** -0.5
        expected = torch.einsum("bhgk,bhkd->bhgd", scores.softmax(-1), value[:, :, :keys]).flatten(1, 2)
        error = (out[:, :, row] - expected).abs().max().item()
        if not error <= 0.02 * expected.abs().max().item() + 2e-4:
            raise RuntimeError(f"attention is off by {error}")


def measure(part, options, config, decoder):
    what, kind, tokens, batch = part.split(":")
    tokens, batch = int(tokens), int(batch)
    if what == "decode":
        return decoder.time(kind, tokens, batch)
    if what not in ("attention", "prefill-attention"):
        raise ValueError("expected decode, attention or prefill-attention in front of the first colon")
    decoder.unload()
    return attention(options, config, kind, tokens, batch, what == "prefill-attention")


def release(device):
    """Graphs and memory of one part are not there for the next."""
    torch.compiler.reset()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def run_part(part, options, config, decoder):
    start = time.perf_counter()
    try:
        figures = measure(part, options, config, decoder)
        figures["ms"] = statistics.median(figures["samples"])
    except Exception as error:  # The other parts go on.
        figures = dict(error=f"{part}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    release(options.device)
    reply(part=part, **figures, seconds=round(time.perf_counter() - start, 3))


def main():
    options = arguments()
    config = shape_of(options)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu"
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}, {name}"
    reply(ready=versions, device=name, samples=options.samples, steps=options.steps, rounds=options.rounds)
    decoder = Decoder(options, config)
    lines = (json.loads(line) for line in sys.stdin) if options.commands else options.parts.split(",")
    for part in lines:
        run_part(part, options, config, decoder)


with torch.inference_mode():
    try:
        main()
    except Exception as error:  # The other side shows it; a traceback goes to standard error.
        reply(error=f"{type(error).__name__}: {error}")
        raise
