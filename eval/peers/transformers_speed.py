"""Runs a model with Hugging Face transformers on the CPU, on command, for side-by-side timing.

The model is loaded once in every asked-for number format and stays loaded. Each line of standard input is a command in
JSON, each line of standard output its answer in JSON:

    {"cmd": "prompt", "ids": [1, 2, ...]}                   keep these tokens as the prompt
    {"cmd": "prefill", "dtype": "bf16"}                     read the prompt into a fresh cache, logits of the last position
    {"cmd": "decode", "dtype": "bf16", "cache": "dynamic", "tokens": 64}
                                                            greedy tokens behind the prompt; the prompt is read untimed
    {"cmd": "quit"}

Answers hold "seconds" and "tokens" (the ids that were chosen), or "error". The time of a decode runs from the first
token to the last, that of a prefill to the choice of the first. End-of-text tokens are not obeyed.

Usage: transformers_speed.py MODEL_DIR THREADS DTYPE[,DTYPE]
"""

import copy
import json
import os
import sys
import time


def reply(**fields):
    print(json.dumps(fields), file=ANSWERS, flush=True)


# Whatever libraries print must not end up between the answers.
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

folder, threads, dtypes = sys.argv[1], int(sys.argv[2]), sys.argv[3].split(",")
try:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
except ImportError as error:
    reply(error=f"cannot import torch and transformers: {error}")
    sys.exit(1)

torch.set_num_threads(threads)
torch.set_num_interop_threads(1)
FORMATS = {"f32": torch.float32, "bf16": torch.bfloat16}


class Peer:
    """The model in one number format, and the state of the current prompt."""

    def __init__(self, dtype):
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=FORMATS[dtype], attn_implementation="sdpa", local_files_only=True
        ).eval()
        self.read = {}

    def step(self, ids, cache, at):
        """Runs `ids` from position `at` on; the most likely next token."""
        positions = torch.arange(at, at + ids.shape[1])
        arguments = dict(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        arguments["position_ids"] = positions[None]
        return self.model(**arguments).logits[:, -1].argmax(-1, keepdim=True)

    def cache(self, kind, prompt, tokens):
        if kind == "dynamic":
            return DynamicCache(config=self.model.config)
        return StaticCache(config=self.model.config, max_cache_len=prompt.shape[1] + tokens)

    def prefill(self, prompt):
        start = time.perf_counter()
        token = self.step(prompt, self.cache("dynamic", prompt, 0), 0)
        chosen = int(token)
        return time.perf_counter() - start, [chosen]

    def decode(self, prompt, kind, tokens):
        if (kind, tokens) not in self.read:
            cache = self.cache(kind, prompt, tokens)
            self.read[kind, tokens] = cache, self.step(prompt, cache, 0)
        kept, token = self.read[kind, tokens]
        cache = copy.deepcopy(kept)
        chosen = [int(token)]
        start = time.perf_counter()
        for number in range(tokens - 1):
            token = self.step(token, cache, prompt.shape[1] + number)
            chosen.append(int(token))
        return time.perf_counter() - start, chosen


def obey(peers, command, prompt):
    if command["cmd"] == "prompt":
        for peer in peers.values():
            peer.read = {}
        reply(tokens=[], seconds=0.0)
        return torch.tensor([command["ids"]])
    peer = peers[command["dtype"]]
    if command["cmd"] == "prefill":
        seconds, chosen = peer.prefill(prompt)
    else:
        seconds, chosen = peer.decode(prompt, command["cache"], command["tokens"])
    reply(seconds=seconds, tokens=chosen)
    return prompt


def main():
    peers = {dtype: Peer(dtype) for dtype in dtypes}
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    reply(ready=versions, threads=torch.get_num_threads())
    prompt = None
    for line in sys.stdin:
        command = json.loads(line)
        if command["cmd"] == "quit":
            break
        prompt = obey(peers, command, prompt)


with torch.inference_mode():
    try:
        main()
    except Exception as error:  # The other side shows it; a traceback goes to standard error.
        reply(error=f"{type(error).__name__}: {error}")
        raise
