#!/usr/bin/env python3
"""Checks the generated data: lengths, places of the facts, determinism, what is held out, token ids. CPU, seconds."""

import random
import re
import sys

import numpy as np

from data import Plan, make_batch, stages
from rows import REPLY, retry
from source import Source
from tasks import ALL, CROSSING
from words import held_out


def fails(message: str) -> None:
    """Ends the check."""
    sys.exit("check_data: " + message)


def samples(source: Source, evaluation: bool) -> None:
    """Every task: the text of each chunk gives its ids again; the context holds the answer's parts in order."""
    composer, decode = source.composer(evaluation), source.tokenizer.decode
    for task in ALL:
        for number in range(12):
            length = (512, 1024, 4096)[number % 3]
            sample = retry(lambda: composer.evaluation_sample(random.Random(f"{task}{number}"), task, length))
            texts = [decode(c, skip_special_tokens=False) for c in sample.chunks]
            if composer.encode(texts) != sample.chunks:
                fails(f"{task}: a chunk's text does not give its ids again")
            used = int(np.flatnonzero(sample.row(length)[0])[-1]) + 1
            if used < 0.85 * length:
                fails(f"{task}: only {used} of {length} tokens are filled")
            question, parts = sample.questions[0].text, sample.questions[0].answer.split(", ")
            places = [next((c for c, t in enumerate(texts) if p in t), None) for p in parts]
            if None in places:
                fails(f"{task}: {parts} is not in the context of «{question}»")
            if task in ("vt", "niah_multivalue") and places != sorted(places):
                fails(f"{task}: answers are not in the order of appearance")
            if task in CROSSING and not crosses(question, parts[0], texts):
                fails(f"{task}: «{question}» can be answered from one chunk")


def crosses(question: str, answer: str, texts: list[str]) -> bool:
    """Whether no sentence holds both the answer and a name that the question asks about."""
    names = set(re.findall(r"[A-Z][a-z]{3,}", question.split(" ", 1)[1]))
    return not any(answer in s and names & set(re.findall(r"[A-Z][a-z]{3,}", s)) - {answer}
                   for t in texts for s in re.split(r"(?<=\.) ", t))


def splits(source: Source) -> None:
    """The two splits share no key, invented name or variable."""
    rng = random.Random(5)
    for evaluation in (False, True):
        names = source.names(evaluation)
        drawn = names.words + [names.invented(rng) for _ in range(300)]
        drawn += [names.person(rng)[0].split()[1] for _ in range(300)]
        if any(held_out(w) != evaluation for w in drawn):
            fails("a word or name of the other split was drawn")


def batches(source: Source) -> None:
    """A batch follows from seed and index; every judged position names the token that follows in its own row."""
    composer, plan = source.composer(False), Plan(32768, 3, stages(32768))
    for index, length in enumerate((512, 1024, 2048, 8192, 16384, 32768)):
        batch, again = (make_batch(composer, plan, index, length) for _ in range(2))
        if any((getattr(batch, n) != getattr(again, n)).any() for n in ("tokens", "at", "target", "kind")):
            fails(f"batch {index} differs when it is built again")
        if len(set(batch.at.tolist())) != plan.positions:
            fails("judged positions repeat")
        judged = batch.at[batch.kind > 0]
        if (judged % length == length - 1).any() or (batch.tokens[judged + 1] != batch.target[batch.kind > 0]).any():
            fails("a judged position does not name the token that follows")
        replies = batch.target[batch.kind == REPLY]
        if (replies == 2).sum() != (batch.tokens == 4).sum():
            fails("not every question's answer is judged up to its end mark")


def main() -> int:
    """All checks."""
    source = Source([])
    source.load_tokenizer(None)
    splits(source)
    samples(source, False)
    samples(source, True)
    batches(source)
    print("check_data: all in order")
    return 0


if __name__ == "__main__":
    sys.exit(main())
