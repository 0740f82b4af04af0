#!/usr/bin/env python3
"""Greedy exact match of a model, by task and length; writes `measured.json`.

The contexts are made of held-out paragraphs, words and names (`tasks.py`), or read from JSON-lines files whose records
have the fields task, length, chunks, question and answers.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import platform
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from decode import Decoder
from export import load
from model import Model
from rows import retry
from source import Source
from tasks import ALL
from tokenizer import ANSWER, BOS, CHUNK, QUESTION, load_tokenizer

GENERATOR: "Generator"  # set before the workers are forked, which inherit it
FREE = ("squad", "cloze", "human")  # answers in natural words: compared without case, articles and punctuation


@dataclass
class Record:
    """One question over one context."""

    task: str
    length: int
    chunks: list[str]
    question: str
    answers: list[str]


def options() -> argparse.Namespace:
    """The command line."""
    o = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    o.add_argument("--model", type=Path, required=True, help="the folder that train.py exported")
    o.add_argument("--text", type=Path, nargs="*", default=[], help="as in training")
    o.add_argument("--wordings", type=Path, help="as in training")
    o.add_argument("--records", type=Path, nargs="*", help="read the questions from these files instead")
    o.add_argument("--tasks", nargs="*", default=list(ALL))
    o.add_argument("--lengths", type=int, nargs="*", default=[1024, 4096, 8192])
    o.add_argument("--count", type=int, default=100, help="questions a task and length")
    o.add_argument("--seed", type=int, default=7)
    o.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    o.add_argument("--engine", choices=("own", "transformers"), default="own")
    o.add_argument("--device", default="", help="cuda or cpu (default: cuda where there is one)")
    o.add_argument("--dump", type=Path, help="write the generated questions here, as JSON lines")
    o.add_argument("--out", help="the file to write, or a folder for measured.json (default: the model's folder)")
    return o.parse_args()


def target(o: argparse.Namespace) -> Path:
    """The file that the results go to; ends the program where it cannot be written."""
    given = o.out or str(o.model)
    path = Path(given)
    if path.is_dir() or given.endswith(os.sep):
        path /= "measured.json"
    if not path.parent.is_dir():
        sys.exit(f"--out: expected an existing folder at {path.parent}, found none; create it or name another")
    if path.exists() and not path.is_file():
        sys.exit(f"--out: expected a file at {path}, found something else; name another")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        sys.exit(f"--out: expected leave to write {path}, found none; name another place")
    return path


class Generator:
    """Questions of the evaluation split. A job is (task, length, number)."""

    def __init__(self, o: argparse.Namespace, tokenizer):
        source = Source(o.text, o.wordings)
        source.tokenizer = tokenizer
        self.composer, self.seed = source.composer(evaluation=True), o.seed
        self.jobs = [(task, length, n) for length in o.lengths for task in o.tasks for n in range(o.count)]

    def make(self, job: tuple[str, int, int]) -> Record:
        """One question."""
        task, length, number = job
        rng = random.Random(f"{self.seed}/{task}/{length}/{number}")
        sample = retry(lambda: self.composer.evaluation_sample(rng, task, length))
        decode = self.composer.tokenizer.decode
        chunks = [decode(c, skip_special_tokens=False) for c in sample.chunks]
        return Record(task, length, chunks, sample.questions[0].text, [sample.questions[0].answer])


def generated(o: argparse.Namespace, tokenizer) -> list[Record]:
    """All questions, made by forked workers (before the GPU is touched)."""
    global GENERATOR
    GENERATOR = Generator(o, tokenizer)
    with multiprocessing.get_context("fork").Pool(o.workers, worker_start) as pool:
        return pool.map(worker_make, GENERATOR.jobs, chunksize=8)


def worker_start() -> None:
    """The tokenizer's threads do not survive a fork."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def worker_make(job: tuple[str, int, int]) -> Record:
    """One question, in a worker."""
    return GENERATOR.make(job)


def read(paths: list[Path]) -> list[Record]:
    """Questions from files."""
    records = []
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            r = json.loads(line)
            records.append(Record(r["task"], r["length"] or 0, r["chunks"], r["question"], r["answers"]))
    return records


def prompt(tokenizer, record: Record) -> list[int]:
    """The ids up to and including the answer mark."""
    ids = [BOS]
    for encoding in tokenizer.encode_batch(record.chunks, add_special_tokens=False):
        ids += encoding.ids + [CHUNK]
    return ids + [QUESTION, *tokenizer.encode(record.question, add_special_tokens=False).ids, ANSWER]


