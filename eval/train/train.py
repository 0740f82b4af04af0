#!/usr/bin/env python3
"""Trains a small Llama that retrieves from long contexts, from plain text files, on one GPU.

`README.md` beside this file says what it does and what it costs; `--help` lists the options.
"""

import argparse
import json
import os
import queue
import sys
import threading
import time
from pathlib import Path

from data import Loader, Plan, stages
from source import Source

STARTED = time.monotonic()


def options() -> argparse.Namespace:
    """The command line."""
    o = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    o.add_argument("--text", type=Path, nargs="*", default=[], help="folders or files of .txt and .md (default: the repository's)")
    o.add_argument("--questions", type=Path, help="JSON lines with passage, question, answer: questions by people")
    o.add_argument("--wordings", type=Path, help="another wordings.json")
    o.add_argument("--tokenizer", type=Path, help="reuse this tokenizer.json (default: train one)")
    o.add_argument("--out", type=Path, required=True, help="folder for the model, the log and checkpoints")
    o.add_argument("--minutes", type=float, default=6.0, help="time budget, start-up and compilation included")
    o.add_argument("--steps", type=int, default=0, help="train this many steps instead; repeatable exactly")
    o.add_argument("--max-length", type=int, default=8192, help="longest row of the curriculum: 512 to 32768")
    o.add_argument("--tokens-per-step", type=int, default=65536)
    o.add_argument("--text-weight", type=float, nargs=2, default=(0.5, 0.1), help="lambda before and after the decay begins")
    o.add_argument("--decay-from", type=float, default=0.55, help="progress at which the rate begins to fall to zero")
    o.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    o.add_argument("--seed", type=int, default=1)
    o.add_argument("--no-compile", action="store_true", help="run eagerly")
    o.add_argument("--device", default="", help="cuda or cpu (default: cuda where there is one)")
    o.add_argument("--log-every", type=int, default=200)
    o.add_argument("--checkpoint-minutes", type=float, default=0.0, help="save the whole state this often (0: never)")
    o.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    o.add_argument("--tiny", action="store_true", help="a model of 2 layers and short rows, to try the chain on a CPU")
    return o.parse_args()


class Feed(threading.Thread):
    """Takes batches from the loader, pins them and hands them over, a few ahead."""

    def __init__(self, loader: Loader, pin: bool):
        super().__init__(daemon=True)
        self.loader, self.pin = loader, pin
        self.ready: queue.Queue = queue.Queue(4)

    def run(self) -> None:
        """Until the process ends."""
        import torch

        try:
            while True:
                batch = self.loader.get()
                tensors = [torch.from_numpy(a) for a in (batch.tokens, batch.at, batch.target, batch.kind)]
                counts = (int((batch.kind == 2).sum()), int((batch.kind == 1).sum()))
                self.ready.put((batch.index, batch.length, [t.pin_memory() if self.pin else t for t in tensors], counts))
        except BaseException as error:  # handed to the training loop, which raises it
            self.ready.put(error)

    def get(self):
        """The next batch: number, row length, tensors, counts of answer and text positions."""
        item = self.ready.get()
        if isinstance(item, BaseException):
            raise item
        return item


class Log:
    """Running sums by row length, kept on the device; one line a report."""

    def __init__(self, path: Path):
        self.path, self.sums, self.counts = path, {}, {}
        self.last = (time.monotonic(), 0)

    def add(self, length: int, sums, counts: tuple[int, int]) -> None:
        """Takes one step's sums (answer loss, text loss, right tokens) without waiting for the device."""
        self.sums[length] = self.sums.get(length, 0) + sums
        old = self.counts.get(length, (0, 0))
        self.counts[length] = (old[0] + counts[0], old[1] + counts[1])

    def report(self, **fields) -> None:
        """Writes a line with what was summed since the last one."""
        now = time.monotonic()
        steps = fields["step"] - self.last[1]
        fields["ms_a_step"] = round(1000 * (now - self.last[0]) / max(1, steps), 2)
        self.last = (now, fields["step"])
        fields["lengths"] = {}
        for length in sorted(self.sums):
            answer, text, right = self.sums[length].tolist()
            answers, texts = self.counts[length]
            fields["lengths"][length] = {
                "answer_loss": round(answer / max(1, answers), 4),
                "text_loss": round(text / max(1, texts), 4),
                "right_percent": round(100 * right / max(1, answers), 2),
            }
        self.sums, self.counts = {}, {}
        self.write(fields)

    def write(self, fields: dict) -> None:
        """One JSON line, to the file and to the terminal."""
        line = json.dumps(fields)
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as out:
            out.write(line + "\n")


