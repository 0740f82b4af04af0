"""Training batches, made by worker processes ahead of the training loop.

Batch `i` depends on the seed, on `i` and on the row length alone. With a schedule in steps the length follows from `i`
as well, so a run can be repeated exactly; with one in minutes it follows from the clock.
"""

import multiprocessing
import os
import queue
import random
import sys
import traceback
from dataclasses import dataclass

import numpy as np

from rows import REPLY, TEXT, Composer, retry


@dataclass
class Batch:
    """One step's rows and the positions that carry loss."""

    index: int
    length: int
    tokens: np.ndarray  # [tokens a step] int32
    at: np.ndarray  # [positions] int32: where in the flat stream a prediction is judged
    target: np.ndarray  # [positions] int32: the token that follows there
    kind: np.ndarray  # [positions] uint8: TEXT, REPLY, or 0 for no loss


@dataclass
class Plan:
    """Batch shape: tokens a step, and judged positions a step (both fixed, so that one compilation serves)."""

    tokens: int
    seed: int
    stages: list[tuple[float, dict[int, float]]]  # (from this progress on, shares of the tokens by row length)

    @property
    def positions(self) -> int:
        """Judged positions a step."""
        return self.tokens * 5 // 16

    def length(self, index: int, progress: float) -> int:
        """The row length of a batch."""
        shares = next(s for start, s in reversed(self.stages) if progress >= start)
        return random.Random(f"{self.seed}/length/{index}").choices(list(shares), list(shares.values()))[0]


def stages(longest: int) -> list[tuple[float, dict[int, float]]]:
    """The length curriculum up to `longest`: short rows first, the longest ones in the last third."""
    wanted = [
        (0.0, {512: 0.6, 1024: 0.4}),
        (0.33, {512: 0.2, 1024: 0.3, 2048: 0.5}),
        (0.6, {1024: 0.2, 2048: 0.3, 4096: 0.3, 8192: 0.2}),
    ]
    if longest > 8192:
        wanted += [
            (0.75, {1024: 0.15, 2048: 0.2, 4096: 0.2, 8192: 0.2, 16384: 0.25}),
            (0.85, {1024: 0.15, 2048: 0.15, 4096: 0.15, 8192: 0.2, 16384: 0.2, 32768: 0.15}),
        ]
    kept = []
    for start, shares in wanted:
        shares = {n: s for n, s in shares.items() if n <= longest}
        kept.append((start, shares or {longest: 1.0}))
    return kept


def make_batch(composer: Composer, plan: Plan, index: int, length: int) -> Batch:
    """Builds one batch."""
    rng = random.Random(f"{plan.seed}/batch/{index}")
    rows = [retry(lambda: composer.training_row(rng, length)) for _ in range(plan.tokens // length)]
    tokens = np.concatenate([ids for ids, _ in rows])
    kinds = np.concatenate([np.append(k[1:], 0) for _, k in rows]).astype(np.uint8)  # of the token that follows
    follow = np.append(tokens[1:], 0)
    pick = np.random.default_rng([plan.seed, index])
    replies, text = np.flatnonzero(kinds == REPLY), pick.permutation(np.flatnonzero(kinds == TEXT))
    # The number of judged positions is fixed; the surplus ones carry no loss but are distinct, since many gradients
    # into one position would be summed one by one.
    at = np.concatenate([replies, text, np.flatnonzero(kinds == 0)])[: plan.positions].astype(np.int32)
    kind = kinds[at]
    kind[len(replies) + len(text) // 5 :] = 0
    return Batch(index, length, tokens, at, follow[at].astype(np.int32), kind)


def _work(composer: Composer, plan: Plan, first: int, step: int, steps: int, progress, out) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork
    try:
        index = first
        while True:
            done = index / steps if steps else progress.value
            out.put(make_batch(composer, plan, index, plan.length(index, min(done, 0.999))))
            index += step
    except (KeyboardInterrupt, BrokenPipeError):
        pass
    except BaseException:
        out.put(traceback.format_exc())
        sys.exit(1)


class Loader:
    """Worker processes, each making every n-th batch. Start it before the GPU is touched: the workers are forked."""

    def __init__(self, composer: Composer, plan: Plan, workers: int, first: int, steps: int, ahead: int = 6):
        context = multiprocessing.get_context("fork")
        self.progress = context.Value("d", 0.0)
        self.queues = [context.Queue(ahead) for _ in range(workers)]
        self.next = 0
        self.waited = 0
        self.processes = []
        for number, out in enumerate(self.queues):
            arguments = (composer, plan, first + number, workers, steps, self.progress, out)
            self.processes.append(context.Process(target=_work, args=arguments, daemon=True))
            self.processes[-1].start()

    def get(self) -> Batch:
        """The next batch. Raises `RuntimeError` with the worker's traceback if it failed."""
        source = self.queues[self.next % len(self.queues)]
        self.next += 1
        try:
            batch = source.get_nowait()
        except queue.Empty:
            self.waited += 1
            batch = source.get(timeout=300)
        if isinstance(batch, str):
            raise RuntimeError("a data worker failed:\n" + batch)
        return batch

    def close(self) -> None:
        """Ends the workers."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join()