def own_answers(o: argparse.Namespace, device: torch.device, prompts: list[list[int]]) -> list[list[int]]:
    """Answers of this folder's own model."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    shape, weights = load(o.model, device, dtype)
    model = Model(shape, device, dtype, compiled=False)
    return Decoder(model, weights, 131072 if cuda else 8192).answers(prompts)


def transformers_answers(o: argparse.Namespace, device: torch.device, prompts: list[list[int]]) -> list[list[int]]:
    """Answers of transformers, one prompt at a time."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(o.model, dtype=dtype).to(device).eval()
    found = []
    for ids in prompts:
        given = torch.tensor([ids], device=device)
        out = model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=48)
        found.append([t for t in out[0, len(ids) :].tolist() if t != 2])
    return found


def plain(text: str) -> str:
    """Lower case, without articles, punctuation and doubled spaces."""
    text = re.sub(r"[^\w\s]", "", text.lower())
    return " ".join(w for w in text.split() if w not in ("a", "an", "the"))


def score(record: Record, answer: str) -> tuple[float, float]:
    """Exact match, and the share of the wanted values found."""
    same = plain if record.task in FREE else str.strip
    exact = any(same(answer) == same(a) for a in record.answers)
    wanted = record.answers[0].split(", ")
    given = answer.strip().split(", ")
    return float(exact), max(float(exact), sum(w in given for w in wanted) / len(wanted))


def interval(right: float, count: int) -> list[float]:
    """Wilson's 95 % interval of a share, in percent."""
    z, p = 1.96, right / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return [round(100 * max(0.0, middle - half), 1), round(100 * min(1.0, middle + half), 1)]


def table(records: list[Record], answers: list[str]) -> list[dict]:
    """One entry a task and length."""
    cells: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for record, answer in zip(records, answers):
        cells.setdefault((record.task, record.length), []).append(score(record, answer))
    rows = []
    for (task, length), scores in cells.items():
        right, count = sum(e for e, _ in scores), len(scores)
        rows.append({"task": task, "length": length, "n": count, "exact": round(100 * right / count, 1),
                     "interval_95": interval(right, count), "part": round(100 * sum(p for _, p in scores) / count, 1)})
    return rows


def machine(device: torch.device) -> str:
    """What it ran on."""
    return torch.cuda.get_device_name(0) if device.type == "cuda" else f"cpu ({platform.machine()})"


def training(folder: Path) -> list[dict]:
    """The training run's log, thinned to at most 30 lines."""
    path = folder / "train-log.jsonl"
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    curve = [line for line in lines if "lengths" in line]
    stride = max(1, math.ceil(len(curve) / 26))
    kept = {id(line) for line in curve[::stride] + curve[-1:]}
    return [line for line in lines if "lengths" not in line or id(line) in kept]


def main() -> int:
    """Model to measured.json."""
    o = options()
    out = target(o)
    device = torch.device(o.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        torch.set_num_threads(1)
    tokenizer = load_tokenizer(o.model / "tokenizer.json")
    records = read(o.records) if o.records else generated(o, tokenizer)
    if o.dump:
        with o.dump.open("w", encoding="utf-8") as dump:
            for number, r in enumerate(records):
                dump.write(json.dumps({"id": f"{r.task}-{r.length}-{number}"} | vars(r), ensure_ascii=False) + "\n")
    start = time.monotonic()
    run = own_answers if o.engine == "own" else transformers_answers
    found = run(o, device, [prompt(tokenizer, r) for r in records])
    seconds = round(time.monotonic() - start, 1)
    rows = table(records, [tokenizer.decode(ids) for ids in found])
    for row in rows:  # before anything else can fail
        print(f"{row['task']:<16} {row['length']:>6}  n {row['n']:>4}  exact {row['exact']:5.1f}  part {row['part']:5.1f}")
    print(f"{len(records)} questions in {seconds} s", flush=True)
    weights = (o.model / "model.safetensors").read_bytes()
    result = {
        "command": "python3 " + " ".join(["eval/train/evaluate.py", *sys.argv[1:]]), "engine": o.engine,
        "machine": machine(device), "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
        "weights": {"bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()},
        "seconds": seconds, "results": rows, "training": training(o.model),
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