class Trainer:
    """Weights, optimizer and the compiled step."""

    def __init__(self, o: argparse.Namespace, plan: Plan, log: Log):
        import torch
        from model import Model, Shape, initial_weights
        from optim import Optimizer

        self.torch, self.o, self.plan, self.log = torch, o, plan, log
        self.device = torch.device(o.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.shape = Shape()
        if o.tiny:
            self.shape = Shape(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                               num_key_value_heads=1, head_dim=32)
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        s = self.shape
        master = {n: w.to(self.device) for n, w in initial_weights(s, o.seed).items()}
        splits = {"qkv": [s.query, s.key, s.key], "out": [s.hidden_size], "gate_up": [s.intermediate_size] * 2,
                  "down": [s.hidden_size]}
        self.optimizer = Optimizer(master, splits)
        self.work = {n: w.to(self.dtype, copy=True).requires_grad_() for n, w in master.items()}
        self.build = lambda compiled: Model(s, self.device, self.dtype, compiled, probe=True)
        self.model = self.build(self.device.type == "cuda" and not o.no_compile)
        self.step, self.before = 0, 0.0

    def elapsed(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self.before + time.monotonic() - STARTED

    def progress(self) -> float:
        """Share of the run that is done."""
        if self.o.steps:
            return self.step / self.o.steps
        return self.elapsed() / (60 * self.o.minutes)

    def rate(self, progress: float) -> float:
        """Warm-up over 100 steps, then constant, then linear to zero."""
        fall = min(1.0, (1 - progress) / max(1e-9, 1 - self.o.decay_from))
        return max(0.0, fall) * min(1.0, (self.step + 1) / 100)

    def backward(self, length: int, tensors, counts, text_weight: float):
        """Loss and gradients of one batch; returns the sums for the log."""
        tokens, at, target, kind = (t.to(self.device, non_blocking=True) for t in tensors)
        answer, text, right = self.model.losses(self.work, tokens, length, at.long(), target.long(), kind)
        loss = answer / max(1, counts[0]) + text_weight * text / max(1, counts[1])
        loss.backward()
        return self.torch.stack([answer.detach(), text.detach(), right])

    def first(self, *batch):
        """The first step compiles; where that fails, training goes on eagerly."""
        try:
            return self.backward(*batch)
        except Exception as error:  # the compiler raises many kinds
            if self.device.type != "cuda" or self.o.no_compile:
                raise
            self.log.write({"note": f"compilation failed, running eagerly: {type(error).__name__}: {str(error)[:300]}"})
            self.model = self.build(False)
            for w in self.work.values():
                w.grad = None
            return self.backward(*batch)

    def train_step(self, batch, progress: float) -> None:
        """One step on a batch from the feed."""
        _, length, tensors, counts = batch
        text_weight = self.o.text_weight[progress >= self.o.decay_from]
        run = self.first if self.step == 0 else self.backward
        self.log.add(length, run(length, tensors, counts, text_weight), counts)
        self.optimizer.step({n: w.grad for n, w in self.work.items()}, self.rate(progress))
        with self.torch.no_grad():
            for name, w in self.work.items():
                w.copy_(self.optimizer.master[name])
                w.grad = None
        self.step += 1

    def save(self, path: Path) -> None:
        """The whole state, written beside and then moved over the old one."""
        state = {"weights": self.optimizer.master, "optimizer": self.optimizer.state(), "step": self.step,
                 "elapsed": self.elapsed()}
        self.torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        """Takes up a saved state."""
        state = self.torch.load(path, map_location=self.device, weights_only=True)
        self.optimizer.load(state["optimizer"])
        with self.torch.no_grad():
            for name, value in state["weights"].items():
                self.optimizer.master[name].copy_(value)
                self.work[name].copy_(value)
        self.step, self.before = state["step"], state["elapsed"]


def loop(trainer: Trainer, loader: Loader, checkpoint: Path) -> None:
    """Trains until the budget is spent."""
    o, log = trainer.o, trainer.log
    feed = Feed(loader, trainer.device.type == "cuda")
    feed.start()
    saved = time.monotonic()
    while (progress := trainer.progress()) < 1:
        loader.progress.value = progress
        trainer.train_step(feed.get(), progress)
        if trainer.step % o.log_every == 0 or trainer.step == 1:
            log.report(step=trainer.step, seconds=round(trainer.elapsed(), 1), progress=round(progress, 4),
                       tokens=trainer.step * o.tokens_per_step, rate=round(trainer.rate(progress), 4), waits=loader.waited)
        if o.checkpoint_minutes and time.monotonic() - saved > 60 * o.checkpoint_minutes:
            trainer.save(checkpoint)
            saved = time.monotonic()
    if log.sums:
        log.report(step=trainer.step, seconds=round(trainer.elapsed(), 1), progress=1.0,
                   tokens=trainer.step * o.tokens_per_step, rate=0.0, waits=loader.waited)
    if o.checkpoint_minutes:
        trainer.save(checkpoint)


def main() -> int:
    """Text to model."""
    o = options()
    if o.tiny:
        o.tokens_per_step, o.max_length = min(o.tokens_per_step, 2048), min(o.max_length, 512)
    o.out.mkdir(parents=True, exist_ok=True)
    checkpoint, tokenizer = o.out / "checkpoint.pt", o.out / "tokenizer.json"
    if o.resume and not checkpoint.is_file():
        sys.exit(f"--resume: expected a checkpoint at {checkpoint}, found none; leave --resume out to start afresh")
    source = Source(o.text, o.wordings, o.questions)
    source.load_tokenizer(tokenizer if o.resume else o.tokenizer)
    source.tokenizer.save(str(tokenizer))
    plan = Plan(o.tokens_per_step, o.seed, stages(o.max_length))
    composer = source.composer(evaluation=False)
    done = 0
    if o.resume:
        import torch

        done = torch.load(checkpoint, map_location="cpu", weights_only=True)["step"]
    loader = Loader(composer, plan, o.workers, done, o.steps)
    log = Log(o.out / "train-log.jsonl")
    trainer = Trainer(o, plan, log)
    if o.resume:
        trainer.load(checkpoint)
        log.last = (time.monotonic(), trainer.step)
    fields = {"paragraphs": len(source.paragraphs), "sentences": len(composer.pools[0]),
              "vocabulary": source.tokenizer.get_vocab_size(), "device": str(trainer.device),
              "attention": trainer.model.attention.name, "parameters": sum(w.numel() for w in trainer.work.values()),
              "workers": o.workers, "seconds": round(trainer.elapsed(), 1)}
    fields["command"] = "python3 " + " ".join(["eval/train/train.py", *sys.argv[1:]])
    log.write({"start": fields | {"max_length": o.max_length, "minutes": o.minutes, "steps": o.steps, "seed": o.seed}})
    try:
        loop(trainer, loader, checkpoint)
    finally:
        loader.close()
    from export import save

    save(o.out, trainer.shape, trainer.optimizer.master, source.tokenizer, o.max_length)
    log.write({"end": {"steps": trainer.step, "seconds": round(trainer.elapsed(), 1), "exported": str(o.out)}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
