#!/usr/bin/env python3
"""Loads an exported folder with transformers and with this folder's own model, and compares them in float32.

Fails unless logits agree within 1e-4 relative and greedy continuations and token ids are equal.
"""

import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from decode import Decoder
from export import load
from model import Model
from rows import retry
from source import Source
from tokenizer import load_tokenizer


def main() -> int:
    """Compares on four contexts of 512 tokens."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    device = torch.device("cpu")
    shape, weights = load(folder, device, torch.float32)
    own = Model(shape, device, torch.float32, compiled=False)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, their_tokenizer = load_tokenizer(folder / "tokenizer.json"), AutoTokenizer.from_pretrained(folder)
    source = Source([Path(p) for p in sys.argv[2:]])
    source.tokenizer = tokenizer
    composer = source.composer(evaluation=True)
    decoder = Decoder(own, weights, 512)
    worst = 0.0
    for number, task in enumerate(("niah_single", "vt", "x_alias", "kv")):
        sample = retry(lambda: composer.evaluation_sample(random.Random(f"{task}/{number}"), task, 512))
        ids = sample.row(512)[0].tolist()
        text = tokenizer.decode(ids, skip_special_tokens=False)
        if their_tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
            sys.exit(f"{task}: transformers' tokenizer gives other ids than the pieces were built from")
        with torch.inference_mode():
            mine = own.logits(weights, own.hidden(weights, torch.tensor(ids), 512))
            expected = theirs(torch.tensor([ids])).logits[0].float()
        worst = max(worst, float((mine - expected).norm() / expected.norm()))
        prompt = ids[: ids.index(5) + 1]
        given = torch.tensor([prompt])
        out = theirs.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=16)
        continued = [t for t in out[0, len(prompt) :].tolist()]
        continued = continued[: continued.index(2)] if 2 in continued else continued
        if decoder.answers([prompt], 16)[0] != continued:
            sys.exit(f"{task}: greedy continuations differ: {decoder.answers([prompt], 16)[0]} and {continued}")
    if worst > 1e-4:
        sys.exit(f"logits differ by {worst:.2e} relative; at most 1e-4 was expected")
    print(f"transformers agrees: ids equal, greedy continuations equal, logits within {worst:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
